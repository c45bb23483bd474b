"""Scales of quantized weights, as ComfyUI writes them into files.

    NAME.weight (float8), NAME.scale_weight or NAME.weight_scale     the weight is NAME.weight * scale
    scaled_fp8, NAME.comfy_quant                                     marks; the second is JSON as bytes
    NAME.scale_input, NAME.input_scale                               for computing in float8, which is not done here

The scale is one number, or one for each row. What is quantized in another way (int8, convrot, nvfp4) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Sources

SCALES = ("scale_weight", "weight_scale")
FORMATS = ("float8_e4m3fn", "float8_e5m2")
MARK, UNUSED = "comfy_quant", ("scaled_fp8", "scale_input", "input_scale")
OTHER_SCALES = (
    "weight_scale_2",
    "scales",
    "weight_s_rel",
    "weight_s_channel",
    "weight_zero_point",
    "qweight",
    "absmax",
)
MAX_MARK_BYTES = 4096


def pair_scales(
    files: Mapping[str, TensorFile], sources: Sources, unknown: list[str]
) -> tuple[Sources, list[str], list[str]]:
    """Pair each weight with its scale.

    Args:
        files: The file of each tensor.
        sources: The source of each parameter; scales and marks are listed like parameters.
        unknown: Keys that match no parameter.

    Returns:
        The sources of the parameters alone, each with its scale; the unknown keys without marks; and sentences about
        quantized weights that cannot be read.
    """
    rest, problems = dict(sources), []
    for name, source in sources.items():
        owner, _, leaf = name.rpartition(".")
        weight = f"{owner}.weight"
        if leaf == MARK:
            problems += _mark_problems(files[source.key], source.key)
        elif leaf in SCALES and weight in rest:
            problems += _scale_problems(files, rest[weight].key, source.key)
            rest[weight] = rest[weight]._replace(scale=source.key)
        elif leaf in SCALES or leaf in OTHER_SCALES:
            problems.append(f"{source.key} is a scale that belongs to no weight, and must not be ignored")
        if leaf in (MARK, *UNUSED, *SCALES, *OTHER_SCALES):
            del rest[name]
    for key in unknown:
        if key.rpartition(".")[2] in (*SCALES, *OTHER_SCALES):
            problems.append(f"{key} is a scale that belongs to no weight, and must not be ignored")
    return rest, [key for key in unknown if key.rpartition(".")[2] not in (MARK, *UNUSED)], problems


def _scale_problems(files: Mapping[str, TensorFile], weight: str, scale: str) -> list[str]:
    """Return a sentence if a scale does not fit its weight."""
    rows, entry = files[weight].entries[weight].shape[:1], files[scale].entries[scale]
    if not entry.dtype.is_floating_point or (entry.count != 1 and (entry.count,) != rows):
        return [f"{scale} has shape {entry.shape}; it must be one number, or one for each row of {weight}"]
    return []


def _mark_problems(file: TensorFile, key: str) -> list[str]:
    """Return a sentence if a mark names a format that is not read."""
    entry = file.entries[key]
    try:
        if entry.dtype.itemsize != 1 or entry.count > MAX_MARK_BYTES:
            raise ValueError
        mark = json.loads(bytes(file.read(key).flatten().tolist()))
        kind = f"{mark['format']}{' with convrot' if mark.get('convrot') else ''}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        kind = "no format in JSON"
    if kind in FORMATS:
        return []
    return [f"{key} marks a quantized weight ({kind[:60]}); only {' and '.join(FORMATS)} are supported"]
