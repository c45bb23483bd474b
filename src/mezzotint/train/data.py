"""Training data: pictures with captions, in four common layouts.

    folder of pictures          cat.jpg with its caption in cat.txt or cat.caption next to it; subfolders too
    folder with metadata        metadata.jsonl with {"file_name": "cat.jpg", "text": "a cat"} on each line, or
                                metadata.csv with the columns file_name and text; also in subfolders
    Parquet                     columns `image` (bytes, or a struct with bytes, as the hub writes them) and `text`
    WebDataset                  tar shards, not compressed: cat.jpg with cat.txt or cat.json of the same name

In a subfolder with a name such as `10_sks dog`, as of kohya's sd-scripts, each picture is used 10 times an epoch, and
the words are the caption of those that have none. The field or column `text` may also be called `caption` or `prompt`.
Shards and Parquet files are given one by one or as a folder. Pictures are opened as everywhere in mezzotint: upright,
transparency on white, at most 80 million pixels.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, overload

from PIL import Image

from mezzotint import rows
from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.files import open_regular, read_bytes
from mezzotint.images import init_image
from mezzotint.request import MAX_PROMPT
from mezzotint.train.conditions import FIELDS, ConditioningPicture

BrokenPolicy = Literal["stop", "skip"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
TEXTS = ("text", "caption", "prompt")  # names of the caption's column or field
CAPTIONS = (".txt", ".caption")  # suffixes of caption files
METADATA = ("metadata.jsonl", "metadata.csv")
REPEATS = re.compile(r"([1-9]\d{0,3})_(.+)")  # kohya's name of a subfolder; more digits are a date
MAX_HEADER = 65_536  # bytes of a table's first line
EXPECTED_LINE = 'it must be a JSON object on one line, such as {"file_name": "cat.jpg", "text": "a cat"}'
NO_EXTRA = "a Parquet file needs pyarrow: pip install 'mezzotint[train]'"


@dataclass(frozen=True)
class Example:
    """A picture with its caption, not yet decoded.

    Attributes:
        id: unique in the dataset, and independent of the dataset's location.
        caption: with whitespace collapsed.
        size: (width, height), upright, from the file's header.
        digest: SHA-256 of the picture's file.
        place: where it is, for error messages.
        read: returns the bytes of its file.
        repeats: uses in an epoch, by the name of its folder.
        condition: its conditioning picture, for a ControlNet.
    """

    id: str
    caption: str
    size: tuple[int, int]
    digest: str
    place: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    repeats: int = 1
    condition: ConditioningPicture | None = None

    def open(self) -> Image.Image:
        """Return the picture in RGB. Raises RequestError if it does not decode or has changed."""
        data = self.read()
        if init_image.digest(data) != self.digest:
            raise RequestError(f"the picture {self.place!r} has changed since training began; start the run again")
        return init_image.open_picture(self.place, "the picture", data)


@dataclass(frozen=True)
class Dataset(Sequence[Example]):
    """Examples in the order of their files.

    Attributes:
        path: the folder or file.
        examples: the pictures.
        skipped: a sentence for each picture or caption that was skipped.
        notices: what the user should know, such as empty captions.
    """

    path: Path
    examples: tuple[Example, ...] = field(repr=False)
    skipped: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self.examples[index]


Found = Example | str  # or what is wrong with it


def open_data(path: str | os.PathLike[str], broken: BrokenPolicy = "stop", caption: str | None = None) -> Dataset:
    """Open the pictures of a folder or file in any of the four layouts. Files are read once and not decoded.

    Args:
        path: the folder or file.
        broken: whether a file that is not a picture, a picture without caption or a caption without picture raises an
            error ("stop") or is skipped ("skip").
        caption: for pictures that have none.

    Returns:
        The dataset.

    Raises:
        RequestError: for data that cannot be used, or if nothing is left.
        MissingExtraError: for Parquet without pyarrow.
    """
    folder = Path(path)
    examples: dict[str, Example] = {}
    skipped = []
    try:
        for found in _reader(folder)(folder, caption):
            if isinstance(found, Example) and found.id in examples:
                found = f"{found.place!r} has the same name as another picture, {found.id!r}; names must be unique"
            if isinstance(found, Example):
                examples[found.id] = found
            elif broken == "stop":
                raise RequestError(found)
            else:
                skipped.append(found)
    except OSError as error:
        raise RequestError(f"{str(folder)!r} cannot be read ({error.strerror or error})") from None
    if not examples:
        first = f". First of {len(skipped)} skipped: {skipped[0]}" if skipped else ""
        raise RequestError(f"{str(folder)!r} has no usable pictures; it must have at least one{first}")
    found_examples = tuple(examples.values())
    return Dataset(folder, found_examples, tuple(skipped), tuple(_notices(found_examples, caption)))


def _notices(examples: Sequence[Example], default: str | None) -> Iterator[str]:
    """Yield sentences on repeats and on empty captions, unless those are the default."""
    folders = Counter((example.id.partition("/")[0], example.repeats) for example in examples if example.repeats > 1)
    for (name, repeats), count in folders.items():
        uses = "picture is used {} times" if count == 1 else "pictures are used {} times each"
        yield f"{name}: its {count:,} {uses.format(repeats)} in an epoch, by the folder's name"
    empty = [] if default == "" else [example.place for example in examples if not example.caption]
    if empty:
        pictures = "1 picture has" if len(empty) == 1 else f"{len(empty):,} pictures have"
        yield f"{pictures} an empty caption, the first is {empty[0]!r}: it is trained without words"


Reader = Callable[[Path, str | None], Iterator[Found]]


def _reader(path: Path) -> Reader:
    """Return the reader for the path's layout. Raises RequestError if it has none of the four, or several."""
    if path.is_file():
        reader = _metadata if path.name in METADATA else {".tar": _shard, ".parquet": _parquet}.get(path.suffix.lower())
        if reader is None:
            raise RequestError(
                f"{str(path)!r} must be a folder of pictures, a .parquet file, a .tar shard or {' or '.join(METADATA)}"
            )
        return reader
    if not path.is_dir():
        raise RequestError(
            f"{str(path)!r} does not exist; it must be a folder of pictures, a .parquet file or a .tar shard"
        )
    if metadata := [path / name for name in METADATA if _is_metadata(path / name)]:
        return lambda folder, caption: _metadata(_only(metadata), caption)
    files = _files(path)
    kinds: dict[str, Reader] = {
        "tar shards": partial(_each, _shard, [file for file in files if file.suffix.lower() == ".tar"]),
        "Parquet files": partial(_each, _parquet, [file for file in files if file.suffix.lower() == ".parquet"]),
        "pictures": partial(_folder, files),
    }
    suffixes = {file.suffix.lower() for file in files}
    present = [
        kind
        for kind, endings in zip(kinds, ((".tar",), (".parquet",), (*PICTURES, *CAPTIONS)), strict=True)
        if suffixes.intersection(endings)
    ]
    if len(present) > 1 and "pictures" in present and not suffixes.intersection(PICTURES):
        present.remove("pictures")  # such as a README.txt among shards
    if len(present) > 1:
        raise RequestError(f"{str(path)!r} has {' and '.join(present)}; give a folder that has only one of them")
    return kinds[present[0]] if present else kinds["pictures"]


