"""recipes/emoji/judge.py and evaluate.py: what is asked, the figures, a few steps of training; sheet.py's list."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

import evaluate
import judge
import scenes as data
import sheet
import words

SPECS = [spec for _, spec in data.Scenes.prompts(60, seed=1, core=False)]
# Every object a square of its own colour, with no memory to speak of and no font.
COLOURS = torch.cat([torch.randint(0, 256, (len(words.NAMES), 3)), torch.full((len(words.NAMES), 1), 255)], 1).byte()
ATLAS = {size: COLOURS[:, None, None].expand(-1, size, size, -1) for size in data.SIZES}


def pair(relation: str, first: str = "lemon", second: str = "whale") -> words.Spec:
    sizes, corners = zip(*data.layout(relation, None, None, data.Random(0)), strict=True)
    return words.Spec("pair", (first, second), "red", sizes, corners, relation)


class Oracle(judge.Judge):
    """Logits that say exactly what given specs say, whatever the pixels."""

    def __init__(self, specs: list[words.Spec]) -> None:
        super().__init__()
        self.specs = specs

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = ((len(judge.WINDOWS), len(words.NAMES)), (len(words.GROUNDS),), (len(judge.PLACES),), (7,))
        heads = tuple(torch.zeros(len(self.specs), *size) for size in sizes)
        for b, spec in enumerate(self.specs):
            for window, number in judge.standing(spec):
                heads[0][b, window, number] = 9
            heads[1][b, words.GROUNDS.index(spec.background)] = 9
            heads[2][b, judge.layout_of(spec)] = 9
            heads[3][b, judge.recolour_of(spec)] = 9
        return heads


def judged(shown: words.Spec, asked: words.Spec) -> dict[str, bool]:
    """The verdicts on a picture of one spec when the prompt was another."""
    answers = evaluate.verdicts(Oracle([shown]), torch.zeros(1, 3, 128, 128), [asked])
    return {column: given[0] for column, given in answers.items() if given}


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_a_perfect_judge_finds_everything_and_shuffled_prompts_nearly_nothing() -> None:
    pixels = torch.zeros(len(SPECS), 3, 128, 128)
    right = evaluate.verdicts(Oracle(SPECS), pixels, SPECS)
    counts = dict.fromkeys(("background", "ground colour", "everything"), 60)
    counts |= {"object": 36, "both objects": 18, "relation": 18, "recolour": 12, "count": 6}
    assert {column: len(answers) for column, answers in right.items()} == counts
    assert all(all(answers) for answers in right.values())
    wrong = evaluate.verdicts(Oracle(SPECS), pixels, evaluate.shuffled(SPECS))
    assert np.mean(wrong["object"]) < 0.1
    assert np.mean(wrong["background"]) < 0.3
    assert np.mean(wrong["both objects"]) < 0.2
    assert np.mean(wrong["everything"]) < 0.05


def test_shuffled_keeps_each_place_its_kind() -> None:
    other = evaluate.shuffled(SPECS)
    assert [spec.kind for spec in other] == [spec.kind for spec in SPECS]
    assert sum(a == b for a, b in zip(SPECS, other, strict=True)) <= 2
    assert sorted(map(str, other)) == sorted(map(str, SPECS))


@pytest.mark.parametrize(
    ("asked", "shown", "both", "relation"),
    [
        ("left of", pair("right of", "whale", "lemon"), True, True),  # the same picture in other words
        ("left of", pair("right of"), True, False),
        ("left of", pair("above"), True, False),
        ("left of", pair("left of", "lemon", "dog"), False, True),  # still likelier than the other way round
        ("above", pair("below", "whale", "lemon"), True, True),
        ("above", pair("below"), True, False),
        ("inside", pair("inside"), True, True),
        ("inside", pair("inside", "whale", "lemon"), True, False),
        ("next to", pair("next to", "whale", "lemon"), True, True),  # has no order
        ("next to", pair("above"), True, False),
    ],
)
def test_verdicts_on_pairs(asked: str, shown: words.Spec, both: bool, relation: bool) -> None:
    found = judged(shown, pair(asked))
    assert (found["both objects"], found["relation"]) == (both, relation)
    assert found["everything"] == (both and relation)


def test_verdicts_on_counts_grounds_and_colours() -> None:
    def spec(number: str | None, name: str = "lemon", ground: str = "red", tint: str | None = None) -> words.Spec:
        count = words.NUMBERS[number] if number else 1
        return words.Spec("", (name,) * count, ground, (40,) * count, ((0, 0),) * count, None, tint, None, number)

    assert judged(spec("two"), spec("two"))["count"]
    assert not judged(spec("two"), spec("three"))["count"]
    assert not judged(spec(None), spec("two"))["count"]
    assert not judged(spec("three", "whale"), spec("three"))["count"]
    striped = judged(spec(None, ground="red stripes"), spec(None))
    assert (striped["object"], striped["background"], striped["ground colour"]) == (True, False, True)
    assert not judged(spec(None, ground="blue stripes"), spec(None, ground="red stripes"))["ground colour"]
    assert judged(spec(None, tint="blue"), spec(None, tint="blue"))["recolour"]
    assert not judged(spec(None), spec(None, tint="blue"))["recolour"]
    assert "recolour" not in judged(spec(None), spec(None))


# ---- the judge -------------------------------------------------------------------------------------------------------


def test_every_object_stands_in_its_window_with_room_to_shift() -> None:
    _, specs = data.Scenes(5).specs(range(600))
    seen = set()
    for spec in specs:
        assert len(judge.PLACES[judge.layout_of(spec)]) == len(spec.objects)
        windows = judge.PLACES[judge.layout_of(spec)]
        numbers = [words.NAMES.index(name) for name in spec.objects]
        for window, number in judge.standing(spec):
            k = numbers.index(number)
            if spec.number:
                k = sorted(range(len(numbers)), key=lambda n: spec.corners[n])[windows.index(window)]
            left, top, side = judge.WINDOWS[window]
            spare = 0 if side == 128 else judge.SHIFT
            for start, corner in zip((left, top), spec.corners[k], strict=True):
                assert start + spare <= corner
                assert corner + spec.sizes[k] <= start + side - spare
            seen.add(window)
    assert seen == set(range(len(judge.WINDOWS)))


def test_a_view_is_the_window_enlarged() -> None:
    columns = torch.arange(128.0).expand(1, 3, 128, 128)
    for window, (left, _, side) in enumerate(judge.WINDOWS):
        seen = judge.view(columns, window)
        centres = left + (torch.arange(64) + 0.5) * side / 64 - 0.5
        assert torch.allclose(seen[0, 0, 0], centres.clamp(max(left, 0), min(left + side, 128) - 1), atol=1e-4), window
        assert torch.equal(seen, seen[:, :, :1].expand_as(seen))


def test_roughened_pictures_move_by_at_most_the_shift() -> None:
    square = torch.full((40, 3, 128, 128), -1.0)
    square[..., 60:68, 60:68] = 1
    rough = judge.roughen(square.clone(), torch.Generator().manual_seed(0))
    assert torch.equal(rough, judge.roughen(square.clone(), torch.Generator().manual_seed(0)))
    weight = (rough.mean(1) + 1).clamp(min=0) * (rough.mean(1) > 0)
    axis = torch.arange(128.0)
    moved = (weight.sum(1) * axis).sum(1) / weight.sum((1, 2)) - 63.5
    assert 3 < moved.abs().max() < judge.SHIFT + 0.5
    assert moved.std() > 1, "all pictures move alike"


def test_the_judge_learns_what_it_is_shown() -> None:
    torch.manual_seed(0)
    pixels, _, specs = judge.judge_scenes("cpu", ATLAS).batch(range(12))
    student = judge.Judge()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = judge.judge_loss(student, pixels, specs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(len(words.NAMES)) + math.log(38 * 5 * 7), rel=0.2)  # knows nothing
    assert losses[-1] < losses[0] / 3


def test_training_the_judge_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first checkpoint and started again, it ends with the same weights."""
    monkeypatch.setattr(judge, "BATCH", 8)
    monkeypatch.setattr(judge, "SAVE_EVERY", 2)

    class KilledError(Exception):
        pass

    def kill(text: str) -> None:
        raise KilledError(text)

    whole = judge.train_judge(tmp_path / "a.pt", "cpu", ATLAS, 4, report=lambda text: None)
    with pytest.raises(KilledError, match="step 2 of 4"):
        judge.train_judge(tmp_path / "b.pt", "cpu", ATLAS, 4, report=kill)
    resumed = judge.train_judge(tmp_path / "b.pt", "cpu", ATLAS, 4, report=lambda text: None)
    assert not resumed.training
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_judge_of_other_scenes_or_steps_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = judge.fingerprint(4, ATLAS)
    assert mark == judge.fingerprint(4, dict(ATLAS))
    assert mark != judge.fingerprint(5, ATLAS)
    assert mark != judge.fingerprint(4, ATLAS | {88: ATLAS[88].flip(0)})
    monkeypatch.setattr(judge, "CORE_SHARE", 0.9)
    assert mark != judge.fingerprint(4, ATLAS)


