"""The recorded maps against diffusers' own attention, the picture against one without a recorder, and the page."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import mezzotint
import pictures
from mezzotint import BudgetError, Pipeline, Request, RequestError, Result, cli
from mezzotint.cli.explain import _words
from mezzotint.explain.maps import Explanation, Token, Word, explain
from mezzotint.explain.page import HEAT, SMALL, TILE, overlay, page
from mezzotint.models.attention import probabilities, recording, watcher
from mezzotint.models.blocks import Attention
from mezzotint.weights.save_lora import save_lora

LEMON = Request(prompt="a lemon on a blue background", seed=7, steps=3, guidance_scale=3.0, negative_prompt="a lemon")


# ---- what is recorded ------------------------------------------------------------------------------------------------


class Keeping:
    """A diffusers attention processor that keeps the probabilities of one layer: [(rows, cells, T) mean of heads]."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, k, v = (
            attn.head_to_batch_dim(project(states))
            for project, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        shares = attn.get_attention_scores(q, k)  # (rows * heads, cells, T)
        self.kept.append(shares.unflatten(0, (-1, attn.heads)).mean(1))
        out: Tensor = attn.to_out[0](attn.batch_to_head_dim(shares @ v))
        return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pictures.Pair]:
    return pictures.build(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_the_maps_are_what_diffusers_computes(family: str, pairs: dict[str, pictures.Pair]) -> None:
    pair = pairs[family]
    request = pictures.fields(steps=2, count=2, sampler="DDIMScheduler")  # latents of 7x5, and a level below 4x3
    processors = {}
    for name, module in pair.theirs.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Keeping())
            processors[name] = module.processor
    pictures.theirs(pair, request)
    explanation = explain(pair.ours, Request(**request, batch=2))

    assert [token.text for token in explanation.tokens] == [
        *("a</w>", "red</w>", "lemon</w>", ",</w>", "left</w>", "of</w>", "a</w>", "whale</w>", "!</w>")
    ]
    assert set(explanation.layers) == set(processors)
    assert explanation.steps == ((0, 1), (0, 1))
    for layer, name in enumerate(explanation.layers):
        kept = processors[name].kept
        assert len(kept) == 2  # steps; rows are unconditional of two pictures, then conditional
        for step, picture in np.ndindex(2, 2):
            theirs = kept[step][2 + picture][:, 1:10].T  # after BOS
            ours = explanation.maps[picture][layer][step]
            assert ours.shape[1:] in {(7, 5), (4, 3)}
            torch.testing.assert_close(ours.flatten(1), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"count": 3, "batch": 2},
        {"sampler": "heun"},
        {"guidance_scale": 1.0},
        {"guidance_steps": (0.0, 0.5)},
        {"negative_prompt": "a blue lemon " * 60},  # longer than the prompt
        {"sampler": "dpm_adaptive", "guidance_scale": 1.0},
        {"guidance_method": "perp_neg"},
    ],
    ids=str,
)
def test_the_picture_is_bitwise_the_one_drawn_unwatched(changes: dict[str, Any], sd1: Pipeline) -> None:
    request = LEMON.replace(**changes)
    plain, explanation = sd1.generate(request), explain(sd1, request)
    assert torch.equal(explanation.result.latents, plain.latents)
    for a, b in zip(explanation.result.images, plain.images, strict=True):
        assert a.tobytes() == b.tobytes() and a.info == b.info
    for maps, steps in zip(explanation.maps, explanation.steps, strict=True):
        assert steps == tuple(range(len(steps)))
        for shares in maps:
            assert shares.shape[:2] == (len(steps), 6)
            assert ((shares > 0) & (shares < 1)).all()
            assert (shares.sum(1) < 1).all()  # BOS, EOS and padding have the rest


def test_sdxl(sdxl: Pipeline) -> None:
    request = LEMON.replace(negative_prompt=None)
    explanation = explain(sdxl, request)
    assert torch.equal(explanation.result.latents, sdxl.generate(request).latents)
    assert len(explanation.words) == 6


