"""Generate a picture again from its file, and verify that the result is identical.

    source = read_source("lemon.png")
    images = again(pipe, source)              # generated from the record, together with the rest of its batch
    verdict = judge(source, images[0])        # verdict.identical, verdict.sentences

Metadata is untrusted. No path or hub id in a file is ever opened: the caller gives the model, LoRAs and embeddings. The
caller also gives the input pictures (image, mask), or the folders in which they are looked up by their SHA-256.
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

from mezzotint.entries.control import Control
from mezzotint.entries.ip_adapter import IPAdapter
from mezzotint.entries.regions import Region
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.images.init_image import digest, read
from mezzotint.images.io import CHUNKS, FORMATS, encode_file, open_file, read_metadata, read_picture
from mezzotint.prompt import plan
from mezzotint.records import infotext, other_programs
from mezzotint.records.record import Record, difference, pixels_digest
from mezzotint.records.record import changes as record_changes
from mezzotint.records.record import read as read_record
from mezzotint.request import Request
from mezzotint.weights.hub import BUNDLED, BUNDLED_CONTROL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mezzotint.pipeline import Pipeline
    from mezzotint.run.runner import OnStep

MAX_FILES = 10_000  # per folder, in the search for an input picture
MAX_PIXELS = 2**24  # of a batch without --yes: 4096x4096, or 16 pictures of 1024x1024
MAX_WORK = 2**30  # pixels x steps x pictures x parts of the prompt without --yes: 64 steps of those
MAX_TEXT = 10_000  # characters of a prompt without --yes; each 75 tokens make the context longer
PROGRAMS = {"invokeai_metadata": "InvokeAI", "prompt": "ComfyUI", "parameters": "AUTOMATIC1111"}  # by text chunk
WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt")  # how a file of a model's weights ends
PICTURE_SUFFIXES = (*FORMATS, ".tif", ".tiff", ".bmp", ".gif", ".ppm")
# fields whose resolved values depend on another field; they are resolved again if that field is overridden
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
UNKNOWN_SIDE, UNKNOWN_STEPS = 1024, 50  # of another program's picture whose text has none
# fields of a Request that name files; their values in a record are never used
FILE_FIELDS = ("image", "mask", "embeddings", "wildcards", "loras", "lora_folder", "control", "ip_adapter", "refiner")


@dataclass(frozen=True)
class Source:
    """The metadata of a picture's file.

    Attributes:
        path: The file.
        record: Our record, or None if another program wrote the metadata.
        request: The request in either.
        notes: What another program's metadata requests but is not supported.
        model_name: The model's name in the metadata.
        model_hash: The first digits of the SHA-256 of the model's file, from A1111's text.
        refiner_hash: The SHA-256 of the refiner's first file of weights, or its first digits; "" if it is not known.
    """

    path: Path
    record: Record | None
    request: Request
    notes: list[str] = field(default_factory=list)
    model_name: str = ""
    model_hash: str = ""
    refiner_hash: str = ""


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read a picture's record, or the metadata of another program.

    Raises:
        RequestError: If the file has neither, or they are damaged.
    """
    texts = read_metadata(path, (*CHUNKS, *other_programs.READERS))
    try:
        record = read_record(texts)
        if record is not None:
            refiner = next((digest for name, digest in record.model.refiner.items() if name.endswith(WEIGHTS)), "")
            return Source(Path(path), record, record.request, model_name=record.model.name, refiner_hash=refiner)
        if "parameters" not in texts and (theirs := other_programs.read(texts)):
            request, notes, model = theirs
            return Source(Path(path), None, request, [*dict.fromkeys(notes)], model)
        text = infotext.parse(texts.get("parameters", ""))
        if not text.fields:
            infotext.check_settings(texts.get("parameters", ""))
            raise RequestError(
                "the file has no generation record; records of mezzotint, A1111, ComfyUI and InvokeAI can be read"
            )
        request, notes = infotext.to_request(text)
    except RequestError as error:
        raise RequestError(f"{str(path)!r}: {error}") from None
    fields = text.fields
    name, _, refiner = fields.get("Refiner", "").rpartition(" [")
    return Source(
        Path(path),
        None,
        request,
        [*dict.fromkeys(notes)],
        fields.get("Model", ""),
        fields.get("Model hash", ""),
        refiner.removesuffix("]") if name else "",
    )


