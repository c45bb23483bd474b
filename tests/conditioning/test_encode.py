"""Words to Conditions: chunks, joining, schedules, embeddings, the cache. Against the encoders, called by hand.

The dialects' arithmetic is held against transformers in parity/test_prompt.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mezzotint
from mezzotint import Pipeline, Request, RequestError
from mezzotint.conditioning.chunks import Chunk, Token, split_into_chunks
from mezzotint.conditioning.encode import (
    Conditioner,
    EncodedPart,
    EncodingCache,
    _attention_mask,
    batch_timelines,
    zeros_like,
)
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import guided
from mezzotint.diffusion.noise import SeededNoise
from mezzotint.diffusion.prediction import EPSILON
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition
from mezzotint.prompt import plan

WORDS = " ".join(["a lemon on a blue background"] * 40)  # 240 tokens: four windows
SYNTAXES = ("a1111", "comfy", "compel", "plain")
RUN = Request(prompt="", steps=6, guidance_scale=3.0, seed=5, sampler="euler", spacing="trailing")


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


def window(tokenizer: Tokenizer, ids: Sequence[int]) -> Tensor:
    return torch.tensor([tokenizer.window(ids)])


def chunks(
    text: str, tokenizer: Tokenizer, syntax: str = "a1111", sizes: Mapping[str, int] | None = None
) -> list[Chunk]:
    embeddings = {name: [torch.zeros(count, 8)] for name, count in (sizes or {}).items()}
    return split_into_chunks(plan(text, syntax).parts[0].variants[0].spans, syntax, tokenizer, embeddings)


def sizes(found: Sequence[Chunk]) -> list[int]:
    return [len(chunk) for chunk in found]


# ---- windows ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_words_without_signs_are_the_encoders_own_output(sd1: Pipeline, syntax: str) -> None:
    """In every dialect, to the last bit."""
    (tokenizer,), (encoder,) = sd1.tokenizers, sd1.text_encoders
    for skip in (0, 1, 2):
        ids = window(tokenizer, tokenizer.encode("a lemon"))
        condition = sd1.encode("a lemon", Request(prompt="", clip_skip=skip, prompt_syntax=syntax))
        assert torch.equal(condition.context, encoder(ids, skip=skip)[0])
        assert condition.pooled is None and condition.time_ids is None


@torch.no_grad()
def test_windows_are_encoded_apart_and_joined(sd1: Pipeline) -> None:
    (tokenizer,), (encoder,) = sd1.tokenizers, sd1.text_encoders
    ids = tokenizer.encode(WORDS)
    assert len(ids) == 240
    context = sd1.encode(WORDS).context
    assert context.shape == (1, 4 * 77, 16)
    for k in range(4):
        expected = encoder(window(tokenizer, ids[75 * k : 75 * (k + 1)]))[0]
        assert torch.equal(context[:, 77 * k : 77 * (k + 1)], expected)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(("tokens", "count"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_window_holds_75_tokens(sd1: Pipeline, tokens: int, count: int, syntax: str) -> None:
    text = " ".join(["lemon"] * tokens)
    assert Conditioner(sd1.tokenizers, sd1.text_encoders).shape(plan(text, syntax)) == ((1.0,), 77 * count)
    assert sd1.encode(text, Request(prompt="", prompt_syntax=syntax)).context.shape[1] == 77 * count


@torch.no_grad()
def test_sdxl_joins_two_encoders(sdxl: Pipeline) -> None:
    condition = sdxl.encode("a lemon")
    hidden = []
    for tokenizer, encoder in zip(sdxl.tokenizers, sdxl.text_encoders, strict=True):
        hidden.append(encoder(window(tokenizer, tokenizer.encode("a lemon")), skip=1, final_norm=False))
    assert torch.equal(condition.context, torch.cat([hidden[0][0], hidden[1][0]], dim=-1))
    assert condition.pooled is not None and torch.equal(condition.pooled, hidden[1][1])


@torch.no_grad()
def test_the_pooled_vector_is_the_first_windows(sdxl: Pipeline) -> None:
    ids = sdxl.tokenizers[1].encode(WORDS)
    pooled = sdxl.encode(WORDS).pooled
    assert pooled is not None and torch.equal(pooled, sdxl.text_encoders[1](window(sdxl.tokenizers[1], ids[:75]))[1])


def test_tokenizers_that_disagree_on_length(sdxl: Pipeline) -> None:
    """SDXL's second pads with "!" and so reads "!!!" as three tokens, the first as one."""
    text = "wow !!! " * 30
    first, second = (len(tokenizer.encode(text)) for tokenizer in sdxl.tokenizers)
    assert first <= 75 < second
    assert sdxl.encode(text).context.shape == (1, 2 * 77, 32)


