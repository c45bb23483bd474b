"""The convolution: by a frozen weight it keeps no input, and its derivatives of every kind are torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from mezzotint.models.convolution import conv2d

OPTIONS = [
    dict(padding=(1, 1)),
    dict(stride=(2, 2), padding=(1, 1)),
    dict(dilation=(2, 2), padding=(2, 1)),
    dict(groups=2),
]


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and bias of random numbers; x requires a gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, 4, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(2, 4, 3, 3, generator=generator, dtype=dtype)
    return x, weight, torch.randn(2, generator=generator, dtype=dtype)


def of_groups(weight: Tensor, options: dict[str, object]) -> Tensor:
    """Return the part of a weight that a convolution with these options has."""
    return weight[:, :2] if "groups" in options else weight


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_by_a_frozen_weight_are_torchs(
    options: dict[str, object], memory_format: torch.memory_format
) -> None:
    x, weight, bias = example()
    weight = of_groups(weight, options).contiguous(memory_format=memory_format)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    ours, torchs = (each(x, weight, bias, **options) for each in (conv2d, F.conv2d))
    assert torch.equal(ours, torchs)
    gradient = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (ours, torchs)))
    assert torch.autograd.gradcheck(lambda x: conv2d(x, weight, bias, **options), x)
    assert torch.autograd.gradgradcheck(lambda x: conv2d(x, weight, bias, **options).pow(2), x)


def kept(x: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of what a convolution keeps for the backward pass."""
    shapes = list[tuple[int, ...]]()
    with saved_tensors_hooks(lambda tensor: shapes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        conv2d(x, weight, bias, padding=(1, 1))
    return shapes


def test_the_input_is_kept_only_for_a_trained_weight() -> None:
    x, weight, bias = example()
    assert kept(x, weight, bias) == [tuple(weight.shape)]
    assert tuple(x.shape) in kept(x, weight.requires_grad_(), bias)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_weight_or_bias_has_its_gradient(trained: str) -> None:
    x, weight, bias = example(torch.float32)
    (weight if trained == "weight" else bias).requires_grad_()
    inputs = [each for each in (x, weight, bias) if each.requires_grad]
    ours, torchs = (torch.autograd.grad(each(x, weight, bias).pow(2).sum(), inputs) for each in (conv2d, F.conv2d))
    assert all(map(torch.equal, ours, torchs))
    without = x.detach()  # the first layer of a network
    inputs.remove(x)
    ours, torchs = (torch.autograd.grad(each(without, weight, bias).sum(), inputs) for each in (conv2d, F.conv2d))
    assert all(map(torch.equal, ours, torchs))


def test_a_weight_that_is_written_to_before_the_backward_pass_is_an_error() -> None:
    x, weight, bias = example()
    y = conv2d(x, weight, bias)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit")  # by torch's own forward mode
@pytest.mark.parametrize("channels", [4, 32])  # 32: our own kernel takes them
def test_forward_mode_and_function_transforms(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 2, channels, 64, 64, generator=generator)
    x, direction = (each.contiguous(memory_format=torch.channels_last) for each in (x, direction))
    weight = torch.randn(channels, channels, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(direction.double(), weight.double(), padding=1)
    bound = (
        9
        * channels
        * torch.finfo(torch.float32).eps
        * F.conv2d(direction.double().abs(), weight.double().abs(), padding=1)
    )

    def call(x: Tensor) -> Tensor:
        return conv2d(x, weight, None, padding=(1, 1))

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
    assert tangent is not None
    tangents = [tangent, torch.func.jvp(call, (x,), (direction,))[1], torch.func.vmap(call)(direction[:, None])[:, 0]]
    assert all(((each - exact).abs() <= bound).all() for each in tangents)
    by_func = torch.func.grad(lambda x: call(x).pow(2).sum())(x)
    (by_autograd,) = torch.autograd.grad(call(x.requires_grad_()).pow(2).sum(), x)
    error = 4 * torch.finfo(torch.float32).eps * (2 * 9 * channels) ** 0.5 * float(by_func.abs().max())  # of two passes
    torch.testing.assert_close(by_func, by_autograd, rtol=0, atol=error)


def test_autocast_is_obeyed() -> None:
    x, weight, bias = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = (each(x, weight, bias, padding=(1, 1)) for each in (conv2d, F.conv2d))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, torchs)
    assert torch.equal(*(torch.autograd.grad(y.float().sum(), x)[0] for y in (ours, torchs)))
