"""What a network predicts, and how that becomes `denoised`, the estimate of x0 in x = x0 + sigma * noise.

A prediction sees one output and sigma, nothing else. All three are affine in the output, so guidance on outputs and
guidance on denoised are the same. `sigma` is a float, or a tensor that broadcasts against x, such as (B, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Level = float | Tensor


@dataclass(frozen=True)
class Prediction:
    """One parametrisation; every function returns the shape of its tensors.

    `denoised(output, x, sigma)`: the estimate of x0 from the network's output.
    `output(denoised, x, sigma)`: its inverse.
    `target(x0, noise, sigma)`: what a network learns to put out when shown (x0 + sigma noise) / sqrt(sigma^2 + 1).
    """

    denoised: Callable[[Tensor, Tensor, Level], Tensor]
    output: Callable[[Tensor, Tensor, Level], Tensor]
    target: Callable[[Tensor, Tensor, Level], Tensor]


def _scale(sigma: Level) -> Level:
    """sqrt(sigma^2 + 1) = 1 / sqrt(alpha_bar): from the variance-preserving coordinate to ours."""
    scale: Level = (sigma * sigma + 1.0) ** 0.5
    return scale


# The noise itself (Ho et al. 2020).
EPSILON = Prediction(
    denoised=lambda output, x, sigma: x - sigma * output,
    output=lambda denoised, x, sigma: (x - denoised) / sigma,
    target=lambda x0, noise, sigma: noise,
)

# v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, section 4).
V_PREDICTION = Prediction(
    denoised=lambda output, x, sigma: x / (sigma * sigma + 1.0) - output * (sigma / _scale(sigma)),
    output=lambda denoised, x, sigma: (x / (sigma * sigma + 1.0) - denoised) * (_scale(sigma) / sigma),
    target=lambda x0, noise, sigma: (noise - sigma * x0) / _scale(sigma),
)

# x0 itself.
SAMPLE = Prediction(
    denoised=lambda output, x, sigma: output,
    output=lambda denoised, x, sigma: denoised,
    target=lambda x0, noise, sigma: x0,
)

PREDICTIONS: dict[str, Prediction] = {"epsilon": EPSILON, "v_prediction": V_PREDICTION, "sample": SAMPLE}