def test_missing_negative_prompt_is_zeros(sdxl: Pipeline) -> None:
    condition = sdxl.encode("a lemon")
    nothing = zeros_like(condition)
    assert nothing.context.shape == condition.context.shape and not nothing.context.any()
    assert nothing.pooled is not None and not nothing.pooled.any()


# ---- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("lemon " * 76, [75, 1]),
        ("lemon " * 70 + "," + " red" * 10, [71, 10]),  # 4 of them went after the comma, back 5
        ("lemon " * 54 + "," + " red" * 30, [75, 10]),  # 21 tokens back is too far
        ("lemon " * 55 + "," + " red" * 30, [56, 30]),  # 20 is not
        ("lemon " * 74 + "," + " red", [75, 1]),
        ("lemon " * 75 + "," + " red" * 75, [75, 75, 1]),  # a comma that opens a chunk does not count
        ("a BREAK red", [1, 1]),
        ("a BREAK BREAK red", [1, 0, 1]),
        ("BREAK a", [0, 1]),
        ("a BREAK", [1]),
        ("lemon " * 75 + "BREAK red", [75, 1]),
        ("(a BREAK red:1.2)", [3]),  # in brackets it is a word
    ],
)
def test_a1111_breaks(clip: Tokenizer, text: str, expected: list[int]) -> None:
    """comma_padding_backtrack, 20 tokens; the numbers were worked out on sd_hijack_clip.py's loop."""
    assert sizes(chunks(text, clip)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("lemon " * 70 + "(red red red red red red red:1.2)", [70, 7]),  # 7 tokens stay together
        ("lemon " * 70 + "(red red red red red red red red:1.2)", [75, 3]),  # 8 do not
        ("lemon " * 200, [75, 75, 50]),
        ("a BREAK red", [3]),
    ],
)
def test_comfy_breaks(clip: Tokenizer, text: str, expected: list[int]) -> None:
    assert sizes(chunks(text, clip, "comfy")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("lemon " * 30 + ". " + "lemon " * 30 + ", " + "red " * 40, [31, 71]),  # a sentence is better than a phrase
        ("lemon " * 30 + "; " + "red " * 60, [31, 60]),
        ("lemon " * 80, [75, 5]),
        ("a" * 200, [75, 25]),  # no word ends: cut where the window does
    ],
)
def test_compel_breaks(clip: Tokenizer, text: str, expected: list[int]) -> None:
    if text.startswith("aa"):
        expected = [75, len(clip.encode(text)) - 75] if len(clip.encode(text)) > 75 else [len(clip.encode(text))]
    assert sizes(chunks(text, clip, "compel")) == expected


