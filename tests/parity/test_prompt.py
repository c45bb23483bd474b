"""What a prompt means in each dialect, against the published arithmetic done with transformers alone.

The sources are named in encode.py. Each case says by hand which words stand in which chunk with which weight; the
oracle below tokenises them with transformers' tokenizer and encodes them with its encoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mezzotint
import tiny
from mezzotint.models.tokenizer import Tokenizer
from pictures import PROMPT, Pair, load, save

LIMIT = 1e-4
FAMILIES = ("sd1", "sdxl")
Words = Sequence[tuple[str, float]]  # (words, weight)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """SD1 and SDXL; with layer norms as a trained model has them, or the mean that A1111 restores would be 0."""
    tokenizer = Tokenizer.subset([PROMPT])
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    loaded = {}
    for family in FAMILIES:
        models = [tiny.clip(family, **ids)]
        models += [tiny.clip(family, seed=3, projection=True, **ids)] if family == "sdxl" else []
        for model in models:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        folder = tmp_path_factory.mktemp(family)
        save(folder, family, tokenizer, models, tiny.unet(family), tiny.vae())
        loaded[family] = load(folder, family)
    return loaded


class Theirs:
    """One tokenizer and text encoder of transformers."""

    def __init__(self, pair: Pair, second: bool, xl: bool) -> None:
        pipe: Any = pair.theirs
        self.tokenizer = pipe.tokenizer_2 if second else pipe.tokenizer
        self.encoder = pipe.text_encoder_2 if second else pipe.text_encoder
        self.xl = xl

    def window(self, words: Words) -> tuple[Tensor, Tensor]:
        """ids (1, 77) and weights (1, 77, 1) of one chunk."""
        tokenizer = self.tokenizer
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in words:
            new = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + new, weights + [weight] * len(new)
        assert len(ids) <= 76
        pad = 77 - len(ids) - 1
        ids = [*ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * pad]
        return torch.tensor([ids]), torch.tensor([weights + [1.0] * (77 - len(weights))])[..., None]

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor | None = None, skip: int = 0) -> Tensor:
        """(1, 77, D) as Stable Diffusion takes it."""
        output = self.encoder(ids, attention_mask=mask, output_hidden_states=True)
        if self.xl:
            return output.hidden_states[-2 - skip]
        if not skip:
            return output.last_hidden_state
        norm = next(module for name, module in self.encoder.named_modules() if name.endswith("final_layer_norm"))
        return norm(output.hidden_states[-1 - skip])

    @torch.no_grad()
    def pooled(self, words: Words) -> Tensor:
        return self.encoder(self.window(words)[0]).text_embeds


def encoders(pair: Pair, family: str) -> list[Theirs]:
    return [Theirs(pair, second, family == "sdxl") for second in ((False, True) if family == "sdxl" else (False,))]


def a1111(clip: Theirs, variants: Sequence[Sequence[Words]], emphasis: str = "original", skip: int = 0) -> Tensor:
    """sd_hijack_clip.py: (variants, 77 k, D); the mean runs over the variants."""
    columns = []
    for k in range(max(map(len, variants))):
        windows = [clip.window(chunks[k] if k < len(chunks) else []) for chunks in variants]
        z = torch.cat([clip.states(ids, skip=skip) for ids, _ in windows])
        weighted = z * torch.cat([w for _, w in windows])
        if emphasis == "original":
            weighted = weighted * (z.mean() / weighted.mean())
        columns.append(z if emphasis == "ignore" else weighted)
    return torch.cat(columns, 1)


def comfy(clip: Theirs, chunks: Sequence[Words]) -> Tensor:
    """sd1_clip.py, ClipTokenWeightEncoder."""
    empty = clip.states(clip.window([])[0])
    windows = [clip.window(chunk) for chunk in chunks]
    return torch.cat([empty + w * (clip.states(ids) - empty) for ids, w in windows], 1)


def compel(clip: Theirs, chunks: Sequence[Words], fragments: Sequence[tuple[int, int, float]] = ()) -> Tensor:
    """embeddings_provider.py, in the mode that Compel sets, SENTENCES.

    Fragments: of each one below weight 1 the (first, last) place in the text of windows.
    """
    empty = clip.states(clip.window([])[0])
    windows = [clip.window(chunk) for chunk in chunks]

    def lerped(mask: Tensor) -> Tensor:
        parts = [
            empty + w * (clip.states(ids, part) - empty)
            for (ids, w), part in zip(windows, mask.split(77, 1), strict=True)
        ]
        return torch.cat(parts, 1)

    whole = torch.ones(1, 77 * len(chunks), dtype=torch.long)
    total, sum_of_weights = lerped(whole), 1.0
    for first, last, weight in fragments:
        mask = whole.clone()
        mask[:, first : last + 1] = 0
        mask[:, ::77] = mask[:, 76::77] = 1
        tangent = math.tan((1 - weight) * math.pi / 2)
        total, sum_of_weights = total + tangent * lerped(mask), sum_of_weights + tangent
    return total / sum_of_weights


def ours(pair: Pair, prompt: str, **fields: Any) -> Any:
    return pair.ours.encode(prompt, mezzotint.Request(prompt="", **fields))


def check(found: Any, expected: Sequence[Tensor], pooled: Tensor | None) -> None:
    context = torch.cat(list(expected), -1)
    assert found.context.shape == context.shape
    assert (found.context - context).abs().max() < LIMIT
    assert (found.pooled is None) == (pooled is None)
    if pooled is not None:
        assert (found.pooled - pooled).abs().max() < LIMIT


# prompt, its chunks
A1111: dict[str, tuple[str, list[list[tuple[str, float]]]]] = {
    "one chunk": (
        "a (red whale:1.4) left of a [lemon]",
        [[("a", 1.0), ("red whale", 1.4), ("left of a", 1.0), ("lemon", 1 / 1.1)]],
    ),
    "negative": ("a (red:-0.7) lemon", [[("a", 1.0), ("red", -0.7), ("lemon", 1.0)]]),
    "three chunks": (
        # the chunk is full five tokens after the comma: what follows it moves on; BREAK ends the second
        "lemon " * 70 + ", red red (red red red:1.3) whale BREAK a (lemon:0.5)",
        [
            [("lemon " * 70 + ",", 1.0)],
            [("red red", 1.0), ("red red red", 1.3), ("whale", 1.0)],
            [("a", 1.0), ("lemon", 0.5)],
        ],
    ),
    "too far back": ("lemon , " + "(red:1.2) " * 80, [[("lemon ,", 1.0), ("red " * 73, 1.2)], [("red " * 7, 1.2)]]),
    "empty chunks": ("a lemon BREAK BREAK (whale:1.5)", [[("a lemon", 1.0)], [], [("whale", 1.5)]]),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", A1111)
@pytest.mark.parametrize("emphasis", ["original", "no_norm", "ignore"])
def test_a1111(pairs: dict[str, Pair], family: str, case: str, emphasis: str) -> None:
    prompt, chunks = A1111[case]
    clips = encoders(pairs[family], family)
    expected = [a1111(clip, [chunks], emphasis) for clip in clips]
    pooled = clips[1].pooled(chunks[0]) if family == "sdxl" else None
    check(ours(pairs[family], prompt, emphasis=emphasis), expected, pooled)


@pytest.mark.parametrize("family", FAMILIES)
def test_a1111_the_mean_is_over_all_variants(pairs: dict[str, Pair], family: str) -> None:
    """Each as often as the schedule names it: of five steps `whale` has two, in a schedule of its own entries."""
    clips = encoders(pairs[family], family)
    parts = pairs[family].ours.encode_parts(
        "a (red:1.5) [lemon|(whale:0.2)]", mezzotint.Request(prompt="", steps=5, sampler="ddim")
    )
    (part,) = parts
    variants = [[[("a", 1.0), ("red", 1.5), ("lemon", 1.0) if k % 2 == 0 else ("whale", 0.2)]] for k in range(5)]
    expected = torch.cat([a1111(clip, variants) for clip in clips], -1)
    assert [until for until, _ in part.timeline] == [1, 2, 3, 4, 5]
    for k, (_, condition) in enumerate(part.timeline):
        assert (condition.context - expected[k : k + 1]).abs().max() < LIMIT
    alone = torch.cat([a1111(clip, variants[:1]) for clip in clips], -1)
    assert (part.timeline[0][1].context - alone).abs().max() > 10 * LIMIT  # or the test would show nothing


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_is_normed(pairs: dict[str, Pair], skip: int) -> None:
    prompt, chunks = A1111["one chunk"]
    (clip,) = encoders(pairs["sd1"], "sd1")
    check(ours(pairs["sd1"], prompt, clip_skip=skip), [a1111(clip, [chunks], skip=skip)], None)


COMFY: dict[str, tuple[str, list[list[tuple[str, float]]]]] = {
    "one chunk": ("a (red whale:1.4) (lemon:0.3)", [[("a", 1.0), ("red whale", 1.4), ("lemon", 0.3)]]),
    "three chunks": (
        # a segment of five tokens is not parted, one of 150 is
        "lemon " * 72 + "(red red red red red:1.4)" + " whale" * 150,
        [
            [("lemon " * 72, 1.0)],
            [("red " * 5, 1.4), ("whale " * 70, 1.0)],
            [("whale " * 75, 1.0)],
            [("whale " * 5, 1.0)],
        ],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", COMFY)
def test_comfy(pairs: dict[str, Pair], family: str, case: str) -> None:
    prompt, chunks = COMFY[case]
    clips = encoders(pairs[family], family)
    pooled = clips[1].pooled(chunks[0]) if family == "sdxl" else None
    check(ours(pairs[family], prompt, prompt_syntax="comfy"), [comfy(clip, chunks) for clip in clips], pooled)


# prompt, chunks, (first, last, weight) of each fragment below 1
COMPEL: dict[str, tuple[str, list[list[tuple[str, float]]], list[tuple[int, int, float]]]] = {
    "up": ("a (red whale)1.4 left", [[("a", 1.0), ("red whale", 1.4), ("left", 1.0)]], []),
    "down": (
        "a (red whale)0.6 left of lemon-",
        [[("a", 1.0), ("red whale", 0.6), ("left of", 1.0), ("lemon", 0.9)]],
        [(2, 3, 0.6), (6, 6, 0.9)],
    ),
    "three chunks": (
        # after the last sentence that fits; then, as there is none, after the last comma; then the rest
        "lemon " * 60 + ". (red whale)0.5 " + "left " * 50 + ", " + "red " * 40,
        [
            [("lemon " * 60 + ".", 1.0)],
            [("red whale", 0.5), ("left " * 50 + ",", 1.0)],
            [("red " * 40, 1.0)],
        ],
        [(78, 79, 0.5)],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", COMPEL)
def test_compel(pairs: dict[str, Pair], family: str, case: str) -> None:
    prompt, chunks, fragments = COMPEL[case]
    clips = encoders(pairs[family], family)
    pooled = None
    if family == "sdxl":  # of the text as it was typed, cut at the window's end
        with torch.no_grad():
            typed = clips[1].tokenizer(prompt, truncation=True, padding="max_length", return_tensors="pt").input_ids
            pooled = clips[1].encoder(typed).text_embeds
    check(
        ours(pairs[family], prompt, prompt_syntax="compel"),
        [compel(clip, chunks, fragments) for clip in clips],
        pooled,
    )


def test_compel_joins(pairs: dict[str, Pair]) -> None:
    (clip,) = encoders(pairs["sd1"], "sd1")
    lemon, whale, empty = (compel(clip, [words]) for words in ([("a lemon", 1.0)], [("a red whale", 1.0)], []))
    weighted = empty + 0.5 * (whale - empty)
    found = ours(pairs["sd1"], '("a lemon", "a red whale").and(1, 0.5)', prompt_syntax="compel")
    check(found, [torch.cat([lemon, weighted], 1)], None)
    found = ours(pairs["sd1"], '("a lemon", "a red whale").blend(3, 1)', prompt_syntax="compel")
    check(found, [0.75 * lemon + 0.25 * whale], None)
    found = ours(pairs["sd1"], '("a lemon", "a red whale").blend(3, 1, no_normalize)', prompt_syntax="compel")
    check(found, [3 * lemon + whale], None)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain(pairs: dict[str, Pair], family: str) -> None:
    """Brackets are signs like others, and nothing is cut off."""
    clips = encoders(pairs[family], family)
    for prompt, chunks in (
        ("a (red:1.5) lemon", [[("a (red:1.5) lemon", 1.0)]]),
        ("lemon " * 160, [[("lemon " * 75, 1.0)], [("lemon " * 75, 1.0)], [("lemon " * 10, 1.0)]]),
    ):
        pooled = clips[1].pooled(chunks[0]) if family == "sdxl" else None
        found = ours(pairs[family], prompt, prompt_syntax="plain")
        check(found, [a1111(clip, [chunks], "ignore") for clip in clips], pooled)
