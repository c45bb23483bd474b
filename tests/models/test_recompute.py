"""What the backward pass computes again instead of keeping: the same gradients with less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from live_bytes import live_bytes
from torch import Tensor, nn

from mezzotint.models import blocks
from mezzotint.models.blocks import GEGLU, ResnetBlock, norm_silu, recompute


def example(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random numbers that require a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


@pytest.fixture
def block() -> ResnetBlock:
    torch.manual_seed(0)
    return ResnetBlock(8, 16, time_dim=4, groups=4, eps=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_the_same_bits(block: ResnetBlock, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block.requires_grad_(not frozen)
    x, time = example(2, 8, 6, 6), example(2, 16)
    inputs = [x, time, *(parameter for name, parameter in block.named_parameters() if "time_emb" not in name)]
    inputs = [each for each in inputs if each.requires_grad]
    gradients = torch.autograd.grad(block(x, time).square().sum(), inputs)
    monkeypatch.setattr(blocks, "recompute", lambda function, *inputs: function(*inputs))
    assert all(map(torch.equal, gradients, torch.autograd.grad(block(x, time).square().sum(), inputs)))


def test_a_norm_and_silu_keep_only_their_input() -> None:
    norm, x = nn.GroupNorm(4, 16), example(4, 16, 32, 32)
    kept, _ = live_bytes(lambda: norm_silu(norm, x))
    assert x.nbytes <= kept < 1.1 * x.nbytes  # the result, and statistics of groups
    kept, _ = live_bytes(lambda: nn.functional.silu(norm(x)))
    assert kept >= 2 * x.nbytes


def test_a_geglu_keeps_only_the_projection() -> None:
    layer, x = GEGLU(16, 64), example(4, 256, 16)
    projected = 8 * x.nbytes
    kept, _ = live_bytes(lambda: layer(x))
    assert 1.5 * projected <= kept < 1.6 * projected  # with the result, half as large


def double(function: Callable[[Tensor], Tensor], *shape: int) -> bool:
    """Check first and second derivatives in float64 against differences."""
    x = example(*shape, dtype=torch.float64)
    return torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


def test_second_derivatives_and_torch_func() -> None:
    norm, layer = nn.GroupNorm(2, 4).double(), GEGLU(3, 2).double()
    assert double(lambda x: norm_silu(norm, x), 1, 4, 2, 2)
    assert double(layer, 1, 2, 3)
    x = example(1, 4, 2, 2, dtype=torch.float64)
    (expected,) = torch.autograd.grad(norm_silu(norm, x).pow(2).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: norm_silu(norm, x).pow(2).sum())(x.detach()), expected)


def test_a_hook_on_a_norm_is_called_once() -> None:
    norm, calls = nn.GroupNorm(4, 16), list[int]()
    norm.register_forward_hook(lambda *_: calls.append(1))
    norm_silu(norm, example(1, 16, 4, 4)).sum().backward()
    assert calls == [1]


def test_without_gradients_nothing_is_kept() -> None:
    x, calls = example(3), list[bool]()

    def function(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x.sin()

    with torch.no_grad():
        assert not recompute(function, x).requires_grad
    recompute(function, x.detach())
    recompute(function, x).sum().backward()
    assert calls == [False, True, True, True]
