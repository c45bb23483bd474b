"""`mezzotint report`: which sampler, at how many steps, suits a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from mezzotint.cli.options import (
    GUIDANCE,
    OUTPUT,
    SAMPLING,
    Device,
    Dtype,
    Json,
    Model,
    add_options_of,
    model_options,
    option,
    take_model_options,
)
from mezzotint.cli.terminal import load, long_work, print_json, say, show


@add_options_of(model_options)
def report(
    prompts: Annotated[Path, option("File with one prompt per line.", "FILE")],
    out: Annotated[
        Path,
        option("Folder for the report; results in it are kept.", "FOLDER", OUTPUT, default="report", name="--out -o"),
    ] = Path("report"),
    samplers: Annotated[
        str,
        option(
            "Samplers from `mezzotint samplers`, or all.",
            "NAME[/SPACING],...",
            SAMPLING,
            default="dpmpp_2m,dpmpp_2m/karras,euler,heun,ddim,euler_a,ddpm",
        ),
    ] = "dpmpp_2m,dpmpp_2m/karras,euler,heun,ddim,euler_a,ddpm",
    steps: Annotated[
        str, option("Numbers of steps to measure.", "N,...", SAMPLING, default="5,10,15,20,30,50")
    ] = "5,10,15,20,30,50",
    seeds: Annotated[
        int, option("Number of pictures per prompt; more resolve finer differences.", "N", SAMPLING, default="4")
    ] = 4,
    reference_steps: Annotated[
        int, option("Steps of the converged reference pictures.", "N", SAMPLING, default="500")
    ] = 500,
    guidance: Annotated[
        float | None,
        option("Guidance scale; 1 is no guidance.", "SCALE", GUIDANCE, default="the model's own", name="--guidance"),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    **overrides: Any,
) -> None:
    """Measure which sampler, at how many steps, suits a model."""
    model_given = take_model_options(overrides)
    from mezzotint.report import measure as sampler_report
    from mezzotint.report import page

    settings = sampler_report.Settings.parse(
        prompts, samplers, steps, seeds=seeds, reference_steps=reference_steps, guidance_scale=guidance
    )
    page.prepare(out)

    pipe = load(model, device, dtype, **model_given)
    kept = f"finished results are in {out / 'results.jsonl'}, and the same command continues from there"
    with long_work("measuring", lambda: kept) as on_progress:
        rows = sampler_report.measure(pipe, settings, out, on_progress)
    record = page.write(out, rows, settings)
    for sentence in record["notes"]:
        say(sentence)
    if as_json:
        print_json(record)
    else:
        show(record["recommendation"], record["claim"], f"Wrote {out / 'report.html'}")
