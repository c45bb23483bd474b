"""Options of the command line to the fields of a Request."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from mezzotint.errors import RequestError

HALVES = {  # places of a region
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}
Number = TypeVar("Number", int, float)


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Request that the options of `generate` set, except the prompt.

    Args:
        options: Values by the names of generate's parameters. None and missing ones are left out.
    """
    from mezzotint.request import Request

    get = options.get
    width, height = _size("size", get("size")) or (None, None)
    fields = {name: value for name, value in options.items() if name in Request.model_fields and name != "prompt"} | {
        "negative_prompt": get("negative"),
        "prompt_syntax": get("syntax"),
        "embeddings": tuple(get("embedding") or ()) or None,
        "loras": tuple(map(lora_of, get("lora") or ())) or None,
        "control": tuple(map(control_of, get("control") or ())) or None,
        "regions": regions_of(get("region") or (), get("columns"), get("rows")),
        "ip_adapter": tuple(map(ip_adapter_of, get("ip_adapter") or ())) or None,
        "width": width,
        "height": height,
        "guidance_scale": _scales(get("guidance")),
        "sigmas": _numbers("sigmas", get("sigmas"), "falling noise levels separated by commas, such as 14.6,3,0.5,0"),
        "timesteps": _numbers(
            "timesteps", get("timesteps"), "falling timesteps separated by commas, such as 999,500,250"
        ),
        "pag_layers": tuple(name.strip() for name in (get("pag_layers") or "").split(",") if name.strip()) or None,
        "freeu": _numbers("freeu", get("freeu"), "b1,b2,s1,s2, such as 1.5,1.6,0.9,0.2"),
        "guidance_interval": pair(
            "guidance_interval", get("guidance_interval"), ":", float, "LOW:HIGH in sigma, such as 0.3:5"
        ),
        "guidance_steps": pair(
            "guidance_steps", get("guidance_steps"), ":", float, "START:STOP from 0 to 1, such as 0:0.6"
        ),
        # a Request has SDXL's order, (height, width); the command line that of --size
        "original_size": _swapped(_size("original_size", get("original_size"))),
        "crop": _swapped(pair("crop", get("crop"), "x", int, "LEFTxTOP in pixels, such as 0x64")),
        "target_size": _swapped(_size("target_size", get("target_size"))),
        "outpaint": _sides(get("outpaint")),
        "seed_size": _size("seed_size", get("seed_size")),
        "seed": secrets.randbelow(2**32) if get("seed") == -1 else get("seed"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def regions_of(texts: Sequence[str], columns: str | None, rows: str | None) -> list[Any] | None:
    """Parse the regions: "left@2=a lemon", or with columns or rows the prompts alone."""
    from mezzotint import regions

    if columns is not None and rows is not None:
        raise RequestError("columns and rows are both given, but exclude each other; leave one of them out")
    if columns is not None:
        return regions.columns(columns, texts)
    if rows is not None:
        return regions.rows(rows, texts)
    return [_region(text) for text in texts] or None


def _region(text: str) -> dict[str, Any]:
    """Parse "left@2=a lemon": a named half, a box or the file of a mask, its weight, and the prompt."""
    place, mark, prompt = text.partition("=")
    if not mark or not place:
        right = "it must be PLACE=PROMPT, such as left=a lemon, 0,0,0.5,1=a lemon or mask.png=a lemon"
        raise RequestError(f"region is {text[:60]!r}; {right}")
    fields: dict[str, Any] = {"prompt": prompt}
    name, at, weight = place.rpartition("@")
    if at:
        with suppress(ValueError):  # a file's name with an @ in it
            fields["weight"], place = float(weight), name
    try:
        box = HALVES.get(place) or tuple(float(number) for number in place.split(","))
    except ValueError:
        return fields | {"mask": place}
    return fields | {"box": box}


def read_prompt(prompt: str) -> str:
    """Return the prompt, or for "-" the text on standard input, of which no more is read than a prompt may hold."""
    if prompt != "-":
        return prompt
    from mezzotint.request import MAX_PROMPT

    limit = 4 * MAX_PROMPT + 2  # bytes: UTF-8 takes at most four a character; and a line end
    try:
        data = sys.stdin.buffer.read(limit + 1)
    except OSError as error:  # it is closed
        raise RequestError(f"prompt on standard input cannot be read ({error.strerror})") from None
    right = f"it must be UTF-8 text of at most {MAX_PROMPT:,} characters"
    if len(data) > limit:
        raise RequestError(f"prompt on standard input is longer than {limit:,} bytes; {right}")
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise RequestError(f"prompt on standard input is not UTF-8; {right}") from None


def pair(
    field: str, text: str | None, mark: str, kind: Callable[[str], Number], right: str
) -> tuple[Number, Number] | None:
    """Parse two numbers, as in "512x768" or "0.3:5".

    Args:
        field: The option's name, for the error.
        text: The option's value.
        mark: The separator.
        kind: int or float.
        right: What the value must be, for the error.

    Raises:
        RequestError: If the text is not two numbers.
    """
    if text is None:
        return None
    try:
        first, second = text.lower().split(mark)
        return kind(first), kind(second)
    except ValueError:
        raise RequestError(f"{field} is {text[:60]!r}; it must be {right}") from None


def _size(field: str, text: str | None) -> tuple[int, int] | None:
    """Parse a size in pixels, "512x768" or "512" for a square."""
    if text is not None and text.strip().isdecimal():
        text = f"{text}x{text}"
    return pair(field, text, "x", int, "WxH in pixels, such as 512x768, or one number for a square")


def lora_of(text: str) -> tuple[str | float, ...]:
    """Parse "a.safetensors:0.8:0.5" to ("a.safetensors", 0.8, 0.5); without a scale it is 1."""
    scales: list[float] = []
    while len(scales) < 2 and ":" in text:
        head, _, tail = text.rpartition(":")
        try:
            scales.insert(0, float(tail))
        except ValueError:  # a name with a colon in it
            break
        text = head
    return (text, *(scales or [1.0]))


def control_of(text: str) -> dict[str, Any]:
    """Parse "a.safetensors:image=edge.png,scale=0.8" to the fields of a ControlNet.

    From a second image on, image, type and scale are those of a further picture.

    Raises:
        RequestError: If a part is not FIELD=VALUE.
    """
    from mezzotint.entries.control import Control, ControlPicture

    file, values = _entry_of(text, Control.model_fields)
    entry: dict[str, Any] = {"file": file}
    own = entry  # of the picture that was named last
    for name, value in values:
        if name == "image" and name in own:
            own = {}
            entry.setdefault("more", []).append(own)
        (own if name in ControlPicture.model_fields else entry)[name] = value
    return entry


def ip_adapter_of(text: str) -> dict[str, Any]:
    """Parse "a.safetensors:image=face.png,image=other.png,scale=0.6" to the fields of an IP-Adapter."""
    from mezzotint.entries.ip_adapter import IPAdapter

    file, values = _entry_of(text, IPAdapter.model_fields)
    lists = {kind: [value for name, value in values if name == kind] for kind in ("image", "mask")}
    return {"file": file, **dict(values), **{name: given for name, given in lists.items() if given}}


def _entry_of(text: str, names: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return the file of "FILE:FIELD=VALUE,...", and the fields with their values."""
    begin = re.search(rf":(?=({'|'.join(names)})=)", text)  # a file's name may have a colon, and a value a comma
    if begin is None:
        return text, []
    parts = (part.partition("=") for part in re.split(r",(?=[a-z_]+=)", text[begin.end() :]))
    return text[: begin.start()], [(name, value) for name, _, value in parts]


def _scales(text: str | None) -> float | tuple[float, ...] | None:
    """Parse one guidance scale, or several."""
    scales = _numbers("guidance_scale", text, "a number, or several separated by commas, such as 7.5 or 9,3")
    return scales[0] if scales and len(scales) == 1 else scales


def _numbers(field: str, text: str | None, right: str) -> tuple[float, ...] | None:
    """Parse the numbers in "9,3.5,1"."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise RequestError(f"{field} is {text[:60]!r}; it must be {right}") from None


def _sides(text: str | None) -> tuple[int, ...] | None:
    """Parse "right=64,top=32" to (left, top, right, bottom)."""
    if text is None:
        return None
    sides = dict.fromkeys(("left", "top", "right", "bottom"), 0)
    try:
        given = dict(part.strip().split("=") for part in text.lower().split(","))
        if not set(given) <= set(sides):
            raise ValueError
        return tuple((sides | {side: int(pixels) for side, pixels in given.items()}).values())
    except ValueError:
        right = "it must be sides and pixels, such as right=64 or left=32,top=32"
        raise RequestError(f"outpaint is {text[:60]!r}; {right}") from None


def _swapped(pair: tuple[int, int] | None) -> tuple[int, int] | None:
    return pair and pair[::-1]