def describe_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a picture's file and its record, or the metadata of another program, as JSON values.

    Raises:
        RequestError: If it is no picture, or carries neither.
    """
    texts = read_metadata(path, (*CHUNKS, *other_programs.READERS))
    with open_file(path) as image:
        found: dict[str, Any] = {"format": image.format, "width": image.width, "height": image.height}
    source, reason = None, ""
    try:
        source = read_source(path)
    except RequestError as error:
        if not any(texts.values()):
            raise
        reason = str(error)
    record = source.record if source else None
    return found | {
        "program": _program(texts, record),
        "model": source.model_name if source else None,
        "model_hash": source.model_hash if source else None,
        "request": source.request.model_dump(mode="json") if source else None,
        "facts": record.facts() if record else {},
        "seed": record.seed if record else source.request.seed if source else None,
        "flagged": record.flagged if record else None,
        "not_supported": source.notes if source else [],
        "notices": record.notices if record else (),
        "enlarged": [str(each) for each in record.enlarged] if record else [],
        "unreadable": reason or None,
        "texts": texts,
    }


def _program(texts: Mapping[str, str], record: Record | None) -> str:
    """Return the program that wrote the metadata, with its version if it says so."""
    if "mezzotint" in texts:
        return f"mezzotint {record.versions.get('mezzotint', '')}".strip() if record else "mezzotint"
    if "parameters" in texts:
        version = infotext.parse(texts["parameters"]).fields.get("Version", "")
        return f"{PROGRAMS['parameters']} {version}".strip()
    return next((program for chunk, program in PROGRAMS.items() if chunk in texts), "unknown")


def find_inputs(
    source: Source, given: Mapping[str, str | None], folders: Iterable[Path]
) -> tuple[dict[str, str], list[str]]:
    """Find the input pictures (image, mask) of a file's record.

    Args:
        source: The metadata of the file.
        given: For each field a picture file or a folder to search, or None.
        folders: The folders to search for a field without a file or folder of its own.

    Returns:
        The path of each field's picture, and warnings about them.

    Raises:
        RequestError: If no picture has the SHA-256 in the record.
    """
    paths: dict[str, str] = {}
    warnings: list[str] = []
    recorded = source.record.inputs if source.record else {}
    files = [name for name, path in given.items() if path and not os.path.isdir(path)]
    for name in dict.fromkeys([*recorded, *source.request.sources, *files]):
        option = _input_option(name)
        folder = given.get("mask") if option == "--mask" and os.path.isdir(given.get("mask") or "") else None
        path, input = given.get(name) or folder, recorded.get(name)
        if path is not None and not os.path.isdir(path):
            if input is not None and digest(read(path, name)) != input.sha256:
                warnings.append(f"{name} is {path!r}, whose SHA-256 is not the one in the record")
            paths[name] = path
            continue
        if input is None:
            raise RequestError(f"the record does not identify the input picture ({name}); give it with {option}")
        found = _find_by_sha256(input.sha256, [Path(path)] if path else folders)
        if found is None:
            recorded_path = f" {input.path!r}" if input.path else ""
            raise RequestError(
                f"the input picture ({name}){recorded_path} was changed or is missing: no picture with the SHA-256 "
                f"{input.sha256[:10]}... was found; give the picture or its folder with {option}, since a path in a "
                "record is never opened"
            )
        paths[name] = str(found)
    return paths, warnings


def _input_option(name: str) -> str:
    """Return the option that gives an input, such as "control[0].image"."""
    entry, _, field = name.partition(".")
    if not field or entry.startswith("regions"):
        return f"--{field or name}"
    return f"--{entry.partition('[')[0].replace('_', '-')} FILE:{field.partition('[')[0]}=PICTURE"


def _find_by_sha256(sha256: str, folders: Iterable[Path]) -> Path | None:
    """Find a picture file by its SHA-256 in the folders, without subfolders."""
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))[:MAX_FILES]
        except OSError:
            continue
        for name in names:
            path = folder / name
            if path.suffix.lower() in (*PICTURE_SUFFIXES, ".safetensors"):
                with suppress(RequestError):  # not a regular file, or too large
                    if digest(read(str(path), name)) == sha256:
                        return path
    return None


def check_work(source: Source, changes: Mapping[str, Any] | None = None) -> None:
    """Check that a file does not ask for more pixels, steps or text than a stranger's picture may without asking.

    Args:
        source: The metadata of the file.
        changes: Fields of the Request that are overridden.

    Raises:
        RequestError: If a batch has more than MAX_PIXELS pixels, a prompt more than MAX_TEXT characters, or pixels x
            steps x pictures x parts of the prompt (separated by AND) is above MAX_WORK.
    """
    request = _override(source, changes or {}, dict.fromkeys(FILE_FIELDS))
    group = min(request.count, request.batch or 1)
    if source.record and not _draws_another(changes):
        group = len(source.record.group)
    pictures = max(group, request.count)
    jobs = source.record.jobs() if source.record and not _draws_another(changes) else [(request, 0)]
    texts = {(job.prompt, job.negative_prompt or "", job.prompt_syntax or "a1111") for job, _ in jobs}
    longest = max(len(text) for prompt, negative, _ in texts for text in (prompt, negative))
    longest = max(longest, *(len(region.prompt) for region in request.regions or ()), 0)
    if longest > MAX_TEXT:
        raise RequestError(f"its prompt has {longest:,} characters; above {MAX_TEXT:,} it is drawn only with --yes")
    sides = [side or UNKNOWN_SIDE for side in (request.width, request.height)]
    steps = request.steps or len(request.sigmas or request.timesteps or ()) or UNKNOWN_STEPS
    passes = [(sides[0] * sides[1], steps)]
    if request.hires:
        passes.append((round(passes[0][0] * request.hires**2), request.hires_steps or steps))
    parts = max(len(plan(prompt, syntax, steps).parts) for prompt, _, syntax in texts)
    regions = [region.prompt for region in request.regions or ()]
    parts += sum(len(plan(prompt, request.prompt_syntax or "a1111", steps).parts) for prompt in regions)
    pixels = group * max(area for area, _ in passes)
    work = pictures * parts * sum(area * steps for area, steps in passes)
    if pixels > MAX_PIXELS or work > MAX_WORK:
        raise RequestError(
            f"it asks for {pixels:,} pixels at once ({group:,} x {sides[0]}x{sides[1]}) and {work:,} pixels x steps x "
            f"pictures{' x parts of the prompt' * (parts > 1)}; above {MAX_PIXELS:,} and {MAX_WORK:,} it is drawn only "
            "with --yes"
        )


def select_model(source: Source, given: str | None) -> str | None:
    """Return the model to load for a file: the given one, or None for the bundled model.

    Raises:
        RequestError: If none is given and the record is not of the bundled model. A name in a record is never opened.
    """
    if given or source.model_name == BUNDLED.name:
        return given
    if not source.model_name:
        raise RequestError("the file does not name its model; give one with --model")
    digest = source.model_hash or next(iter(source.record.model.files.values() if source.record else ()), "")
    known = f" (SHA-256 {digest[:10]}...)" if digest else ""
    raise RequestError(f"it was generated with the model {source.model_name[:100]!r}{known}; give it with --model")


def select_options(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options to load a file's model with: those of its record, overridden by the given ones.

    Raises:
        RequestError: If the picture was generated with another VAE than the model's and none is given.
    """
    model = source.record.model if source.record else None
    if model and model.vae and not given.get("vae"):
        name, digest = list(model.vae.items())[-1]  # the weights come after a config
        raise RequestError(
            f"it was generated with the VAE {name[:100]!r} (SHA-256 {digest[:10]}...); give it with --vae"
        )
    return {**(model.options.values() if model else {}), **given}


