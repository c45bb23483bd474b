"""The command line. Exit codes: 0 done, 2 the request was wrong, 1 anything else; Ctrl-C is 1.

What is said of the work goes to standard error, what was made to standard output: one line, or with --json one JSON
object. No traceback reaches a user unless MEZZOTINT_DEBUG is set. What costs time to import (torch, pillow, rich) is
imported by the command that needs it, after what can be checked without it was checked.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from itertools import count as counting
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mezzotint.errors import MezzotintError, RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mezzotint.request import Request

app = typer.Typer(
    name="mezzotint",
    help="Draws pictures from words with the Stable Diffusion family.",
    epilog='\b\nExample: mezzotint generate "a lemon on a blue background"',
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]


Number = TypeVar("Number", int, float)


def main() -> None:
    """The console script: runs the command in sys.argv and exits with its code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    try:
        app()
    except SystemExit as done:
        sys.exit(1 if done.code == 130 else done.code)  # typer answers Ctrl-C with 130
    except MezzotintError as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        _say(f"Error: {error}")
        sys.exit(2)
    except Exception as error:
        if os.environ.get("MEZZOTINT_DEBUG"):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _say(f"Error: something went wrong that should not ({what}). MEZZOTINT_DEBUG=1 shows where.")
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mezzotint {version('mezzotint')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(epilog='\b\nExample: mezzotint generate "a lemon left of a whale" --steps 20 --out lemon.png')
def generate(
    words: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw; - reads standard input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The same as PROMPT.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model folder, a .safetensors or .ckpt file, or a hub id; else the bundled model."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to keep out of the picture.")] = None,
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
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
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
    original_size: Annotated[str | None, typer.Option(metavar="WxH", help="SDXL: size before cropping.")] = None,
    crop: Annotated[str | None, typer.Option(metavar="LEFTxTOP", help="SDXL: where the crop begins.")] = None,
    target_size: Annotated[str | None, typer.Option(metavar="WxH", help="SDXL: size after cropping.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the best there is.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else the device's natural one.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="FILE.png is overwritten; several pictures become FILE-0001.png and on. In a FOLDER, and else here, "
            "mezzotint-SEED.png. But for FILE.png itself no file is ever overwritten: the next free number is taken.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw pictures from a prompt."""
    from mezzotint.request import Request

    text = words if prompt is None else prompt
    if text is None or (words is not None and prompt is not None):
        raise RequestError('prompt is missing or given twice; name it once, such as: mezzotint generate "a lemon"')
    width, height = _pair("size", size, "x", int, "WxH in pixels, such as 512x768") or (None, None)
    shape = "WxH in pixels, such as 1024x1024"
    request = Request(
        prompt=_text(text),
        negative_prompt=negative,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=_scales(guidance),
        guidance_method=guidance_method,
        sampler=sampler,
        spacing=spacing,
        sigmas=_numbers("sigmas", sigmas, "falling noise levels with commas, such as 14.6,3,0.5,0"),
        timesteps=_numbers("timesteps", timesteps, "falling timesteps with commas, such as 999,500,250"),
        seed=seed,
        count=count,
        batch=batch,
        clip_skip=clip_skip,
        eta=eta,
        guidance_rescale=guidance_rescale,
        guidance_interval=_pair("guidance_interval", guidance_interval, ":", float, "LOW:HIGH in sigma, such as 0.3:5"),
        guidance_steps=_pair("guidance_steps", guidance_steps, ":", float, "START:STOP from 0 to 1, such as 0:0.6"),
        apg_eta=apg_eta,
        apg_momentum=apg_momentum,
        apg_norm_threshold=apg_norm_threshold,
        cfg_zero_init_steps=cfg_zero_init_steps,
        perp_neg_scale=perp_neg_scale,
        mimic_scale=mimic_scale,
        threshold_percentile=threshold_percentile,
        # the record has SDXL's order, rows first; the command line the order of --size
        original_size=_swapped(_pair("original_size", original_size, "x", int, shape)),
        crop=_swapped(_pair("crop", crop, "x", int, "LEFTxTOP in pixels, such as 0x64")),
        target_size=_swapped(_pair("target_size", target_size, "x", int, shape)),
    )
    _check_out(out, request)

    import mezzotint  # torch comes with load()

    with _lasting():
        pipe = mezzotint.load(model, device=device, dtype=dtype)
    request = pipe.resolve(request)
    written: list[Path] = []
    with _stoppable() as stopped, _progress("drawing") as progress:

        def on_step(done: int, total: int) -> None:
            progress(done, total)
            if stopped():
                raise KeyboardInterrupt

        try:
            result = pipe.generate(
                request, on_step=on_step, on_image=lambda k, image: written.append(_save(image, out, request, k))
            )
        except KeyboardInterrupt:
            _say(f"Stopped; {_wrote(written) if written else 'no picture was finished'}")
            raise typer.Exit(1) from None
    if as_json:
        _print_json(
            {
                "images": [{"path": str(path), "seed": s} for path, s in zip(written, result.seeds, strict=True)],
                "request": result.request.model_dump(mode="json"),
                "timings": result.timings,
            }
        )
    else:
        seeds = " to ".join(str(s) for s in sorted({result.seeds[0], result.seeds[-1]}))
        typer.echo(f"{_wrote(written)} ({request.width}x{request.height}, {request.steps} steps, seed {seeds})")


@app.command(epilog="\b\nExample: mezzotint inspect model.safetensors")
def inspect(
    file: Annotated[Path, typer.Argument(help="A model folder or file.")],
    as_json: Json = False,
) -> None:
    """Say what a model is made of, and what is missing."""
    from mezzotint.weights.checkpoint import inspect_model

    report = inspect_model(file)
    if as_json:
        _print_json(report.to_dict())
    else:
        typer.echo(report.text())


@app.command(epilog="\b\nExample: mezzotint samplers")
def samplers(as_json: Json = False) -> None:
    """List the samplers, as several programs call them."""
    from mezzotint.samplers import A1111_SCHEDULES, COMFYUI_SCHEDULES, FEW_STEPS, NAMES, SPACINGS, TABLE

    few = {name: {"sampler": base, "steps": n, "guidance_scale": w} for name, (base, _, n, w) in FEW_STEPS.items()}
    if as_json:
        _print_json(
            {"samplers": [row._asdict() for row in TABLE], "few_steps": few, "spacings": SPACINGS, "names": NAMES}
        )
        return
    titles = ("sampler", "order", "calls", "noise", "good for", "diffusers", "A1111", "ComfyUI")
    rows = [titles]
    for row in TABLE:
        noise = "yes" if row.stochastic else "no"
        rows.append(
            (row.name, str(row.order), str(row.calls), noise, row.good_for, row.diffusers, row.a1111, row.comfyui)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        typer.echo("  ".join(map(str.ljust, cells, widths)).rstrip())
    typer.echo("\nFor models distilled to a few steps:")
    for name, made in few.items():
        typer.echo(f"  {name}: {made['sampler']}, {made['steps']} steps, guidance {made['guidance_scale']:g}")
    typer.echo(f"\nspacings: {', '.join(SPACINGS)}")
    typer.echo(
        f"An A1111 name may end in {', '.join(A1111_SCHEDULES)}; a ComfyUI name in {', '.join(COMFYUI_SCHEDULES)}."
    )
    typer.echo("order: of convergence; calls: of the network in a step; noise: whether the steps add fresh noise.")
    typer.echo("Our names and those of diffusers run as diffusers would with the model's scheduler_config.json.")


@app.command(epilog="\b\nExample: mezzotint models")
def models(as_json: Json = False) -> None:
    """List the bundled model and those in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    found: list[dict[str, Any]] = []
    bundled = Path(__file__).parent / "data" / "emoji"
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
        _print_json(found)
        return
    for row in found:
        typer.echo(f"{row['name']}  {row['source']}, {row['bytes'] / 1e6:,.0f} MB, {row['path']}")
    typer.echo(
        "Without --model the bundled model draws; --model takes a diffusers folder, a .safetensors file or a hub id."
    )


@app.command(epilog="\b\nExample: mezzotint env")
def env(as_json: Json = False) -> None:
    """Say versions and devices, for the report of a fault."""
    import platform
    from importlib.metadata import version

    import torch

    facts = {name: version(name) for name in ("mezzotint", "torch", "numpy", "pillow", "safetensors", "tokenizers")}
    facts |= {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cuda": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    if as_json:
        _print_json(facts)
    else:
        typer.echo("\n".join(f"{name}: {fact}" for name, fact in facts.items()))


@app.command(epilog="\b\nExample: mezzotint report --prompts prompts.txt --samplers dpmpp_2m,ddpm --out report")
def report(
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="One prompt a line.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="What it holds already is not measured again.")],
    samplers: Annotated[
        str, typer.Option(metavar="NAME[/SPACING],...", help="From `mezzotint samplers`; all is every solver.")
    ] = "dpmpp_2m,dpmpp_2m/karras,euler,heun,ddim,euler_a,ddpm",
    steps: Annotated[str, typer.Option(metavar="N,...", help="Numbers of steps.")] = "5,10,15,20,30,50",
    seeds: Annotated[int, typer.Option(help="Pictures a prompt; more tell finer differences from chance.")] = 4,
    reference_steps: Annotated[int, typer.Option(help="Of the converged pictures that others are held to.")] = 500,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 is none; else the model's own.")] = None,
    model: Annotated[str | None, typer.Option(help="As in `generate`; else the bundled model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; else the best there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the device's.")] = None,
    as_json: Json = False,
) -> None:
    """Measure which sampler, at how many steps, suits a model."""
    from mezzotint import report as sampler_report
    from mezzotint import report_page

    settings = sampler_report.Settings.parse(
        prompts, samplers, steps, seeds=seeds, reference_steps=reference_steps, guidance_scale=guidance
    )
    report_page.prepare(out)

    import mezzotint

    with _lasting():
        pipe = mezzotint.load(model, device=device, dtype=dtype)
    with _stoppable() as stopped, _progress("measuring") as progress:

        def on_progress(done: int, total: int) -> None:
            progress(done, total)
            if stopped():
                raise KeyboardInterrupt

        try:
            rows = sampler_report.measure(pipe, settings, out, on_progress)
        except KeyboardInterrupt:
            _say(f"Stopped; what is finished is in {out / 'results.jsonl'}, and the same command goes on from there")
            raise typer.Exit(1) from None
    record = report_page.write(out, rows, settings)
    for sentence in record["notes"]:
        _say(sentence)
    if as_json:
        _print_json(record)
    else:
        typer.echo(f"{record['recommendation']}\n{record['claim']}\nWrote {out / 'report.html'}")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print_json(record: Any) -> None:
    typer.echo(json.dumps(record))


def _text(prompt: str) -> str:
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


def _pair(
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


def _check_out(out: str | None, request: Request) -> None:
    """Refuses, before any work, a place where no picture could be written."""
    import tempfile

    if out is not None and not os.path.isdir(out) and not out.lower().endswith(".png"):
        raise RequestError(f"out is {out!r}; it must be a file name ending in .png, or a folder that exists")
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


def _save(image: Image.Image, out: str | None, request: Request, k: int) -> Path:
    """Writes picture k under the first of its names that is free."""
    from mezzotint.image import save_png

    exact = _is_exact(out, request)
    for path in _names(out, request, k):
        if exact or not path.exists():
            with suppress(FileExistsError):  # another process took the name just now
                save_png(image, path, overwrite=exact)
                return path
    raise AssertionError("unreachable: a name is overwritten, or names never end")


def _wrote(paths: list[Path]) -> str:
    if len(paths) == 1:
        return f"Wrote {paths[0]}"
    return f"Wrote {len(paths)} pictures, {paths[0]} to {paths[-1]}"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with step and time left on standard error where that is a terminal, else nothing: no noise in a pipe."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _lasting() -> Iterator[None]:
    """What is imported and made inside lasts until the process ends: Python searches it for garbage neither now nor at
    the end, which would take longer than reading the bundled model.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed, so that the step under way ends and a finished picture is
    saved. The second Ctrl-C interrupts at once.
    """
    presses = 0

    def press(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as under nohup, and stays so
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
