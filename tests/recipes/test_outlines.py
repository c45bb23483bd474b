"""recipes/emoji/outlines.py: the scenes that the bundled model's ControlNet is trained on and judged by."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

import outlines as data
import scenes
import words

SIZES = {"small", "large", "tiny", "big"}


def test_words_name_neither_size_nor_place_and_no_held_out_scene_is_trained_on() -> None:
    for held_out in (False, True):
        made = data.Outlines(1, held_out)
        found = [made.scene(index) for index in range(300)]
        assert found[7] == data.Outlines(1, held_out).scene(7)
        own = {name: set(" ".join((name, *words.OTHER_WORDS.get(name, ()))).split()) for name in words.NAMES}
        assert not any((SIZES & set(scene.caption.split())) - own[scene.name] for scene in found)
        assert all(words.is_held_out(scene.name, "on", scene.background) == held_out for scene in found)
        ends = [(x, y, x + scene.side, y + scene.side) for scene in found for x, y in [scene.corner]]
        assert min(min(end) for end in ends) == 0 and max(max(end) for end in ends) == scenes.SIDE
        assert {scene.side for scene in found} == set(data.SIZES)


def test_filling_an_outline_gives_the_silhouette() -> None:
    silhouette = np.zeros((128, 128), dtype=bool)
    silhouette[0:50, 20:90] = True  # at the edge, where beyond the canvas is outside
    silhouette[60:128, 64:128] = True
    line = data.outline(silhouette)
    assert (ndimage.binary_fill_holes(line) == silhouette).all()
    assert line[0, 50] and line[1, 50] and not line[2, 50] and line[127, 100] and not line[100, 100]


@pytest.mark.skipif(not scenes.FONT.is_file(), reason=f"no emoji font at {scenes.FONT}")
def test_the_silhouette_is_what_is_drawn() -> None:
    made = data.Outlines(2, held_out=True)
    found = [made.scene(index) for index in range(6)]
    pixels, silhouettes = made.compose(found)
    for scene, picture, silhouette in zip(found, pixels, silhouettes, strict=True):
        (x, y), side = scene.corner, scene.side
        outside = np.ones((128, 128), dtype=bool)
        outside[y : y + side, x : x + side] = False
        assert not silhouette[outside].any() and silhouette.sum() > side * side / 10
        assert np.ptp(picture.numpy()[:, outside], axis=1).max() < 1e-6
