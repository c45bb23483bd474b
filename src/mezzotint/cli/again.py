"""`mezzotint again`: draw a picture again from the record in its file, or verify it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.draw import generate, wrote
from mezzotint.cli.fields import control_of, fields_of, ip_adapter_of, lora_of, read_prompt
from mezzotint.cli.naming import SUFFIXES, check_out, names_several, save_one
from mezzotint.cli.options import (
    FROM_PICTURE,
    OUTPUT,
    Device,
    Dtype,
    Embedding,
    Json,
    Lora,
    Model,
    add_options_of,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import StoppedError, load, long_work, print_json, say, show
from mezzotint.errors import MezzotintError, RequestError, WriteError
from mezzotint.placement import Placement

if TYPE_CHECKING:
    from mezzotint.again import Source
    from mezzotint.pipeline import Pipeline
    from mezzotint.run.runner import OnStep

IDENTICAL, DIFFERS, UNKNOWN = 0, 1, 2  # exit codes of --verify; of several files the highest
FAILED = 1  # exit code if a picture cannot be written


@add_options_of(generate, without=("words",))
def again(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="PNG, JPEG or WebP pictures that carry a record.")
    ],
    verify: Annotated[
        bool,
        option(
            "Write nothing, and report whether the picture is the same. Exit code 0: identical, 1: it differs, 2: "
            "cannot be judged.",
            None,
            OUTPUT,
            name="--verify",
        ),
    ] = False,
    model: Model = None,
    image: Annotated[
        str | None, option("The picture that it was drawn from, or a folder to look in.", "FILE|FOLDER", FROM_PICTURE)
    ] = None,
    mask: Annotated[
        str | None, option("The mask that it was drawn with, or a folder to look in.", "FILE|FOLDER", FROM_PICTURE)
    ] = None,
    embedding: Embedding = None,
    lora: Lora = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str | None,
        option(
            "As for generate.",
            "FILE|FOLDER|PATTERN",
            OUTPUT,
            default="mezzotint-SEED.png in the current folder",
            name="--out -o",
        ),
    ] = None,
    yes: Annotated[
        bool, option("Draw pictures of any size and number that a file asks for.", None, OUTPUT, name="--yes")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Draw a picture again from its own file, or verify it.

    The options of generate override the file: --steps 40 draws the same picture with 40 steps.
    """
    from mezzotint.again import again, check_work, find_inputs, judge, read_source, select_model, select_options
    from mezzotint.records.record import read as read_record

    given_options = take_model_options(options)
    controls = [control_of(text) for text in options.pop("control") or ()]
    adapters = [ip_adapter_of(text) for text in options.pop("ip_adapter") or ()]
    changes = fields_of(options)
    if options.get("prompt") is not None:
        changes["prompt"] = read_prompt(options["prompt"])
    upscaler = changes.pop("hires_upscale", None)  # of a picture that was drawn with a file, this is the file
    if upscaler is not None and (upscaler in ("latent", "pixels") or not _were_drawn_with(files, "upscaler")):
        changes["hires_upscale"], upscaler = upscaler, None
    refiner = changes.pop("refiner", None)  # likewise
    if refiner is not None and not _were_drawn_with(files, "refiner"):
        changes["refiner"], refiner = refiner, None
    if verify and (changes or out is not None):
        given = ", ".join(changes) or "out"
        raise RequestError(
            f"{given} is given together with --verify, which changes nothing and writes nothing; leave it out"
        )
    if len(files) > 1 and not names_several(out):
        raise RequestError(f"out is {out!r} and there are {len(files)} files; it must be a folder, or a pattern")

    places = {"image": image, "mask": mask}
    for k, entry in enumerate(controls):
        pictures = {"image": entry, **{f"more[{j}].image": one for j, one in enumerate(entry.get("more", ()))}}
        places |= {f"control[{k}].{field}": one["image"] for field, one in pictures.items() if "image" in one}
    for k, entry in enumerate(adapters):
        for name, files_of in ((name, entry[name]) for name in ("image", "mask") if name in entry):
            places |= {f"ip_adapter[{k}].{name}[{i}]": path for i, path in enumerate(files_of)}
        places |= {f"ip_adapter[{k}].embeds": entry["embeds"]} if "embeds" in entry else {}
    pipelines = PipelineCache(model, device, dtype)
    cache: dict[Any, Any] = {}
    reports: list[dict[str, Any]] = []
    for file in files:
        written, tell = list[Path](), show
        try:
            source = read_source(file)
            is_random = source.request.seed is None or options.get("seed") == -1
            if source.request.seed is None:  # drawn here, so that the file is named by it
                source = replace(source, request=source.request.replace(seed=secrets.randbelow(2**32)))
            if not yes:
                check_work(source, changes)
            path = select_model(source, model)
            inputs, notes = find_inputs(source, places, [file.parent, Path()])
            if not verify:
                check_out(out, _named(source, changes), SUFFIXES)
            pipe = pipelines.get(source, path, select_options(source, given_options))
            notes += [f"ignored: {note}" for note in source.notes] + _other_model(source, pipe)
            with _progress(file) as on_step:
                images = again(
                    pipe,
                    source,
                    changes,
                    inputs=inputs,
                    embeddings=tuple(embedding) if embedding else None,
                    loras=tuple(map(lora_of, lora)) if lora else None,
                    controls=controls,
                    ip_adapters=adapters,
                    upscaler=upscaler,
                    refiner=refiner,
                    on_step=on_step,
                    cache=cache,
                )
            if verify:
                verdict = judge(source, images[0])
                code, sentences = (IDENTICAL if verdict.identical else DIFFERS), [*verdict.sentences, *notes]
            else:
                named = _named(source, changes)
                written = [save_one(made, out, named, k) for k, made in enumerate(images)]
                seed = [f"seed {named.seed}"] if is_random else []
                record = read_record({"mezzotint": images[0].info["mezzotint"]})
                code, sentences = 0, [wrote(written), *seed, *notes, *(record.notices if record else ())]
        except StoppedError:  # Ctrl-C
            raise
        except Exception as error:
            if os.environ.get("MEZZOTINT_DEBUG"):
                raise
            code = FAILED if isinstance(error, WriteError) else UNKNOWN
            sentences, tell = [f"cannot be {'judged' if verify else 'drawn again'}: {_reason(error)}"], say
        reports.append(
            {"file": str(file), "code": code, "sentences": sentences, "paths": [str(path) for path in written]}
        )
        if not as_json:
            tell(f"{file}: {'; '.join(sentences)}")
    if as_json:
        print_json({"files": reports})
    raise typer.Exit(max(entry["code"] for entry in reports))


