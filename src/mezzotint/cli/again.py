"""`mezzotint again`: a picture's file becomes the same picture, or a verdict on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.draw import SUFFIXES, check_out, fields_of, generate, lora_of, read_prompt, save_one, wrote
from mezzotint.cli.terminal import Device, Dtype, Embedding, Json, Lora, Model, load, long_work, print_json, say
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.placement import Placement

if TYPE_CHECKING:
    from mezzotint.again import Source
    from mezzotint.pipeline import OnStep, Pipeline

IDENTICAL, DIFFERS, UNKNOWN = 0, 1, 2  # exit codes of --verify; of several files the highest


def again(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="PNG, JPEG or WebP pictures with a record.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Write nothing; say whether it is the same. Code 0 yes, 1 no, 2 cannot tell."),
    ] = False,
    model: Model = None,
    image: Annotated[
        str | None, typer.Option(metavar="FILE|FOLDER", help="Where the picture is that it was drawn from.")
    ] = None,
    mask: Annotated[str | None, typer.Option(metavar="FILE|FOLDER", help="Where its mask is.")] = None,
    embedding: Embedding = None,
    lora: Lora = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE|FOLDER", help="As of generate; else mezzotint-SEED.png here.")
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Draw a picture again from its own file, or verify it.

    Options of generate override what the file says: "the same, but 40 steps" is --steps 40.
    """
    from mezzotint.again import again, inputs_of, judge, model_for, read_source

    changes = fields_of(options)
    if options.get("prompt") is not None:
        changes["prompt"] = read_prompt(options["prompt"])
    if verify and (changes or out is not None):
        given = ", ".join(changes) or "out"
        raise RequestError(
            f"{given} is given with --verify, which draws what the file says and writes nothing; leave it out"
        )
    if len(files) > 1 and out is not None and not Path(out).is_dir():
        raise RequestError(f"out is {out!r} and there are {len(files)} files; it must be a folder that exists")

    places = {"image": image, "mask": mask}
    pipes = Pipes(model, device, dtype)
    kept: dict[Any, Any] = {}
    told: list[dict[str, Any]] = []
    for file in files:
        code, sentences, written = UNKNOWN, list[str](), list[Path]()
        try:
            source = read_source(file)
            path = model_for(source, model)
            inputs, said = inputs_of(source, places, [file.parent, Path()])
            if not verify:
                check_out(out, _named(source, changes), SUFFIXES)
            pipe = pipes.of(source, path)
            said += [f"not honoured: {note}" for note in source.notes] + _other_model(source, pipe)
            with _progress(file) as on_step:
                images = again(
                    pipe,
                    source,
                    changes,
                    inputs=inputs,
                    embeddings=tuple(embedding) if embedding else None,
                    loras=tuple(map(lora_of, lora)) if lora else None,
                    on_step=on_step,
                    kept=kept,
                )
            if verify:
                verdict = judge(source, images[0])
                code, sentences = (IDENTICAL if verdict.identical else DIFFERS), [*verdict.sentences, *said]
            else:
                named = _named(source, changes)
                written = [save_one(made, out, named, k) for k, made in enumerate(images)]
                code, sentences = 0, [wrote(written), *said]
        except MezzotintError as error:
            sentences = [f"cannot be {'judged' if verify else 'drawn again'}: {error}"]
        told.append({"file": str(file), "code": code, "sentences": sentences, "paths": [str(path) for path in written]})
        if not as_json:
            (say if code == UNKNOWN else typer.echo)(f"{file}: {'; '.join(sentences)}")
    if as_json:
        print_json({"files": told})
    raise typer.Exit(max(entry["code"] for entry in told))


class Pipes:
    """The pipelines that the files ask for, each loaded once."""

    def __init__(self, model: str | None, device: str | None, dtype: str | None) -> None:
        self._device, self._dtype = device, dtype
        self._loaded: dict[tuple[str | None, str | None, str | None, Placement], Pipeline] = {}

    def of(self, source: Source, model: str | None) -> Pipeline:
        """The model on the device and in the dtype that were asked for, or else the record's where they are here; its
        placement is the record's, as far as it can be here.
        """
        import torch

        from mezzotint.devices import best_device, device_of
        from mezzotint.run.execute import possible

        facts = source.record.model if source.record else None
        here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device = self._device or (facts.device if facts and here.get(facts.device) else None)
        dtype = self._dtype or (facts.dtype if facts and facts.dtype in ("float32", "bfloat16", "float16") else None)
        placement = possible(facts.placement if facts else Placement(), device_of(device or best_device()), dtype)
        key = (model, device, dtype, placement)
        if key not in self._loaded:
            self._loaded[key] = load(model, device, dtype, placement=placement)
        return self._loaded[key]


@contextmanager
def _progress(file: Path) -> Iterator[OnStep]:
    with long_work(f"drawing {file.name}", lambda: "the rest was not drawn") as on_step:
        yield on_step


def _named(source: Source, changes: Mapping[str, Any]) -> Any:
    """The request by which the files are named: one picture with its own seed, unless told otherwise."""
    seed = source.record.seed if source.record else source.request.seed
    named = {name: changes[name] for name in ("seed", "count") if name in changes}
    return source.request.replace(**{"seed": seed, "count": 1, **named})


def _other_model(source: Source, pipe: Pipeline) -> list[str]:
    """A sentence where A1111's text names another file by its hash. Older ones, of 8 digits, are of another kind."""
    wanted = source.model_hash.lower()
    if source.record or len(wanted) != 10 or any(f.startswith(wanted) for f in pipe.parts.identity.values()):
        return []
    return [
        f"the text names the model {source.model_name[:100]!r} with the hash {wanted}, which this one does not have"
    ]


def _signature() -> inspect.Signature:
    """again's own parameters, then those of generate that say what to draw."""
    own = list(inspect.signature(again, eval_str=True).parameters.values())[:-1]
    known = {parameter.name for parameter in own} | {"words"}
    more = [p for name, p in inspect.signature(generate, eval_str=True).parameters.items() if name not in known]
    return inspect.Signature([*own, *more])


again.__signature__ = _signature()  # type: ignore[attr-defined]  # typer makes the options of it
