"""`mezzotint plan`: what a picture would take, and what would be done for a budget, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from mezzotint.cli.draw import fields_of
from mezzotint.cli.terminal import Device, Dtype, Json, Memory, Model, check_memory, print_json


def plan(
    model: Model = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels, multiples of 8, such as 512x768.")] = None,
    count: Annotated[int | None, typer.Option(help="How many pictures; else 1.")] = None,
    batch: Annotated[int | None, typer.Option(help="How many to draw at once.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 1000.")] = None,
    guidance: Annotated[str | None, typer.Option(metavar="SCALE", help="Guidance scale, 1 is none.")] = None,
    sampler: Annotated[str | None, typer.Option(help="A name from `mezzotint samplers`.")] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="A picture to start from.")] = None,
    hires: Annotated[float | None, typer.Option(metavar="FACTOR", help="Draw, enlarge, and draw on.")] = None,
    memory: Memory = "auto",
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Say what memory a picture takes, and what makes it fit."""
    options = locals()
    from mezzotint.request import Request

    check_memory(memory)
    request = Request(prompt="", **fields_of(options))
    from mezzotint.memory.planner import plan as planned

    made = planned(model, memory or "auto", request, device=device, dtype=dtype)
    if as_json:
        print_json(made.to_dict())
    else:
        typer.echo(made.table())
