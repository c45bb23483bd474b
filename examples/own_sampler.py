"""A solver of your own: a generator over falling noise levels. This is the midpoint method in log sigma."""

from itertools import pairwise

import torch

import mezzotint
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.solvers import Step
from mezzotint.diffusion.spacing import SPACINGS


def midpoint(denoise, x, sigmas, noise=None):
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next > 0.0:
            middle = (sigma * sigma_next) ** 0.5
            denoised = denoise(denoised + (middle / sigma) * (x - denoised), middle)
        x = denoised + (sigma_next / sigma) * (x - denoised)
        yield Step(i, sigma_next, x, denoised)


pipe = mezzotint.load()
prediction = PREDICTIONS[pipe.scheduler_config.get("prediction_type", "epsilon")]
with torch.inference_mode():
    denoise = Denoiser(pipe.unet, pipe.schedule, prediction, [pipe.encode("a lemon on a blue background")])
    sigmas = SPACINGS["trailing"](pipe.schedule, 12)
    *_, last = midpoint(denoise, torch.randn(1, 4, 16, 16, device=pipe.device) * sigmas[0], sigmas)
pipe.decode(last.x)[0].save("midpoint.png")