class PipelineCache:
    """The pipelines that the files need, each loaded once."""

    def __init__(self, model: str | None, device: str | None, dtype: str | None) -> None:
        self._device, self._dtype = device, dtype
        self._loaded: dict[tuple[str | None, str | None, str | None, Placement, str], Pipeline] = {}

    def get(self, source: Source, model: str | None, options: Mapping[str, Any]) -> Pipeline:
        """Return the pipeline for a file.

        Device and dtype are the options', or those of the record where this machine has them; the placement is the
        record's as far as this machine allows.
        """
        import torch

        from mezzotint.devices import best_device, device_of
        from mezzotint.run.execute import adapt_placement

        facts = source.record.model if source.record else None
        here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device = self._device or (facts.device if facts and here.get(facts.device) else None)
        dtype = self._dtype or (facts.dtype if facts and facts.dtype in ("float32", "bfloat16", "float16") else None)
        placement = adapt_placement(
            facts.placement if facts else Placement(), device_of(device or best_device()), dtype
        )
        key = (model, device, dtype, placement, repr(sorted(options.items())))
        if key not in self._loaded:
            self._loaded[key] = load(model, device, dtype, placement=placement, **options)
        return self._loaded[key]


@contextmanager
def _progress(file: Path) -> Iterator[OnStep]:
    with long_work(f"drawing {file.name}", lambda: "the remaining pictures were not drawn") as on_step:
        yield on_step


def _were_drawn_with(files: Sequence[Path], name: str) -> bool:
    """Return whether any picture was drawn with an upscaler or a refiner, as far as records can be read."""
    from mezzotint.again import read_source

    for file in files:
        with suppress(MezzotintError):
            if getattr(read_source(file).request, name) is not None:
                return True
    return False


def _named(source: Source, changes: Mapping[str, Any]) -> Any:
    """Return the request that the output files are named by: one picture with its own seed, unless overridden."""
    seed = source.record.seed if source.record else source.request.seed
    named = {name: changes[name] for name in ("seed", "count") if name in changes}
    return source.request.replace(**{"seed": seed, "count": 1, **named})


def _reason(error: Exception) -> str:
    """Return an error's sentence. Any other error is a bug, but the other files still get their turn."""
    if isinstance(error, MezzotintError):
        return str(error)
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"this is a bug in mezzotint ({what}); set MEZZOTINT_DEBUG=1 to see the traceback"


def _other_model(source: Source, pipe: Pipeline) -> list[str]:
    """Return a sentence if A1111's text names another model by its hash. Old hashes, of 8 digits, are not compared."""
    wanted = source.model_hash.lower()
    if source.record or len(wanted) != 10 or any(f.startswith(wanted) for f in pipe.parts.identity.values()):
        return []
    return [
        f"the text names the model {source.model_name[:100]!r} with the hash {wanted}, which this one does not have"
    ]