def test_every_token_knows_its_place_and_its_weight(clip: Tokenizer) -> None:
    for syntax, text in (
        ("a1111", "a (strawberry:1.3) left of \\(a\\) [whale]"),
        ("comfy", "a (strawberry:1.3) left of \\(a\\) whale"),
        ("compel", "a (strawberry)1.3 left of whale-"),
    ):
        (chunk,) = chunks(text, clip, syntax)
        for token in chunk:
            written = text[token.start : token.end].replace("\\", "").strip().lower()
            assert written == clip.decode([token.id])
            assert token.weight == pytest.approx(
                {"strawberry": 1.3, "whale": {"a1111": 1 / 1.1, "comfy": 1.0, "compel": 0.9}[syntax]}.get(written, 1.0)
            )


def test_a_small_window_has_small_chunks() -> None:
    tokenizer = Tokenizer.subset(["a lemon on a blue background"], max_length=20)
    assert sizes(chunks("lemon " * 40, tokenizer)) == [18, 18, 4]
    tiny = Tokenizer.subset(["lemon"], max_length=6)  # below ComfyUI's segments
    assert sizes(chunks("(lemon lemon lemon lemon lemon:1.2)", tiny, "comfy")) == [4, 1]


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["cat", "CAT", "<cat>", "embedding:cat"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_triggers(clip: Tokenizer, syntax: str, trigger: str) -> None:
    (chunk,) = chunks(f"a {trigger} left", clip, syntax, {"cat": 3})
    vectors = [token.vector for token in chunk if token.vector]
    if syntax == "comfy" and ":" not in trigger and "<" not in trigger:
        assert not vectors  # a word like any other, as in ComfyUI
    else:
        assert vectors == [("cat", 0), ("cat", 1), ("cat", 2)] and len(chunk) == 5


@pytest.mark.parametrize("text", ["cats", "blackcat", "cat2", "embedding", "embedding:cats"])
def test_a_trigger_is_a_whole_word(clip: Tokenizer, text: str) -> None:
    assert not any(token.vector for chunk in chunks(text, clip, "a1111", {"cat": 1}) for token in chunk)


def test_the_longest_trigger_wins(clip: Tokenizer) -> None:
    (chunk,) = chunks("a cat-toy, cat", clip, "a1111", {"cat": 1, "cat-toy": 2})
    assert [token.vector for token in chunk if token.vector] == [("cat-toy", 0), ("cat-toy", 1), ("cat", 0)]


@pytest.mark.parametrize("syntax", ["a1111", "compel", "plain"])
@pytest.mark.parametrize("before", range(66, 76))
def test_vectors_never_straddle_a_chunk(clip: Tokenizer, syntax: str, before: int) -> None:
    found = chunks("lemon " * before + "<cat> red", clip, syntax, {"cat": 9})
    (home,) = [chunk for chunk in found if any(token.vector for token in chunk)]
    assert [token.vector[1] for token in home if token.vector] == list(range(9))
    assert sum(sizes(found)) == before + 10


def test_comfy_parts_a_large_embedding_as_it_does_any_segment(clip: Tokenizer) -> None:
    assert sizes(chunks("lemon " * 70 + " embedding:cat", clip, "comfy", {"cat": 7})) == [70, 7]
    assert sizes(chunks("lemon " * 70 + " embedding:cat", clip, "comfy", {"cat": 9})) == [75, 4]


def test_an_embedding_no_window_holds(clip: Tokenizer) -> None:
    with pytest.raises(RequestError, match="'cat' has 76 vectors; it must have at most 75"):
        chunks("cat", clip, "a1111", {"cat": 76})


def test_comfy_misses_an_embedding(clip: Tokenizer) -> None:
    with pytest.raises(RequestError, match="uses embedding:dog; the available embeddings are cat"):
        chunks("a embedding:dog", clip, "comfy", {"cat": 1})
    (chunk,) = chunks("(embedding:cat.pt, red:1.2)", clip, "comfy", {"cat": 2})
    assert [token.vector for token in chunk[:2]] == [("cat", 0), ("cat", 1)] and len(chunk) == 4


@pytest.mark.parametrize("text", ["embedding:cat,embedding:dog", "embedding:cat.pt,,Embedding:DOG.safetensors,"])
def test_comfy_embeddings_next_to_each_other(clip: Tokenizer, text: str) -> None:
    """Both are used, and each comma is a token, as if a space came after it."""
    (chunk,) = chunks(text, clip, "comfy", {"cat": 2, "dog": 1})
    assert [token.vector for token in chunk if token.vector] == [("cat", 0), ("cat", 1), ("dog", 0)]
    spaced, both = text.replace(",E", ", E").replace(",e", ", e"), {"cat": 2, "dog": 1}
    assert [(token.id, token.vector) for token in chunk] == [
        (token.id, token.vector) for found in chunks(spaced, clip, "comfy", both) for token in found
    ]
    with pytest.raises(RequestError, match="uses embedding:fox;"):
        chunks(f"{text.rstrip(',')},embedding:fox", clip, "comfy", both)


@torch.no_grad()
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_vectors_stand_for_words(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """An embedding of the words' own vectors is those words; SDXL's pooled vector still is at the first EOS."""
    pipe: Pipeline = request.getfixturevalue(model)
    own = [
        encoder.text_model.embeddings.token_embedding.weight[tokenizer.encode("blue lemon")].clone()
        for tokenizer, encoder in zip(pipe.tokenizers, pipe.text_encoders, strict=True)
    ]
    save_file(
        dict(zip(("clip_l", "clip_g"), own, strict=False)) if len(own) > 1 else {"emb_params": own[0]},
        tmp_path / "bl.safetensors",
    )
    words, vectors = (
        pipe.encode("a blue lemon on"),
        pipe.encode("a bl on", Request(prompt="", embeddings=tmp_path / "bl.safetensors")),
    )
    assert torch.equal(words.context, vectors.context)
    assert words.pooled is None or (vectors.pooled is not None and torch.equal(words.pooled, vectors.pooled))
    assert not torch.equal(words.context, pipe.encode("a bl on").context)


def test_two_threads_with_their_own_embeddings(sd1: Pipeline, tmp_path: Path) -> None:
    """The same trigger, another file: neither run sees the other's."""
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        save_file({"emb_params": torch.full((2, 16), k + 1.0)}, tmp_path / str(k) / "style.safetensors")
    requests = [
        RUN.replace(prompt="a style lemon", embeddings=[tmp_path / str(k) / "style.safetensors"]) for k in (0, 1)
    ]
    alone = [sd1.generate(r).latents for r in requests]
    assert not torch.equal(*alone)
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    threads = [
        threading.Thread(target=lambda k=k: found[k].extend(sd1.generate(requests[k]).latents for _ in range(3)))
        for k in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(latents, alone[k]) for k in (0, 1) for latents in found[k])


# ---- the run ---------------------------------------------------------------------------------------------------------


def by_hand(pipe: Pipeline, at: Any, weights: Sequence[float] = (1.0,), negative: str = "") -> Tensor:
    """RUN with the conditions switched by hand: `at(step)` gives the prompts of a step. Euler calls once a step."""
    plan = pipe.plan(RUN)
    sampler, sigmas = plan.sampler, plan.sigmas
    step = -1

    def outputs(x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]:
        nonlocal step
        step += 1
        texts = [*at(step), negative]
        conditions = [pipe.encode(text) for text in texts]
        run = Denoiser(pipe.unet, pipe.schedule, EPSILON, conditions, sampler.timestep, sigmas)
        return run.outputs(x, sigma, count)

    with torch.inference_mode():
        denoise = guided(outputs, EPSILON, 3.0, weights=weights)
        noise = SeededNoise([5], (4, 4, 4))
        x = noise.draw() * ((sigmas[0] ** 2 + 1) ** 0.5 if sampler.start == "vp" else sigmas[0])
        return [s.x for s in SOLVERS["euler"](denoise, x, sigmas, noise)][-1]


def drawn(pipe: Pipeline, prompt: str, **fields: Any) -> Tensor:
    return pipe.generate(RUN.replace(prompt=prompt, **fields)).latents


@pytest.mark.parametrize(
    ("prompt", "at"),
    [
        ("a [lemon:background:2] on", lambda step: ["a lemon on" if step <= 2 else "a background on"]),
        ("a [lemon:background:0.5] on", lambda step: ["a lemon on" if step <= 3 else "a background on"]),
        ("a [blue :1]lemon", lambda step: ["a lemon" if step <= 1 else "a blue lemon"]),
        ("a [blue ::1]lemon", lambda step: ["a blue lemon" if step <= 1 else "a lemon"]),
        ("a [blue|lemon|on]", lambda step: [f"a {('blue', 'lemon', 'on')[max(step - 1, 0) % 3]}"]),
    ],
)
def test_editing_is_switching_by_hand(sd1: Pipeline, prompt: str, at: Any) -> None:
    """To the last bit. As in A1111, whose sampler counts steps from 0 and whose schedule from 1: step s has the first
    text that holds until s or later, so what holds until 2 is used three times.
    """
    assert torch.equal(drawn(sd1, prompt), by_hand(sd1, at))
    assert not torch.equal(drawn(sd1, prompt), by_hand(sd1, lambda _: at(5)))


def test_and_is_the_weighted_sum(sd1: Pipeline) -> None:
    parts = ["a lemon", "blue background"]
    found = drawn(sd1, "a lemon AND blue background :0.5", negative_prompt="on")
    assert torch.equal(found, by_hand(sd1, lambda _: parts, (1.0, 0.5), "on"))


def test_and_with_editing_in_both(sd1: Pipeline) -> None:
    found = drawn(sd1, "[a:on:1] lemon :0.7 AND [blue|background]")
    expected = by_hand(
        sd1,
        lambda step: ["a lemon" if step <= 1 else "on lemon", ("blue", "background")[max(step - 1, 0) % 2]],
        (0.7, 1.0),
    )
    assert torch.equal(found, expected)


def test_and_without_guidance_is_still_the_sum(sd1: Pipeline) -> None:
    """unconditional + sum w (cond - unconditional) at scale 1 too: it needs the unconditional, w not summing to 1."""
    apart = drawn(sd1, "a lemon AND blue", guidance_scale=1.0)
    mean = drawn(sd1, "a lemon :0.5 AND blue :0.5", guidance_scale=1.0)
    assert not torch.equal(apart, mean) and apart.isfinite().all()


@pytest.mark.parametrize("method", ["apg", "cfg_zero", "perp_neg"])
def test_and_goes_with_every_method(sd1: Pipeline, method: str) -> None:
    one = drawn(sd1, "a lemon AND blue", guidance_method=method, negative_prompt="on")
    assert one.isfinite().all()
    assert not torch.equal(one, drawn(sd1, "a lemon", guidance_method=method, negative_prompt="on"))


def test_and_with_one_part_of_weight_one_is_the_prompt(sd1: Pipeline) -> None:
    """Halves of the same are the whole."""
    torch.testing.assert_close(drawn(sd1, "a lemon :0.5 AND a lemon :0.5"), drawn(sd1, "a lemon"), rtol=1e-4, atol=1e-4)


def test_the_negative_prompt_is_edited_too(sd1: Pipeline) -> None:
    edited = drawn(sd1, "a lemon", negative_prompt="[blue:background:2]")
    assert not torch.equal(edited, drawn(sd1, "a lemon", negative_prompt="blue"))
    assert not torch.equal(edited, drawn(sd1, "a lemon", negative_prompt="background"))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "pndm", "dpm_adaptive", "restart"])
