"""One-step solvers against the papers' equations in float64, against diffusers' schedulers, and on exact models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from mixture import MEANS, SPREAD, WEIGHTS, mixture
from numpy.typing import NDArray
from scipy.integrate import quad, solve_ivp
from scipy.special import ndtr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mezzotint.diffusion.solvers import SOLVERS, Step
from mezzotint.errors import RequestError

# diffusers with numpy 2
pytestmark = pytest.mark.filterwarnings(r"ignore:__array(_wrap)?__ (implementation|must):DeprecationWarning")

START = torch.linspace(-12, 12, 9, dtype=torch.float64).reshape(1, 1, 3, 3)


class Pair:
    """A guided denoiser: towards the mixture, away from data N(0, 1)."""

    scale = 0.6

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self.pair(x, sigma)[0]

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        unconditional = x / (1 + sigma**2)
        return unconditional + self.scale * (mixture(x, sigma) - unconditional), unconditional


def seeded(like: Tensor = START) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *_: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def no_noise(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("an ODE solver drew noise")


def run(name: str, sigmas: list[float], noise: Any = no_noise, denoise: Any = mixture, **options: Any) -> list[Step]:
    return list(SOLVERS[name](denoise, START, sigmas, noise, **options))


def karras(top: float, bottom: float, steps: int) -> list[float]:
    return [(top ** (1 / 7) + k / steps * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7 for k in range(steps + 1)]


def apart(a: Tensor, b: Tensor) -> float:
    """Greatest difference relative to the greatest value. NaN is far from everything."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.abs().max())


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """The ODE's solution from level 10 to 0.05, by an integrator of order 8."""

    def slope(sigma: float, x: Any) -> Any:
        x = torch.as_tensor(x)
        return ((x - mixture(x, sigma)) / sigma).numpy()

    solution = solve_ivp(slope, (10.0, 0.05), START.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).reshape(START.shape)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpm2", {}, 2),
        ("dpmpp_2s_a", {"eta": 0.0}, 2),
        ("dpmpp_sde", {"eta": 0.0}, 2),
        ("dpmpp_sde", {"eta": 0.0, "r": 0.7}, 2),
        ("dpm_fast", {}, 3),
        ("restart", {}, 2),
        *(
            (
                "dpmpp_2s",
                {"order": order, "algorithm": algorithm, "solver_type": kind, "lower_order_final": False},
                order,
            )
            for order in (1, 2, 3)
            for algorithm in ("dpmsolver++", "dpmsolver")
            for kind in ("midpoint", "heun")
        ),
    ],
)
def test_order_of_convergence(name: str, options: dict[str, Any], order: int, exact: Tensor) -> None:
    if name == "restart":
        options = {"segments": ()}
    counts = (90, 180, 360) if name == "dpmpp_2s" else (30, 60, 120)
    errors = [apart(run(name, karras(10, 0.05, n), **options)[-1].x, exact) for n in counts]
    assert abs(math.log2(errors[0] / errors[2]) / 2 - order) < 0.35, errors


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_is_as_exact_as_asked(order: int, exact: Tensor) -> None:
    counts = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        steps = run("dpm_adaptive", [10.0, 0.05], order=order, rtol=tolerance, atol=tolerance)
        assert apart(steps[-1].x, exact) < 2 * tolerance
        assert all(a.sigma > b.sigma for a, b in pairwise(steps))
        assert [step.index for step in steps] == list(range(len(steps)))
        counts.append(len(steps))
    assert counts[0] < counts[1] < counts[2]


def test_dpm_adaptive_ends_where_the_list_ends() -> None:
    above = run("dpm_adaptive", [10.0, 1.0, 0.05])
    zero = run("dpm_adaptive", [10.0, 1.0, 0.05, 0.0])
    assert above[-1].sigma == pytest.approx(0.05) and zero[-1].sigma == 0.0
    assert torch.equal(zero[-2].x, above[-1].x)
    assert torch.equal(zero[-1].x, mixture(above[-1].x, above[-1].sigma))


