"""recipes/emoji/scenes.py: what is trained on. The logic is tested with a synthetic atlas, the glyphs with the font."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scenes as data
import words

needs_font = pytest.mark.skipif(
    not data.FONT.is_file(), reason=f"no emoji font at {data.FONT} (Debian: apt install fonts-noto-color-emoji)"
)


def synthetic_atlas() -> dict[int, torch.Tensor]:
    """The atlas's shape and rules (premultiplied) without the font: soft random squares."""
    random = np.random.default_rng(0)
    atlas = {}
    for size in data.SIZES:
        square = random.integers(0, 256, (size, size, 4), dtype=np.uint8)
        square[..., :3] = np.minimum(square[..., :3], square[..., 3:])
        glyphs = np.repeat(square[None], len(words.NAMES), 0)
        glyphs[:, size // 2, size // 2] = np.arange(len(words.NAMES))[:, None] % 256  # tells the objects apart
        atlas[size] = torch.from_numpy(glyphs)
    return atlas


ATLAS = synthetic_atlas()
GOLDEN_CAPTIONS = [
    "a cooked rice above a pager on a green background",
    "a laptop on a green background",
    "three lions, orange stripes",
]
GOLDEN_PROMPTS = [
    "a tangerine on a white background",
    "a castle above a lock, green background",
    "a turtle, a black background",
]


def test_the_core_set_is_120_distinct_plain_names() -> None:
    assert len(words.CORE_NAMES) == 120 and words.NAMES[:120] == words.CORE_NAMES
    assert all(name == name.lower().strip() and len(name.split()) <= 2 for name in words.CORE_NAMES)
    assert set(words.CORE_NAMES) >= words.NO_ARTICLE


def test_names_are_one_emoji_each_and_no_other_word_of_a_caption() -> None:
    assert len({emoji.replace("\ufe0f", "") for emoji in words.OBJECTS.values()}) == len(words.NAMES) > 1_000
    taken = {*words.GROUNDS, *words.RELATIONS, *words.NUMBERS, *words.SIZE_WORDS}
    assert not taken & set(words.NAMES)
    recoloured = {f"{colour} {name}" for colour in words.RECOLOURS for name in words.CORE_NAMES}
    assert not recoloured & set(words.NAMES), "a blue book may mean one thing only"
    others = [word for name in words.OTHER_WORDS for word in words.OTHER_WORDS[name]]
    assert len(others) == len(set(others)), "another word for two objects names neither"
    assert set(words.OTHER_WORDS) <= set(words.NAMES) and not set(others) & (taken | set(words.NAMES))


def test_colours_are_well_separated() -> None:
    rgb = np.array(list(words.BACKGROUNDS.values()), dtype=float)
    apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 1e9 * np.eye(len(rgb))
    assert len(rgb) == 12
    assert apart.min() > 60
    assert set(words.RECOLOURS) <= set(words.BACKGROUNDS)


def test_backgrounds_are_what_their_names_say() -> None:
    grounds = dict(zip(words.GROUNDS, data.build_grounds().float(), strict=True))
    for colour, rgb in words.BACKGROUNDS.items():
        expected = torch.tensor(rgb, dtype=torch.float32)
        assert (grounds[colour] == expected).all()
        stripes, gradient = grounds[f"{colour} stripes"], grounds[f"{colour} gradient"]
        assert (stripes[:, :16] == expected).all() and (stripes[:, 16:32] == stripes[0, 16]).all()
        assert (stripes[0, 16] - expected).norm() > 30 and (stripes[:, 96] == expected).all()
        assert (gradient[-1] == expected).all() and (gradient[:, 0] == gradient[:, 77]).all()
        steps = gradient[:, 0].diff(dim=0)
        assert ((steps >= 0) | (steps <= 0)).all() and (gradient[0] - gradient[-1]).norm(dim=-1).min() > 30
    assert grounds["night sky"].mean() < 80 < 200 < grounds["night sky"].max()
    assert grounds["grass"][100, 5, 1] > grounds["grass"][100, 5, 2] and grounds["grass"][10, 5, 2] > 200


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


def test_first_scenes_never_change() -> None:
    """The figures of a trained model hold only as long as the same scenes come: a golden record of three."""
    assert data.Scenes(0).specs(range(3))[0] == GOLDEN_CAPTIONS
    assert [caption for caption, _ in data.Scenes.prompts(3)] == GOLDEN_PROMPTS


def test_held_out_combinations_are_never_trained() -> None:
    for spec in data.Scenes(0).specs(range(20_000))[1]:
        assert not any(words.is_held_out(*combination) for combination in words.combinations(spec)), spec


def test_a_picture_shows_these_combinations() -> None:
    """The assumption of the two tests next to this one, by hand."""

    def spec(*objects: str, **fields: str) -> data.Spec:
        return data.Spec("", objects, "red", (56,) * len(objects), ((0, 0),) * len(objects), **fields)

    lemon, whale = ("lemon", "on", "red"), ("whale", "on", "red")
    assert words.combinations(spec("lemon")) == [lemon]
    assert words.combinations(spec("lemon", recolour="blue")) == [lemon, ("lemon", "coloured", "blue")]
    assert words.combinations(spec("lemon", "lemon", number="two")) == [lemon, ("lemon", "times", "two")]
    assert words.combinations(spec("whale", "lemon", relation="inside")) == [whale, lemon, ("lemon", "whale")]


def test_the_held_out_split_shows_nothing_else() -> None:
    captions, specs = data.Scenes(0, held_out=True).specs(range(4_000))
    for caption, spec in zip(captions, specs, strict=True):
        *others, own = words.combinations(spec)
        assert words.is_held_out(*own) and not any(words.is_held_out(*other) for other in others), spec
        assert spec.background.split()[0].replace("grey", "gr") in caption, caption
    share = np.mean([words.is_held_out(a, "on", b) for a in words.NAMES for b in words.GROUNDS])
    assert abs(share - words.HELD_OUT_SHARE) < 0.01


def test_the_mixture_is_as_written() -> None:
    specs = data.Scenes(1).specs(range(40_000))[1]
    for kind, share in data.SHARES.items():
        assert abs(sum(spec.kind == kind for spec in specs) / len(specs) - share) < 0.02
    for relation, (share, _) in words.RELATIONS.items():
        assert abs(sum(spec.relation == relation for spec in specs) / len(specs) - share * data.SHARES["pair"]) < 0.02
    core = sum(set(spec.objects) <= set(words.CORE_NAMES) for spec in specs if spec.kind != "counted")
    assert abs(core / sum(spec.kind != "counted" for spec in specs) - data.CORE_SHARE) < 0.02
    assert {name for spec in specs for name in spec.objects} == set(words.NAMES)
    assert {spec.background for spec in specs} == set(words.GROUNDS)
    assert {spec.recolour for spec in specs} == {None, *words.RECOLOURS}
    assert {spec.number for spec in specs} == {None, *words.NUMBERS}
    assert not any(spec.recolour and spec.background.startswith(spec.recolour) for spec in specs)


def test_relations_are_true_and_nothing_is_cut_or_covered() -> None:
    for spec in data.Scenes(2).specs(range(5_000))[1]:
        boxes = [(x, y, x + size, y + size) for size, (x, y) in zip(spec.sizes, spec.corners, strict=True)]
        assert all(0 <= a < b <= data.SIDE and a % 8 == 0 for x, y, r, b_ in boxes for a, b in ((x, r), (y, b_))), spec
        if spec.number == "three":
            assert len(boxes) == 3 and all(a[2] <= b[0] and a[1] == b[1] for a, b in pairwise(boxes))
        elif len(boxes) == 2:
            (ax, ay, ar, ab), (bx, by, br, bb) = boxes
            true = {
                "left of": ar <= bx and ay == by,
                "right of": br <= ax and ay == by,
                "above": ab <= by and ax == bx,
                "below": bb <= ay and ax == bx,
                "inside": bx + 16 <= ax and ar + 16 <= br and by + 16 <= ay and ab + 16 <= bb,
                "next to": ay == by and (ar <= bx or br <= ax),
                None: ay == by and ar <= bx,  # two of one kind
            }
            assert true[spec.relation], spec


def test_composition_is_pillows_alpha_composite() -> None:
    scenes = data.Scenes(9, atlas=ATLAS, shares={"single": 0.3, "pair": 0.5, "counted": 0.2})
    pixels, _, specs = scenes.batch(range(48))
    assert {len(spec.objects) for spec in specs} == {1, 2, 3} and "inside" in {spec.relation for spec in specs}
    grounds = data.build_grounds()
    for picture, spec in zip(pixels, specs, strict=True):
        expected = Image.fromarray(grounds[words.GROUNDS.index(spec.background)].numpy()).convert("RGBA")
        for name, size, corner in reversed(list(zip(spec.objects, spec.sizes, spec.corners, strict=True))):
            glyph = ATLAS[size][words.NAMES.index(name)].numpy().tobytes()
            layer = Image.new("RGBA", (data.SIDE, data.SIDE))
            layer.paste(Image.frombytes("RGBa", (size, size), glyph).convert("RGBA"), corner)
            expected = Image.alpha_composite(expected, layer)
        got = np.array(data.to_images(picture[None])[0]).astype(int)
        assert np.abs(got - np.array(expected.convert("RGB")).astype(int)).max() <= 2  # Pillow rounds at each layer


def test_recolouring_keeps_the_outline_and_takes_the_hue() -> None:
    glyphs = ATLAS[88][:6].float()
    colours = torch.tensor(list(data.RECOLOURS.values()), dtype=torch.float32)
    painted = data.recolour(glyphs, colours)
    assert torch.equal(painted[..., 3], glyphs[..., 3])
    assert (painted[..., :3] <= painted[..., 3:] + 1e-3).all()
    mean = painted[..., :3].mean((1, 2))
    hue, hues = (rgb - rgb.amin(1, keepdim=True) for rgb in (mean, colours))  # without its share of white
    nearest = torch.nn.functional.cosine_similarity(hue[:, None], hues[None], dim=-1).argmax(1)
    assert nearest.tolist() == list(range(6))


def test_captions_read_well() -> None:
    captions, specs = data.Scenes(4, core_share=1.0).specs(range(6_000))
    other = 0
    for caption, spec in zip(captions, specs, strict=True):
        said = [words.plural(name) if spec.number else name for name in spec.objects]
        other += not all(name in caption for name in said)
        assert all(word in caption for word in (spec.recolour, spec.size_word, spec.number) if word)
        spoken = caption.replace(",", "").split()
        for article, word in pairwise(spoken):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou" and word != "unicorn"), caption
                assert word not in ("grapes", "fries", "cherries", "bread", "two", "three", "grass"), caption
        assert "  " not in caption
    assert 0 < other / len(captions) < 0.06, "few captions use another word for their object"
    grounds = [*words.BACKGROUNDS, "gray", *words.PATTERNS, "stri", "sky", "grass"]
    bare = sum(not any(ground in caption for ground in grounds) for caption in captions)
    assert 0 < bare / len(captions) < 0.08, "few captions leave the background open"


def test_plurals() -> None:
    singulars = ("lemon", "palm tree", "fox", "bus", "trophy", "monkey", "mouse", "snowman", "fish", "maple leaf")
    assert ", ".join(map(words.plural, singulars)) == (
        "lemons, palm trees, foxes, buses, trophies, monkeys, mice, snowmen, fish, maple leaves"
    )


def test_caption_words_cover_every_caption() -> None:
    known = {word for text in words.caption_words() for word in text.replace(",", " ,").split()}
    used = {word for caption in data.Scenes(8).specs(range(8_000))[0] for word in caption.replace(",", " ,").split()}
    assert used <= known


def test_prompts_are_fixed_and_held_out() -> None:
    prompts = data.Scenes.prompts(40, seed=3)
    assert prompts == data.Scenes.prompts(40, seed=3)
    assert prompts[:10] == data.Scenes.prompts(10, seed=3)
    kinds = [spec.kind for _, spec in prompts]
    assert [kinds.count(kind) for kind in ("single", "pair", "recoloured", "counted")] == [16, 12, 8, 4]
    assert all(set(spec.objects) <= set(words.CORE_NAMES) for _, spec in prompts)
    every = data.Scenes.prompts(40, seed=3, core=False)
    assert any(not set(spec.objects) <= set(words.CORE_NAMES) for _, spec in every)


def test_a_missing_font_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        data.build_atlas(font=tmp_path / "none.ttf")


def test_contact_sheet_holds_every_picture() -> None:
    pictures = data.to_images(torch.zeros(5, 3, 128, 128))
    sheet = data.contact_sheet(pictures, ["a very long prompt that has to be wrapped somewhere"] * 5, columns=4)
    assert sheet.size == (4 * 168, 2 * 166)


@needs_font
def test_the_font_draws_every_object_differently() -> None:
    atlas = data.build_atlas()
    assert {size: glyphs.shape for size, glyphs in atlas.items()} == {
        size: (len(words.NAMES), size, size, 4) for size in data.SIZES
    }
    assert all((glyphs[..., :3] <= glyphs[..., 3:]).all() for glyphs in atlas.values()), "premultiplied"
    for size, glyphs in atlas.items():
        extent = torch.stack([(glyphs[..., 3].amax(axis) > 0).sum(1) for axis in (1, 2)]).amax(0)
        assert extent.min() >= 0.9 * size, "each fills its square, one way or the other"
    small = torch.nn.functional.avg_pool2d(atlas[88].permute(0, 3, 1, 2).float(), 8).flatten(1)
    assert len(torch.unique(small, dim=0)) == len(small), "no two look the same"
    core = small[: len(words.CORE_NAMES)]
    apart = torch.cdist(core, core) + 1e9 * torch.eye(len(core))
    assert apart.min() > 150, [words.NAMES[i] for i in divmod(int(apart.argmin()), len(core))]
    pixels, _, _ = data.Scenes(0, atlas=atlas).batch(range(4))
    assert pixels.std() > 0.2
