"""The sampler report: statistics on clouds of known distance, words on invented curves, runs of a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import mezzotint
from mezzotint import cli
from mezzotint.errors import MezzotintError, RequestError
from mezzotint.images.io import from_pil
from mezzotint.models.unet import UNet
from mezzotint.report import page
from mezzotint.report.measure import REFERENCE, Settings, measure
from mezzotint.report.statistics import (
    CHECK_ROW,
    Curve,
    Distance,
    Point,
    Row,
    check_claim,
    make_curves,
    measure_residual,
    recommend,
)
from mezzotint.request import Request
from mezzotint.result import Result

Cloud = NDArray[np.float64]  # (seeds, dimensions)

SETTINGS = Settings(("a lemon",), ("euler", "heun", "ddpm"), (1, 3), seeds=2, reference_steps=6)
REFERENCE_CALLS, CHECK_CALLS, CALLS = 6, 5, (1, 3, 1, 5, 1, 3)  # Heun's in 3 steps are 5


# ---- statistics ------------------------------------------------------------------------------------------------------


def row(own: Cloud, reference: Cloud, *, stochastic: bool = False, prompt: str = "a", **others: Any) -> Row:
    both = np.concatenate([own, reference])
    distances = np.sqrt(((both[:, None] - both[None]) ** 2).mean(-1))
    fields = {"sampler": "x", "solver": "x", "stochastic": stochastic, "steps": 5, "prompt": prompt, "calls": 5.0}
    return fields | {"seconds": 1.0, "latents": distances, "pictures": 2 * distances} | others


def one_point(rows: Sequence[Row]) -> Point:
    (curve,) = make_curves(rows)
    (point,) = curve.points
    return point


def cloud(generator: np.random.Generator, seeds: int = 4, spread: float = 1.0) -> Cloud:
    return spread * generator.standard_normal((seeds, 64))


def test_a_sampler_that_ends_at_the_reference_is_at_no_distance() -> None:
    reference = cloud(np.random.default_rng(0))
    point = one_point([row(reference, reference)])
    assert point.latents.error == point.latents.shift == point.latents.noise == 0.0
    assert point.latents.spread == pytest.approx(1.0)
    pairs = [np.sqrt(((a - b) ** 2).mean()) for i, a in enumerate(reference) for b in reference[:i]]
    assert point.latents.unit == pytest.approx(np.mean(pairs))
    assert point.pictures.unit == pytest.approx(2 * np.mean(pairs))


def test_pictures_all_moved_by_a_part_of_the_unit_measure_that_part() -> None:
    generator = np.random.default_rng(0)
    reference = [cloud(generator, 12) for _ in range(2)]
    unit = one_point([row(r, r) for r in reference]).latents.unit
    moved = [r + np.eye(64)[0] * 8 * 0.2 * unit for r in reference]  # root mean square over 64: sqrt(64) = 8
    distance = one_point(
        [row(m, r, prompt=str(k)) for k, (m, r) in enumerate(zip(moved, reference, strict=True))]
    ).latents
    assert distance.error == pytest.approx(0.2, rel=0.05)
    assert distance.shift == pytest.approx(0.2, rel=0.1)
    assert distance.shift > distance.noise


def test_chance_is_told_from_a_difference() -> None:
    """Other draws of the same distribution pass for it as often as two standard deviations say; a tame one does not."""
    generator = np.random.default_rng(0)
    same, tame = [], []
    for _ in range(300):
        reference = [cloud(generator) for _ in range(4)]
        same.append(one_point([row(cloud(generator), r) for r in reference]).latents)
        tame.append(one_point([row(cloud(generator, spread=0.5), r) for r in reference]).latents)
    assert np.mean([distance.shift > distance.noise for distance in same]) < 0.05
    assert np.mean([distance.shift == 0.0 for distance in same]) == pytest.approx(0.5, abs=0.1)  # unbiased
    assert np.mean([distance.shift > distance.noise for distance in tame]) > 0.95
    assert np.mean([distance.spread for distance in tame]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([distance.error for distance in same]) == pytest.approx(1.0, abs=0.02)  # as far as another seed's


def test_curves_leave_out_what_failed_and_the_check() -> None:
    a, b = cloud(np.random.default_rng(0)), cloud(np.random.default_rng(1))
    rows = [
        row(a, b, sampler=CHECK_ROW, steps=250),
        row(a, b, steps=10),
        row(a, b, steps=5),
        row(a, b, steps=10, prompt="b", seconds=3.0),
        {"sampler": "x", "steps": 5, "prompt": "b", "failure": "it ran away"},
        {"sampler": "y", "steps": 5, "prompt": "b", "failure": "it ran away"},
    ]
    (curve,) = make_curves(rows)
    assert [(point.steps, point.seconds) for point in curve.points] == [(10, 2.0)]
    assert measure_residual(rows).steps == 250
    assert page.notes(rows)[1:] == ["Left out: x at 5 steps: it ran away", "Left out: y at 5 steps: it ran away"]
    doubtful, good = (page.notes([row(a, a + moved, sampler=CHECK_ROW)]) for moved in (0.1, 0.01))
    assert doubtful == ["The reference itself is only accurate to 7 %; use more reference steps."] and good == []


# ---- words -----------------------------------------------------------------------------------------------------------


def curve(
    name: str, distances: dict[int, float], *, stochastic: bool = False, noise: float = 0.0, calls: int = 1
) -> Curve:
    """An invented curve: distance by steps."""
    points = []
    for steps, distance in distances.items():
        latents = Distance(1.0 if stochastic else distance, distance, noise, 1.0, 0.5)
        points.append(Point(steps, calls * steps, 0.1 * steps, latents, latents))
    return Curve(name, name.partition("/")[0], stochastic, tuple(points))


FAST = curve("dpmpp_2m/karras", {6: 0.3, 12: 0.08, 60: 0.01})
SLOW = curve("ddpm", {6: 0.9, 12: 0.5, 60: 0.06}, stochastic=True)


def test_the_recommendation_follows_the_curves() -> None:
    assert recommend([SLOW, FAST]) == (
        "dpmpp_2m/karras at 12 steps (12 model calls) is within 8 % of converged; ddpm needs 60."
    )
    better = replace(SLOW, stochastic=False, points=curve("ddpm", {6: 0.04, 12: 0.02, 60: 0.01}).points)
    assert (
        recommend([better, FAST])
        == "ddpm at 6 steps (6 model calls) is within 4 % of converged; dpmpp_2m/karras needs 12."
    )
    assert recommend([SLOW, FAST], near=0.02) == (
        "dpmpp_2m/karras at 60 steps (60 model calls) is within 1 % of converged; not converged at 60: ddpm."
    )
    assert recommend([SLOW, FAST], near=0.001) == (
        "No sampler came within 0.1 % of converged; the closest is dpmpp_2m/karras at 60 steps (60 model calls), at "
        "1 %. Measure more steps."
    )


def test_the_recommendation_counts_calls_and_what_lasts() -> None:
    twice = curve("heun", {5: 0.3, 8: 0.05}, calls=2)
    once = curve("euler", {10: 0.3, 15: 0.05})
    lucky = curve("lms", {5: 0.05, 10: 0.4, 30: 0.05})  # near at 5 by chance: at 10 it is not
    assert recommend([twice, once, lucky]) == (
        "euler at 15 steps (15 model calls) is within 5 % of converged; heun needs 8 (16 calls), lms needs 30."
    )


def test_not_told_from_chance_is_not_near() -> None:
    hidden = curve("ddpm", {10: 0.3, 60: 0.05}, stochastic=True, noise=0.2)
    assert hidden.reached() is None
    assert recommend([hidden, FAST, curve("lms", {60: 0.3})]).endswith(
        "converged; not converged at 60: lms; inconclusive at 60, with too few seeds: ddpm."
    )
    assert curve("ddpm", {10: 0.05}, stochastic=True, noise=0.06).reached() is not None
    assert curve("euler", {10: 0.05}, noise=0.2).reached() is not None


@pytest.mark.parametrize(
    ("ddpm", "verdict"),
    [
        ({30: 0.2, 50: 0.11}, "holds on this model, to within 10 %"),
        ({30: 0.2, 50: 0.05}, "holds in part on this model, to within 10 %"),
        ({30: 0.01, 50: 0.01}, "does not hold on this model"),
    ],
)
def test_the_claim_is_judged_by_the_curves(ddpm: dict[int, float], verdict: str) -> None:
    ours = curve("dpmpp_2m", {10: 0.2, 15: 0.18, 30: 0.05})
    sentence = check_claim([ours, curve("ddpm", ddpm, stochastic=True)])
    assert verdict in sentence
    assert f"dpmpp_2m at 15 steps 18 %, ddpm at 50 {100 * ddpm[50]:.0f} %" in sentence


def test_the_claim_needs_its_steps() -> None:
    ours = curve("dpmpp_2m", {10: 0.1})
    for found in ([ours], [curve("ddpm", {30: 0.2})], [ours, curve("ddpm", {10: 0.2, 20: 0.2, 60: 0.1})]):
        assert "was not measured" in check_claim(found)


def test_the_claim_is_judged_where_chance_hides_nothing_that_matters() -> None:
    def verdict_on(ours: float, ddpm: float, noise: float) -> str:
        other = curve("ddpm", {30: ddpm}, stochastic=True, noise=noise)
        return check_claim([curve("dpmpp_2m", {10: ours}, noise=0.02), other])

    assert "does not hold" in verdict_on(0.25, 0.06, 0.08)  # ddpm is at most 10 % away
    assert "ddpm at 30 at most 20 %" in verdict_on(0.25, 0.12, 0.16) and "cannot be judged" in verdict_on(
        0.25, 0.12, 0.16
    )
    hidden = verdict_on(0.08, 0.12, 0.3)  # at its best ddpm is 8 % nearer
    assert "holds on this model, to within 10 %, even if ddpm is as close as its uncertainty allows." in hidden
    assert "cannot be judged" in verdict_on(0.099, 0.12, 0.3)  # two standard deviations of ours are above 10 %


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """The UNet's calls, counted; a hook would be an edit of the model, whose rows are others."""
    made: list[None] = []
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *args, **options: made.append(None) or forward(*args, **options))
    return made


