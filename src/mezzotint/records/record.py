"""The record that a picture carries: everything needed to generate it again and to verify the copy.

A record is two texts in `image.info`, which `save` (images/io.py) writes into the file: `mezzotint`, JSON with the
fields of `Record`, and `parameters`, A1111's text (infotext.py). It contains no time, host name or duration, so the
same picture has the same record. Of a path it contains only the last part, since pictures are shared and folders tell
who made them; files are identified by their SHA-256. A file's record is untrusted data: reading it opens no other file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Annotated, Any, Literal, get_args

from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mezzotint import __version__, samplers
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.placement import Placement
from mezzotint.records import infotext
from mezzotint.request import MAX_SEED, Job, Request

FOLDER_INDEX = "model_index.json"  # among a model's files if it is a folder, which A1111's text has no hash for
NAMED_FILES = (
    "loras",
    "controls",
    "ip_adapters",
    "image_encoders",
    "merged",
)  # tables of a Model whose names are paths
MAX_NOTICE = 4096  # characters of one
MAX_DEPTH = 20  # nesting of the JSON; our own records have 5 levels
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Word = Annotated[str, Field(max_length=4096)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Words = Literal["prompt", "negative_prompt"]  # the fields in which the requests of one batch may differ


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class Options(_Part):
    """The options of `ModelOptions` that name no file."""

    prediction: Word | None = None
    family: Word | None = None
    variant: Word | None = None
    config: dict[Word, dict[Word, Any]] | None = None

    def values(self) -> dict[str, Any]:
        """Return the options that are set."""
        return self.model_dump(exclude_none=True)


class Model(_Part):
    """The model and the machine that a picture was generated with.

    `files`, `vae` (given in place of the model's own), `loras`, `controls` (ControlNets), `ip_adapters`,
    `image_encoders` (of IP-Adapters), `upscaler` (of hires-fix), `refiner` and `merged` (LoRAs merged into the weights)
    map a name to the SHA-256 of a file, and `embeddings` to that of vectors. `safety_checker` does so where flagged
    pictures are blurred or black. `options` are those that overruled the files. `edited` names the networks that were
    not as in the files: another network, edited weights or modules, hooks. `solver` is the module and name of the
    function that a program registered as the sampler. `kernels` is the instruction set of our own kernels where they
    are used.
    """

    name: Word = ""
    family: Word = ""
    files: dict[Word, Sha256] = {}
    vae: dict[Word, Sha256] = {}
    safety_checker: dict[Word, Sha256] = {}
    options: Options = Options()
    lora: Word | None = None
    embeddings: dict[Word, Sha256] = {}
    loras: dict[Word, Sha256] = {}
    controls: dict[Word, Sha256] = {}
    ip_adapters: dict[Word, Sha256] = {}
    image_encoders: dict[Word, Sha256] = {}
    upscaler: dict[Word, Sha256] = {}
    refiner: dict[Word, Sha256] = {}
    merged: dict[Word, Sha256] = {}
    edited: tuple[Word, ...] = ()
    solver: Word | None = None
    device: Word = "cpu"
    dtype: Word = "float32"
    threads: int = Field(default=1, ge=1, le=4096)
    kernels: Word | None = None
    placement: Placement = Placement()


class Input(_Part):
    """An input picture: its file name, and the SHA-256 of the file. Older records have the whole path."""

    path: Word | None = None
    sha256: Sha256


class Enlargement(_Part):
    """How a finished picture was enlarged.

    Attributes:
        method: "Lanczos", or the architecture of an upscaler.
        scale: How much larger it became.
        model: The SHA-256 of the upscaler's file, by its name.
        tile: The largest side of the tiles that the upscaler saw; None if it saw the whole picture.
        pixels: SHA-256 of the enlarged picture's pixels.
    """

    method: Word
    scale: float = Field(gt=0.0, le=1000.0)
    model: dict[Word, Sha256] = {}
    tile: int | None = Field(default=None, ge=1, le=2**31)
    pixels: Sha256 | None = None

    def __str__(self) -> str:
        file = "".join(f" by {name} (SHA-256 {digest[:10]}...)" for name, digest in self.model.items())
        return f"{self.scale:g} times{file}, {self.method}{f', in tiles of {self.tile}' if self.tile else ''}"


class Record(_Part):
    """The record of one picture.

    Attributes:
        request: The resolved request.
        seed: The seed of this picture.
        group: The seeds of all pictures of its batch.
        place: The index of this picture in `group`.
        others: For each picture of the batch the prompts that differ from `request`; empty if none do.
        model: The model and the machine.
        versions: Package versions, by name.
        inputs: The input pictures, by field of the request.
        float32: The parts of the model that had to be repeated in float32.
        pixels: SHA-256 of the picture's pixels, rows of R, G, B.
        latents: SHA-256 of the starting noise, if it was given.
        flagged: Whether the model's safety checker flagged the picture; None if it was not checked.
        notices: What `Result.notices` said of the request; not what it said of the model.
        enlarged: How the picture was enlarged after it had been drawn, in order.
    """

    request: Request
    seed: Seed
    group: tuple[Seed, ...] = Field(min_length=1, max_length=10_000)
    place: int = Field(default=0, ge=0)
    others: tuple[dict[Words, str | None], ...] = ()
    model: Model
    versions: dict[Word, Word]
    inputs: dict[Word, Input] = {}
    float32: tuple[Word, ...] = ()
    pixels: Sha256 | None = None
    latents: Sha256 | None = None
    flagged: bool | None = None
    notices: tuple[Word, ...] = Field(default=(), max_length=10_000)
    enlarged: tuple[Enlargement, ...] = Field(default=(), max_length=100)

    def jobs(self, changes: Mapping[str, Any] | None = None) -> list[Job]:
        """Return the batch that the picture was generated in.

        Args:
            changes: Fields of the request to replace.

        Raises:
            RequestError: If a changed field is invalid.
        """
        own = self.request.replace(**(changes or {}))
        others = [own.replace(**other) if other else own for other in self.others] or [own] * len(self.group)
        return list(zip(others, self.group, strict=True))

    def facts(self) -> dict[str, str]:
        """Return what the pixels depend on besides the request, by name."""
        model = self.model
        return {
            **{f"{name}'s version": version for name, version in self.versions.items()},
            "the device": model.device,
            "the dtype": model.dtype,
            "the number of threads": str(model.threads),
            "the instruction set of our own kernels": model.kernels or "",
            **{f"the placement's {name}": str(value) for name, value in model.placement.changes().items()},
            **{f"the model's {name}": digest for name, digest in model.files.items()},
            **{f"the VAE's {name}": digest for name, digest in model.vae.items()},
            **{f"the safety checker's {name}": digest for name, digest in model.safety_checker.items()},
            **{f"the option {name}": json.dumps(value) for name, value in model.options.values().items()},
            **{f"the embedding {name}": digest for name, digest in model.embeddings.items()},
            **{f"the LoRA {name}": digest for name, digest in model.loras.items()},
            **{f"the ControlNet {name}": digest for name, digest in model.controls.items()},
            **{f"the IP-Adapter {name}": digest for name, digest in model.ip_adapters.items()},
            **{f"the image encoder {name}": digest for name, digest in model.image_encoders.items()},
            **{f"the upscaler {name}": digest for name, digest in model.upscaler.items()},
            **{f"the refiner's {name}": digest for name, digest in model.refiner.items()},
            **{f"the LoRA merged, {name},": digest for name, digest in model.merged.items()},
            **{f"the input picture ({name})": given.sha256 for name, given in self.inputs.items()},
            "the solver function": model.solver or "",
            "what was edited in memory": ", ".join(model.edited),
            "what was repeated in float32": ", ".join(self.float32),
        }


def describe(
    request: Request,
    seed: int,
    model: Mapping[str, Any],
    group: Sequence[Job] = (),
    place: int = 0,
    *,
    image: Image.Image | None = None,
    flagged: bool | None = None,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    float32: Sequence[str] = (),
    latents: Tensor | None = None,
    notices: Sequence[str] = (),
) -> dict[str, str]:
    """Return the record of one picture as the two texts for `image.info`.

    Args:
        request: The resolved request.
        seed: The seed of this picture.
        model: The fields of a `Model`, including `name`.
        group: The pictures of the batch; empty means this one alone.
        place: The index of this picture in the group.
        image: The picture, for the hash of its pixels.
        flagged: Whether the model's safety checker flagged it; None if it was not checked.
        inputs: The fields of an `Input`, by field of the request.
        float32: The parts of the model that were repeated in float32.
        latents: The given starting noise, of shape (C, h, w).
        notices: What the user was told of the request.
    """
    group = group or [(request, seed)]
    own = _fields(request)
    others = [_differences(job, request) for job, _ in group]
    versions = {name: version(name) for name in ("mezzotint", "torch")}
    optional = {
        "others": others if any(others) else [],
        "inputs": {name: {**given, "path": _base_name(given.get("path"))} for name, given in (inputs or {}).items()},
        "float32": list(float32),
        "pixels": image and pixels_digest(image),
        "latents": None
        if latents is None
        else hashlib.sha256(latents.detach().cpu().float().numpy().tobytes()).hexdigest(),
        "notices": [
            _with_base_names(notice, [path for name in NAMED_FILES for path in model.get(name, ())])[:MAX_NOTICE]
            for notice in notices
        ],
    }
    record = {
        "request": own,
        "seed": seed,
        "group": [s for _, s in group],
        "place": place,
        "model": {**model, **{name: _by_base_name(model[name]) for name in NAMED_FILES if name in model}},
        "versions": versions,
        **{name: value for name, value in optional.items() if value},
        **({} if flagged is None else {"flagged": flagged}),
    }
    hashes = _short_hash(model.get("files", {})), _short_hash(model.get("refiner", {}))
    text = infotext.write(request, seed, model["name"], versions["mezzotint"], *hashes)
    texts = {"mezzotint": json.dumps(record, ensure_ascii=False), "parameters": text}
    # of a file's name that is not UTF-8, the bytes that are none become "?"
    return {chunk: text.encode("utf-8", "replace").decode() for chunk, text in texts.items()}


def _short_hash(files: Mapping[str, str]) -> str | None:
    """Return the first 10 digits of a single file's SHA-256, which comes before those beside it; None of a folder."""
    return None if FOLDER_INDEX in files else next(iter(files.values()), "")[:10] or None


def add_enlargement(texts: Mapping[str, str], image: Image.Image, **fields: Any) -> dict[str, str]:
    """Return a picture's texts with a line in its record on how it was enlarged.

    A picture without a record of ours keeps the texts that it has.

    Args:
        texts: The texts of the picture that was enlarged.
        image: The enlarged picture.
        fields: The fields of an `Enlargement`.

    Raises:
        RequestError: If the record is damaged.
    """
    if read(texts) is None:
        return dict(texts)
    record = json.loads(texts["mezzotint"])
    made = Enlargement(**fields, pixels=pixels_digest(image)).model_dump(mode="json", exclude_none=True)
    record["enlarged"] = [*record.get("enlarged", ()), made]
    return {**texts, "mezzotint": json.dumps(record, ensure_ascii=False)}


def _fields(request: Request) -> dict[str, Any]:
    """Return the request for JSON, of paths the last part, without pictures given as bytes."""
    fields = request.model_dump(mode="json", exclude={n for n, s in request.sources.items() if isinstance(s, bytes)})
    for name in ("image", "mask", "wildcards", "lora_folder"):
        if name in fields:
            fields[name] = _base_name(fields[name])
    if request.upscaler:
        fields["hires_upscale"] = _base_name(request.upscaler)
    if request.refiner:
        fields["refiner"] = _base_name(request.refiner)
    if request.embeddings:
        fields["embeddings"] = [*map(_base_name, request.embeddings)]
    for entry, own in zip(fields.get("control") or (), request.control or (), strict=True):
        entry["file"] = _base_name(own.file)
        bases = [_base_name(source) if isinstance(source, str) else None for source in own.pictures.values()]
        for one, base in zip((entry, *(entry["more"] or ())), bases, strict=True):
            one["image"] = base
    for entry, region in zip(fields.get("regions") or (), request.regions or (), strict=True):
        entry["mask"] = _base_name(region.mask) if isinstance(region.mask, str) else None
    for entry, given in zip(fields.get("ip_adapter") or (), request.ip_adapter or (), strict=True):
        entry |= {"file": _base_name(given.file), "encoder": _base_name(given.encoder)}
        entry |= {"image": _names(given.image), "mask": _names(given.mask)}
        entry["embeds"] = _base_name(given.embeds) if isinstance(given.embeds, str) else None
    if request.loras:
        fields["loras"] = [[_base_name(path), *scales] for path, *scales in fields["loras"]]
    return fields


def _names(sources: Sequence[str | bytes] | None) -> list[str | None] | None:
    """Return the last part of each picture's path; None if one was given as bytes."""
    paths = [source for source in sources or () if isinstance(source, str)]
    return [*map(_base_name, paths)] if paths and len(paths) == len(sources or ()) else None


def _base_name(path: str | None) -> str | None:
    """Return the last part of a path, of Windows or POSIX."""
    return path and (PureWindowsPath(path).name or ".")


def _with_base_names(notice: str, paths: Iterable[str]) -> str:
    """Return a notice with the last part of these paths in place of each."""
    for path in paths:
        notice = notice.replace(path, _base_name(path) or path)
    return notice


def _by_base_name(digests: Mapping[str, str]) -> dict[str, str]:
    """Return digests by base name; of equal names the second gets a number, and so on."""
    found: dict[str, str] = {}
    for path, digest in digests.items():
        name = _base_name(path) or path
        numbered = (f"{name} ({k})" for k in itertools.count(2))
        while name in found:
            name = next(numbered)
        found[name] = digest
    return found


def _differences(other: Request, own: Request) -> dict[str, str | None]:
    """Return the prompts in which another request of the batch differs."""
    return {name: getattr(other, name) for name in get_args(Words) if getattr(other, name) != getattr(own, name)}


def read(texts: Mapping[str, str]) -> Record | None:
    """Parse the record in the texts of a file, as `read_metadata` returns them.

    Returns:
        The record, or None if mezzotint wrote none.

    Raises:
        RequestError: If the record is damaged.
    """
    text = texts.get("mezzotint")
    if text is None:
        return None
    if len(text) > infotext.MAX_TEXT:
        raise RequestError(f"the record has {len(text):,} characters; at most {infotext.MAX_TEXT:,} are read")
    try:
        if _depth(text) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        table = json.loads(text, parse_constant=_reject_constant)
        if missing := _missing_solver(table):
            raise ValueError(missing)
        record = Record.model_validate(table)
        if record.place >= len(record.group) or record.group[record.place] != record.seed:
            raise ValueError("seed differs from the entry of group at place")
        if record.others and len(record.others) != len(record.group):
            raise ValueError("others must have one entry for each seed of group")
        record.jobs()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100] or "the top level"
        raise RequestError(f"the record is wrong at {where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or a number with thousands of digits
        raise RequestError(f"the record cannot be read: {error}") from None
    except RequestError as error:
        raise RequestError(f"the record's request is invalid: {error}") from None
    return record


def _missing_solver(table: Any) -> str:
    """Return a sentence if the picture was drawn by a solver function that is not registered in this process."""
    model, request = (table.get(name) for name in ("model", "request")) if isinstance(table, dict) else (None, None)
    if not (isinstance(model, dict) and isinstance(request, dict)):
        return ""
    function, name = model.get("solver"), request.get("sampler")
    if not (isinstance(function, str) and isinstance(name, str)) or name in (*samplers.NAMES, *samplers.OWN):
        return ""
    return (
        f"the sampler {name[:100]!r} is the function {function[:100]} of the program that drew it, which is not "
        f"registered here; call mezzotint.samplers.register({name[:100]!r}, function) first"
    )


def _depth(text: str) -> int:
    """Return the nesting depth of a JSON text, without parsing it."""
    deepest = depth = 0
    inside = escaped = False
    for mark in text:
        if inside:
            inside, escaped = escaped or mark != '"', mark == "\\" and not escaped
        elif mark == '"':
            inside = True
        elif mark in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "]}":
            depth -= 1
    return deepest


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def pixels_digest(image: Image.Image) -> str:
    """Return the SHA-256 of a picture's pixels, rows of R, G, B."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def difference(a: Image.Image, b: Image.Image) -> tuple[int, float]:
    """Compare two pictures.

    Returns:
        The largest difference in levels of 255, and the fraction of pixels that differ.

    Raises:
        MezzotintError: If the sizes differ.
    """
    if a.size != b.size:
        raise MezzotintError(f"one picture is {a.width}x{a.height}, the other {b.width}x{b.height}")
    apart = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    extremes = [high for _, high in apart.getextrema()]  # type: ignore[misc]
    red, green, blue = apart.split()
    largest = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    return int(max(extremes)), 1.0 - largest[0] / (a.width * a.height)


def changes(before: Record, now: Record) -> Iterator[str]:
    """Yield a phrase for each fact in which two records differ."""
    old, new = before.facts(), now.facts()
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield f"{name} was {_shorten(old.get(name))} and is now {_shorten(new.get(name))}"


def _shorten(value: str | None) -> str:
    """Shorten a value for a message; of a hash, the first digits."""
    if not value:
        return "none"
    return f"{value[:10]}..." if len(value) == 64 else value[:100]


@functools.cache
def version(name: str) -> str:
    """Return the version of an installed package."""
    if name == "mezzotint":
        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # running from a source tree
        return "unknown"
