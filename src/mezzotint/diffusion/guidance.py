"""Guidance wraps: it takes what gives the network's outputs and returns a denoiser. Solvers never hear of it.

Outputs come as (conditions..., unconditional, negatives...), from one batched call; where guidance does nothing only
the conditions are asked for. In this order: the conditions are joined by their weights into one conditional; a method
corrects the pair (conditional, unconditional); classic guidance extrapolates from it; dynamic thresholding; rescale;
and the prediction makes `denoised` of the network's output. docs/guidance.md has the equations.
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
from mezzotint.diffusion.solving import weighted
from mezzotint.errors import RequestError


class Outputs(Protocol):
    """The network's own outputs at x (B, C, h, w), one like x for each condition, or for the first `count` of them."""

    def __call__(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]: ...


class Call(NamedTuple):
    """Where a call stands in its run: x (B, C, h, w) at noise level sigma, in the step (from 0)."""

    x: Tensor
    sigma: float
    step: int
    prediction: Prediction


# (call, conditional, unconditional, *negatives) -> the pair that classic guidance extrapolates from; network's outputs.
# A method belongs to one run, whose state it may keep: METHODS makes a new one for each.
Method = Callable[..., tuple[Tensor, Tensor]]


def cfg() -> Method:
    """Classifier-free guidance, Ho and Salimans 2022 eq. 6: the pair as it is."""
    return lambda call, conditional, unconditional: (conditional, unconditional)


