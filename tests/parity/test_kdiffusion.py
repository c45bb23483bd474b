"""Every solver that k-diffusion has, against it: float64, an exact denoiser, the same noise. 1e-10 relative.

Only its sampling.py is loaded, from the installed wheel's file: the package imports a training framework, none of which
is installed. Of what that file imports, torchdiffeq and its own utils are replaced by the little that samplers use.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.solvers import SOLVERS, Step

MEANS = torch.tensor([-1.0, 0.4, 1.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
START = torch.linspace(-12, 12, 18, dtype=torch.float64).reshape(2, 1, 3, 3)
PHASES = torch.linspace(0.5, 9, 18, dtype=torch.float64).reshape(2, 1, 3, 3)
Calls = list[tuple[float, float]]


@pytest.fixture(scope="module")
def sampling() -> Iterator[Any]:
    """k_diffusion.sampling, alone."""
    dist = importlib.metadata.distribution("k-diffusion")
    package, utils, torchdiffeq = ModuleType("k_alone"), ModuleType("k_alone.utils"), ModuleType("torchdiffeq")
    utils.append_dims = lambda x, dims: x.reshape(x.shape + (1,) * (dims - x.ndim))  # type: ignore[attr-defined]
    torchdiffeq.odeint = None  # type: ignore[attr-defined]
    package.__path__, package.utils = [], utils  # type: ignore[attr-defined]
    path = str(dist.locate_file("k_diffusion/sampling.py"))
    spec = importlib.util.spec_from_file_location("k_alone.sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for stand_in in (package, utils, torchdiffeq):
            patch.setitem(sys.modules, stand_in.__name__, stand_in)
        spec.loader.exec_module(module)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # it makes tensors of its options
    yield module
    torch.set_default_dtype(before)


def mixture(x: Tensor, sigma: float | Tensor) -> Tensor:
    """E[x0 | x] for data from three Gaussians; sigma a number, or (B,) as k-diffusion has it."""
    squared = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1, 1) ** 2
    variance = 0.3**2 + squared
    share = torch.softmax(WEIGHTS.log() - (x[..., None] - MEANS) ** 2 / (2 * variance), dim=-1)
    return (share * (0.3**2 * x[..., None] + squared * MEANS) / variance).sum(-1)


def noise_of(calls: Calls) -> Callable[[Any, Any], Tensor]:
    """Noise that depends on where it is asked for, smoothly, so that rounding of the levels does not matter."""

    def noise(sigma: Any, sigma_next: Any) -> Tensor:
        calls.append((float(sigma), float(sigma_next)))
        return 2**0.5 * torch.cos(PHASES * math.log1p(calls[-1][0]) + 3 * math.log1p(calls[-1][1]))

    return noise


def karras(steps: int) -> list[float]:
    return [(10 ** (1 / 7) + k / max(steps - 1, 1) * (0.05 ** (1 / 7) - 10 ** (1 / 7))) ** 7 for k in range(steps)]


def exponential(intervals: int) -> list[float]:
    return [10 * (0.05 / 10) ** (k / intervals) for k in range(intervals + 1)]


def apart(a: Tensor, b: Tensor) -> float:
    """Greatest difference relative to the greatest value; NaN is far from everything."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.abs().max())


FULL = {"lower_order_final": False}
# ours, its options, theirs, its options
SAMPLERS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("euler", {}, "euler", {}),
    ("heun", {}, "heun", {}),
    ("lms", {}, "lms", {}),
    ("lms", {"order": 2}, "lms", {"order": 2}),
    ("dpm2", {}, "dpm_2", {}),
    ("dpmpp_2m", FULL, "dpmpp_2m", {}),
    *(
        (ours, {"eta": eta}, theirs, {"eta": eta})
        for eta in (0.0, 0.4, 1.0)
        for ours, theirs in (
            ("euler_a", "euler_ancestral"),
            ("dpm2_a", "dpm_2_ancestral"),
            ("dpmpp_2s_a", "dpmpp_2s_ancestral"),
            ("dpmpp_sde", "dpmpp_sde"),
        )
    ),
    ("dpmpp_sde", {"r": 0.3}, "dpmpp_sde", {"r": 0.3}),
    *(
        ("dpmpp_2m_sde", FULL | {"eta": eta, "solver_type": kind}, "dpmpp_2m_sde", {"eta": eta, "solver_type": kind})
        for eta in (0.0, 0.4, 1.0)
        for kind in ("midpoint", "heun")
    ),
    *(
        ("dpmpp_3m_sde", FULL | {"eta": eta, "solver_type": "heun"}, "dpmpp_3m_sde", {"eta": eta})
        for eta in (0.0, 0.4, 1.0)
    ),
]


