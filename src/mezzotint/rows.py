"""Read Requests from the rows of a JSONL, CSV, Parquet or text file, one row at a time. Does not import torch."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.files import open_regular
from mezzotint.request import Request

MAX_SKIPPED = 2**28  # bytes of a longer row, before the file is given up
MAX_LINE = 4_194_304  # bytes of a JSONL row: enough for two prompts of maximal length with every character escaped
EXPECTED_LINE = 'it must be a JSON object on one line, such as {"prompt": "a lemon"}'
TEXT_FIELDS = ("prompt", "negative_prompt")  # a leading bracket is text, not JSON

Fields = dict[str, Any]
Row = tuple[int, Fields | str]  # the row's number, and its fields or an error message
ParsedRow = tuple[int, Request | str]  # the row's number, and its Request or an error message


def read(path: Path, defaults: Mapping[str, Any]) -> Iterator[ParsedRow]:
    """Yield (number, Request) for each row, or (number, error) for an invalid one; rows are read one at a time.

    Args:
        path: The file; its suffix gives the format.
        defaults: Values of the fields that a row leaves out. A row without a seed gets `row_seed` of its number, and so
            does a row's variation.

    Yields:
        The number, from 1, and the Request or an error message. The number is the line of a JSONL or text file, in
        which empty lines are skipped, or the row of a CSV or Parquet file.

    Raises:
        RequestError: If the file cannot be read.
        MissingExtraError: If it is Parquet and pyarrow is not installed.
    """
    for number, fields in _rows(path):
        if isinstance(fields, str):
            yield number, fields
            continue
        try:
            request = Request.model_validate({"seed": row_seed(number), **defaults, **fields})
            if request.variation_strength is not None and request.variation_seed is None:
                request = request.replace(variation_seed=row_seed(number, "variation "))
            yield number, request
        except RequestError as error:
            yield number, str(error)


def measure(path: Path, defaults: Mapping[str, Any]) -> tuple[int, int]:
    """Count a file's rows and the pictures that they ask for, without validating the rows.

    Raises:
        RequestError: If the file cannot be read or has no rows.
    """
    rows = pictures = 0
    for _, fields in _rows(path):
        rows += 1
        asked = {**defaults, **fields}.get("count", 1) if isinstance(fields, dict) else 0
        pictures += int(asked) if str(asked).isdecimal() and len(str(asked)) < 6 else 0
    if not rows:
        raise RequestError(f'{str(path)!r} has no rows; it must have at least one, such as {{"prompt": "a lemon"}}')
    return rows, pictures


def row_seed(number: int, prefix: str = "") -> int:
    """Return the seed of a row without one: the first 32 bits of the SHA-256 of its number."""
    return int.from_bytes(hashlib.sha256(f"{prefix}{number}".encode()).digest()[:4])


def parse_cell(name: str, text: str) -> Any:
    """Parse the text of a table cell or option: "[9, 3]" becomes a list, other text is left to Request."""
    if name not in TEXT_FIELDS and text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text


def assignments(option: str, texts: Iterable[str]) -> Fields:
    """Parse the values of an option: ["steps=20"] becomes {"steps": "20"}.

    Args:
        option: The option's name, for error messages.
        texts: Its values, each FIELD=VALUE.

    Raises:
        RequestError: If a field is unknown or its value is invalid.
    """
    fields: Fields = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark:
            raise RequestError(f"{option} is {text[:60]!r}; it must be FIELD=VALUE, such as steps=20")
        fields[name] = parse_cell(name, value)
    Request.model_validate({"prompt": "", **fields})  # raises
    return fields


def _rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file in any of the formats."""
    readers = {".jsonl": jsonl, ".ndjson": jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _text}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RequestError(f"{str(path)!r} has an unknown format; its name must end in {', '.join(readers)}")
    try:
        for number, fields in reader(path):
            yield number, _drop_nulls(fields) if isinstance(fields, dict) else fields
    except OSError as error:
        raise RequestError(f"{str(path)!r} cannot be read ({error.strerror or error})") from None


def _drop_nulls(fields: Fields) -> Fields:
    """Remove fields that are null; in every format a null field counts as left out."""
    return {name: value for name, value in fields.items() if value is not None}


def jsonl(path: Path, expected: str = EXPECTED_LINE) -> Iterator[Row]:
    """Yield (line number, object) for each line of a JSONL file, or (line number, error) for an invalid one."""
    for number, line, error in _lines(path, expected):
        if error:
            yield number, error
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as wrong:
            yield number, f"the row is not JSON ({getattr(wrong, 'msg', 'nested too deeply')}); {expected}"
        else:
            yield number, fields if isinstance(fields, dict) else f"the row is not an object; {expected}"


def _text(path: Path) -> Iterator[Row]:
    """Yield the prompts of a text file, one on each line."""
    for number, line, error in _lines(path, "it must be a prompt on one line"):
        yield number, error or {"prompt": line}


def _lines(path: Path, expected: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, text without space around it, error) for each line that is not empty."""
    with io.BufferedReader(open_regular(path)) as file:
        for number in count(1):
            line = file.readline(MAX_LINE)
            if not line:
                return
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                start = file.tell()
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                    if file.tell() - start > MAX_SKIPPED:
                        raise RequestError(f"{str(path)!r} has a row of more than {MAX_SKIPPED:,} bytes; {expected}")
                yield number, "", f"the row is longer than {MAX_LINE:,} bytes; {expected}"
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                yield number, "", f"the row is not UTF-8; {expected}"
            else:
                if text:
                    yield number, text, ""


def _csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file."""
    # bytes that are not UTF-8 become lone surrogates, which Request rejects row by row
    with io.TextIOWrapper(
        io.BufferedReader(open_regular(path)), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as file:
        rows = csv.reader(iter(partial(file.readline, MAX_LINE), ""))  # a longer line is cut, and its field too long
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
            else:  # an empty cell counts as left out
                yield number, {name: parse_cell(name, cell) for name, cell in zip(header, cells, strict=False) if cell}


def _parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("a Parquet file needs pyarrow: pip install 'mezzotint[scale]'") from None
    try:
        with open_regular(path) as data, pyarrow.parquet.ParquetFile(data) as file:
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
    names_so_far: set[str] = set()
    for name in names:
        try:
            if name in names_so_far:
                raise RequestError(f"the column {name!r} occurs twice")
            if name not in Request.model_fields:
                Request.model_validate({"prompt": "", name: None})  # raises, with the nearest name
        except RequestError as error:
            raise RequestError(f"{str(path)!r}: {error}") from None
        names_so_far.add(name)
