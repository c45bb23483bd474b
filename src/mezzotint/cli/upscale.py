"""`mezzotint upscale`: enlarge a picture, which keeps its record."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.naming import SUFFIXES, check_out, names_several
from mezzotint.cli.options import MEMORY, MODEL, OUTPUT, Device, Dtype, Json, option
from mezzotint.cli.terminal import check_memory, long_work, print_json, show
from mezzotint.errors import RequestError


def upscale(
    file: Annotated[Path, typer.Argument(metavar="PICTURE", help="The picture: PNG, JPEG, WebP, ...")],
    model: Annotated[
        str | None,
        option("File of an upscaler that spandrel knows (extra [upscale]).", "FILE", MODEL, default="Lanczos"),
    ] = None,
    scale: Annotated[
        float | None,
        option("Factor by which the picture is enlarged.", "X", OUTPUT, default="4, or the upscaler's own"),
    ] = None,
    tile: Annotated[
        int | None,
        option("Largest side of the tiles that an upscaler sees.", "PIXELS", MEMORY, default="as memory allows"),
    ] = None,
    memory: Annotated[
        str, option("Memory that the process may use; auto is what is free.", "SIZE|auto", MEMORY, default="auto")
    ] = "auto",
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str | None,
        option(
            "FILE.png, .jpg or .webp, which is replaced.",
            "FILE",
            OUTPUT,
            default="PICTURE-WIDTHxHEIGHT.png in the current folder",
            name="--out -o",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Enlarge a picture; its record is kept, and says how."""
    from mezzotint.enlarge import upscale as enlarge
    from mezzotint.images.io import save
    from mezzotint.request import Request

    check_memory(memory)
    if out is not None:
        if names_several(out):
            raise RequestError(f"out is {out!r}; it must be the name of a file, such as large.png")
        check_out(out, Request(prompt=""), SUFFIXES)
    with long_work("enlarging", lambda: "no picture was written") as on_step:
        made = enlarge(
            str(file), model, scale=scale, tile=tile, memory=memory, device=device, dtype=dtype, on_step=on_step
        )
    if out is not None:
        path = Path(out)
        save(made, path)
    else:
        stem = f"{file.stem}-{made.width}x{made.height}"
        for number in itertools.count(1):
            path = Path(f"{stem}{f'-{number}' if number > 1 else ''}.png")
            with suppress(FileExistsError):
                save(made, path, overwrite=False)
                break
    if as_json:
        print_json({"path": str(path), "width": made.width, "height": made.height})
    else:
        show(f"Wrote {path} ({made.width}x{made.height})")
