"""Multistep solvers in float64 against diffusers' classes, run live on the same levels, and against the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from mixture import mixture
from scipy.integrate import quad
from torch import Tensor

from mezzotint.config import ScheduleConfig
from mezzotint.diffusion.multistep import vp_time
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.solving import phi
from mezzotint.errors import RequestError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning",  # diffusers with numpy 2
    "ignore:.*algorithm_types dpmsolver:FutureWarning",
)

SHAPE = (2, 1, 3, 3)
START = torch.linspace(-12, 12, 18, dtype=torch.float64).reshape(SHAPE)


def karras(steps: int, last: float) -> list[float]:
    roots = [9.0 ** (1 / 7) + i / steps * (0.05 ** (1 / 7) - 9.0 ** (1 / 7)) for i in range(steps)]
    return [*(root**7 for root in roots), last]


def linspace(steps: int, last: float) -> list[float]:
    return [9.0 - i / steps * (9.0 - 0.05) for i in range(steps)] + [last]


LISTS = [karras(steps, last) for steps in (1, 2, 3, 7) for last in (0.0, 0.04)]
LISTS += [linspace(17, last) for last in (0.0, 0.04)]


class Seeded:
    """Standard normal noise."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator, dtype=torch.float64)


def no_noise(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("an ODE solver drew noise")


def trace(name: str, sigmas: list[float], noise: Any = no_noise, denoise: Any = mixture, **options: Any) -> Tensor:
    """Every x on the way, (steps, *SHAPE)."""
    return torch.stack([step.x for step in SOLVERS[name](denoise, START, sigmas, noise, **options)])


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    assert theirs.isfinite().all()
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their classes make tensors of the default dtype on the way, and name float32."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)


def theirs(scheduler: Any, sigmas: list[float]) -> Tensor:
    """Every x on the way, (steps, *SHAPE), of a variance-preserving scheduler on our levels."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    extra: dict[str, Any] = {}
    noise = Seeded()
    if not isinstance(scheduler, (diffusers.DEISMultistepScheduler, diffusers.UniPCMultistepScheduler)):
        extra["generator"] = noise.generator
    x, path = START, []
    for t, (sigma, sigma_next) in zip(scheduler.timesteps, pairwise(sigmas), strict=True):
        epsilon = (x - mixture(x, sigma)) / sigma
        if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler) and "sde" in scheduler.config.algorithm_type:
            extra["variance_noise"] = noise(sigma, sigma_next)
        scaled = scheduler.step(epsilon, t, x / math.sqrt(1 + sigma**2), **extra, return_dict=False)[0]
        x = scaled * math.sqrt(1 + sigma_next**2)
        path.append(x)
    return torch.stack(path)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("final", [{}, {"lower_order_final": False}, {"euler_at_final": True}])
def test_dpm_multistep_is_that_of_diffusers(
    order: int, solver_type: str, algorithm_type: str, final: dict[str, bool], float64: None
) -> None:
    if (order, algorithm_type) == (3, "sde-dpmsolver"):
        return  # theirs has no third order here, and breaks
    for sigmas in LISTS:
        if sigmas[-1] == 0.0 and not algorithm_type.endswith("++"):
            continue  # theirs refuses
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=order,
            algorithm_type=algorithm_type,
            solver_type=solver_type,
            final_sigmas_type="zero" if sigmas[-1] == 0.0 else "sigma_min",
            **final,
        )
        eta = 1.0 if "sde" in algorithm_type else 0.0
        ours = trace(
            "dpmpp_2m",
            sigmas,
            Seeded() if eta else no_noise,
            order=order,
            algorithm=algorithm_type.removeprefix("sde-"),
            solver_type=solver_type,
            eta=eta,
            curvature=-eta,
            **final,
        )
        same(ours, theirs(scheduler, sigmas))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_deis_is_that_of_diffusers(order: int, lower_order_final: bool, float64: None) -> None:
    for sigmas in LISTS:
        if sigmas[-1] > 0.0:  # at 0 theirs is NaN
            scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=lower_order_final)
            ours = trace("deis", sigmas, order=order, lower_order_final=lower_order_final)
            same(ours, theirs(scheduler, sigmas))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("options", [{}, {"lower_order_final": False}, {"disable_corrector": [0, 3]}])
def test_unipc_is_that_of_diffusers(
    order: int, solver_type: str, predict_x0: bool, options: dict[str, Any], float64: None
) -> None:
    for sigmas in LISTS:
        if sigmas[-1] == 0.0 and options.get("lower_order_final") is False:
            continue  # theirs is singular
        scheduler = diffusers.UniPCMultistepScheduler(
            solver_order=order,
            solver_type=solver_type,
            predict_x0=predict_x0,
            final_sigmas_type="zero" if sigmas[-1] == 0.0 else "sigma_min",
            **options,
        )
        ours = trace("unipc", sigmas, order=order, solver_type=solver_type, predict_x0=predict_x0, **options)
        expected = theirs(scheduler, sigmas)
        if sigmas[-1] == 0.0 and not expected[-1].isfinite().all():  # 0 times infinity, in theirs
            assert ours[-1].isfinite().all()
            ours, expected = ours[:-1], expected[:-1]
        if len(expected):
            same(ours, expected)


@pytest.mark.parametrize("orders", [(1, 1), (2, 2), (3, 3), (3, 4), (1, 3), (3, 1)])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_sa_solver_is_that_of_diffusers(
    orders: tuple[int, int], predict_x0: bool, lower_order_final: bool, float64: None
) -> None:
    for sigmas in LISTS:
        if sigmas[-1] == 0.0:
            continue  # at 0 theirs is NaN
        scheduler = diffusers.SASolverScheduler(
            predictor_order=orders[0],
            corrector_order=orders[1],
            algorithm_type="data_prediction" if predict_x0 else "noise_prediction",
            lower_order_final=lower_order_final,
        )
        scheduler.set_timesteps(len(sigmas) - 1)
        levels = dict(zip(scheduler.timesteps.tolist(), sigmas, strict=False))

        def tau(sigma: float) -> float:
            return 0.7 if 0.5 < sigma < 4.0 else 0.0

        scheduler.tau_func = lambda t, levels=levels: torch.tensor(tau(levels[int(t)]))
        ours = trace(
            "sa_solver",
            sigmas,
            Seeded(),
            predictor_order=orders[0],
            corrector_order=orders[1],
            tau=tau,
            predict_x0=predict_x0,
            lower_order_final=lower_order_final,
        )
        same(ours, theirs(scheduler, sigmas))


@pytest.mark.parametrize("steps", [4, 5, 7, 20])
def test_pndm_that_starts_with_runge_kutta_is_that_of_diffusers(steps: int, float64: None) -> None:
    """Their timesteps tell where it looks: three steps of four calls, twice at the timestep halfway; then PLMS."""
    config: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers.PNDMScheduler(**config, skip_prk_steps=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    schedule = Schedule.from_config(ScheduleConfig(**config))
    sigmas = [schedule.sigma(i * (1000 // steps) + 1) for i in reversed(range(steps))] + [schedule.sigma_min]
    x = START / math.sqrt(1 + sigmas[0] ** 2)
    for t in scheduler.timesteps:
        sigma = schedule.sigma(int(t))
        ours = x * math.sqrt(1 + sigma**2)
        x = scheduler.step((ours - mixture(ours, sigma)) / sigma, t, x, return_dict=False)[0]
    seen: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return mixture(x, sigma)

    path = trace("pndm", sigmas, denoise=denoise, midpoint=schedule.pndm_midpoint)
    assert len(path) == steps and len(seen) == steps + 9
    assert seen == [schedule.sigma(int(t)) for t in scheduler.timesteps]
    same(path[-1], x * math.sqrt(1 + sigmas[-1] ** 2))
    assert float((trace("pndm", sigmas) - path).abs().max()) > 5e-4


def test_pndm_of_three_steps_has_no_room_for_runge_kutta() -> None:
    """There diffusers has no picture."""
    sigmas = karras(3, 0.04)
    assert torch.equal(trace("pndm", sigmas, midpoint=lambda *_: 0.0), trace("pndm", sigmas))


# ---- the papers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_as_the_paper_writes_it(sigmas: list[float], order: int) -> None:
    """Zhang and Chen 2022, section 3: PNDM's linear multistep formulas on epsilon, started with lower orders."""
    x, epsilons = START, []
    for sigma, sigma_next in pairwise(sigmas):
        epsilons.append((x - mixture(x, sigma)) / sigma)
        e = epsilons[::-1]
        used = 1 if sigma_next == 0 else min(order, len(e))
        if used == 1:
            mean = e[0]
        elif used == 2:
            mean = (3 * e[0] - e[1]) / 2
        elif used == 3:
            mean = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            mean = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = x + (sigma_next - sigma) * mean
    same(trace("ipndm", sigmas, order=order)[-1], x)


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_as_the_paper_writes_it(sigmas: list[float], order: int) -> None:
    """Adams-Bashforth of variable step: the polynomial in sigma through the last epsilons, fitted and integrated."""
    x, epsilons = START, []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        epsilons.append((x - mixture(x, sigma)) / sigma)
        used = 1 if sigma_next == 0 else min(order, i + 1)
        values = torch.stack(epsilons[-used:]).flatten(1).numpy()
        fitted = np.polynomial.polynomial.polyfit(np.array(sigmas[i - used + 1 : i + 1]) - sigma, values, used - 1)
        area = np.polynomial.polynomial.polyint(fitted)
        x = x + torch.from_numpy(np.polynomial.polynomial.polyval(sigma_next - sigma, area)).reshape(SHAPE)
    same(trace("ipndm_v", sigmas, order=order)[-1], x, 1e-9)


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_tab_as_the_paper_writes_it(sigmas: list[float], order: int) -> None:
    """Zhang and Chen 2022, tAB: epsilon as a polynomial in the time t, times d sigma / d t, integrated over t."""
    x, epsilons = START, []
    times = [vp_time(sigma) for sigma in sigmas]
    # ln(1 + sigma^2) = rise t^2 / 2 + beta t, through level 80 at 1 and 0.002 at 0.001
    rise, beta = np.linalg.solve([[1 / 2, 1], [0.001**2 / 2, 0.001]], [math.log(1 + 80.0**2), math.log1p(0.002**2)])

    def rate(t: float) -> float:
        sigma = math.sqrt(math.expm1(rise * t * t / 2 + beta * t))
        return (rise * t + beta) * (1 + sigma**2) / (2 * sigma)

    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        epsilons.append((x - mixture(x, sigma)) / sigma)
        used = min(order, i + 1)
        if sigma_next == 0 or used == 1:
            x = x + (sigma_next - sigma) * epsilons[-1]
            continue
        for j in range(i, i - used, -1):
            others = [times[k] for k in range(i, i - used, -1) if k != j]

            def weight(t: float, j: int = j, others: list[float] = others) -> float:
                return rate(t) * math.prod((t - other) / (times[j] - other) for other in others)

            x = x + quad(weight, times[i], times[i + 1], epsabs=0, epsrel=1e-11, limit=200)[0] * epsilons[j]
    same(trace("deis_tab", sigmas, order=order)[-1], x, 1e-8)


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_res_multistep_as_the_paper_writes_it(sigmas: list[float], eta: float) -> None:
    """Zhang et al. 2023, refined exponential solver: b1 = phi1 - phi2 / c2, b2 = phi2 / c2, from the two last x0.

    The ancestral form steps to ComfyUI's sigma_down, from which it also counts how old the last x0 is.
    """
    noise = Seeded()
    x: Tensor = START
    old: tuple[float, Tensor] | None = None  # in units of this step: minus c2 h, and x0
    for sigma, sigma_next in pairwise(sigmas):
        x0 = mixture(x, sigma)
        up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = math.sqrt(sigma_next**2 - up**2)
        if old is None or down == 0.0:
            x = x + (x - x0) / sigma * (down - sigma)
        else:
            h = math.log(sigma) - math.log(down)
            c2 = -old[0] / h
            phi1 = (math.exp(-h) - 1) / -h
            phi2 = (phi1 - 1) / -h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * x0 + phi2 / c2 * old[1])
        if eta:
            x = x + up * noise(sigma, sigma_next)
        if down:
            old = math.log(sigma) - math.log(down), x0
    same(trace("res_multistep", sigmas, Seeded() if eta else no_noise, eta=eta)[-1], x, 1e-9)


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.4])
def test_gradient_estimation_as_the_paper_writes_it(sigmas: list[float], gamma: float) -> None:
    """Permenter and Yuan 2023: epsilon_bar = gamma epsilon_t + (1 - gamma) epsilon_(t+1)."""
    x, before = START, None
    for sigma, sigma_next in pairwise(sigmas):
        epsilon = (x - mixture(x, sigma)) / sigma
        bar = epsilon if before is None or sigma_next == 0 else gamma * epsilon + (1 - gamma) * before
        x = x - (sigma - sigma_next) * bar
        before = epsilon
    same(trace("gradient_estimation", sigmas, gamma=gamma)[-1], x)


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("scale", [lambda u: u * (math.exp(u**0.3) + 10), lambda u: u**1.5], ids=["er5", "power"])
def test_er_sde_as_the_paper_writes_it(sigmas: list[float], order: int, scale: Callable[[float], float]) -> None:
    """Cui et al. 2023, the three solvers in sigma (VE); the integrals by scipy's adaptive quadrature."""
    noise = Seeded()
    x: Tensor = START
    x0s: list[Tensor] = []
    slopes: list[Tensor] = []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x0s.append(mixture(x, s))
        if i > 0:
            slopes.append((x0s[i] - x0s[i - 1]) / (s - sigmas[i - 1]))
        drawn = noise(s, t)
        if t == 0.0:
            x = x0s[i]
            continue
        r = scale(t) / scale(s)
        x = r * x + (1 - r) * x0s[i]
        if order > 1 and i > 0:
            x = x + (t - s + scale(t) * quad(lambda u: 1 / scale(u), t, s, epsabs=0, epsrel=1e-12)[0]) * slopes[-1]
        if order > 2 and i > 1:
            bend = (slopes[-1] - slopes[-2]) / ((s - sigmas[i - 2]) / 2)
            area = quad(lambda u, s=s: (u - s) / scale(u), t, s, epsabs=0, epsrel=1e-12)[0]
            x = x + ((t - s) ** 2 / 2 + scale(t) * area) * bend
        x = x + math.sqrt(t**2 - r**2 * s**2) * drawn
    same(trace("er_sde", sigmas, Seeded(), order=order, noise_scaler=scale)[-1], x, 1e-9)


