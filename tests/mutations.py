"""Mutation testing, by hand: break one line of the source at a time, and see whether the nearest tests notice.

    python tests/mutations.py [--only NAME]... [--list]

Each mutation is applied to a temporary copy of src/, never to the tree, and the tests nearest to it are run on that
copy until the first one fails. The table says of each whether it was killed, by a test that passes on the source as it
is, or survived. Errors in collection and in fixtures kill nothing. A mutation whose text does not occur exactly once
was not applied: correct its text here. The exit status is the number of mutations that were not killed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
LIBRARIES = ("torch", "numpy", "PIL.Image", "pydantic", "diffusers", "transformers", "hypothesis", "pytest",
             "xdist.plugin", "safetensors.torch", "torchsde", "typer.testing")  # fmt: skip


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


MUTATIONS = [
    # diffusion
    Mutation(
        "diffusion/guidance.py",
        "sigma * (1.0 - 1e-6) for level",
        "sigma for level",
        "tests/diffusion/test_guidance.py",
        "a_level_is_met",
    ),
    Mutation(
        "diffusion/guidance.py",
        "sigma * (1.0 - 1e-6) for level",
        "sigma * (1.0 - 1e-4) for level",
        "tests/diffusion/test_guidance.py",
        "a_level_is_met",
    ),
    Mutation(
        "diffusion/guidance.py",
        "low < sigma <= high and",
        "low <= sigma <= high and",
        "tests/diffusion/test_guidance.py",
        "interval_is_open",
    ),
    Mutation(
        "diffusion/guidance.py",
        "self.rescale * ratio + (1.0 - self.rescale)",
        "self.rescale * ratio",
        "tests/diffusion/test_guidance.py",
        "rescale_is_that or rescale_works",
    ),
    Mutation(
        "diffusion/guidance.py",
        "update - (1.0 - eta) *",
        "update - eta *",
        "tests/diffusion/test_guidance.py",
        "apg_is_the_papers or apg_is_diffusers",
    ),
    Mutation(
        "diffusion/multistep.py",
        "eta = tau(sigma) ** 2",
        "eta = tau(sigma)",
        "tests/diffusion/test_multistep.py",
        "sa_solver_is_that",
    ),
    Mutation(
        "diffusion/noise.py",
        "unit + unit / 2",
        "unit",
        "tests/diffusion/test_noise.py",
        "philox or normals or box_muller",
    ),
    Mutation("diffusion/noise.py", "i * weyl) % 2**32", "weyl) % 2**32", "tests/diffusion/test_noise.py", "philox"),
    Mutation(
        "diffusion/prediction.py",
        "return sigma_data**2 / (",
        "return sigma_data / (",
        "tests/diffusion/test_prediction.py",
        "edm or v_prediction",
    ),
    Mutation(
        "diffusion/schedule.py",
        "0.008) / 1.008",
        "0.008) / 1.0",
        "tests/diffusion/test_schedule.py",
        "alphas_are_those",
    ),
    Mutation(
        "diffusion/solving.py",
        "abs(z) < 1.0:",
        "abs(z) < 0.0:",
        "tests/diffusion/test_multistep.py",
        "phi",
    ),
    Mutation(
        "diffusion/solving.py",
        "math.sqrt(sigma_next**2 - sigma_up**2), sigma_up",
        "sigma_next, sigma_up",
        "tests/diffusion/test_singlestep.py",
        "cfg_pp_as_the_paper or restart_as or quantiles",
    ),
    Mutation(
        "diffusion/spacing.py",
        "* (length // original) - 1",
        "* (length // original)",
        "tests/diffusion/test_spacing.py",
        "beyond or timesteps_of_each",
    ),
    Mutation(
        "diffusion/spacing.py",
        "_beta_quantiles(count + 1, alpha, beta)[:-1]",
        "_beta_quantiles(count, alpha, beta)",
        "tests/diffusion/test_spacing.py",
        "beta",
    ),
    Mutation("diffusion/variation.py", "sine < 1e-4", "sine < 1e-1", "tests/run/test_initial.py", "slerp or variation"),
    Mutation(
        "diffusion/variation.py",
        "(size - other_size) // 2",
        "(size - other_size)",
        "tests/run/test_initial.py",
        "middle or seed_size",
    ),
    Mutation(
        "diffusion/singlestep.py",
        "math.log(sigma / last) > 1e-5",
        "math.log(sigma / last) > 1e-1",
        "tests/diffusion/test_singlestep.py",
        "dpm_adaptive",
    ),
    # denoiser
    Mutation(
        "denoiser.py", "sigma * sigma + self.prediction.sigma_data**2", "sigma * sigma + 1.1", "tests/test_denoiser.py"
    ),
    Mutation("denoiser.py", "math.log(sigma) / 4", "math.log(sigma) / 2", "tests/test_denoiser.py"),
    # samplers
    Mutation(
        "samplers/presets.py",
        '{"order": 3, "solver_type": "bh1"}, "n+1", last=0.001',
        '{"order": 3, "solver_type": "bh1"}, "n+1", last=0.01',
        "tests/samplers/test_names.py",
        "penultimate",
    ),
    Mutation(
        "samplers/presets.py",
        '"dpm_2_ancestral": Preset("dpm2_a", "normal", points="n+1")',
        '"dpm_2_ancestral": Preset("dpm2_a", "normal", points="n")',
        "tests/samplers/test_names.py",
        "penultimate",
    ),
    Mutation(
        "samplers/presets.py",
        '"DPM++ 2M SDE": Preset("dpmpp_2m_sde", "Exponential"',
        '"DPM++ 2M SDE": Preset("dpmpp_2m_sde", "Karras"',
        "tests/samplers/test_names.py",
        "a1111",
    ),
    # prompt
    Mutation("prompt/comfy.py", "weight * 1.1", "weight * 1.2", "tests/prompt/test_prompt.py", "weights"),
    Mutation("prompt/compel.py", "if weight < 0:", "if weight < 1:", "tests/prompt/test_prompt.py", "weights"),
    Mutation(
        "prompt/a1111.py",
        "yield text.slice(*match.span()), -1.0",
        "yield text.slice(*match.span()), 1.0",
        "tests/prompt/test_prompt.py",
        "weights or any_text or convert",
    ),
    Mutation("prompt/choices.py", "match.end()) + 2", "match.end()) + 1", "tests/prompt/test_prompt.py", "choices"),
    Mutation(
        "prompt/linting.py",
        "if match[0] not in kinds:",
        "if match[0][-1] not in kinds:",
        "tests/prompt/test_prompt.py",
    ),
    # conditioning
    Mutation(
        "conditioning/chunks.py",
        "chunk[: last_comma + 1]",
        "chunk[: last_comma]",
        "tests/conditioning/test_encode.py",
        "chunk or a1111_breaks",
    ),
    Mutation(
        "conditioning/encode.py",
        "attention_mask[window - 1 :: window] = True",
        "attention_mask[window :: window] = True",
        "tests/conditioning/test_encode.py",
        "hidden_span",
    ),
    # run
    Mutation(
        "run/resolve.py",
        "STRENGTH, STRENGTH_XL, STRENGTH_MASKED = 0.8, 0.3, 1.0",
        "STRENGTH, STRENGTH_XL, STRENGTH_MASKED = 0.8, 0.4, 1.0",
        "tests/run/test_initial.py",
        "strengths",
    ),
    Mutation("run/resolve.py", "GPU_BATCH = 4", "GPU_BATCH = 5", "tests/test_pipeline.py", "default_batch"),
    Mutation(
        "run/resolve.py", "STRENGTH_HIRES = 0.7", "STRENGTH_HIRES = 0.75", "tests/run/test_initial.py", "strengths"
    ),
    Mutation(
        "run/resolve.py",
        "GUIDANCE_CFG_PP = 0.6",
        "GUIDANCE_CFG_PP = 0.7",
        "tests/run/test_plan.py",
        "cfg_pp",
    ),
    Mutation(
        "run/resolve.py",
        "15.0 * math.sqrt(width * height) / 1024",
        "15.0",
        "tests/diffusion/test_guidance.py",
        "norm_threshold",
    ),
    Mutation(
        "images/init_image.py",
        "HALF = 128 ",
        "HALF = 129 ",
        "tests/run/test_initial.py",
        "grey",
    ),
    Mutation(
        "run/initial.py",
        "channels == 2 * latent + 1",
        "channels == 2 * latent + 2",
        "tests/parity/test_img2img.py",
        "nine and euler",
    ),
    Mutation(
        "run/levels.py", "min(strength, 0.999)", "min(strength, 0.9)", "tests/run/test_initial.py", "counts_the_steps"
    ),
    Mutation("run/levels.py", "strength == 0.0", "strength == 2.0", "tests/run/test_initial.py", "strength_0"),
    Mutation("run/levels.py", "if left < 1:", "if left < 2:", "tests/run/test_initial.py", "counts_the_steps"),
    Mutation("run/plan.py", "(level**2 + 1.0)", "(level**2 + 2.0)", "tests/samplers/test_a1111.py", "from_a_picture"),
    Mutation(
        "samplers/presets.py",
        '"noised_at": "before"',
        '"noised_at": "first"',
        "tests/samplers/test_a1111.py",
        "picture",
    ),
    Mutation("run/levels.py", "- (not respaced)", "- 1", "tests/samplers/test_a1111.py", "UniPC"),
    Mutation(
        "diffusion/spacing.py",
        "schedule.sigma(float(t), interpolate)",
        'schedule.sigma(float(t), "log_sigma")',
        "tests/samplers/test_a1111.py",
        "UniPC",
    ),
    Mutation("diffusion/multistep.py", "-other * share", "-other * ratio", "tests/samplers/test_comfyui.py", "ipndm"),
    Mutation("diffusion/singlestep.py", "x + first -", "x + denoised -", "tests/samplers/test_comfyui.py", "2s"),
    Mutation("samplers/presets.py", '{"euler_to_zero": True}', "{}", "tests/samplers/test_comfyui.py", "lms"),
    Mutation("samplers/presets.py", '{"round_last": True}', "{}", "tests/samplers/test_a1111.py", "turbo"),
    Mutation("samplers/presets.py", 'timestep="lcm"', 'timestep="nearest"', "tests/samplers/test_a1111.py", "lcm"),
    Mutation(
        "run/levels.py", "left += max(steps -", "left += max(0 * steps -", "tests/samplers/test_a1111.py", "cut_from"
    ),
    Mutation(
        "run/loras.py",
        "<= MAX_LORA_SCALE",
        "< MAX_LORA_SCALE",
        "tests/weights/test_lora.py",
        "invalid_loras or what_is_wrong or named_in or words_of",
    ),
    Mutation(
        "run/plan.py", "len(self.all_sigmas) - 1", "len(self.all_sigmas)", "tests/parity/test_img2img.py", "dpmpp_2s"
    ),
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
        "run/runner.py",
        "index=last.index + 1 + step.index",
        "index=last.index + step.index",
        "tests/run/test_initial.py",
        "batch_changes_nothing and hires",
    ),
    # placement
    Mutation("placement.py", '(2**10, "KiB")', '(2**11, "KiB")', "tests/memory/test_planner.py", "binary_units"),
    # request
    Mutation("request.py", "len(value) > 60", "len(value) > 6", "tests/test_request.py", "sentence"),
    # rows
    Mutation("rows.py", 'encoding="utf-8-sig"', 'encoding="utf-8"', "tests/test_rows.py", "csv"),
    # memory
    Mutation(
        "memory/system.py",
        "_cgroups()) if number is not None",
        "_cgroups()) if number",
        "tests/memory/test_system.py",
        "cgroup or free_is",
    ),
    Mutation(
        "memory/planner.py",
        'weights == "stream" and storage and',
        'weights == "offload" and storage and',
        "tests/memory/test_planner.py",
        "streams_no or less_memory or exact_before",
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
        "tests/explain/test_explain.py tests/models/test_attention.py",
        "maps_are_what or docstring or recorder",
    ),
    Mutation(
        "models/backends.py",
        "min(heads, size // (queries * row))",
        "max(heads, size // (queries * row))",
        "tests/models/test_attention.py",
        "slices_of_any or a_slice_fits",
    ),
    Mutation(
        "models/vae.py",
        "logvar.clamp(-30.0, 20.0)",
        "logvar.clamp(-3.0, 20.0)",
        "tests/models/test_vae.py",
        "log_variance",
    ),
    Mutation(
        "models/unet.py",
        "sample = 2 * sample - 1",
        "sample = 2 * sample",
        "tests/parity/test_unet.py tests/models/test_unet.py",
        "output_is_diffusers or every_field",
    ),
    Mutation(
        "models/blocks.py",
        "in PLAIN_TYPES and not has_hooks(layer) and",
        "in PLAIN_TYPES and",
        "tests/run/test_edits.py",
        "projection",
    ),
    Mutation(
        "models/blocks.py",
        "_is_plain(layer) and layer.bias is None for",
        "_is_plain(layer) for",
        "tests/run/test_edits.py",
        "another_kind",
    ),
    Mutation("models/unet.py", "or has_hooks(layer):", "or False:", "tests/run/test_edits.py", "course_of_a_run"),
    Mutation(
        "denoiser.py",
        "if state != self._weights:",
        "if self._weights is None:",
        "tests/run/test_edits.py",
        "from_then_on",
    ),
    Mutation("models/vae.py", "if has_hooks(block) or", "if", "tests/run/test_edits.py", "blocks_of_the_vae"),
    Mutation("models/vae_modes.py", 'vae_mode != "whole" and', "False and", "tests/run/test_edits.py", "in_pieces"),
    Mutation("run/few_step.py", "if is_customized(self.unet):", "if False:", "tests/test_few_step.py", "with_a_hook"),
    Mutation("run/few_step.py", "or not made[0].matches(self.unet)", "", "tests/test_few_step.py", "follows_edited"),
    Mutation(
        "run/prompts.py",
        "encode() if any(map(is_customized, self.text_encoders)) else",
        "",
        "tests/run/test_edits.py",
        "text",
    ),
    Mutation(
        "run/prompts.py",
        "if not self._weights.matches(",
        "if False and self._weights.matches(",
        "tests/run/test_edits.py",
        "every_network",
    ),
    Mutation("run/model.py", '"edited": self.edited(),', "", "tests/run/test_edits.py", "another_unet"),
    Mutation(
        "run/model.py",
        "if self.dtype not in (dtype, torch.float32):",
        "if False:",
        "tests/test_save_and_move.py",
        "to_casts",
    ),
    Mutation("models/blocks.py", "eps=1e-6)", "eps=1e-3)", "tests/parity/test_unet.py", "output_is_diffusers"),
    Mutation(
        "models/tiles.py",
        "max(-(-(length - overlap) // (tile - overlap)), 1)",
        "max((length - overlap) // (tile - overlap), 1)",
        "tests/models/test_strips.py",
        "tile",
    ),
    Mutation(
        "models/strips.py",
        "min(first + step, height) - 1",
        "min(first + step, height)",
        "tests/models/test_strips.py",
        "strips_give or exact_in_float64",
    ),
    Mutation(
        "models/tokenizer.py",
        "ids[: self.max_length - 2]",
        "ids[: self.max_length - 1]",
        "tests/models/test_tokenizer.py",
        "window or long_text",
    ),
    # weights
    Mutation(
        "weights/single.py",
        'second["projection_dim"]) // numbers',
        'second["projection_dim"]) // (numbers + 1)',
        "tests/parity/test_single_file.py",
        "published or same_weights",
    ),
    Mutation(
        "weights/entries.py",
        "MAX_COUNT = 2**60",
        "MAX_COUNT = 2**70",
        "tests/weights/test_files.py",
        "beyond_all_memory",
    ),
    Mutation(
        "models/adapters.py",
        "ranks = (i, j) == (first, second) and len(kernel) == 2",
        "ranks = (i, j) == (first, second)",
        "tests/models/test_adapters.py",
        "the_shape_of",
    ),
    Mutation(
        "models/adapters.py",
        "torch.kron(first, second.contiguous())",
        "torch.kron(first, second)",
        "tests/models/test_adapters.py",
        "the_shape_of_a_kronecker",
    ),
    Mutation(
        "models/relative_adapters.py",
        "composed_shape(None, self.a1, self.a2) == (shape[1], shape[1])",
        "composed_shape(None, self.a1, self.a2)[0] == shape[1]",
        "tests/models/test_adapters.py",
        "generalized_change_fits",
    ),
    Mutation(
        "run/runner.py",
        "latents[:, 0].numel() >= TRIM_FROM",
        "latents[0, 0].numel() >= TRIM_FROM",
        "tests/run/test_execute.py",
        "freed_pages",
    ),
    Mutation(
        "models/adapters.py",
        "change in (weight, flat, (*weight, 1, 1))",
        "change in (weight, (*weight, 1, 1))",
        "tests/weights/test_lycoris.py",
        "lycoris_own",
    ),
    Mutation(
        "models/adapters.py",
        "ranks, kernel = rank == inner, []",
        "ranks, kernel = True, []",
        "tests/models/test_adapters.py",
        "fits_where",
    ),
    Mutation(
        "weights/model_files.py",
        "or have == (*want, 1, 1)",
        "",
        "tests/weights/test_checkpoint.py tests/parity/test_single_file.py",
        "old_and_new or same_weights",
    ),
    # records
    Mutation("records/infotext.py", "if len(name) < 2:", "if len(name) < 3:", "tests/records/test_infotext.py"),
    Mutation(
        "records/other_programs.py",
        "max(-layer - 1, 0)",
        "max(-layer, 0)",
        "tests/records/test_other_programs.py",
        "loras_layers",
    ),
    # images
    Mutation(
        "images/init_image.py",
        "<= 1.0 else 255.0",
        "<= 1.0 else 256.0",
        "tests/images/test_init_image.py",
        "numbers_of_other or grey",
    ),
    Mutation(
        "images/init_image.py",
        "if min(inner) < 8:",
        "if min(inner) < 9:",
        "tests/images/test_init_image.py",
        "outpainting",
    ),
    Mutation(
        "files.py",
        "if not overwrite:",
        "if overwrite:",
        "tests/images/test_io.py",
        "file_in_the_way or appears_whole",
    ),
    # bulk
    Mutation(
        "bulk/local.py",
        "if len(unit) == 1:",
        "if len(unit) <= 2:",
        "tests/bulk/test_local.py",
        "row_that_fails or failure_that",
    ),
    # explain
    Mutation(
        "explain/maps.py",
        "self.step += 1",
        "self.step += 2",
        "tests/explain/test_explain.py",
        "maps_are_what or several_calls",
    ),
    Mutation(
        "explain/page.py",
        "0.25 + 0.5 * np.sqrt(level)",
        "0.25 + 0.4 * np.sqrt(level)",
        "tests/explain/test_explain.py",
        "heat_lies or page_holds",
    ),
    # report
    Mutation(
        "report/statistics.py",
        "max(np.mean(energies), 0.0)), math.sqrt(2 *",
        "max(np.mean(energies), 0.0)), math.sqrt(4 *",
        "tests/report/test_report.py",
        "moved_by or chance_is_told",
    ),
    Mutation(
        "report/page.py",
        "gap * (k - (n - 1) / 2)",
        "gap * (k - n / 2)",
        "tests/report/test_report.py",
        "names_next_to or report_is_whole",
    ),
    # grid
    Mutation(
        "grid.py",
        "count=1, seed=request.seed or 0",
        "count=1, seed=request.seed or 1",
        "tests/test_grid.py",
        "grows",
    ),
    # again
    Mutation(
        "again.py",
        "if key not in cache:",
        "if key in cache:",
        "tests/test_again.py",
        "changed or identical or difference",
    ),
    # cli
    Mutation("cli/terminal.py", "presses > 1", "presses > 2", "tests/cli/test_cli.py", "ctrl_c"),
    Mutation("run/tokens.py", "== step - 1:", "== step:", "tests/cli/test_cli.py", "tokens"),
    # train
    Mutation(
        "train/keyed_rng.py",
        "(integer(*key) >> 10) / 2**53",
        "(integer(*key) >> 10) / 2**54",
        "tests/train/test_buckets.py tests/train/test_batches.py",
        "numbers or chance",
    ),
    Mutation(
        "train/finetune.py",
        "return (step + 1) / recipe.warmup",
        "return step / recipe.warmup",
        "tests/train/test_finetune.py",
        "the_rate",
    ),
    Mutation(
        "train/buckets.py",
        "2 * resolution // step * step",
        "3 * resolution // step * step",
        "tests/train/test_buckets.py",
        "sizes",
    ),
    Mutation(
        "train/trainable.py",
        "noise) / (sigma.square() + ",
        "noise) / (2 * sigma.square() + ",
        "tests/train/test_finetune.py",
        "loss_by_hand",
    ),
    Mutation(
        "train/loop.py",
        'json.loads(line)["step"] <= step',
        'json.loads(line)["step"] < step',
        "tests/train/scratch/test_stage.py tests/train/test_finetune.py",
        "does_not_repeat or resumes or goes_on",
    ),
    Mutation(
        "train/scratch/vae.py",
        "posterior.logvar.exp() - 1.0",
        "posterior.logvar.exp() - 2.0",
        "tests/train/scratch/test_losses.py",
        "vae_loss_by_hand or kl_of",
    ),
    Mutation(
        "train/scratch/optim.py", 'group["lr"] * 0.2', 'group["lr"] * 0.3', "tests/train/scratch/test_stage.py", "muon"
    ),
    Mutation("train/latents.py", "scale = max(size[0]", "scale = min(size[0]", "tests/train/test_batches.py", "view"),
    Mutation(
        "cli/fields.py",
        "while len(scales) < 2 and",
        "while len(scales) < 1 and",
        "tests/weights/test_lora.py",
        "command_line",
    ),
    Mutation(
        "cli/fields.py", "if len(data) > limit:", "if len(data) > limit + 1:", "tests/cli/test_cli.py", "standard_input"
    ),
    Mutation("memory/system.py", "[cpus, *_cpu_quotas(root, own)]", "[cpus]", "tests/memory/test_system.py", "quota"),
    Mutation(
        "memory/system.py",
        "int(quota) // int(period)",
        "-(-int(quota) // int(period))",
        "tests/memory/test_system.py",
        "quota",
    ),
    Mutation(
        "memory/system.py",
        "return min(torch_threads, usable_cpus())",
        "return usable_cpus()",
        "tests/bulk/test_local.py",
        "torch_would_take",
    ),
    Mutation(
        "cli/terminal.py",
        "        limit_threads()\n        pipe",
        "        pipe",
        "tests/cli/test_cli.py",
        "no_more_threads",
    ),
    Mutation(
        "samplers/names.py",
        "(str, str.casefold, self._letters)",
        "(str, self._letters)",
        "tests/samplers/test_names.py",
        "separators",
    ),
    Mutation(
        "samplers/names.py",
        'r"[\\s_-]+", "", text',
        'r"[\\s_]+", "", text',
        "tests/samplers/test_names.py",
        "separators",
    ),
    Mutation(
        "cli/naming.py",
        "if not folder.resolve().is_relative_to(base.resolve()):",
        "if not folder.is_relative_to(base):",
        "tests/cli/test_naming.py",
        "link",
    ),
    Mutation("cli/naming.py", 'r"^[.\\-]+"', 'r"^[.]+"', "tests/cli/test_naming.py", "is_an_option"),
    Mutation("cli/naming.py", "MAX_NAME - len(end)", "MAX_NAME", "tests/cli/test_naming.py", "long_name"),
    Mutation("cli/naming.py", "or ord(c) in CONTROLS", "", "tests/cli/test_naming.py", "breaks_a_name"),
    Mutation(
        "cli/commands.py",
        'lambda argument: argument != "--"',
        "lambda argument: True",
        "tests/cli/test_options.py",
        "prompt_that_is_json",
    ),
    Mutation(
        "run/preview.py",
        "F.pad(rows, (0, 1), value=1.0)",
        "F.pad(rows, (0, 1), value=0.0)",
        "tests/run/test_preview.py",
        "linear",
    ),
    Mutation("cli/again.py", "if len(files) > 1 and", "if len(files) > 2 and", "tests/test_again.py", "wrong_options"),
    Mutation(
        "cli/explain.py",
        "0.5 / n, 1 - 0.5 / n, n)",
        "0, 1, n)",
        "tests/explain/test_explain.py",
        "centre",
    ),
    Mutation(
        "cli/measure.py",
        'show(record["recommendation"], record["claim"]',
        'show(record["claim"], record["claim"]',
        "tests/report/test_report.py",
        "the_command",
    ),
    Mutation(
        "cli/defaults.py",
        'found[key] = Default(value, f"MEZZOTINT_{key.upper()}")',
        "pass",
        "tests/cli/test_defaults.py",
        "variable",
    ),
    Mutation("cli/defaults.py", "if key not in KEYS:", "if False:", "tests/cli/test_defaults.py", "wrong_files"),
    Mutation("cli/defaults.py", 'and not names_several(found["out"].value)', "and False", "tests/cli/test_defaults.py"),
    Mutation("cli/shell.py", "self._pipe = self._load(name or None)", "self._pipe = None", "tests/cli/test_shell.py"),
    Mutation(
        "cli/shell.py", "except StoppedError as stop:", "except ZeroDivisionError as stop:", "tests/cli/test_shell.py"
    ),
    Mutation(
        "cli/shell.py",
        "(path)\n            path.chmod(0o600)",
        "(path)\n            path.chmod(0o644)",
        "tests/cli/test_shell.py",
    ),
    Mutation("cli/inline.py", "<< bit for bit", "<< (5 - bit) for bit", "tests/cli/test_shell.py", "sixel"),
    Mutation(
        "cli/terminal.py",
        "if not lines or not log.isEnabledFor(level):",
        "if not lines:",
        "tests/cli/test_log.py",
        "quiet",
    ),
    # kernels and training
    Mutation(
        "kernels/__init__.py",
        "or torch._C._are_functorch_transforms_active()",
        "",
        "tests/models/test_convolution.py",
        "transforms",
    ),
    Mutation(
        "kernels/__init__.py",
        "unpack_dual(tensor).tangent is not None",
        "False",
        "tests/models/test_convolution.py",
        "transforms",
    ),
    Mutation(
        "kernels/__init__.py",
        "(bias is None or not bias.requires_grad)",
        "True",
        "tests/models/test_convolution.py",
        "has_its_gradient",
    ),
    Mutation(
        "kernels/convolution.py",
        "2 - width if transposed else width) for",
        "width) for",
        "tests/kernels/test_convolution.py",
        "gradient_by_the_input",
    ),
    Mutation(
        "kernels/convolution.py",
        "and can_take(x, weight, bias)",
        "and can_take(x, weight)",
        "tests/kernels/test_convolution.py",
        "does_not_take",
    ),
    Mutation(
        "models/convolution.py",
        "ctx.save_for_backward(weight)",
        "ctx.save_for_backward(weight, x)",
        "tests/models/test_convolution.py",
        "kept",
    ),
    Mutation(
        "models/convolution.py",
        "return torch.get_autocast_dtype(device)",
        "return x.dtype",
        "tests/models/test_convolution.py",
        "kept or autocast",
    ),
    Mutation(
        "models/blocks.py",
        "if has_hooks(norm) or is_adapted(norm):",
        "if is_adapted(norm):",
        "tests/models/test_recompute.py",
        "hook",
    ),
    Mutation(
        "models/blocks.py",
        "if has_hooks(norm) or is_adapted(norm):",
        "if has_hooks(norm):",
        "tests/models/test_adapters.py",
        "under_checkpointing",
    ),
    Mutation(
        "models/blocks.py",
        "y: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)",
        "y: Tensor = function(*inputs)",
        "tests/models/test_recompute.py",
    ),
    Mutation(
        "models/edits.py",
        "and all(map(torch.equal, self._samples, self._sample(items)))",
        "",
        "tests/test_few_step.py",
        "follows_edited",
    ),
    Mutation(
        "models/edits.py",
        "61 * size // (64 * SAMPLE) | 1",
        "max(size, 1)",
        "tests/run/test_edits.py",
        "through_data",
    ),
]


def copy_source(place: Path) -> None:
    """Copy src/ to `place`; sources with their times, so that what is compiled still holds; the rest is linked."""

    def copy(source: str, target: str) -> None:
        (shutil.copy2 if source.endswith(".py") else os.symlink)(source, target)

    shutil.copytree(ROOT / "src", place, copy_function=copy, ignore=shutil.ignore_patterns("*.egg-info"))


def run_tests(source: Path, arguments: Sequence[str], log: Path) -> None:
    """Run pytest on the copy, in this process; exit with its status."""
    stream = log.open("w")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)  # for what the tests start
    import pytest

    import mezzotint

    assert Path(mezzotint.__file__).is_relative_to(source), mezzotint.__file__
    options = ["-x", "-q", "-p", "no:randomly", "--no-header", "-n0", "--tb=no", "-p", "no:cacheprovider"]
    status = pytest.main([*options, "-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments])
    stream.flush()
    os._exit(int(status))


def run_on_copy(arguments: Sequence[str], mutation: Mutation | None = None) -> tuple[int | None, str]:
    """Run tests on a copy of the source, with the mutation if there is one; return the status and what was written."""
    with tempfile.TemporaryDirectory() as place:
        copy_source(Path(place) / "src")
        if mutation:
            file = Path(place) / "src" / "mezzotint" / mutation.file
            file.write_text(file.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        log = Path(place) / "log"
        process = get_context("fork").Process(target=run_tests, args=(Path(place) / "src", arguments, log))
        process.start()
        process.join()
        return process.exitcode, log.read_text(errors="replace")


@functools.cache
def passes(test: str) -> bool:
    """Return whether a test passes on the source as it is; only such a test can kill."""
    return run_on_copy([test])[0] == 0


def count_of(mutation: Mutation) -> int:
    """Return how often the mutation's text occurs in its file."""
    file = ROOT / "src" / "mezzotint" / mutation.file
    return file.read_text(encoding="utf-8").count(mutation.old) if file.exists() else 0


