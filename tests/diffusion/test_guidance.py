"""Guidance on outputs whose answer is known, against the papers' equations and against diffusers' guiders."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.classifier_free_zero_star_guidance import ClassifierFreeZeroStarGuidance
from numpy.typing import NDArray
from torch import Tensor

import mezzotint
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import METHODS, Method, dynamic_threshold, guided, step_index
from mezzotint.diffusion.prediction import EPSILON, PREDICTIONS, SAMPLE, V_PREDICTION, Prediction
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.errors import RequestError

Array = NDArray[np.float64]

X = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
SIGMAS = [9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.0]  # of a run of seven steps


class Recorder:
    """Outputs of up to four conditions, and how many were asked for."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def __call__(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]:
        self.asked.append(count)
        return (torch.sin(2 * x), 0.5 * torch.cos(x) * sigma)[:count]


class Fixed:
    """The same outputs, whatever is asked."""

    def __init__(self, *outputs: Tensor) -> None:
        self.given = outputs

    def __call__(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]:
        return self.given[:count]


def random(count: int, seed: int = 1) -> list[Tensor]:
    """Float64 tensors of two images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def each_image(rule: Callable[..., Array], *tensors: Tensor) -> Tensor:
    """A paper's rule, written for the one vector of an image, on a batch."""
    rows = [rule(*(t.numpy().ravel() for t in image)).reshape(tensors[0].shape[1:]) for image in zip(*tensors)]  # noqa: B905
    return torch.from_numpy(np.stack(rows))


# ---- classic guidance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS.values())
def test_is_the_same_on_outputs_and_on_denoised(prediction: Prediction) -> None:
    outputs = Recorder()
    conditional, unconditional = (prediction.denoised(output, X, 2.0) for output in outputs(X, 2.0))
    result, empty = guided(outputs, prediction, 7.5).pair(X, 2.0)
    torch.testing.assert_close(result, unconditional + 7.5 * (conditional - unconditional), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty, unconditional)
    assert torch.equal(result, guided(outputs, prediction, 7.5)(X, 2.0))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_no_guidance_asks_for_one_output(scale: float) -> None:
    outputs = Recorder()
    assert torch.equal(guided(outputs, SAMPLE, scale)(X, 2.0), torch.sin(2 * X))
    assert outputs.asked == [1]


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.0])
def test_a_pair_is_guided_at_any_scale(scale: float) -> None:
    """Chung et al. 2024 eq. 13: the scale of CFG++ lies in [0, 1]."""
    outputs = Recorder()
    conditional, unconditional = outputs(X, 2.0)
    result, empty = guided(outputs, SAMPLE, scale).pair(X, 2.0)
    torch.testing.assert_close(result, (1 - scale) * unconditional + scale * conditional)
    assert torch.equal(empty, unconditional)


def test_interval_is_open_below_and_closed_above() -> None:
    outputs = Recorder()
    denoise = guided(outputs, SAMPLE, 3.0, interval=(1.0, 4.0))
    for sigma in (5.0, 4.0, 2.0, 1.0, 0.5):
        denoise(X, sigma)
    assert outputs.asked == [1, None, None, 1, 1]
    alone, same = denoise.pair(X, 5.0)
    assert alone is same and outputs.asked[-1] == 1
    assert torch.equal(alone, torch.sin(2 * X))


@pytest.mark.parametrize("steps", [(0.0, 1.0), (0.0, 0.5), (0.3, 1.0), (0.25, 0.75), (0.2, 0.21), (0.99, 1.0)])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_steps_are_those_of_diffusers(steps: tuple[float, float], count: int) -> None:
    sigmas = [*np.linspace(10.0, 0.1, count), 0.0]
    guider = ClassifierFreeGuidance(guidance_scale=3.0, start=steps[0], stop=steps[1])
    outputs = Recorder()
    denoise = guided(outputs, SAMPLE, 3.0, steps=steps, sigmas=sigmas)
    asked = []
    for step in range(count):
        denoise(X, sigmas[step])
        guider.set_state(step, count, torch.tensor(0))
        asked.append(None if guider.num_conditions == 2 else 1)
    assert outputs.asked == asked


