"""`mezzotint serve`: the server with its page, on this machine alone unless a token is given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from mezzotint.cli.options import MEMORY, MODEL, OUTPUT, SERVER, Dtype, Memory, option
from mezzotint.cli.terminal import check_memory, show
from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.placement import parse_size

MAX_TOKEN = 1000  # characters of a token's file


def serve(
    model: Annotated[
        list[str] | None,
        option(
            "Model folder, file or hub id. May be repeated; the first is the default.",
            "MODEL",
            MODEL,
            default="emoji, the bundled model",
        ),
    ] = None,
    vaes: Annotated[Path | None, option("Folder of VAE files.", "FOLDER", MODEL)] = None,
    loras: Annotated[Path | None, option("Folder of LoRA files.", "FOLDER", MODEL)] = None,
    embeddings: Annotated[Path | None, option("Folder of textual inversions.", "FOLDER", MODEL)] = None,
    controls: Annotated[
        Path | None,
        option("Folder of ControlNets and T2I-Adapters: files, and diffusers folders.", "FOLDER", MODEL),
    ] = None,
    ip_adapters: Annotated[
        Path | None,
        option(
            "Folder of IP-Adapters, their image encoders, and embeddings that `mezzotint embed` wrote.",
            "FOLDER",
            MODEL,
            name="--ip-adapters",
        ),
    ] = None,
    wildcards: Annotated[Path | None, option("Folder of wildcard files.", "FOLDER", MODEL)] = None,
    host: Annotated[
        str, option("Address to listen on; another than this machine's own needs a token.", "ADDRESS", SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, option("Port; 0 is any free one.", "PORT", SERVER, default="7860")] = 7860,
    token_file: Annotated[
        Path | None, option("File with the token that clients must send.", "FILE", SERVER, name="--token-file")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        option("Name of a reverse proxy that browsers use. May be repeated.", "NAME", SERVER, name="--allow-host"),
    ] = None,
    cors: Annotated[
        list[str] | None, option("Origin whose pages may read replies. May be repeated.", "ORIGIN", SERVER)
    ] = None,
    data: Annotated[
        Path | None,
        option(
            "Folder of the queue, the pictures and the uploads.", "FOLDER", OUTPUT, default="~/.local/share/mezzotint"
        ),
    ] = None,
    keep: Annotated[
        str | None,
        option("Size of the pictures and uploads that are kept, such as 20GiB.", "SIZE", OUTPUT, default="all"),
    ] = None,
    preview_every: Annotated[
        int, option("Steps between two previews; 0 is none.", "N", OUTPUT, default="1", name="--preview-every")
    ] = 1,
    preview_vae: Annotated[
        list[str] | None,
        option(
            "TAESD that shows the previews of a model. May be repeated, in the order of --model.",
            "FILE",
            OUTPUT,
            default="a matrix that is fitted to the model's VAE",
            name="--preview-vae",
        ),
    ] = None,
    memory: Memory = None,
    device: Annotated[
        list[str] | None,
        option(
            "Device that draws: cpu, cuda, cuda:1, mps, ... May be repeated for several CUDA devices.",
            "DEVICE",
            MEMORY,
            default="all CUDA devices, or the best device if there are none",
        ),
    ] = None,
    share_batches: Annotated[
        bool,
        option(
            "Draw waiting jobs that differ only in prompt and seed in one batch, on CUDA devices.",
            None,
            MEMORY,
            name="--share-batches",
        ),
    ] = False,
    dtype: Dtype = None,
) -> None:
    """Start the server and its page; Ctrl-C stops it."""
    if memory is not None:
        check_memory(memory)
    try:
        from mezzotint.server import Settings
        from mezzotint.server import serve as run
    except ImportError as error:
        raise MissingExtraError(
            f"the server needs the package {error.name}; install it with: pip install 'mezzotint[serve]'"
        ) from None
    settings = Settings(
        data=data or _default_folder(),
        host=host,
        port=port,
        token=_read_token(token_file) if token_file else None,
        models=tuple(model or ()),
        vaes=vaes,
        loras=loras,
        embeddings=embeddings,
        controls=controls,
        ip_adapters=ip_adapters,
        wildcards=wildcards,
        devices=tuple(device or ()),
        share_batches=share_batches,
        dtype=dtype,
        memory=memory,
        keep=parse_size(keep, "keep") if keep else None,
        allow_hosts=tuple(allow_host or ()),
        cors=tuple(cors or ()),
        preview_every=preview_every,
        preview_vaes=tuple(preview_vae or ()),
    )
    run(settings, lambda url: show(url))


def _default_folder() -> Path:
    """Return the data folder of the user."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "mezzotint"


def _read_token(path: Path) -> str:
    """Return the token in a file. Raises RequestError."""
    from mezzotint.files import read_text

    try:
        return read_text(path, limit=MAX_TOKEN).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"token-file is {str(path)!r}, which cannot be read ({error})") from None
