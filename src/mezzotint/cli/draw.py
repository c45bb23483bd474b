"""`mezzotint generate`: options to a Request, a Request to pictures in files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count as counting
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mezzotint.cli.options import (
    FROM_PICTURE,
    GUIDANCE,
    HIRES,
    MODEL,
    OUTPUT,
    PROMPT,
    SAMPLING,
    SDXL,
    Batch,
    ClipSkip,
    Count,
    Device,
    Dtype,
    Embedding,
    Guidance,
    Json,
    Lora,
    Memory,
    Model,
    Negative,
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
from mezzotint.cli.terminal import check_memory, fitted, load, long_work, print_json, say, show
from mezzotint.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mezzotint.request import Request

Number = TypeVar("Number", int, float)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # images.io.FORMATS, whose import would bring torch
SAME_NAME = (  # options that are named as their field of Request
    "emphasis",
    "lora_folder",
    "choices",
    "wildcards",
    "steps",
    "guidance_method",
    "sampler",
    "spacing",
    "seed",
    "count",
    "batch",
    "clip_skip",
    "eta",
    "guidance_rescale",
    "image",
    "mask",
    "strength",
    "fix_steps",
    "resize_mode",
    "mask_blur",
    "invert_mask",
    "masked_content",
    "only_masked",
    "hires",
    "hires_upscale",
    "hires_steps",
    "hires_strength",
    "seamless",
    "variation_seed",
    "variation_strength",
    "apg_eta",
    "apg_momentum",
    "apg_norm_threshold",
    "cfg_zero_init_steps",
    "perp_neg_scale",
    "mimic_scale",
    "threshold_percentile",
    "noise",
)


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
        float | None, option("How far to turn the noise towards that of another seed, 0 to 1.", "X", SAMPLING)
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
    mask_blur: Annotated[
        float | None,
        option("Radius of the blur of the mask's edge.", "PIXELS", FROM_PICTURE, default="0"),
    ] = None,
    invert_mask: Annotated[
        bool | None,
        option("Repaint the black areas of the mask.", None, FROM_PICTURE, name="--invert-mask/--no-invert-mask"),
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
    hires: Annotated[
        float | None, option("Draw a second pass, larger by this factor (1 to 8).", "FACTOR", HIRES)
    ] = None,
    hires_upscale: Annotated[
        str | None, option("What is enlarged between the passes: latent or pixels.", "MODE", HIRES, default="latent")
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
    memory: Memory = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str | None,
        option(
            "FILE.png, .jpg or .webp is replaced; several pictures are numbered FILE-0001.png and on. In a FOLDER they "
            "are named mezzotint-SEED.png, and no file is replaced.",
            "FILE|FOLDER",
            OUTPUT,
            default="the current folder",
        ),
    ] = None,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Draw pictures from a prompt."""
    options = locals()
    model_given = take_model_options(overrides)
    from mezzotint.prompt import plan
    from mezzotint.request import Request

    text = words if prompt is None else prompt
    if text is None:
        raise RequestError('the prompt is missing; give it as in: mezzotint generate "a lemon"')
    if words is not None and prompt is not None:
        raise RequestError("the prompt is given twice, as PROMPT and with --prompt; give only one of them")
    check_memory(memory)
    request = Request(prompt=read_prompt(text), **fields_of(options))
    check_out(out, request, SUFFIXES)
    for network in plan(request.prompt, request.prompt_syntax or "a1111").networks:
        if network.kind != "lora" or not request.lora_folder:
            why = "give --lora-folder to load it" if network.kind == "lora" else "only LoRAs can be loaded"
            say(f"{request.prompt[network.start : network.end]} is ignored: {why}")

    fit = fitted(model, memory, request, device, dtype, **model_given)
    pipe = load(model, device, dtype, **model_given, **({"memory": fit} if fit else {}))
    run = pipe.plan(fit.request if fit else request)
    request = run.request
    written: list[Path] = []
    with long_work("drawing", lambda: wrote(written) if written else "no picture was finished") as on_step:
        result = pipe.generate(
            run, on_step=on_step, on_image=lambda k, image: written.append(save_one(image, out, request, k))
        )
    for notice in result.notices:
        if notice not in pipe.notices:  # which `load` has printed
            say(notice)
    if as_json:
        print_json(
            {
                "images": [{"path": str(path), "seed": s} for path, s in zip(written, result.seeds, strict=True)],
                "request": result.request.model_dump(mode="json"),
                "timings": result.timings,
            }
        )
    else:
        drawn = result.images[0]
        seeds = " to ".join(str(s) for s in sorted({result.seeds[0], result.seeds[-1]}))
        show(f"{wrote(written)} ({drawn.width}x{drawn.height}, {request.steps} steps, seed {seeds})")


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Request that the options of `generate` set, except the prompt.

    Args:
        options: Values by the names of generate's parameters. None and missing ones are left out.
    """
    get = options.get
    width, height = pair("size", get("size"), "x", int, "WxH in pixels, such as 512x768") or (None, None)
    shape = "WxH in pixels, such as 1024x1024"
    fields = {name: get(name) for name in SAME_NAME} | {
        "negative_prompt": get("negative"),
        "prompt_syntax": get("syntax"),
        "embeddings": tuple(get("embedding") or ()) or None,
        "loras": tuple(map(lora_of, get("lora") or ())) or None,
        "width": width,
        "height": height,
        "guidance_scale": _scales(get("guidance")),
        "sigmas": _numbers("sigmas", get("sigmas"), "falling noise levels separated by commas, such as 14.6,3,0.5,0"),
        "timesteps": _numbers(
            "timesteps", get("timesteps"), "falling timesteps separated by commas, such as 999,500,250"
        ),
        "guidance_interval": pair(
            "guidance_interval", get("guidance_interval"), ":", float, "LOW:HIGH in sigma, such as 0.3:5"
        ),
        "guidance_steps": pair(
            "guidance_steps", get("guidance_steps"), ":", float, "START:STOP from 0 to 1, such as 0:0.6"
        ),
        # a Request has SDXL's order, (height, width); the command line that of --size
        "original_size": _swapped(pair("original_size", get("original_size"), "x", int, shape)),
        "crop": _swapped(pair("crop", get("crop"), "x", int, "LEFTxTOP in pixels, such as 0x64")),
        "target_size": _swapped(pair("target_size", get("target_size"), "x", int, shape)),
        "outpaint": _sides(get("outpaint")),
        "seed_size": pair("seed_size", get("seed_size"), "x", int, "WxH in pixels, such as 512x512"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def read_prompt(prompt: str) -> str:
    """Return the prompt, or for "-" the text on standard input, of which no more is read than a prompt may hold."""
    if prompt != "-":
        return prompt
    from mezzotint.request import MAX_PROMPT

    limit = 4 * MAX_PROMPT + 2  # bytes: UTF-8 takes at most four a character; and a line end
    try:
        data = sys.stdin.buffer.read(limit + 1)
    except OSError as error:  # it is closed
        raise RequestError(f"prompt on standard input cannot be read ({error.strerror})") from None
    right = f"it must be UTF-8 text of at most {MAX_PROMPT:,} characters"
    if len(data) > limit:
        raise RequestError(f"prompt on standard input is longer than {limit:,} bytes; {right}")
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise RequestError(f"prompt on standard input is not UTF-8; {right}") from None


def pair(
    field: str, text: str | None, mark: str, kind: Callable[[str], Number], right: str
) -> tuple[Number, Number] | None:
    """Parse two numbers, as in "512x768" or "0.3:5".

    Args:
        field: The option's name, for the error.
        text: The option's value.
        mark: The separator.
        kind: int or float.
        right: What the value must be, for the error.

    Raises:
        RequestError: If the text is not two numbers.
    """
    if text is None:
        return None
    try:
        first, second = text.lower().split(mark)
        return kind(first), kind(second)
    except ValueError:
        raise RequestError(f"{field} is {text[:60]!r}; it must be {right}") from None


def lora_of(text: str) -> tuple[str | float, ...]:
    """Parse "a.safetensors:0.8:0.5" to ("a.safetensors", 0.8, 0.5); without a scale it is 1."""
    scales: list[float] = []
    while len(scales) < 2 and ":" in text:
        head, _, tail = text.rpartition(":")
        try:
            scales.insert(0, float(tail))
        except ValueError:  # a name with a colon in it
            break
        text = head
    return (text, *(scales or [1.0]))


def _scales(text: str | None) -> float | tuple[float, ...] | None:
    """Parse one guidance scale, or several."""
    scales = _numbers("guidance_scale", text, "a number, or several separated by commas, such as 7.5 or 9,3")
    return scales[0] if scales and len(scales) == 1 else scales


def _numbers(field: str, text: str | None, right: str) -> tuple[float, ...] | None:
    """Parse the numbers in "9,3.5,1"."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise RequestError(f"{field} is {text[:60]!r}; it must be {right}") from None


