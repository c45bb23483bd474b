"""recipes/emoji/evaluate.py: the judge's rules and figures, without training it; sheet.py's list."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import evaluate
import scenes as data

SPECS = [spec for _, spec in data.Scenes.prompts(40, seed=1)]


class Oracle(evaluate.Judge):
    """Logits that say exactly what the specs say, whatever the pixels."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = tuple(torch.zeros(len(SPECS), *size) for size in ((5, 120), (12,), (3,), (7,)))
        for b, spec in enumerate(SPECS):
            layout = evaluate.layout_of(spec)
            windows = range(5)[evaluate.places(layout)]
            for window, number in zip(windows, evaluate.in_place(spec), strict=True):
                heads[0][b, window, number] = 9
            heads[1][b, list(data.BACKGROUNDS).index(spec.background)] = 9
            heads[2][b, layout] = 9
            heads[3][b, evaluate.recolour_of(spec)] = 9
        return heads


def test_a_perfect_judge_finds_everything_and_shuffled_prompts_nearly_nothing() -> None:
    pixels = torch.zeros(len(SPECS), 3, 128, 128)
    right = evaluate.verdicts(Oracle(), pixels, SPECS)
    assert [len(right[column]) for column in evaluate.COLUMNS] == [30, 40, 10, 10, 10]
    assert all(all(answers) for answers in right.values())
    wrong = evaluate.verdicts(Oracle(), pixels, evaluate.shuffled(SPECS))
    assert np.mean(wrong["object"]) < 0.1
    assert np.mean(wrong["background"]) < 0.4
    assert np.mean(wrong["both objects"]) < 0.3


def test_shuffled_keeps_each_place_its_kind() -> None:
    other = evaluate.shuffled(SPECS)
    assert [spec.kind for spec in other] == [spec.kind for spec in SPECS]
    assert sum(a == b for a, b in zip(SPECS, other, strict=True)) <= 2
    assert sorted(map(str, other)) == sorted(map(str, SPECS))


def test_objects_are_read_left_to_right_and_top_to_bottom() -> None:
    def spec(relation: str) -> data.Spec:
        return data.Spec("pair", data.NAMES[:2], "red", (52, 52), ((32, 64), (96, 64)), relation)

    assert [evaluate.in_place(spec(r)) for r in ("left of", "above")] == [[0, 1]] * 2
    assert [evaluate.in_place(spec(r)) for r in ("right of", "below")] == [[1, 0]] * 2


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


def test_pictures_round_trip() -> None:
    pixels = torch.randint(0, 256, (2, 3, 128, 128)).float() / 127.5 - 1
    assert torch.allclose(evaluate.to_pixels(data.to_images(pixels)), pixels, atol=1e-6)


def test_training_the_judge_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first checkpoint and started again, it ends with the same weights."""
    atlas = torch.zeros(len(data.SIZES), 120, 128, 128, 4, dtype=torch.uint8)
    monkeypatch.setattr(data, "build_atlas", lambda: atlas)
    monkeypatch.setattr(evaluate, "JUDGE_BATCH", 6)
    monkeypatch.setattr(evaluate, "JUDGE_SAVE_EVERY", 2)

    class KilledError(Exception):
        pass

    def kill(text: str) -> None:
        raise KilledError(text)

    whole = evaluate.train_judge(tmp_path / "a.pt", "cpu", steps=4, report=lambda text: None)
    with pytest.raises(KilledError, match="step 2 of 4"):
        evaluate.train_judge(tmp_path / "b.pt", "cpu", steps=4, report=kill)
    resumed = evaluate.train_judge(tmp_path / "b.pt", "cpu", steps=4, report=lambda text: None)
    assert not resumed.training
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_the_table_is_markdown() -> None:
    row = evaluate.figures({"object": [True, True, False, True], "background": [True], "recolour": []})
    text = evaluate.table({"the model's pictures": row})
    assert text.splitlines()[0] == "| on held-out combinations | object (n=4) | background (n=1) |"
    assert "| the model's pictures | 75 % (30-95) | 100 % (21-100) |" in text


def test_the_sheet_marks_what_is_held_out() -> None:
    tree = ast.parse(Path(evaluate.__file__).with_name("sheet.py").read_text(encoding="utf-8"))
    (prompts,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROMPTS"
    )
    assert len(prompts) == 16
    for prompt in prompts:
        text = prompt.removesuffix(" *")
        names = sorted(name for name in data.NAMES if f" {name} " in text)
        ground = text.split(" on ")[1].split()[1]
        tints = [colour for colour in data.RECOLOURS if f"{colour} {names[0]}" in text]
        held = (
            data.is_held_out(*names)
            if len(names) == 2
            else any(data.is_held_out(names[0], "coloured", c) for c in tints)
        )
        held |= any(data.is_held_out(name, "on", ground) for name in names)
        assert held == prompt.endswith("*"), prompt
