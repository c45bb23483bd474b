"""A1111's DDIM, DDIM CFG++, PLMS and UniPC, from text and from a picture, against its arithmetic written out below.

Its variables are variance-preserving, its timesteps rise and its loops count down; float64, and a smooth function of x
and the timestep for a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mezzotint import Pipeline, Request, RequestError
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.images.io import from_pil
from mezzotint.run.plan import RunPlan
from mezzotint.samplers.names import resolve

Network = Callable[[Tensor, float], Tensor]  # (x, timestep) -> predicted noise

# Two programs of the same formulas in float64: they differ by the rounding of tables and of each step.
TOLERANCE = 1e-9
RUN = Request(prompt="a lemon", negative_prompt="a whale", seed=7, guidance_scale=7.5)


def alphas_cumprod() -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


ALPHAS = alphas_cumprod()
MIX = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4


def network(x: Tensor, timestep: float, condition: int = 0) -> Tensor:
    mixed = torch.tanh(x.flatten(1) @ MIX[condition]).reshape(x.shape)
    return 0.6 * x + 0.4 * math.cos(timestep / 150 + condition) * mixed


def guided(x: Tensor, timestep: float, scale: float) -> Tensor:
    return network(x, timestep, 1) + scale * (network(x, timestep) - network(x, timestep, 1))


# ---- A1111 -----------------------------------------------------------------------------------------------------------


def timesteps_of(steps: int) -> list[int]:
    """get_timesteps."""
    return [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)]


def setup_img2img_steps(steps: int, strength: float, fixed: bool) -> tuple[int, int]:
    if fixed:
        return int(steps / min(strength, 0.999)), steps - 1
    return steps, int(min(strength, 0.999) * steps)


def a1111_ddim(eps: Callable[[Tensor, float], tuple[Tensor, Tensor]], x: Tensor, timesteps: Sequence[int]) -> Tensor:
    """ddim and ddim_cfgpp; eps gives the noise of the estimate, and that of the direction."""
    for index in range(len(timesteps) - 1, 0, -1):
        alpha, alpha_prev = ALPHAS[timesteps[index]], ALPHAS[timesteps[index - 1]]
        noise, direction = eps(x, timesteps[index])
        x0 = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        x = alpha_prev**0.5 * x0 + (1 - alpha_prev) ** 0.5 * direction
    return x


def a1111_plms(eps: Network, x: Tensor, timesteps: Sequence[int]) -> Tensor:
    old: list[Tensor] = []

    def previous(noise: Tensor, index: int) -> Tensor:
        alpha, alpha_prev = ALPHAS[timesteps[index]], ALPHAS[timesteps[index - 1]]
        return alpha_prev**0.5 * (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5 + (1 - alpha_prev) ** 0.5 * noise

    for index in range(len(timesteps) - 1, 0, -1):
        noise = eps(x, timesteps[index])
        if not old:
            mean = (noise + eps(previous(noise, index), timesteps[index - 1])) / 2
        elif len(old) == 1:
            mean = (3 * noise - old[-1]) / 2
        elif len(old) == 2:
            mean = (23 * noise - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mean = (55 * noise - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = previous(mean, index)
        old.append(noise)
    return x


def a1111_unipc(eps: Network, x: Tensor, steps: int, start: float = 1.0, order: int = 3) -> Tensor:
    """UniPC, bh1, multistep, lower_order_final, time_uniform; log alpha is linear between the table's times."""
    times = np.linspace(start, 1 / 1000, steps + 1)
    alpha = np.exp(np.interp(times, np.linspace(0, 1, 1001)[1:], 0.5 * np.log(ALPHAS)))
    std = np.sqrt(1 - alpha**2)
    half_log_snr = np.log(alpha / std)

    def model(x: Tensor, k: int) -> Tensor:
        return (x - std[k] * eps(x, (times[k] - 1 / 1000) * 1000)) / alpha[k]

    found = [model(x, 0)]
    for k in range(1, steps + 1):
        count = k if k < order else min(order, steps + 1 - k)
        h = half_log_snr[k] - half_log_snr[k - 1]
        nodes = np.array([(half_log_snr[k - 1 - j] - half_log_snr[k - 1]) / h for j in range(1, count)] + [1.0])
        slopes = [(found[-1 - j] - found[-1]) / nodes[j - 1] for j in range(1, count)]
        right, term, factorial = [], math.expm1(-h) / -h - 1, 1
        for i in range(1, count + 1):
            right.append(term * factorial / -h)
            factorial *= i + 1
            term = term / -h - 1 / factorial
        matrix = np.array([nodes**i for i in range(count)])
        base = std[k] / std[k - 1] * x - alpha[k] * math.expm1(-h) * found[-1]
        rho = [0.5] if count == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1]) if count > 2 else []
        x = base + alpha[k] * h * sum((r * slope for r, slope in zip(rho, slopes, strict=True)), torch.zeros_like(x))
        if k < steps:
            newest = model(x, k)
            rho = [0.5] if count == 1 else np.linalg.solve(matrix, right)
            slopes.append(newest - found[-1])
            x = base + alpha[k] * h * sum(
                (r * slope for r, slope in zip(rho, slopes, strict=True)), torch.zeros_like(x)
            )
            found.append(newest)
    return x