def _sides(text: str | None) -> tuple[int, ...] | None:
    """Parse "right=64,top=32" to (left, top, right, bottom)."""
    if text is None:
        return None
    sides = dict.fromkeys(("left", "top", "right", "bottom"), 0)
    try:
        given = dict(part.strip().split("=") for part in text.lower().split(","))
        if not set(given) <= set(sides):
            raise ValueError
        return tuple((sides | {side: int(pixels) for side, pixels in given.items()}).values())
    except ValueError:
        right = "it must be sides and pixels, such as right=64 or left=32,top=32"
        raise RequestError(f"outpaint is {text[:60]!r}; {right}") from None


def _swapped(pair: tuple[int, int] | None) -> tuple[int, int] | None:
    return pair and pair[::-1]


def _names(out: str | None, request: Request, k: int) -> Iterator[Path]:
    """Yield the names that picture k may get, in order of preference."""
    if out is None or os.path.isdir(out):
        seed = "SEED" if request.seed is None else request.seed + k
        folder = Path(out or "")
        yield folder / f"mezzotint-{seed}.png"
        yield from (folder / f"mezzotint-{seed}-{n}.png" for n in counting(2))
    elif request.count > 1:
        path = Path(out)
        yield from (path.with_stem(f"{path.stem}-{n:04}") for n in counting(k + 1))
    else:
        yield Path(out)