# ---- the figures -----------------------------------------------------------------------------------------------------


def test_wilson_interval() -> None:
    assert evaluate.wilson(0, 0) == (0, 1)
    assert np.allclose(evaluate.wilson(9, 10), (0.596, 0.982), atol=1e-3)
    low, high = evaluate.wilson(240, 240)
    assert high == pytest.approx(1)
    assert low == pytest.approx(0.984, abs=1e-3)


def test_psnr_and_ssim() -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 3, 40, 40, dtype=torch.float64) * 2 - 1
    assert evaluate.psnr(a, a + 0.2)[0].item() == pytest.approx(20 * math.log10(2 / 0.2))
    assert torch.allclose(evaluate.ssim(a, a), torch.ones(2, dtype=torch.float64))
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    x, y = ((t[0, 0].numpy() + 1) / 2 for t in (a, b))

    def local(z: np.ndarray) -> np.ndarray:
        return gaussian_filter(z, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = local(x), local(y)
    vx, vy, vxy = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert evaluate.ssim(a[:1, :1], b[:1, :1]).item() == pytest.approx(expected.mean())


def gaussian(seed: int, mean: list[float], root: torch.Tensor) -> torch.Tensor:
    """A sample with exactly this mean and the covariance root @ root.T."""
    x = torch.randn(200, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return white @ root.T + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_gaussians() -> None:
    a = gaussian(0, [0.0, 0.0], torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)))
    b = gaussian(1, [1.0, 2.0], torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet(a, b) == pytest.approx(1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2)  # mean, then deviations
    roots = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    c, d = (gaussian(k + 3, [0.0] * 5, root) for k, root in enumerate(roots))  # covariances that do not commute
    first, second = ((root @ root.T).numpy() for root in roots)
    expected = np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert evaluate.frechet(c, d) == pytest.approx(expected)


def test_nearest_is_the_nearest_and_how_far() -> None:
    pool = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    numbers, apart = evaluate.nearest(pool[[7, 3]] + 0.1, pool)
    assert numbers.tolist() == [7, 3]
    assert torch.allclose(apart, torch.full((2,), 0.1), atol=1e-5)


def test_pictures_round_trip() -> None:
    pixels = torch.randint(0, 256, (2, 3, 128, 128)).float() / 127.5 - 1
    assert torch.allclose(evaluate.to_pixels(data.to_images(pixels)), pixels, atol=1e-6)


def test_the_table_is_markdown() -> None:
    row = evaluate.figures({"object": [True, True, False, True], "background": [True], "recolour": []})
    text = evaluate.table({"real": row, "shuffled": row}, {"real": 1.234})
    assert text.splitlines()[0] == "| on held-out combinations | object (n=4) | background (n=1) | Fréchet |"
    assert "| real | 75 % (30-95) | 100 % (21-100) | 1.23 |" in text
    assert "| shuffled | 75 % (30-95) | 100 % (21-100) |  |" in text


# ---- the sheet -------------------------------------------------------------------------------------------------------


def combinations(prompt: str) -> list[tuple[str, ...]]:
    """What a prompt of the sheet asks for, read from its words: the longest object names, its ground, tint, number."""
    text, places = prompt, {}
    for name in sorted(words.NAMES, key=len, reverse=True):
        for form in (words.plural(name), name):
            if (at := f" {text} ".find(f" {form} ")) >= 0:
                places[at] = name
                text = f" {text} ".replace(f" {form} ", f" {'_' * len(form)} ")[1:-1]
    names = [places[at] for at in sorted(places)]
    (ground,) = [g for g in words.GROUNDS if prompt.endswith((f" on {words.ground_words(g)['ground']}",))]
    found: list[tuple[str, ...]] = [(name, "on", ground) for name in names]
    found += [(names[0], "coloured", tint) for tint in words.RECOLOURS if prompt.startswith(f"a {tint} ")]
    found += [(names[0], "times", number) for number in words.NUMBERS if prompt.startswith(f"{number} ")]
    return found + ([tuple(sorted(names))] if len(names) == 2 else [])


@pytest.mark.parametrize("prompt", sheet.PROMPTS)
def test_the_sheet_marks_what_is_held_out(prompt: str) -> None:
    asked = combinations(prompt.removesuffix(" *"))
    assert 1 <= len(asked) <= 3
    assert any(words.is_held_out(*combination) for combination in asked) == prompt.endswith(" *"), asked


def test_the_sheet_shows_every_kind_of_prompt() -> None:
    assert len(sheet.PROMPTS) == len(set(sheet.PROMPTS)) == 64
    asked = [combinations(prompt.removesuffix(" *")) for prompt in sheet.PROMPTS]
    assert sum(any(set(c) & set(words.MORE_NAMES) for c in combos) for combos in asked) >= 10
    wordings = [wording for _, forms in words.RELATIONS.values() for wording in forms[:1]]
    for wording in (*wordings, *words.SIZE_WORDS, *words.NUMBERS, "striped", "gradient", *words.PLACES):
        assert any(f" {wording} " in f" {prompt} " for prompt in sheet.PROMPTS), wording


@pytest.mark.parametrize("grain", [0.0, 0.05])
def test_the_sheet_keeps_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grain: float) -> None:
    monkeypatch.setattr(sheet, "LIMIT", 130_000)
    pixels = torch.linspace(-1, 1, 32).expand(64, 3, 32, 32)
    images = data.to_images(pixels + grain * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    sheet.draw_sheet(images, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size < 130_000
    drawn = evaluate.to_pixels([Image.open(tmp_path / "sheet.png")])[0, :, 4:36, 68:100]
    apart = (drawn - evaluate.to_pixels(images[:1])[0]).abs().mean()
    assert (apart > 1e-3) == (grain > 0), "only what is too big loses colours"
    assert apart < 0.1
