"""recipes/emoji/scenes.py: what is trained on. The logic is tested with a synthetic atlas, the glyphs with the font."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scenes as data

needs_font = pytest.mark.skipif(
    not data.FONT.is_file(), reason=f"no emoji font at {data.FONT} (Debian: apt install fonts-noto-color-emoji)"
)


def synthetic_atlas() -> torch.Tensor:
    """The atlas's shape and rules (centred, premultiplied, within its size) without the font: soft random squares."""
    random = np.random.default_rng(0)
    atlas = np.zeros((len(data.SIZES), len(data.NAMES), data.SIDE, data.SIDE, 4), dtype=np.uint8)
    for s, size in enumerate(data.SIZES):
        start = (data.SIDE - size) // 2
        square = random.integers(0, 256, (size, size, 4), dtype=np.uint8)
        square[..., :3] = np.minimum(square[..., :3], square[..., 3:])
        atlas[s, :, start : start + size, start : start + size] = square
        atlas[s, :, data.SIDE // 2, data.SIDE // 2] = np.arange(len(data.NAMES))[:, None]  # tells the objects apart
    return torch.from_numpy(atlas)


ATLAS = synthetic_atlas()
GOLDEN_CAPTIONS = [
    "a cactus on a grey background",
    "a large duck on an orange background",
    "a teal background with a chicken",
]
GOLDEN_PROMPTS = [
    "a rose on a brown background",
    "an owl below a rose on a blue background",
    "a green background with a monkey",
]


def test_the_core_set_is_120_distinct_plain_names() -> None:
    assert len(data.OBJECTS) == 120
    assert len(set(data.OBJECTS.values())) == 120
    assert all(name == name.lower().strip() and len(name.split()) <= 2 for name in data.NAMES)
    assert not set(data.NAMES) & set(data.BACKGROUNDS), "a name that is also a colour makes captions ambiguous"
    assert set(data.NAMES) >= data.NO_ARTICLE


def test_colours_are_well_separated() -> None:
    rgb = np.array(list(data.BACKGROUNDS.values()), dtype=float)
    apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 1e9 * np.eye(len(rgb))
    assert len(rgb) == 12
    assert apart.min() > 60
    assert set(data.RECOLOURS) <= set(data.BACKGROUNDS)


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    scenes = data.Scenes(5, atlas=ATLAS)
    pixels, captions, specs = scenes.batch(range(24))
    assert pixels.shape == (24, 3, 128, 128)
    assert pixels.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1
    again = data.Scenes(5, atlas=ATLAS).batch([17, 3, 17])  # another object, another order, another batch size
    for k, i in enumerate((17, 3, 17)):
        assert torch.equal(again[0][k], pixels[i])
        assert (again[1][k], again[2][k]) == (captions[i], specs[i])
    assert data.Scenes(6).specs(range(24)) != (captions, specs)


def test_numbers_are_uniform_and_unrelated() -> None:
    u = data.uniforms(3, range(4000), 4)
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.std() - 12**-0.5) < 0.01
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.06
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.06


def test_first_scenes_never_change() -> None:
    """The figures of a trained model hold only as long as the same scenes come: a golden record of three."""
    assert data.Scenes(0).specs(range(3))[0] == GOLDEN_CAPTIONS
    assert [caption for caption, _ in data.Scenes.prompts(3)] == GOLDEN_PROMPTS


def combinations(spec: data.Spec) -> list[tuple[str, ...]]:
    """Every combination that a picture of `spec` would teach."""
    shown: list[tuple[str, ...]] = [(name, "on", spec.background) for name in spec.objects]
    if spec.recolour:
        shown.append((spec.objects[0], "coloured", spec.recolour))
    if len(spec.objects) == 2:
        shown.append(tuple(sorted(spec.objects)))
    return shown


def test_held_out_combinations_are_never_trained() -> None:
    for spec in data.Scenes(0).specs(range(20_000))[1]:
        assert not any(data.is_held_out(*words) for words in combinations(spec)), spec


def test_the_held_out_split_shows_nothing_else() -> None:
    key = {"single": 0, "sized": 0, "recoloured": 1, "pair": -1}
    captions, specs = data.Scenes(0, held_out=True).specs(range(4_000))
    for caption, spec in zip(captions, specs, strict=True):
        assert data.is_held_out(*combinations(spec)[key[spec.kind]]), spec
        assert any(word in caption for word in data.SPELLINGS.get(spec.background, (spec.background,))), caption
    for table in (data.HELD_GROUND, data.HELD_COLOUR, data.HELD_PAIR):
        assert 0.05 < table.mean() < 0.11
    assert data.HELD_GROUND.sum(1).max() <= 6, "each object keeps at least half of its backgrounds"


def test_the_mixture_is_as_written() -> None:
    specs = data.Scenes(1).specs(range(10_000))[1]
    for kind, share in data.SHARES.items():
        assert abs(sum(spec.kind == kind for spec in specs) / len(specs) - share) < 0.02
    assert {name for spec in specs for name in spec.objects} == set(data.NAMES)
    assert {spec.background for spec in specs} == set(data.BACKGROUNDS)
    assert {spec.recolour for spec in specs} == {None, *data.RECOLOURS}
    assert all(spec.recolour != spec.background for spec in specs)


