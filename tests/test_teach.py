"""The showing of docs/teach.md, all but its training: the drawings, the recipes, what is recognised, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import drawings
import judge
import scenes
import show
import words
from mezzotint.train.recipe import Recipe

TEACH = Path(show.__file__).parent

FEW = 4  # of the model's objects
COLOURS = torch.cat([torch.randint(0, 256, (len(words.NAMES), 3)), torch.full((len(words.NAMES), 1), 255)], 1).byte()
ATLAS = {size: COLOURS[:, None, None].expand(-1, size, size, -1) for size in scenes.SIZES}


def test_the_drawings_have_captions_that_say_where_they_are(tmp_path: Path) -> None:
    drawings.draw_pictures(tmp_path)
    for name, count, thing in (
        ("lighthouse", 16, "a lighthouse on"),
        ("sks", 6, "a sks ghost on"),
        ("boo", 6, "<boo> on"),
    ):
        paths = sorted((tmp_path / name).glob("*.png"))
        assert len({path.read_bytes() for path in paths}) == count, "no two alike"
        for path in paths:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
            ground = next(g for g in words.GROUNDS if caption == f"{thing} {words.ground_words(g)['ground']}")
            with Image.open(path) as image:
                assert image.size == (scenes.SIDE,) * 2 and image.mode == "RGB"
                assert image.getpixel((0, 0)) == tuple(drawings.grounds()[words.GROUNDS.index(ground)][0, 0])


def test_what_is_taught_is_nothing_that_the_model_knows() -> None:
    known = {word for name in words.NAMES for word in name.split()}
    assert not known & {"lighthouse", "sks", "boo"}
    assert not {*show.UNSEEN} & {*drawings.LIGHTHOUSE_GROUNDS, *drawings.GHOST_GROUNDS}
    assert len(show.UNSEEN) == 24


@pytest.mark.parametrize("name", show.RUNS)
def test_the_recipes_are_recipes(name: str) -> None:
    method, file = show.RUNS[name]
    recipe = Recipe.of(method, TEACH / file, {"data": "pictures"})
    assert recipe.steps <= 1000 and recipe.schedule == "cosine"


def test_what_must_be_kept_is_drawn_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def pipe(caption: str, seed: int) -> Image.Image:
        asked.append(caption)
        return Image.new("RGB", (8, 8))

    for _ in range(2):
        show.draw_kept(pipe, tmp_path)  # type: ignore[arg-type]
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted(tmp_path.glob("*.txt"))]
    assert captions == asked and len(asked) == show.KEPT == len(list(tmp_path.glob("*.png")))


def test_each_thing_is_recognised_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a judge that has learnt nothing a picture is still nearest to its own rendering."""
    monkeypatch.setattr(show, "NAMES", words.NAMES[:FEW])
    monkeypatch.setattr(show, "UNSEEN", show.RENDERED_ON)
    torch.manual_seed(0)
    net = judge.Judge().eval()
    looks = show.Looks(net, scenes.Scenes(0, atlas=ATLAS))
    assert looks.means.shape == (FEW + 2, 256)
    for number, glyph in ((FEW, drawings.lighthouse()), (FEW + 1, drawings.ghost())):
        pictures = [drawings.picture(glyph, g, drawings.corner(n)) for n, g in enumerate(show.RENDERED_ON)]
        pixels = show.to_pixels(pictures)
        scores = [looks.score(pixels, thing)["recognised"] for thing in range(FEW + 2)]
        assert max(range(FEW + 2), key=scores.__getitem__) == number
        assert sum(scores) == 1


def test_before_stands_above_after(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(pipe: Any, prompts: list[str], settings: dict[str, Any]) -> torch.Tensor:
        return torch.full((len(prompts), 3, 128, 128), 1.0 if settings else -1.0)

    monkeypatch.setattr(show, "draw", draw)
    sheet = show.before_and_after(None, "lighthouse", {"loras": ()})  # type: ignore[arg-type]
    cell = sheet.height // 4
    shades = [sheet.getpixel((84, row * cell + 60)) for row in range(4)]
    assert shades == [(0, 0, 0), (255, 255, 255)] * 2


def test_the_page_has_the_figures_between_its_marks(tmp_path: Path) -> None:
    page = TEACH.parents[1] / "docs" / "teach.md"
    (tmp_path / "teach.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    found = show.table({"a lighthouse": {"recognised": 0.5, "background": 1.0}}, "thing")
    for _ in range(2):  # again, and nothing is doubled
        show.write_docs(tmp_path, {"pictures": Image.new("RGB", (8, 8))}, found)
    text = (tmp_path / "teach.md").read_text(encoding="utf-8")
    assert text.count("| a lighthouse | 50 % | 100 % |") == 1
    assert [text.count(mark) for mark in show.MARKS] == [1, 1]
    assert text.split(show.MARKS[0])[0] == page.read_text(encoding="utf-8").split(show.MARKS[0])[0]
    assert (tmp_path / "images" / "teach" / "pictures.png").is_file()


def test_the_whole_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is trained by the command with its pictures, scored and shown; the model's drawing is stood in for."""
    commands: list[list[str]] = []

    class Model:
        vae = None

        def __call__(self, caption: str, seed: int) -> Image.Image:
            return Image.new("RGB", (128, 128))

    class Looks:
        def score(self, pixels: torch.Tensor, thing: int) -> dict[str, float]:
            assert pixels.shape == (24, 3, 128, 128)
            return {"recognised": 0.25, "background": 0.5}

    def draw(pipe: Any, prompts: list[str], settings: dict[str, Any]) -> torch.Tensor:
        assert not ("<boo>" in prompts[0] and not settings and len(prompts) == 24), "a word that is not there yet"
        return torch.zeros(len(prompts), 3, 128, 128)

    monkeypatch.setattr(show.mezzotint, "load", lambda model, device: Model())
    monkeypatch.setattr(show.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(show, "build_atlas", lambda: ATLAS)
    monkeypatch.setattr(show, "train_judge", lambda path, device, atlas, steps: judge.Judge().eval())
    monkeypatch.setattr(show, "Looks", lambda net, scenes: Looks())
    monkeypatch.setattr(show, "draw", draw)
    monkeypatch.setattr(show, "reconstruct", lambda vae, pixels: pixels)
    docs = tmp_path / "docs"
    docs.mkdir()
    page = TEACH.parents[1] / "docs" / "teach.md"
    (docs / "teach.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["show.py", "--out", str(out), "--prompts", "10", "--docs", str(docs)])
    show.main()
    assert [command[4] for command in commands] == ["lora", "dreambooth", "textual-inversion"]
    assert len(list((out / "pictures" / "lighthouse").glob("*.png"))) == 16 + show.KEPT
    assert f"class_folder={out / 'pictures' / 'kept'}" in commands[1]
    assert {path.stem for path in (docs / "images" / "teach").iterdir()} == {"pictures", *show.RUNS}
    text = (docs / "teach.md").read_text(encoding="utf-8")
    assert "| a ghost: after | 25 % | 50 % |" in text and "| after the run `sks` |" in text
