"""Runs that start from more than noise: masks and their blend, hires-fix, seamless tiling, variation seeds.

Two tiny models (conftest.py); what diffusers does too is held against it in parity/test_img2img.py.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from short_form import short_form
from torch import Tensor

import mezzotint
from mezzotint import Pipeline, Request, RequestError
from mezzotint.diffusion.blend import Blend
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.variation import paste_center, slerp
from mezzotint.models.convolution import Conv2d, seamless

RUN = Request(prompt="a lemon on a blue background", seed=7, steps=4, sampler="euler")


def photograph(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def blot(width: int = 32, height: int = 32) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (9, 9, 24, 27))
    return mask


def levels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(image, dtype=np.int16)


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.abs().max())


PICTURE = RUN.replace(image=photograph(), strength=0.5)
MASKED = RUN.replace(image=photograph(), mask=blot(), strength=0.7)


# ---- the same as ever ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        PICTURE,
        MASKED,
        MASKED.replace(strength=1.0, masked_content="noise"),
        RUN.replace(image=photograph(), outpaint=(0, 0, 8, 8)),
        RUN.replace(hires=1.5),
        RUN.replace(hires=1.5, hires_upscale="pixels"),
        RUN.replace(seamless="xy"),
        RUN.replace(variation_strength=0.2, variation_seed=3, seed_size=(24, 40)),
    ],
    ids=["image", "mask", "noise under the mask", "outpaint", "hires", "hires by pixels", "seamless", "variation"],
)
def test_a_batch_changes_nothing_and_a_stream_ends_in_the_picture(sd1: Pipeline, request_: Request) -> None:
    request = request_.replace(count=3, sampler="euler_a")
    first = sd1.generate(request)
    assert torch.equal(first.latents, sd1.generate(first.request).latents)
    together = sd1.generate(request.replace(batch=3))
    assert error(together.latents, first.latents) < 1e-5
    alone = sd1.generate(request.replace(count=1, seed=9))
    assert torch.equal(alone.latents[0], first.latents[2])
    assert np.array_equal(levels(alone.images[0]), levels(first.images[2]))
    done: list[tuple[int, int]] = []
    sd1.generate(request.replace(count=1), on_step=lambda k, n: done.append((k, n)))
    steps = list(sd1.stream(request.replace(count=1)))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert done == [(k + 1, len(steps)) for k in range(len(steps))]
    assert torch.equal(steps[-1].x, first.latents[:1])
    assert sd1.resolve(first.request) == first.request


NAMED = [name for name in SOLVERS if name in mezzotint.samplers.names.NAMES and name != "dpm_adaptive"]


@pytest.mark.parametrize(("name", "strength"), short_form(NAMED, [MASKED.strength, 1.0]))
def test_every_solver_starts_from_a_picture_and_keeps_a_mask(sd1: Pipeline, name: str, strength: float) -> None:
    inside = np.asarray(blot()) > 0
    image = sd1.generate(MASKED.replace(sampler=name, strength=strength)).images[0]
    assert np.array_equal(levels(image)[~inside], levels(photograph())[~inside])
    assert (levels(image)[inside] != levels(photograph())[inside]).mean() > 0.5


# ---- the blend -------------------------------------------------------------------------------------------------------


def test_the_blend_keeps_what_it_shall() -> None:
    generator = torch.Generator().manual_seed(0)
    x, x0, noise = (torch.randn(2, 4, 6, 5, generator=generator) for _ in range(3))
    keep = torch.zeros(1, 1, 6, 5)
    keep[..., :3] = 1.0
    seen = []

    class Half:
        def __call__(self, x: Tensor, sigma: float) -> Tensor:
            seen.append(x)
            return x / 2

        def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            return self(x, sigma), x / 3

    blend = Blend(Half(), keep, x0, noise, skip_above=10.0)
    denoised = blend(x, 2.0)
    assert torch.equal(seen[-1][..., :3], (x0 + 2.0 * noise)[..., :3]) and torch.equal(seen[-1][..., 3:], x[..., 3:])
    assert torch.equal(denoised[..., :3], x0[..., :3]) and torch.equal(denoised[..., 3:], x[..., 3:] / 2)
    guided, unconditional = blend.pair(x, 2.0)
    assert torch.equal(guided, denoised) and torch.equal(unconditional[..., 3:], x[..., 3:] / 3)
    assert torch.equal(unconditional[..., :3], x0[..., :3])
    blend(x, 10.0)
    assert torch.equal(seen[-1], x), "a run from pure noise has nothing of the original at its first level"
    half = replace(blend, keep=torch.full((1, 1, 1, 1), 0.25))
    assert torch.allclose(half(x, 2.0), 0.25 * x0 + 0.75 * (0.25 * (x0 + 2 * noise) + 0.75 * x) / 2)


def test_masked_content_decides_what_lies_under_the_mask(sd1: Pipeline) -> None:
    drawn = {
        content: sd1.generate(MASKED.replace(masked_content=content)).latents
        for content in ("original", "fill", "noise")
    }
    for a, b in (("original", "fill"), ("original", "noise"), ("fill", "noise")):
        assert error(drawn[a], drawn[b]) > 1e-2, (a, b)
    cell = (slice(None), slice(None), 0, 0)  # outside of the mask
    assert torch.equal(drawn["original"][cell], drawn["noise"][cell])


def test_noise_under_the_mask_is_the_runs_own(sd1: Pipeline) -> None:
    """At the first level there is (1 + sigma) times the noise, as A1111's "latent noise" has it."""
    request = sd1.resolve(MASKED.replace(masked_content="noise"))
    seen: list[Tensor] = []
    hook = sd1.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:1]))
    next(sd1.stream(request))
    hook.remove()
    sigma = sd1.plan(request).sigmas[0]
    generator = torch.Generator().manual_seed(7)
    _, noise = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
    expected = (1.0 + sigma) * noise / (sigma**2 + 1.0) ** 0.5
    assert torch.allclose(seen[0][..., 2, 2], expected[..., 2, 2], atol=1e-5)