def _files(folder: Path) -> list[Path]:
    """Return all files below the folder in the order of their names, except hidden ones."""
    found = (file for file in folder.rglob("*") if not any(p.startswith(".") for p in file.relative_to(folder).parts))
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(folder).parts)


def _each(
    reader: Callable[[Path, str | None, str], Iterator[Found]], files: Sequence[Path], root: Path, caption: str | None
) -> Iterator[Found]:
    for file in files:
        yield from reader(file, caption, file.relative_to(root).as_posix())


def _is_metadata(path: Path) -> bool:
    """Return whether a file lists pictures; a table may be about something else."""
    if path.suffix == ".jsonl" or not path.is_file():
        return path.is_file()
    with open_regular(path) as file:
        return b"file_name" in file.readline(MAX_HEADER)


def _only(files: Sequence[Path]) -> Path:
    """Return the one file. Raises RequestError if there are two."""
    if len(files) > 1:
        raise RequestError(f"{str(files[0].parent)!r} has {files[0].name} and {files[1].name}; keep one of them")
    return files[0]


def _example(id: str, place: str, caption: str | None, read: Callable[[], bytes], in_folder: bool = False) -> Found:
    """Make an example; `in_folder`: whether the id is a path, whose first folder may have kohya's name."""
    folder = REPEATS.fullmatch(id.partition("/")[0]) if in_folder and "/" in id else None
    if folder and caption is None:
        caption = folder[2]
    if caption is None:
        return f"the picture {place!r} has no caption; add one, or set prompt as a caption for pictures without"
    if len(caption) > MAX_PROMPT or "\0" in caption:
        return f"the caption of {place!r} has {len(caption):,} characters; it must be text of at most {MAX_PROMPT:,}"
    try:
        data = read()
        size = init_image.picture_size(place, "the picture", data)
    except RequestError as error:
        return str(error)
    repeats = int(folder[1]) if folder else 1
    return Example(id, " ".join(caption.split()), size, init_image.digest(data), place, read, repeats)


