"""Where pictures are written: a file, a folder, or a pattern such as "{date}/{seed}-{prompt:40}.png"."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from itertools import count as counting
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from mezzotint.errors import CONTROLS, RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mezzotint.request import Request

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # images.io.FORMATS, whose import would bring torch
IN_FOLDER = "mezzotint-{seed}.png"
MAX_NAME = 200  # bytes of UTF-8; most file systems allow 255
RESERVED = '/\\:*?"<>|'  # separators, and what Windows does not allow in a name
TEXTS = ("prompt", "model", "sampler")
NUMBERS = ("seed", "number", "steps", "width", "height")
FIELDS = ("date", "time", *TEXTS, *NUMBERS, "guidance")


def check_out(out: str | None, request: Request, suffixes: tuple[str, ...] = (".png",), option: str = "out") -> None:
    """Check before any work that a picture can be written there.

    Args:
        out: The value of the option.
        request: The request, resolved or not.
        suffixes: What a file name may end in.
        option: The option's name, for the error.

    Raises:
        RequestError: If it cannot.
    """
    import tempfile

    if out is not None and not _names_folder(out) and not out.lower().endswith(suffixes):
        right = f"a file name ending in {', '.join(suffixes)}, or a folder: one that exists, or FOLDER/ to make it"
        raise RequestError(f"{option} is {out!r}; it must be {right}")
    path = next(_names(out, request, 0))
    try:
        folder = path.parent
        if not _names_file(out):
            _check_inside(out, folder)
            folder = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        tempfile.TemporaryFile(dir=folder).close()
        with suppress(FileNotFoundError):
            path.lstat()  # a name may be too long
            if _is_exact(out, request) and path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(0, "the file is protected")
    except OSError as error:
        right = "it must be in a writable folder"
        raise RequestError(f"{option} is {str(path)!r}, which cannot be written ({error.strerror}); {right}") from None


def save_one(image: Image.Image, out: str | None, request: Request, k: int) -> Path:
    """Save picture k under the first of its names that is free, and return the path.

    Raises:
        RequestError: If it cannot be written there.
        WriteError: If the disk is full or broken.
    """
    from mezzotint.images.io import save

    exact = _is_exact(out, request)
    for path in _names(out, request, k, _model_name(image)):
        if not _names_file(out):
            _make_folder(out, path.parent)
        if exact or not os.path.lexists(path):
            with suppress(FileExistsError):  # another process took the name just now
                save(image, path, overwrite=exact)
                return path
    raise AssertionError("unreachable: a name is overwritten, or names never end")


def names_several(out: str | None) -> bool:
    """Return whether pictures that are written there get names of their own."""
    return not _names_file(out)


def _names_folder(out: str) -> bool:
    return os.path.isdir(out) or out.endswith(("/", os.sep))


def _names_file(out: str | None) -> bool:
    """Return whether `out` is one file name, neither a folder nor a pattern."""
    return out is not None and not _names_folder(out) and "{" not in out and "}" not in out


def _is_exact(out: str | None, request: Request) -> bool:
    """Return whether `out` is the file to write, which is replaced."""
    return _names_file(out) and request.count == 1


def _names(out: str | None, request: Request, k: int, model: str = "") -> Iterator[Path]:
    """Yield the names that picture k may get, in order of preference."""
    if out is not None and _names_file(out):
        path = Path(out)
        if request.count > 1:
            yield from (path.with_stem(f"{path.stem}-{n:04}") for n in counting(k + 1))
        else:
            yield path
        return
    base, (*folders, name) = _split(out)
    values = _values(request, k, model)
    folder = base.joinpath(*(_cut(_render(part, values), MAX_NAME) for part in folders))
    stem, suffix = os.path.splitext(name)
    stem = _render(stem, values)
    for n in counting(1):
        end = suffix if n == 1 else f"-{n}{suffix}"
        yield folder / (_cut(stem, MAX_NAME - len(end)) + end)


def _split(out: str | None) -> tuple[Path, list[str]]:
    """Return the folder that `out` names literally, and the parts of the pattern below it."""
    if out is None:
        return Path(), [IN_FOLDER]
    if os.path.isdir(out):
        return Path(out), [IN_FOLDER]
    parts = Path(os.path.expanduser(out)).parts  # a quoted pattern has not passed the shell
    first = next((n for n, part in enumerate(parts) if "{" in part or "}" in part), len(parts))
    return Path(*parts[:first]), [*parts[first:], *([IN_FOLDER] if _names_folder(out) else [])]


def _values(request: Request, k: int, model: str) -> dict[str, str]:
    """Return the value of each field for picture k."""
    now = datetime.now()
    scale = request.guidance_scale
    values = {
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H%M%S"),
        "prompt": request.prompt,
        "model": model,
        "sampler": request.sampler,
        "seed": "SEED" if request.seed is None else request.seed + k,
        "number": k + 1,
        "steps": request.steps,
        "width": request.width,
        "height": request.height,
        "guidance": ",".join(f"{w:g}" for w in (scale if isinstance(scale, tuple) else (scale or 0.0,))),
    }
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _render(pattern: str, values: Mapping[str, str]) -> str:
    """Return a part of a pattern with its fields filled in.

    Raises:
        RequestError: If a field is unknown or a brace has no other.
    """
    try:
        pieces = list(Formatter().parse(pattern))  # only parsed: str.format would read attributes of objects
    except ValueError as error:
        raise RequestError(
            f"out has {pattern!r}, which cannot be read ({error}); a brace that is part of the name is written "
            "{{ or }}"
        ) from None
    text = ""
    for literal, name, length, conversion in pieces:
        text += literal
        if name is None:
            continue
        if name not in values:
            raise RequestError(f"out has no field {{{name}}}; the fields are {', '.join(f'{{{f}}}' for f in values)}")
        if conversion or not re.fullmatch(r"([1-9]\d{0,2})?", length or ""):
            raise RequestError(f"out has {pattern!r}; after {{{name}: only a length may follow, such as {{prompt:40}}")
        value = values[name]
        if length:
            value = value.zfill(int(length)) if name in NUMBERS and value.isdecimal() else value.strip()[: int(length)]
        text += _clean(value)
    return text


def _clean(value: str) -> str:
    """Return a value as a part of a file name: without separators, control characters, leading dots and dashes."""
    text = " ".join(value.split())
    text = "".join("_" if c in RESERVED or ord(c) in CONTROLS or "\ud800" <= c <= "\udfff" else c for c in text)
    return re.sub(r"^[.\-]+", lambda found: "_" * len(found[0]), text) or "_"


def _cut(name: str, size: int) -> str:
    """Return the beginning of a name that has at most `size` bytes of UTF-8, without a dot or space at its end."""
    if len(data := name.encode("utf-8", "surrogateescape")) > size:
        name = data[:size].decode("utf-8", "ignore")
    return name if name in (".", "..") else name.rstrip(" .") or "_"


def _model_name(image: Image.Image) -> str:
    """Return the name of the model in a picture's record."""
    from mezzotint.records.record import read

    record = read({"mezzotint": image.info["mezzotint"]} if "mezzotint" in image.info else {})
    return record.model.name if record else ""


def _make_folder(out: str | None, folder: Path) -> None:
    """Make the folder that a pattern gives a picture."""
    _check_inside(out, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"the folder {str(folder)!r} cannot be made ({error.strerror})") from None


def _check_inside(out: str | None, folder: Path) -> None:
    """Check that the folder of a picture is in the one that `out` names literally, links resolved."""
    base = _split(out)[0]
    if not folder.resolve().is_relative_to(base.resolve()):
        raise RequestError(f"out leads to {str(folder)!r}, which is outside of {str(base)!r}; it must stay in it")