class Pair:
    """A guided denoiser with something to guide."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self.pair(x, sigma)[0]

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        unconditional, conditional = mixture(x, sigma), mixture(x - 0.5, sigma) + 0.5
        return unconditional + 0.6 * (conditional - unconditional), unconditional


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
def test_dpmpp_2m_cfg_pp_as_the_paper_writes_it(sigmas: list[float]) -> None:
    """Chung et al. 2024 on DPM-Solver++(2M): what is renoised is the unconditional; Lu et al.'s r = h_last / h."""
    x, old = START, None
    levels = [-math.log(sigma) for sigma in sigmas if sigma > 0] + [math.inf] * (sigmas[-1] == 0)
    for i, sigma in enumerate(sigmas[:-1]):
        guided, unconditional = Pair().pair(x, sigma)
        h = levels[i + 1] - levels[i]
        target = guided
        if old is not None and h < math.inf:
            r = (levels[i] - levels[i - 1]) / h
            target = guided + (1 - math.exp(-h)) / (2 * r) * (guided - old)
        x = math.exp(-h) * (x - unconditional) + target
        old = unconditional
    same(trace("dpmpp_2m_cfg_pp", sigmas, denoise=Pair())[-1], x)


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_res_multistep_cfg_pp_as_comfyui_writes_it(sigmas: list[float], eta: float) -> None:
    """The unconditional second order step from x + (guided - unconditional); the first and last go to the guided."""
    noise = Seeded()
    x: Tensor = START
    old: tuple[float, Tensor] | None = None
    for sigma, sigma_next in pairwise(sigmas):
        guided, unconditional = Pair().pair(x, sigma)
        up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = math.sqrt(sigma_next**2 - up**2)
        if old is None or down == 0.0:
            x = guided + (x - unconditional) / sigma * down
        else:
            h = math.log(sigma) - math.log(down)
            c2 = -old[0] / h
            phi1 = (math.exp(-h) - 1) / -h
            phi2 = (phi1 - 1) / -h
            x = x + (guided - unconditional)
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * unconditional + phi2 / c2 * old[1])
        if eta:
            x = x + up * noise(sigma, sigma_next)
        if down:
            old = math.log(sigma) - math.log(down), unconditional
    ours = trace("res_multistep_cfg_pp", sigmas, Seeded() if eta else no_noise, Pair(), eta=eta)
    same(ours[-1], x, 1e-9)