def again(
    pipe: Pipeline,
    source: Source,
    changes: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    embeddings: tuple[str, ...] | None = None,
    loras: Sequence[Any] | None = None,
    controls: Sequence[Mapping[str, Any]] = (),
    ip_adapters: Sequence[Mapping[str, Any]] = (),
    upscaler: str | None = None,
    refiner: str | None = None,
    on_step: OnStep | None = None,
    cache: dict[Any, list[Image.Image]] | None = None,
) -> list[Image.Image]:
    """Generate a file's picture again.

    Without changes, or with one of `safety` alone, the picture's whole batch is generated, with the record's number of
    threads.

    Args:
        pipe: The pipeline.
        source: The metadata of the file.
        changes: Fields of the Request to override.
        inputs: The paths of the input pictures, from `find_inputs`.
        embeddings: Files, folders or hub ids of the embeddings.
        loras: The LoRAs, as a Request takes them.
        controls: The `file` of each ControlNet, in the order of the request, and other fields of it to override.
        ip_adapters: Likewise of each IP-Adapter.
        upscaler: The file of the upscaler of hires-fix, if the picture was drawn with one.
        refiner: The refiner, if the picture was drawn with one.
        on_step: Called with (steps done, steps in total) after each step.
        cache: Holds the last batch, for files that share it.

    Returns:
        One picture, or as many as an overridden `count` asks for.

    Raises:
        RequestError: If the picture cannot be generated from its record.
    """
    record = source.record
    pictures = {name: path for name, path in (inputs or {}).items() if name in FILE_FIELDS}
    files: dict[str, Any] = {**dict.fromkeys(FILE_FIELDS), **pictures, "embeddings": embeddings, "loras": loras}
    if "control" not in (changes or {}):
        files["control"] = _controls(source, controls, inputs or {})
    if "regions" not in (changes or {}):
        files["regions"] = _regions(source, inputs or {})
    if "ip_adapter" not in (changes or {}):
        files["ip_adapter"] = _ip_adapters(source, ip_adapters, inputs or {})
    if record and record.model.embeddings and not embeddings:
        names = ", ".join(sorted(record.model.embeddings))
        raise RequestError(f"it was generated with the embeddings {names[:200]}; give their files with --embedding")
    if record and record.model.loras and not loras and "lora_folder" not in (changes or {}):
        names = ", ".join(sorted(record.model.loras))
        raise RequestError(f"it was generated with the LoRAs {names[:200]}; give their files with --lora")
    if source.request.upscaler and "hires_upscale" not in (changes or {}):
        if upscaler is None:
            digest = next(iter(record.model.upscaler.values()), "") if record else ""
            known = f" (SHA-256 {digest[:10]}...)" if digest else ""
            raise RequestError(
                f"it was generated with the upscaler {source.request.upscaler[:100]!r}{known}; give its file with "
                "--hires-upscale"
            )
        files["hires_upscale"] = upscaler
    if source.request.refiner and "refiner" not in (changes or {}):
        if refiner is None:
            known = f" (SHA-256 {source.refiner_hash[:10]}...)" if source.refiner_hash else ""
            raise RequestError(
                f"it was generated with the refiner {source.request.refiner[:100]!r}{known}; give it with --refiner"
            )
        files["refiner"] = refiner
    with threads(record):
        if _draws_another(changes) or record is None:
            return pipe.generate(_override(source, changes or {}, files), on_step=on_step).images
        if record.latents:
            raise RequestError("it was generated from given latents, of which the record has only the SHA-256")
        if missing := sorted({*record.model.edited} - {*pipe.edited}):
            raise RequestError(
                f"it was generated with a {' and a '.join(missing)} that had been edited or replaced in memory, which "
                "no file holds; make the same edits to the pipeline first, or save it with pipe.save and load that"
            )
        jobs = record.jobs({**files, **(changes or {})})
        key = tuple((job.replace(seed=0, count=1), seed) for job, seed in jobs)
        cache = {} if cache is None else cache
        if key not in cache:
            cache.clear()
            cache[key] = pipe.draw(jobs, on_step=on_step)
        return [cache[key][record.place]]


