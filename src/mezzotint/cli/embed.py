"""`mezzotint embed`: encode pictures once for an IP-Adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.options import CONTROL, OUTPUT, Device, Dtype, Json, option
from mezzotint.cli.terminal import print_json, show
from mezzotint.errors import RequestError


def embed(
    files: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Pictures to encode.")],
    ip_adapter: Annotated[
        str,
        option("IP-Adapter to encode them for: file, folder or hub id.", "FILE", CONTROL, name="--ip-adapter"),
    ],
    encoder: Annotated[
        str | None,
        option(
            "CLIP vision encoder: file, folder or hub id.", "ENCODER", CONTROL, default="image_encoder near the file"
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str,
        option(
            "File to write; an existing one is replaced.", "FILE", OUTPUT, default="embeds.safetensors", name="--out -o"
        ),
    ] = "embeds.safetensors",
    as_json: Json = False,
) -> None:
    """Encode pictures once for an IP-Adapter."""
    if not out.endswith(".safetensors"):
        raise RequestError(f"out is {out!r}; it must be the name of a .safetensors file")

    from mezzotint.run.image_prompts import embed_images
    from mezzotint.weights.ip_adapter_files import save_embeds

    embeds = embed_images(ip_adapter, [*map(str, files)], encoder=encoder, device=device, dtype=dtype)
    path = save_embeds(Path(out), embeds)
    if as_json:
        print_json({"path": str(path), "shape": [*embeds.shape]})
    else:
        show(f"Wrote {path} ({'x'.join(map(str, embeds.shape))}: of no picture, and of {embeds.shape[1]})")