def test_guidance_and_neighbours_do_not_show_in_the_maps(sd1: Pipeline) -> None:
    """The first step sees the same x whatever guidance adds to the batch."""
    alone = explain(sd1, LEMON.replace(guidance_scale=1.0))
    long = {"negative_prompt": "a blue lemon " * 60}  # its rows are of another length, in a batch of their own
    for changes in ({}, long, {"guidance_method": "perp_neg"}, {"count": 2, "batch": 2}):
        other = explain(sd1, LEMON.replace(**changes))
        for a, b in zip(alone.maps[0], other.maps[0], strict=True):
            torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=0)
    two = explain(sd1, LEMON.replace(count=2, batch=2))
    second = explain(sd1, LEMON.replace(seed=LEMON.seed + 1))  # type: ignore[operator]
    for a, b in zip(two.maps[1], second.maps[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_step_of_several_calls_is_their_mean(sd1: Pipeline) -> None:
    calls: list[Tensor] = []

    def keep(layer: Attention, q: Tensor, k: Tensor) -> None:
        calls.append(probabilities(q[:1], k[:1])[0].mean(0))  # (cells, T)

    request = LEMON.replace(sampler="heun", guidance_scale=1.0)
    with recording(keep):
        sd1.generate(request)
    explanation = explain(sd1, request)
    layers = len(explanation.layers)
    assert len(calls) == layers * 5  # the last of three steps needs one call
    first = explanation.maps[0][0][0].flatten(1).T
    torch.testing.assert_close(first, (calls[0] + calls[layers])[:, 1:7] / 2)


def test_tokens_of_a_long_prompt_are_found_in_their_windows(sd1: Pipeline) -> None:
    prompt = "a lemon on a blue background " * 30  # 180 tokens
    whole: list[Tensor] = []
    with recording(lambda layer, q, k: whole.append(probabilities(q[:1], k[:1])[0].mean(0))):
        sd1.generate(LEMON.replace(prompt=prompt, guidance_scale=1.0, steps=1))
    explanation = explain(sd1, LEMON.replace(prompt=prompt, guidance_scale=1.0, steps=1))
    room = 75
    columns = [i // room * 77 + 1 + i % room for i in range(180)]
    assert whole[0].shape[1] == 3 * 77
    torch.testing.assert_close(explanation.maps[0][0][0].flatten(1).T, whole[0][:, columns])
    assert len(explanation.words) == 180
    explanation.map("lemon")


def test_the_change_of_few_steps_is_watched_too(sd1: Pipeline, sd1_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd1_folder, tmp_path / "tiny"))
    name = next(name for name, _ in sd1.unet.named_modules() if name.endswith("attn2.to_q"))
    weight = sd1.unet.get_parameter(f"{name}.weight")
    save_lora(
        folder / "lora.safetensors", {"unet": {name: (torch.ones(1, weight.shape[1]), torch.ones(len(weight), 1))}}
    )
    settings = json.loads((folder / "mezzotint.json").read_text())
    settings |= {"few_step": {"sampler": "lcm", "steps": 2, "guidance_scale": 1.0, "lora": "lora.safetensors"}}
    (folder / "mezzotint.json").write_text(json.dumps(settings))
    pipe, request = mezzotint.load(folder, device="cpu"), Request(prompt="a lemon", seed=1, sampler="lcm")
    explanation = explain(pipe, request)
    assert torch.equal(explanation.result.latents, pipe.generate(request).latents)
    plain = explain(sd1, request.replace(steps=2, guidance_scale=1.0))
    changed = [not torch.equal(a[0], b[0]) for a, b in zip(explanation.maps[0], plain.maps[0], strict=True)]
    assert any(changed)


# ---- what the grammars make of a prompt ------------------------------------------------------------------------------


def record_attention(pipe: Pipeline, request: Request) -> list[Tensor]:
    """The first layer's attention at each call, (rows, cells, T), of a run on its own."""
    calls: dict[Attention, list[Tensor]] = {}

    def keep(layer: Attention, q: Tensor, k: Tensor) -> None:
        calls.setdefault(layer, []).append(probabilities(q, k).mean(1))

    with recording(keep):
        pipe.generate(request)
    first = next(iter(calls.values()))
    return [shares for shares in first if shares.shape[2] == first[0].shape[2]]  # others hold only what guidance adds


@pytest.mark.parametrize(
    ("prompt", "syntax", "words", "spots"),
    [
        ("a (blue:1.5) lemon", "a1111", "a blue lemon", [(0, 1), (0, 2), (0, 3)]),
        ("a lemon BREAK a blue lemon", "a1111", "a lemon a blue lemon", [(0, 1), (0, 2), (0, 78), (0, 79), (0, 80)]),
        ("a lemon AND a blue lemon", "a1111", "a lemon a blue lemon", [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]),
        ("a (lemon)1.4 on blue", "compel", "a lemon on blue", [(0, 1), (0, 2), (0, 3), (0, 4)]),
        ("(a:1.3) lemon", "plain", "( a : 1 . 3 ) lemon", None),
    ],
)
def test_words_of_every_grammar_are_found_in_their_rows(
    prompt: str, syntax: str, words: str, spots: list[tuple[int, int]] | None, sd1: Pipeline
) -> None:
    request = LEMON.replace(prompt=prompt, prompt_syntax=syntax, sampler="ddim", negative_prompt="")
    explanation = explain(sd1, request)
    assert torch.equal(explanation.result.latents, sd1.generate(request).latents)
    assert " ".join(word.text for word in explanation.words) == words
    assert all(word.text == prompt[word.start : word.end] for word in explanation.words)
    whole = record_attention(sd1, request)
    spots = [(0, 1 + i) for i in range(len(explanation.tokens))] if spots is None else spots
    for step, shares in enumerate(explanation.maps[0][0]):
        for token, (row, position) in enumerate(spots):
            torch.testing.assert_close(shares[token].flatten(), whole[step][row, :, position])


def test_an_edited_word_has_maps_in_its_steps(sd1: Pipeline) -> None:
    request = LEMON.replace(prompt="a [lemon:blue:0.5] background", steps=4, guidance_scale=1.0, sampler="ddim")
    explanation = explain(sd1, request)
    assert [word.text for word in explanation.words] == ["a", "lemon", "blue", "background"]
    there = explanation.maps[0][0].isfinite().all((2, 3)).T.tolist()
    lemon, blue = there[1], there[2]
    assert 0 < sum(lemon) < 4 and blue == [not now for now in lemon] and lemon == sorted(lemon, reverse=True)
    assert there[0] == there[3] == [True] * 4
    whole = record_attention(sd1, request)
    for step, shares in enumerate(explanation.maps[0][0]):
        second = shares[1 if lemon[step] else 2]
        torch.testing.assert_close(second.flatten(), whole[step][0, :, 2])
    assert explanation.map("lemon").isfinite().all() and explanation.share("blue") > 0
    heun = explain(sd1, request.replace(sampler="heun"))  # a step's second call is the next step's prompt
    assert heun.maps[0][0].isfinite().all((2, 3)).T.tolist() == there


def test_an_embedding_is_one_word(sd1: Pipeline, tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(3, 16)}, tmp_path / "cat.safetensors")
    request = LEMON.replace(prompt="a cat on blue", embeddings=(str(tmp_path / "cat.safetensors"),), sampler="ddim")
    explanation = explain(sd1, request)
    assert [(word.text, word.tokens) for word in explanation.words] == [
        *(("a", (0,)), ("cat", (1, 2, 3)), ("on", (4,)), ("blue", (5,)))
    ]
    assert explanation.tokens[2] == Token("cat", 2, 5, row=1)
    whole = record_attention(sd1, request)[0][0]
    torch.testing.assert_close(explanation.maps[0][0][0].flatten(1).T, whole[:, 1:7])


# ---- nobody else notices ---------------------------------------------------------------------------------------------


def test_one_thread_watches_and_the_other_does_not(sd1: Pipeline) -> None:
    request = LEMON.replace(steps=12)
    expected, other = explain(sd1, request), request.replace(prompt="a blue lemon")
    expected_other = sd1.generate(other)
    seen: list[object] = []
    results: list[Result] = []
    started, stop = threading.Event(), threading.Event()

    def run_alone() -> None:
        while not stop.is_set():
            seen.append(watcher.get())
            results.append(sd1.generate(other))
            started.set()

    thread = threading.Thread(target=run_alone)
    thread.start()
    try:
        assert started.wait(60)
        explanation = explain(sd1, request)
    finally:
        stop.set()
        thread.join()
    assert set(seen) == {None}
    assert all(torch.equal(result.latents, expected_other.latents) for result in results)
    assert torch.equal(explanation.result.latents, expected.result.latents)
    for a, b in zip(explanation.maps[0], expected.maps[0], strict=True):
        assert torch.equal(a, b)


def test_nothing_stays_behind_after_an_exception(sd1: Pipeline) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain(sd1, LEMON, on_step=stop)
    assert watcher.get() is None
    seen: list[object] = []
    with recording(lambda layer, q, k: seen.append(layer)):
        with pytest.raises(KeyboardInterrupt):
            explain(sd1, LEMON, on_step=stop)
        before = len(seen)
        sd1.generate(LEMON)  # the outer one is back
    assert before == 0 < len(seen)


# ---- words and maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A Lemon,  on BLUE", ["A", "Lemon", ",", "on", "BLUE"]),
        ("don't", ["don", "'t"]),
        ("İstanbul cafe\u0301", None),  # they grow and shrink in the tokenizer
        ("柠檬 🍋 lemon", ["柠檬", "🍋", "lemon"]),
    ],
)
def test_words_keep_their_place_in_the_prompt(prompt: str, words: list[str] | None, sd1: Pipeline) -> None:
    explanation = explain(sd1, LEMON.replace(prompt=prompt, steps=1))
    assert words is None or [word.text for word in explanation.words] == words
    tokens = [index for word in explanation.words for index in word.tokens]
    assert tokens == list(range(len(explanation.tokens)))
    assert all(word.text == prompt[word.start : word.end] != "" for word in explanation.words)
    assert explanation.words == tuple(sorted(explanation.words, key=lambda word: word.start))


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_no_words_are_a_request_error(prompt: str, sd1: Pipeline) -> None:
    with pytest.raises(RequestError, match="no words"):
        explain(sd1, LEMON.replace(prompt=prompt))