def test_dpm_fast_without_calls_takes_the_most() -> None:
    sigmas = karras(10, 0.05, 4)
    assert torch.equal(run("dpm_fast", sigmas)[-1].x, run("dpm_fast", sigmas, calls=11)[-1].x)
    zero = run("dpm_fast", [*sigmas, 0.0])[-1]
    assert torch.equal(zero.x, zero.denoised)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_third_order_is_exact_for_a_parabola(eta: float) -> None:
    """An estimate of second degree in lambda = -log sigma, whatever x: the step's integral, by quadrature."""

    def estimate(lam: float) -> float:
        return 0.7 - 1.3 * lam + 0.4 * lam**2

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.full_like(x, estimate(-math.log(sigma)))

    sigmas, k = [3.0, 1.7, 0.9, 0.4], 1.0 + eta
    begin, end = -math.log(sigmas[0]), -math.log(sigmas[-1])
    integral, _ = quad(lambda lam: k * math.exp(k * (lam - end)) * estimate(lam), begin, end, epsabs=1e-13)
    expected = math.exp(k * (begin - end)) * START + integral
    options = {"order": 3, "solver_type": "heun", "lower_order_final": False, "eta": eta}
    ours = run("dpmpp_2s", sigmas, lambda *_: torch.zeros_like(START), denoise, **options)
    assert apart(ours[-1].x, expected) < 1e-12


# ---- diffusers' schedulers, with their own levels in float64 ---------------------------------------------------------

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)


