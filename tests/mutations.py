"""Mutation testing, by hand: break one line of the source at a time, and see whether the nearest tests notice.

    python tests/mutations.py [--only NAME]... [--list]

Each mutation is applied to a temporary copy of src/, never to the tree, and the tests nearest to it are run on that
copy until the first one fails. The table says of each whether it was killed (a test failed) or survived. A mutation
whose text does not occur exactly once was not applied: correct its text here. The exit status is the number of
mutations that survived or were not applied.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One line of a file, what to make of it, and the arguments of pytest that run the nearest tests."""

    file: str  # below src/mezzotint
    old: str
    new: str
    tests: str
    keyword: str = ""

    @property
    def name(self) -> str:
        return f"{self.file.removesuffix('.py')}: {self.old.strip()[:60]}"


GUIDANCE = "tests/diffusion/test_guidance.py"
MULTISTEP = "tests/diffusion/test_multistep.py"
SINGLESTEP = "tests/diffusion/test_singlestep.py"
SPACING = "tests/diffusion/test_spacing.py"
INITIAL = "tests/run/test_initial.py"

MUTATIONS = [
    # diffusion
    Mutation("diffusion/guidance.py", "sigma * (1.0 - 1e-6) for level", "sigma for level", GUIDANCE),
    Mutation("diffusion/guidance.py", "sigma * (1.0 - 1e-6) for level", "sigma * (1.0 - 1e-4) for level", GUIDANCE),
    Mutation("diffusion/guidance.py", "low < sigma <= high and", "low <= sigma <= high and", GUIDANCE),
    Mutation("diffusion/guidance.py", "self.rescale * ratio + (1.0 - self.rescale)", "self.rescale * ratio", GUIDANCE),
    Mutation("diffusion/guidance.py", "update - (1.0 - eta) *", "update - eta *", GUIDANCE),
    Mutation("diffusion/multistep.py", "eta = tau(sigma) ** 2", "eta = tau(sigma)", MULTISTEP),
    Mutation("diffusion/noise.py", "unit + unit / 2", "unit", "tests/diffusion/test_noise.py"),
    Mutation("diffusion/noise.py", "i * weyl) % 2**32", "weyl) % 2**32", "tests/diffusion/test_noise.py"),
    Mutation(
        "diffusion/prediction.py",
        "return sigma_data**2 / (",
        "return sigma_data / (",
        "tests/diffusion/test_prediction.py tests/diffusion/test_schedule.py",
    ),
    Mutation("diffusion/schedule.py", "0.008) / 1.008", "0.008) / 1.0", "tests/diffusion/test_schedule.py"),
    Mutation("diffusion/solving.py", "abs(z) < 1.0:", "abs(z) < 0.0:", MULTISTEP),
    Mutation(
        "diffusion/solving.py", "math.sqrt(sigma_next**2 - sigma_up**2), sigma_up", "sigma_next, sigma_up", SINGLESTEP
    ),
    Mutation("diffusion/spacing.py", "* (length // original) - 1", "* (length // original)", SPACING),
    Mutation(
        "diffusion/spacing.py",
        "_beta_quantiles(count + 1, alpha, beta)[:-1]",
        "_beta_quantiles(count, alpha, beta)",
        SPACING,
    ),
    Mutation("diffusion/variation.py", "sine < 1e-4", "sine < 1e-1", INITIAL, "slerp or variation"),
    Mutation(
        "diffusion/variation.py", "(size - other_size) // 2", "(size - other_size)", INITIAL, "middle or seed_size"
    ),
    Mutation("diffusion/singlestep.py", "math.log(sigma / last) > 1e-5", "math.log(sigma / last) > 1e-1", SINGLESTEP),
    Mutation(
        "denoiser.py", "sigma * sigma + self.prediction.sigma_data**2", "sigma * sigma + 1.1", "tests/test_denoiser.py"
    ),
    Mutation("denoiser.py", "math.log(sigma) / 4", "math.log(sigma) / 2", "tests/test_denoiser.py"),
    # samplers
    Mutation(
        "samplers/presets.py",
        '{"order": 3, "solver_type": "bh1"}, "n+1", last=0.001',
        '{"order": 3, "solver_type": "bh1"}, "n+1", last=0.01',
        "tests/samplers",
    ),
    Mutation(
        "samplers/presets.py",
        '"dpm_2_ancestral": Preset("dpm2_a", "normal", points="n+1")',
        '"dpm_2_ancestral": Preset("dpm2_a", "normal", points="n")',
        "tests/samplers",
    ),
    Mutation(
        "samplers/presets.py",
        '"DPM++ 2M SDE": Preset("dpmpp_2m_sde", "Exponential"',
        '"DPM++ 2M SDE": Preset("dpmpp_2m_sde", "Karras"',
        "tests/samplers",
    ),
    # prompt
    Mutation("prompt/comfy.py", "weight * 1.1", "weight * 1.2", "tests/prompt"),
    Mutation("prompt/compel.py", "if weight < 0:", "if weight < 1:", "tests/prompt"),
    Mutation(
        "prompt/a1111.py", "yield text.cut(*match.span()), -1.0", "yield text.cut(*match.span()), 1.0", "tests/prompt"
    ),
    Mutation("prompt/choices.py", "match.end()) + 2", "match.end()) + 1", "tests/prompt"),
    Mutation("prompt/linting.py", "or len(match[0]) > 1", "or len(match[0]) > 2", "tests/prompt"),
    # conditioning
    Mutation(
        "conditioning/chunks.py",
        "chunk[: last_comma + 1]",
        "chunk[: last_comma]",
        "tests/conditioning",
        "chunk or comma or window",
    ),
    Mutation(
        "conditioning/encode.py",
        "attention_mask[window - 1 :: window] = True",
        "attention_mask[window :: window] = True",
        "tests/conditioning",
        "mask",
    ),
    # run
    Mutation(
        "run/resolve.py",
        "STRENGTH, STRENGTH_XL, STRENGTH_MASKED = 0.8, 0.3, 1.0",
        "STRENGTH, STRENGTH_XL, STRENGTH_MASKED = 0.8, 0.4, 1.0",
        INITIAL,
        "strengths",
    ),
    Mutation("run/resolve.py", "GPU_BATCH = 4", "GPU_BATCH = 5", "tests/test_pipeline.py", "default_batch"),
    Mutation("run/resolve.py", "STRENGTH_HIRES = 0.7", "STRENGTH_HIRES = 0.75", INITIAL, "strengths"),
    Mutation("run/resolve.py", "GUIDANCE_CFG_PP = 0.6", "GUIDANCE_CFG_PP = 0.7", GUIDANCE, "cfg_pp or plus"),
    Mutation("run/resolve.py", "15.0 * math.sqrt(width * height) / 1024", "15.0", GUIDANCE, "norm_threshold"),
    Mutation("run/initial.py", "for mask in masks]) >= 128)", "for mask in masks]) > 128)", INITIAL, "grey"),
    Mutation(
        "run/initial.py",
        "channels == 2 * latent + 1",
        "channels == 2 * latent + 2",
        "tests/parity/test_img2img.py",
        "nine and euler",
    ),
    Mutation("run/levels.py", "min(strength, 0.999)", "min(strength, 0.9)", INITIAL, "counts_the_steps"),
    Mutation("run/levels.py", "if left < 1:", "if left < 2:", INITIAL, "counts_the_steps"),
    Mutation(
        "run/loras.py",
        "<= MAX_LORA_SCALE",
        "< MAX_LORA_SCALE",
        "tests/weights/test_lora.py",
        "scale or strength or sentence",
    ),
    Mutation("run/plan.py", "len(self.all_sigmas) - 1", "len(self.all_sigmas)", INITIAL, "solver_starts"),
    Mutation(
        "run/plan.py",
        "math.sqrt(1.0 + sigma**2) if",
        "math.sqrt(2.0 + sigma**2) if",
        "tests/test_pipeline.py tests/samplers",
        "rescale or final or stream or level",
    ),
    # pipeline
    Mutation(
        "run/batches.py", "len(groups[-1]) == r.batch", "len(groups[-1]) > r.batch", "tests/test_pipeline.py", "batch"
    ),
    Mutation(
        "pipeline.py",
        "index=last.index + 1 + step.index",
        "index=last.index + step.index",
        INITIAL,
        "batch_changes_nothing and hires",
    ),
    Mutation(
        "placement.py",
        '(2**10, "KiB")',
        '(2**11, "KiB")',
        "tests/memory/test_planner.py tests/run/test_execute.py",
        "size or budget or placement",
    ),
    Mutation("request.py", "len(value) > 60", "len(value) > 6", "tests/test_request.py"),
    Mutation("rows.py", 'encoding="utf-8-sig"', 'encoding="utf-8"', "tests/test_rows.py"),
    # memory
    Mutation(
        "memory/system.py", "_cgroups()) if number is not None", "_cgroups()) if number", "tests/memory/test_system.py"
    ),
    Mutation(
        "memory/planner.py",
        'weights == "stream" and storage and',
        'weights == "offload" and storage and',
        "tests/memory/test_planner.py",
    ),
    Mutation(
        "memory/footprint.py",
        "max_position_embeddings - 2)), 1)",
        "max_position_embeddings)), 1)",
        "tests/memory/test_footprint.py",
    ),
    # models
    Mutation(
        "models/attention.py",
        "math.sqrt(q.shape[-1])",
        "q.shape[-1]",
        "tests/models/test_attention.py tests/explain",
        "prob or map or weights",
    ),
    Mutation(
        "models/backends.py",
        "min(heads, size // (queries * row))",
        "max(heads, size // (queries * row))",
        "tests/models/test_attention.py",
        "slice",
    ),
    Mutation(
        "models/vae.py",
        "logvar.clamp(-30.0, 20.0)",
        "logvar.clamp(-3.0, 20.0)",
        "tests/models/test_vae.py tests/parity/test_vae.py",
    ),
    Mutation(
        "models/unet.py",
        "sample = 2 * sample - 1",
        "sample = 2 * sample",
        "tests/parity/test_unet.py tests/models/test_unet.py",
    ),
    Mutation("models/blocks.py", "eps=1e-6)", "eps=1e-3)", "tests/parity/test_unet.py"),
    Mutation(
        "models/tiles.py",
        "max(-(-(length - overlap) // (tile - overlap)), 1)",
        "max((length - overlap) // (tile - overlap), 1)",
        "tests/models",
        "tile",
    ),
    Mutation(
        "models/strips.py", "min(first + step, height) - 1", "min(first + step, height)", "tests/models/test_strips.py"
    ),
    Mutation(
        "models/tokenizer.py",
        "ids[: self.max_length - 2]",
        "ids[: self.max_length - 1]",
        "tests/models/test_tokenizer.py",
    ),
    # weights
    Mutation(
        "weights/single.py",
        'second["projection_dim"]) // 6',
        'second["projection_dim"]) // 5',
        "tests/weights tests/parity/test_single_file.py",
        "single or xl",
    ),
    Mutation("weights/files.py", "if count >= 2**60:", "if count >= 2**70:", "tests/weights/test_files.py"),
    Mutation(
        "weights/low_rank.py",
        "(outputs, *inputs) != shape or",
        "(outputs, *inputs) == shape and",
        "tests/weights/test_lora.py",
    ),
    Mutation(
        "weights/model_files.py",
        "or have == (*want, 1, 1)",
        "",
        "tests/weights tests/parity/test_single_file.py",
        "conv or linear or projection or shape",
    ),
    # records, images, bulk
    Mutation("records/infotext.py", "if len(name) < 2:", "if len(name) < 3:", "tests/records/test_infotext.py"),
    Mutation(
        "records/other_programs.py", "max(-layer - 1, 0)", "max(-layer, 0)", "tests/records/test_other_programs.py"
    ),
    Mutation("images/init_image.py", "<= 1.0 else 255.0", "<= 1.0 else 256.0", "tests/images/test_init_image.py"),
    Mutation(
        "images/init_image.py",
        "if min(inner) < 8:",
        "if min(inner) < 9:",
        "tests/images/test_init_image.py tests/run/test_initial.py",
        "outpaint",
    ),
    Mutation("atomic.py", "if not overwrite:", "if overwrite:", "tests/images/test_io.py"),
    Mutation("bulk/local.py", "if len(unit) > 1:", "if len(unit) > 2:", "tests/bulk", "not killed"),
    # explain, report, grid, again, cli
    Mutation("explain/maps.py", "self.step += 1", "self.step += 2", "tests/explain"),
    Mutation(
        "explain/page.py",
        "0.25 + 0.5 * np.sqrt(level)",
        "0.25 + 0.4 * np.sqrt(level)",
        "tests/explain",
        "page or colour or sheet",
    ),
    Mutation(
        "report/statistics.py",
        "max(np.mean(energies), 0.0)), math.sqrt(2 *",
        "max(np.mean(energies), 0.0)), math.sqrt(4 *",
        "tests/report",
        "statist or shift or distance or noise or energ",
    ),
    Mutation(
        "report/page.py", "gap * (k - (n - 1) / 2)", "gap * (k - n / 2)", "tests/report", "page or place or spread"
    ),
    Mutation("grid.py", "count=1, seed=request.seed or 0", "count=1, seed=request.seed or 1", "tests/test_grid.py"),
    Mutation("again.py", "if key not in kept:", "if key in kept:", "tests/test_again.py"),
    Mutation("cli/terminal.py", "presses += 1", "presses += 2", "tests/cli", "ctrl"),
    Mutation(
        "cli/words.py", "== step - 1:", "== step:", "tests/cli tests/prompt", "word or token or explain or prompt"
    ),
    # train
    Mutation(
        "train/keyed_rng.py",
        "(integer(*key) >> 10) / 2**53",
        "(integer(*key) >> 10) / 2**54",
        "tests/train/test_batches.py",
    ),
    Mutation(
        "train/finetune.py",
        "return (step + 1) / recipe.warmup",
        "return step / recipe.warmup",
        "tests/train/test_finetune.py",
    ),
    Mutation(
        "train/buckets.py",
        "2 * resolution // step * step",
        "3 * resolution // step * step",
        "tests/train/test_buckets.py",
    ),
    Mutation(
        "train/trainable.py",
        "noise) / (sigma.square() + ",
        "noise) / (2 * sigma.square() + ",
        "tests/train/test_finetune.py",
    ),
    Mutation(
        "train/loop.py",
        'json.loads(line)["step"] <= step',
        'json.loads(line)["step"] < step',
        "tests/train/scratch/test_loop.py tests/train/test_finetune.py",
    ),
    Mutation(
        "train/scratch/vae.py",
        "posterior.logvar.exp() - 1.0",
        "posterior.logvar.exp() - 2.0",
        "tests/train/scratch/test_losses.py",
    ),
    Mutation("train/scratch/optim.py", 'group["lr"] * 0.2', 'group["lr"] * 0.3', "tests/train/scratch/test_loop.py"),
    Mutation(
        "train/latents.py",
        "scale = max(size[0]",
        "scale = min(size[0]",
        "tests/train/test_data.py tests/train/test_batches.py tests/train/test_buckets.py",
    ),
]