def test_every_kind_of_solver_reads_the_schedule(sd1: Pipeline, sampler: str) -> None:
    fields = {"sampler": sampler, "spacing": None, "guidance_scale": 1.0}
    edited, lemon = drawn(sd1, "[lemon:blue:2]", **fields), drawn(sd1, "lemon", **fields)
    assert edited.isfinite().all()
    assert not torch.equal(edited, lemon) and not torch.equal(edited, drawn(sd1, "blue", **fields))
    assert torch.equal(drawn(sd1, "[lemon:blue:1000]", **fields), lemon)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_edited_prompts_share_a_batch(model: str, request: pytest.FixtureRequest) -> None:
    """Each with its own schedule; and each as when drawn alone."""
    pipe: Pipeline = request.getfixturevalue(model)
    prompts = ["[lemon:blue:2]", "a lemon", "[blue|background]"]
    requests = [RUN.replace(prompt=prompt, seed=k, batch=3) for k, prompt in enumerate(prompts)]
    with counted(pipe.unet) as rows:
        together_ = pipe.generate(requests)
    assert set(rows) == {6}
    for result, single in zip(together_, requests, strict=True):
        torch.testing.assert_close(result.latents, pipe.generate(single).latents, rtol=1e-3, atol=1e-3)


def test_prompts_of_other_parts_do_not_share_a_batch(sd1: Pipeline) -> None:
    requests = [
        RUN.replace(prompt=prompt, batch=3) for prompt in ("a lemon", "a lemon AND blue", "a lemon AND blue :2")
    ]
    alone = [sd1.generate(r).latents for r in requests]
    assert all(torch.equal(r.latents, latents) for r, latents in zip(sd1.generate(requests), alone, strict=True))


