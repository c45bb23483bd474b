"""Tables of requests: a JSONL, CSV or Parquet file whose rows are Requests, read as a stream. No torch here."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.request import Request

MAX_LINE = 4_194_304  # bytes of a JSONL row: two prompts of the greatest length, each character escaped, and the rest
RIGHT_LINE = 'it must be a JSON object on one line, such as {"prompt": "a lemon"}'
TEXTS = ("prompt", "negative_prompt")  # may begin with a bracket

Fields = dict[str, Any]
Row = tuple[int, Fields | str]  # its number, and its fields or what is wrong with it
Checked = tuple[int, Request | str]


def read(path: Path, defaults: Mapping[str, Any]) -> Iterator[Checked]:
    """Yield (number, Request) for each row, or (number, error) for an invalid one; rows are read one at a time.

    The number is the line in a JSONL file, where empty lines are skipped, and otherwise the row, from 1. `defaults` are
    the fields that a row leaves out. A row without a seed gets `seed_of` its number, and so does its variation.

    Raises:
        RequestError: If the file cannot be read.
        MissingExtraError: If it is Parquet and pyarrow is not installed.
    """
    for number, fields in _rows(path):
        if isinstance(fields, str):
            yield number, fields
            continue
        try:
            request = Request.model_validate({"seed": seed_of(number), **defaults, **fields})
            if request.variation_strength is not None and request.variation_seed is None:
                request = request.replace(variation_seed=seed_of(number, "variation "))
            yield number, request
        except RequestError as error:
            yield number, str(error)


def measure(path: Path, defaults: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows a file has, and how many pictures they ask for, as far as can be told without checking them."""
    rows = pictures = 0
    for _, fields in _rows(path):
        rows += 1
        asked = {**defaults, **fields}.get("count", 1) if isinstance(fields, dict) else 0
        pictures += int(asked) if str(asked).isdecimal() and len(str(asked)) < 6 else 0
    if not rows:
        raise RequestError(f'{str(path)!r} has no rows; it must have at least one, such as {{"prompt": "a lemon"}}')
    return rows, pictures


def seed_of(number: int, what: str = "") -> int:
    """Return the seed of a row without one: the first 32 bits of the SHA-256 of its number."""
    return int.from_bytes(hashlib.sha256(f"{what}{number}".encode()).digest()[:4])


def from_text(name: str, text: str) -> Any:
    """Return the value of a table cell or option: "[9, 3]" becomes a list, other text is left to Request."""
    if name not in TEXTS and text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text


def assignments(option: str, texts: Iterable[str]) -> Fields:
    """Parse ["steps=20"] to {"steps": "20"}; raise RequestError for an unknown field or a wrong value."""
    fields: Fields = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark:
            raise RequestError(f"{option} is {text[:60]!r}; it must be FIELD=VALUE, such as steps=20")
        fields[name] = from_text(name, value)
    Request.model_validate({"prompt": "", **fields})  # raises
    return fields


def _rows(path: Path) -> Iterator[Row]:
    readers = {".jsonl": jsonl, ".ndjson": jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RequestError(f"{str(path)!r} must end in {', '.join(readers)}: the ending says how it is read")
    try:
        for number, fields in reader(path):
            yield number, _present(fields) if isinstance(fields, dict) else fields
    except OSError as error:
        raise RequestError(f"{str(path)!r} cannot be read ({error.strerror or error})") from None


def _present(fields: Fields) -> Fields:
    """Without what is null: as good as not there in any of the formats."""
    return {name: value for name, value in fields.items() if value is not None}


def jsonl(path: Path, right: str = RIGHT_LINE) -> Iterator[Row]:
    """Yield the objects of a JSONL file by line number, or what is wrong with a line."""
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(MAX_LINE)
            if not line:
                return
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                yield number, f"the row is longer than {MAX_LINE:,} bytes; {right}"
                continue
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield number, f"the row is not UTF-8; {right}"
            except (ValueError, RecursionError) as error:
                yield number, f"the row is not JSON ({getattr(error, 'msg', 'nested too deep')}); {right}"
            else:
                yield number, fields if isinstance(fields, dict) else f"the row is not an object; {right}"


def _csv(path: Path) -> Iterator[Row]:
    # what is not UTF-8 becomes lone surrogates, which a Request refuses row by row
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise RequestError(f"{str(path)!r} is not CSV: {error}") from None
        _check_columns(path, header)
        number = 0
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                yield number, f"the row is not CSV: {error}"
                continue
            if not cells:
                continue
            number += 1
            if len(cells) > len(header):
                yield number, f"the row has {len(cells)} cells; the header has {len(header)}"
            else:  # an empty cell is as good as none
                yield number, {name: from_text(name, cell) for name, cell in zip(header, cells, strict=False) if cell}


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("a Parquet file needs pyarrow: pip install 'mezzotint[scale]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except pyarrow.ArrowException as error:
        raise RequestError(f"{str(path)!r} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


def _check_columns(path: Path, names: Iterable[str]) -> None:
    """Check that every column is a field of Request; otherwise every row would fail."""
    seen: set[str] = set()
    for name in names:
        try:
            if name in seen:
                raise RequestError(f"the column {name!r} is there twice")
            if name not in Request.model_fields:
                Request.model_validate({"prompt": "", name: None})  # raises, with the nearest name
        except RequestError as error:
            raise RequestError(f"{str(path)!r}: {error}") from None
        seen.add(name)