def singlestep(steps: int, **flags: Any) -> tuple[list[float], Tensor]:
    """The levels of DPMSolverSinglestepScheduler and where it ends, in our coordinate."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(**SCHEDULE, **flags)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = scheduler.sigmas.tolist()
    generator = torch.Generator().manual_seed(0)
    x = START / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, t in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        ours = x * math.sqrt(1 + sigma**2)
        x = scheduler.step((ours - mixture(ours, sigma)) / sigma, t, x, generator=generator, return_dict=False)[0]
    return sigmas, x * math.sqrt(1 + sigmas[-1] ** 2)


ALGORITHMS = {"dpmsolver++": {}, "dpmsolver": {"algorithm": "dpmsolver"}, "sde-dpmsolver++": {"eta": 1.0}}


@pytest.mark.parametrize(
    ("algorithm", "order", "kind", "last"),
    [
        (algorithm, order, kind, last)
        for algorithm in ALGORITHMS
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun")
        for last in ("zero", "sigma_min")
        if (algorithm, last) != ("dpmsolver", "zero")  # they refuse it
        and (algorithm, order, kind) != ("sde-dpmsolver++", 3, "heun")  # see below
    ],
)
@pytest.mark.filterwarnings("ignore:.*algorithm_type `dpmsolver`:FutureWarning")
def test_dpmpp_2s_is_diffusers_singlestep(algorithm: str, order: int, kind: str, last: str) -> None:
    for steps in (1, 2, 3, 4, 6, 11):
        for lower in (True, False):
            sigmas, expected = singlestep(
                steps,
                algorithm_type=algorithm,
                solver_order=order,
                solver_type=kind,
                final_sigmas_type=last,
                lower_order_final=lower,
            )
            options = {"order": order, "solver_type": kind, "lower_order_final": lower, **ALGORITHMS[algorithm]}
            ours = run("dpmpp_2s", sigmas, seeded() if "eta" in options else no_noise, **options)
            assert apart(ours[-1].x, expected) < 1e-12


def test_singlestep_sde_heun_of_order_3_differs() -> None:
    """diffusers adds 1/2 where the weight of the curvature subtracts it; the parabola above tells who is right."""
    sigmas, theirs = singlestep(12, algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun")
    ours = run("dpmpp_2s", sigmas, seeded(), order=3, solver_type="heun", eta=1.0)[-1].x
    assert apart(ours, theirs) > 0.5


def k_diffusion_like(scheduler: Any, steps: int, noise: Callable[..., Tensor]) -> tuple[list[float], Tensor]:
    """As above, for the classes that work in our coordinate with two calls a step."""
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.noise_sampler = noise
    x, generator, extra = START, torch.Generator().manual_seed(0), {}
    if isinstance(scheduler, diffusers.KDPM2AncestralDiscreteScheduler):
        extra = {"generator": generator}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        sigma = float(((x / scaled) ** 2 - 1).clamp(min=0).sqrt().nanmean())
        x = scheduler.step((x - mixture(x, sigma)) / sigma, t, x, return_dict=False, **extra)[0]
    return [*dict.fromkeys(scheduler.sigmas.tolist())], x


@pytest.mark.parametrize("name", ["dpm2", "dpm2_a", "dpmpp_sde"])
def test_two_calls_a_step_as_in_diffusers(name: str) -> None:
    classes = {
        "dpm2": diffusers.KDPM2DiscreteScheduler,
        "dpm2_a": diffusers.KDPM2AncestralDiscreteScheduler,
        "dpmpp_sde": diffusers.DPMSolverSDEScheduler,
    }

    def noise(sigma: Any, sigma_next: Any) -> Tensor:
        return torch.cos(START * float(sigma) + 3 * float(sigma_next))

    scheduler = classes[name](**SCHEDULE)
    for steps in (1, 3, 9):
        sigmas, expected = k_diffusion_like(scheduler, steps, noise)
        ours = run(name, sigmas, {"dpm2": no_noise, "dpm2_a": seeded(), "dpmpp_sde": noise}[name])
        assert len(ours) == steps
        # their inner levels are float32; in 2 steps dpm2_a is 4e-4 from them by the rounding of a - b alone
        assert apart(ours[-1].x, expected) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_lcm_and_tcd_are_those_of_diffusers(steps: int, eta: float) -> None:
    lcm = eta == 1.0
    # so scaled, LCM's c_skip is 0 and c_out 1; as it stands it is 6e-6 from there
    scheduler: Any = (
        diffusers.LCMScheduler(**SCHEDULE, timestep_scaling=1e9) if lcm else diffusers.TCDScheduler(**SCHEDULE)
    )
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().tolist()
    timesteps = scheduler.timesteps.tolist()
    sigmas = [*(table[t] for t in timesteps), 0.0 if lcm else table[0]]
    generator, extra = torch.Generator().manual_seed(0), {} if lcm else {"eta": eta}
    x = START / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        ours = x * math.sqrt(1 + sigma**2)
        output = (ours - mixture(ours, sigma)) / sigma
        x = scheduler.step(output, t, x, generator=generator, return_dict=False, **extra)[0]

    def sigma_down_fn(sigma: float, eta: float) -> float:
        return table[math.floor((1 - eta) * table.index(sigma))]

    steps_taken = run(
        "lcm" if lcm else "tcd", sigmas, seeded(), **({} if lcm else {"eta": eta, "sigma_down_fn": sigma_down_fn})
    )
    assert apart(steps_taken[-1].x, x * math.sqrt(1 + sigmas[-1] ** 2)) < 1e-10


# ---- the papers' equations, where nobody has an oracle to install ----------------------------------------------------


@pytest.mark.parametrize(("high", "top"), [(2.5, 3), (0.9, 5)])
def test_restart_as_the_paper_writes_it(high: float, top: int) -> None:
    """Xu et al. 2023, alg. 1 and 2: the main backward process, and at t_min K times forward and backward again."""
    noise = seeded()

    def backward(x: Tensor, times: list[float]) -> Tensor:
        for t, t_next in pairwise(times):
            slope = (x - mixture(x, t)) / t
            x_next = x + (t_next - t) * slope
            if t_next > 0:
                x_next = x + (t_next - t) * (slope + (x_next - mixture(x_next, t_next)) / t_next) / 2
            x = x_next
        return x

    main = [*karras(10, 0.05, 9), 0.0]  # 10 steps
    t_min, t_max = main[6], main[top]  # what lies next to 0.5 and `high`
    assert abs(t_min - 0.5) < 0.1 and abs(t_max - high) < 0.1
    x = backward(START, main[:7])
    for _ in range(3):
        x = x + math.sqrt(t_max**2 - t_min**2) * noise()
        x = backward(x, karras(t_max, t_min, 4))
    expected = backward(x, main[6:])

    sigmas = [*karras(10, 0.05, 9 + 3 * 4), 0.0]
    steps = run("restart", sigmas, seeded(), segments=[(4, 3, 0.5, high)])
    assert apart(steps[-1].x, expected) < 1e-12
    assert [step.index for step in steps] == list(range(len(sigmas) - 1))
    assert [steps[k].sigma for k in (5, 9, 13, 17)] == [pytest.approx(t_min)] * 4
    assert steps[-1].sigma == 0.0


@pytest.mark.parametrize(("n", "segment"), [(10, None), (20, (9, 1, 0.1, 2.0)), (40, (10, 2, 0.1, 2.0))])
def test_restart_without_segments_is_what_a1111_does(n: int, segment: tuple[int, int, float, float] | None) -> None:
    for sigmas in ([*karras(10, 0.05, n - 1), 0.0], karras(10, 0.05, n)):
        steps = run("restart", sigmas, seeded())
        assert len(steps) == n and steps[-1].sigma == sigmas[-1]
        expected = run("restart", sigmas, seeded(), segments=[segment] if segment else [])
        assert torch.equal(steps[-1].x, expected[-1].x)
        rises = sum(after.sigma > before.sigma for before, after in pairwise(steps))
        assert rises == (segment[1] if segment else 0)
    if segment is None:
        assert torch.equal(steps[-1].x, run("heun", sigmas)[-1].x)


def test_restart_of_a1111_goes_on_along_karras() -> None:
    """With steps to spare it spaces the levels again, between the ends of any chosen list."""
    for steps in (20, 40):
        chosen = [10 - 9.95 * i / (steps - 1) for i in range(steps)] + [0.0]
        theirs = run("restart", chosen, seeded(), karras=True)
        expected = run("restart", [*karras(10, 0.05, steps - 1), 0.0], seeded())
        assert len(theirs) == steps and theirs[-1].sigma == 0.0
        assert [a.sigma for a in theirs] == pytest.approx([b.sigma for b in expected])
        assert apart(theirs[-1].x, expected[-1].x) < 1e-10
        assert apart(run("restart", chosen, seeded())[-1].x, expected[-1].x) > 1e-3
    few = [*np.linspace(10, 0.05, 12).tolist(), 0.0]
    assert torch.equal(run("restart", few, seeded(), karras=True)[-1].x, run("heun", few)[-1].x)


def test_restart_twice_in_a_run() -> None:
    sigmas = [*karras(10, 0.05, 23), 0.0]
    steps = run("restart", sigmas, seeded(), segments=[(4, 1, 0.3, 2.0), (3, 2, 0.1, 0.3)])
    assert len(steps) == 24
    tops = [step.sigma for before, step in pairwise(steps) if step.sigma > before.sigma]
    assert len(tops) == 3 and 0.3 < tops[0] < 2 and tops[1] == tops[2] < 0.3


@pytest.mark.parametrize(("name", "eta"), [("euler_cfg_pp", 0.0), ("euler_cfg_pp", 0.5), ("euler_a_cfg_pp", 1.0)])
def test_cfg_pp_as_the_paper_writes_it(name: str, eta: float) -> None:
    """Chung et al. 2024 alg. 2, in alphas: the guided estimate of x0, renoised with the unconditional noise."""
    noise, denoise, sigmas = seeded(), Pair(), [*karras(10, 0.3, 4), 0.0]
    alphas = [1 / (1 + sigma**2) for sigma in sigmas]
    x = START * math.sqrt(alphas[0])
    for alpha, alpha_next, sigma in zip(alphas, alphas[1:], sigmas, strict=False):
        guided, unconditional = (
            (x - math.sqrt(alpha) * denoised) / math.sqrt(1 - alpha)
            for denoised in denoise.pair(x / math.sqrt(alpha), sigma)
        )
        x0 = (x - math.sqrt(1 - alpha) * guided) / math.sqrt(alpha)
        spread = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        x = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next - spread**2) * unconditional
        x = x + spread * noise() if eta else x
    ours = run(name, sigmas, seeded() if eta else no_noise, denoise, **({"eta": eta} if name == "euler_cfg_pp" else {}))
    assert apart(ours[-1].x, x) < 1e-12
    plain = run("euler", sigmas, seeded() if eta else no_noise, denoise, eta=eta)
    assert apart(ours[-1].x, plain[-1].x) > 1e-2


def test_cfg_pp_of_the_ancestral_second_order() -> None:
    """An unconditional DPM-Solver++(2S) step, shifted by the guidance at its beginning."""
    noise, denoise, sigmas = seeded(), Pair(), [*karras(10, 0.3, 4), 0.0]
    x = START
    for sigma, sigma_next in pairwise(sigmas):
        guided, unconditional = denoise.pair(x, sigma)
        up = min(sigma_next, math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = math.sqrt(sigma_next**2 - up**2)
        shift = guided - unconditional
        if down == 0:
            x = x + (x - unconditional) / sigma * (down - sigma) + shift
            continue
        h = math.log(sigma / down)
        inner = math.exp(-h / 2) * x - math.expm1(-h / 2) * unconditional
        _, second = denoise.pair(inner, sigma * math.exp(-h / 2))
        x = math.exp(-h) * x - math.expm1(-h) * second + noise() * up + shift
    ours = run("dpmpp_2s_a_cfg_pp", sigmas, seeded(), denoise)
    assert apart(ours[-1].x, x) < 1e-12
    assert apart(run("dpmpp_2s_a", sigmas, seeded(), denoise)[-1].x, x) > 1e-2


def test_heunpp2_as_comfyui_writes_it() -> None:
    """Slopes at three levels by Euler's steps; each of the later two counts its level over three times the first."""
    for sigmas in ([*karras(10, 0.3, 5), 0.0], karras(10, 0.3, 3), [10.0, 4.0, 0.0], [10.0, 0.0]):
        x, n = START, len(sigmas) - 1
        for i in range(n):
            s = [*sigmas[i:], None, None]
            d = (x - mixture(x, s[0])) / s[0]
            mean = d
            if i < n - 1:
                x2 = x + d * (s[1] - s[0])
                d2 = (x2 - mixture(x2, s[1])) / s[1]
                w2 = s[1] / (2 * sigmas[0])
                mean = (1 - w2) * d + w2 * d2
            if i < n - 2:
                x3 = x2 + d2 * (s[2] - s[1])
                d3 = (x3 - mixture(x3, s[2])) / s[2]
                w2, w3 = s[1] / (3 * sigmas[0]), s[2] / (3 * sigmas[0])
                mean = (1 - w2 - w3) * d + w2 * d2 + w3 * d3
            x = x + mean * (s[1] - s[0])
        assert apart(run("heunpp2", sigmas)[-1].x, x) < 1e-12


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("name", "options"), [("seeds_2", {}), ("seeds_2", {"nodes": (1.0,), "solver_type": "logrho"}), ("seeds_3", {})]
)
def test_seeds_as_the_paper_writes_it(name: str, options: dict[str, Any], eta: float) -> None:
    """Gonzalez et al. 2023, in lambda, for data prediction; `tail` is the integral of the path's noise so far, over
    sigma. The second estimate of SEEDS-2 enters by phi_1 / 2r, elsewhere the newest by phi_2 / r.
    """
    noise, sigmas = seeded(), [*karras(10, 0.3, 4), 0.0]
    x = START
    for sigma, sigma_next in pairwise(sigmas):
        first = mixture(x, sigma)
        if sigma_next == 0.0:
            x = first
            continue
        h = math.log(sigma / sigma_next)
        tail, at, newest, r = torch.zeros_like(x), 0.0, first, 0.0
        for node in (*options.get("nodes", (1 / 2,) if name == "seeds_2" else (1 / 3, 2 / 3)), 1.0):
            if eta:
                fresh = math.sqrt(max(-math.expm1(-2 * eta * (node - at) * h), 0.0)) * noise()
                tail = math.exp(-eta * (node - at) * h) * tail + fresh
            z = -node * h * (1 + eta)
            phi_1 = math.expm1(z)  # times z, as the next
            phi_2 = (math.expm1(z) - z) / z
            b2 = 0.0 if r == 0.0 else phi_1 / (2 * r) if name == "seeds_2" and not options else phi_2 * node / r
            level = sigma * math.exp(-node * h)
            x_node = level / sigma * math.exp(-node * h * eta) * x - ((phi_1 - b2) * first + b2 * newest)
            x_node = x_node + level * tail
            if node < 1.0 or r == 0.0:
                newest, r, at = mixture(x_node, level), node, node
        x = x_node
    ours = run(name, sigmas, seeded() if eta else no_noise, eta=eta, **options)
    assert apart(ours[-1].x, x) < 1e-12


