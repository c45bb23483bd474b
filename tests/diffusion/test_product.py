"""Every solver x every spacing x every prediction on data whose answers are known; `python` it for the table of orders.

The data are numbers from three Gaussians, so the denoiser is exact, and so is the solution of its ODE: in one dimension
the flow keeps quantiles, x' = F'^-1(F(x)) with F, F' the distributions at the two levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from mixture import MEANS, WEIGHTS, mixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mezzotint.config import ScheduleConfig
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.prediction import PREDICTIONS, Prediction, edm_prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.diffusion.solvers import SOLVERS
from mezzotint.diffusion.solving import Denoise
from mezzotint.diffusion.spacing import SPACINGS
from mezzotint.models.unet import Condition

SPREAD = 0.5
MEAN = float((WEIGHTS * MEANS).sum())
VARIANCE = SPREAD**2 + float((WEIGHTS * MEANS**2).sum()) - MEAN**2

SCHEDULE = Schedule.from_config(ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
NAMES = {**PREDICTIONS, "edm": edm_prediction(0.7)}


def posterior_mean(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x], exact."""
    return mixture(x, sigma, SPREAD)


def share_below(x: Tensor, sigma: float) -> Tensor:
    """The distribution function of x = x0 + sigma * noise."""
    return (WEIGHTS * torch.special.ndtr((x[..., None] - MEANS) / math.hypot(SPREAD, sigma))).sum(-1)


def quantile(share: Tensor, sigma: float) -> Tensor:
    """Its inverse, by bisection."""
    low, high = torch.full_like(share, -8 * (1 + sigma)), torch.full_like(share, 8 * (1 + sigma))
    for _ in range(60):
        middle = (low + high) / 2
        below = share_below(middle, sigma) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def flow(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Where the ODE takes x; to 0 it is the consistency function."""
    return quantile(share_below(x, sigma), sigma_next)


@cache
def quantiles(count: int, sigma: float) -> Tensor:
    """x at a level, evenly over its distribution, (1, 1, 1, count)."""
    return quantile(((torch.arange(count, dtype=torch.float64) + 0.5) / count).reshape(1, 1, 1, count), sigma)


class Exact(torch.nn.Module):
    """A network that has learned everything: its output at a timestep is the prediction's of the posterior mean."""

    def __init__(self, prediction: Prediction, kind: str, denoised: Denoise = posterior_mean) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)
        self.prediction, self.kind, self.denoised = prediction, kind, denoised

    def keys_values(self, condition: Condition) -> list[tuple[Tensor, Tensor]]:
        return []

    def forward(self, sample: Tensor, timestep: float, condition: Condition, **_: Any) -> Tensor:
        sigma = math.exp(4 * timestep) if self.kind == "edm" else SCHEDULE.sigma(timestep, "log_sigma")
        x = sample * math.hypot(sigma, self.prediction.sigma_data)
        return self.prediction.output(self.denoised(x, sigma), x, sigma)


class Unguided(Denoiser):
    """A denoiser whose two conditions agree, for the CFG++ solvers."""

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        denoised = self(x, sigma)
        return denoised, denoised