def test_lengths_of_prompt_and_negative_may_differ(sd1: Pipeline) -> None:
    """Each is looked at by itself: the same as repeating the shorter one, which changes no attention."""
    long = "blue " * 100
    whole, short = sd1.encode(long), sd1.encode("a lemon")
    sigmas = sd1.plan(RUN).sigmas
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    with torch.inference_mode():
        apart = Denoiser(sd1.unet, sd1.schedule, EPSILON, [whole, short]).outputs(x, sigmas[0])
        twice = Condition(short.context.repeat(1, 2, 1))
        equal = Denoiser(sd1.unet, sd1.schedule, EPSILON, [whole, twice]).outputs(x, sigmas[0])
    torch.testing.assert_close(apart, equal, rtol=1e-4, atol=1e-4)
    with counted(sd1.unet) as rows:
        drawn(sd1, long, negative_prompt="a lemon")
    assert rows == [1] * 12
    with counted(sd1.unet) as rows:  # Compel fills the shorter up
        drawn(sd1, long, negative_prompt="a lemon", prompt_syntax="compel")
    assert rows == [2] * 6


def test_parts_of_unequal_length_repeat_the_last_vector(sd1: Pipeline) -> None:
    """A1111's stack_conds."""
    long, short = sd1.encode_parts("blue " * 100 + " AND a lemon")
    assert long.timeline[0][1].context.shape == short.timeline[0][1].context.shape == (1, 154, 16)
    alone = sd1.encode("a lemon").context
    assert torch.equal(short.timeline[0][1].context, torch.cat([alone, alone[:, -1:].repeat(1, 77, 1)], 1))