# ---- the exact consistency function ----------------------------------------------------------------------------------

GRID = np.linspace(-60, 60, 60_001)
Samples = NDArray[np.float64]


def share_below(x: Samples, sigma: float) -> Samples:
    """The distribution function of the mixture at this noise level."""
    deviation = math.sqrt(SPREAD**2 + sigma**2)
    below: Samples = (WEIGHTS.numpy() * ndtr((x[..., None] - MEANS.numpy()) / deviation)).sum(-1)
    return below


def along_the_ode(x: Samples, sigma: float, down: float) -> Samples:
    """Where the ODE's solution through x at `sigma` is at `down`: in one dimension it keeps its quantile."""
    low, high = share_below(GRID, down), share_below(x, sigma)
    inside = (low > 1e-12) & (low < 1 - 1e-12)
    return np.interp(high, low[inside], GRID[inside])


def test_quantiles_are_the_solution_of_the_ode() -> None:
    by_solver = run("heun", [*karras(10, 0.002, 400), 0.0])[-1].x.flatten().numpy()
    assert np.abs(along_the_ode(START.flatten().numpy(), 10.0, 0.0) - by_solver).max() < 2e-3


@pytest.mark.parametrize(("name", "eta"), [("lcm", None), ("tcd", 0.0), ("tcd", 0.3), ("tcd", 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("last", [0.0, 0.2])
def test_an_exact_consistency_model_gives_the_data(name: str, eta: float | None, steps: int, last: float) -> None:
    """At every level on the way x has the distribution that it should have there (Kolmogorov's distance)."""
    sigmas = [*karras(10, 0.5, steps)[:-1], last]
    down_to = {sigma: (0.0 if eta is None else (1 - eta) * down) for sigma, down in pairwise(sigmas)}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        """The exact solution of the ODE at `towards`; at 0 it is the consistency function."""
        ratio = down_to[sigma] / sigma
        return (torch.from_numpy(along_the_ode(x.numpy(), sigma, down_to[sigma])) - ratio * x) / (1 - ratio)

    generator = torch.Generator().manual_seed(1)
    count = 20_000
    component = MEANS[torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)]
    noise = lambda *_: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    x = component + SPREAD * noise() + sigmas[0] * noise()
    for step in SOLVERS[name](denoise, x, sigmas, noise, **({} if eta is None else {"eta": eta})):
        ordered = np.sort(step.x.numpy())
        distance = np.abs(share_below(ordered, step.sigma) - np.arange(count) / count).max()
        assert distance < 1.7 / math.sqrt(count)  # exceeded by one sample in 160
        variance = SPREAD**2 + float((WEIGHTS * MEANS**2).sum() - (WEIGHTS * MEANS).sum() ** 2) + step.sigma**2
        assert float(step.x.var()) == pytest.approx(variance, rel=0.04)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("level", [0.3, 1.0, 3.0])
def test_tcd_of_a_posterior_mean_has_too_little_variance(eta: float, level: float) -> None:
    """Not our fault but the method's, which is made for a consistency function. Data N(0, 1): a step from sigma to
    (1 - eta) sigma multiplies x by 1 - eta q, q = sigma^2 / (1 + sigma^2), and the noise brings sigma^2 eta (2 - eta).
    Steps about one level settle where that balances, at (2 - eta) / (2 - eta q) of the variance 1 + sigma^2, however
    many there are; at low levels that is 1 - eta / 2. The denoiser is linear, so x carries its share of every draw.
    """
    steps = 400
    sigmas = np.linspace(level * (1 + 1e-6), level, steps + 1).tolist()
    draws = iter(torch.eye(steps + 1, dtype=torch.float64)[1:])
    x = math.sqrt(1 + level**2) * torch.eye(steps + 1, dtype=torch.float64)[0]
    for step in SOLVERS["tcd"](lambda x, sigma: x / (1 + sigma**2), x, sigmas, lambda *_: next(draws), eta=eta):
        x = step.x
    settled = (2 - eta) / (2 - eta * level**2 / (1 + level**2)) if eta else 1.0
    assert float(x.square().sum()) / (1 + level**2) == pytest.approx(settled, rel=1e-5)


def test_tcd_with_eta_one_is_lcm() -> None:
    sigmas = [*karras(10, 0.5, 4), 0.0]
    assert torch.equal(run("tcd", sigmas, seeded(), eta=1.0)[-1].x, run("lcm", sigmas, seeded())[-1].x)


# ---- no solver waits for the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "dpm_adaptive"])
def test_no_value_is_read(name: str) -> None:
    """On the meta device, which has none."""

    class Nothing:
        def __call__(self, x: Tensor, sigma: float) -> Tensor:
            return torch.empty_like(x)

        def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
            return torch.empty_like(x), torch.empty_like(x)

    x = torch.empty(2, 4, 8, 8, device="meta")
    steps = list(SOLVERS[name](Nothing(), x, [*karras(10, 0.05, 24), 0.0], lambda *_: torch.empty_like(x)))
    assert len(steps) == 25 and all(step.x.is_meta and step.x.dtype == torch.float32 for step in steps)


def test_dpm_adaptive_reads_one_value_an_attempt() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    made: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        made.append(sigma)
        return mixture(x, sigma)

    with Reads() as reads:
        steps = run("dpm_adaptive", [10.0, 0.05], denoise=denoise, h_init=1.5)
    assert reads.count == len(made) / 3 > len(steps), "one more call than steps: the first was taken back"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("dpmpp_2s", {"order": 4}, "order is 4; it must be from 1 to 3"),
        ("dpmpp_2s", {"order": 0}, "order is 0"),
        ("dpm_adaptive", {"order": 1}, "order is 1; it must be from 2 to 3"),
        ("dpm_fast", {"calls": 9}, "calls is 9; for 3 intervals it must be 6 to 8"),
        ("dpm_fast", {"calls": 5}, "calls is 5; for 3 intervals it must be 6 to 8"),
        ("restart", {"segments": [(1, 3, 0.1, 2.0)]}, "segments take 3 of 3 steps"),
        ("restart", {"segments": [(1, 1, 2.0, 0.1)]}, "0 <= low < high"),
        ("restart", {"segments": [(0, 1, 0.1, 2.0)]}, "steps and times of at least 1"),
        ("euler_cfg_pp", {}, "has no `pair`"),
        ("euler_a_cfg_pp", {}, "has no `pair`"),
    ],
)
def test_options_that_a_solver_does_not_have(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as error:
        run(name, [10.0, 2.0, 0.5, 0.0], seeded(), **options)
    assert sentence in str(error.value)
