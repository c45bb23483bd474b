"""Put files through the doors of the package under a memory limit and an audit hook: child.py LIST MODEL FOLDER.

Prints a JSON line before each case and one after it, so that the parent knows which case a crash belongs to.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import mezzotint
from mezzotint import Request, rows
from mezzotint.again import check_work, read_source
from mezzotint.errors import CheckpointError, MezzotintError
from mezzotint.images import init_image, io
from mezzotint.prompt.choices import expand
from mezzotint.train.recipe import Recipe
from mezzotint.weights.checkpoint import inspect_model
from mezzotint.weights.embeddings import Library, read_embeddings
from mezzotint.weights.files import TensorFile
from mezzotint.weights.lora import read_adapter

MEMORY = 1_200_000_000  # bytes beyond what the idle process has mapped
HANG = 30  # seconds
READ_BYTES = 2**26  # tensors above this are not read; the others are
FORBIDDEN = (
    "pickle.find_class",
    "exec",
    "compile",
    "import",
    "shutil.",
    "socket.",
    "subprocess.",
    "ctypes.",
    "urllib.",
    "webbrowser.",
    "ftplib.",
    "smtplib.",
    "pty.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.ch",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.putenv",
    "os.kill",
    "os.startfile",
    "os.unsetenv",
    "os.utime",
    "os.setxattr",
    "code.__new__",
    "marshal.load",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

watching = False
executed: list[str] = []


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event == "open":
        _, mode, flags = arguments
        if (mode and set(mode) & set("wax+")) or (flags or 0) & WRITING:
            executed.append(f"open {arguments[0]!r} {mode}")
    elif event.startswith(FORBIDDEN):
        executed.append(f"{event} {str(arguments)[:200]}")


def read_tensors(path: Path) -> None:
    file = TensorFile(path)
    small = [name for name, entry in file.entries.items() if entry.count * entry.dtype.itemsize <= READ_BYTES]
    values = {name: file.read(name) for name in small[:1000]}
    with path.open("rb") as start:
        if start.read(9)[8:] != b"{":
            return
    try:
        with safe_open(path, "pt") as theirs:
            if {*theirs.keys()} != {*file.entries}:
                raise AssertionError("the Rust reader finds other tensors")
            for name, value in values.items():
                own, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (value, theirs.get_tensor(name)))
                if not own.equal(other):
                    raise AssertionError(f"the Rust reader finds other values in {name!r}")
    except MemoryError:
        return  # it maps the whole file, which the limit forbids
    except SafetensorError as error:
        raise AssertionError(f"the Rust reader refuses it: {error}") from error


def draw(model: Path) -> None:
    pipe = mezzotint.load(model, device="cpu")
    pipe.generate(Request(prompt="a lemon", seed=1, steps=2, width=32, height=32))


def tensor_doors(pipe: mezzotint.Pipeline) -> list[Callable[[Path], Any]]:
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoders[0]}
    return [
        read_tensors,
        lambda path: mezzotint.load(path, device="cpu"),
        lambda path: inspect_model(path).text(),
        lambda path: read_adapter(path, networks),
        lambda path: [*Library([str(path)], [16]).items()],
    ]


IMAGE_DOORS: list[Callable[[Path], Any]] = [
    lambda path: init_image.open_picture(str(path)),
    read_source,
    lambda path: check_work(read_source(path)),
    io.read_picture,
    lambda path: inspect_model(path).text(),
    read_embeddings,
]
TEXT_DOORS: dict[str, Callable[[Path], Any]] = {
    "prompts.csv": lambda path: [*rows.read(path, {})],
    "prompts.jsonl": lambda path: [*rows.read(path, {})],
    "recipe.toml": lambda path: Recipe.of("lora", path),
    "wildcard.txt": lambda path: expand(f"__{path.stem}__", 1, path.parent),
}


def in_model(model: Path, door: str) -> Callable[[Path], Any]:
    def through(path: Path) -> None:
        place = model / door
        kept = place.with_name(f"{place.name}.kept")
        place.rename(kept)
        place.symlink_to(path)
        try:
            with watched():
                draw(model)
        finally:
            place.unlink()
            kept.rename(place)

    return through


@contextlib.contextmanager
def watched() -> Any:
    global watching
    watching = True
    try:
        yield
    finally:
        watching = False


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def hang(*_: Any) -> None:
    raise TimeoutError(f"it took more than {HANG} s")


def try_case(doors: list[Callable[[Path], Any]], path: Path, *, watch: bool) -> dict[str, Any]:
    executed.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    found: dict[str, Any] = {"read": 0, "refused": 0, "internal": [], "sentences": []}
    begun = time.process_time()
    for number, door in enumerate(doors):
        signal.alarm(HANG)
        try:
            with watched() if watch else contextlib.nullcontext():
                door(path)
            found["read"] += 1
        except MezzotintError as error:
            found["refused"] += 1
            found["sentences"].append(str(error)[:300])
        except BaseException as error:
            found["internal"].append(f"door {number}: {type(error).__name__}: {str(error)[:300]}")
    signal.alarm(0)
    found |= {"seconds": time.process_time() - begun, "peak": peak(), "executed": executed[:5]}
    return found


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    source, folder = Path(sys.argv[2]), Path(sys.argv[3])
    model = folder / f"model-{os.getpid()}"
    shutil.copytree(source, model)
    draw(model)  # what is imported on first use is imported now
    pipe = mezzotint.load(model, device="cpu")
    doors = tensor_doors(pipe)
    for encoding in ("raw_unicode_escape", "unicode_escape", "utf-8-sig", "utf-16-le", "utf-16-be", "latin-1", "idna"):
        codecs.lookup(encoding)  # which imports it
    for warm in cases["warm"]:
        for door in (*doors, *IMAGE_DOORS):
            with contextlib.suppress(CheckpointError, MezzotintError):
                door(Path(warm))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(audit)
    signal.signal(signal.SIGALRM, hang)
    probe = try_case([os.mkdir, lambda _: bytearray(2 * MEMORY)], folder / f"probe-{os.getpid()}", watch=True)
    print(json.dumps({"probe": probe}), flush=True)
    for case in cases["cases"]:
        print(json.dumps({"begin": case["name"]}), flush=True)
        path, door = Path(case["path"]), case["door"]
        if door == "tensors":
            found = try_case(doors, path, watch=True)
        elif door == "image":
            found = try_case(IMAGE_DOORS, path, watch=True)
        elif door in TEXT_DOORS:
            found = try_case([TEXT_DOORS[door]], path, watch=True)
        else:
            found = try_case([in_model(model, door)], path, watch=False)
        print(json.dumps({"end": case["name"], **found}), flush=True)


main()