def test_outpainting_keeps_the_picture(sd1: Pipeline) -> None:
    image = sd1.generate(RUN.replace(image=photograph(), outpaint=(8, 0, 16, 8))).images[0]
    assert image.size == (32 + 24, 32 + 8)
    assert np.array_equal(levels(image)[:32, 8:40], levels(photograph()))
    assert len(np.unique(levels(image)[32:].reshape(-1, 3), axis=0)) > 50


def test_a_resized_mask_is_a_notice(sd1: Pipeline) -> None:
    result = sd1.generate(MASKED.replace(mask=blot(32, 32).resize((64, 48)), count=2))
    assert result.notices == ("the mask is 64x48 and the image 32x32; the mask was resized",)
    assert sd1.generate(MASKED).notices == ()


# ---- what does not fit -----------------------------------------------------------------------------------------------

HERE: dict[str, Any] = {"image": photograph()}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask": blot()}, "mask is given, but there is no image"),
        ({"strength": 0.5}, "strength is given, but there is no image"),
        ({"outpaint": (8, 0, 0, 0)}, "outpaint is given, but there is no image"),
        (HERE | {"mask_blur": 4.0}, "mask_blur is given, but there is neither mask nor outpaint"),
        (HERE | {"masked_content": "fill"}, "masked_content is given"),
        (HERE | {"only_masked": 32}, "only_masked is given, but there is no mask"),
        (HERE | {"outpaint": (8, 0, 0, 0), "invert_mask": True}, "invert_mask is given, but there is no mask"),
        (HERE | {"hires": 2.0}, "hires and image are both given"),
        (
            HERE | {"mask": blot(), "only_masked": 8, "outpaint": (8, 0, 0, 0)},
            "only_masked and outpaint are both given",
        ),
        (HERE | {"strength": 0.1}, "strength is 0.1, which leaves none of 4 steps"),
        (HERE | {"strength": 0.0}, "strength is 0.0, which leaves none of 4 steps"),
        (HERE | {"mask": Image.new("L", (32, 32))}, "mask is black everywhere"),
        (HERE | {"outpaint": (16, 0, 16, 0), "width": 32, "height": 32}, "outpaint is .*, which leaves"),
        ({"image": "nothing.png"}, "image is 'nothing.png', which is not there"),
        ({"hires_steps": 3}, "hires_steps is given, but there is no hires"),
        ({"hires": 2.0, "hires_strength": 0.01}, "hires_strength is 0.01, which leaves none of 4 steps"),
        ({"hires": 8.0, "width": 4096, "height": 32}, "hires is 8.0, which gives 32768x256"),
        ({"variation_seed": 3}, "variation_seed is given, but there is no variation_strength"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_gets_a_sentence(sd1: Pipeline, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=f"^{sentence}"):
        sd1.generate(RUN.replace(**changes))


def test_a_mask_that_falls_between_the_cells(sd1: Pipeline) -> None:
    speck = Image.new("L", (32, 32))
    speck.paste(255, (10, 10, 15, 15))
    with pytest.raises(RequestError, match="mask is too small: it covers no cell of 8x8 pixels"):
        sd1.generate(MASKED.replace(mask=speck))
    image = sd1.generate(MASKED.replace(mask=speck, only_masked=4)).images[0]
    changed = (levels(image) != levels(photograph())).any(-1)
    assert changed[10:15, 10:15].mean() > 0.5 and not changed[np.asarray(speck) == 0].any()


def test_the_middle_grey_of_a_mask_is_drawn(sd1: Pipeline) -> None:
    """As in diffusers, a mask counts as white from 128 on."""
    grey = MASKED.replace(masked_content="noise")
    white = sd1.generate(grey.replace(mask=Image.new("L", (32, 32), 255))).latents
    assert torch.equal(sd1.generate(grey.replace(mask=Image.new("L", (32, 32), 128))).latents, white)
    with pytest.raises(RequestError, match=r"^mask is too dark: its brightest value is 127"):
        sd1.generate(grey.replace(mask=Image.new("L", (32, 32), 127)))


def test_the_default_strengths_are_those_of_diffusers(sd1: Pipeline, sdxl: Pipeline) -> None:
    request = RUN.replace(image=photograph())
    assert sd1.resolve(request).strength == 0.8
    assert sdxl.resolve(request).strength == 0.3
    for pipe in (sd1, sdxl):
        assert pipe.resolve(request.replace(mask=blot())).strength == 1.0
        assert pipe.resolve(request.replace(outpaint=(8, 0, 0, 0))).strength == 1.0
    assert sd1.resolve(RUN.replace(hires=2.0)).hires_strength == 0.7  # A1111's


# ---- hires-fix -------------------------------------------------------------------------------------------------------


def test_hires_by_pixels_is_a_run_from_the_enlarged_picture(sd1: Pipeline) -> None:
    request = RUN.replace(hires=1.5, hires_upscale="pixels", hires_steps=4, hires_strength=0.75)
    whole = sd1.generate(request)
    first = sd1.generate(RUN).images[0].resize((48, 48), Image.Resampling.LANCZOS)
    second = sd1.generate(RUN.replace(image=first, steps=4, strength=0.75))
    assert whole.images[0].size == (48, 48)
    assert torch.equal(whole.latents, second.latents)
    assert np.array_equal(levels(whole.images[0]), levels(second.images[0]))


def test_in_the_second_pass_prompt_editing_goes_on(sd1: Pipeline) -> None:
    """A1111's get_learned_conditioning_prompt_schedules: there 0.5 is over and 1.5 is its middle."""
    hires = {"hires": 1.5, "hires_upscale": "pixels", "hires_steps": 4, "hires_strength": 1.0}
    request = RUN.replace(prompt="[a lemon:a whale:0.5] on [red:blue:1.5]", **hires)
    first = sd1.generate(RUN.replace(prompt="[a lemon:a whale:0.5] on red")).images[0]
    larger = RUN.replace(image=first.resize((48, 48), Image.Resampling.LANCZOS), steps=4, strength=1.0)
    second = sd1.generate(larger.replace(prompt="a whale on [red:blue:0.5]"))
    assert torch.equal(sd1.generate(request).latents, second.latents)


@pytest.mark.parametrize(
    ("sampler", "strength", "fixed", "whole", "left"),
    [
        ("euler", 0.75, None, 20, 15),  # diffusers: int(20 * 0.75)
        ("euler", 1.0, None, 20, 20),
        ("euler", 0.75, True, 26, 20),
        ("Euler", 0.75, None, 20, 16),  # A1111: t_enc = int(20 * 0.75), sigmas[20 - t_enc - 1:]
        ("Euler", 1.0, None, 20, 20),  # t_enc = int(20 * 0.999)
        ("Euler", 0.01, None, 20, 1),
        ("Euler", 0.75, True, 26, 20),  # int(20 / 0.75), t_enc = 19
        ("Euler", 1.0, True, 20, 20),
        ("DDIM", 0.75, None, 19, 14),  # between timesteps[:t_enc], of range(0, 1000, 1000 // 20)
        ("DDIM", 1.0, None, 19, 18),
        ("DDIM", 0.75, True, 26, 18),
        ("euler_ancestral", 0.75, None, 26, 20),  # ComfyUI: int(20 / 0.75) steps, the last 20 of them
        ("euler_ancestral", 0.75, False, 20, 15),
        ("euler_ancestral", 1.0, None, 20, 20),
    ],
)
def test_each_program_counts_the_steps_from_a_picture_in_its_way(
    sd1: Pipeline, sampler: str, strength: float, fixed: bool | None, whole: int, left: int
) -> None:
    """setup_img2img_steps and sample_img2img of A1111, KSampler.set_steps of ComfyUI."""
    request = RUN.replace(image=photograph(), sampler=sampler, steps=20, strength=strength, fix_steps=fixed)
    plan = sd1.plan(request)
    assert len(plan.all_sigmas) == whole + 1 and plan.sigmas == plan.all_sigmas[-left - 1 :]


@pytest.mark.parametrize("fixed", [None, True, False])
@pytest.mark.parametrize("sampler", ["euler", "Euler", "DDIM", "UniPC", "LCM", "euler_ancestral", "dpm_fast karras"])
def test_strength_0_leaves_no_step_under_any_name(sd1: Pipeline, sampler: str, fixed: bool | None) -> None:
    request = RUN.replace(image=photograph(), sampler=sampler, steps=20, strength=0.0, fix_steps=fixed)
    with pytest.raises(
        RequestError, match=r"^strength is 0\.0, which leaves none of \d+ steps; it must be (above 0|at least 1)"
    ):
        sd1.plan(request)
    with pytest.raises(RequestError, match="hires_strength"):
        RUN.replace(sampler=sampler, hires=1.5, hires_strength=0.0)


@pytest.mark.parametrize(("sampler", "left"), [("euler", 15), ("Euler", 20), ("DDIM", 18), ("euler_ancestral", 20)])
def test_each_program_counts_the_steps_of_the_second_pass_in_its_way(sd1: Pipeline, sampler: str, left: int) -> None:
    """A1111 gives sample_img2img the steps, which then are fixed."""
    second = sd1.plan(RUN.replace(sampler=sampler, hires=1.5, hires_steps=20, hires_strength=0.75)).second_pass
    assert second and len(second.sigmas) == left + 1 and second.schedule_steps == 20


def test_hires_by_latents(sd1: Pipeline) -> None:
    """By hand: the first pass's latents, bilinear, under the noise that the seed gives at the larger size."""
    request = RUN.replace(hires=2.0, hires_strength=0.5)
    second = sd1.plan(request).second_pass
    assert second
    sigmas = second.sigmas
    assert len(sigmas) - 1 == 2 and (second.request.width, second.request.height) == (64, 64)
    larger = torch.nn.functional.interpolate(sd1.generate(RUN).latents, (8, 8), mode="bilinear")
    seen: list[Tensor] = []
    hook = sd1.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:1]))
    steps = list(sd1.stream(request))
    hook.remove()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = (larger + sigmas[0] * noise) / (sigmas[0] ** 2 + 1.0) ** 0.5
    assert [step.x.shape[-1] for step in steps] == [4] * 4 + [8] * 2
    assert torch.allclose(seen[4], expected, atol=1e-5)


