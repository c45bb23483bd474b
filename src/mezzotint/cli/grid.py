"""`mezzotint grid`: one request with every combination of some fields' values, on one sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.draw import check_out, read_prompt
from mezzotint.cli.terminal import Device, Dtype, Json, Model, load, long_work, print_json

AXIS = "FIELD=VALUE,..."


def grid(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw; - reads standard input.")],
    x: Annotated[
        str,
        typer.Option(metavar=AXIS, help="To the right, as steps=10,20,30; prompt=lemon,whale replaces lemon by whale."),
    ],
    y: Annotated[str | None, typer.Option(metavar=AXIS, help="Downwards.")] = None,
    z: Annotated[str | None, typer.Option(metavar=AXIS, help="A grid below the other for each value.")] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="For all cells, as seed=7 (else 0). May be repeated."),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE.png", help="Overwritten; finished cells are kept in FILE-cells beside it.")
    ] = Path("grid.png"),
    as_json: Json = False,
) -> None:
    """Draw every combination of fields' values on one sheet."""
    from mezzotint import grid as work
    from mezzotint import rows
    from mezzotint.errors import RequestError
    from mezzotint.images.io import save
    from mezzotint.request import Request

    given = rows.assignments("set", fields or ())
    if "prompt" in given:
        raise RequestError("prompt is given twice; it is the command's first word")
    request = Request.model_validate({"prompt": read_prompt(prompt), **given})
    work.parse(x, y, z)
    if out.is_dir():
        raise RequestError(f"out is {str(out)!r}, a folder; it must be the name of a file, such as grid.png")
    check_out(str(out), request.replace(count=1))

    pipe = load(model, device, dtype)
    plan = work.planned(pipe, request, x, y, z)
    cells = out.with_name(f"{out.stem}-cells")
    with long_work("drawing", lambda: f"finished cells are in {cells}, and the same command goes on") as on_step:
        paths = work.draw(pipe, plan, cells, on_step)
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
            }
        )
    else:
        shape = " x ".join(str(n) for axis, n in zip(plan.axes, plan.shape, strict=True) if axis)
        typer.echo(f"Wrote {out} ({shape} cells, {sheet.width}x{sheet.height})")