def test_timelines_of_a_batch() -> None:
    a, b, c = (Condition(torch.full((1, 1, 1), float(k))) for k in range(3))
    merged = batch_timelines([[(3, a), (8, b)], [(5, c), (8, a)]])
    assert [(until, condition.context.flatten().tolist()) for until, condition in merged] == [
        (3, [0.0, 2.0]),
        (5, [1.0, 2.0]),
        (8, [1.0, 0.0]),
    ]


# ---- the cache -------------------------------------------------------------------------------------------------------


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of every call of a network; a hook would have every prompt encoded anew."""
    rows: list[int] = []
    kind, forward = type(module), type(module).forward

    def count(self: torch.nn.Module, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        if self is module:  # a UNet's latents may be fewer than its conditions
            rows.append(len(output if isinstance(output, torch.Tensor) else args[0]))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", count)
        yield rows


def test_a_prompt_is_encoded_once(sd1: Pipeline) -> None:
    with counted(sd1.text_encoders[0]) as rows:
        first = drawn(sd1, "lemon lemon lemon", negative_prompt="blue blue")
        assert len(rows) == 2
        assert torch.equal(drawn(sd1, "lemon lemon lemon", negative_prompt="blue blue"), first)
        assert len(rows) == 2
        drawn(sd1, "lemon lemon on", negative_prompt="blue blue", seed=9)
        assert len(rows) == 3
        for fields in ({"clip_skip": 1}, {"prompt_syntax": "plain"}, {"emphasis": "ignore"}):
            drawn(sd1, "lemon lemon on", negative_prompt="blue blue", guidance_scale=1.0, **fields)
        assert len(rows) == 6
        drawn(sd1, "lemon [lemon|on]")
        before = len(rows)
        drawn(sd1, "lemon [lemon|on]", seed=1)
        assert len(rows) == before
        drawn(sd1, "lemon [lemon|on]", steps=3)  # another schedule, whose mean may be another
        assert len(rows) > before


def test_what_comes_out_of_the_cache_is_the_callers_own(sd1: Pipeline) -> None:
    with torch.inference_mode():
        first = sd1.encode("blue lemon").context
        kept = first.clone()
        first.zero_()
    assert torch.equal(sd1.encode("blue lemon").context, kept)


def test_an_encoder_that_is_trained_is_asked_again(sd1_folder: Path) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu")
    before = pipe.encode("a lemon").context
    with torch.no_grad():
        pipe.text_encoders[0].text_model.final_layer_norm.weight.mul_(2)
    torch.testing.assert_close(pipe.encode("a lemon").context, 2 * before)


def test_the_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    made: list[str] = []

    def make(name: str, floats: int) -> list[EncodedPart]:
        made.append(name)
        return [EncodedPart(1.0, [(1, Condition(torch.zeros(1, 1, floats)))])]

    cache = EncodingCache(limit=100)  # bytes
    for name, floats in (
        ("a", 10),
        ("b", 10),
        ("a", 10),
        ("c", 10),
        ("a", 10),
        ("b", 10),
        ("huge", 1000),
        ("huge", 1000),
    ):
        cache.get(name, lambda name=name, floats=floats: make(name, floats))
    assert made == ["a", "b", "c", "b", "huge", "huge"]


def test_threads_that_ask_at_once_encode_once() -> None:
    made: list[int] = []
    cache, barrier = EncodingCache(), threading.Barrier(4)

    def ask() -> None:
        barrier.wait()
        cache.get("a", lambda: made.append(1) or [])  # type: ignore[func-returns-value]

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": "()"}, "has no words to encode"),
        ({"prompt": "(a:1e308)", "prompt_syntax": "comfy"}, "weight"),
        (
            {"prompt": "a", "prompt_syntax": "comfy", "emphasis": "ignore"},
            "emphasis is given; it is for prompt_syntax a1111",
        ),
        ({"prompt": "a", "wildcards": "cards"}, "wildcards is given; it is for prompt_syntax comfy"),
        ({"prompt": "a", "embeddings": ["nowhere.pt"]}, "nowhere.pt.*does not exist"),
    ],
)
def test_what_cannot_be_encoded_is_refused(sd1: Pipeline, fields: dict[str, Any], sentence: str) -> None:
    from mezzotint import MezzotintError

    with pytest.raises(MezzotintError, match=sentence):
        sd1.generate(RUN.replace(**fields))


def test_a_text_that_is_no_text_is_refused(sd1: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"prompt is 'a .*must be a text"):
        sd1.encode("a \ud800")
    with pytest.raises(RequestError, match="surrogate"):
        plan("a \ud800")


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_choices_are_drawn_from_the_seed_and_written_out(sd1: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "place.txt").write_text("on\nbackground\n")
    request = RUN.replace(
        prompt="a {blue|lemon} __place__", negative_prompt="{a|on}", prompt_syntax="comfy", wildcards=tmp_path
    )
    drawn_ = {sd1.resolve(request.replace(seed=seed)).prompt for seed in range(30)}
    assert drawn_ == {f"a {a} {b}" for a in ("blue", "lemon") for b in ("on", "background")}
    result = sd1.generate(request)
    assert result.request == sd1.resolve(request) == sd1.resolve(result.request)
    assert json.loads(result.images[0].info["mezzotint"])["request"]["prompt"] == result.request.prompt
    assert torch.equal(sd1.generate(result.request).latents, result.latents)
    plain = RUN.replace(
        prompt=result.request.prompt, negative_prompt=result.request.negative_prompt, prompt_syntax="plain"
    )
    assert torch.equal(sd1.generate(plain).latents, result.latents)


def test_choices_may_be_kept(sd1: Pipeline) -> None:
    request = RUN.replace(prompt="{blue|lemon}", prompt_syntax="comfy", choices="keep")
    assert sd1.resolve(request).prompt == "{blue|lemon}"
    drawn_ = sd1.resolve(request.replace(prompt="\\{blue|lemon\\}", choices=None))
    assert drawn_.prompt == "{blue|lemon}" and sd1.resolve(drawn_) == drawn_
    assert sd1.resolve(RUN.replace(prompt="{blue|lemon}")).prompt == "{blue|lemon}"  # no choice in the other dialects


# ---- the record ------------------------------------------------------------------------------------------------------


def test_the_record_contains_the_prompt_fields(sd1: Pipeline, tmp_path: Path) -> None:
    """And which numbers the embeddings were that the prompt names."""
    for k, name in enumerate(("style", "unused")):
        save_file({"emb_params": torch.full((2, 16), k + 1.0)}, tmp_path / f"{name}.safetensors")
    result = sd1.generate(RUN.replace(prompt="a (style:1.2) lemon", embeddings=tmp_path, emphasis="no_norm"))
    info = result.images[0].info
    record = json.loads(info["mezzotint"])
    assert record["request"]["embeddings"] == [tmp_path.name] and record["request"]["prompt_syntax"] == "a1111"
    assert {*record["model"]["embeddings"]} == {"style"} and len(record["model"]["embeddings"]["style"]) == 64
    assert "Emphasis: No norm" in info["parameters"]
    assert "embeddings" not in json.loads(sd1.generate(RUN.replace(prompt="a")).images[0].info["mezzotint"])["model"]


def test_each_picture_of_a_batch_records_the_embeddings_of_its_own_prompt(sd1: Pipeline, tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(1, 16)}, tmp_path / "style.safetensors")
    request = RUN.replace(steps=1, batch=2, embeddings=tmp_path)
    results = sd1.generate([request.replace(prompt=prompt) for prompt in ("a style", "a lemon")])
    records = [json.loads(result.images[0].info["mezzotint"]) for result in results]
    assert [len(record["group"]) for record in records] == [2, 2]
    assert ["embeddings" in record["model"] for record in records] == [True, False]


def test_a_hidden_span_hides_all_but_the_ends_of_each_window() -> None:
    """Tokens 2 to 5 are hidden in two windows of 6: BOS, up to four tokens, EOS."""
    first, second = (
        tuple(Token(id, 1.0, 0, 1, int(id in (3, 4, 5, 6))) for id in ids) for ids in ([1, 2, 3, 4], [5, 6, 7])
    )
    masks = [_attention_mask([first, second], i, hidden_span=1, window=6) for i in (0, 1)]
    assert masks[0].tolist() == [[True, True, True, False, False, True]]
    assert masks[1].tolist() == [[True, False, False, True, True, True]]