def test_hires_of_sdxl_is_told_its_size(sdxl: Pipeline) -> None:
    resolved = sdxl.resolve(Request(prompt="a lemon", hires=2.0, width=40, height=24, steps=4))
    second = sdxl.plan(resolved).second_pass
    assert resolved.target_size == (24, 40) and second and second.request.target_size == (48, 80)
    assert sdxl.generate(resolved).images[0].size == (80, 48)


# ---- seamless tiling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axes", "dims"), [("x", (3,)), ("y", (2,)), ("xy", (2, 3))])
def test_a_seamless_network_does_not_know_where_a_picture_begins(
    sd1: Pipeline, axes: str, dims: tuple[int, ...]
) -> None:
    """Rolled along a joined axis, what goes in comes out rolled: UNet, decoder and encoder. Else it does not."""
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.randn(1, 4, 8, 8, generator=generator), sd1.encode("a lemon")
    pixels = torch.randn(1, 3, 64, 64, generator=generator)
    networks = [
        (lambda x: sd1.unet(x, 500.0, condition), x, 1),
        (sd1.vae.decode, x, 8),
        (lambda pixels: sd1.vae.encode(pixels).mean.repeat_interleave(8, 2).repeat_interleave(8, 3), pixels, 1),
    ]
    for number, (network, given, scale) in enumerate(networks):
        shift = (16 if number == 2 else 4,) * len(dims)

        def rolled(network: Any = network, given: Tensor = given, shift: Any = shift, scale: int = scale) -> float:
            expected = network(given).roll([scale * s for s in shift], dims)
            return error(network(given.roll(shift, dims)), expected)

        with torch.inference_mode(), seamless(axes):
            assert rolled() < 1e-4, number
        with torch.inference_mode():
            assert rolled() > 1e-3, number
        for other in {"x", "y"} - {*axes}:
            with torch.inference_mode(), seamless(other):
                assert rolled() > 1e-3, (number, other)


