"""Write a sampler report: charts and contact sheet as PNG, report.json, and a self-contained report.html."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.report.measure import CHECK, REFERENCE, Settings, thumbnail
from mezzotint.report.statistics import (
    NEAR,
    Curve,
    Distance,
    Point,
    Row,
    as_percent,
    check_claim,
    make_curves,
    measure_residual,
    recommend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
GREY, INK = "#b5b5b5", "#333333"
CELL, GAP, HEADER = 96, 4, 26  # pixels of the contact sheet: a cell, the gap between cells, the first row


def prepare(folder: Path) -> None:
    """Create the folder, and check that the report can be written.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        RequestError: If the folder cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            'the charts of the report need matplotlib; install it with: pip install "mezzotint[report]"'
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        right = "it must be a writable folder"
        raise RequestError(f"out is {str(folder)!r}, which cannot be used ({error.strerror}); {right}") from None


def write(folder: Path, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """Write the report into the folder.

    Args:
        folder: The folder of the measurements.
        rows: The rows, from `measure`.
        settings: The settings that they were measured with.

    Returns:
        The content of report.json.
    """
    found = ranked(make_curves(rows))
    check = measure_residual(rows)
    report = {
        "recommendation": recommend(found),
        "claim": check_claim(found),
        "settings": asdict(settings),
        "model": rows[0]["model"],
        "reference": {"sampler": REFERENCE, "steps": settings.reference_steps, "residual": asdict(check)},
        "curves": [asdict(curve) for curve in found],
        "notes": notes(rows),
    }
    calls = chart(found, check, "calls", "model calls per picture")
    seconds = chart(found, check, "seconds", f"seconds per picture ({_machine(rows[0]['model'])})")
    (folder / "error-calls.png").write_bytes(calls)
    (folder / "error-seconds.png").write_bytes(seconds)
    sheet = contact_sheet(folder, rows, found, settings)
    sheet.save(folder / "contact-sheet.png", optimize=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    small = io.BytesIO()
    sheet.save(small, "WEBP", quality=92)
    images = {
        "calls": _image("png", calls),
        "seconds": _image("png", seconds),
        "sheet": _image("webp", small.getvalue()),
    }
    (folder / "report.html").write_text(page(report, found, check, settings, images), "utf-8")
    return report


def ranked(found: Sequence[Curve]) -> list[Curve]:
    """Sort the curves: first those that converge, by model calls, then the others by their smallest distance."""

    def rank(curve: Curve) -> tuple[float, float]:
        point = curve.reached()
        return point.calls if point else math.inf, min(curve.distance(point) for point in curve.points)

    return sorted(found, key=rank)


def notes(rows: Sequence[Row]) -> list[str]:
    """Return warnings: a reference that has not converged, and runs that failed."""
    error = measure_residual(rows).latents.error
    doubt = [f"The reference itself is only accurate to {as_percent(error)}; use more reference steps."]
    steps: dict[tuple[str, str], dict[int, None]] = {}
    for row in rows:
        if "failure" in row:
            steps.setdefault((row["sampler"], row["failure"]), {})[row["steps"]] = None
    left_out = [f"Left out: {name} at {', '.join(map(str, at))} steps: {why}" for (name, why), at in steps.items()]
    return (doubt if error > NEAR / 4 else []) + left_out


# ---- charts ----------------------------------------------------------------------------------------------------------


def chart(found: Sequence[Curve], check: Point, x: str, label: str) -> bytes:
    """Plot the distance from converged against calls or seconds, on logarithmic axes.

    Args:
        found: The curves. Samplers that add no noise are on the left, those that add noise on the right.
        check: The distance of the check from the reference, which is shaded.
        x: "calls" or "seconds".
        label: The label of the x axis.

    Returns:
        The chart as PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    plain, noisy = ([curve for curve in found if curve.stochastic is side] for side in (False, True))
    if plain and noisy:  # for comparison, one without noise, measured by distribution too
        compared = next((curve for curve in plain if curve.solver == "dpmpp_2m"), plain[0])
        noisy.insert(0, replace(compared, name=f"({compared.name})", stochastic=True))
    sides = {
        "Without added noise: distance to the converged latents from the same noise": plain,
        "With added noise: distance between the distributions over seeds": noisy,
    }
    sides = {title: side for title, side in sides.items() if side}
    lines = max(map(len, sides.values()))
    figure = Figure(figsize=(7.5 * len(sides), 1.5 + max(4.0, 0.27 * lines)), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    at = [getattr(point, x) for curve in found for point in curve.points]
    values = [curve.distance(point) for side in sides.values() for curve in side for point in curve.points]
    for axes, (title, side) in zip(panels, sides.items(), strict=True):
        axes.set(xscale="log", yscale="log", xlim=(min(at) / 1.15, max(at) * 1.15))
        axes.set_ylim(
            min(values) / 1.2, min(max(values) * 1.2, 4.0)
        )  # so that a diverging sampler does not compress the others
        axes.set_xlabel(label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: as_percent(value))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=True, length=0)
        axes.axhline(NEAR, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
        axes.axhspan(0.0, check.latents.error, color="#f3f3f3")  # below the accuracy of the reference
        _draw_curves(axes, side, x)
    panels[0].set_ylabel("distance (100 %: the picture of another seed)")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw_curves(axes: Axes, side: Sequence[Curve], x: str) -> None:
    """Draw the curves, the first ones coloured, each labelled at the right edge in the order of their ends."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends = []
    for k, curve in enumerate(side):
        colour = COLOURS[k] if k < len(COLOURS) else GREY
        at = [getattr(point, x) for point in curve.points]
        values = [curve.distance(point) for point in curve.points]
        axes.plot(at, values, color=colour, linewidth=2.0 if colour != GREY else 1.2, zorder=3 if colour != GREY else 2)
        faces = ["white" if curve.stochastic and not point.latents.significant else colour for point in curve.points]
        axes.scatter(at, values, s=22, color=faces, edgecolors=colour, zorder=4)
        ends.append((min((math.log(values[-1]) - low) / (high - low), 0.98), at[-1], curve.name, colour))
    ends.sort()
    heights = _spread_out([end[0] for end in ends], 1 / max(24, len(ends)))
    for height, (end, last, name, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            name,
            xy=(last, math.exp(low + end * (high - low))),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=colour if colour != GREY else "#6f6f6f",
            fontsize=9.5,
            fontweight="bold" if colour != GREY else "normal",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.7,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def _spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights as little as possible so that they are `gap` apart, between 0 and 1."""
    groups: list[list[float]] = []  # [wanted middle, number of labels], merged if they would overlap
    for height in wanted:
        groups.append([height, 1.0])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (second, m), (first, n) = groups.pop(), groups.pop()
            groups.append([(first * n + second * m) / (n + m), n + m])
        half = gap * (groups[-1][1] - 1) / 2
        groups[-1][0] = min(max(groups[-1][0], half), 1 - half)
    return [middle + gap * (k - (n - 1) / 2) for middle, n in groups for k in range(int(n))]


# ---- contact sheet and page ------------------------------------------------------------------------------------------


def contact_sheet(folder: Path, rows: Sequence[Row], found: Sequence[Curve], settings: Settings) -> Image.Image:
    """Draw the contact sheet: one row per sampler, one column per number of steps, the converged picture last."""
    own = [row for row in rows if row["prompt"] == settings.prompts[0] and "key" in row]
    keys = {(row["sampler"], row["steps"]): row["key"] for row in own}
    converged = own[0]["reference"]
    font = ImageFont.load_default(14)
    names = [curve.name for curve in found]
    size = CELL + GAP
    left = 12 + max(int(font.getlength(name)) for name in names)
    columns = [*map(str, settings.steps), "converged"]
    sheet = Image.new("RGB", (left + len(columns) * size, HEADER + len(names) * size), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left - 8, HEADER // 2), "steps", INK, font, anchor="rm")
    for column, title in enumerate(columns):
        draw.text((left + column * size + CELL // 2, HEADER // 2), title, INK, font, anchor="mm")
    for line, name in enumerate(names):
        top = HEADER + line * size
        draw.text((left - 8, top + CELL // 2), name, INK, font, anchor="rm")
        for column, key in enumerate([*(keys.get((name, steps)) for steps in settings.steps), converged]):
            if key and (path := thumbnail(folder, key)).exists():
                with Image.open(path) as image:
                    image.thumbnail((CELL, CELL))
                    sheet.paste(image, (left + column * size, top))
    return sheet


STYLE = """
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.answer { font-size: 1.15rem; padding: .8rem 1rem; background: #eef4fa; border-left: 4px solid #0072b2 }
img { max-width: 100%; display: block }
table { margin-top: 1rem; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap } th { font-weight: 600 }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #e4e4e4 }
small, .quiet { color: #666 } .wide { overflow-x: auto }
"""


def page(report: Row, found: Sequence[Curve], check: Point, settings: Settings, images: dict[str, str]) -> str:
    """Return report.html, a single file without scripts or external resources."""
    model = report["model"]
    facts = (
        f"Model <b>{escape(model['name'])}</b>, {model['width']}x{model['height']}, guidance "
        f"{model['guidance_scale']}, {escape(_machine(model))}; {_count(settings.prompts)}, {settings.seeds} seeds"
    )
    first, steps = settings.prompts[0], settings.steps
    notes = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in report["notes"])
    prompts = "".join(f"<li>{escape(prompt)}</li>" for prompt in settings.prompts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Samplers on {escape(model["name"])}</title><style>{STYLE}</style></head><body>
<h1>Which sampler, at how many steps</h1>
<p class="quiet">{facts}</p>
<p class="answer">{escape(report["recommendation"])}</p>
<p>{escape(report["claim"])}</p>
{notes}
<h2>Distance from converged</h2>
<p>100 % is the distance of another seed's picture. The dotted line is at {as_percent(NEAR)}, which counts as converged.
A hollow mark is an upper bound: the distance is within chance, and may be smaller. In parentheses, for comparison, is a
sampler that adds no noise, measured like those that do.</p>
<img alt="Distance from converged against model calls" src="{images["calls"]}">
<div class="wide"><table>
<tr><th>sampler</th><th>calls to {as_percent(NEAR)}</th><th>seconds</th>{"".join(f"<th>{n}</th>" for n in steps)}</tr>
{"".join(_table_row(curve, settings) for curve in found)}
</table></div>
<p class="quiet">For each number of steps: the distance of the latents and, in small type, of the pictures. &sim;: adds
noise, and is compared by distribution; &le;: an upper bound, since the distance is within chance.</p>
<h2>Distance by time</h2>
<img alt="Distance from converged against seconds" src="{images["seconds"]}">
<h2>Pictures</h2>
<p>The first seed of &ldquo;{escape(first)}&rdquo;. Samplers that add noise generate other pictures.</p>
<img alt="Contact sheet, sampler by steps" src="{images["sheet"]}">
<h2>How this was measured</h2>
<ul>
<li><b>Converged</b> means {REFERENCE} with {settings.reference_steps} steps, over all noise levels that the model was
trained on. {CHECK} with half the steps ends {as_percent(check.latents.error)} from it
({check.pictures.error * check.pictures.unit:.2g} levels of 255); smaller distances, shaded in the charts, cannot be
resolved.</li>
<li><b>Samplers that add no noise</b> are compared with the converged picture from the same starting noise: root mean
square difference, averaged over prompts and seeds. The distance may level off above zero: some samplers start or end at
noise levels other than the model's, or round its timesteps; the CFG++ samplers solve a different equation; LCM and TCD
are meant for models distilled for them.</li>
<li><b>Samplers that add noise</b> end at other pictures, which should follow the same distribution as the converged
ones. The distance is the root of the energy distance between the two sets of seeds (Sz&eacute;kely and Rizzo 2013), for
each prompt. If all pictures were moved a tenth of the way to those of another seed, it would be 10 %. It detects
pictures that are shifted, blurred or too similar, but not fine detail, nor which picture is better. With few seeds it
is imprecise; distances of up to two standard deviations count as chance. In the sentence on DDPM, equal means not
farther by more than {as_percent(NEAR)} at the ends of the confidence intervals (non-inferiority, Schuirmann 1987).</li>
<li><b>100 %</b> is the mean distance between the converged pictures of two seeds:
{check.latents.unit:.3g} for latents, {check.pictures.unit:.3g} levels of 255 for pictures.</li>
<li><b>Calls</b> are those of the UNet; the prompt and the negative prompt together count as one. <b>Seconds</b> are for
a whole picture, including encoding the prompt and decoding.</li>
</ul>
<h2>Prompts</h2><ol>{prompts}</ol>
</body></html>
"""


def _table_row(curve: Curve, settings: Settings) -> str:
    """Return a sampler's row of the table."""
    points = {point.steps: point for point in curve.points}
    near = curve.reached()
    cells = [f"{near.calls:g}", f"{near.seconds:.2g}"] if near else ["&ndash;", "&ndash;"]
    name = f"<td>{escape(curve.name)}{' &sim;' if curve.stochastic else ''}</td>"
    return (
        f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}"
        f"{''.join(_cell(curve, points.get(steps)) for steps in settings.steps)}</tr>\n"
    )


def _cell(curve: Curve, point: Point | None) -> str:
    """Return a table cell with the distances of a point, darker for smaller ones."""
    if point is None:
        return "<td>failed</td>"
    shade = min(max(-math.log10(max(curve.distance(point), 1e-3)) / 2, 0.0), 1.0)
    latents, pictures = (_format_distance(curve, distance) for distance in (point.latents, point.pictures))
    return f'<td style="background: rgb(0 114 178 / {0.35 * shade:.2f})">{latents} <small>{pictures}</small></td>'


def _format_distance(curve: Curve, distance: Distance) -> str:
    """Format a distance in the table."""
    if not curve.stochastic:
        return as_percent(distance.error)
    return f"{'' if distance.significant else '&le; '}{as_percent(distance.bound)}"


def _count(prompts: Sequence[str]) -> str:
    """Count prompts in words."""
    return "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"


def _machine(model: Row) -> str:
    """Describe the device that was measured."""
    return f"{model['device']}, {model['dtype']}, CPU threads {model['threads']}"


def _image(kind: str, data: bytes) -> str:
    """Return an image as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
