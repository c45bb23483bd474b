"""Pipeline: the properties of a run with any weights, on two tiny models (conftest.py). For parity see tests/parity."""

from __future__ import annotations

import inspect
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor

import mezzotint
from mezzotint import Pipeline, Request, RequestError, Result, samplers
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.models.unet import UNet
from mezzotint.run.plan import plan_run

LEMON = Request(prompt="a lemon on a blue background", seed=7, steps=3)
EULER = LEMON.replace(sampler="Euler")  # ends at sigma 0


@contextmanager
def counted(unet: UNet) -> Iterator[list[int]]:
    """The batch size of every call of the UNet."""
    rows: list[int] = []
    hook = unet.register_forward_hook(lambda _, _inputs, output: rows.append(len(output)))
    yield rows
    hook.remove()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value; NaN is never equal to anything."""
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.abs().max())


# ---- resolve ---------------------------------------------------------------------------------------------------------

OPEN = {  # None stays None: it means "not asked for"
    "control",
    "safety",
    "guidance_interval",
    "guidance_steps",
    "mimic_scale",
    "threshold_percentile",
    "sigmas",
    "timesteps",
    "discard_penultimate_sigma",
    "apg_eta",
    "apg_momentum",
    "apg_norm_threshold",
    "cfg_zero_init_steps",
    "perp_neg_scale",
    "pag_scale",
    "regions",
    "region_base",
    "pag_layers",
    "pag_adaptive_scale",
    "freeu",
    "embeddings",
    "loras",
    "lora_folder",
    "choices",
    "wildcards",
    "image",
    "mask",
    "strength",
    "fix_steps",
    "resize_mode",
    "mask_blur",
    "invert_mask",
    "differential",
    "masked_content",
    "only_masked",
    "outpaint",
    "tile",
    "hires",
    "hires_upscale",
    "hires_steps",
    "ip_adapter",
    "hires_strength",
    "seamless",
    "variation_seed",
    "variation_strength",
    "seed_size",
}
ONLY_XL = {"original_size", "crop", "target_size"}
ONLY_REFINER = {"refiner", "refiner_at", "aesthetic_score", "negative_aesthetic_score"}


COLUMNS = [column for row in samplers.TABLE for column in (row.name, row.diffusers, row.a1111, row.comfyui)]
ROWS = list(dict.fromkeys(name for column in COLUMNS for name in filter(None, column.split(", "))))


def spacings_of(name: str | None) -> tuple[str | None, ...]:
    """The sampler's own spacing and one other, each name in turn the next; all pairs are diffusion/test_product.py's.

    One sampler chooses its levels itself. Of the names that put a sampler's and a schedule's together, every seventh
    is given another spacing.
    """
    place = [None, *samplers.NAMES].index(name)
    if name and ("adaptive" in name or (name not in ROWS and place % 7)):
        return (None,)
    return None, samplers.SPACINGS[place % len(samplers.SPACINGS)]


PLAIN_AND_KARRAS = [(None, *samplers.NAMES), (None, *ROWS)]  # what the model's own file says of its spacing


@pytest.mark.parametrize("karras", [False, True])
def test_resolve_fills_every_none_and_changes_nothing_twice(
    sd1: Pipeline, karras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if karras:
        monkeypatch.setitem(sd1.scheduler_config, "use_karras_sigmas", True)
    pairs = [(name, spacing) for name in PLAIN_AND_KARRAS[karras] for spacing in spacings_of(name)]
    for sampler, spacing in pairs:
        request = Request(prompt="a lemon", sampler=sampler, spacing=spacing)
        resolved = sd1.resolve(request)
        left = {field for field, value in resolved.model_dump().items() if value is None}
        plan = sd1.plan(resolved)
        eta = set() if "eta" in inspect.signature(SOLVERS[plan.sampler.solver]).parameters else {"eta"}
        assert left == OPEN | ONLY_XL | ONLY_REFINER | eta, request
        assert plan.request == resolved
        # the same run, not only the same record: naming the spacing that was meant changes no noise level
        assert plan.sampler == replace(sd1.plan(request).sampler, name=plan.sampler.name)


def test_resolve_for_sdxl(sdxl: Pipeline) -> None:
    resolved = sdxl.resolve(Request(prompt="a lemon", width=40, height=24))
    assert (resolved.original_size, resolved.crop, resolved.target_size) == ((24, 40), (0, 0), (24, 40))
    assert resolved.negative_prompt is None, "None is zeros, where the model's index has force_zeros_for_empty_prompt"
    assert resolved.guidance_scale == 5.0
    assert sdxl.resolve(resolved) == resolved


def test_the_models_own_values(sd1: Pipeline) -> None:
    resolved = sd1.resolve(Request(prompt="a lemon"))
    assert (resolved.steps, resolved.guidance_scale) == (4, 3.0), "mezzotint.json"
    assert (resolved.width, resolved.height, resolved.batch, resolved.clip_skip) == (32, 32, 1, 0)
    assert (resolved.sampler, resolved.spacing, resolved.eta) == ("ddim", "leading", 0.0)
    assert sd1.resolve(Request(prompt="a lemon", sampler="Euler a")).eta == 1.0
    assert sd1.resolve(Request(prompt="a lemon", width=64, steps=9)).width == 64


def test_a_seed_is_drawn_and_kept(sd1: Pipeline) -> None:
    first, second = (sd1.generate(Request(prompt="a lemon", steps=1)) for _ in range(2))
    assert first.request.seed != second.request.seed
    again = sd1.generate(first.request)
    assert again.seeds == first.seeds and same(again.images[0], first.images[0])


# ---- the same picture ------------------------------------------------------------------------------------------------

NOISY = LEMON.replace(sampler="euler_a", count=4, steps=2)  # it draws noise in every step


def test_the_same_call_gives_the_same_bits(sd1: Pipeline) -> None:
    first, second = sd1.generate(NOISY), sd1.generate(NOISY)
    assert torch.equal(first.latents, second.latents)
    assert all(map(same, first.images, second.images))


def test_other_words_or_seeds_give_other_pictures(sd1: Pipeline) -> None:
    """What makes the other tests here mean something."""
    lemon = sd1.generate(LEMON).latents
    for changes in ({"seed": 8}, {"prompt": "a lemon"}, {"negative_prompt": "blue"}, {"steps": 4}, {"clip_skip": 1}):
        assert error(sd1.generate(LEMON.replace(**changes)).latents, lemon) > 1e-2, changes


def test_noise_never_depends_on_the_batch(sd1: Pipeline) -> None:
    one_by_one = sd1.generate(NOISY)
    alone = [sd1.generate(NOISY.replace(seed=7 + k, count=1)) for k in range(4)]
    assert one_by_one.seeds == [7, 8, 9, 10]
    assert torch.equal(one_by_one.latents, torch.cat([result.latents for result in alone]))
    assert all(same(a, b.images[0]) for a, b in zip(one_by_one.images, alone, strict=True))
    for batch in (2, 3, 4):
        with counted(sd1.unet) as rows:
            together = sd1.generate(NOISY.replace(batch=batch))
        assert max(rows) == 2 * batch
        assert error(together.latents, one_by_one.latents) < 1e-5


@pytest.mark.parametrize("kind", ["seeded", "philox"])
def test_eight_at_once_are_eight_alone(sd1: Pipeline, kind: str) -> None:
    """Bit for bit at the default batch, which on the CPU is 1; in a batch of 8 up to rounding."""
    request = NOISY.replace(count=8, noise=kind)
    together = sd1.generate(request)
    alone = [sd1.generate(request.replace(seed=7 + k, count=1)) for k in range(8)]
    assert torch.equal(together.latents, torch.cat([result.latents for result in alone]))
    assert all(a.tobytes() == b.images[0].tobytes() for a, b in zip(together.images, alone, strict=True))
    batch = sd1.generate(request.replace(batch=8))
    assert error(batch.latents, together.latents) < 1e-5
    backwards = sd1.generate([request.replace(seed=14 - k, count=1, batch=8) for k in range(8)])
    assert error(torch.cat([result.latents for result in reversed(backwards)]), together.latents) < 1e-5


def test_philox_is_another_picture(sd1: Pipeline) -> None:
    assert error(sd1.generate(NOISY.replace(noise="philox")).latents, sd1.generate(NOISY).latents) > 1e-2


def test_two_threads_share_a_pipeline(sd1: Pipeline, sdxl: Pipeline) -> None:
    requests = [NOISY.replace(steps=4, count=1, seed=seed, prompt=f"a lemon {seed}") for seed in range(3)]
    alone = {pipe: [pipe.generate(r).latents for r in requests] for pipe in (sd1, sdxl)}
    for pipe in (sd1, sdxl):
        results: dict[int, list[Tensor]] = {}

        def work(number: int, pipe: Pipeline = pipe, results: dict[int, list[Tensor]] = results) -> None:
            order = requests if number else requests[::-1]
            results[number] = [pipe.generate(r).latents for r in order]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(map(torch.equal, results[1], alone[pipe]))
        assert all(map(torch.equal, results[0][::-1], alone[pipe]))


def test_given_noise_is_what_would_be_drawn(sd1: Pipeline) -> None:
    shape = (1, 4, 4, 4)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(7 + k)) for k in range(3)])
    request = LEMON.replace(count=3, batch=2)
    assert torch.equal(sd1.generate(request, noise).latents, sd1.generate(request).latents)


@pytest.mark.parametrize("shape", [(3, 4, 4, 4), (1, 4, 4, 4), (2, 4, 8, 8), (2, 3, 4, 4), (4, 4, 4), ()])
def test_noise_of_a_wrong_shape(sd1: Pipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"latents has the shape .*; (it|its first number) must be"):
        sd1.generate(LEMON.replace(count=2), torch.zeros(shape))
    with pytest.raises(RequestError, match=r"latents has the shape .*; it must be \(2, 4, 4, 4\)"):
        next(sd1.stream(LEMON.replace(count=2), torch.zeros(shape)))


# ---- several requests ------------------------------------------------------------------------------------------------


def test_the_default_batch_is_one_on_a_cpu_and_four_on_a_gpu(sd1: Pipeline) -> None:
    assert sd1.resolve(LEMON).batch == 1
    on_gpu = replace(sd1.plan(LEMON).model, device_type="cuda")
    assert plan_run(on_gpu, LEMON).request.batch == 4
    assert plan_run(on_gpu, LEMON.replace(batch=2)).request.batch == 2


def test_a_list_of_requests_shares_batches(sd1: Pipeline) -> None:
    request = LEMON.replace(batch=4)
    requests = [
        request,
        request.replace(prompt="a blue lemon", seed=1, count=2),
        request.replace(prompt="", negative_prompt="blue", seed=2),
        request.replace(steps=2),  # cannot be joined with those before, nor the next with it
        request.replace(seed=9),
    ]
    with counted(sd1.unet) as rows:
        results = sd1.generate(requests)
    assert rows == [8] * 3 + [2] * 2 + [2] * 3
    assert [result.seeds for result in results] == [[7], [1, 2], [2], [7], [9]]
    for r, result in zip(requests, results, strict=True):
        alone = sd1.generate(r)
        assert result.request == alone.request
        assert error(result.latents, alone.latents) < 1e-5
        for a, b in zip(result.images, alone.images, strict=True):
            assert max(extreme[1] for extreme in ImageChops.difference(a, b).getextrema()) <= 1


def test_prompts_of_different_windows_do_not_meet(sd1: Pipeline) -> None:
    """Another text's second window must not become an empty one of mine."""
    requests = [LEMON.replace(batch=2), LEMON.replace(batch=2, prompt="blue lemon " * 60)]
    results = sd1.generate(requests)
    for r, result in zip(requests, results, strict=True):
        assert torch.equal(result.latents, sd1.generate(r).latents)