def made(shares: Tensor, size: tuple[int, int] = (32, 16)) -> Explanation:
    """An explanation of one layer, shares (steps, tokens, h, w), the tokens being the words a, b, c ..."""
    steps, count = shares.shape[:2]
    letters = "abcdefgh"[:count]
    request = Request(prompt=" ".join(letters), steps=steps, sampler="ddim", seed=0)
    image = Image.new("RGB", (size[1], size[0]), (200, 40, 40))
    result = Result([image], torch.zeros(1, 4, 4, 2), [0], request, {})
    words = tuple(Word(letter, 2 * i, 2 * i + 1, (i,)) for i, letter in enumerate(letters))
    tokens = tuple(Token(f"{letter}</w>", 2 * i, 2 * i + 1) for i, letter in enumerate(letters))
    return Explanation(result, tokens, words, ("one",), (tuple(range(steps)),), ((shares,),))


def test_a_map_is_what_the_docstring_says() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(4, 3, 8, 4, generator=generator)
    explanation = made(shares)
    plain = explanation.map("b", relative=False)
    expected = F.interpolate(shares[2:, 1:2].mean(0)[None], size=(32, 16), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(plain, expected)  # the later half of the steps
    torch.testing.assert_close(explanation.map("b", relative=False, steps=[0]).mean(), shares[0, 1].mean())

    mean = shares[2:].mean(0)
    scaled = mean / mean.mean((1, 2), keepdim=True)
    contrast = (scaled[1] - (scaled[0] + scaled[2]) / 2)[None, None]
    expected = F.interpolate(contrast, size=(32, 16), mode="bilinear", align_corners=False)[0, 0].clamp(min=0)
    torch.testing.assert_close(explanation.map("b"), expected)
    torch.testing.assert_close(explanation.map(1), expected)
    torch.testing.assert_close(explanation.map(explanation.words[1]), expected)
    assert torch.equal(explanation.map("a b"), explanation.map(" A  B "))
    assert explanation.share("a b") == pytest.approx(float(shares[:, :2].sum(1).mean()))


def test_a_word_alone_is_held_against_a_flat_map() -> None:
    shares = torch.full((1, 1, 2, 2), 0.1)
    assert not made(shares).map("a").any()
    shares[..., 0, 0] = 0.5
    assert int(made(shares, (2, 2)).map("a").argmax()) == 0


def test_a_token_counts_only_in_the_steps_that_have_it() -> None:
    shares = torch.rand(6, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    shares[4:, 0] = torch.nan
    explanation = made(shares, (2, 2))
    torch.testing.assert_close(explanation.map("a", relative=False), shares[2:4, 0].mean(0))
    with pytest.raises(RequestError, match="steps is \\[5\\]; 'a' was recorded in the steps 0, 1, 2, 3"):
        explanation.map("a", steps=[5])


@pytest.mark.parametrize(
    ("word", "options", "sentence"),
    [
        ("whale", {}, "the prompt has no word 'whale'; it has a, b"),
        ("", {}, "has no word ''"),
        (2, {}, "word is 2; it must be the index of a token, from 0 to 1"),
        ("a", {"steps": [9]}, "'a' was recorded in the steps 0, 1"),
        ("a", {"steps": []}, "steps is"),
        ("a", {"layers": [1]}, "layers is \\[1\\]; it must be one or more of 0 to 0"),
    ],
)
def test_what_is_not_there_is_a_sentence(word: str | int, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        made(torch.rand(2, 2, 2, 2)).map(word, **options)


def test_the_maps_stay_within_their_limit(sd1: Pipeline) -> None:
    request = LEMON.replace(steps=7, count=2)
    whole = explain(sd1, request)
    size = sum(shares.nbytes for maps in whole.maps for shares in maps)
    assert whole.steps == ((0, 1, 2, 3, 4, 5, 6),) * 2
    part = explain(sd1, request, limit=size // 2)
    assert part.steps == ((0, 3, 6),) * 2
    assert sum(shares.nbytes for maps in part.maps for shares in maps) <= size // 2
    for a, b in zip(whole.maps[1], part.maps[1], strict=True):
        assert torch.equal(a[::3], b)
    with pytest.raises(BudgetError, match="the maps of one step take"):
        explain(sd1, request, limit=size // 8)


# ---- the page and the command ----------------------------------------------------------------------------------------


def test_heat_lies_where_the_map_is() -> None:
    image, heat = Image.new("RGB", (8, 8), (200, 40, 40)), torch.zeros(8, 8)
    heat[2, 5] = 3.0
    pixels = np.asarray(overlay(image, heat)).astype(int)
    red, green, blue = pixels[2, 5]
    assert red > blue and red + green > 2 * pixels[0, 0, :2].sum()
    assert np.ptp(pixels[0, 0]) <= 4, "cold places are grey"
    under = 0.75 * image.convert("L").getpixel((5, 2))
    warmest = 0.75 * np.asarray(HEAT[-1])
    assert pixels[2, 5] == pytest.approx(0.25 * under + warmest, abs=1)
    assert (np.asarray(overlay(image, torch.zeros(8, 8))) == np.asarray(overlay(image, torch.zeros(8, 8)))[0, 0]).all()


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (32, 32)])
@pytest.mark.parametrize("words", [1, 2, 5, 8])
def test_the_page_holds_the_picture_and_every_word(size: tuple[int, int], words: int) -> None:
    made_up = made(torch.rand(2, words, 4, 4, generator=torch.Generator().manual_seed(1)), size)
    drawn = np.asarray(page(made_up)).astype(int)
    is_picture = (np.abs(drawn - (200, 40, 40)) <= 2).all(-1)
    side = 2 * TILE + 14
    assert is_picture.sum() == pytest.approx(side * side * min(size) / max(size), rel=0.02)
    grey = (np.ptp(drawn, axis=-1) <= 8) | is_picture
    tiles = (words - 1) * TILE**2 + SMALL**2  # "a" is a function word
    coloured = (~grey).sum() / (tiles * min(size) / max(size))
    assert 0.1 < coloured <= 1.0


def test_a_page_shows_no_more_words_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = made(torch.rand(1, 8, 4, 4))
    whole = page(explanation)
    monkeypatch.setattr("mezzotint.explain.page.MAX_WORDS", 4)
    assert page(explanation).height < whole.height - TILE


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["mezzotint", "explain", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0, *capsys.readouterr()


def test_the_command_writes_a_page_and_arrays(
    sd1: Pipeline, sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arrays = tmp_path / "e.png", tmp_path / "e.npz"
    options = ["a lemon", "--model", str(sd1_folder), "--seed", "3", "--device", "cpu", "--out", str(out)]
    code, out_text, _ = run(monkeypatch, capsys, *options, "--arrays", str(arrays))
    assert (code, out_text) == (0, f"Wrote {out} and {arrays} (2 words, seed 3)\n")
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > 2 * TILE
    expected = explain(sd1, Request(prompt="a lemon", seed=3))
    with np.load(arrays) as kept:
        assert kept["tokens"].tolist() == ["a</w>", "lemon</w>"] and kept["places"].tolist() == [[0, 1], [2, 7]]
        assert kept["layers"].tolist() == list(expected.layers) and kept["steps"].tolist() == [0, 1, 2, 3]
        for layer, shares in enumerate(expected.maps[0]):
            assert np.array_equal(kept[f"layer_{layer}"], shares.numpy())
        assert np.array_equal(kept["picture"], np.asarray(expected.result.images[0]))

    code, out_text, _ = run(monkeypatch, capsys, *options, "--json")
    record = json.loads(out_text)
    assert code == 0 and record["page"] == str(out) and record["request"]["seed"] == 3
    assert [(word["word"], word["start"], word["end"]) for word in record["words"]] == [("a", 0, 1), ("lemon", 2, 7)]
    assert all(0 < word["share"] < 1 for word in record["words"])


def test_the_centre_of_a_map_counts_cells_from_their_middle() -> None:
    heat = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])  # all of it in the upper right cell
    word = SimpleNamespace(text="lemon", start=2, end=7)
    explanation = SimpleNamespace(words=[word], map=lambda _: heat, share=lambda _: 0.5)
    assert _words(explanation)[0]["middle"] == [0.875, 0.25]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["", "--out", "e.png"], "no words"),
        (["a lemon", "--out", "e.jpg"], "it must be a file name ending in .png"),
        (["a lemon", "--out", "."], "it must be a file name ending in .png"),
        (["a lemon", "--out", "nowhere/e.png"], "cannot be written"),
        (["a lemon", "--out", "e.png", "--arrays", "e.zip"], "arrays is 'e.zip'; it must end in .npz"),
        (["a lemon", "--out", "e.png", "--size", "7"], "width is 7"),
        (["a lemon", "--out", "e.png", "--steps", "0"], "steps is 0"),
        (["a lemon", "--out", "e.png", "--sampler", "eulr"], "eulr"),
    ],
)
def test_wrong_input_is_a_sentence_and_code_2(
    arguments: list[str],
    sentence: str,
    sd1_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out_text, complaint = run(monkeypatch, capsys, *arguments, "--model", str(sd1_folder), "--device", "cpu")
    assert (code, out_text) == (2, "") and sentence in complaint and "Traceback" not in complaint
    assert not list(tmp_path.iterdir())