def copy_source(place: Path) -> None:
    """Copy src/ to `place`; only what Python runs is copied, the rest is linked."""

    def copy(source: str, target: str) -> None:
        (shutil.copy2 if source.endswith(".py") else os.symlink)(source, target)

    shutil.copytree(ROOT / "src", place, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))


def run_tests(source: Path, arguments: Sequence[str], log: Path) -> None:
    """Run pytest on the mutated copy, in this process; exit with its status."""
    stream = log.open("w")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)  # for what the tests start
    import pytest

    import mezzotint

    assert Path(mezzotint.__file__).is_relative_to(source), mezzotint.__file__
    status = pytest.main(
        ["-x", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments]
    )
    stream.flush()
    os._exit(int(status))


def outcome_of(mutation: Mutation) -> str:
    """Apply the mutation to a copy of the source and run its tests."""
    text = ROOT / "src" / "mezzotint" / mutation.file
    if not text.exists():
        return "NOT APPLIED: the file is gone"
    source = text.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        return f"NOT APPLIED: the text occurs {source.count(mutation.old)} times"
    with tempfile.TemporaryDirectory() as place:
        copy_source(Path(place) / "src")
        mutated = Path(place) / "src" / "mezzotint" / mutation.file
        mutated.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        arguments = [*mutation.tests.split(), *(["-k", mutation.keyword] if mutation.keyword else [])]
        log = Path(place) / "log"
        process = get_context("fork").Process(target=run_tests, args=(Path(place) / "src", arguments, log))
        process.start()
        process.join()
        if process.exitcode == 0:
            return "SURVIVED"
        failed = re.search(r"^FAILED (\S+)", log.read_text(errors="replace"), re.MULTILINE)
        broken = re.search(r"^ERROR (\S+)", log.read_text(errors="replace"), re.MULTILINE)
        if failed or broken:
            return f"killed by {(failed or broken)[1]}"  # type: ignore[index]
        return f"NOT APPLIED: pytest ended with {process.exitcode} before a test failed; do its tests exist?"