def test_lists_of_any_kind(sd1: Pipeline) -> None:
    assert sd1.generate([]) == []
    small, large = sd1.generate((LEMON, LEMON.replace(width=40, height=48)))
    assert (small.images[0].size, large.images[0].size) == ((32, 32), (40, 48))
    assert (small.latents.shape, large.latents.shape) == ((1, 4, 4, 4), (1, 4, 6, 5))
    one = sd1.generate([LEMON])
    assert isinstance(one, list) and isinstance(one[0], Result)


def test_the_record_names_the_whole_group(sd1: Pipeline) -> None:
    first, second = sd1.generate([LEMON.replace(batch=3), LEMON.replace(batch=3, seed=20, count=3)])
    records = [json.loads(image.info["mezzotint"]) for image in (*first.images, *second.images)]
    assert [record["seed"] for record in records] == [7, 20, 21, 22]
    assert [record["group"] for record in records] == [[7, 20, 21]] * 3 + [[22]]


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Euler", "Heun", "ddpm", "dpmpp_2m", "LMS"])
def test_a_stream_ends_in_the_picture(sd1: Pipeline, name: str) -> None:
    request = LEMON.replace(sampler=name, steps=5, count=2, batch=2)
    steps = list(sd1.stream(request))
    assert [step.index for step in steps] == list(range(5))
    assert all(a.sigma > b.sigma for a, b in pairwise(steps)) and steps[-1].sigma == 0.0
    assert all(step.x.shape == step.denoised.shape == (2, 4, 4, 4) for step in steps)
    result = sd1.generate(request)
    assert torch.equal(steps[-1].x, result.latents)
    assert all(map(same, sd1.decode(steps[-1].x), result.images))