class Pair:
    """The same without a network."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return posterior_mean(x, sigma)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return posterior_mean(x, sigma), posterior_mean(x, sigma)


def denoiser(prediction: str, denoised: Denoise = posterior_mean) -> Unguided:
    kind: Any = "edm" if prediction == "edm" else "interpolated"
    network: Any = Exact(NAMES[prediction], kind, denoised)
    condition = Condition(torch.zeros(1, 1, 1, dtype=torch.float64))
    return Unguided(network, SCHEDULE, NAMES[prediction], [condition], kind)


def seeded(shape: tuple[int, ...], seed: int = 0) -> Callable[[float, float], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(shape, generator=generator, dtype=torch.float64)


def last(name: str, denoise: Denoise, x: Tensor, sigmas: Sequence[float], **options: Any) -> Tensor:
    for step in SOLVERS[name](denoise, x, sigmas, seeded(tuple(x.shape)), **options):
        x = step.x
    return x


# ---- every solver x every spacing x every prediction -----------------------------------------------------------------

STOCHASTIC = {"ddpm", "euler_a", "euler_a_cfg_pp", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"}
STOCHASTIC |= {"sa_solver", "er_sde", "restart", "seeds_2", "seeds_3", "dpmpp_2s_a_cfg_pp"}

# Polynomials through earlier steps want a finer list where its last steps are long in log sigma, as those of leading.
MANY = (16, 48, 200)
# Of dpm_adaptive the list says only where to begin and to end.
ADAPTIVE = [{"rtol": 0.5, "atol": 0.05}, {"rtol": 1e-3, "atol": 1e-4}]


@cache  # some spacings are one list
def error(name: str, prediction: str | None, sigmas: tuple[float, ...], **options: float) -> float:
    """Root mean square distance to the exact solution; of a stochastic solver, of its quantiles to the exact ones.

    Without a prediction the solver is given the posterior mean, and no network.
    """
    count = 1000 if name in STOCHASTIC else 20
    denoise = Pair() if prediction is None else denoiser(prediction)
    final = last(name, denoise, quantiles(count, sigmas[0]), sigmas, **options)
    final = final.sort().values if name in STOCHASTIC else final
    return float((final - quantiles(count, sigmas[-1])).square().mean().sqrt())


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "lcm"])
def test_error_falls_with_steps(name: str) -> None:
    """In three steps with every prediction; in more, which take longer, with a network in one spacing, each in turn."""
    few, many = ADAPTIVE if name == "dpm_adaptive" else ({}, {})
    turn = [*SOLVERS].index(name) % len(SPACINGS)
    for place, spacing in enumerate(SPACINGS):
        sigmas = tuple(SPACINGS[spacing](SCHEDULE, 3))
        coarse = {prediction: error(name, prediction, sigmas, **few) for prediction in (*NAMES, None)}
        close = 2e-2 if spacing == "ays" else 1e-9  # its published levels begin above the table's last
        assert coarse == pytest.approx(dict.fromkeys(coarse, coarse["epsilon"]), rel=close), spacing
        enough = max(0.7 * coarse["epsilon"], 0.06 if name in STOCHASTIC else 0.0)  # so much is left to 1000 samples
        network = "epsilon" if place == turn else None
        finer = (error(name, network, tuple(SPACINGS[spacing](SCHEDULE, steps)), **many) for steps in MANY)
        assert any(fine < enough for fine in finer), spacing


@pytest.mark.parametrize(("name", "options"), [("lcm", {}), ("tcd", {"eta": 1.0})])
def test_consistency_solvers_on_the_exact_consistency_function(name: str, options: dict[str, float]) -> None:
    """Each of their steps ends in the data's distribution; on a posterior mean they would not converge."""

    def consistency(x: Tensor, sigma: float) -> Tensor:
        return flow(x, sigma, 0.0)

    for steps in (1, 2, 4):
        sigmas = SPACINGS["trailing"](SCHEDULE, steps)
        final = last(name, denoiser("epsilon", consistency), quantiles(4000, sigmas[0]), sigmas, **options)
        assert float((final.sort().values - quantiles(4000, 0.0)).square().mean().sqrt()) < 0.07
        if steps > 1:
            mean = last(name, denoiser("epsilon"), quantiles(4000, sigmas[0]), sigmas, **options)
            assert float(mean.var()) < 0.9 * VARIANCE


# ---- the distribution of what stochastic solvers make ----------------------------------------------------------------

DRAWN = [
    *((name, {}) for name in sorted(STOCHASTIC)),
    ("ddim", {"eta": 0.5}),
    ("dpmpp_2m_sde", {"eta": 0.4}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {"algorithm": "dpmsolver"}),
    ("dpmpp_3m_sde", {"solver_type": "logrho"}),
    ("res_multistep", {"eta": 1.0}),
    ("res_multistep_cfg_pp", {"eta": 1.0}),
    ("seeds_2", {"nodes": (1.0,), "solver_type": "logrho"}),
    ("seeds_2", {"eta": 0.4}),
    ("dpm_fast", {"eta": 1.0}),
    ("dpm_adaptive", {"eta": 1.0, "rtol": 0.01, "atol": 0.001}),
    ("sa_solver", {"predict_x0": False}),
    ("er_sde", {"noise_scaler": lambda sigma: sigma**2}),
]