def test_relations_are_true_and_nothing_is_cut_or_covered() -> None:
    axis, sign = {"left of": 0, "right of": 0, "above": 1, "below": 1}, {"left of": 1, "right of": -1, "above": 1}
    for spec in data.Scenes(2).specs(range(3_000))[1]:
        for size, position in zip(spec.sizes, spec.positions, strict=True):
            assert size in data.SIZES
            assert all(size / 2 <= p <= data.SIDE - size / 2 for p in position)
        if spec.relation:
            a, b = (position[axis[spec.relation]] for position in spec.positions)
            assert (b - a) * sign.get(spec.relation, -1) >= max(spec.sizes)


def test_composition_is_pillows_alpha_composite() -> None:
    scenes = data.Scenes(9, atlas=ATLAS, shares={"single": 0.5, "pair": 0.5})
    pixels, _, specs = scenes.batch(range(8))
    assert {len(spec.objects) for spec in specs} == {1, 2}
    for picture, spec in zip(pixels, specs, strict=True):
        expected = Image.new("RGBA", (data.SIDE, data.SIDE), data.BACKGROUNDS[spec.background])
        for name, size, (x, y) in zip(spec.objects, spec.sizes, spec.positions, strict=True):
            glyph = ATLAS[data.SIZES.index(size), data.NAMES.index(name)].numpy().tobytes()
            premultiplied = Image.frombytes("RGBa", (data.SIDE, data.SIDE), glyph)
            layer = Image.new("RGBA", (data.SIDE, data.SIDE))
            layer.paste(premultiplied.convert("RGBA"), (x - data.SIDE // 2, y - data.SIDE // 2))
            expected = Image.alpha_composite(expected, layer)
        got = np.array(data.to_images(picture[None])[0]).astype(int)
        assert np.abs(got - np.array(expected.convert("RGB")).astype(int)).max() <= 2  # Pillow rounds at each layer


def test_recolouring_keeps_the_outline_and_takes_the_hue() -> None:
    glyphs = ATLAS[3, :6].float()
    colours = torch.tensor(list(data.RECOLOURS.values()), dtype=torch.float32)
    painted = data.recolour(glyphs, colours)
    assert torch.equal(painted[..., 3], glyphs[..., 3])
    assert (painted[..., :3] <= painted[..., 3:] + 1e-3).all()
    mean = painted[..., :3].mean((1, 2))
    hue, hues = (rgb - rgb.amin(1, keepdim=True) for rgb in (mean, colours))  # without its share of white
    nearest = torch.nn.functional.cosine_similarity(hue[:, None], hues[None], dim=-1).argmax(1)
    assert nearest.tolist() == list(range(6))


def test_captions_read_well() -> None:
    captions, specs = data.Scenes(4).specs(range(6_000))
    for caption, spec in zip(captions, specs, strict=True):
        assert all(name in caption for name in spec.objects)
        assert all(word in caption for word in (spec.recolour, spec.size_word) if word)
        words = caption.replace(",", "").split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou" and word != "unicorn"), caption
                assert word not in ("grapes", "fries", "cherries", "bread"), caption
        assert "  " not in caption
    named = sum(caption.split()[-1] in data.NAMES and "ground" not in caption for caption in captions)
    assert named / len(captions) < 0.08, "few captions leave the background open"


def test_caption_words_cover_every_caption() -> None:
    known = {word for text in data.caption_words() for word in text.replace(",", " ,").split()}
    used = {word for caption in data.Scenes(8).specs(range(8_000))[0] for word in caption.replace(",", " ,").split()}
    assert used <= known


def test_prompts_are_fixed_and_held_out() -> None:
    prompts = data.Scenes.prompts(40, seed=3)
    assert prompts == data.Scenes.prompts(40, seed=3)
    assert prompts[:10] == data.Scenes.prompts(10, seed=3)
    kinds = [spec.kind for _, spec in prompts]
    assert (kinds.count("single"), kinds.count("pair"), kinds.count("recoloured")) == (20, 10, 10)


def test_a_missing_font_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        data.build_atlas(font=tmp_path / "none.ttf")


def test_contact_sheet_holds_every_picture() -> None:
    pictures = data.to_images(torch.zeros(5, 3, 128, 128))
    sheet = data.contact_sheet(pictures, ["a very long prompt that has to be wrapped somewhere"] * 5, columns=4)
    assert sheet.size == (4 * 168, 2 * 166)


@needs_font
def test_the_font_draws_every_object_differently() -> None:
    atlas = data.build_atlas()
    assert atlas.shape == (len(data.SIZES), 120, 128, 128, 4)
    assert (atlas[..., :3] <= atlas[..., 3:]).all(), "premultiplied"
    border = torch.cat([atlas[:, :, edge].flatten(2) for edge in (0, -1)], -1)
    assert not border.any(), "clamped shifts rely on an empty border"
    small = torch.nn.functional.avg_pool2d(atlas[4].permute(0, 3, 1, 2).float(), 8).flatten(1)
    apart = torch.cdist(small, small) + 1e9 * torch.eye(len(small))
    assert apart.min() > 150, [data.NAMES[i] for i in divmod(int(apart.argmin()), len(small))]
    pixels, _, _ = data.Scenes(0, atlas=atlas).batch(range(4))
    assert pixels.std() > 0.2