def test_steps_and_interval_hold_both() -> None:
    outputs = Recorder()
    denoise = guided(outputs, SAMPLE, 3.0, interval=(0.6, 4.0), steps=(0.0, 0.5), sigmas=SIGMAS)
    for sigma in SIGMAS[:-1]:
        denoise(X, sigma)
    assert outputs.asked == [1, 1, None, 1, 1, 1, 1]


def test_a_solver_pays_for_the_unconditional_only_where_it_guides() -> None:
    outputs = Recorder()
    denoise = guided(outputs, SAMPLE, 3.0, steps=(0.0, 0.5), sigmas=SIGMAS)
    list(SOLVERS["heun"](denoise, X, SIGMAS, lambda *_: X))
    assert outputs.asked == [None] * 5 + [1] * 8  # two calls a step: at its begin, and at the begin of the next


def test_scales_are_spread_over_the_steps() -> None:
    conditional, unconditional = random(2)

    def scales(scale: float | Sequence[float], sigmas: Sequence[float] = SIGMAS) -> list[float]:
        denoise = guided(Fixed(conditional, unconditional), SAMPLE, scale, sigmas=sigmas)
        results = (denoise.pair(X, sigma)[0] for sigma in sigmas[:-1])
        return [float(((r - unconditional) / (conditional - unconditional)).mean()) for r in results]

    each = [9.0, 8.0, 1.0, 4.0, 0.5, 3.0, 2.0]
    assert scales(each) == pytest.approx(each)
    assert scales([9.0, 3.0]) == pytest.approx([9, 8, 7, 6, 5, 4, 3])
    assert scales([1.0, 4.0, 1.0]) == pytest.approx([1, 2, 3, 4, 3, 2, 1])
    assert scales([5.0]) == scales(5.0) == pytest.approx([5] * 7)
    assert scales([9.0, 3.0], [2.0, 0.0]) == pytest.approx([9])
    outputs = Recorder()
    denoise = guided(outputs, SAMPLE, each, sigmas=SIGMAS)
    for sigma in (9.0, 7.0, 5.0, 3.0, 2.5, 2.0, 1.0, 0.9999999, 0.5, 0.3, 0.25, 0.1):
        denoise(X, sigma)  # between two levels it is the step from the higher one
    assert outputs.asked == [None, None, None, 1, 1, None, 1, 1, None, None, None, None]


def test_rescale_is_that_of_diffusers() -> None:
    pair = random(2)
    guider = ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=0.7)
    ours = guided(Fixed(*pair), SAMPLE, 7.5, rescale=0.7)(X, 2.0)
    torch.testing.assert_close(ours, guider_at(guider, 0, *pair))


@pytest.mark.parametrize("prediction", [EPSILON, V_PREDICTION])
def test_rescale_works_on_the_networks_own_output(prediction: Prediction) -> None:
    outputs = Recorder()
    result = guided(outputs, prediction, 7.5, rescale=1.0)(X, 2.0)
    conditional, _ = outputs(X, 2.0)
    torch.testing.assert_close(
        prediction.output(result, X, 2.0).std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-4, atol=1e-4
    )


# ---- several conditions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (0.2, 0.5, 0.3)])
def test_weighted_conditions(weights: tuple[float, ...]) -> None:
    """Liu et al. 2022 eq. 11, with A1111's scale over all of it."""
    *conditions, unconditional = random(len(weights) + 1)
    expected = unconditional.clone()
    for weight, condition in zip(weights, conditions, strict=True):
        expected += 7.5 * weight * (condition - unconditional)
    denoise = guided(Fixed(*conditions, unconditional), SAMPLE, 7.5, weights=weights)
    torch.testing.assert_close(denoise(X, 2.0), expected)
    torch.testing.assert_close(denoise.pair(X, 2.0)[1], unconditional)
    denoise = guided(Fixed(*conditions, unconditional), SAMPLE, 1.0, weights=weights)
    torch.testing.assert_close(denoise(X, 2.0), (expected - unconditional) / 7.5 + unconditional)


