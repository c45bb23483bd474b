"""`mezzotint generate`: draw pictures from a prompt, and write them to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.fields import fields_of, read_prompt
from mezzotint.cli.naming import FIELDS, SUFFIXES, check_out, names_several, save_one
from mezzotint.cli.options import (
    FROM_PICTURE,
    GUIDANCE,
    HIRES,
    MODEL,
    OUTPUT,
    PROMPT,
    REGIONS,
    SAMPLING,
    SDXL,
    Batch,
    ClipSkip,
    Columns,
    Controls,
    Count,
    Device,
    Dtype,
    Embedding,
    Guidance,
    IPAdapters,
    Json,
    Lora,
    Memory,
    Model,
    Negative,
    PagScale,
    Refiner,
    RefinerAt,
    Region,
    Rows,
    Safety,
    Sampler,
    Seed,
    Size,
    Spacing,
    Steps,
    Syntax,
    add_options_of,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.preview import Preview, open_picture
from mezzotint.cli.terminal import check_memory, fitted, load, long_work, print_json, say, show
from mezzotint.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mezzotint.pipeline import Pipeline
    from mezzotint.result import Result
    from mezzotint.run.plan import RunPlan

FLAGGED = {  # by Request.safety
    "flag": "flagged by the safety checker",
    "blur": "flagged by the safety checker, and blurred",
    "black": "flagged by the safety checker, and black",
}


@add_options_of(model_options)
def generate(
    words: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw. - reads standard input.")] = None,
    prompt: Annotated[str | None, option("The same as PROMPT, for one that starts with -.", "TEXT", PROMPT)] = None,
    negative: Negative = None,
    syntax: Syntax = None,
    emphasis: Annotated[
        str | None,
        option("How a1111 applies weights: original, no_norm or ignore.", "MODE", PROMPT, default="original"),
    ] = None,
    choices: Annotated[
        str | None,
        option("comfy: draw {this|that} by the seed, or keep it as text.", "draw|keep", PROMPT, default="draw"),
    ] = None,
    wildcards: Annotated[str | None, option("comfy: folder with the files of __wildcards__.", "FOLDER", PROMPT)] = None,
    region: Region = None,
    columns: Columns = None,
    rows: Rows = None,
    region_base: Annotated[
        float | None,
        option("Weight of PROMPT within the regions; 1 is that of a region.", "X", REGIONS, default="0"),
    ] = None,
    model: Model = None,
    lora: Lora = None,
    lora_folder: Annotated[
        str | None, option("Folder in which <lora:name:0.8> in the prompt finds its file.", "FOLDER", MODEL)
    ] = None,
    embedding: Embedding = None,
    size: Size = None,
    steps: Steps = None,
    sampler: Sampler = None,
    spacing: Spacing = None,
    seed: Seed = None,
    count: Count = None,
    batch: Batch = None,
    eta: Annotated[
        float | None,
        option("Noise added in each step, 0 to 1.", "X", SAMPLING, default="0 for ddim and tcd, otherwise 1"),
    ] = None,
    clip_skip: ClipSkip = None,
    sigmas: Annotated[
        str | None, option("Falling noise levels, instead of --steps and --spacing.", "SIGMA,...", SAMPLING)
    ] = None,
    timesteps: Annotated[
        str | None, option("Falling timesteps, instead of --steps and --spacing.", "T,...", SAMPLING)
    ] = None,
    discard_penultimate_sigma: Annotated[
        bool | None,
        option(
            "Compute one more noise level and drop the last but one, as A1111's option does.",
            None,
            SAMPLING,
            name="--discard-penultimate-sigma/--no-discard-penultimate-sigma",
        ),
    ] = None,
    noise: Annotated[
        str | None,
        option(
            "seeded: CPU generators, as in diffusers; philox: the noise of a CUDA GPU, as in A1111.",
            "SOURCE",
            SAMPLING,
            default="seeded",
        ),
    ] = None,
    seamless: Annotated[
        str | None, option("Draw a picture that tiles in these directions.", "x|y|xy", SAMPLING)
    ] = None,
    variation_strength: Annotated[
        float | None, option("How far to interpolate the noise to that of another seed, 0 to 1.", "X", SAMPLING)
    ] = None,
    variation_seed: Annotated[int | None, option("That other seed.", "N", SAMPLING, default="random")] = None,
    seed_size: Annotated[
        str | None, option("Place the seed's noise for this size in the centre, in pixels.", "WxH", SAMPLING)
    ] = None,
    guidance: Guidance = None,
    guidance_method: Annotated[
        str | None, option("cfg, apg, cfg_zero or perp_neg.", "METHOD", GUIDANCE, default="cfg")
    ] = None,
    guidance_rescale: Annotated[
        float | None, option("Rescale against overexposure, 0 to 1.", "X", GUIDANCE, default="0")
    ] = None,
    guidance_interval: Annotated[
        str | None, option("Noise levels (sigma) between which guidance is applied.", "LOW:HIGH", GUIDANCE)
    ] = None,
    guidance_steps: Annotated[
        str | None,
        option("Part of the steps in which guidance is applied, such as 0:0.6.", "START:STOP", GUIDANCE, default="0:1"),
    ] = None,
    apg_eta: Annotated[
        float | None, option("apg: weight of the parallel part, which oversaturates.", "X", GUIDANCE, default="0")
    ] = None,
    apg_momentum: Annotated[
        float | None, option("apg: momentum of the running average.", "X", GUIDANCE, default="-0.5")
    ] = None,
    apg_norm_threshold: Annotated[
        float | None,
        option("apg: largest norm of the update; 0 is no limit.", "X", GUIDANCE, default="15 at 1024x1024, by size"),
    ] = None,
    cfg_zero_init_steps: Annotated[
        int | None, option("cfg_zero: number of first steps whose output is zero.", "N", GUIDANCE, default="1")
    ] = None,
    perp_neg_scale: Annotated[
        float | None, option("perp_neg: weight of the negative prompt.", "X", GUIDANCE, default="1")
    ] = None,
    mimic_scale: Annotated[
        float | None,
        option("Dynamic thresholding: limit values to the range of this guidance scale.", "SCALE", GUIDANCE),
    ] = None,
    threshold_percentile: Annotated[
        float | None,
        option("With --mimic-scale: fraction of the values that is not clipped, 0 to 1.", "X", GUIDANCE, default="1"),
    ] = None,
    pag_scale: PagScale = None,
    pag_layers: Annotated[
        str | None,
        option(
            "Its self-attentions, by parts of their names: mid, up_blocks.0, ...", "NAME,...", GUIDANCE, default="mid"
        ),
    ] = None,
    pag_adaptive_scale: Annotated[
        float | None, option("What its scale loses with each timestep below 1000.", "X", GUIDANCE, default="0")
    ] = None,
    freeu: Annotated[
        str | None,
        option(
            "FreeU: factors of the UNet's features (b1, b2) and skips (s1, s2), such as 1.5,1.6,0.9,0.2.",
            "B1,B2,S1,S2",
            GUIDANCE,
            default="off",
        ),
    ] = None,
    image: Annotated[
        str | None, option("Picture to start from. Without --size its own size is used.", "FILE", FROM_PICTURE)
    ] = None,
    mask: Annotated[
        str | None, option("Inpainting mask: white, or opaque, areas are repainted.", "FILE", FROM_PICTURE)
    ] = None,
    strength: Annotated[
        float | None,
        option(
            "Share of the steps that is run, 0 to 1: how much may change.",
            "X",
            FROM_PICTURE,
            default="0.8, SDXL 0.3, with a mask 1",
            name="--strength",
        ),
    ] = None,
    fix_steps: Annotated[
        bool | None,
        option(
            "Run all of --steps whatever the strength.",
            None,
            FROM_PICTURE,
            default="as the sampler's program does",
            name="--fix-steps/--no-fix-steps",
        ),
    ] = None,
    resize_mode: Annotated[
        str | None,
        option(
            "How an image of another shape is fitted: resize (stretch), crop or fill.",
            "MODE",
            FROM_PICTURE,
            default="resize",
        ),
    ] = None,
    tile: Annotated[
        int | None,
        option("Draw in overlapping tiles of at most this side, from an image at any size.", "PIXELS", FROM_PICTURE),
    ] = None,
    mask_blur: Annotated[
        float | None,
        option("Radius of the blur of the mask's edge.", "PIXELS", FROM_PICTURE, default="0"),
    ] = None,
    invert_mask: Annotated[
        bool | None,
        option("Repaint the black areas of the mask.", None, FROM_PICTURE, name="--invert-mask/--no-invert-mask"),
    ] = None,
    differential: Annotated[
        bool | None,
        option(
            "The mask's grey is how much each place may change (differential diffusion).",
            None,
            FROM_PICTURE,
            name="--differential/--no-differential",
        ),
    ] = None,
    masked_content: Annotated[
        str | None,
        option(
            "What the masked area starts from: original, fill (surrounding colours) or noise.",
            "MODE",
            FROM_PICTURE,
            default="original",
        ),
    ] = None,
    only_masked: Annotated[
        int | None,
        option("Inpaint the masked area alone, at full size, with this padding in pixels.", "PADDING", FROM_PICTURE),
    ] = None,
    outpaint: Annotated[
        str | None,
        option("Pixels to add on each side, such as right=64 or left=32,top=32.", "SIDE=PIXELS,...", FROM_PICTURE),
    ] = None,
    control: Controls = None,
    ip_adapter: IPAdapters = None,
    hires: Annotated[
        float | None, option("Draw a second pass, larger by this factor (1 to 8).", "FACTOR", HIRES)
    ] = None,
    hires_upscale: Annotated[
        str | None,
        option(
            "What is enlarged between the passes: latent, pixels, or pixels by an upscaler's file.",
            "latent|pixels|FILE",
            HIRES,
            default="latent",
        ),
    ] = None,
    hires_steps: Annotated[
        int | None, option("Number of steps of the second pass.", "N", HIRES, default="as --steps")
    ] = None,
    hires_strength: Annotated[
        float | None, option("Strength of the second pass, above 0 to 1.", "X", HIRES, default="0.7")
    ] = None,
    original_size: Annotated[
        str | None, option("Size before cropping, in pixels.", "WxH", SDXL, default="the picture's size")
    ] = None,
    crop: Annotated[str | None, option("Where the crop starts, in pixels.", "LEFTxTOP", SDXL, default="0x0")] = None,
    target_size: Annotated[
        str | None, option("Size after cropping, in pixels.", "WxH", SDXL, default="the picture's size")
    ] = None,
    refiner: Refiner = None,
    refiner_at: RefinerAt = None,
    aesthetic_score: Annotated[
        float | None, option("Refiner: score of the pictures that it should draw, 0 to 10.", "X", SDXL, default="6")
    ] = None,
    negative_aesthetic_score: Annotated[
        float | None, option("Refiner: score of those that it should not draw.", "X", SDXL, default="2.5")
    ] = None,
    safety: Safety = None,
    memory: Memory = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str | None,
        option(
            "FILE.png, .jpg or .webp is replaced; several pictures are numbered FILE-0001.png and on. In a FOLDER/ "
            "they are named mezzotint-SEED.png. A PATTERN such as {date}/{seed}-{prompt:40}.png names each picture; "
            f"its fields are {', '.join(FIELDS)}. In these two no file is replaced.",
            "FILE|FOLDER|PATTERN",
            OUTPUT,
            default="the current folder",
            name="--out -o",
        ),
    ] = None,
    preview: Annotated[
        str | None,
        option("File for a preview of the picture, replaced after each step while it is drawn.", "FILE", OUTPUT),
    ] = None,
    preview_vae: Annotated[
        str | None,
        option(
            "TAESD that decodes the preview: a file, folder or hub id.",
            "MODEL",
            OUTPUT,
            default="colours estimated from the latents",
        ),
    ] = None,
    open_it: Annotated[
        bool, option("Open the first finished picture with the system's viewer.", None, OUTPUT, name="--open")
    ] = False,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Draw pictures from a prompt."""
    options = locals()
    model_given = take_model_options(overrides, safety)
    from mezzotint.request import Request

    text = words if prompt is None else prompt
    if text is None:
        raise RequestError('the prompt is missing; give it as in: mezzotint generate "a lemon"')
    if words is not None and prompt is not None:
        raise RequestError("the prompt is given twice, as PROMPT and with --prompt; give only one of them")
    check_memory(memory)
    request = Request(prompt=read_prompt(text), **fields_of(options))
    check_out(out, request, SUFFIXES)
    if preview is not None:
        if names_several(preview):
            raise RequestError(f"preview is {preview!r}; it must be the name of a file, such as preview.png")
        check_out(preview, request.replace(count=1), SUFFIXES, option="preview")
    elif preview_vae is not None:
        raise RequestError("preview_vae is given without preview; give the file of the preview with --preview FILE")
    fit = fitted(model, memory, request, device, dtype, **model_given)
    pipe = load(model, device, dtype, **model_given, **({"memory": fit} if fit else {}))
    from mezzotint.devices import bfloat16_hint  # which import torch
    from mezzotint.models.offload import count_parameters

    run = pipe.plan(fit.request if fit else request)
    request = run.request
    say_notices(pipe, run)
    say(*bfloat16_hint(dtype, pipe.device, count_parameters(pipe.unet)))
    written: list[Path] = []
    shown = Preview(pipe, Path(preview), preview_vae) if preview is not None else None
    estimates: dict[str, Any] = {"on_estimate": shown.show_latents} if shown else {}

    def on_image(k: int, image: Image.Image) -> None:
        written.append(save_one(image, out, request, k))
        if shown:
            shown.show(image)

    with long_work("drawing", lambda: wrote(written) if written else "no picture was finished") as on_step:
        result = pipe.generate(run, on_step=on_step, on_image=on_image, **estimates)
    report_result(pipe, run, result, written, as_json)
    if open_it:
        open_picture(written[0])


