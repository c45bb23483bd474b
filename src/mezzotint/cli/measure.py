"""`mezzotint report`: which sampler, at how many steps, suits a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.terminal import Device, Dtype, Json, Model, load, long_work, print_json, say


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
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure which sampler, at how many steps, suits a model."""
    from mezzotint.report import measure as sampler_report
    from mezzotint.report import page

    settings = sampler_report.Settings.parse(
        prompts, samplers, steps, seeds=seeds, reference_steps=reference_steps, guidance_scale=guidance
    )
    page.prepare(out)

    pipe = load(model, device, dtype)
    kept = f"what is finished is in {out / 'results.jsonl'}, and the same command goes on from there"
    with long_work("measuring", lambda: kept) as on_progress:
        rows = sampler_report.measure(pipe, settings, out, on_progress)
    record = page.write(out, rows, settings)
    for sentence in record["notes"]:
        say(sentence)
    if as_json:
        print_json(record)
    else:
        typer.echo(f"{record['recommendation']}\n{record['claim']}\nWrote {out / 'report.html'}")