def test_weights_that_sum_to_one_need_no_unconditional_without_guidance() -> None:
    outputs = Recorder()
    guided(outputs, SAMPLE, 1.0, weights=(0.9, 0.1))(X, 2.0)
    guided(outputs, SAMPLE, 1.0, weights=(1.5,))(X, 2.0)
    assert outputs.asked == [2, 2]  # two conditions; one and the unconditional


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize(("eta", "momentum", "norm_threshold"), [(0.0, -0.5, 9.0), (0.3, 0.0, 0.0), (1.5, -0.75, 2.0)])
def test_apg_is_the_papers(prediction: Prediction, eta: float, momentum: float, norm_threshold: float) -> None:
    """Sadat et al. 2024: eq. 7 (parallel and orthogonal), 9 (rescaling) and 10 (momentum), on estimates of x0."""
    denoise_at = [(2.0, random(3, 2)), (1.0, random(3, 3)), (0.5, random(3, 4))]
    method = METHODS["apg"](eta=eta, momentum=momentum, norm_threshold=norm_threshold)
    average = torch.zeros_like(denoise_at[0][1][0])

    def rule(conditional: Array, average: Array) -> Array:
        length = math.sqrt(sum(average**2))
        update = average * (min(1.0, norm_threshold / length) if norm_threshold else 1.0)
        unit = conditional / math.sqrt(sum(conditional**2))
        parallel = sum(update * unit) * unit
        return conditional + 6.5 * (update - parallel + eta * parallel)

    for sigma, (x, *outputs) in denoise_at:
        ours = guided(Fixed(*outputs), prediction, 7.5, method=method)(x, sigma)
        conditional, unconditional = (prediction.denoised(output, x, sigma) for output in outputs)
        average = conditional - unconditional + momentum * average
        torch.testing.assert_close(ours, each_image(rule, conditional, average))


def guider_at(guider: Any, step: int, *pair: Tensor) -> Tensor:
    """What their guider makes of a pair in a step of a run of seven."""
    guider.set_state(step, 7, None)
    guider.prepare_inputs({"x": pair})
    output: Tensor = guider.forward(*pair).pred
    return output


@pytest.mark.parametrize(("eta", "momentum", "norm_threshold"), [(0.0, -0.5, 9.0), (1.0, -0.75, 0.0), (0.5, 0.3, 4.0)])
def test_apg_is_diffusers(eta: float, momentum: float, norm_threshold: float) -> None:
    """Their original formulation, whose scale counts from 0; given estimates of x0 as the paper has it."""
    guider = AdaptiveProjectedGuidance(
        guidance_scale=6.5,
        eta=eta,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=norm_threshold,
        use_original_formulation=True,
    )
    method = METHODS["apg"](eta=eta, momentum=momentum, norm_threshold=norm_threshold)

    for step, sigma in enumerate(SIGMAS[:-1]):
        pair = random(2, step)
        ours = guided(Fixed(*pair), SAMPLE, 7.5, sigmas=SIGMAS, method=method)(X, sigma)
        torch.testing.assert_close(ours, guider_at(guider, step, *pair))


def test_apg_that_changes_nothing_is_classic_guidance() -> None:
    x, *outputs = random(3)
    method = METHODS["apg"](eta=1.0, momentum=0.0, norm_threshold=0.0)
    for prediction in PREDICTIONS.values():
        plain = guided(Fixed(*outputs), prediction, 7.5)
        torch.testing.assert_close(guided(Fixed(*outputs), prediction, 7.5, method=method)(x, 2.0), plain(x, 2.0))


