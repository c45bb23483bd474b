"""The record that a picture carries: what it was made of, so that it can be drawn again and the copy compared.

A record is two texts in `image.info`, which `save` (io.py) writes into the file: `mezzotint`, JSON with the fields
of `Record`, and `parameters`, A1111's text (infotext.py). It holds no clock, no host name and no duration: the same
picture has the same record. What a file says is data: reading a record opens nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mezzotint import __version__
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.placement import Placement
from mezzotint.records import infotext
from mezzotint.request import MAX_SEED, Job, Request

MAX_DEPTH = 20  # of the JSON's brackets; a record's own is 5
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Word = Annotated[str, Field(max_length=4096)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Words = Literal["prompt", "negative_prompt"]  # in which the requests of one batch may differ


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class Model(_Part):
    """What drew. files, loras and merged (LoRAs that were part of the weights): name -> SHA-256 of the file's bytes;
    embeddings: of their numbers.
    """

    name: Word = ""
    family: Word = ""
    files: dict[Word, Sha256] = {}
    lora: Word | None = None
    embeddings: dict[Word, Sha256] = {}
    loras: dict[Word, Sha256] = {}
    merged: dict[Word, Sha256] = {}
    device: Word = "cpu"
    dtype: Word = "float32"
    threads: int = Field(default=1, ge=1, le=4096)
    placement: Placement = Placement()


class Input(_Part):
    """A picture that the run started from: where it was, and the SHA-256 of its bytes."""

    path: Word | None = None
    sha256: Sha256


class Record(_Part):
    """request: the whole of it, resolved. seed: this picture's own. group: the seeds of the pictures drawn in one batch
    with it, itself among them at `place`; others: the fields in which the request of each of them differs, where any
    does. pixels: SHA-256 of the drawn picture, rows of R, G, B. float32: parts that had to run again in it.
    latents: SHA-256 of the starting noise, where it was given and not drawn.
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

    def jobs(self, changes: Mapping[str, Any] | None = None) -> list[Job]:
        """The batch that the picture was drawn in, its own request with `changes`. Raises RequestError."""
        own = self.request.replace(**(changes or {}))
        others = [own.replace(**other) if other else own for other in self.others] or [own] * len(self.group)
        return list(zip(others, self.group, strict=True))

    def facts(self) -> dict[str, str]:
        """What the same bits depend on beside the request, by name."""
        model = self.model
        return {
            **{f"{name}'s version": version for name, version in self.versions.items()},
            "the device": model.device,
            "the dtype": model.dtype,
            "the number of threads": str(model.threads),
            **{f"the placement's {name}": str(value) for name, value in model.placement.changes().items()},
            **{f"the model's {name}": digest for name, digest in model.files.items()},
            **{f"the embedding {name}": digest for name, digest in model.embeddings.items()},
            **{f"the LoRA {name}": digest for name, digest in model.loras.items()},
            **{f"the LoRA merged, {name},": digest for name, digest in model.merged.items()},
            **{f"the input picture ({name})": given.sha256 for name, given in self.inputs.items()},
            "what ran again in float32": ", ".join(self.float32),
        }


def describe(
    request: Request,
    seed: int,
    model: Mapping[str, Any],
    group: Sequence[Job] = (),
    place: int = 0,
    *,
    image: Image.Image | None = None,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    float32: Sequence[str] = (),
    latents: Tensor | None = None,
) -> dict[str, str]:
    """The record of one picture: the two texts, to be put into `image.info`.

    request: resolved, as it ran. model: a Model's fields, `name` among them. group, place: the pictures drawn in one
    batch, and which of them this is; alone where it is empty. image: the picture as it was drawn. inputs: Input's
    fields by field of the request. latents: (C, h, w), where they were given.
    """
    group = group or [(request, seed)]
    own = _fields(request)
    others = [_differences(job, request) for job, _ in group]
    versions = {name: version(name) for name in ("mezzotint", "torch")}
    optional = {
        "others": others if any(others) else [],
        "inputs": {name: dict(given) for name, given in (inputs or {}).items()},
        "float32": list(float32),
        "pixels": image and pixels_digest(image),
        "latents": None
        if latents is None
        else hashlib.sha256(latents.detach().cpu().float().numpy().tobytes()).hexdigest(),
    }
    record = {
        "request": own,
        "seed": seed,
        "group": [s for _, s in group],
        "place": place,
        "model": dict(model),
        "versions": versions,
        **{name: value for name, value in optional.items() if value},
    }
    files = list(model.get("files", {}).values())
    text = infotext.write(
        request, seed, model["name"], versions["mezzotint"], files[0][:10] if len(files) == 1 else None
    )
    return {"mezzotint": json.dumps(record, ensure_ascii=False), "parameters": text}


def _fields(request: Request) -> dict[str, Any]:
    """The request for JSON, without the bytes of pictures: they are in `inputs` by their hash."""
    return request.model_dump(mode="json", exclude={n for n, s in request.sources.items() if isinstance(s, bytes)})


def _differences(other: Request, own: Request) -> dict[str, str | None]:
    """The words in which a neighbour's request differs."""
    return {name: getattr(other, name) for name in get_args(Words) if getattr(other, name) != getattr(own, name)}


def read(texts: Mapping[str, str]) -> Record | None:
    """The record in what `read_metadata` gave; None where there is none of ours.

    Raises RequestError, a sentence, for a record that is damaged or was never one.
    """
    text = texts.get("mezzotint")
    if text is None:
        return None
    if len(text) > infotext.MAX_TEXT:
        raise RequestError(f"the record has {len(text):,} characters; at most {infotext.MAX_TEXT:,} are read")
    try:
        if _depth(text) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        record = Record.model_validate(json.loads(text, parse_constant=_no_constant))
        if record.place >= len(record.group) or record.group[record.place] != record.seed:
            raise ValueError("its seed is not the one of its place in the group")
        if record.others and len(record.others) != len(record.group):
            raise ValueError("others must have one entry for each of the group")
        record.jobs()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100] or "the whole"
        raise RequestError(f"the record is wrong at {where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:  # no JSON, or a number of thousands of digits
        raise RequestError(f"the record cannot be read: {error}") from None
    except RequestError as error:
        raise RequestError(f"the record's request is wrong: {error}") from None
    return record


def _depth(text: str) -> int:
    """How deeply the JSON nests, at most: brackets in strings count too."""
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


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def pixels_digest(image: Image.Image) -> str:
    """SHA-256 of the picture's bytes: rows of R, G, B."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def difference(a: Image.Image, b: Image.Image) -> tuple[int, float]:
    """(greatest difference in 255ths, share of the pixels that differ). Raises MezzotintError for other sizes."""
    if a.size != b.size:
        raise MezzotintError(f"one picture is {a.width}x{a.height}, the other {b.width}x{b.height}")
    apart = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    extremes = [high for _, high in apart.getextrema()]  # type: ignore[misc]
    red, green, blue = apart.split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    return int(max(extremes)), 1.0 - most[0] / (a.width * a.height)


def changes(before: Record, now: Record) -> Iterator[str]:
    """What the two pictures were drawn with that is not the same, a phrase each."""
    old, new = before.facts(), now.facts()
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield f"{name} was {_short(old.get(name))}, here {_short(new.get(name))}"


def _short(value: str | None) -> str:
    """A value for a sentence: the first digits of a hash."""
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
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