def apg(*, eta: float = 0.0, momentum: float = -0.5, norm_threshold: float = 15.0) -> Method:
    """Adaptive projected guidance, Sadat et al. 2024 alg. 1, on the estimates of x0.

    Of the difference, averaged over the calls with a (negative) momentum and no longer than norm_threshold (0: of any
    length), the part along the conditional estimate, which oversaturates, counts eta times.
    """
    average: Tensor | None = None

    def correct(call: Call, conditional: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal average
        denoised = call.prediction.denoised(conditional, call.x, call.sigma)
        difference = denoised - call.prediction.denoised(unconditional, call.x, call.sigma)
        average = difference if average is None else difference + momentum * average
        update = average
        if norm_threshold > 0.0:
            length = _dot(update, update).sqrt()
            update = update * (norm_threshold / length).clamp(max=1.0)
        update = update - (1.0 - eta) * _projection(update, denoised)
        return conditional, call.prediction.output(denoised - update, call.x, call.sigma)

    return correct


def cfg_zero(*, init_steps: int = 1) -> Method:
    """CFG-Zero*, Fan et al. 2025 alg. 1: the unconditional output scaled so that it lies nearest to the conditional
    one, and an output of zero in the first `init_steps` steps.
    """

    def correct(call: Call, conditional: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        if call.step < init_steps:
            zero = torch.zeros_like(conditional)
            return zero, zero
        return conditional, _projection(conditional, unconditional)

    return correct


def perp_neg(*, scale: float = 1.0) -> Method:
    """Perp-Neg, Armandpour et al. 2023: of each negative only what is perpendicular to the positive is taken off,
    `scale` times. Here `unconditional` is the empty prompt's.
    """

    def correct(call: Call, conditional: Tensor, unconditional: Tensor, *negatives: Tensor) -> tuple[Tensor, Tensor]:
        positive, corrected = conditional - unconditional, conditional
        for negative in negatives:
            away = negative - unconditional
            corrected = corrected - scale * (away - _projection(away, positive))
        return corrected, unconditional

    return correct


METHODS: dict[str, Callable[..., Method]] = {"cfg": cfg, "apg": apg, "cfg_zero": cfg_zero, "perp_neg": perp_neg}


@dataclass(frozen=True, eq=False)
class Guided:
    """A guided denoiser: unconditional + scale * (conditional - unconditional) of what `method` makes of the two.

    scale: 1 and below is no guidance, as in diffusers; several are spread evenly over the run, linear in between.
    rescale: 0 to 1, how far the output is brought back to the standard deviation of the conditional one (Lin et al.
    2023, eq. 15 and 16). interval: (low, high) noise levels, guidance only where low < sigma <= high (Kynkäänniemi et
    al. 2024). steps: (start, stop) fractions of the run's steps, guidance from int(start * n) to before int(stop * n),
    as in diffusers. sigmas: the run's levels, by which its steps are counted; without them every call is in the first
    of one. weights: of the conditions, which are joined as unconditional + sum w (condition - unconditional) (Liu et
    al. 2022). mimic_scale, threshold_percentile: see `thresholded`. Raises RequestError for a scale that is not finite
    and for an interval or steps that hold nothing.
    """

    outputs: Outputs
    prediction: Prediction
    scale: float | Sequence[float]
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    steps: tuple[float, float] | None = None
    sigmas: Sequence[float] = ()
    method: Method = field(default_factory=cfg)
    weights: Sequence[float] = (1.0,)
    mimic_scale: float | None = None
    threshold_percentile: float = 1.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.scale).all():  # NaN would pass for no guidance
            raise RequestError(f"scale is {self.scale}; it must be a finite number, or a list of them")
        for name, pair in (("interval", self.interval), ("steps", self.steps)):
            if pair and not pair[0] < pair[1]:
                raise RequestError(f"{name} is {pair}; it must be two numbers, the lower first")

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """denoised, like x (B, C, h, w)."""
        if self._scale(self._step(sigma)) > 1.0:
            return self.pair(x, sigma)[0]
        return self._unguided(x, sigma)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(guided, unconditional) denoised, for the CFG++ solvers, whose scale means something below 1 too.

        Twice the conditional one outside of the interval and the steps.
        """
        step = self._step(sigma)
        if not self._guides(sigma, step):
            return (self._unguided(x, sigma),) * 2
        outputs, scale = self.outputs(x, sigma), self._scale(step)
        conditional = weighted(self._weights, outputs[: len(self._weights)])
        unconditional, *negatives = outputs[len(self.weights) :]
        corrected, base = self.method(Call(x, sigma, step, self.prediction), conditional, unconditional, *negatives)
        output = base + scale * (corrected - base)
        if self.mimic_scale is not None:
            mimic = self.prediction.denoised(base + self.mimic_scale * (corrected - base), x, sigma)
            denoised = thresholded(self.prediction.denoised(output, x, sigma), mimic, self.threshold_percentile)
            output = self.prediction.output(denoised, x, sigma)
        if self.rescale > 0.0:
            each = _each(x)
            ratio = conditional.std(each, keepdim=True) / output.std(each, keepdim=True).clamp(min=TINY)
            output = output * (self.rescale * ratio + (1.0 - self.rescale))
        return self.prediction.denoised(output, x, sigma), self.prediction.denoised(unconditional, x, sigma)

    def _unguided(self, x: Tensor, sigma: float) -> Tensor:
        """Under the conditions alone; the unconditional is asked for only where the weights do not sum to 1."""
        output = weighted(self._weights, self.outputs(x, sigma, len(self._weights)))
        return self.prediction.denoised(output, x, sigma)

    @cached_property
    def _weights(self) -> Sequence[float]:
        """Of the conditions; and what unconditional + sum w (condition - unconditional) keeps of the first, if any."""
        rest = 1.0 - sum(self.weights)
        return self.weights if abs(rest) < 1e-6 else (*self.weights, rest)

    def _guides(self, sigma: float, step: int) -> bool:
        low, high = self.interval or (0.0, float("inf"))
        start, stop = (int(fraction * self._count) for fraction in self.steps or (0.0, 1.0))
        return low < sigma <= high and start <= step < stop

    @property
    def _count(self) -> int:
        return max(len(self.sigmas) - 1, 1)

    def _step(self, sigma: float) -> int:
        return step_of(sigma, self.sigmas)

    def _scale(self, step: int) -> float:
        scales = (self.scale,) if isinstance(self.scale, int | float) else self.scale
        place = step * (len(scales) - 1) / max(self._count - 1, 1)
        return float(np.interp(place, range(len(scales)), scales))


guided = Guided  # reads well as the verb: denoise = guided(denoiser.outputs, prediction, 7.5)


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step of a run through the levels `sigmas` that a call at sigma belongs to, from 0: the one that begins there,
    or else the one around it.
    """
    return sum(level >= sigma * (1.0 - 1e-6) for level in sigmas[1 : max(len(sigmas) - 1, 1)])


def thresholded(denoised: Tensor, mimic: Tensor, percentile: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3) for latents, which have no range of their own: the form
    of A1111's extension (Goodwin 2023), where `mimic`, the same estimate at a lower scale, gives the range.

    In each channel, around its mean: values beyond the percentile (0 to 1) of |denoised| are cut off, but none within
    the reach of `mimic`; then the whole shrinks so that the limit becomes that reach.
    """
    mean = denoised.mean((2, 3), keepdim=True)
    centred = (denoised - mean).flatten(2)  # (B, C, h * w)
    reach = (mimic - mimic.mean((2, 3), keepdim=True)).flatten(2).abs().amax(2, keepdim=True)
    limit = torch.maximum(reach, centred.abs().quantile(percentile, 2, keepdim=True)).clamp(min=TINY)
    return mean + (centred.clamp(-limit, limit) * (reach / limit)).reshape(denoised.shape)


TINY = 1e-12  # in a divisor that may be zero where the dividend is, too


def _each(x: Tensor) -> tuple[int, ...]:
    """The dimensions of one image."""
    return tuple(range(1, x.ndim))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each image of the batch, (B, 1, 1, 1)."""
    return (a * b).sum(_each(a), keepdim=True)


def _projection(a: Tensor, onto: Tensor) -> Tensor:
    """The part of `a` that lies along `onto`, in each image of the batch."""
    return (_dot(a, onto) / _dot(onto, onto).clamp(min=TINY)) * onto
