"""Generate a picture again from its file, and verify that the result is identical.

    source = read_source("lemon.png")
    image = again(pipe, source)               # drawn as its record says, its whole batch with it
    verdict = judge(source, image)            # verdict.identical, .sentences

What a file says is data. No path and no hub id in it is ever opened: a model and embeddings are named by whoever asks,
and a picture that the run started from is named too, or found by its SHA-256 among pictures where the caller says.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mezzotint.errors import MezzotintError, RequestError
from mezzotint.images.init_image import digest, read
from mezzotint.images.io import CHUNKS, FORMATS, encode_file, read_metadata, read_picture
from mezzotint.records import infotext, other_programs
from mezzotint.records.record import Record, difference, pixels_digest
from mezzotint.records.record import changes as record_changes
from mezzotint.records.record import read as read_record
from mezzotint.request import Request
from mezzotint.weights.hub import BUNDLED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mezzotint.pipeline import OnStep, Pipeline

MAX_FILES = 10_000  # that are looked at in a folder for an input picture
PICTURES = (*FORMATS, ".tif", ".tiff", ".bmp", ".gif", ".ppm")  # endings of what is looked at
# what else was resolved for the sake of a field, and is so again when that is changed
DEPENDENT_FIELDS = {
    "sampler": ("spacing", "sigmas", "timesteps", "eta", "guidance_scale"),
    "spacing": ("sigmas", "timesteps"),
    "steps": ("sigmas", "timesteps"),
    "sigmas": ("spacing", "steps", "timesteps"),
    "timesteps": ("spacing", "steps", "sigmas"),
    "width": ("original_size", "crop", "target_size", "apg_norm_threshold"),
    "height": ("original_size", "crop", "target_size", "apg_norm_threshold"),
    "guidance_method": (
        "apg_eta",
        "apg_momentum",
        "apg_norm_threshold",
        "cfg_zero_init_steps",
        "perp_neg_scale",
    ),
    "prompt_syntax": ("emphasis", "choices"),
}
# fields of a Request of which a record is never believed
FILE_FIELDS = ("image", "mask", "embeddings", "wildcards", "loras", "lora_folder")


@dataclass(frozen=True)
class Source:
    """The metadata of a picture's file.

    Attributes:
        path: The file.
        record: Our record, or None if another program wrote the metadata.
        request: The request in either.
        notes: What another program's metadata asks for and is not supported.
        model_name: The model's name in the metadata.
        model_hash: The first digits of the SHA-256 of the model's file, from A1111's text.
    """

    path: Path
    record: Record | None
    request: Request
    notes: list[str] = field(default_factory=list)
    model_name: str = ""
    model_hash: str = ""  # the first digits of a file's SHA-256, of A1111's text


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read a picture's record, or the metadata of another program.

    Raises:
        RequestError: If the file has neither, or they are damaged.
    """
    texts = read_metadata(path, (*CHUNKS, *other_programs.READERS))
    try:
        record = read_record(texts)
        if record is not None:
            return Source(Path(path), record, record.request, model_name=record.model.name)
        if "parameters" not in texts and (theirs := other_programs.read(texts)):
            request, notes, model = theirs
            return Source(Path(path), None, request, notes, model)
        text = infotext.parse(texts.get("parameters", ""))
        if not text.fields:
            raise RequestError(
                "there is no record in it: neither mezzotint's nor A1111's text, nor ComfyUI's or InvokeAI's"
            )
        request, notes = infotext.to_request(text)
    except RequestError as error:
        raise RequestError(f"{str(path)!r}: {error}") from None
    fields = text.fields
    return Source(Path(path), None, request, notes, fields.get("Model", ""), fields.get("Model hash", ""))


def inputs_of(
    source: Source, given: Mapping[str, str | None], folders: Iterable[Path]
) -> tuple[dict[str, str], list[str]]:
    """The paths of the pictures that the run started from, by field, and what is to be said of them.

    given: by field the file that the caller names, or a folder to look in; else `folders` are looked through for a
    picture file with the record's SHA-256. Raises RequestError where there is none.
    """
    paths: dict[str, str] = {}
    said: list[str] = []
    known = source.record.inputs if source.record else {}
    files = [name for name, place in given.items() if place and not os.path.isdir(place)]
    for name in dict.fromkeys([*known, *source.request.sources, *files]):
        place, input = given.get(name), known.get(name)
        if place is not None and not os.path.isdir(place):
            if input is not None and digest(read(place, name)) != input.sha256:
                said.append(f"{name} is {place!r}, which is not the picture that the record names (another SHA-256)")
            paths[name] = place
            continue
        if input is None:
            raise RequestError(f"it was drawn from a picture that its record does not identify; --{name} names it")
        found = _find(input.sha256, [Path(place)] if place else folders)
        if found is None:
            was = f" ({input.path!r})" if input.path else ""
            raise RequestError(
                f"the picture that it was drawn from{was} is changed or missing: no picture here has the SHA-256 "
                f"{input.sha256[:10]}... of the record's {name}; --{name} names another place. What a file names is "
                "not opened for that alone"
            )
        paths[name] = str(found)
    return paths, said


