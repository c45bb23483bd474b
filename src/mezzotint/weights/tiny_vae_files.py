"""Read a TAESD autoencoder from its files: one of encoder and decoder each, or one of both.

Its authors number the layers of each half from 0, the decoder's with a clamp in front. A file of a half has these
numbers alone; a file of both puts `encoder.` and `decoder.`, or `taesd_encoder.` and `taesd_decoder.`, before them;
diffusers has `encoder.layers.` and `decoder.layers.`, and does not count the clamp.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from mezzotint.errors import CheckpointError
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Shapes, Source, Sources
from mezzotint.weights.kinds import describe_kind
from mezzotint.weights.model_files import TINY_VAE, NetworkFiles

HALVES = {"encoder": r"^0\.weight$", "decoder": r"^1\.weight$"}  # a key of a file with that half alone
KEY = re.compile(r"(?:taesd_)?(encoder|decoder)\.(layers\.)?(\d{1,3})\.(.+)")
UNUSED = ("vae_scale", "vae_shift")  # of the family's latents, which the UNet's are already


def half_of(shapes: Shapes) -> str | None:
    """Return which half of a TAESD a file holds: "encoder", "decoder", "both", or None if it is something else."""
    if not any(key.endswith(".conv.0.weight") for key in shapes):
        return None
    if any(KEY.fullmatch(key) for key in shapes):
        return "both"
    text = "\n".join(shapes)
    return next((half for half, first in HALVES.items() if re.search(first, text, re.MULTILINE)), None)


def read_tiny(file: TensorFile, fields: dict[str, Any]) -> NetworkFiles | None:
    """Describe the TAESD in a file and, if that holds one half, in the file of the other beside it.

    Args:
        file: The file.
        fields: Config fields that overrule what the shapes say.

    Returns:
        The network, or None if the file holds something else.

    Raises:
        CheckpointError: If a half is missing, or the layers are not TAESD's.
    """
    half = half_of(file.shapes)
    if half is None:
        return None
    files = [file]
    if half != "both":
        files = [_prefixed(file, half), _prefixed(TensorFile(_other_half(file.path, half)), _opposite(half))]
    entries = {key: each for each in files for key in each.entries}
    sources, unknown = _sources(entries)
    shapes = {name: entries[source.key].shapes[source.key] for name, source in sources.items()}
    found = {"_class_name": TINY_VAE, **_config(file.path, "encoder", shapes), **_config(file.path, "decoder", shapes)}
    return NetworkFiles.of("vae", file.path, {**found, **fields}, entries, sources, unknown)


def read_decoder(file: TensorFile) -> NetworkFiles:
    """Describe the decoder of the TAESD in a file, whose encoder may be missing; its sources are the decoder's own.

    Raises:
        CheckpointError: If the file holds something else, or the layers are not TAESD's.
    """
    half = half_of(file.shapes)
    if half == "decoder":
        file.add_prefix("decoder.")
    sources, _ = _sources(dict.fromkeys(file.entries, file))
    own = {name: source for name, source in sources.items() if name.startswith("decoder.")}
    if half is None or not own:
        raise CheckpointError(f"{file.path} holds {describe_kind(file.shapes)}, not the decoder of a TAESD autoencoder")
    fields = _config(file.path, "decoder", {name: file.shapes[source.key] for name, source in own.items()})
    mirrored = {
        "num_encoder_blocks": fields["num_decoder_blocks"][::-1],
        "encoder_block_out_channels": fields["decoder_block_out_channels"],
    }
    stripped = {name.removeprefix("decoder."): source for name, source in own.items()}
    fields |= mirrored | {"_class_name": TINY_VAE}
    return NetworkFiles.of("vae", file.path, fields, dict.fromkeys(file.entries, file), stripped, [])


def other_half(path: Path) -> Path | None:
    """Return the file beside a half's that is named like it, with the other half's name; None if there is none."""
    for half in HALVES:
        stem, found, rest = path.name.rpartition(half)
        if found and (other := path.with_name(stem + _opposite(half) + rest)).is_file():
            return other
    return None


def _other_half(path: Path, half: str) -> Path:
    if (other := other_half(path)) is None:
        raise CheckpointError(
            f"{path} is the {half} of a TAESD autoencoder; its {_opposite(half)} must lie beside it, named like it (as "
            "taesd_encoder.safetensors and taesd_decoder.safetensors)"
        )
    if half_of(TensorFile(other).shapes) != _opposite(half):
        raise CheckpointError(f"{other} is not the {_opposite(half)} of a TAESD autoencoder, which {path.name} needs")
    return other


def _opposite(half: str) -> str:
    return "decoder" if half == "encoder" else "encoder"


def _prefixed(file: TensorFile, half: str) -> TensorFile:
    file.add_prefix(f"{half}.")
    return file


def _sources(entries: dict[str, TensorFile]) -> tuple[Sources, list[str]]:
    """Return the sources of the module's parameters, and the keys that are none of its."""
    sources: Sources = {}
    unknown: list[str] = []
    for key in entries:
        if found := KEY.fullmatch(key):
            half, diffusers, number, rest = found.groups()
            place = int(number) - (half == "decoder" and not diffusers)
            sources[f"{half}.layers.{place}.{rest}"] = Source(key)
        elif key not in UNUSED:
            unknown.append(key)
    return sources, unknown


def _config(path: Path, half: str, shapes: Shapes) -> dict[str, Any]:
    """Return the TinyVAEConfig fields of a half from the shapes of the module's parameters."""
    places = {int(found[1]) for key in shapes if (found := re.match(rf"{half}\.layers\.(\d+)\.", key))}
    blocks = {place for place in places if f"{half}.layers.{place}.conv.0.weight" in shapes}
    convolutions = sorted(places - blocks)  # each level has one before its blocks, and the last one another behind
    ends = [shapes.get(f"{half}.layers.{place}.weight", ()) for place in convolutions]
    if len(ends) < 2 or any(len(shape) != 4 for shape in ends):
        raise CheckpointError(f"{path} is not a whole TAESD autoencoder: its {half} has {len(ends)} convolutions")
    counts = [sum(a < place < b for place in blocks) for a, b in pairwise(convolutions)]
    return {
        f"num_{half}_blocks": counts,
        f"{half}_block_out_channels": [ends[0][0]] * len(counts),
        ("in_channels" if half == "encoder" else "latent_channels"): ends[0][1],
        ("latent_channels" if half == "encoder" else "out_channels"): ends[-1][0],
    }