def test_a_stream_that_ends_above_zero(sd1: Pipeline) -> None:
    """x is then still in the solver's coordinate; Result.latents are in the VAE's, as diffusers returns them."""
    *_, last = sd1.stream(LEMON)
    assert last.sigma == pytest.approx(sd1.schedule.sigma_min)
    torch.testing.assert_close(last.x / math.sqrt(1 + last.sigma**2), sd1.generate(LEMON).latents)


def test_inference_mode_does_not_leak(sd1: Pipeline) -> None:
    for step in sd1.stream(EULER):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        weight = torch.ones((), requires_grad=True)
        (step.x.clone() * weight).sum().backward()  # a tensor of the run, used by the caller
        assert weight.grad is not None
    seen: list[bool] = []
    sd1.generate(EULER, on_step=lambda *_: seen.append(torch.is_inference_mode_enabled()))
    assert seen == [False] * 3


def test_a_stream_may_be_left(sd1: Pipeline) -> None:
    with counted(sd1.unet) as rows:
        for step in sd1.stream(EULER.replace(steps=50)):
            if step.index == 1:
                break
    assert len(rows) == 2


def test_a_wrong_request_fails_before_the_first_step(sd1: Pipeline) -> None:
    with pytest.raises(RequestError, match="eta"):
        sd1.stream(LEMON.replace(sampler="heun", eta=0.5))