@pytest.mark.parametrize("init_steps", [0, 1, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_cfg_zero_is_diffusers(prediction: Prediction, init_steps: int) -> None:
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=7.5, zero_init_steps=init_steps)
    method = METHODS["cfg_zero"](init_steps=init_steps)
    for step, sigma in enumerate(SIGMAS[:-1]):
        x, *pair = random(3, step)
        ours = guided(Fixed(*pair), prediction, 7.5, sigmas=SIGMAS, method=method)(x, sigma)
        theirs = prediction.denoised(guider_at(guider, step, *pair), x, sigma)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # they compute their scale in float32


def test_cfg_zero_is_the_papers() -> None:
    """Fan et al. 2025: the scale s minimises |conditional - s unconditional|, in each image."""
    conditional, unconditional = random(2)

    def rule(conditional: Array, unconditional: Array) -> Array:
        scale = np.linalg.lstsq(unconditional[:, None], conditional, rcond=None)[0]
        return scale * unconditional + 7.5 * (conditional - scale * unconditional)

    denoise = guided(Fixed(conditional, unconditional), SAMPLE, 7.5, method=METHODS["cfg_zero"](init_steps=0))
    torch.testing.assert_close(denoise(X, 2.0), each_image(rule, conditional, unconditional))


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_perp_neg_is_the_papers(negatives: int) -> None:
    """Armandpour et al. 2023: of each negative direction only what is perpendicular to the positive one."""
    outputs = random(2 + negatives)

    def rule(positive: Array, empty: Array, *negatives: Array) -> Array:
        basis = (positive - empty) / np.linalg.norm(positive - empty)
        direction = positive - empty
        for negative in negatives:
            away = negative - empty
            direction = direction - 1.4 * (away - (away @ basis) * basis)
        return empty + 7.5 * direction

    denoise = guided(Fixed(*outputs), SAMPLE, 7.5, method=METHODS["perp_neg"](scale=1.4))
    torch.testing.assert_close(denoise(X, 2.0), each_image(rule, *outputs))


def test_perp_neg_of_a_negative_along_the_positive_is_no_negative() -> None:
    positive, empty = random(2)
    denoise = guided(Fixed(positive, empty, 3 * positive - 2 * empty), SAMPLE, 7.5, method=METHODS["perp_neg"]())
    torch.testing.assert_close(denoise(X, 2.0), guided(Fixed(positive, empty), SAMPLE, 7.5)(X, 2.0))


@pytest.mark.parametrize("percentile", [1.0, 0.95, 0.5])
def test_thresholding(percentile: float) -> None:
    """Values beyond the limit are cut off and the limit moved to the reach of the mimic, channel by channel."""
    denoised, mimic = 8 * random(1)[0], random(1, 2)[0]
    expected = torch.empty_like(denoised)
    for b, c in itertools.product(range(2), range(4)):
        values = denoised[b, c].numpy() - denoised[b, c].mean().item()
        reach = np.abs(mimic[b, c].numpy() - mimic[b, c].mean().item()).max()
        limit = max(reach, np.quantile(np.abs(values), percentile))
        cut = np.where(np.abs(values) > limit, np.sign(values) * limit, values)
        expected[b, c] = torch.from_numpy(denoised[b, c].mean().item() + cut / limit * reach)
    torch.testing.assert_close(dynamic_threshold(denoised, mimic, percentile), expected)


def test_thresholding_at_its_own_scale_changes_nothing() -> None:
    x, *outputs = random(3)
    for prediction in PREDICTIONS.values():
        plain = guided(Fixed(*outputs), prediction, 7.5)(x, 2.0)
        torch.testing.assert_close(guided(Fixed(*outputs), prediction, 7.5, mimic_scale=7.5)(x, 2.0), plain)


class Perturbed:
    """The same outputs, whatever is asked, and those of the perturbed conditions; and what was asked for."""

    def __init__(self, outputs: Sequence[Tensor], perturbed: Sequence[Tensor]) -> None:
        self.given, self.perturbed, self.asked = (*outputs,), (*perturbed,), list[tuple[int | None, int]]()

    def __call__(self, x: Tensor, sigma: float, count: int | None = None, perturbed: int = 0) -> tuple[Tensor, ...]:
        self.asked.append((count, perturbed))
        return (*self.given[:count], *self.perturbed[:perturbed])


@pytest.mark.parametrize("name", METHODS)
def test_pag_is_added_to_every_method(name: str) -> None:
    """Before thresholding and rescale; of two conditions each by its weight."""
    x, a, b, other_a, other_b, *rest = random(8)
    weights, others = (0.8, 0.6), [other_a, other_b]
    empties = rest if name == "perp_neg" else rest[:1]
    options: dict[str, Any] = {"method": METHODS[name](), "weights": weights}
    plain = guided(Fixed(a, b, *empties), SAMPLE, 7.5, **options | {"method": METHODS[name]()})(x, 2.0)
    outputs = Perturbed([a, b, *empties], others)
    term = 0.8 * (a - other_a) + 0.6 * (b - other_b)
    found = guided(outputs, SAMPLE, 7.5, **options, pag_scale=lambda sigma: 1.5 * sigma)(x, 2.0)
    torch.testing.assert_close(found, plain + 3.0 * term)
    assert outputs.asked == [(None, 2)]
    options["method"] = METHODS[name]()
    rescaled = guided(outputs, SAMPLE, 7.5, **options, rescale=1.0, pag_scale=lambda _: 3.0)(x, 2.0)
    conditional = rest[0] + 0.8 * (a - rest[0]) + 0.6 * (b - rest[0])
    spread = conditional.std((1, 2, 3), keepdim=True) / (plain + 3.0 * term).std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(rescaled, (plain + 3.0 * term) * spread)


def test_pag_is_active_where_guidance_is_and_its_scale_above_zero() -> None:
    x, conditional, unconditional, other = random(4)
    outputs = Perturbed([conditional, unconditional], [other])
    scales = {9.0: 2.0, 3.0: 2.0, 1.0: 0.0}
    options: dict[str, Any] = {"interval": (0.5, 5.0), "pag_scale": lambda sigma: scales[sigma]}
    denoise, alone = guided(outputs, SAMPLE, 7.5, **options), guided(outputs, SAMPLE, 1.0, **options)
    torch.testing.assert_close(alone(x, 3.0), conditional + 2.0 * (conditional - other))
    assert torch.equal(denoise(x, 9.0), conditional)
    torch.testing.assert_close(denoise(x, 1.0), unconditional + 7.5 * (conditional - unconditional))
    assert outputs.asked == [(1, 1), (1, 0), (None, 0)]
    guided_, base = guided(outputs, SAMPLE, 0.6, **options).pair(x, 3.0)  # CFG++
    torch.testing.assert_close(
        guided_, unconditional + 0.6 * (conditional - unconditional) + 2.0 * (conditional - other)
    )
    assert torch.equal(base, unconditional)


# ---- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_the_order_is_weights_method_scale_thresholding_rescale(prediction: Prediction) -> None:
    x, a, b, unconditional = random(4)
    sigma = 1.5
    full = guided(
        Fixed(a, b, unconditional),
        prediction,
        [9.0, 6.0],
        rescale=0.7,
        sigmas=SIGMAS,
        method=METHODS["cfg_zero"](init_steps=0),
        weights=(0.8, 0.6),
        mimic_scale=3.0,
        threshold_percentile=0.9,
    )(x, sigma)
    conditional = unconditional + 0.8 * (a - unconditional) + 0.6 * (b - unconditional)
    projected = ((conditional * unconditional).sum((1, 2, 3)) / unconditional.square().sum((1, 2, 3))).view(2, 1, 1, 1)
    base = projected * unconditional
    strong, weak = (prediction.denoised(base + s * (conditional - base), x, sigma) for s in (7.5, 3.0))
    output = prediction.output(dynamic_threshold(strong, weak, 0.9), x, sigma)
    ratio = conditional.std((1, 2, 3), keepdim=True) / output.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(full, prediction.denoised(output * (0.7 * ratio + 0.3), x, sigma))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_outputs_twice_give_no_nan(name: str) -> None:
    """An empty prompt, and the first step of CFG-Zero*, make divisors zero."""
    x, output = (tensor.float() for tensor in random(2))
    outputs = Fixed(output, output, output) if name == "perp_neg" else Fixed(output, output)
    denoise = guided(outputs, SAMPLE, 7.5, rescale=0.7, method=METHODS[name](), mimic_scale=3.0)
    assert denoise(x, 2.0).isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": math.nan}, "scale is nan; it must be a finite number"),
        ({"scale": (7.5, math.inf)}, "scale is .7.5, inf.; it must be a finite number"),
        ({"scale": 7.5, "interval": (5.0, 1.0)}, "interval is .5.0, 1.0.; .* the lower first"),
        ({"scale": 7.5, "steps": (0.5, 0.5)}, "steps is .0.5, 0.5.; .* the lower first"),
        ({"scale": 7.5, "interval": (math.nan, 1.0)}, "interval is .nan, 1.0.; .* the lower first"),
    ],
)
def test_what_is_no_scale_and_no_interval(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        guided(Recorder(), SAMPLE, **options)


def test_every_run_has_its_own_momentum() -> None:
    first, second = METHODS["apg"](), METHODS["apg"]()

    def draw(method: Method, seed: int) -> Tensor:
        return guided(Fixed(*random(2, seed)), SAMPLE, 7.5, method=method)(X, 2.0)

    apart = draw(first, 1)
    draw(first, 5)
    assert torch.equal(draw(second, 1), apart)
    assert not torch.equal(draw(second, 1), apart)  # the second call of a run remembers the first


# ---- whole pictures of the bundled model -----------------------------------------------------------------------------

PROMPT = "a blue lemon on a yellow background"
GENTLE: dict[str, dict[str, Any]] = {  # against oversaturation
    "apg": {"guidance_method": "apg"},
    "rescale": {"guidance_rescale": 0.7},
    "thresholding": {"mimic_scale": 2.0, "threshold_percentile": 0.95},
    "steps": {"guidance_steps": (0.0, 0.5)},
    "scales": {"guidance_scale": (9.0, 1.0)},
}
OTHERS: dict[str, dict[str, Any]] = {
    "cfg++": {"sampler": "dpmpp_2m_cfg_pp"},
    "interval": {"guidance_interval": (0.3, 5.0)},
    "cfg_zero": {"guidance_method": "cfg_zero"},
    "perp_neg": {"guidance_method": "perp_neg", "negative_prompt": "a dog"},
}


@pytest.fixture(scope="module")
def pipe() -> mezzotint.Pipeline:
    return mezzotint.load(device="cpu")


def draw(pipe: mezzotint.Pipeline, **fields: Any) -> Array:
    return np.asarray(pipe(PROMPT, seed=8, steps=8, **fields), dtype=np.float64)


@pytest.fixture(scope="module")
def own(pipe: mezzotint.Pipeline) -> Array:
    """The picture under the model's own guidance, 3."""
    return draw(pipe)


@pytest.mark.parametrize("fields", [*GENTLE.values(), *OTHERS.values()], ids=[*GENTLE, *OTHERS])
def test_each_draws_a_picture_of_its_own_near_that_of_classic_guidance(
    pipe: mezzotint.Pipeline, own: Array, fields: dict[str, Any]
) -> None:
    assert 0.3 < np.abs(draw(pipe, **fields) - own).mean() < 30.0  # of 255; another prompt is 110 away


def spread(pipe: mezzotint.Pipeline, **fields: Any) -> float:
    """The standard deviation of the latents at a scale of 15."""
    request = mezzotint.Request(prompt=PROMPT, seed=8, steps=8, **{"guidance_scale": 15.0, **fields})
    return float(pipe.generate(request).latents.std())


def test_each_remedy_for_oversaturation_helps(pipe: mezzotint.Pipeline) -> None:
    """At a scale of 15 the latents spread less than with classic guidance."""
    classic = spread(pipe)
    for name, fields in GENTLE.items():
        assert spread(pipe, **fields) < 0.9 * classic, name


def test_two_runs_at_once_do_not_share_their_momentum(pipe: mezzotint.Pipeline) -> None:
    requests = [
        mezzotint.Request(prompt=prompt, seed=seed, steps=4, guidance_method="apg", width=64, height=64)
        for prompt, seed in (("a lemon", 1), ("a whale on a blue background", 2), ("a red apple", 3))
    ]
    apart = [pipe.generate(request).latents for request in requests]
    with ThreadPoolExecutor(3) as threads:
        together = [result.latents for result in threads.map(pipe.generate, requests)]
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def calls(pipe: mezzotint.Pipeline, **fields: Any) -> list[int]:
    """How many conditions each call of the UNet had: the batch of its output."""
    rows: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda _, _inputs, output: rows.append(len(output)))
    pipe(PROMPT, **{"seed": 8, "steps": 4, "sampler": "euler", "width": 32, "height": 32, **fields})
    hook.remove()
    return rows