def _text(data: bytes, place: str) -> str:
    """Decode a caption. Raises RequestError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"the caption {place!r} is not UTF-8 text; it must be") from None


def _folder(files: Sequence[Path], root: Path, default: str | None) -> Iterator[Found]:
    described: dict[Path, list[Path]] = {}  # folder -> its metadata, which lists all of its pictures
    for file in files:
        if file.name in METADATA and _is_metadata(file):
            described.setdefault(file.parent, []).append(file)
    for metadata in described.values():
        yield from _metadata(_only(metadata), default, f"{metadata[0].parent.relative_to(root).as_posix()}/")
    files = [file for file in files if not described.keys() & set(file.parents)]
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    stems = {file.with_suffix("") for file in pictures}
    captions: dict[Path, Path] = {}
    for file in files:
        stem = file.with_suffix("")
        if file.suffix.lower() in CAPTIONS and stem in captions:
            yield f"{str(captions[stem])!r} and {str(file)!r} are captions of the same picture; keep one of them"
        elif file.suffix.lower() in CAPTIONS:
            captions[stem] = file
            if stem not in stems:
                yield f"the caption {str(file)!r} has no picture; there must be one such as {stem.name}.jpg"
    for file in pictures:
        caption, text_file = default, captions.get(file.with_suffix(""))
        try:
            if text_file is not None:
                caption = _text(read_bytes(text_file), str(text_file))
        except OSError as error:
            yield f"the caption {str(text_file)!r} cannot be read ({error.strerror or error})"
            continue
        except RequestError as error:
            yield str(error)
            continue
        read = partial(init_image.read, str(file), "the picture")
        yield _example(file.relative_to(root).as_posix(), str(file), caption, read, True)


def _metadata(path: Path, default: str | None, prefix: str = "") -> Iterator[Found]:
    """Yield what a metadata file lists; `prefix` is the path of its folder in the dataset, with a slash."""
    for number, row in rows.jsonl(path, EXPECTED_LINE) if path.suffix == ".jsonl" else _csv(path):
        if isinstance(row, str):
            yield f"line {number} of {str(path)!r}: {row}"
            continue
        name, caption = row.get("file_name"), _caption_in(row, default)
        condition = next((row[key] for key in FIELDS if isinstance(row.get(key), str) and row[key]), None)
        outside = [one for one in (name, condition) if isinstance(one, str) and _leaves_folder(one)]
        if not isinstance(name, str) or not name or "\0" in f"{name}{condition}":
            yield f"line {number} of {str(path)!r} names no picture; {EXPECTED_LINE}"
        elif outside:
            yield f"line {number} of {str(path)!r} names {outside[0]!r}; it must be below the folder of {path.name}"
        else:
            file = str(path.parent / name)
            found = _example(prefix + name, file, caption, partial(init_image.read, file, "the picture"), True)
            yield _with_condition(found, str(path.parent / condition)) if condition else found


def _leaves_folder(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def _with_condition(found: Found, place: str, read: Callable[[], bytes] | None = None) -> Found:
    """Give an example its conditioning picture, from a file unless `read` returns the bytes."""
    if isinstance(found, str):
        return found
    picture = ConditioningPicture(place, read or partial(init_image.read, place, "the conditioning picture"))
    return replace(found, condition=picture)


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the line and the cells of each row by column. Raises RequestError if it is not CSV with file_name."""
    with io.TextIOWrapper(io.BufferedReader(open_regular(path)), encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        try:
            if "file_name" not in (table.fieldnames or ()):
                columns = ", ".join(table.fieldnames or ())[:200] or "none"
                raise RequestError(f"{str(path)!r} has the columns {columns}; it must have file_name and text")
            for row in table:
                yield table.line_num, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise RequestError(f"{str(path)!r} cannot be read as CSV in UTF-8: {error}") from None


def _caption_in(fields: Mapping[str, Any], default: str | None) -> str | None:
    return next((fields[name] for name in TEXTS if isinstance(fields.get(name), str)), default)


def _shard(path: Path, default: str | None, name: str = "") -> Iterator[Found]:
    members: dict[str, dict[str, tarfile.TarInfo]] = {}  # key -> what comes after its first dot -> the file
    fault = None
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, _, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                if key and member.isreg() and not member.issparse():
                    members.setdefault(f"{folder}/{key}".lstrip("/"), {})[ending.lower()] = member
    except tarfile.TarError as error:
        fault = f"{str(path)!r} is not an intact tar file ({error}); it must be uncompressed"
    for key, files in members.items():
        place, id = f"{path}/{key}", f"{name or path.name}/{key}"
        pictures = [m for ending, m in files.items() if f".{ending.rpartition('.')[2]}" in PICTURES]
        words = [files[ending] for ending in ("txt", "caption", "json") if ending in files]
        if len(pictures) == 1:
            picture = pictures[0]
            try:
                caption = _shard_caption(path, words[0], default) if words else default
            except RequestError as error:
                yield str(error)
            else:
                yield _example(id, f"{path}/{picture.name}", caption, partial(_member, path, picture))
        elif pictures:
            yield f"{place!r} has {len(pictures)} pictures ({', '.join(m.name for m in pictures)}); it must have one"
        elif words:
            yield f"the caption {f'{path}/{words[0].name}'!r} has no picture; there must be one such as {key}.jpg"
    if fault:
        yield fault


def _member(path: Path, member: tarfile.TarInfo) -> bytes:
    """Read a file of an uncompressed tar in place."""
    if member.size > init_image.MAX_BYTES:
        raise RequestError(
            f"{path}/{member.name} is larger than {init_image.MAX_BYTES // 2**20} MiB; {init_image.EXPECTED}"
        )
    try:
        with path.open("rb") as file:
            file.seek(member.offset_data)
            data = file.read(member.size)
    except OSError as error:
        raise RequestError(f"{str(path)!r} cannot be read ({error.strerror or error})") from None
    if len(data) < member.size:
        raise RequestError(f"{path}/{member.name} is truncated: the shard ends within it")
    return data


def _shard_caption(path: Path, member: tarfile.TarInfo, default: str | None) -> str | None:
    place = f"{path}/{member.name}"
    text = _text(_member(path, member), place)
    if not member.name.lower().endswith(".json"):
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place!r} is not JSON ({getattr(error, 'msg', 'nested too deeply')})") from None
    return _caption_in(fields, default) if isinstance(fields, dict) else default