def outcome_of(mutation: Mutation) -> str:
    """Apply the mutation to a copy of the source and run its tests."""
    if (count := count_of(mutation)) != 1:
        return f"NOT APPLIED: the text occurs {count} times"
    status, log = run_on_copy(
        [*mutation.tests.split(), *(["-k", mutation.keyword] if mutation.keyword else [])], mutation
    )
    if status == 0:
        return "SURVIVED"
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", log, re.MULTILINE)
    if failed is None:  # a test that cannot be collected or set up has not judged anything
        broken = re.search(r"^ERROR (.+)", log, re.MULTILINE)
        return f"NO VERDICT: {broken[1] if broken else f'pytest ended with {status}; do its tests exist?'}"
    return f"killed by {failed[1]}" if passes(failed[1]) else f"CONTROL FAILS: {failed[1]}"


def main() -> int:
    """Run the mutations that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a part of a mutation's name")
    parser.add_argument("--list", action="store_true", help="print the names and whether the texts still occur")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.only or any(part in m.name for part in options.only)]
    if options.list:
        for mutation in chosen:
            count = count_of(mutation)
            print("applies" if count == 1 else f"occurs {count} times", "|", mutation.name)
        return sum(count_of(mutation) != 1 for mutation in chosen)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    for name in LIBRARIES:  # once, not in each fork
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    totals: Counter[str] = Counter()
    print("| mutation | becomes | outcome | seconds |\n|---|---|---|---|", flush=True)
    for mutation in chosen:
        begin = time.monotonic()
        outcome = outcome_of(mutation)
        totals[outcome.split()[0]] += 1
        seconds = time.monotonic() - begin
        print(f"| {mutation.name} | {mutation.new.strip()[:50]} | {outcome} | {seconds:.0f} |", flush=True)
    killed, survived, unclear = totals["killed"], totals["SURVIVED"], totals["NO"] + totals["CONTROL"]
    print(f"\n{len(chosen)} mutations: {killed + survived + unclear} applied, {killed} killed, {survived} survived, "
          f"{unclear} without a verdict, {totals['NOT']} not applied")  # fmt: skip
    return len(chosen) - killed


if __name__ == "__main__":
    sys.exit(main())