def test_calls_of_the_network(pipe: mezzotint.Pipeline) -> None:
    assert calls(pipe) == [2, 2, 2, 2]
    assert calls(pipe, guidance_steps=(0.25, 0.75)) == [1, 2, 2, 1]
    assert calls(pipe, guidance_scale=(5.0, 3.0, 1.0, 0.0)) == [2, 2, 1, 1]
    assert calls(pipe, sampler="euler_cfg_pp") == [2, 2, 2, 2]
    assert calls(pipe, sampler="euler_cfg_pp", guidance_interval=(1.0, 9.0)) == [1, 2, 2, 1]
    assert calls(pipe, pag_scale=3.0, guidance_steps=(0.0, 0.5)) == [3, 3, 1, 1]
    assert calls(pipe, pag_scale=3.0, guidance_scale=1.0) == [2, 2, 2, 2]
    assert calls(pipe, guidance_method="perp_neg") == [2, 2, 2, 2]  # no negative prompt
    assert calls(pipe, guidance_method="perp_neg", negative_prompt="a dog") == [3, 3, 3, 3]
    assert calls(pipe, guidance_method="perp_neg", negative_prompt="a dog", guidance_steps=(0.0, 0.5)) == [3, 3, 1, 1]


def test_perp_neg_without_a_negative_is_classic_guidance(pipe: mezzotint.Pipeline, own: Array) -> None:
    assert np.array_equal(draw(pipe, guidance_method="perp_neg"), own)