def test_circular_padding_by_hand() -> None:
    conv = Conv2d(1, 1, 3, padding=1, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    with seamless("x"), torch.no_grad():
        y = conv(x)
    around = np.pad(np.pad(x[0, 0].numpy(), ((0, 0), (1, 1)), mode="wrap"), ((1, 1), (0, 0)))
    assert y[0, 0, 0, 0] == around[:3, :3].sum() and y[0, 0, 2, 3] == around[2:5, 3:6].sum()
    with torch.no_grad():
        assert torch.equal(conv(x), torch.nn.functional.conv2d(x, conv.weight, padding=1))


@pytest.mark.parametrize(("axes", "dims"), [("x", (3,)), ("y", (2,)), ("xy", (2, 3))])
def test_a_seamless_picture_begins_anywhere(sd1: Pipeline, axes: str, dims: tuple[int, ...]) -> None:
    """From rolled noise comes the rolled picture, so where its sides meet is a place like any other."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def apart(request: Request) -> int:
        picture, other = (
            levels(sd1.generate(request, latents).images[0]) for latents in (noise, noise.roll((4,) * len(dims), dims))
        )
        return int(np.abs(np.roll(picture, (32,) * len(dims), [dim - 2 for dim in dims]) - other).max())

    request = RUN.replace(width=64, height=64)
    assert apart(request.replace(seamless=axes)) <= 1
    assert apart(request) > 5


def test_seamless_is_the_runs_own(sd1: Pipeline) -> None:
    """Two threads at once, one of them seamless; and a stream that is left in the middle leaves nothing behind."""
    plain, tiled = sd1.generate(RUN).latents, sd1.generate(RUN.replace(seamless="xy")).latents
    results: dict[str | None, list[Tensor]] = {None: [], "xy": []}

    def work(axes: str | None) -> None:
        for _ in range(3):
            results[axes].append(sd1.generate(RUN.replace(seamless=axes)).latents)

    threads = [threading.Thread(target=work, args=(axes,)) for axes in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(latents, plain) for latents in results[None])
    assert all(torch.equal(latents, tiled) for latents in results["xy"])
    stream = sd1.stream(RUN.replace(seamless="xy"))
    next(stream)
    assert torch.equal(sd1.generate(RUN).latents, plain)


# ---- variation seeds -------------------------------------------------------------------------------------------------


def test_slerp_of_columns() -> None:
    """By hand on one column: the arc between two unit vectors at a right angle; lengths apart are joined linearly."""
    a, b = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1), torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1)
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = torch.tensor(share * torch.pi / 2)
        assert torch.allclose(slerp(a, b, share).flatten(), torch.stack([angle.cos(), angle.sin()]), atol=1e-6)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a) and slerp(a, -a, 0.3).isfinite().all()
    near = torch.tensor([math.cos(0.05), math.sin(0.05)]).reshape(1, 1, 2, 1)
    assert float(slerp(a, near, 0.5).norm()) == pytest.approx(1.0, abs=1e-5), "an arc at small angles too"
    generator = torch.Generator().manual_seed(0)
    noise, other = (torch.randn(1, 4, 64, 64, generator=generator) for _ in range(2))
    assert abs(float(slerp(noise, other, 0.5).std()) - 1.0) < 0.02, "which a straight line would make 0.7"


def test_a_variation_lies_between_two_seeds(sd1: Pipeline) -> None:
    own, other = sd1.generate(RUN).latents, sd1.generate(RUN.replace(seed=50)).latents
    varied = [
        sd1.generate(RUN.replace(variation_seed=50, variation_strength=share)).latents for share in (0.0, 0.1, 0.5, 1.0)
    ]
    assert torch.equal(varied[0], own) and error(varied[3], other) < 1e-4
    assert 0 < error(varied[1], own) < error(varied[2], own) and error(varied[2], other) < error(varied[1], other)
    some = sd1.resolve(RUN.replace(variation_strength=0.1))
    assert some.variation_seed is not None and some == sd1.resolve(some)
    together = sd1.generate([RUN.replace(variation_seed=s, variation_strength=0.1, batch=2) for s in (50, 51)])
    assert error(together[0].latents, varied[1]) < 1e-5
    records = [mezzotint.Request(**r.request.model_dump()) for r in together]
    assert [r.variation_seed for r in records] == [50, 51]


def test_the_noise_of_another_size_lies_in_the_middle() -> None:
    whole, small, large = torch.zeros(1, 1, 5, 8), torch.ones(1, 1, 3, 4), torch.arange(70.0).reshape(1, 1, 7, 10)
    placed = paste_center(whole, small)
    assert placed.sum() == 12 and torch.equal(placed[..., 1:4, 2:6], small)
    assert torch.equal(paste_center(whole, large), large[..., 1:6, 1:9])
    assert torch.equal(whole, torch.zeros(1, 1, 5, 8))


def test_seed_size(sd1: Pipeline) -> None:
    wide = RUN.replace(width=64, seed_size=(32, 32))
    seen: list[Tensor] = []
    hook = sd1.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:1]))
    next(sd1.stream(wide))
    hook.remove()
    noise, inner = (torch.randn(1, 4, 4, w, generator=torch.Generator().manual_seed(7)) for w in (8, 4))
    noise[..., 2:6] = inner
    assert error(seen[0] / seen[0].std(), noise / noise.std()) < 1e-5
    assert torch.equal(sd1.generate(RUN.replace(seed_size=(32, 32))).latents, sd1.generate(RUN).latents)
