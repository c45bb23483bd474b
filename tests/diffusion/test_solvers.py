"""Solvers on data whose exact denoiser is known: textbook orders, variances, and the papers' own formulas."""

from __future__ import annotations

import math

import pytest
import torch
from mixture import SPREAD, mixture
from scipy.integrate import solve_ivp
from torch import Tensor

from mezzotint.diffusion.solvers import SOLVERS, Step, euler

START = torch.linspace(-12, 12, 9, dtype=torch.float64).reshape(1, 1, 3, 3)


def no_noise(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("an ODE solver drew noise")


def levels(steps: int, top: float = 10.0, bottom: float = 0.05) -> list[float]:
    roots = [top ** (1 / 3) + i / steps * (bottom ** (1 / 3) - top ** (1 / 3)) for i in range(steps + 1)]
    return [root**3 for root in roots]


def run(name: str, x: Tensor, sigmas: list[float], **options: object) -> list[Step]:
    return list(SOLVERS[name](mixture, x, sigmas, no_noise, **options))


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """The ODE's solution from level 10 to 0.05, by an integrator of order 8."""
    top, bottom = levels(1)

    def slope(sigma: float, x: object) -> object:
        x = torch.as_tensor(x)
        return ((x - mixture(x, sigma)) / sigma).numpy()

    solution = solve_ivp(slope, (top, bottom), START.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).reshape(START.shape)


# multistep solvers that are started by a lower order keep that of the start: PNDM 2, LMS between
@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1.0), ("ddim", 1.0), ("heun", 2.0), ("dpmpp_2m", 2.0), ("pndm", 2.0), ("lms", 2.6)]
)
def test_order_of_convergence(name: str, order: float, exact: Tensor) -> None:
    errors = [float((run(name, START, levels(n))[-1].x - exact).abs().max()) for n in (80, 160, 320)]
    measured = math.log2(errors[0] / errors[2]) / 2
    assert order - 0.25 < measured < order + (1.0 if name in ("lms", "pndm") else 0.35), (errors, measured)


EXTRAPOLATING = ("lms", "pndm")  # the slope, to the end: their last x is not the last estimate
# dpm_adaptive chooses its own levels, so it is in no table of steps
STEPPING = [name for name in SOLVERS if name != "dpm_adaptive"]


@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.parametrize("last", [0.0, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 5, 17])
def test_n_steps_from_any_falling_list(name: str, last: float, steps: int) -> None:
    sigmas = [*levels(steps)[:-1], last]
    x = START.float()
    generator = torch.Generator().manual_seed(0)
    result = list(SOLVERS[name](MixtureLike(), x, sigmas, lambda *_: torch.randn(x.shape, generator=generator)))
    assert [step.index for step in result] == list(range(steps))
    assert [step.sigma for step in result] == sigmas[1:]
    assert all(step.x.dtype == step.denoised.dtype == torch.float32 for step in result)
    assert all(step.x.isfinite().all() for step in result)
    if last == 0.0 and name not in EXTRAPOLATING:
        torch.testing.assert_close(result[-1].x, result[-1].denoised)


