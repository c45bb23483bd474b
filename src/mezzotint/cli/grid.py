"""`mezzotint grid`: draw a request with every combination of some fields' values on one sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from mezzotint.cli.fields import read_prompt
from mezzotint.cli.naming import check_out
from mezzotint.cli.options import (
    OUTPUT,
    Device,
    Dtype,
    Json,
    Model,
    Prompt,
    add_options_of,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import load, long_work, print_json, say, show

AXIS = "FIELD=VALUE,..."


@add_options_of(model_options)
def grid(
    prompt: Prompt,
    x: Annotated[
        str,
        option("Columns, such as steps=10,20,30; prompt=lemon,whale replaces lemon by whale in the prompt.", AXIS),
    ],
    y: Annotated[str | None, option("Rows.", AXIS)] = None,
    z: Annotated[str | None, option("One grid for each value, one below the other.", AXIS)] = None,
    fields: Annotated[
        list[str] | None,
        option("Value for all cells, such as seed=7. May be repeated.", "FIELD=VALUE", default="seed=0", name="--set"),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path,
        option(
            "File for the sheet; an existing one is replaced. Finished cells are kept in the folder FILE-cells.",
            "FILE.png",
            OUTPUT,
            default="grid.png",
            name="--out -o",
        ),
    ] = Path("grid.png"),
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Draw every combination of fields' values on one sheet."""
    model_given = take_model_options(overrides)
    from mezzotint import grid as work
    from mezzotint import rows
    from mezzotint.errors import RequestError
    from mezzotint.images.io import save
    from mezzotint.request import Request

    given = rows.assignments("set", fields or ())
    if "prompt" in given:
        raise RequestError("prompt is given twice, as PROMPT and with --set; give only one of them")
    request = Request.model_validate({"prompt": read_prompt(prompt), **given})
    work.parse(x, y, z)
    if out.is_dir():
        raise RequestError(f"out is {str(out)!r}, a folder; it must be the name of a file, such as grid.png")
    check_out(str(out), request.replace(count=1))

    pipe = load(model, device, dtype, **model_given)
    plan = work.plan_grid(pipe, request, x, y, z)
    cells = out.with_name(f"{out.stem}-cells")
    notices: list[str] = []

    def tell(notice: str) -> None:
        notices.append(notice)
        if notice not in pipe.notices:  # which `load` has printed
            say(notice)

    with long_work(
        "drawing", lambda: f"finished cells are in {cells}, and the same command continues from there"
    ) as on_step:
        paths = work.draw(pipe, plan, cells, on_step, tell)
    sheet = work.sheet(plan, paths)
    save(sheet, out)
    if as_json:
        print_json(
            {
                "path": str(out),
                "cells": [
                    {"path": str(path), "request": cell.model_dump(mode="json")}
                    for path, cell in zip(paths, plan.cells, strict=True)
                ],
                "notices": notices,
            }
        )
    else:
        shape = " x ".join(str(n) for axis, n in zip(plan.axes, plan.shape, strict=True) if axis)
        show(f"Wrote {out} ({shape} cells, {sheet.width}x{sheet.height})")