@pytest.mark.parametrize("sigmas", LISTS, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_gradient_estimation_cfg_pp_as_comfyui_writes_it(sigmas: list[float], gamma: float) -> None:
    x, before = START, None
    for sigma, sigma_next in pairwise(sigmas):
        guided, unconditional = Pair().pair(x, sigma)
        slope = (x - unconditional) / sigma
        x = guided + sigma_next * slope
        if before is not None and sigma_next > 0:
            x = x + (gamma - 1) * (slope - before) * (sigma_next - sigma)
        before = slope
    same(trace("gradient_estimation_cfg_pp", sigmas, denoise=Pair(), gamma=gamma)[-1], x)
    if gamma == 1.0:
        same(trace("euler_cfg_pp", sigmas, denoise=Pair())[-1], x)


def test_without_guidance_cfg_pp_is_dpmpp_2m() -> None:
    class Alone(Pair):
        def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            return mixture(x, sigma), mixture(x, sigma)

    sigmas = karras(9, 0.0)
    expected = trace("dpmpp_2m", sigmas, lower_order_final=False)
    same(trace("dpmpp_2m_cfg_pp", sigmas, denoise=Alone()), expected)


# ---- what the family shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("h", [1e-4, 0.03, 0.9, 1.1, 4.0])
def test_logrho_integrates_polynomials_in_lambda_exactly(algorithm: str, order: int, h: float) -> None:
    """Of degree order - 1, at steps of any length: phi does not cancel."""
    data = algorithm == "dpmsolver++"
    sigmas = [math.exp(1.0 - k * h * (1 + 0.1 * k)) for k in range(6)]
    powers = [1.0, -0.7, 0.4][:order]

    def estimate(level: float) -> float:
        return sum(c * ((level + 1.0) / h) ** k for k, c in enumerate(powers))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        value = torch.full_like(x, estimate(-math.log(sigma)))
        return value if data else x - sigma * value

    path = trace("dpmpp_2m", sigmas, denoise=denoise, order=order, algorithm=algorithm, solver_type="logrho",
                 lower_order_final=False)  # fmt: skip
    start, end = -math.log(sigmas[4]), -math.log(sigmas[5])
    if data:
        area = quad(lambda u: math.exp(u - end) * estimate(u), start, end, epsabs=0, epsrel=1e-13)[0]
        expected = math.exp(start - end) * path[3] + area
    else:
        expected = path[3] - quad(lambda u: math.exp(-u) * estimate(u), start, end, epsabs=0, epsrel=1e-13)[0]
    torch.testing.assert_close(path[4] - path[3], expected - path[3], rtol=1e-8, atol=1e-12)


def test_deis_is_noise_and_logrho() -> None:
    sigmas = karras(17, 0.02)
    assert torch.equal(trace("deis", sigmas), trace("dpmpp_2m", sigmas, algorithm="dpmsolver", solver_type="logrho"))


def test_what_has_two_names() -> None:
    """RES without its noise is DPM-Solver++(2M) in its Heun form; SA-Solver without noise is a UniPC of one order."""
    sigmas = karras(17, 0.0)
    same(trace("res_multistep", sigmas), trace("dpmpp_2m", sigmas, solver_type="heun"))
    quiet_sa = trace("sa_solver", sigmas, lambda *_: START, tau=lambda sigma: 0.0, predictor_order=1, corrector_order=2)
    same(quiet_sa, trace("unipc", sigmas, order=1, solver_type="bh1"))


def test_er_sde_without_noise_is_first_order_euler() -> None:
    sigmas = karras(9, 0.0)
    ours = trace("er_sde", sigmas, lambda *_: torch.zeros_like(START), order=1, noise_scaler=lambda u: u)
    same(ours, trace("euler", sigmas))


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde", "sa_solver", "er_sde"])
def test_noise_is_drawn_on_every_step(name: str) -> None:
    asked: list[tuple[float, float]] = []

    def noise(sigma: float, sigma_next: float) -> Tensor:
        asked.append((sigma, sigma_next))
        return torch.ones_like(START)

    sigmas = karras(5, 0.0)
    path = trace(name, sigmas, noise)
    assert asked == list(pairwise(sigmas))
    assert path.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lms", {"order": 5}),
        ("ipndm", {"order": 0}),
        ("dpmpp_3m", {"order": 4}),
        ("deis", {"order": 4}),
        ("unipc", {"order": 5}),
        ("unipc", {"corrector_order": 5}),
        ("er_sde", {"order": 4}),
        ("sa_solver", {"predictor_order": 5}),
        ("sa_solver", {"corrector_order": 0}),
    ],
)
def test_orders_that_do_not_exist(name: str, options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=f"is {next(iter(options.values()))}; it must be from [01] to"):
        trace(name, karras(5, 0.0), **options)


def test_cfg_pp_needs_a_guided_denoiser() -> None:
    with pytest.raises(RequestError, match="CFG"):
        trace("dpmpp_2m_cfg_pp", karras(5, 0.0))


def test_phi_keeps_its_digits_near_zero() -> None:
    """phi_k(z) is 1/k! + z/(k + 1)! + ...; the recursion by division would leave none of them."""
    for k in (1, 2, 3):
        for z in (1e-9, -1e-9, 1e-5):
            assert phi(k, z) == pytest.approx(1 / math.factorial(k) + z / math.factorial(k + 1), rel=1e-9)
    assert phi(2, 3.0) == pytest.approx((math.exp(3.0) - 4.0) / 9.0, rel=1e-12)
