"""NaN and infinity, put into a run at every stage: each is caught, and none becomes a picture.

In float16 and bfloat16 the poisoned value is one that float32 would have held (an overflow): the part runs again and
the record says so. In float32 it stays, as from damaged weights: an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_form import short_form
from torch import Tensor, nn

import mezzotint
from mezzotint import MezzotintError, Pipeline, Request
from mezzotint.diffusion.solvers import SOLVERS, Step
from mezzotint.run.nan_guard import all_finite, copy_in_float32

REQUEST = Request(prompt="a lemon on a blue background", seed=7, steps=3, guidance_scale=3.0, count=2, batch=2)
ENCODER, UNET, VAE = "text_encoder", "unet", "vae"

# part, module in it, at which of its calls (-1: all)
POINTS = {
    "token embedding": (ENCODER, "text_model.embeddings.token_embedding", -1),
    "text encoder layer": (ENCODER, "text_model.encoder.layers.1", -1),
    "text encoder's last norm": (ENCODER, "text_model.final_layer_norm", -1),
    "time embedding": (UNET, "time_embedding", 0),
    "UNet's first layer, first step": (UNET, "conv_in", 0),
    "UNet down, second step": (UNET, "down_blocks.0.resnets.0", 1),
    "attention, last step": (UNET, "down_blocks.0.attentions.0", 2),
    "UNet middle, second step": (UNET, "mid_block", 1),
    "UNet's last layer, last step": (UNET, "conv_out", 2),
    "latents to the VAE": (VAE, "post_quant_conv", -1),
    "VAE middle": (VAE, "decoder.mid_block", -1),
    "VAE's last layer": (VAE, "decoder.conv_out", -1),
}


POISON = {"bfloat16": math.nan, "float16": math.inf}


@contextmanager
def poisoned(pipe: Pipeline, part: str, name: str, at: int, value: float, only_low: bool) -> Iterator[list[int]]:
    """One value of what a module gives, of one picture; yields the numbers of the calls that were poisoned."""
    network = {ENCODER: pipe.text_encoders[0], UNET: pipe.unet, VAE: pipe.vae}[part]
    calls, hit = [0], list[int]()

    def poison(_: nn.Module, __: Any, output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output
        calls[0] += 1
        if (only_low and made.dtype == torch.float32) or at not in (-1, calls[0] - 1):
            return output
        hit.append(calls[0] - 1)
        made = made.clone()
        made[(-1, *(0 for _ in made.shape[1:]))] = value
        return (made, *output[1:]) if isinstance(output, tuple) else made

    hook = network.get_submodule(name).register_forward_hook(poison)
    try:
        yield hit
    finally:
        hook.remove()


def load(folder: Path, dtype: str) -> Pipeline:
    return mezzotint.load(folder, device="cpu", dtype=dtype)  # a fresh one: prompts are kept


def pixels(images: list[Any]) -> Any:
    return np.stack([np.array(image) for image in images]).astype(int)


@pytest.fixture(scope="module")
def clean(sd1: Pipeline) -> Any:
    """The pixels of the pictures drawn in float32."""
    return pixels(sd1.generate(REQUEST).images)


@pytest.mark.parametrize(("point", "dtype"), short_form([*POINTS], [*POISON]))
def test_what_overflows_is_run_again_in_float32(sd1_folder: Path, clean: Any, point: str, dtype: str) -> None:
    (part, name, at), value = POINTS[point], POISON[dtype]
    pipe = load(sd1_folder, dtype)
    with poisoned(pipe, part, name, at, value, only_low=True) as hit:
        result = pipe.generate(REQUEST)
    assert hit, "the poison was there"
    assert bool(result.latents.isfinite().all())
    for image in result.images:
        assert json.loads(image.info["mezzotint"])["float32"] == [part]
    assert abs(pixels(result.images) - clean).mean() < 3.0, "the picture that was asked for"
    assert next(pipe.unet.parameters()).dtype == pipe.dtype != torch.float32, "for this run alone"
    words = {"prompt": "a lemon", "negative_prompt": "blue"}  # others than are kept
    again = pipe.generate(REQUEST.replace(**words, steps=1, count=1))
    assert "float32" not in json.loads(again.images[0].info["mezzotint"])


@pytest.mark.parametrize(("point", "dtype"), short_form([*POINTS], ["float32", "bfloat16"]))
def test_what_is_no_number_in_float32_either_is_an_error(sd1_folder: Path, point: str, dtype: str) -> None:
    part, name, _ = POINTS[point]
    seen: list[Any] = []
    pipe = load(sd1_folder, dtype)
    with (
        poisoned(pipe, part, name, -1, math.nan, only_low=False),
        pytest.raises(MezzotintError, match=f"the {part} returned values that are not finite .* in float32 too"),
    ):
        pipe.generate(REQUEST, on_image=lambda *made: seen.append(made))
    assert not seen, "no picture was handed out"


def test_it_ends_at_the_step_that_went_wrong(sd1: Pipeline) -> None:
    done: list[int] = []
    with poisoned(sd1, UNET, "mid_block", 1, math.nan, only_low=False), pytest.raises(MezzotintError):
        sd1.generate(REQUEST, on_step=lambda k, _: done.append(k))
    assert done == [1]
    with poisoned(sd1, UNET, "mid_block", 1, math.nan, only_low=False), pytest.raises(MezzotintError):
        for step in sd1.stream(REQUEST):
            assert step.x.isfinite().all()


def test_a_solver_that_makes_nan_of_numbers(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(denoise: Any, x: Tensor, sigmas: list[float], noise: Any, **_: Any) -> Iterator[Step]:
        denoised = denoise(x, sigmas[0])
        yield Step(0, sigmas[1], x / 0.0, denoised)

    monkeypatch.setitem(SOLVERS, "euler", broken)
    with pytest.raises(MezzotintError, match=r"step 1 has values that are not finite"):
        sd1.generate(REQUEST.replace(sampler="euler"))


def test_latents_that_are_no_numbers(sd1: Pipeline) -> None:
    noise = torch.zeros(2, 4, 4, 4)
    noise[1, 2, 3, 0] = math.nan
    with pytest.raises(MezzotintError, match=r"the UNet's input at sigma .* the latents that were given"):
        sd1.generate(REQUEST, noise)
    with pytest.raises(MezzotintError, match="the vae returned"):
        sd1.decode(noise)


def test_finite() -> None:
    large = torch.full((1000,), 6e4, dtype=torch.float16)
    assert all_finite([large, torch.zeros(0), -large]) and all_finite([])
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite([torch.zeros(3), torch.tensor([0.0, bad])])
    assert not all_finite([torch.tensor([math.inf, -math.inf])])


def test_a_copy_in_float32_computes_the_same(sd1_folder: Path) -> None:
    """Its fused projections follow its weights, and the network that it was made of stays as it is."""
    low = load(sd1_folder, "bfloat16").unet
    copy, exact = copy_in_float32(low), load(sd1_folder, "float32").unet
    exact.load_state_dict(low.state_dict())
    exact.fuse_projections()
    condition = mezzotint.models.unet.Condition(torch.randn(1, 77, 16))  # type: ignore[attr-defined]
    x = torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        assert torch.equal(copy(x, 500.0, condition), exact(x, 500.0, condition))
    assert low.conv_in.weight.dtype == torch.bfloat16
