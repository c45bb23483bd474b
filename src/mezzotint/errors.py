"""The exceptions of mezzotint, and what other programs call the arguments that an error answers with our names.

Each message is a sentence that says what is wrong, where, and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # they reorder what is shown
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}  # C0, DEL and C1
CONTROLS |= {code: f"\\u{code:04x}" for code in (*BIDI, 0x2028, 0x2029)}  # the last two are line ends


MAX_LINE = 4000  # characters; a path has at most 4096 bytes


def printable(text: str) -> str:
    r"""Return one line of text with its control characters as \xNN and its bidirectional ones as \uNNNN.

    What a file, its name or its metadata holds can then neither write to the terminal, nor pretend to be another line,
    nor fill the screen: of a line above 4,000 characters the middle is left out.
    """
    if len(text) > MAX_LINE:
        half = MAX_LINE // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"
    return text.translate(CONTROLS)


class MezzotintError(Exception):
    """The base class. The command line prints the message and exits with code 2, unless a subclass says otherwise."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RequestError(MezzotintError):
    """A field of a Request is wrong, or does not fit the model."""


class CheckpointError(MezzotintError):
    """A model file or folder is missing, damaged, of an unknown kind, or unsafe to read."""


class BudgetError(MezzotintError):
    """The work does not fit into the memory that it was given."""


class MissingExtraError(MezzotintError):
    """A feature needs a package that is not installed. The message names the extra that installs it."""


class WriteError(MezzotintError):
    """A finished picture cannot be written, for example because the disk is full. The exit code is 1."""


class TrainingError(MezzotintError):
    """Training cannot continue, for example because the loss is not a number. The exit code is 1."""


# ---- names of other programs -----------------------------------------------------------------------------------------

_STEP = "`pipe.generate(request, on_step=...)`, or iterate over `pipe.stream(request)`"
_PICTURES = "`pipe.generate(request)`, whose Result has images and latents"

# their name: ours, as it completes "use"
REQUEST_ALIASES = {
    **dict.fromkeys(("num_inference_steps", "inference_steps", "sampling_steps", "num_steps", "ddim_steps"), "steps"),
    **dict.fromkeys(("guidance", "cfg", "cfg_scale", "scale", "guidance_strength"), "guidance_scale"),
    **dict.fromkeys(("scheduler", "sampler_name", "sampler_index", "sample_method"), "sampler (and spacing)"),
    **dict.fromkeys(("schedule", "scheduler_type", "noise_schedule"), "spacing"),
    **dict.fromkeys(("generator", "random_seed", "manual_seed"), "seed, a whole number: picture k has seed + k"),
    **dict.fromkeys(("num_images_per_prompt", "num_images", "num_outputs", "n", "n_iter", "n_samples"), "count"),
    **dict.fromkeys(("batch_size",), "batch, how many of the count pictures are drawn at once"),
    **dict.fromkeys(("negative", "neg_prompt", "uncond"), "negative_prompt"),
    **dict.fromkeys(("init_image", "input_image", "init_images"), "image"),
    **dict.fromkeys(("mask_image", "mask_img"), "mask"),
    **dict.fromkeys(("denoising_strength", "denoise", "image_strength"), "strength"),
    **dict.fromkeys(("size", "resolution"), "width and height"),
    **dict.fromkeys(("lora", "lora_weights", "cross_attention_kwargs"), "loras, a list of (file, scale)"),
    **dict.fromkeys(("controlnet", "controlnets", "control_image"), 'control, a list of {"file": ..., "image": ...}'),
    **dict.fromkeys(("embedding", "textual_inversion"), "embeddings, a list of files"),
    **dict.fromkeys(("tiling",), 'seamless, "x", "y" or "xy"'),
    **dict.fromkeys(("enable_hr", "hr_scale"), "hires, the factor of the second pass"),
    **dict.fromkeys(("callback", "callback_on_step_end", "callback_steps", "progress_callback", "on_step"), _STEP),
    **dict.fromkeys(("output_type", "return_dict"), _PICTURES),
    **dict.fromkeys(("latents",), "`pipe.generate(request, latents)`"),
    **dict.fromkeys(("device", "torch_dtype", "dtype", "model"), "an argument of `mezzotint.load`"),
}
LOAD_ALIASES = {
    **{name: f"a Request's {ours}" for name, ours in REQUEST_ALIASES.items() if ours[0] not in "`a"},
    **dict.fromkeys(("torch_dtype", "weight_dtype", "precision"), "dtype"),
    **dict.fromkeys(("device_map",), "device, and memory or placement"),
    **dict.fromkeys(("max_memory", "low_vram", "lowvram"), 'memory, such as "4GiB"'),
    **dict.fromkeys(("model", "pretrained_model_name_or_path", "model_id", "ckpt"), "the first argument"),
    **dict.fromkeys(("scheduler", "sampler"), "sampler of a Request"),
    **dict.fromkeys(("prediction_type",), "prediction"),
    **dict.fromkeys(("original_config", "config_file", "original_config_file"), "config, fields by part"),
    **dict.fromkeys(("loras", "lora"), "loras of a Request, or `pipe.merge`"),
    **dict.fromkeys(("requires_safety_checker",), "safety_checker"),
    **dict.fromkeys(
        ("use_safetensors", "low_cpu_mem_usage", "local_files_only", "cache_dir", "token"),
        "the hub's environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN); safetensors are preferred anyway",
    ),
}


def suggest(name: str, aliases: Mapping[str, str], names: Collection[str]) -> str:
    """Return what to write instead of an unknown name.

    Args:
        name: The name that was given.
        aliases: Names of other programs, with ours.
        names: Our names.
    """
    if name.lower() in aliases:
        return f"use {aliases[name.lower()]}"
    near = difflib.get_close_matches(name[:100], names, n=1)
    return f"the nearest is {near[0]}" if near else f"it has {', '.join(names)}"