def _parquet(path: Path, default: str | None, name: str = "") -> Iterator[Found]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(NO_EXTRA) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            text = next((column for column in TEXTS if column in columns), None)
            if "image" not in columns or (text is None and default is None):
                raise RequestError(
                    f"{str(path)!r} has the columns {', '.join(columns)[:200]}; it must have image and text"
                )
            groups = {column: _Groups(path, column) for column in ("image", *FIELDS) if column in columns}
            conditions = next((groups[name] for name in FIELDS if name in groups), None)
            number = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["image", *([text] if text else [])])
                captions = table.column(text).to_pylist() if text else [None] * len(table)
                for row, caption in enumerate(captions):
                    number += 1
                    words = caption if isinstance(caption, str) else default
                    id, place = f"{name or path.name}:{number}", f"{path}, row {number}"
                    found = _example(id, place, words, partial(groups["image"].picture, group, row, place))
                    read = conditions and partial(conditions.picture, group, row, place)
                    yield _with_condition(found, place, read) if read else found
    except pyarrow.ArrowException as error:
        raise RequestError(f"{str(path)!r} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


class _Groups:
    """A column of pictures of a Parquet file, with the last used row group in memory."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._lock = threading.Lock()
        self._group: tuple[int, Any] = (-1, None)

    def picture(self, group: int, row: int, place: str) -> bytes:
        import pyarrow.parquet

        with self._lock:
            if self._group[0] != group:
                with pyarrow.parquet.ParquetFile(self.path) as file:
                    self._group = group, file.read_row_group(group, columns=[self.column]).column(self.column)
            cell = self._group[1][row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise RequestError(f"the picture {place!r} has no bytes; the column {self.column} must contain them")
        return data