def main() -> int:
    """Run the mutations that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a part of a mutation's name")
    parser.add_argument("--list", action="store_true", help="print the names and whether the texts still occur")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.only or any(part in m.name for part in options.only)]
    if options.list:
        for mutation in chosen:
            file = ROOT / "src" / "mezzotint" / mutation.file
            count = file.read_text(encoding="utf-8").count(mutation.old) if file.exists() else 0
            print("applies" if count == 1 else f"occurs {count} times", "|", mutation.name)
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    for name in ("torch", "numpy", "PIL.Image", "pydantic", "diffusers", "transformers"):  # once, not in each fork
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    totals: Counter[str] = Counter()
    print("| mutation | becomes | outcome | seconds |\n|---|---|---|---|", flush=True)
    for mutation in chosen:
        begin = time.monotonic()
        outcome = outcome_of(mutation)
        totals[re.split(r"[: ]", outcome)[0]] += 1
        seconds = time.monotonic() - begin
        print(f"| {mutation.name} | {mutation.new.strip()[:50]} | {outcome} | {seconds:.0f} |", flush=True)
    applied = totals["killed"] + totals["SURVIVED"]
    print(f"\n{len(chosen)} mutations: {applied} applied, {totals['killed']} killed, {totals['SURVIVED']} survived, "
          f"{totals['NOT']} not applied")  # fmt: skip
    return len(chosen) - totals["killed"]


if __name__ == "__main__":
    sys.exit(main())