@pytest.mark.parametrize(("name", "options"), DRAWN, ids=lambda value: str(value) if isinstance(value, str) else None)
def test_mean_and_variance_are_the_exact_ones(name: str, options: dict[str, Any]) -> None:
    """5000 samples, 80 steps: within four standard errors and what so many steps still miss."""
    sigmas = SPACINGS["karras"](SCHEDULE, 80)
    final = last(name, Pair(), quantiles(5000, sigmas[0]), sigmas, **options)
    assert float(final.mean()) == pytest.approx(MEAN, abs=0.06)
    assert float(final.var()) == pytest.approx(VARIANCE, rel=0.08)


# ---- orders of convergence -------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A deterministic solver: its order from a cold start, and with its history filled from the exact solution."""

    name: str
    cold: int
    filled: int
    options: Mapping[str, Any] = MappingProxyType({})
    fill: Mapping[str, Any] = MappingProxyType({})  # options while the history is filled
    equal: bool = False  # steps, which is what Adams-Bashforth's fixed weights take them for


LATE, ODE = {"disable_corrector": (0, 1, 2)}, {"tau": lambda sigma: 0.0}
WHOLE = {"lower_order_final": False}
ROWS = [
    Row("euler", 1, 1),
    Row("ddim", 1, 1),
    Row("tcd", 1, 1),
    Row("euler_cfg_pp", 1, 1),
    Row("heun", 2, 2),
    Row("heunpp2", 1, 1),  # its weights are not those of any quadrature
    Row("restart", 2, 2, {"segments": []}),
    Row("dpm2", 2, 2),
    Row("dpmpp_2s", 2, 2),
    Row("dpmpp_2s", 3, 3, {"order": 3, "solver_type": "heun", **WHOLE}),
    Row("dpmpp_2s_a", 2, 2, {"eta": 0.0}),
    Row("dpmpp_2s_a_cfg_pp", 2, 2, {"eta": 0.0}),
    Row("dpmpp_sde", 2, 2, {"eta": 0.0}),
    Row("seeds_2", 2, 2, {"eta": 0.0}),
    Row("seeds_2", 2, 2, {"eta": 0.0, "nodes": (1.0,), "solver_type": "logrho"}),
    Row("seeds_3", 3, 3, {"eta": 0.0}),
    Row("dpm_fast", 3, 3),
    Row("pndm", 2, 2),
    Row("pndm", 3, 4, equal=True),  # starts with Heun's method
    Row("ipndm", 2, 2),
    Row("ipndm", 2, 4, equal=True),
    Row("ipndm_v", 2, 4),
    Row("lms", 2, 4),
    Row("lms", 2, 3, {"order": 3}),
    Row("gradient_estimation", 1, 1),
    Row("gradient_estimation_cfg_pp", 1, 1),
    Row("dpmpp_2m", 2, 2),
    Row("dpmpp_2m", 2, 2, {"solver_type": "heun"}),
    Row("dpmpp_2m", 2, 2, {"algorithm": "dpmsolver"}),
    Row("dpmpp_3m", 2, 2),  # as its references write it; as Taylor would:
    Row("dpmpp_3m", 2, 3, {"solver_type": "logrho"}),
    Row("dpmpp_2m_cfg_pp", 2, 2),
    Row("deis", 2, 2),
    Row("deis", 2, 3, {"order": 3}),
    Row("deis_tab", 2, 3),
    Row("res_multistep", 2, 2),
    Row("res_multistep_cfg_pp", 2, 2),
    Row("unipc", 2, 2, {"order": 1, **WHOLE}, LATE),
    Row("unipc", 3, 3, {"solver_type": "bh1", **WHOLE}, LATE),
    Row("unipc", 3, 3, {"solver_type": "bh2", **WHOLE}, LATE),
    Row("unipc", 3, 4, {"order": 3, **WHOLE}, LATE),
    Row("sa_solver", 2, 2, {**ODE, **WHOLE}),
    Row("er_sde", 2, 2, {"noise_scaler": lambda sigma: sigma}),  # derivatives are differences, of the newest two first
]


