"""The linear layer of the C library, against the product in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint import kernels
from mezzotint.kernels import linear as kernel
from mezzotint.models.adapters import LayerChange, LowRank, apply_adapters
from mezzotint.models.blocks import GEGLU
from mezzotint.models.convolution import Conv2d, conv2d
from mezzotint.models.linear import Linear, linear
from mezzotint.models.offload import StoredWeight, offload_weight

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"kernels {kernels.describe()}")
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small layers be computed by the kernel too."""
    monkeypatch.setattr(kernel, "LEAST_ROWS", 1)
    monkeypatch.setattr(kernel, "LEAST_WORK", 0)


def example(rows: int = 7, inputs: int = 24, outputs: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and bias of random numbers."""
    generator = torch.Generator().manual_seed(rows + inputs)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, bias


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that y differs from the exact sums by at most the bound on the error of a sum of products in float32."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert y.shape == exact.shape and y.is_contiguous()
    assert ((y - exact).abs() <= (weight.shape[1] + 1) * EPSILON / 2 * magnitude).all()  # Higham 2002, section 3.1
    typical = (y - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert typical <= EPSILON * weight.shape[1] ** 0.5


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 13, 100])
@pytest.mark.parametrize("inputs, outputs", [(8, 16), (24, 272), (384, 48), (392, 256), (1000, 528)])
def test_it_is_the_product(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = example(rows, inputs, outputs)
    assert kernel.is_supported(x, weight, bias)
    check(kernel.multiply(x, weight, bias), x, weight, bias)
    check(kernel.multiply(x, weight, None), x, weight, None)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("inputs, outputs", [(16, 8), (272, 24), (528, 1000)])
def test_the_gradient_by_the_input(rows: int, inputs: int, outputs: int) -> None:
    gradient, weight, _ = example(rows, outputs, inputs)
    transposed = weight.t().contiguous()  # of a layer from `inputs` to `outputs`
    assert kernel.is_supported(gradient, transposed, None, transposed=True)
    check(kernel.multiply(gradient, transposed, None, transposed=True), gradient, weight, None)


def test_a_frozen_layer_is_differentiated_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = example(12, 48, 32)
    layer = Linear(48, 32).requires_grad_(False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    calls = list[bool]()
    multiply = kernel.multiply

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
        calls.append(transposed)
        return multiply(x, weight, bias, transposed)

    monkeypatch.setattr(kernel, "multiply", counted)
    y = layer(x.requires_grad_())
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(y, x, direction)
    assert calls == [False, True]
    check(gradient, direction, weight.t(), None)


def test_second_derivatives_of_a_frozen_layer() -> None:
    x, weight, bias = example(12, 48, 32)
    x.requires_grad_()
    (first,) = torch.autograd.grad(linear(x, weight, bias).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)

    def in_float64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return 2 * (6 * y * ((3 * y**2) @ weight @ weight.t())) @ weight

    values = [tensor.detach().double() for tensor in (x, weight, bias)]
    magnitude = in_float64(*(value.abs() for value in values))
    roundings = 3 * (48 + 1) + 32 + 48 + 32 + 10  # of the sums that each term passes through, and of the products
    assert ((second - in_float64(*values)).abs() <= roundings * EPSILON / 2 * magnitude).all()


def test_more_rows_than_a_unit_of_work_takes() -> None:
    x, weight, bias = example(3001, 16, 16)
    check(kernel.multiply(x, weight, bias), x, weight, bias)


def test_inputs_of_any_shape_and_strides() -> None:
    x, weight, bias = example(60, 48, 32)
    y = kernel.multiply(x, weight, bias)
    for shape in ((1, 60), (4, 15), (2, 3, 10)):
        assert torch.equal(kernel.multiply(x.view(*shape, 48), weight, bias), y.view(*shape, 32))
    wide = torch.randn(60, 200)
    wide[:, 100:148] = x
    assert torch.equal(kernel.multiply(wide[:, 100:148], weight, bias), y)
    assert torch.equal(kernel.multiply(wide.view(4, 15, 200)[..., 100:148], weight, bias), y.view(4, 15, 32))
    columns = x.t().contiguous().t()
    assert torch.equal(kernel.multiply(columns, weight, bias), y)
    assert torch.equal(kernel.multiply(x, weight, bias.repeat_interleave(2)[::2]), y)
    rows = x.view(4, 15, 48).transpose(0, 1)  # no view of one matrix
    assert torch.equal(kernel.multiply(rows, weight, bias), y.view(4, 15, 32).transpose(0, 1))


@pytest.mark.parametrize("inputs, outputs", [(8, 16), (320, 144), (1000, 272)])
def test_geglu_is_the_product_of_a_half_and_the_gelu_of_the_other(inputs: int, outputs: int) -> None:
    x, weight, bias = example(50, inputs, 2 * outputs)
    weight /= inputs**0.5
    assert kernel.is_supported(x, weight, bias, gated=True)
    for given in (bias, None):
        y = kernel.geglu(x, weight, given)
        exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
        magnitude = F.linear(x.double().abs(), weight.double().abs(), None if given is None else given.double().abs())
        (h, gate), (h_error, gate_error) = exact.chunk(2, -1), (inputs * EPSILON * magnitude).chunk(2, -1)
        bound = F.gelu(gate).abs() * h_error + 1.13 * h.abs() * gate_error + 4 * EPSILON * h.abs() * gate.abs()
        assert y.shape == h.shape and y.is_contiguous()
        assert ((y - h * F.gelu(gate)).abs() <= bound).all()  # 1.13: the largest slope of the GELU


def test_the_gelu_of_any_number() -> None:
    gate = torch.cat([torch.linspace(-15, 15, 3001), torch.tensor([0.0, -1e-30, 1e30, -1e30, torch.nan])])
    x, weight, bias = torch.zeros(len(gate), 8), torch.zeros(32, 8), torch.ones(32)
    x[:, 0], weight[16:, 0], bias[16:] = gate, 1, 0
    y, exact = kernel.geglu(x, weight, bias), F.gelu(gate.double())
    finite = gate.isfinite()
    assert ((y - exact[:, None])[finite].abs() <= 2 * EPSILON * gate[finite, None].abs()).all()
    assert y[-1].isnan().all()


def test_a_geglu_uses_it_unless_its_layer_must_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = example(12, 24, 64)
    layer = GEGLU(24, 32)
    layer.proj.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        fused = kernel.geglu(x, weight, bias)
        assert torch.equal(layer(x), fused)
        hook = layer.proj.register_forward_hook(lambda *_: torch.zeros(12, 64))
        assert not layer(x).any()
        hook.remove()
        assert torch.equal(layer(x), fused)
        change = LayerChange(LowRank(torch.zeros(4, 24), torch.ones(64, 4)))
        with apply_adapters({"": layer}, {".proj": [(change, 1.0)]}):
            torch.testing.assert_close(layer(x), fused)
            monkeypatch.setattr(kernel, "geglu", None)  # which would fail
            layer(x)
    monkeypatch.undo()
    assert layer(x).requires_grad
    assert not kernel.is_supported(x, weight[:48], None, gated=True)


def test_threads_and_batches_give_the_same_bits() -> None:
    x, weight, bias = example(1100, 776, 336)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, gated = kernel.multiply(x, weight, bias), kernel.geglu(x, weight[:320], bias[:320])
        for threads in range(2, 9):
            torch.set_num_threads(threads)
            assert torch.equal(kernel.multiply(x, weight, bias), one)
            assert torch.equal(kernel.geglu(x, weight[:320], bias[:320]), gated)
    finally:
        torch.set_num_threads(before)
    for first, last in ((0, 1), (1, 8), (8, 1090), (1090, 1100)):
        assert torch.equal(kernel.multiply(x[first:last], weight, bias), one[first:last])
        assert torch.equal(kernel.geglu(x[first:last], weight[:320], bias[:320]), gated[first:last])


def test_what_is_not_finite_stays_in_its_row_or_column() -> None:
    x, weight, bias = example(20, 400, 32)
    x[3, 390] = torch.nan
    weight[17, 5] = torch.inf
    y = kernel.multiply(x, weight, bias)
    assert y[3].isnan().all() and not y[:, 17].isfinite().any()
    y[3], y[:, 17] = 0, 0
    assert y.isfinite().all()


def test_what_it_does_not_take_is_torchs() -> None:
    x, weight, bias = example(12, 24, 32)
    assert kernel.is_supported(x, weight, bias)

    class Other(Tensor):
        """A tensor that may keep its numbers elsewhere."""

    refused = [
        (x.double(), weight.double()),
        (x.bfloat16(), weight.bfloat16()),
        (x.to("meta"), weight.to("meta")),
        (x[:, :20], weight[:, :20].contiguous()),
        (x, weight[:24]),
        (x[:, :16], weight[:, :16]),  # rows of the weight that do not follow each other
        (x[:, :16], weight),
        (x[0], weight),
        (x[:0], weight),
        (x.as_subclass(Other), weight),
        (x, weight.as_subclass(Other)),
        (x, weight.clone().requires_grad_()),
        (x.clone().requires_grad_(), weight),
    ]
    for arguments in refused:
        assert not kernel.is_supported(*arguments, None)
    with torch.no_grad():
        assert kernel.is_supported(x, nn.Parameter(weight), bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    half = (x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert torch.equal(linear(*half), F.linear(*half))


def test_too_little_work_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = example(12, 24, 32)
    monkeypatch.setattr(kernel, "LEAST_ROWS", 13)
    assert not kernel.is_supported(x, weight, bias)
    monkeypatch.setattr(kernel, "LEAST_ROWS", 12)
    monkeypatch.setattr(kernel, "LEAST_WORK", 12 * 24 * 32 + 1)
    assert not kernel.is_supported(x, weight, bias)


def test_a_layer_uses_it_without_gradients_only() -> None:
    x, weight, bias = example(12, 24, 32)
    layer, plain = Linear(24, 32), nn.Linear(24, 32)
    layer.load_state_dict({"weight": weight, "bias": bias})
    plain.load_state_dict(layer.state_dict())
    x.requires_grad_()
    gradients = [torch.autograd.grad(each(x).square().sum(), (x, *each.parameters())) for each in (layer, plain)]
    assert all(map(torch.equal, *gradients))
    with torch.no_grad():
        y = kernel.multiply(x, weight, bias)
        assert torch.equal(layer(x), y)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        offload_weight(layer, StoredWeight(weight), torch.float32, torch.device("cpu"))
        assert torch.equal(layer(x), y)


@torch.no_grad()
def test_a_convolution_of_one_pixel() -> None:
    x, weight, bias = example(2 * 5 * 3, 24, 32)
    layer = Conv2d(24, 32, 1).to(memory_format=torch.channels_last)
    layer.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    pixels = x.view(2, 5, 3, 24).permute(0, 3, 1, 2)
    y = layer(pixels)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.permute(0, 2, 3, 1), kernel.multiply(x, weight, bias).view(2, 5, 3, 32))
    square = weight[:, :, None, None]
    for options in ({"stride": (2, 2)}, {"padding": (1, 1)}):
        expected = F.conv2d(pixels, square, bias, **options)
        assert torch.equal(conv2d(pixels, square, bias, **options), expected)
    assert torch.equal(conv2d(pixels.contiguous(), square, bias), F.conv2d(pixels.contiguous(), square, bias))