def say_notices(pipe: Pipeline, run: RunPlan) -> None:
    """Print the notices on a request before it is drawn; `load` has printed those on the model."""
    say(*(notice for notice in run.notices if notice not in pipe.notices))


def report_result(pipe: Pipeline, run: RunPlan, result: Result, written: list[Path], as_json: bool) -> None:
    """Print what was drawn, and the notices that are known only afterwards."""
    say(*(notice for notice in result.notices if notice not in (*pipe.notices, *run.notices)))
    for path, flag in zip(written, result.flagged or [], strict=False):
        if flag:
            say(f"{path}: {FLAGGED[run.safety]}")
    if as_json:
        flags: Sequence[bool | None] = result.flagged or [None] * len(written)
        print_json(
            {
                "images": [
                    {"path": str(path), "seed": seed, "flagged": flag}
                    for path, seed, flag in zip(written, result.seeds, flags, strict=True)
                ],
                "request": result.request.model_dump(mode="json"),
                "timings": result.timings,
                "notices": result.notices,
            }
        )
    else:
        drawn = result.images[0]
        seeds = " to ".join(str(s) for s in sorted({result.seeds[0], result.seeds[-1]}))
        show(f"{wrote(written)} ({drawn.width}x{drawn.height}, {result.request.steps} steps, seed {seeds})")


def wrote(paths: list[Path]) -> str:
    """Return the line that says which files were written."""
    if len(paths) == 1:
        return f"Wrote {paths[0]}"
    return f"Wrote {len(paths)} pictures, {paths[0]} to {paths[-1]}"
