"""What a network predicts, and its conversion to `denoised`, the estimate of x0 in x = x0 + sigma * noise.

A prediction depends only on one output, x and sigma. All are affine in the output, so guidance on outputs and guidance
on denoised estimates are the same. `sigma` is a float, or a tensor that broadcasts against x, such as (B, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mezzotint.config import ScheduleConfig
from mezzotint.errors import RequestError

Level = float | Tensor


@dataclass(frozen=True)
class Prediction:
    """One parametrization; every function returns a tensor of the shape of its arguments.

    Attributes:
        denoised: `denoised(output, x, sigma)`, the estimate of x0 from the network's output.
        output: `output(denoised, x, sigma)`, its inverse.
        target: `target(x0, noise, sigma)`, the training target of the network at x0 + sigma * noise.
        sigma_data: The network's input is x / sqrt(sigma^2 + sigma_data^2); 1 for a variance-preserving model.
    """

    denoised: Callable[[Tensor, Tensor, Level], Tensor]
    output: Callable[[Tensor, Tensor, Level], Tensor]
    target: Callable[[Tensor, Tensor, Level], Tensor]
    sigma_data: float = 1.0

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Prediction:
        """Return the prediction of a `scheduler_config.json`.

        Raises:
            RequestError: If the configuration combines "sample" with EDM's preconditioning.
        """
        if config.sigma_data is None:
            return PREDICTIONS[config.prediction_type]
        if config.prediction_type == "sample":
            raise RequestError(
                "prediction_type is 'sample'; with EDM's preconditioning it must be epsilon or v_prediction"
            )
        return edm_prediction(config.sigma_data, -1.0 if config.prediction_type == "v_prediction" else 1.0)


def edm_prediction(sigma_data: float, sign: float = 1.0) -> Prediction:
    """Return EDM's preconditioning (Karras et al. 2022, table 1): denoised = c_skip x + c_out output.

    Args:
        sigma_data: Standard deviation of the data.
        sign: Sign of c_out; -1 is what diffusers calls EDM's v-prediction.
    """

    def scale(sigma: Level) -> Level:
        root: Level = (sigma * sigma + sigma_data**2) ** 0.5
        return root

    def c_skip(sigma: Level) -> Level:
        return sigma_data**2 / (sigma * sigma + sigma_data**2)

    def c_out(sigma: Level) -> Level:
        return sign * sigma_data * sigma / scale(sigma)

    return Prediction(
        denoised=lambda output, x, sigma: c_skip(sigma) * x + c_out(sigma) * output,
        output=lambda denoised, x, sigma: (denoised - c_skip(sigma) * x) / c_out(sigma),
        target=lambda x0, noise, sigma: sign * (sigma * x0 / sigma_data - sigma_data * noise) / scale(sigma),
        sigma_data=sigma_data,
    )


# The noise (Ho et al. 2020).
EPSILON = Prediction(
    denoised=lambda output, x, sigma: x - sigma * output,
    output=lambda denoised, x, sigma: (x - denoised) / sigma,
    target=lambda x0, noise, sigma: noise,
)

# v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, section 4).
V_PREDICTION = edm_prediction(1.0, sign=-1.0)

# x0.
SAMPLE = Prediction(
    denoised=lambda output, x, sigma: output,
    output=lambda denoised, x, sigma: denoised,
    target=lambda x0, noise, sigma: x0,
)

PREDICTIONS: dict[str, Prediction] = {"epsilon": EPSILON, "v_prediction": V_PREDICTION, "sample": SAMPLE}