# ---- the request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_options_and_no_others(pipe: mezzotint.Pipeline, name: str) -> None:
    resolved = pipe.resolve(mezzotint.Request(prompt=PROMPT, guidance_method=name))
    given = {field for field, value in resolved if field.startswith(tuple(METHODS)) and value is not None}
    assert given == {f"{name}_{option}" for option in inspect.signature(METHODS[name]).parameters}
    assert pipe.resolve(resolved) == resolved


def test_the_norm_threshold_grows_with_the_picture(pipe: mezzotint.Pipeline) -> None:
    request = mezzotint.Request(prompt=PROMPT, guidance_method="apg")
    assert pipe.resolve(request.replace(width=1024, height=1024)).apg_norm_threshold == 15.0
    assert pipe.resolve(request.replace(width=512, height=512)).apg_norm_threshold == 7.5
    assert pipe.resolve(request).apg_norm_threshold == 1.875


def test_layers_that_the_model_has_not_get_a_sentence(pipe: mezzotint.Pipeline) -> None:
    with pytest.raises(mezzotint.RequestError, match=r"pag_layers has 'up_blocks\.9', .* such as .*mid_block"):
        pipe.resolve(mezzotint.Request(prompt=PROMPT, pag_scale=3.0, pag_layers=("mid", "up_blocks.9")))
    with pytest.raises(mezzotint.RequestError, match="pag_layers is given, but there is no pag_scale"):
        pipe.resolve(mezzotint.Request(prompt=PROMPT, pag_layers="mid"))
    layers = {name for name, layer in pipe.unet.named_modules() if name.endswith("attn1")}
    assert layers == {*pipe._model.info.self_attentions}


