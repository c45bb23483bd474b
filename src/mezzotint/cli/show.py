"""The commands that print information: `mezzotint inspect`, `samplers`, `models` and `env`."""

from __future__ import annotations

import shutil
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.defaults import FILE, config_path, read_defaults
from mezzotint.cli.naming import SUFFIXES
from mezzotint.cli.options import Json, add_options_of, model_options, option, take_model_options
from mezzotint.cli.terminal import default_threads, in_threads, print_json, show
from mezzotint.errors import CheckpointError, RequestError


@add_options_of(model_options)
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Model folder or file, emoji (the bundled model), LoRA file or textual inversion."
        ),
    ],
    model: Annotated[str | None, option("For a LoRA file: list which of its layers fit this model.", "MODEL")] = None,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Describe a model or LoRA file, and what is missing in it."""
    model_given = take_model_options(overrides)
    from mezzotint.weights.checkpoint import inspect_model

    try:
        report = inspect_model(file, **({} if model else model_given))
    except CheckpointError:
        if file.is_file() and file.suffix.lower() in SUFFIXES:
            raise CheckpointError(f"{file} is a picture, no model; see: mezzotint info {file}") from None
        raise
    found, lines = report.to_dict(), report.lines()
    if model:
        from mezzotint.weights.checkpoint import scan_model
        from mezzotint.weights.lora import coverage

        parts = (part for part in scan_model(model, **model_given).parts if part.name != "vae")
        covered = coverage(file, {part.name: part.network() for part in parts})
        found["coverage"] = vars(covered)
        lines += f"as a LoRA for {model}: {covered.text()}".split("\n")
    if as_json:
        print_json(found)
    else:
        show(*lines)


def samplers(as_json: Json = False) -> None:
    """List the samplers, and their names in other programs."""
    from mezzotint.samplers.names import FEW_STEPS, NAMES, SPACINGS, TABLE
    from mezzotint.samplers.presets import A1111_SCHEDULES, COMFYUI_SCHEDULES

    few = {name: {"sampler": base, "steps": n, "guidance_scale": w} for name, (base, _, n, w) in FEW_STEPS.items()}
    if as_json:
        print_json(
            {"samplers": [row._asdict() for row in TABLE], "few_steps": few, "spacings": SPACINGS, "names": NAMES}
        )
        return
    width = min(max(shutil.get_terminal_size().columns, 40), 100)
    for row in TABLE:
        facts = (
            f"order {row.order}, {row.calls} call{'s' if row.calls > 1 else ''}{', noise' if row.stochastic else ''}"
        )
        theirs = {"diffusers": row.diffusers, "A1111": row.a1111, "ComfyUI": row.comfyui}
        names = "; ".join(f"{program} {name}" for program, name in theirs.items() if name)
        show(*textwrap.wrap(f"{row.name} ({facts}): {row.good_for}", width, subsequent_indent="    "))
        indent = " " * 4
        show(*textwrap.wrap(names, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False))
    show("", "For models distilled to a few steps:")
    for name, made in few.items():
        show(f"  {name}: {made['sampler']}, {made['steps']} steps, guidance {made['guidance_scale']:g}")
    for text in (
        f"spacings: {', '.join(SPACINGS)}",
        f"An A1111 name may end in {', '.join(A1111_SCHEDULES)}; a ComfyUI name in {', '.join(COMFYUI_SCHEDULES)}.",
        "order: order of convergence; calls: of the network in a step; noise: the steps add noise. Our names and those "
        "of diffusers' classes run as diffusers does with the model's scheduler_config.json. Case, spaces, hyphens and "
        "underscores do not matter; of several names the exact spelling is meant, otherwise ours before diffusers', "
        "A1111's and ComfyUI's.",
    ):
        show("", *textwrap.wrap(text, width))


def models(as_json: Json = False) -> None:
    """List the models that can be loaded without a download."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    found: list[dict[str, Any]] = []
    bundled = Path(__file__).parents[1] / "data" / "emoji"
    if bundled.is_dir():
        size = sum(file.stat().st_size for file in bundled.rglob("*") if file.is_file())
        found.append({"name": "emoji", "source": "bundled", "path": str(bundled), "bytes": size})
    with suppress(CacheNotFound):
        for repo in sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id):
            for revision in repo.revisions:
                if repo.repo_type == "model" and (revision.snapshot_path / "model_index.json").is_file():
                    path, size = str(revision.snapshot_path), revision.size_on_disk
                    found.append({"name": repo.repo_id, "source": "hub cache", "path": path, "bytes": size})
    if as_json:
        print_json(found)
        return
    for row in found:
        show(f"{row['name']}  {row['source']}, {row['bytes'] / 1e6:,.0f} MB, {row['path']}")
    show(
        "--model takes one of these names, a diffusers folder, a .safetensors or .ckpt file or a hub id; without it "
        "the bundled model is used."
    )


def env(as_json: Json = False) -> None:
    """Print versions, devices, backends and defaults, for bug reports."""
    import platform

    import torch

    from mezzotint.devices import has_native_bfloat16
    from mezzotint.kernels import describe
    from mezzotint.models.backends import available
    from mezzotint.records.record import version

    facts: dict[str, Any] = {
        name: version(name) for name in ("mezzotint", "torch", "numpy", "pillow", "safetensors", "tokenizers")
    }
    facts |= {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {in_threads(default_threads())}",
        "kernels": describe(),
        "bfloat16": "multiplied natively by the CPU" if has_native_bfloat16() else "not multiplied natively by the CPU",
        "cuda": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    backends = dict(available())
    path = config_path()
    try:
        values = read_defaults()
    except RequestError as error:
        values, problem = {}, str(error)
    else:
        problem = ""
    if path is None:
        state = f"none, since {FILE} is empty"
    else:
        state = f"{path} ({problem or ('read' if path.is_file() else 'does not exist')})"
    if as_json:
        config = {"path": str(path or ""), "exists": bool(path and path.is_file()), "error": problem}
        given = {key: default._asdict() for key, default in values.items()}
        print_json(facts | {"attention": backends, "config": config | {"values": given}})
    else:
        facts |= {f"attention {name}": state for name, state in backends.items()}
        facts |= {"configuration": state}
        facts |= {f"default {key}": f"{value} (from {source})" for key, (value, source) in values.items()}
        show(*(f"{name}: {fact}" for name, fact in facts.items()))
