"""`mezzotint plan`: predict the memory of a run, and choose measures that keep a budget, without loading a model."""

from __future__ import annotations

from typing import Annotated, Any

from mezzotint.cli.fields import fields_of
from mezzotint.cli.options import (
    FROM_PICTURE,
    HIRES,
    Batch,
    Columns,
    Controls,
    Count,
    Device,
    Dtype,
    Guidance,
    IPAdapters,
    Json,
    MemoryOrAuto,
    Model,
    PagScale,
    Refiner,
    RefinerAt,
    Region,
    Rows,
    Safety,
    Sampler,
    Size,
    Steps,
    add_options_of,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import check_memory, print_json, say, show


@add_options_of(model_options)
def plan(
    model: Model = None,
    size: Size = None,
    count: Count = None,
    batch: Batch = None,
    steps: Steps = None,
    guidance: Guidance = None,
    pag_scale: PagScale = None,
    region: Region = None,
    columns: Columns = None,
    rows: Rows = None,
    sampler: Sampler = None,
    image: Annotated[str | None, option("Picture to start from.", "FILE", FROM_PICTURE)] = None,
    control: Controls = None,
    ip_adapter: IPAdapters = None,
    tile: Annotated[int | None, option("Draw in tiles of at most this side.", "PIXELS", FROM_PICTURE)] = None,
    hires: Annotated[
        float | None, option("Draw a second pass, larger by this factor (1 to 8).", "FACTOR", HIRES)
    ] = None,
    refiner: Refiner = None,
    refiner_at: RefinerAt = None,
    safety: Safety = None,
    memory: MemoryOrAuto = "auto",
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Predict the memory of a run, and how to make it fit."""
    options = locals()
    model_given = take_model_options(overrides, safety)
    from mezzotint.request import Request

    check_memory(memory)
    request = Request(prompt="", **fields_of(options))
    from mezzotint.devices import bfloat16_hint
    from mezzotint.memory.planner import plan as plan_memory

    made = plan_memory(model, memory, request, device=device, dtype=dtype, **model_given)
    unet = made.model.weights["unet"]
    hint = bfloat16_hint(dtype, made.model.device, unet.large + unet.small)
    for notice in (*made.model.found.notices, *hint):
        say(notice)
    if as_json:
        print_json(made.to_dict())
    else:
        show(*made.table().split("\n"))