def _find(sha256: str, folders: Iterable[Path]) -> Path | None:
    """Find a picture file by its SHA-256 in the folders, without subfolders."""
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))[:MAX_FILES]
        except OSError:
            continue
        for name in names:
            path = folder / name
            if path.suffix.lower() in PICTURES:
                with suppress(RequestError):  # no plain file, or too large a one
                    if digest(read(str(path), name)) == sha256:
                        return path
    return None


def model_for(source: Source, given: str | None) -> str | None:
    """Return the model to load for a file: the given one, or None for the bundled model.

    Raises:
        RequestError: If the file names another model, since a name in a file opens nothing.
    """
    if given or source.model_name == BUNDLED.name:
        return given
    if not source.model_name:
        raise RequestError("it does not say which model drew it; --model names one")
    digest = source.model_hash or next(iter(source.record.model.files.values() if source.record else ()), "")
    known = f" (SHA-256 {digest[:10]}...)" if digest else ""
    raise RequestError(f"it was drawn with the model {source.model_name[:100]!r}{known}; --model names it")


def again(
    pipe: Pipeline,
    source: Source,
    changes: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    embeddings: tuple[str, ...] | None = None,
    loras: Sequence[Any] | None = None,
    on_step: OnStep | None = None,
    kept: dict[Any, list[Image.Image]] | None = None,
) -> list[Image.Image]:
    """Draw a file's picture again: one, or as many as a changed `count` says.

    changes: fields of the Request that shall be others. Without any the whole batch that the picture was drawn in is
    drawn, with the record's number of threads, and its picture of it returned. inputs: from `inputs_of`. embeddings:
    files, folders or hub ids, instead of what the record says; loras: as a Request's, likewise. kept: holds the last
    batch, for files that share it.
    Raises RequestError where it cannot be drawn.
    """
    record = source.record
    named: dict[str, Any] = {**dict.fromkeys(FILE_FIELDS), **(inputs or {}), "embeddings": embeddings, "loras": loras}
    if record and record.model.embeddings and not embeddings:
        names = ", ".join(sorted(record.model.embeddings))
        raise RequestError(f"it was drawn with the embeddings {names[:200]}; --embedding names their files")
    if record and record.model.loras and not loras and "lora_folder" not in (changes or {}):
        names = ", ".join(sorted(record.model.loras))
        raise RequestError(f"it was drawn with the LoRAs {names[:200]}; --lora names their files")
    with threads(record):
        if changes or record is None:
            dropped = {name: None for changed in changes or () for name in DEPENDENT_FIELDS.get(changed, ())}
            own = {"count": 1, "seed": record.seed} if record else {}
            request = source.request.replace(**{**own, **dropped, **named, **(changes or {})})
            return pipe.generate(request, on_step=on_step).images
        if record.latents:
            raise RequestError("it was drawn from latents that were given, of which the record has only the SHA-256")
        jobs = record.jobs(named)
        key = tuple((job.replace(seed=0, count=1), seed) for job, seed in jobs)
        kept = {} if kept is None else kept
        if key not in kept:
            kept.clear()
            kept[key] = pipe.draw(jobs, on_step=on_step)
        return [kept[key][record.place]]


@contextmanager
def threads(record: Record | None) -> Iterator[None]:
    """Set torch's number of threads to the record's inside the context."""
    import torch

    before = torch.get_num_threads()
    wanted = record.model.threads if record else before
    if wanted <= 4 * (os.cpu_count() or 1):  # an untrusted number must not overload the machine
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Verdict:
    """identical: the same pixels, drawn from an honest record. sentences: the verdict, then what may explain it."""

    identical: bool
    sentences: list[str]


def judge(source: Source, image: Image.Image) -> Verdict:
    """Compare a file with the picture that was drawn again. Raises RequestError where its pixels cannot be read.

    A JPEG's pixels are not those that were drawn: it is compared with the JPEG that would be written of the new ones.
    """
    pixels = read_picture(source.path)
    record = source.record
    drawn = image
    if FORMATS.get(source.path.suffix.lower()) == "JPEG" or _is_jpeg(source.path):
        drawn = Image.open(io.BytesIO(encode_file(image, "JPEG"))).convert("RGB")
    now = read_record({"mezzotint": image.info["mezzotint"]})
    changed = list(record_changes(record, now)) if record and now else []
    digest = pixels_digest(image)
    try:
        most, share = difference(pixels, drawn)
    except MezzotintError as error:
        return Verdict(False, [f"differs: {error}", *changed])
    if most == 0:
        if record and record.pixels not in (None, digest):
            return Verdict(False, ["differs: the pixels are the same, but the record's hash is another", *changed])
        return Verdict(True, ["identical"])
    sentences = [f"differs: max {most}/255 in {_percent(share)} % of pixels", *changed]
    if record and record.pixels == digest:
        sentences.append("what the record asks for was drawn, bit for bit: the file's pixels were changed since")
    elif record and not changed:
        sentences.append(
            "nothing that is recorded of model and machine has changed: the record or the pixels were edited, "
            "or this is another processor"
        )
    return Verdict(False, sentences)


def _percent(share: float) -> str:
    """Format a fraction as a percentage that is not 0 unless the fraction is."""
    return f"{100 * share:.2f}" if share >= 0.0001 else f"{100 * share:.2g}"


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"\xff\xd8\xff"