@pytest.fixture(scope="module")
def measured(sd1: mezzotint.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A folder with a finished measurement, not to be changed, and its rows."""
    folder = tmp_path_factory.mktemp("measured")
    return folder, measure(sd1, SETTINGS, folder)


@pytest.fixture
def folder(measured: tuple[Path, list[Row]], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(measured[0], tmp_path / "copy"))


def lines(folder: Path) -> list[str]:
    return (folder / "results.jsonl").read_text().splitlines()


def timeless(rows: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_rows_are_what_the_pipeline_draws(sd1: mezzotint.Pipeline, measured: tuple[Path, list[Row]]) -> None:
    folder, rows = measured
    assert [json.loads(line) for line in lines(folder)] == rows
    assert [row["calls"] for row in rows] == [CHECK_CALLS, *CALLS]

    fields: dict[str, Any] = {"prompt": "a lemon", "seed": 0, "count": 2}
    top = sd1.schedule.sigma_max
    noise = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(s)) for s in range(2)])
    reference = sd1.generate(Request(sampler=REFERENCE, steps=6, **fields), latents=noise * (1 + top**-2) ** 0.5)
    drawn = sd1.generate(Request(sampler="euler", steps=3, **fields))
    (row,) = (row for row in rows if (row["sampler"], row["steps"]) == ("euler", 3))
    for name, own, other in (
        ("latents", [*drawn.latents], [*reference.latents]),
        ("pictures", *([127.5 * from_pil(image) for image in result.images] for result in (drawn, reference))),
    ):
        both = torch.stack([*own, *other]).double().flatten(1)
        expected = torch.cdist(both, both) / both.shape[1] ** 0.5
        torch.testing.assert_close(torch.tensor(row[name], dtype=torch.float64), expected, rtol=1e-4, atol=1e-4)


def test_errors_fall_towards_the_reference(sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    rows = measure(sd1, Settings(("a lemon",), ("euler/karras",), (4, 16), seeds=2, reference_steps=80), tmp_path)
    ((coarse, fine),) = (curve.points for curve in make_curves(rows))
    assert coarse.latents.error > 1.5 * fine.latents.error > 4 * measure_residual(rows).latents.error


def test_finished_rows_are_never_run_again(
    sd1: mezzotint.Pipeline, calls: list[None], measured: tuple[Path, list[Row]], folder: Path
) -> None:
    def again(settings: Settings = SETTINGS) -> list[Row]:
        calls.clear()
        rows = measure(sd1, settings, folder)
        del calls[:2]  # two steps to warm up
        return rows

    assert again() == measured[1] and not calls
    whole = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(whole[:-20])  # killed in the midst of the last line
    assert timeless(again()) == timeless(measured[1]) and len(calls) == 2 * CALLS[-1]
    assert len(lines(folder)) == len(measured[1])
    again(replace(SETTINGS, steps=(1, 2, 3)))
    assert len(calls) == 2 * (2 + 3 + 2)
    again(replace(SETTINGS, guidance_scale=5.0, samplers=("euler",)))
    assert len(calls) == 2 * (REFERENCE_CALLS + CHECK_CALLS + 1 + 3)


def test_a_later_field_of_requests_leaves_the_rows_valid(
    sd1: mezzotint.Pipeline, calls: list[None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(Request):
        later: int | None = None

    monkeypatch.setattr("mezzotint.report.measure.Request", Later)
    measure(sd1, SETTINGS, folder)
    assert len(calls) == 2  # to warm up


def test_another_model_starts_its_own_rows(
    sd1: mezzotint.Pipeline, calls: list[None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sd1.parts), "identity", {"unet/diffusion_pytorch_model.safetensors": "another"})
    measure(sd1, replace(SETTINGS, samplers=("euler",)), folder)
    assert len(calls) == 2 + 2 * (REFERENCE_CALLS + CHECK_CALLS + 1 + 3)


def test_stopping_keeps_what_is_finished(
    sd1: mezzotint.Pipeline, calls: list[None], measured: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if (tmp_path / "results.jsonl").exists() and len(lines(tmp_path)) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(sd1, SETTINGS, tmp_path, stop)
    assert lines(tmp_path)[2:] and all(a < b for a, b in pairwise(seen))
    calls.clear()
    seen.clear()
    rows = measure(sd1, SETTINGS, tmp_path, lambda done, total: seen.append((done, total)))
    assert timeless(rows) == timeless(measured[1])
    assert len(calls) == 2 + 2 * sum(CALLS[2:])  # neither the reference nor the three
    assert seen[-1][0] == seen[-1][1]


def test_pictures_are_let_go(sd1: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = sd1.generate
    made: list[weakref.ref[Image.Image]] = []

    def counting(*arguments: Any, **options: Any) -> Any:
        assert not any(image() for image in made)
        result = generate(*arguments, **options)
        if isinstance(result, Result):  # not the list of the call for one request inside it
            made.extend(map(weakref.ref, result.images))
        return result

    monkeypatch.setattr(sd1, "generate", counting)
    measure(sd1, replace(SETTINGS, samplers=("euler",)), tmp_path)
    assert len(made) == 1 + 2 * (2 + 2)


def test_a_sampler_that_fails_leaves_the_others(
    sd1: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, plan = sd1.generate, sd1.plan

    def diverges(request: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(request, Request) and request.sampler == "euler" and request.steps == 1:
            raise MezzotintError("the picture has values that are not numbers")
        return generate(request, *arguments, **options)

    def rejects(request: Request) -> Any:
        if request.sampler == "heun":
            raise RequestError("heun is not for this model")
        return plan(request)

    monkeypatch.setattr(sd1, "generate", diverges)
    monkeypatch.setattr(sd1, "plan", rejects)
    rows = measure(sd1, SETTINGS, tmp_path)
    assert [(curve.name, [point.steps for point in curve.points]) for curve in make_curves(rows)] == [
        ("euler", [3]),
        ("ddpm", [1, 3]),
    ]
    assert page.notes(rows)[-2:] == [
        "Left out: euler at 1 steps: the picture has values that are not numbers",
        "Left out: heun at 1, 3 steps: heun is not for this model",
    ]
    with pytest.raises(RequestError, match=r"none of the samplers runs on this model: heun is not for this model"):
        measure(sd1, replace(SETTINGS, samplers=("heun",)), tmp_path)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_report_is_whole(measured: tuple[Path, list[Row]], folder: Path) -> None:
    settings = replace(SETTINGS, prompts=("a <lemon>",))
    rows = [row | {"prompt": "a <lemon>"} for row in measured[1]]
    record = page.write(folder, rows, settings)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(record))
    assert record["recommendation"] == recommend(page.ranked(make_curves(rows)))
    html = (folder / "report.html").read_text()
    assert record["recommendation"] in html and "a &lt;lemon&gt;" in html and "<lemon>" not in html
    assert "http" not in html and "<script" not in html
    sources = re.findall(r'src="([^"]{22})', html)
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:image/png", "data:image/webp"]
    for name in ("error-calls.png", "error-seconds.png"):
        with Image.open(folder / name) as image:
            assert image.width > 1000 and image.height > 500

    with Image.open(folder / "contact-sheet.png") as sheet, sheet.convert("RGB") as sheet:
        own = {(row["sampler"], row["steps"]): row["key"] for row in rows if row["prompt"] == "a <lemon>"}
        left = sheet.width - 3 * (page.CELL + 4)
        for line, name in enumerate(curve["name"] for curve in record["curves"]):
            for column, steps in enumerate(settings.steps):
                with Image.open(folder / "pictures" / f"{own[name, steps]}.png") as small:
                    corner = left + column * (page.CELL + 4), 26 + line * (page.CELL + 4)
                    cut = sheet.crop((*corner, corner[0] + small.width, corner[1] + small.height))
                    assert cut.tobytes() == small.convert("RGB").tobytes()


def test_names_next_to_the_chart_do_not_overlap() -> None:
    wanted = [0.0, 0.01, 0.02, 0.5, 0.7, 0.705, 0.99, 1.0]
    heights = page._spread_out(wanted, 0.05)
    assert all(b - a > 0.0499 for a, b in pairwise(heights))
    assert heights[0] == 0.0 and heights[3] == 0.5 and heights[-1] == 1.0
    crowded = page._spread_out([0.5] * 20, 1 / 24)
    assert np.diff(crowded) == pytest.approx([1 / 24] * 19) and np.mean(crowded) == pytest.approx(0.5)


# ---- the command -----------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`mezzotint report` in this process, in a folder with prompts.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    Path("prompts.txt").write_text("a lemon\n\n a blue lemon \na lemon\n")

    def run(options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mezzotint", "report", *options.split()])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(done.value.code or 0), *capsys.readouterr()

    return run


QUICK = "--prompts prompts.txt --out out --samplers euler,ddpm --steps 2,1 --seeds 2 --reference-steps 4"


def test_the_command(run: Run, sd1: mezzotint.Pipeline, monkeypatch: pytest.MonkeyPatch, calls: list[None]) -> None:
    monkeypatch.setattr(mezzotint, "load", lambda *_, **__: sd1, raising=False)
    code, out, err = run(QUICK)
    assert code == 0 and err.startswith("The reference itself is only accurate to")
    text = out
    calls.clear()
    code, out, err = run(f"{QUICK} --json")
    record = json.loads(out)
    assert text == f"{record['recommendation']}\n{record['claim']}\nWrote out/report.html\n"
    assert record["recommendation"] != record["claim"]
    assert (code, len(calls)) == (0, 2)
    assert record["settings"]["prompts"] == ["a lemon", "a blue lemon"]
    assert record["settings"]["steps"] == [1, 2]
    assert {curve["name"] for curve in record["curves"]} == {"euler", "ddpm"}


def test_without_out_the_folder_is_named_report_and_names_are_those_of_the_table(
    run: Run, sd1: mezzotint.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mezzotint, "load", lambda *_, **__: sd1, raising=False)
    options = "--prompts prompts.txt --samplers EULER,Dpmpp-2M/KARRAS,euler --steps 1 --seeds 2 --reference-steps 2"
    code, out, _ = run(f"{options} --json")
    assert code == 0 and Path("report/report.html").is_file()
    assert json.loads(out)["settings"]["samplers"] == ["euler", "dpmpp_2m/karras"]


def test_ctrl_c(run: Run, sd1: mezzotint.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mezzotint, "load", lambda *_, **__: sd1, raising=False)
    monkeypatch.setattr("mezzotint.report.measure.measure", interrupted)
    right = "Stopped; finished results are in out/results.jsonl, and the same command continues from there\n"
    assert run(QUICK) == (130, "", right)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--samplers eular", "sampler is 'eular'; did you mean euler"),
        ("--samplers euler/karas", "spacing is 'karas'; did you mean karras"),
        ("--samplers euler,,ddpm", "sampler is ''"),
        ("--steps 5,many", "steps is '5,many'; it must be whole numbers separated by commas, such as 5,10,20"),
        ("--steps 5,0", "steps is 0; it must be a whole number from 1 to 1000"),
        ("--seeds 1", "seeds is 1; it must be at least 2"),
        ("--steps 5 --reference-steps 8", "reference_steps is 8; it must be at most 1000 and at least twice"),
        ("--prompts none.txt", "prompts is 'none.txt', which cannot be read (No such file or directory)"),
        ("--prompts empty.txt", "prompts is 'empty.txt', which has no prompts; it must have one prompt per line"),
        ("--prompts binary.txt", "prompts is 'binary.txt', which cannot be read (it is not UTF-8)"),
        ("--out empty.txt", "out is 'empty.txt', which cannot be used (File exists)"),
    ],
)
def test_bad_input_is_answered_before_a_model_is_loaded(
    options: str, sentence: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mezzotint, "load", load, raising=False)
    Path("empty.txt").write_text("\n  \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    code, out, err = run(f"{QUICK} {options}")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {sentence}")


def test_all_is_every_solver_and_matplotlib_is_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.parse(Path("prompts.txt"), "all", "5").samplers == tuple(mezzotint.samplers.SOLVERS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(QUICK)
    assert code == 2 and 'pip install "mezzotint[report]"' in err