class MixtureLike:
    """The mixture's denoiser in x's dtype; its pair, for the CFG++ solvers, is twice that."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return mixture(x, sigma).to(x.dtype)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return (self(x, sigma),) * 2


@pytest.mark.parametrize(("name", "calls"), [("pndm", 11), ("heun", 19), ("lms", 10), ("dpmpp_2m", 10), ("ddpm", 10)])
def test_calls(name: str, calls: int) -> None:
    made: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        made.append(sigma)
        return mixture(x, sigma)

    sigmas = [*levels(10)[:-1], 0.0]
    list(SOLVERS[name](denoise, START, sigmas, lambda *_: torch.zeros_like(START)))
    assert len(made) == calls


@pytest.mark.parametrize(
    ("name", "eta", "draws"), [("euler_a", None, 4), ("ddpm", None, 4), ("ddim", 0.2, 4), ("ddim", None, 0)]
)
def test_noise_is_drawn_on_every_step_or_on_none(name: str, eta: float | None, draws: int) -> None:
    asked: list[tuple[float, float]] = []

    def noise(sigma: float, sigma_next: float) -> Tensor:
        asked.append((sigma, sigma_next))
        return torch.zeros_like(START)

    sigmas = [8.0, 4.0, 2.0, 1.0, 0.0]
    list(SOLVERS[name](mixture, START, sigmas, noise, **({} if eta is None else {"eta": eta})))
    assert asked == [(8.0, 4.0), (4.0, 2.0), (2.0, 1.0), (1.0, 0.0)][:draws]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_is_ddim_as_the_paper_writes_it(eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16, in alphas."""
    sigma, sigma_next = 3.0, 1.2
    alpha, alpha_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    drawn = torch.randn(START.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (step,) = euler(mixture, START, [sigma, sigma_next], lambda *_: drawn, eta=eta)

    x_t, x0 = START * math.sqrt(alpha), mixture(START, sigma)
    epsilon = (x_t - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
    spread = eta * math.sqrt((1 - alpha_next) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_next)
    x_next = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next - spread**2) * epsilon + spread * drawn
    torch.testing.assert_close(step.x * math.sqrt(alpha_next), x_next, rtol=1e-12, atol=1e-12)


def test_eta_one_is_ddpm_as_the_paper_writes_it() -> None:
    """Ho et al. 2020, eq. 7: mean and variance of the posterior."""
    sigma, sigma_next = 3.0, 1.2
    alpha_bar, alpha_bar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    alpha = alpha_bar / alpha_bar_next
    drawn = torch.randn(START.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (step,) = SOLVERS["ddpm"](mixture, START, [sigma, sigma_next], lambda *_: drawn)

    x_t, x0 = START * math.sqrt(alpha_bar), mixture(START, sigma)
    mean = math.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar) * x0
    mean = mean + math.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar) * x_t
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)
    torch.testing.assert_close(
        step.x * math.sqrt(alpha_bar_next), mean + math.sqrt(variance) * drawn, rtol=1e-12, atol=1e-12
    )


def test_ddpm_euler_a_and_ddim_with_eta_one_are_one() -> None:
    def final(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)

        def noise(*_: float) -> Tensor:
            return torch.randn(START.shape, generator=generator)

        return list(SOLVERS[name](mixture, START, levels(12), noise, eta=1.0))[-1].x

    finals = [final(name) for name in ("ddpm", "euler_a", "ddim")]
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[1], finals[2])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_data_keep_their_variance(eta: float) -> None:
    """Data N(0, 0.3^2), exact denoiser: whatever eta, samples end with that variance."""
    generator = torch.Generator().manual_seed(0)

    def noise(*_: float) -> Tensor:
        return torch.randn(40_000, generator=generator, dtype=torch.float64)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return x * SPREAD**2 / (SPREAD**2 + sigma**2)

    sigmas = [*levels(300, bottom=0.01)[:-1], 0.0]
    x = math.sqrt(SPREAD**2 + sigmas[0] ** 2) * noise()
    for step in euler(denoise, x, sigmas, noise, eta=eta):
        x = step.x
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.03)


# Lists whose last level is repeated occur: PNDM with leading from 0, DEIS under karras. UniPC and SA-Solver still
# correct the x before, dpm_fast and dpm_adaptive are given no such list, and lcm draws fresh noise at every level.
@pytest.mark.parametrize("name", sorted({*STEPPING} - {"unipc", "sa_solver", "dpm_fast", "lcm"}))
def test_a_step_of_no_length_changes_nothing(name: str) -> None:
    denoise = MixtureLike()
    before, after = SOLVERS[name](denoise, START, [5.0, 1.0, 1.0], lambda *_: torch.ones_like(START))
    torch.testing.assert_close(after.x, before.x)


def test_lms_integrates_cubics_exactly() -> None:
    """A slope that is a cubic in sigma, after three steps of start."""
    sigmas = [8.0, 7.0, 5.5, 4.0, 3.0, 1.5, 1.0]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return x - sigma * (sigma**3 - 2 * sigma**2 + 1)

    steps = list(SOLVERS["lms"](denoise, START, sigmas, no_noise))

    def area(sigma: float) -> float:
        return sigma**4 / 4 - 2 * sigma**3 / 3 + sigma

    torch.testing.assert_close(
        steps[-1].x - steps[2].x, torch.full_like(START, area(sigmas[-1]) - area(sigmas[3])), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "dpm2", "dpmpp_2m", "lms", "pndm", "unipc", "deis"])
def test_to_a_single_picture_every_solver_goes_straight(name: str) -> None:
    """If the data are one point c, dx/dsigma = (x - c) / sigma is constant: x ends at c + (x - c) sigma_n / sigma_0."""
    sigmas, c = levels(9), 0.7
    *_, last = SOLVERS[name](lambda x, _: torch.full_like(x, c), START, sigmas, no_noise)
    expected = c + (START - c) * sigmas[-1] / sigmas[0]
    assert float((last.x - expected).abs().max() / expected.abs().max()) < 1e-9