def a1111(name: str, scale: float, x: Tensor, timesteps: Sequence[int], from_picture: bool) -> Tensor:
    if name == "UniPC":
        start = timesteps[-1] / 1000 + 1 / 1000 if from_picture else 1.0
        return a1111_unipc(lambda x, t: guided(x, t, scale), x, len(timesteps), start)
    if name == "PLMS":
        return a1111_plms(lambda x, t: guided(x, t, scale), x, timesteps)
    if name == "DDIM CFG++":
        return a1111_ddim(lambda x, t: (guided(x, t, scale / 12.5), network(x, t, 1)), x, timesteps)
    return a1111_ddim(lambda x, t: (guided(x, t, scale),) * 2, x, timesteps)


# ---- here ------------------------------------------------------------------------------------------------------------


class Estimate:
    """The network as a denoiser, told the timesteps that a run of this plan tells it."""

    def __init__(self, pipe: Pipeline, plan: RunPlan) -> None:
        self.told = Denoiser(pipe.unet, plan.schedule, plan.prediction, [], plan.sampler.timestep, plan.sigmas).timestep
        self.scale = plan.guidance_scales[0]

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        scaled, timestep = x / (1 + sigma**2) ** 0.5, self.told(sigma)
        return x - sigma * guided(scaled, timestep, self.scale), x - sigma * network(scaled, timestep, 1)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self.pair(x, sigma)[0]


def ours(pipe: Pipeline, plan: RunPlan, x: Tensor) -> Tensor:
    """Run the plan's solver on its levels, and scale its end as the run does."""
    solver = SOLVERS[plan.sampler.solver]
    last = list(solver(Estimate(pipe, plan), x, plan.sigmas, lambda *_: torch.zeros_like(x), **plan.solver_options))[-1]
    return last.x / plan.final_scale(last.sigma)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def normal(seed: int) -> Tensor:
    return torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SAMPLERS = ["DDIM", "DDIM CFG++", "PLMS", "UniPC"]


@pytest.mark.parametrize("steps", [20, 30])
@pytest.mark.parametrize("name", SAMPLERS)
def test_from_text(sd1: Pipeline, name: str, steps: int) -> None:
    """1000 // 30 is 33, which makes 31 timesteps: UniPC takes as many steps, the others one fewer."""
    plan = sd1.plan(RUN.replace(sampler=name, steps=steps))
    timesteps = timesteps_of(steps)
    expected = a1111(name, 7.5, normal(2), timesteps, from_picture=False)
    start = normal(2) * plan.noise_scale
    assert apart(ours(sd1, plan, start), expected) < TOLERANCE
    assert plan.steps == len(timesteps) - (name != "UniPC")


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("steps", "strength"), [(20, 0.75), (30, 0.5), (11, 1.0)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_from_a_picture(sd1: Pipeline, name: str, steps: int, strength: float, fixed: bool) -> None:
    """Noised at timesteps[t_enc], and taken for timesteps[t_enc - 1]."""
    picture = Image.new("RGB", (32, 32))
    plan = sd1.plan(RUN.replace(sampler=name, steps=steps, image=picture, strength=strength, fix_steps=fixed))
    whole, t_enc = setup_img2img_steps(steps, strength, fixed)
    timesteps = timesteps_of(whole)
    x0, noise, alpha = normal(3), normal(4), ALPHAS[timesteps[t_enc]]
    noised = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
    expected = a1111(name, 7.5, noised, timesteps[:t_enc], from_picture=True)
    level, factor = plan.picture_noise
    assert apart(ours(sd1, plan, factor * (x0 + level * noise)), expected) < TOLERANCE
    assert plan.steps == t_enc - (name != "UniPC")


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_network_is_given_first(sd1: Pipeline, name: str) -> None:
    """The noised latents themselves, of a picture and of hires-fix's first pass, and the timestep below their own."""
    picture = Image.new("RGB", (32, 32), (200, 30, 90))
    seen: list[tuple[Tensor, float]] = []
    hook = sd1.unet.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0][:1], inputs[1])))
    run = RUN.replace(sampler=name, steps=10)
    list(sd1.stream(run.replace(image=picture, strength=0.5)))
    hires = list(sd1.stream(run.replace(hires=1.5, hires_strength=0.5, hires_upscale="pixels", width=32, height=32)))
    second = next(k for k, (x, _) in enumerate(seen) if x.shape[-1] == 6)
    hook.remove()
    assert hires[0].x.shape[-1] == 4
    random = torch.Generator().manual_seed(7)
    sample, noise = (torch.randn(1, 4, 4, 4, generator=random) for _ in range(2))
    with torch.inference_mode():
        posterior = sd1.vae.encode(from_pil(picture))
    x0 = sd1.vae.scale(posterior.mean + torch.exp(0.5 * posterior.logvar) * sample)
    alpha = ALPHAS[timesteps_of(10)[5]]
    # each value takes about ten operations there, and as many here
    assert apart(seen[0][0], alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise) < 20 * torch.finfo(torch.float32).eps
    assert float(seen[0][1]) == pytest.approx(timesteps_of(10)[4], abs=1e-6)
    assert float(seen[second][1]) == pytest.approx(
        timesteps_of(20)[8], abs=1e-6
    )  # steps are fixed: 10 of int(10 / 0.5)


