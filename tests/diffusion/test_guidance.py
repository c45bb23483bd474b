"""Guidance on outputs whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mezzotint.diffusion.guidance import guided
from mezzotint.diffusion.prediction import EPSILON, PREDICTIONS, SAMPLE, Prediction

X = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Outputs of two conditions, and how many were asked for."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def __call__(self, x: Tensor, sigma: float, count: int | None = None) -> tuple[Tensor, ...]:
        self.asked.append(count)
        return (torch.sin(2 * x), 0.5 * torch.cos(x) * sigma)[:count]


@pytest.mark.parametrize("prediction", PREDICTIONS.values())
def test_is_the_same_on_outputs_and_on_denoised(prediction: Prediction) -> None:
    outputs = Recorder()
    conditional, unconditional = (prediction.denoised(output, X, 2.0) for output in outputs(X, 2.0))
    result, empty = guided(outputs, prediction, 7.5).pair(X, 2.0)
    torch.testing.assert_close(result, unconditional + 7.5 * (conditional - unconditional), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty, unconditional)
    assert torch.equal(result, guided(outputs, prediction, 7.5)(X, 2.0))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_no_guidance_asks_for_one_output(scale: float) -> None:
    outputs = Recorder()
    assert torch.equal(guided(outputs, SAMPLE, scale)(X, 2.0), torch.sin(2 * X))
    assert outputs.asked == [1]


def test_interval_is_open_below_and_closed_above() -> None:
    outputs = Recorder()
    denoise = guided(outputs, SAMPLE, 3.0, interval=(1.0, 4.0))
    for sigma in (5.0, 4.0, 2.0, 1.0, 0.5):
        denoise(X, sigma)
    assert outputs.asked == [1, None, None, 1, 1]


def test_rescale_brings_back_the_spread_of_each_image() -> None:
    outputs = Recorder()
    conditional, _ = outputs(X, 2.0)
    full = guided(outputs, SAMPLE, 7.5, rescale=1.0)(X, 2.0)
    torch.testing.assert_close(full.std((1, 2, 3)), conditional.std((1, 2, 3)))
    plain, half = guided(outputs, SAMPLE, 7.5)(X, 2.0), guided(outputs, SAMPLE, 7.5, rescale=0.5)(X, 2.0)
    torch.testing.assert_close(half, (plain + full) / 2)


def test_rescale_works_on_the_networks_own_output() -> None:
    outputs = Recorder()
    result = guided(outputs, EPSILON, 7.5, rescale=1.0)(X, 2.0)
    conditional, _ = outputs(X, 2.0)
    torch.testing.assert_close(
        EPSILON.output(result, X, 2.0).std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-4, atol=1e-4
    )
