"""Fuzz one reader, guided by the coverage of its code (atheris, which is libFuzzer): fuzz.py READER [SECONDS [FOLDER]].

The inputs that reached new code stay in FOLDER, from where another run goes on.

It needs `pip install atheris`. Any error that is not a sentence of ours ends the run and leaves the input in crash-*.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mezzotint.weights", "mezzotint.records", "json.decoder", "json.scanner"]):
    from mezzotint.errors import MezzotintError
    from mezzotint.records import infotext, other_programs, record
    from mezzotint.weights import embeddings, torch_files
    from mezzotint.weights.files import TensorFile
    from mezzotint.weights.pickles import read_pickle

import base64
import contextlib
import zlib

import torch
from corpus import chunk, contain, executions, honest, png, row, table, tensor, torch_shapes
from corpus import raw as raw_safetensors
from safetensors import SafetensorError, deserialize

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm"))
FILE = FOLDER / "a"
count = 0


def fuzz_safetensors(data: bytes) -> None:
    FILE.write_bytes(data)
    file = TensorFile(FILE)
    if data[8:9] != b"{":
        return
    try:
        theirs = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"the Rust reader refuses what ours accepts: {error}") from error
    assert set(theirs) == set(file.entries)
    for name in theirs:
        assert file.read(name).reshape(-1).view(torch.uint8).numpy().tobytes() == bytes(theirs[name]["data"])


def fuzz_zip(data: bytes) -> None:
    check_contents(torch_files.read_zip(io.BytesIO(data), len(data)), len(data))  # type: ignore[arg-type]


def fuzz_legacy(data: bytes) -> None:
    check_contents(torch_files.read_legacy(io.BytesIO(data), len(data)), len(data))  # type: ignore[arg-type]


def check_contents(contents: torch_files.Contents, size: int) -> None:
    for name, entry in contents.entries.items():
        assert (
            entry.start >= 0 and entry.start + entry.count * entry.dtype.itemsize <= size
        ) or name in contents.arrays


def fuzz_pickle(data: bytes) -> None:
    read_pickle(io.BytesIO(data), lambda found: len(found.name) % 3 != 0, refer=lambda value: value)


def fuzz_embeddings(data: bytes) -> None:
    file = FOLDER / "a.png" if data.startswith(b"\x89PNG") else FILE
    file.write_bytes(data)
    embeddings._read.cache_clear()  # its key is the time of the change, of which a file system has only milliseconds
    for embedding in embeddings.read_embeddings(file):
        assert embedding.digest and all(vectors.isfinite().all() for vectors in embedding.vectors.values())


def fuzz_records(data: bytes) -> None:
    content = data.decode("utf-8", "replace")
    for reader in (record.read, other_programs.read):
        for key in ("mezzotint", "prompt", "invokeai_metadata", "sd-metadata"):
            with contextlib.suppress(MezzotintError):
                reader({key: content})
    infotext.to_request(infotext.parse(content))


def embedding_images() -> list[bytes]:
    """Return PNG files with A1111's embedding in a text chunk, plain and compressed, and one without."""
    content = b'{"name": "a", "string_to_param": {"*": {"TORCHTENSOR": [[1.0, 2.0]]}}}'
    text = png(chunk(b"tEXt", b"sd-ti-embedding\0" + base64.b64encode(content)))
    return [text, png(chunk(b"zTXt", b"sd-ti-embedding\0\0" + zlib.compress(base64.b64encode(content)))), png()]


def seeds(reader: str) -> list[bytes]:
    if reader == "safetensors":
        return [
            honest()["safetensors"],
            raw_safetensors({"a": row([1], 0, 4)}, bytes(4)),
            raw_safetensors({"__metadata__": {"a": "b"}}),
        ]
    if reader == "embeddings":
        return [*honest().values(), *embedding_images()]
    if reader == "records":
        return [
            b'{"1": {"class_type": "KSampler", "inputs": {"seed": 1, "positive": ["2", 0]}}}',
            b"a\nNegative prompt: b\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512",
        ]
    pieces = [*executions(FOLDER), *torch_shapes(FOLDER)]
    contents = [content for name, _, content in pieces if isinstance(content, bytes) and len(content) < 4096]
    if reader == "zip":
        return [honest()["pt"], contain(table(w=tensor((4,), (1,))), "zip"), *[c for c in contents if c[:2] == b"PK"]]
    if reader == "legacy":
        return [honest()["bin"], *[c for c in contents if c[2:3] == b"\x8a"]]
    return [table(w=tensor((4,), (1,))), *[c for c in contents if c[:2] != b"PK"]]


READERS: dict[str, Callable[[bytes], None]] = {
    "safetensors": fuzz_safetensors,
    "zip": fuzz_zip,
    "legacy": fuzz_legacy,
    "pickle": fuzz_pickle,
    "embeddings": fuzz_embeddings,
    "records": fuzz_records,
}


def main() -> None:
    reader, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "600"
    corpus = Path(sys.argv[3]) if len(sys.argv) > 3 else FOLDER / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for k, seed in enumerate(seeds(reader)):
        (corpus / str(k)).write_bytes(seed)

    refusals = (MezzotintError, ValueError) if reader in ("zip", "legacy", "pickle") else (MezzotintError,)

    def one(data: bytes) -> None:
        with contextlib.suppress(refusals):
            READERS[reader](data)

    options = [
        f"-max_total_time={seconds}",
        "-max_len=4096",
        "-timeout=5",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


main()
