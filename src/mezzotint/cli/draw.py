"""`mezzotint generate`: options -> a Request -> pictures in files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count as counting
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mezzotint.cli.terminal import (
    Device,
    Dtype,
    Embedding,
    Json,
    Lora,
    Memory,
    Model,
    Syntax,
    check_memory,
    fitted,
    load,
    long_work,
    print_json,
    say,
)
from mezzotint.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mezzotint.request import Request

Number = TypeVar("Number", int, float)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # image.FORMATS, which would bring torch
AS_THEY_ARE = (  # options that are a field of their name
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


def generate(
    words: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw; - reads standard input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The same as PROMPT.")] = None,
    model: Model = None,
    negative: Annotated[str | None, typer.Option(help="What to keep out of the picture.")] = None,
    syntax: Syntax = None,
    emphasis: Annotated[str | None, typer.Option(help="a1111: original, no_norm or ignore.")] = None,
    embedding: Embedding = None,
    lora: Lora = None,
    lora_folder: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where <lora:name:0.8> in the prompt finds its file.")
    ] = None,
    choices: Annotated[str | None, typer.Option(help="comfy: draw {this|that} from the seed, or keep it.")] = None,
    wildcards: Annotated[str | None, typer.Option(help="comfy: a folder with the files of __wildcards__.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels, multiples of 8, such as 512x768.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 1000.")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(metavar="SCALE[,...]", help="Guidance scale, 1 is none; 9,3 falls from 9 to 3 over the steps."),
    ] = None,
    guidance_method: Annotated[str | None, typer.Option(help="cfg, apg, cfg_zero or perp_neg.")] = None,
    sampler: Annotated[str | None, typer.Option(help="A name from `mezzotint samplers`.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Overrides the sampler's spacing of noise levels.")] = None,
    sigmas: Annotated[
        str | None, typer.Option(metavar="LEVEL,...", help="Noise levels of your own, instead of steps and a spacing.")
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(metavar="STEP,...", help="Timesteps of your own, instead of steps and a spacing.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next has seed + 1. Else random.")] = None,
    count: Annotated[int | None, typer.Option(help="How many pictures; else 1.")] = None,
    batch: Annotated[int | None, typer.Option(help="How many to draw at once.")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="Text encoder layers to skip from the end.")] = None,
    eta: Annotated[float | None, typer.Option(help="Fresh noise in the steps, 0 to 1.")] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="Against overexposure, 0 to 1.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Noise levels (sigma) between which guidance works.")
    ] = None,
    guidance_steps: Annotated[
        str | None, typer.Option(metavar="START:STOP", help="Part of the steps in which guidance works, such as 0:0.6.")
    ] = None,
    apg_eta: Annotated[float | None, typer.Option(help="apg: weight of what oversaturates; 1 keeps it.")] = None,
    apg_momentum: Annotated[float | None, typer.Option(help="apg: of the running average, below 0.")] = None,
    apg_norm_threshold: Annotated[float | None, typer.Option(help="apg: longest difference; 0 is no limit.")] = None,
    cfg_zero_init_steps: Annotated[int | None, typer.Option(help="cfg_zero: first steps with no output.")] = None,
    perp_neg_scale: Annotated[float | None, typer.Option(help="perp_neg: weight of the negative prompt.")] = None,
    mimic_scale: Annotated[
        float | None, typer.Option(help="Dynamic thresholding: hold values to the range of this guidance scale.")
    ] = None,
    threshold_percentile: Annotated[
        float | None, typer.Option(help="With --mimic-scale: the share of values not cut off, 0 to 1.")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="seeded, as in diffusers, or philox: what a CUDA GPU draws, as in A1111.")
    ] = None,
    original_size: Annotated[str | None, typer.Option(metavar="WxH", help="SDXL: size before cropping.")] = None,
    crop: Annotated[str | None, typer.Option(metavar="LEFTxTOP", help="SDXL: where the crop begins.")] = None,
    target_size: Annotated[str | None, typer.Option(metavar="WxH", help="SDXL: size after cropping.")] = None,
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="A picture to start from; --size is its own if not given.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(metavar="FILE", help="Inpainting: what is white here, or opaque, is drawn anew.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of the image may change, 0 to 1: the share of the steps that is run.")
    ] = None,
    fix_steps: Annotated[
        bool | None, typer.Option("--fix-steps/--no-fix-steps", help="Run all of --steps, whatever the strength.")
    ] = None,
    resize_mode: Annotated[
        str | None, typer.Option(help="An image of another shape: resize (stretch), crop or fill.")
    ] = None,
    mask_blur: Annotated[float | None, typer.Option(help="Softens the mask's edge by so many pixels.")] = None,
    invert_mask: Annotated[
        bool | None, typer.Option("--invert-mask/--no-invert-mask", help="Draw what is black in the mask.")
    ] = None,
    masked_content: Annotated[
        str | None, typer.Option(help="Under the mask at first: original, fill (colours around) or noise.")
    ] = None,
    only_masked: Annotated[
        int | None,
        typer.Option(
            metavar="PADDING", help="Draw the masked part alone, at the full size, with so many pixels around."
        ),
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(metavar="SIDE=PIXELS,...", help="Add to the image, such as right=64 or left=32,top=32."),
    ] = None,
    hires: Annotated[
        float | None, typer.Option(metavar="FACTOR", help="Draw, enlarge by this factor, and draw on in the enlarged.")
    ] = None,
    hires_upscale: Annotated[str | None, typer.Option(help="What is enlarged: latent or pixels.")] = None,
    hires_steps: Annotated[int | None, typer.Option(help="Steps of the second pass.")] = None,
    hires_strength: Annotated[float | None, typer.Option(help="Strength of the second pass, 0 to 1.")] = None,
    seamless: Annotated[str | None, typer.Option(help="A picture that tiles: in x, y or xy.")] = None,
    variation_strength: Annotated[
        float | None, typer.Option(help="Turn the noise this far, 0 to 1, to that of another seed.")
    ] = None,
    variation_seed: Annotated[int | None, typer.Option(help="That other seed. Else random.")] = None,
    seed_size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Put the seed's noise for this size into the middle.")
    ] = None,
    memory: Memory = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="FILE.png (or .jpg, .webp) is overwritten; several pictures become FILE-0001.png and on. In a FOLDER, "
            "and else here, mezzotint-SEED.png. But for FILE.png itself no file is ever overwritten: the next free "
            "number is taken.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw pictures from a prompt."""
    options = locals()
    from mezzotint.prompt import plan
    from mezzotint.request import Request

    text = words if prompt is None else prompt
    if text is None or (words is not None and prompt is not None):
        raise RequestError('prompt is missing or given twice; name it once, such as: mezzotint generate "a lemon"')
    check_memory(memory)
    request = Request(prompt=read_prompt(text), **fields_of(options))
    check_out(out, request, SUFFIXES)
    for network in plan(request.prompt, request.prompt_syntax or "a1111").networks:
        if network.kind != "lora" or not request.lora_folder:
            why = "--lora-folder says where LoRAs are" if network.kind == "lora" else "only LoRAs are loaded"
            say(f"{request.prompt[network.start : network.end]} is left out: {why}")

    fit = fitted(model, memory, request, device, dtype)
    pipe = load(model, device, dtype, **({"memory": fit} if fit else {}))
    request = pipe.resolve(fit.request if fit else request)
    written: list[Path] = []
    with long_work("drawing", lambda: wrote(written) if written else "no picture was finished") as on_step:
        result = pipe.generate(
            request, on_step=on_step, on_image=lambda k, image: written.append(save_one(image, out, request, k))
        )
    for notice in result.notices:
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
        typer.echo(f"{wrote(written)} ({drawn.width}x{drawn.height}, {request.steps} steps, seed {seeds})")


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Request that these options of the command line, by the names of generate's parameters, say; an
    option that is None or not there says nothing. The prompt is not among them.
    """
    get = options.get
    width, height = pair("size", get("size"), "x", int, "WxH in pixels, such as 512x768") or (None, None)
    shape = "WxH in pixels, such as 1024x1024"
    fields = {name: get(name) for name in AS_THEY_ARE} | {
        "negative_prompt": get("negative"),
        "prompt_syntax": get("syntax"),
        "embeddings": tuple(get("embedding") or ()) or None,
        "loras": tuple(map(lora_of, get("lora") or ())) or None,
        "width": width,
        "height": height,
        "guidance_scale": _scales(get("guidance")),
        "sigmas": _numbers("sigmas", get("sigmas"), "falling noise levels with commas, such as 14.6,3,0.5,0"),
        "timesteps": _numbers("timesteps", get("timesteps"), "falling timesteps with commas, such as 999,500,250"),
        "guidance_interval": pair(
            "guidance_interval", get("guidance_interval"), ":", float, "LOW:HIGH in sigma, such as 0.3:5"
        ),
        "guidance_steps": pair(
            "guidance_steps", get("guidance_steps"), ":", float, "START:STOP from 0 to 1, such as 0:0.6"
        ),
        # the record has SDXL's order, rows first; the command line the order of --size
        "original_size": _swapped(pair("original_size", get("original_size"), "x", int, shape)),
        "crop": _swapped(pair("crop", get("crop"), "x", int, "LEFTxTOP in pixels, such as 0x64")),
        "target_size": _swapped(pair("target_size", get("target_size"), "x", int, shape)),
        "outpaint": _sides(get("outpaint")),
        "seed_size": pair("seed_size", get("seed_size"), "x", int, "WxH in pixels, such as 512x512"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def read_prompt(prompt: str) -> str:
    """The prompt; where it is "-", what standard input says, read no further than a prompt may reach."""
    if prompt != "-":
        return prompt
    from mezzotint.request import MAX_PROMPT

    limit = 4 * MAX_PROMPT + 2  # bytes: UTF-8 takes at most four a character; and a line end
    data = sys.stdin.buffer.read(limit + 1)
    right = f"it must be a text of at most {MAX_PROMPT:,} characters in UTF-8"
    if len(data) > limit:
        raise RequestError(f"prompt on standard input is longer than {limit:,} bytes; {right}")
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise RequestError(f"prompt on standard input is not UTF-8; {right}") from None


def pair(
    field: str, text: str | None, mark: str, kind: Callable[[str], Number], right: str
) -> tuple[Number, Number] | None:
    """Two numbers out of "512x768" or "0.3:5"."""
    if text is None:
        return None
    try:
        first, second = text.lower().split(mark)
        return kind(first), kind(second)
    except ValueError:
        raise RequestError(f"{field} is {text[:60]!r}; it must be {right}") from None


def lora_of(text: str) -> tuple[str | float, ...]:
    """("a.safetensors", 0.8, 0.5) of "a.safetensors:0.8:0.5"; of "a.safetensors" the scale is 1."""
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
    """One guidance scale, or several."""
    scales = _numbers("guidance_scale", text, "a number, or several with commas, such as 7.5 or 9,3")
    return scales[0] if scales and len(scales) == 1 else scales


def _numbers(field: str, text: str | None, right: str) -> tuple[float, ...] | None:
    """The numbers in "9,3.5,1"."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise RequestError(f"{field} is {text[:60]!r}; it must be {right}") from None


def _sides(text: str | None) -> tuple[int, ...] | None:
    """(left, top, right, bottom) of "right=64,top=32"."""
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
    """The names that picture k may get, best first. A single one is a file that the user named: it is overwritten."""
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
    """Refuses, before any work, a place where no picture could be written."""
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
        right = "it must be in a folder that exists and may be written to"
        raise RequestError(f"out is {str(path)!r}, which cannot be written ({error.strerror}); {right}") from None


def save_one(image: Image.Image, out: str | None, request: Request, k: int) -> Path:
    """Writes picture k under the first of its names that is free."""
    from mezzotint.images.io import save

    exact = _is_exact(out, request)
    for path in _names(out, request, k):
        if exact or not path.exists():
            with suppress(FileExistsError):  # another process took the name just now
                save(image, path, overwrite=exact)
                return path
    raise AssertionError("unreachable: a name is overwritten, or names never end")


def wrote(paths: list[Path]) -> str:
    if len(paths) == 1:
        return f"Wrote {paths[0]}"
    return f"Wrote {len(paths)} pictures, {paths[0]} to {paths[-1]}"