def _controls(
    source: Source, given: Sequence[Mapping[str, Any]], inputs: Mapping[str, str]
) -> tuple[Control, ...] | None:
    """Return the ControlNets of a record, with these files and the input pictures in place of the names in it."""
    entries = source.request.control or ()
    bundled = [entry.file == BUNDLED_CONTROL.name for entry in entries]
    if len(given) == bundled.count(False):  # the bundled one is always there
        others = iter(given)
        given = [{} if own else next(others) for own in bundled]
    _check_given([entry.file for entry in entries], given, "ControlNet", "--control")
    found = [
        entry.replace(**{field: value for field, value in own.items() if field != "more"}).with_pictures(
            {field: inputs.get(f"control[{k}].{field}") for field in entry.pictures}
        )
        for k, (entry, own) in enumerate(zip(entries, given, strict=True))
    ]
    return tuple(found) or None


def _regions(source: Source, inputs: Mapping[str, str]) -> tuple[Region, ...] | None:
    """Return the regions of a record, with the input pictures in place of the names of their masks."""
    entries = enumerate(source.request.regions or ())
    return tuple(entry.replace(mask=inputs.get(f"regions[{k}].mask")) for k, entry in entries) or None


def _ip_adapters(
    source: Source, given: Sequence[Mapping[str, Any]], inputs: Mapping[str, str]
) -> tuple[IPAdapter, ...] | None:
    """Return the IP-Adapters of a record, with these files and the input pictures in place of the names in it."""
    entries = source.request.ip_adapter or ()
    _check_given([entry.file for entry in entries], given, "IP-Adapter", "--ip-adapter")
    found = []
    for k, (entry, own) in enumerate(zip(entries, given, strict=True)):
        begin = f"ip_adapter[{k}]."
        files: dict[str, Any] = {"embeds": inputs.get(f"{begin}embeds")}
        for name in ("image", "mask"):
            files[name] = [path for field, path in inputs.items() if field.startswith(f"{begin}{name}[")] or None
        found.append(entry.replace(**{"encoder": None, **own, **files}))
    return tuple(found) or None