def order(row: Row, filled: bool) -> float:
    """Measured between 120 and 240 steps from sigma 0.9 to 0.1, x overwritten by the exact one in the first three."""
    errors = []
    for steps in (120, 240):
        power = 1 if row.equal else 3
        top, bottom = 0.9 ** (1 / power), 0.1 ** (1 / power)
        sigmas = [(top + i / steps * (bottom - top)) ** power for i in range(steps + 1)]
        x = quantiles(20, sigmas[0]).clone()
        options = {**row.options, **(row.fill if filled else {})}
        for step in SOLVERS[row.name](Pair(), x, sigmas, lambda *_: torch.zeros(1, 1, 1, 20), **options):
            if filled and step.index < 3:
                step.x.copy_(quantiles(20, step.sigma))
        errors.append(float((step.x - quantiles(20, sigmas[-1])).abs().max()))
    return math.log2(errors[0] / errors[1])


def described(row: Row) -> str:
    """`name option=value`, for the table."""
    options = [f"{key}={value}" for key, value in row.options.items() if type(value) in (str, int, float, tuple)]
    return " ".join([row.name, *options, *["equal steps"] * row.equal])


@pytest.mark.parametrize("row", ROWS, ids=described)
def test_order_of_convergence(row: Row) -> None:
    assert order(row, False) == pytest.approx(row.cold, abs=0.2)
    assert order(row, True) == pytest.approx(row.filled, abs=0.2)


def test_every_deterministic_solver_is_in_the_table() -> None:
    assert {row.name for row in ROWS} | STOCHASTIC | {"lcm", "dpm_adaptive"} == set(SOLVERS)


@pytest.mark.parametrize("options", [{"order": 2}, {"order": 3}], ids=str)
def test_dpm_adaptive_keeps_to_its_tolerance(options: dict[str, int]) -> None:
    sigmas, errors = [10.0, 0.1], []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        tolerances = {"rtol": tolerance, "atol": tolerance / 10, **options}
        final = last("dpm_adaptive", Pair(), quantiles(20, sigmas[0]), sigmas, **tolerances)
        errors.append(float((final - quantiles(20, sigmas[-1])).abs().max()))
    assert all(lower < upper / 3 for upper, lower in pairwise(errors)), errors


# ---- no solver asks the device ---------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts what makes a GPU's host wait: a tensor's value brought into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


class Linear:
    """The denoiser of unit-variance data, and how often it was called."""

    calls = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        return x / (1 + sigma**2)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return self(x, sigma), self(x, sigma)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_solver_synchronises_with_the_device(name: str) -> None:
    """Nor could it: the tensors of the device "meta" have no values to ask for."""
    sigmas = SPACINGS["karras"](SCHEDULE, 24)
    denoise = Linear()
    x = torch.ones(1, 1, 2, 2)
    with Counting() as counting:
        steps = len(list(SOLVERS[name](denoise, sigmas[0] * x, sigmas, lambda *_: x)))
    if name == "dpm_adaptive":
        assert steps - 1 <= counting.asked <= denoise.calls / 3  # one a step, taken or not; the last goes to 0
        return
    assert counting.asked == 0
    x = x.to("meta")
    assert len(list(SOLVERS[name](Linear(), sigmas[0] * x, sigmas, lambda *_: x))) == 24


def test_the_count_counts() -> None:
    with Counting() as counting:
        float(torch.ones(())), bool(torch.ones(())), torch.ones(()).item()
    assert counting.asked >= 3


def main() -> None:
    print(f"{'measured order of convergence':45s} cold start       filled history")
    for row in ROWS:
        cold, filled = order(row, False), order(row, True)
        print(f"{described(row):45s} {cold:5.2f} (of {row.cold})     {filled:5.2f} (of {row.filled})")


if __name__ == "__main__":
    main()