@pytest.mark.parametrize(("ours", "options", "theirs", "their_options"), SAMPLERS)
@pytest.mark.parametrize("ends_in_zero", [True, False])
def test_solver(
    sampling: Any, ours: str, options: dict[str, Any], theirs: str, their_options: dict[str, Any], ends_in_zero: bool
) -> None:
    stochastic = "eta" in options or "sde" in ours
    for steps in (1, 2, 3, 7, 20):
        if steps == 1 and ends_in_zero and theirs in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
            continue  # they stop with an UnboundLocalError
        sigmas = [*karras(steps), 0.0] if ends_in_zero else exponential(steps)
        drawn: Calls = []
        their_drawn: Calls = []
        extra = {"noise_sampler": noise_of(their_drawn)} if stochastic else {}
        sampler = getattr(sampling, f"sample_{theirs}")
        expected = sampler(mixture, START, torch.tensor(sigmas), disable=True, **their_options, **extra)
        result = list(SOLVERS[ours](mixture, START, sigmas, noise_of(drawn), **options))
        assert len(result) == steps
        assert apart(result[-1].x, expected) < 1e-10
        if options.get("eta") != 0.0:  # where they draw all the same, and multiply by nothing
            assert drawn[: len(their_drawn)] == [pytest.approx(call, rel=1e-9) for call in their_drawn]
            # those that diffusers has too draw once more at the end, as it does; the amount is 0
            assert drawn[len(their_drawn) :] in ([], [(sigmas[-2], 0.0)])


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("calls", range(1, 12))
def test_dpm_fast(sampling: Any, calls: int, eta: float) -> None:
    sigmas = exponential(calls // 3 + 1)
    made = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        made.append(sigma)
        return mixture(x, sigma)

    expected = sampling.sample_dpm_fast(
        mixture, START, sigmas[-1], sigmas[0], calls, disable=True, eta=eta, noise_sampler=noise_of([])
    )
    result = list(SOLVERS["dpm_fast"](denoise, START, sigmas, noise_of([]), calls=calls, eta=eta))
    assert apart(result[-1].x, expected) < 1e-10
    assert len(made) == calls


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": 2}, {"rtol": 0.01, "atol": 0.001}, {"pcoeff": 0.4, "icoeff": 0.6}, {"h_init": 1.5}],
    ids=str,
)
def test_dpm_adaptive(sampling: Any, options: dict[str, Any], eta: float) -> None:
    drawn: Calls = []
    their_drawn: Calls = []
    noise = noise_of(their_drawn)
    expected, info = sampling.sample_dpm_adaptive(
        mixture, START, 0.05, 10.0, disable=True, eta=eta, noise_sampler=noise, return_info=True, **options
    )
    made = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        made.append(sigma)
        return mixture(x, sigma)

    result: list[Step] = list(
        SOLVERS["dpm_adaptive"](denoise, START, [10.0, 1.0, 0.05], noise_of(drawn), eta=eta, **options)
    )
    assert apart(result[-1].x, expected) < 1e-9  # the steps' lengths follow from a difference of near equals
    assert len(result) == info["n_accept"]
    assert len(made) == info["nfe"]
    if options.get("h_init"):
        assert info["n_reject"] > 0, "or taking a step back would not be tested"
    if eta > 0.0:
        assert drawn == [pytest.approx(call, rel=1e-9) for call in their_drawn]