# ---- its schedules ---------------------------------------------------------------------------------------------------

LOG_SIGMAS = np.log(((1 - ALPHAS) / ALPHAS) ** 0.5)


def test_lcm(sd1: Pipeline) -> None:
    """LCMCompVisDenoiser: a table of 50 of the timesteps, in which levels are interpolated and timesteps are not."""
    plan = sd1.plan(RUN.replace(sampler="LCM", steps=4))
    table = LOG_SIGMAS[[999 - 20 * k for k in range(49, -1, -1)]]
    expected = [math.exp(np.interp((t - 19) / 20, range(50), table)) for t in np.linspace(999, 19, 4)]
    assert plan.sigmas == pytest.approx([*expected, 0.0], rel=TOLERANCE)
    told = Estimate(sd1, plan).told
    nearest = [20 * int(np.abs(math.log(sigma) - table).argmin()) + 19 for sigma in expected]
    assert [told(sigma) for sigma in plan.sigmas[:-1]] == nearest == [999, 679, 339, 19]


def test_turbo_of_forge(sd1: Pipeline) -> None:
    """Rounded in float32 after one is subtracted, with torch as there; at 16, 32, 48 ... steps it is not trailing."""
    schedule = sd1.plan(RUN.replace(sampler="Euler Turbo", steps=4)).schedule
    others = []
    for steps in range(1, 101):
        timesteps = torch.flip(torch.arange(1, steps + 1) * (1000.0 / steps) - 1, (0,)).round().long().clip(0, 999)
        sampler = resolve("Euler Turbo", {})
        sigmas = SPACINGS[sampler.spacing](schedule, steps, **sampler.spacing_options)
        assert sigmas == [*(schedule.sigma(int(t)) for t in timesteps), 0.0]
        if sigmas != SPACINGS["trailing"](schedule, steps):
            others.append(steps)
    assert others == [16, 32, 48, 64, 80, 96]


def test_the_ddim_schedule_from_a_picture_is_cut_from_the_front(sd1: Pipeline) -> None:
    """30 steps of it are 31 levels and 0; sample_img2img takes sigmas[steps - t_enc - 1:]."""
    picture = Image.new("RGB", (32, 32))
    for name, levels in (("Euler DDIM", 31), ("Euler Karras", 30)):
        request = RUN.replace(sampler=name, steps=30, image=picture)
        for strength in (0.5, 0.75):
            plan = sd1.plan(request.replace(strength=strength))
            assert len(plan.all_sigmas) == levels + 1
            assert plan.sigmas == plan.all_sigmas[30 - int(strength * 30) - 1 :]
        fixed = sd1.plan(request.replace(strength=0.75, fix_steps=True))
        assert fixed.sigmas == fixed.all_sigmas[40 - 29 - 1 :]


def test_the_penultimate_level_is_discarded(sd1: Pipeline) -> None:
    """get_sigmas drops one of steps + 1; get_timesteps spaces one more, and drops none."""
    request = RUN.replace(steps=19, discard_penultimate_sigma=True)
    for name in ("Euler", "Euler a Karras", "DPM++ 2M SDE", "LCM"):
        whole = sd1.plan(RUN.replace(sampler=name, steps=20)).sigmas
        assert sd1.plan(request.replace(sampler=name)).sigmas == [*whole[:-2], 0.0]
    for name in ("DDIM", "PLMS", "UniPC", "Euler KL Optimal"):
        whole = sd1.plan(RUN.replace(sampler=name, steps=20)).sigmas
        plan = sd1.plan(request.replace(sampler=name))
        assert plan.sigmas == (whole if name != "Euler KL Optimal" else [*whole[:-2], whole[-1]])
    for name in ("DPM2", "DPM fast"):  # drops it anyway; has no list
        assert sd1.plan(request.replace(sampler=name)).sigmas == sd1.plan(RUN.replace(sampler=name, steps=19)).sigmas
    with pytest.raises(RequestError, match="discard_penultimate_sigma and timesteps are both given"):
        sd1.plan(RUN.replace(steps=None, timesteps=(900.0, 500.0), discard_penultimate_sigma=True))
