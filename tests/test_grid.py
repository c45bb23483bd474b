"""Grids: which cells, where they stand on the sheet, what is kept, and how a wrong axis is answered."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mezzotint
from mezzotint import cli, grid
from mezzotint.errors import RequestError
from mezzotint.pipeline import Pipeline
from mezzotint.request import Request

OWN = {"width": 40, "height": 24, "steps": 3, "guidance_scale": 7.5, "sampler": "euler", "batch": 1}
COLOURS = {"lemon": (250, 220, 10), "whale": (20, 60, 200)}
PAPER = (255, 255, 255)


class FakePipeline:
    """Draws the colour of the first object in the prompt, its red level the steps."""

    device, dtype = torch.device("cpu"), torch.float32
    parts = SimpleNamespace(identity={"weights": "abc"})
    notices = ()
    remarks: tuple[str, ...] = ()  # on each picture

    def __init__(self) -> None:
        self.drawn: list[Request] = []

    def resolve(self, request: Request) -> Request:
        if request.sampler == "heun" and request.eta:
            raise RequestError("heun takes no eta")
        return request.replace(**{name: value for name, value in OWN.items() if getattr(request, name) is None})

    def generate(self, request: Request, *, on_step: Callable[[int, int], None]) -> Any:
        self.drawn.append(request)
        for step in range(request.steps or 0):
            on_step(step + 1, request.steps or 0)
        image = Image.new("RGB", (request.width or 0, request.height or 0), colour(request))
        return SimpleNamespace(images=[image], notices=tuple(remark.format(request) for remark in self.remarks))


def colour(request: Request) -> tuple[int, int, int]:
    _, green, blue = COLOURS["lemon" if "lemon" in request.prompt else "whale"]
    return request.steps or 0, green, blue


LEMON = Request(prompt="a lemon (lemon:1.2)", negative_prompt="no lemon")


def test_cells_are_every_combination_and_stand_where_the_axes_say(tmp_path: Path) -> None:
    pipe: Any = FakePipeline()
    plan = grid.plan_grid(pipe, LEMON, "steps=1,2,3", "prompt=lemon,whale", "seed=5,6")
    assert plan.shape == (3, 2, 2)
    wanted = [
        (seed, what, steps) for seed in (5, 6) for what in ("lemon", "whale") for steps in (1, 2, 3)
    ]  # rows of x, below one another y, and of these z
    assert [(cell.seed, cell.prompt, cell.negative_prompt, cell.steps) for cell in plan.cells] == [
        (seed, f"a {what} ({what}:1.2)", f"no {what}", steps) for seed, what, steps in wanted
    ]
    sheet = np.asarray(grid.sheet(plan, grid.draw(pipe, plan, tmp_path / "cells")))
    runs: list[tuple[int, int, int]] = []
    for row in sheet:  # (W, 3): the colours of whole cells, each row of cells once
        found = [pixel for pixel in map(tuple, row.tolist()) if pixel[1:] in {c[1:] for c in COLOURS.values()}]
        if found and found != runs[-len(found) :]:
            runs += found
    assert [runs[k] for k in range(0, len(runs), 40)] == [colour(cell) for cell in plan.cells]
    assert (sheet == PAPER).all(axis=-1).mean() > 0.2, "labels and gaps"
    assert tuple(sheet[0, 0]) == PAPER


def test_each_notice_is_told_once(tmp_path: Path) -> None:
    pipe, told = FakePipeline(), list[str]()
    pipe.remarks = ("a notice", "{0.steps} steps")
    plan = grid.plan_grid(pipe, LEMON, "steps=1,2", "seed=5,6")  # type: ignore[arg-type]
    grid.draw(pipe, plan, tmp_path / "cells", on_notice=told.append)  # type: ignore[arg-type]
    assert told == ["a notice", "1 steps", "2 steps"]


def test_labels_are_next_to_the_cells_and_do_not_touch_them(tmp_path: Path) -> None:
    pipe: Any = FakePipeline()
    words = "lemon,whale with a name that is far too long for one line and " + "w" * 200
    plan = grid.plan_grid(pipe, LEMON, f"prompt={words}", "guidance_scale=3,[9,3]", "sampler=euler,ddim")
    sheet = np.asarray(grid.sheet(plan, grid.draw(pipe, plan, tmp_path)))
    bare = grid.plan_grid(pipe, LEMON, "steps=1,2")
    plain = np.asarray(grid.sheet(bare, grid.draw(pipe, bare, tmp_path)))
    assert sheet.shape[0] > 2 * plain.shape[0] and sheet.shape[1] > plain.shape[1] + 40
    dark = (sheet < 100).all(axis=-1)  # letters; no cell is that dark
    assert dark.any()
    cells = (sheet[..., 1] == COLOURS["lemon"][1]) | (sheet[..., 1] == COLOURS["whale"][1])
    assert cells.sum() >= 8 * 40 * 24, "all cells are whole"
    assert not dark[:, -grid.GAP :].any() and not dark[-grid.GAP :].any(), "no letter is cut off"


def test_pictures_may_be_larger_than_their_requests(tmp_path: Path) -> None:
    """As hires and outpaint make them."""
    plan = grid.plan_grid(FakePipeline(), LEMON, "steps=1,2")  # type: ignore[arg-type]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, width in zip(paths, (40, 80), strict=True):
        Image.new("RGB", (width, 24), (1, 2, 3)).save(path)
    sheet = np.asarray(grid.sheet(plan, paths))
    assert (sheet == (1, 2, 3)).all(axis=-1).sum() == (40 + 80) * 24


def test_a_grid_that_grows_draws_what_is_new(tmp_path: Path) -> None:
    pipe: Any = FakePipeline()
    paths = grid.draw(pipe, grid.plan_grid(pipe, LEMON, "steps=1,2"), tmp_path)
    assert len(pipe.drawn) == 2 and pipe.drawn[0].seed == 0
    longer = grid.draw(pipe, grid.plan_grid(pipe, LEMON, "steps=2,3,1"), tmp_path)
    assert [request.steps for request in pipe.drawn] == [1, 2, 3]
    assert [longer[2], longer[0]] == paths
    pipe.parts = SimpleNamespace(identity={"weights": "other"})
    assert not set(grid.draw(pipe, grid.plan_grid(pipe, LEMON, "steps=1,2"), tmp_path)) & set(paths)


def test_a_grid_that_is_stopped_goes_on(tmp_path: Path) -> None:
    pipe: Any = FakePipeline()
    plan = grid.plan_grid(pipe, LEMON, "steps=1,2,3,4")
    told: list[tuple[int, int]] = []

    def on_step(done: int, total: int) -> None:
        told.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid.draw(pipe, plan, tmp_path, on_step)
    assert told == [(k, 10) for k in (1, 2, 3, 4, 5)]
    assert len(list(tmp_path.iterdir())) == 2, "the cells of 1 and 2 steps"
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        grid.draw(pipe, plan, tmp_path, on_step)
    assert told == [(k, 7) for k in (1, 2, 3, 4, 5)]
    assert [request.steps for request in pipe.drawn] == [1, 2, 3, 3, 4]


def test_a_cell_is_the_picture_that_generate_draws(sd1: Pipeline, tmp_path: Path) -> None:
    plan = grid.plan_grid(sd1, Request(prompt="a lemon", seed=3), "steps=1,2", "sampler=ddim,DPM++ 2M Karras")
    for path, cell in zip(grid.draw(sd1, plan, tmp_path), plan.cells, strict=True):
        wanted = sd1.generate(cell).images[0]
        with Image.open(path) as image:
            assert image.tobytes() == wanted.tobytes()
            assert json.loads(image.info["mezzotint"]) == json.loads(wanted.info["mezzotint"])
    names = [(cell.sampler, cell.spacing, cell.steps) for cell in plan.cells[::2]]
    assert names == [("ddim", "leading", 1), ("DPM++ 2M Karras", "karras", 1)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("steps=10,20", (10, 20)),
        ("guidance_scale=3, 7.5, [9, 3]", (3, 7.5, [9, 3])),
        ("sampler=euler, DPM++ 2M Karras", ("euler", "DPM++ 2M Karras")),
        ('prompt=lemon,"a lemon, cut",[lemon:whale:0.5]', ("lemon", "a lemon, cut", "[lemon:whale:0.5]")),
        ("prompt=1,2", ("1", "2")),
        ('negative_prompt="",dark', None),
    ],
)
def test_values_of_an_axis(text: str, values: Any) -> None:
    if values is None:
        with pytest.raises(RequestError, match="a value of negative_prompt is empty"):
            grid.Axis.parse("x", text)
    else:
        assert grid.Axis.parse("x", text).values == values


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        (["steps"], "x is 'steps'; it must be FIELD=VALUE,VALUE"),
        (["stepz=1,2"], "no field 'stepz'; the nearest is steps"),
        (["steps=1,x"], "steps is 'x'; it must be a whole number"),
        (["steps=1,0"], "steps is 0; it must be a whole number from 1 to 1000"),
        (["steps="], "a value of steps is empty"),
        (["steps=1,1"], "a value of steps occurs twice"),
        (["count=1,2"], "x is count, which cannot be an axis"),
        (["steps=1,2", "steps=3"], "steps is the field of two axes"),
        (["prompt=orange,lemon"], "begins with 'orange', which is not in the prompt"),
        (["sampler=eulr"], "eulr"),
        (["eta=0.5", "sampler=euler_a,heun"], "heun takes no eta"),
        ([f"seed={','.join(map(str, range(40)))}", f"steps={','.join(map(str, range(1, 41)))}"], "1,600 cells"),
        (["width=2048", f"seed={','.join(map(str, range(7)))}", "height=8192"], "must have at most 100,000,000 pixels"),
    ],
)
def test_a_wrong_axis_is_a_sentence_before_anything_is_drawn(axes: list[str], sentence: str) -> None:
    pipe: Any = FakePipeline()
    with pytest.raises(RequestError) as error:
        grid.plan_grid(pipe, LEMON, *axes)
    assert sentence in str(error.value)
    assert not pipe.drawn


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = FakePipeline()
    monkeypatch.setattr(mezzotint, "load", lambda *_, **__: pipe, raising=False)
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["mezzotint", "grid", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0, *capsys.readouterr()

    asked = "--x", "steps=1,2,3", "--y", "prompt=lemon,whale"
    code, out, err = run("a lemon", *asked, "--set", "seed=9")
    with Image.open("grid.png") as image:
        assert (code, out, err) == (0, f"Wrote grid.png (3 x 2 cells, {image.width}x{image.height})\n", "")
    assert {request.seed for request in pipe.drawn} == {9} and len(pipe.drawn) == 6
    code, out, _ = run("a lemon", *asked, "--set", "seed=9", "--json")
    record = json.loads(out)
    assert [cell["request"]["steps"] for cell in record["cells"]] == [1, 2, 3, 1, 2, 3]
    assert all((tmp_path / cell["path"]).parent == tmp_path / "grid-cells" for cell in record["cells"])
    assert len(pipe.drawn) == 6, "nothing is drawn twice"
    for arguments, sentence in [
        (("a lemon", "--x", "steps=0,1"), "steps is 0"),
        (("a lemon", *asked, "--out", "grid.gif"), "out is 'grid.gif'; it must be a file name ending in .png"),
        (("a lemon", *asked, "--out", "grid-cells"), "a folder"),
        (("a lemon", *asked, "--set", "prompt=b"), "prompt is given twice"),
    ]:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and sentence in err