def _is_exact(out: str | None, request: Request) -> bool:
    return out is not None and request.count == 1 and not os.path.isdir(out)


def check_out(out: str | None, request: Request, suffixes: tuple[str, ...] = (".png",)) -> None:
    """Check before any work that a picture can be written there.

    Raises:
        RequestError: If it cannot.
    """
    import tempfile

    if out is not None and not os.path.isdir(out) and not out.lower().endswith(suffixes):
        right = f"a file name ending in {', '.join(suffixes)}, or a folder that exists"
        raise RequestError(f"out is {out!r}; it must be {right}")
    path = next(_names(out, request, 0))
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        with suppress(FileNotFoundError):
            path.lstat()  # a name may be too long
            if _is_exact(out, request) and not os.access(path, os.W_OK):
                raise PermissionError(0, "the file is protected")
    except OSError as error:
        right = "it must be in a writable folder"
        raise RequestError(f"out is {str(path)!r}, which cannot be written ({error.strerror}); {right}") from None


def save_one(image: Image.Image, out: str | None, request: Request, k: int) -> Path:
    """Save picture k under the first of its names that is free, and return the path."""
    from mezzotint.images.io import save

    exact = _is_exact(out, request)
    for path in _names(out, request, k):
        if exact or not path.exists():
            with suppress(FileExistsError):  # another process took the name just now
                save(image, path, overwrite=exact)
                return path
    raise AssertionError("unreachable: a name is overwritten, or names never end")


def wrote(paths: list[Path]) -> str:
    """Return the line that says which files were written."""
    if len(paths) == 1:
        return f"Wrote {paths[0]}"
    return f"Wrote {len(paths)} pictures, {paths[0]} to {paths[-1]}"
