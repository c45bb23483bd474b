"""What `pipe(prompt)` does, by hand: noise levels, a guided denoiser and a solver, each of them yours to replace."""

import torch

import mezzotint
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.guidance import guided
from mezzotint.diffusion.noise import SeededNoise
from mezzotint.diffusion.prediction import PREDICTIONS
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS

pipe = mezzotint.load()
prediction = PREDICTIONS[pipe.scheduler_config.get("prediction_type", "epsilon")]
side = pipe.unet.config.sample_size

with torch.inference_mode():
    conditions = [pipe.encode("a lemon on a blue background"), pipe.encode("")]
    denoiser = Denoiser(pipe.unet, pipe.schedule, prediction, conditions)  # x = x0 + sigma * noise -> network outputs
    denoise = guided(denoiser.outputs, prediction, scale=3.0)  # denoise(x, sigma) -> an estimate of x0
    sigmas = SPACINGS["trailing"](pipe.schedule, 12)  # 13 falling floats, the last 0.0
    noise = SeededNoise([7], (4, side, side), pipe.device)
    for step in SOLVERS["dpmpp_2m"](denoise, noise.draw() * sigmas[0], sigmas, noise):
        print(f"step {step.index + 1}: sigma {step.sigma:.3f}")

pipe.decode(step.x)[0].save("by_hand.png")