def _check_given(files: Sequence[str], given: Sequence[Any], kind: str, option: str) -> None:
    """Check that as many files were given as a picture was drawn with. Raises RequestError."""
    if len(files) != len(given):
        names = ", ".join(files)
        what = f"it was generated with the {kind}s {names[:200]}" if files else f"it has no {kind}"
        raise RequestError(f"{what}, and {len(given)} were given; give the file of each, in this order, with {option}")


def _draws_another(changes: Mapping[str, Any] | None) -> bool:
    """Return whether these changes of a request change what is drawn: `safety` does not."""
    return bool(set(changes or ()) - {"safety"})


def _override(source: Source, changes: Mapping[str, Any], files: Mapping[str, Any]) -> Request:
    """Return the request of one picture with some fields and its files changed."""
    dependent = {name: None for changed in changes for name in DEPENDENT_FIELDS.get(changed, ())}
    own = {"count": 1, "seed": source.record.seed} if source.record else {}
    return source.request.replace(**{**own, **dependent, **files, **changes})


@contextmanager
def threads(record: Record | None) -> Iterator[None]:
    """Set torch's number of threads to the record's inside the context."""
    import torch

    before = torch.get_num_threads()
    recorded = record.model.threads if record else before
    if recorded <= 4 * (os.cpu_count() or 1):  # an untrusted number must not overload the machine
        torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a file with the picture generated again.

    Attributes:
        identical: Whether the pixels are the same and match the record's hash.
        sentences: The verdict, followed by possible reasons for a difference.
    """

    identical: bool
    sentences: list[str]


def judge(source: Source, image: Image.Image) -> Verdict:
    """Compare a file with the picture generated again.

    JPEG is lossy, so a JPEG file is compared with the new picture encoded as JPEG.

    Raises:
        RequestError: If the file's pixels cannot be read.
    """
    pixels = read_picture(source.path)
    record = source.record
    new = image
    if FORMATS.get(source.path.suffix.lower()) == "JPEG" or _is_jpeg(source.path):
        new = Image.open(io.BytesIO(encode_file(image, "JPEG"))).convert("RGB")
    now = read_record({"mezzotint": image.info["mezzotint"]})
    changed = list(record_changes(record, now)) if record and now else []
    digest = pixels_digest(image)
    if record and record.enlarged:
        return _judge_enlarged(record, pixels, digest, changed)
    try:
        largest, share = difference(pixels, new)
    except MezzotintError as error:
        return Verdict(False, [f"differs: {error}", *changed])
    if largest == 0:
        if record and record.pixels not in (None, digest):
            return Verdict(False, ["differs: the pixels are identical, but do not match the record's hash", *changed])
        return Verdict(True, ["identical"])
    sentences = [f"differs: max {largest}/255 in {_percent(share)} % of pixels", *changed]
    if record and record.pixels == digest:
        sentences.append("the new picture matches the record's hash, so the file's pixels were edited")
    elif record and not changed:
        sentences.append(
            "the recorded model and environment have not changed: the record or the pixels were edited, or the "
            "picture was generated on a different processor"
        )
    return Verdict(False, sentences)


def _judge_enlarged(record: Record, pixels: Image.Image, digest: str, changed: list[str]) -> Verdict:
    """Compare the picture that was generated again with the hash of the one that was enlarged."""
    how = "; ".join(map(str, record.enlarged))
    if record.pixels != digest:
        return Verdict(
            False, ["differs: the picture before it was enlarged does not match the record's hash", *changed]
        )
    after = record.enlarged[-1].pixels
    if after is not None and after != pixels_digest(pixels):
        return Verdict(
            False, [f"identical before it was enlarged ({how}), but the file's pixels were edited after that"]
        )
    return Verdict(True, [f"identical before it was enlarged ({how})"])


def _percent(share: float) -> str:
    """Format a fraction as a percentage that is not 0 unless the fraction is."""
    return f"{100 * share:.2f}" if share >= 0.0001 else f"{100 * share:.2g}"


def _is_jpeg(path: Path) -> bool:
    """Return whether a file starts with the JPEG signature."""
    with path.open("rb") as file:
        return file.read(3) == b"\xff\xd8\xff"