def test_split_guidance_has_the_same_perturbed_output(pipe: mezzotint.Pipeline) -> None:
    denoiser = [
        Denoiser(
            pipe.unet,
            pipe.schedule,
            EPSILON,
            [pipe.encode("a"), pipe.encode("")],
            perturbed_layers=["mid"],
            split=split,
        )
        for split in (False, True)
    ]
    with torch.inference_mode():
        batched, split = (one.outputs(X, 2.0, perturbed=1) for one in denoiser)
    for a, b in zip(batched, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(batched) == 3 and (batched[2] - batched[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields", [{"apg_eta": 0.5}, {"guidance_method": "apg", "perp_neg_scale": 1.0}, {"cfg_zero_init_steps": 0}], ids=str
)
def test_an_option_of_another_method_gets_a_sentence(pipe: mezzotint.Pipeline, fields: dict[str, Any]) -> None:
    *_, (name, _) = fields.items()
    with pytest.raises(mezzotint.RequestError, match=f"{name} is given; it is for guidance_method "):
        pipe.resolve(mezzotint.Request(prompt=PROMPT, **fields))


def test_the_record_of_a_picture_draws_it_again(pipe: mezzotint.Pipeline) -> None:
    fields = {"guidance_method": "apg", "guidance_scale": (9.0, 3.0), "guidance_steps": (0.0, 0.8), "mimic_scale": 4.0}
    image = pipe(PROMPT, seed=8, steps=3, **fields)
    request = mezzotint.Request.model_validate(json.loads(image.info["mezzotint"])["request"])
    assert {name: getattr(request, name) for name in fields} == fields
    assert pipe.generate(request).images[0].tobytes() == image.tobytes()


@pytest.mark.parametrize(("relative", "step"), [(-5e-7, 2), (0.0, 2), (5e-7, 2), (5e-6, 1), (-5e-6, 2), (0.3, 1)])
def test_a_level_is_met_to_within_float32s_rounding(relative: float, step: int) -> None:
    """Solvers compute a step's first level again in float32; from further above it, the call is of the step before."""
    assert step_index(SIGMAS[2] * (1.0 + relative), SIGMAS) == step
