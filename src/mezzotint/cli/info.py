"""`mezzotint info`: show what the record of a picture holds, without drawing it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import Json
from mezzotint.cli.terminal import print_json, show
from mezzotint.errors import RequestError

if TYPE_CHECKING:
    from mezzotint.again import Source

PROGRAMS = {"invokeai_metadata": "InvokeAI", "prompt": "ComfyUI", "parameters": "AUTOMATIC1111"}  # by text chunk
SHA256 = re.compile("[0-9a-f]{64}")
MAX_SHOWN = 2000  # characters of a text that cannot be read


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="PNG, JPEG or WebP picture that carries a record.")],
    as_json: Json = False,
) -> None:
    """Show what a picture was drawn with, from its record.

    The record may be mezzotint's own, AUTOMATIC1111's, ComfyUI's or InvokeAI's.
    """
    from mezzotint.again import read_source
    from mezzotint.images.io import CHUNKS, open_file, read_metadata
    from mezzotint.records import other_programs

    texts = read_metadata(file, (*CHUNKS, *other_programs.READERS))
    with open_file(file) as image:
        found: dict[str, Any] = {
            "file": str(file),
            "format": image.format,
            "width": image.width,
            "height": image.height,
        }
    source, reason = None, ""
    try:
        source = read_source(file)
    except RequestError as error:
        if not any(texts.values()):
            raise
        reason = str(error)
    found |= {
        "program": _program(texts, source),
        "model": source.model_name if source else None,
        "model_hash": source.model_hash if source else None,
        "request": source.request.model_dump(mode="json") if source else None,
        "facts": source.record.facts() if source and source.record else {},
        "seed": source.record.seed if source and source.record else source.request.seed if source else None,
        "flagged": source.record.flagged if source and source.record else None,
        "not_supported": source.notes if source else [],
        "notices": source.record.notices if source and source.record else (),
        "unreadable": reason or None,
        "texts": texts,
    }
    if as_json:
        print_json(found)
    else:
        show(*_lines(found))


def _program(texts: dict[str, str], source: Source | None) -> str:
    """Return the program that wrote the record, with its version if it says so."""
    if "mezzotint" in texts:
        record = source.record if source else None
        return f"mezzotint {record.versions.get('mezzotint', '')}".strip() if record else "mezzotint"
    if "parameters" in texts:
        from mezzotint.records import infotext

        version = infotext.parse(texts["parameters"]).fields.get("Version", "")
        return f"{PROGRAMS['parameters']} {version}".strip()
    return next((program for chunk, program in PROGRAMS.items() if chunk in texts), "unknown")


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for a person: the picture, the request, what else the pixels depend on."""
    yield f"{found['file']}: {found['format']}, {found['width']}x{found['height']}, record of {found['program']}"
    if found["unreadable"]:
        yield f"not read as a request: {found['unreadable']}"
        for name, text in found["texts"].items():
            yield f"{name}: {text[:MAX_SHOWN]}{' ...' if len(text) > MAX_SHOWN else ''}"
        return
    request = {name: value for name, value in found["request"].items() if value is not None}
    shown = {"seed": found["seed"]} if found["seed"] is not None else {}
    for name, value in (request | shown).items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield f"{name}: {text}"
    for name in ("model", "model_hash"):
        if found[name]:
            yield f"{name}: {found[name]}"
    for name, value in found["facts"].items():
        if value:
            yield f"{name.removeprefix('the ')}: {value[:10] + '...' if SHA256.fullmatch(value) else value}"
    if found["flagged"] is not None:
        yield f"flagged by the safety checker: {'yes' if found['flagged'] else 'no'}"
    for note in found["not_supported"]:
        yield f"not supported: {note}"
    for notice in found["notices"]:
        yield f"notice: {notice}"
