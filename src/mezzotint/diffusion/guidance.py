"""Guidance as a wrapper: it takes the network's outputs and returns a denoiser. Solvers do not know about it.

One batched call of the network returns (conditions..., unconditional, negatives...). Where guidance has no effect,
only the conditions are computed. With perturbed-attention guidance the perturbed conditions come last. The steps, in
order:

1. The conditions are combined by their weights into one conditional output.
2. A method corrects the pair (conditional, unconditional).
3. Classifier-free guidance extrapolates from that pair.
4. Perturbed-attention guidance.
5. Dynamic thresholding.
6. Rescale.
7. The prediction converts the output to the denoised estimate.

docs/guidance.md has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.solving import weighted_sum
from mezzotint.errors import RequestError


class Outputs(Protocol):
    """A function that returns the network's outputs at x (B, C, h, w).

    It returns one tensor of the shape of x for each condition, or only the first `count` of them; after these, those of
    the first `perturbed` conditions with perturbed self-attention.
    """

    def __call__(self, x: Tensor, sigma: float, count: int | None = None, perturbed: int = 0) -> tuple[Tensor, ...]:
        """Return the first `count` outputs, or all of them, and the perturbed ones."""


class Call(NamedTuple):
    """The context of one call: x (B, C, h, w) at noise level sigma, in the step of this index (from 0)."""

    x: Tensor
    sigma: float
    step: int
    prediction: Prediction


# (call, conditional, unconditional, *negatives) -> the pair that classifier-free guidance extrapolates from, all of
# them network outputs. A method may hold the state of a run, so METHODS makes a new one for each.
Method = Callable[..., tuple[Tensor, Tensor]]


def cfg() -> Method:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): leave the pair unchanged."""
    return lambda call, conditional, unconditional: (conditional, unconditional)


