"""A solver of your own: a generator over falling noise levels. This is the midpoint method in log sigma."""

from itertools import pairwise

import mezzotint
from mezzotint.diffusion.solvers import Step


def midpoint(denoise, x, sigmas, noise, **options):
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next > 0.0:
            middle = (sigma * sigma_next) ** 0.5
            denoised = denoise(denoised + (middle / sigma) * (x - denoised), middle)
        x = denoised + (sigma_next / sigma) * (x - denoised)
        yield Step(i, sigma_next, x, denoised)


mezzotint.samplers.register("midpoint", midpoint, spacing="trailing", steps=12, calls=2)
pipe = mezzotint.load()
image = pipe("a lemon on a blue background", sampler="midpoint", seed=0)
image.save("midpoint.png")