# ---- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_come_in_order(sd1: Pipeline) -> None:
    calls: list[Any] = []
    images: list[Image.Image] = []

    def on_image(index: int, image: Image.Image) -> None:
        calls.append(f"picture {index}")
        assert "mezzotint" in image.info, "a finished picture can be saved at once"
        images.append(image)

    request = LEMON.replace(count=3, batch=2)
    result = sd1.generate(request, on_step=lambda done, total: calls.append((done, total)), on_image=on_image)
    steps = [(done, 6) for done in range(1, 7)]
    assert calls == [*steps[:3], "picture 0", "picture 1", *steps[3:], "picture 2"]
    assert images == result.images


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("hook", ["on_step", "on_image"])
def test_an_exception_in_a_hook_ends_the_run(sd1: Pipeline, hook: str) -> None:
    def stop(*_: object) -> None:
        raise EnoughError

    with counted(sd1.unet) as rows, pytest.raises(EnoughError):
        sd1.generate(LEMON.replace(count=5), **{hook: stop})  # type: ignore[call-overload]
    assert len(rows) == (1 if hook == "on_step" else 3)
    assert not torch.is_inference_mode_enabled()
    sd1.generate(LEMON)  # and the pipeline is as before


# ---- guidance and words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "rows_a_call"), [(0.0, 1), (0.5, 1), (1.0, 1), (1.01, 2), (7.5, 2)])
def test_without_guidance_the_unconditional_half_is_skipped(sd1: Pipeline, scale: float, rows_a_call: int) -> None:
    with counted(sd1.unet) as rows:
        sd1.generate(LEMON.replace(guidance_scale=scale))
    assert rows == [rows_a_call] * 3


def test_guidance_only_within_its_interval(sd1: Pipeline) -> None:
    with counted(sd1.unet) as rows:
        sd1.generate(EULER.replace(steps=4, guidance_interval=(0.5, 5.0)))
    assert rows[0] == rows[-1] == 1 and 2 in rows


def test_negative_words_have_no_say_without_guidance(sd1: Pipeline) -> None:
    plain, negative = (LEMON.replace(guidance_scale=1.0, negative_prompt=words) for words in ("", "a blue background"))
    assert torch.equal(sd1.generate(plain).latents, sd1.generate(negative).latents)


def test_a_long_prompt_is_not_cut(sd1: Pipeline) -> None:
    words = ["lemon", "blue", "background", "on"] * 50
    request = LEMON.replace(prompt=" ".join(words))
    assert sd1.encode(request.prompt).context.shape == (1, 3 * 77, 16)
    whole = sd1.generate(request).latents
    assert error(sd1.generate(request.replace(prompt=" ".join([*words[:-1], "blue"]))).latents, whole) > 1e-4