def apg(*, eta: float = 0.0, momentum: float = -0.5, norm_threshold: float = 15.0) -> Method:
    """Adaptive projected guidance (Sadat et al. 2024, alg. 1), on the estimates of x0.

    Args:
        eta: Weight of the part of the guidance that is parallel to the conditional estimate, which oversaturates.
        momentum: Weight of the running average of the earlier calls; usually negative.
        norm_threshold: Largest norm of the guidance for each image; 0 means no limit.

    Returns:
        A method with a state of its own, for one run.
    """
    average: Tensor | None = None

    def correct(call: Call, conditional: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal average
        denoised = call.prediction.denoised(conditional, call.x, call.sigma)
        difference = denoised - call.prediction.denoised(unconditional, call.x, call.sigma)
        average = difference if average is None else difference + momentum * average
        update = average
        if norm_threshold > 0.0:
            norm = _dot(update, update).sqrt()
            update = update * (norm_threshold / norm).clamp(max=1.0)
        update = update - (1.0 - eta) * _projection(update, denoised)
        return conditional, call.prediction.output(denoised - update, call.x, call.sigma)

    return correct


def cfg_zero(*, init_steps: int = 1) -> Method:
    """CFG-Zero* (Fan et al. 2025, alg. 1).

    The unconditional output is projected onto the conditional one, and the output is zero in the first `init_steps`
    steps.
    """

    def correct(call: Call, conditional: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        if call.step < init_steps:
            zero = torch.zeros_like(conditional)
            return zero, zero
        return conditional, _projection(conditional, unconditional)

    return correct


def perp_neg(*, scale: float = 1.0) -> Method:
    """Perp-Neg (Armandpour et al. 2023).

    Of each negative prompt, only the part perpendicular to the positive one is subtracted, `scale` times. The
    unconditional output is that of the empty prompt.
    """

    def correct(call: Call, conditional: Tensor, unconditional: Tensor, *negatives: Tensor) -> tuple[Tensor, Tensor]:
        positive, corrected = conditional - unconditional, conditional
        for negative in negatives:
            difference = negative - unconditional
            corrected = corrected - scale * (difference - _projection(difference, positive))
        return corrected, unconditional

    return correct


METHODS: dict[str, Callable[..., Method]] = {"cfg": cfg, "apg": apg, "cfg_zero": cfg_zero, "perp_neg": perp_neg}
# The options of each and their defaults; as a field of a Request "apg_eta", and so on.
METHOD_OPTIONS: dict[str, dict[str, float]] = {
    "cfg": {},
    "apg": {"eta": 0.0, "momentum": -0.5, "norm_threshold": 15.0},
    "cfg_zero": {"init_steps": 1},
    "perp_neg": {"scale": 1.0},
}


@dataclass(frozen=True, eq=False)
class Guided:
    """A guided denoiser: unconditional + scale * (conditional - unconditional), after the method's correction.

    Args:
        outputs: The network's outputs.
        prediction: Converts them to denoised estimates and back.
        scale: Guidance scale; 1 and below disables guidance, as in diffusers. A sequence is spread evenly over the run
            and interpolated linearly.
        rescale: From 0 to 1, how much of the standard deviation of the conditional output is restored (Lin et al. 2023,
            eq. 15 and 16).
        interval: Noise levels (low, high); guidance is active only where low < sigma <= high (Kynkäänniemi et al.
            2024).
        steps: Fractions (start, stop) of the run; guidance is active from step int(start * n) to before int(stop * n),
            as in diffusers.
        sigmas: Noise levels of the run, which determine the step of a call. Without them, every call belongs to the
            first step of one.
        method: One of `METHODS`.
        weights: Weights of the conditions, combined as unconditional + sum of w * (condition - unconditional)
            (Liu et al. 2022). Of regional prompts, one for each place, (1, 1, h, w).
        mimic_scale: Scale whose range dynamic thresholding imitates; see `dynamic_threshold`.
        threshold_percentile: From 0 to 1; see `dynamic_threshold`.
        pag_scale: Returns the scale of perturbed-attention guidance at a noise level (Ahn et al. 2024, eq. 15): the
            output moves away from the one whose self-attention is the identity. It is active where guidance is, and
            needs no scale above 1.

    Raises:
        RequestError: If the scale is not finite, or the interval or the steps are empty.
    """

    outputs: Outputs
    prediction: Prediction
    scale: float | Sequence[float]
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    steps: tuple[float, float] | None = None
    sigmas: Sequence[float] = ()
    method: Method = field(default_factory=cfg)
    weights: Sequence[float | Tensor] = (1.0,)
    mimic_scale: float | None = None
    threshold_percentile: float = 1.0
    pag_scale: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.scale).all():  # NaN would disable guidance silently
            raise RequestError(f"scale is {self.scale}; it must be a finite number, or a list of them")
        for name, pair in (("interval", self.interval), ("steps", self.steps)):
            if pair and not pair[0] < pair[1]:
                raise RequestError(f"{name} is {pair}; it must be two numbers, the lower first")

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the denoised estimate, of the shape of x (B, C, h, w)."""
        if interpolate_scale(self.scale, self._step(sigma), self._num_steps) > 1.0:
            return self.pair(x, sigma)[0]
        return self._denoise_conditional(x, sigma)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Return the (guided, unconditional) denoised estimates, for the CFG++ solvers.

        Their scale also has a meaning below 1. Outside the interval and the steps, both are the conditional estimate.
        """
        step = self._step(sigma)
        if not self._is_guided(sigma):
            return (self._denoise_conditional(x, sigma),) * 2
        outputs, perturbed = self._outputs(x, sigma)
        scale = interpolate_scale(self.scale, step, self._num_steps)
        conditional = weighted_sum(self._weights, outputs[: len(self._weights)])
        unconditional, *negatives = outputs[len(self.weights) :]
        corrected, base = self.method(Call(x, sigma, step, self.prediction), conditional, unconditional, *negatives)
        output = base + scale * (corrected - base)
        output = output if perturbed is None else output + perturbed
        if self.mimic_scale is not None:
            mimic = self.prediction.denoised(base + self.mimic_scale * (corrected - base), x, sigma)
            denoised = dynamic_threshold(self.prediction.denoised(output, x, sigma), mimic, self.threshold_percentile)
            output = self.prediction.output(denoised, x, sigma)
        if self.rescale > 0.0:
            dims = _image_dims(x)
            ratio = conditional.std(dims, keepdim=True) / output.std(dims, keepdim=True).clamp(min=EPS)
            output = output * (self.rescale * ratio + (1.0 - self.rescale))
        return self.prediction.denoised(output, x, sigma), self.prediction.denoised(unconditional, x, sigma)

    def _denoise_conditional(self, x: Tensor, sigma: float) -> Tensor:
        """Return the estimate of the conditions; the unconditional is computed unless their weights sum to 1."""
        outputs, perturbed = self._outputs(x, sigma, len(self._weights))
        output = weighted_sum(self._weights, outputs)
        return self.prediction.denoised(output if perturbed is None else output + perturbed, x, sigma)

    def _outputs(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the outputs, and what perturbed-attention guidance adds to their combination; None where it is off."""
        scale = self.pag_scale(sigma) if self.pag_scale and self._is_guided(sigma) else 0.0
        if scale <= 0.0:
            return self.outputs(x, sigma, count), None
        parts = len(self.weights)
        outputs = self.outputs(x, sigma, count, parts)
        differences = [plain - other for plain, other in zip(outputs, outputs[-parts:], strict=False)]
        return outputs[:-parts], scale * weighted_sum(self.weights, differences[:parts])

    @cached_property
    def _weights(self) -> Sequence[float | Tensor]:
        """Weights of the conditions and, unless they sum to 1, the remainder as that of the unconditional."""
        rest = 1.0 - sum(self.weights)
        most = float(rest.abs().max()) if isinstance(rest, Tensor) else abs(rest)
        return self.weights if most < 1e-6 else (*self.weights, rest)

    def _is_guided(self, sigma: float) -> bool:
        return is_guided(sigma, self._step(sigma), self._num_steps, self.interval, self.steps)

    @property
    def _num_steps(self) -> int:
        return max(len(self.sigmas) - 1, 1)

    def _step(self, sigma: float) -> int:
        return step_index(sigma, self.sigmas)


guided = Guided  # the functional spelling: denoise = guided(denoiser.outputs, prediction, 7.5)


def step_index(sigma: float, sigmas: Sequence[float]) -> int:
    """Return the index of the step, in a run through `sigmas`, that a call at sigma belongs to.

    It is the step that begins at sigma or, for a level in between, the step around it.
    """
    return sum(level >= sigma * (1.0 - 1e-6) for level in sigmas[1 : max(len(sigmas) - 1, 1)])


def interpolate_scale(scale: float | Sequence[float], step: int, num_steps: int) -> float:
    """Return the guidance scale of a step of a run: one number, or several that are spread evenly over the run."""
    scales = (scale,) if isinstance(scale, int | float) else scale
    position = step * (len(scales) - 1) / max(num_steps - 1, 1)
    return float(np.interp(position, range(len(scales)), scales))


def is_guided(
    sigma: float,
    step: int,
    num_steps: int,
    interval: tuple[float, float] | None = None,
    steps: tuple[float, float] | None = None,
) -> bool:
    """Return whether guidance is active at a noise level and a step of a run; see `Guided` for interval and steps."""
    low, high = interval or (0.0, float("inf"))
    start, stop = (int(fraction * num_steps) for fraction in steps or (0.0, 1.0))
    return low < sigma <= high and start <= step < stop


def dynamic_threshold(denoised: Tensor, mimic: Tensor, percentile: float) -> Tensor:
    """Limit the range of the estimate of x0 (Saharia et al. 2022, section 2.3), in the form for latents.

    Latents have no fixed range, so `mimic`, the same estimate at a lower guidance scale, gives it, as in A1111's
    extension (Goodwin 2023). In each channel, around its mean, values above the percentile of |denoised| are clipped,
    but none within the range of `mimic`; the result is then scaled so that the limit becomes that range.

    Args:
        denoised: Estimate of x0, (B, C, h, w).
        mimic: The same at a lower guidance scale.
        percentile: From 0 to 1.
    """
    mean = denoised.mean((2, 3), keepdim=True)
    centered = (denoised - mean).flatten(2)  # (B, C, h * w)
    mimic_range = (mimic - mimic.mean((2, 3), keepdim=True)).flatten(2).abs().amax(2, keepdim=True)
    limit = torch.maximum(mimic_range, centered.abs().quantile(percentile, 2, keepdim=True)).clamp(min=EPS)
    return mean + (centered.clamp(-limit, limit) * (mimic_range / limit)).reshape(denoised.shape)


EPS = 1e-12  # smallest divisor, where dividend and divisor may both be zero


def _image_dims(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of one image."""
    return tuple(range(1, x.ndim))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product for each image of the batch, (B, 1, 1, 1)."""
    return (a * b).sum(_image_dims(a), keepdim=True)


def _projection(a: Tensor, onto: Tensor) -> Tensor:
    """Return the component of `a` parallel to `onto`, for each image of the batch."""
    return (_dot(a, onto) / _dot(onto, onto).clamp(min=EPS)) * onto