@pytest.mark.parametrize("pipe", ["sd1", "sdxl"])
def test_a_negative_prompt_of_another_length(pipe: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(pipe)
    long = "blue " * 100
    one = pipeline.generate(LEMON.replace(negative_prompt=long)).latents
    other = pipeline.generate(LEMON.replace(prompt=long, negative_prompt="a lemon")).latents
    assert error(one, other) > 1e-2


def test_no_negative_prompt_is_zeros_for_sdxl(sdxl: Pipeline) -> None:
    zeros, empty = (sdxl.generate(LEMON.replace(negative_prompt=words)).latents for words in (None, ""))
    assert error(zeros, empty) > 1e-3
    ((_, conditional),), ((_, unconditional),) = sdxl._model.prompts.encode_batch([sdxl.plan(LEMON)])
    assert not unconditional.context.any() and unconditional.pooled is not None and not unconditional.pooled.any()
    assert torch.equal(conditional.time_ids, unconditional.time_ids)  # type: ignore[arg-type]


def test_sdxl_hears_its_sizes(sdxl: Pipeline) -> None:
    base = sdxl.generate(LEMON).latents
    for changes in ({"original_size": (64, 64)}, {"crop": (0, 16)}, {"target_size": (8, 32)}):
        assert error(sdxl.generate(LEMON.replace(**changes)).latents, base) > 1e-4, changes


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipe", ["sd1", "sdxl"])
def test_a_picture_carries_its_record(pipe: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(pipe)
    asked = LEMON.replace(sampler="Euler a", count=2, guidance_interval=(0.5, 5.0), negative_prompt="blué\n🍋")
    result = pipeline.generate(asked)
    for k, image in enumerate(result.images):
        assert set(image.info) == {"mezzotint", "parameters"}
        record = json.loads(image.info["mezzotint"])
        assert Request.model_validate(record["request"]) == result.request
        assert Request.model_validate_json(json.dumps(record["request"])) == result.request
        assert record["seed"] == result.seeds[k] == 7 + k
        assert record["model"]["dtype"] == "float32" and record["model"]["family"] == pipe
        assert f"Seed: {7 + k}" in image.info["parameters"] and image.info["parameters"].startswith(asked.prompt)
        drawn = pipeline.generate(result.request.replace(seed=record["seed"], count=1))
        assert same(drawn.images[0], image)


def test_timings_are_seconds(sd1: Pipeline) -> None:
    timings = sd1.generate(LEMON).timings
    assert set(timings) == {"denoise", "decode"} and all(seconds > 0 for seconds in timings.values())


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": 30}, "width is 30; it must be a multiple of 8"),
        ({"height": 4}, "height is 4; it must be a multiple of 8"),
        ({"steps": 0}, "steps is 0; it must be a whole number from 1"),
        ({"steps": 10_000}, "steps is 10000"),
        ({"sampler": "eular"}, "sampler is 'eular'; did you mean euler or euler_a"),
        ({"spacing": "karas"}, "did you mean karras"),
        ({"sampler": "heun", "eta": 0.5}, "eta is 0.5; the sampler heun does not take eta"),
        ({"sampler": "LMS", "eta": 0.0}, "eta is 0.0; the sampler LMS does not take eta"),
        ({"sampler": "dpm_adaptive", "spacing": "karras"}, "spacing is 'karras', but dpm_adaptive chooses its own"),
        ({"original_size": (32, 32)}, "original_size is given; only models of the SDXL family"),
        ({"crop": (0, 0)}, "crop is given; only models of the SDXL family"),
        ({"target_size": (32, 32)}, "target_size is given; only models of the SDXL family"),
        ({"clip_skip": 3}, "has 3 layers and can skip 0 to 2 of them, not 3"),
        ({"prompt": "\ud83c"}, "prompt is .*; it must be a text"),
        ({"promt": "a lemon"}, "no field 'promt'; the nearest is prompt"),
        ({"seed": 2**64 - 1, "count": 2}, "seed"),
    ],
)
def test_what_does_not_fit_is_a_sentence(sd1: Pipeline, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        sd1(**{"prompt": "a lemon", "seed": 1, "steps": 1, **fields})


def test_more_steps_than_the_model_has_levels(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sd1.scheduler_config, "num_train_timesteps", 10)
    with pytest.raises(RequestError, match="steps is 20, but this spacing has fewer"):
        sd1.resolve(LEMON.replace(steps=20))


def test_a_size_that_the_vae_cannot_halve(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd1._model, "info", replace(sd1._model.info, downscale=16))
    with pytest.raises(RequestError, match="the size is 40x32; both must be multiples of 16"):
        sd1.generate(LEMON.replace(width=40, height=32))


def test_weights_that_are_not_numbers_give_no_black_picture(sd1_folder: Path) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu")
    pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(mezzotint.MezzotintError, match="not finite"):
        pipe.generate(LEMON)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:"])
def test_a_device_that_is_not_here(sd1_folder: Path, device: str) -> None:
    with pytest.raises(RequestError, match=f"device is '{device}', which is not available; the best available one is "):
        mezzotint.load(sd1_folder, device=device)


@pytest.mark.parametrize("dtype", ["half", "float64", "", torch.int8, 16])
def test_a_dtype_that_does_not_do(sd1_folder: Path, dtype: Any) -> None:
    with pytest.raises(RequestError, match="it can be float32, bfloat16, float16"):
        mezzotint.load(sd1_folder, device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_draws_too(sd1_folder: Path, sd1: Pipeline, dtype: Any) -> None:
    half = mezzotint.load(sd1_folder, device="cpu", dtype=dtype)
    result = half.generate(LEMON.replace(guidance_scale=1.0))
    assert result.latents.dtype == torch.float32, "the loop keeps float32 whatever the network's dtype"
    assert error(result.latents, sd1.generate(LEMON.replace(guidance_scale=1.0)).latents) < 0.2


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(mezzotint.CheckpointError, match="nowhere"):
        mezzotint.load(tmp_path / "nowhere", device="cpu")


# ---- every sampler ---------------------------------------------------------------------------------------------------

EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}  # euler and dpmpp_2m, for models of another kind


def test_the_table_names_every_solver_and_class() -> None:
    diffusers = {scheduler.name for scheduler in samplers.SCHEDULERS if scheduler.name} - EDM
    assert set(ROWS) >= {*samplers.SOLVERS, *diffusers}
    assert set(ROWS) <= set(samplers.NAMES)


def row_cases() -> list[Any]:
    """Each row with both models, and with another spacing: in the short form one of the three, in turn."""
    cases = []
    for place, name in enumerate(ROWS):
        own, *others = spacings_of(name)
        three = [("sd1", own), ("sdxl", own), *(("sd1", other) for other in others)]
        drawn = place % len(three)
        cases += [
            pytest.param(name, *case, marks=() if k == drawn else pytest.mark.slow) for k, case in enumerate(three)
        ]
    return cases


@pytest.mark.parametrize(("name", "model", "spacing"), row_cases())
def test_a_picture_of_two_steps_with_every_row_of_the_table(
    sd1: Pipeline, sdxl: Pipeline, name: str, model: str, spacing: str | None
) -> None:
    pipe = {"sd1": sd1, "sdxl": sdxl}[model]
    result = pipe.generate(LEMON.replace(sampler=name, spacing=spacing, steps=2))
    assert result.latents.isfinite().all()
    assert result.images[0].size == (32, 32)
    assert len(result.images[0].getcolors(32 * 32) or []) > 100, "not a grey picture"


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_pictures_in_and_out(sd1: Pipeline) -> None:
    image = sd1.generate(LEMON.replace(width=40, height=24)).images[0]
    latents = sd1.encode_image(image)
    assert latents.shape == (1, 4, 3, 5) and latents.dtype == torch.float32
    assert sd1.decode(latents)[0].size == (40, 24)
    assert torch.equal(sd1.encode_image(image.convert("RGBA")), latents)
    with pytest.raises(RequestError, match="the picture is 30x24; both must be multiples of 8"):
        sd1.encode_image(image.resize((30, 24)))


def test_the_parts_are_plain_modules(sd1: Pipeline) -> None:
    for module in (sd1.unet, sd1.vae, *sd1.text_encoders):
        assert isinstance(module, torch.nn.Module) and not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert (sd1.device.type, sd1.dtype) == ("cpu", torch.float32)
    assert sd1.schedule.num_train_timesteps == 1000


def test_encode_speaks_for_a_request(sd1: Pipeline, sdxl: Pipeline) -> None:
    plain, skipped = sd1.encode("a lemon"), sd1.encode("a lemon", LEMON.replace(clip_skip=1))
    assert plain.context.shape == (1, 77, 16) and plain.context.dtype == torch.float32 and plain.pooled is None
    assert error(skipped.context, plain.context) > 1e-2
    both = sdxl.encode("a lemon")
    assert both.context.shape == (1, 77, 32) and both.pooled is not None and both.pooled.shape == (1, 16)
