"""The 3x3 convolution of the C library, against the direct sum in float64."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mezzotint
from mezzotint import kernels
from mezzotint.kernels import attention, linear
from mezzotint.kernels import convolution as kernel
from mezzotint.models.convolution import Conv2d, conv2d
from mezzotint.records.record import changes, read

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"kernels {kernels.describe()}")
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small convolutions be done by the kernel too."""
    monkeypatch.setattr(kernel, "LEAST_TILES", 0)
    monkeypatch.setattr(kernel, "LEAST_WORK", 0)


def example(
    batch: int = 1, inputs: int = 8, outputs: int = 32, height: int = 8, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and bias of random numbers."""
    generator = torch.Generator().manual_seed(inputs + height)
    x = torch.randn(batch, inputs, height, width, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(outputs, generator=generator)


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> None:
    """Check that y differs from the exact sums as a sum of as many roundings in float32 does, at most."""
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    terms = weight[0].numel()
    typical = (y - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert typical <= EPSILON * terms**0.5  # each of `terms` roundings is at most epsilon / 2
    assert (y - exact).abs().max() <= 4 * EPSILON * terms**0.5 * exact.abs().max()


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (4, 4), (5, 9), (8, 8), (13, 30)])
@pytest.mark.parametrize("inputs, outputs", [(8, 32), (64, 32), (72, 96), (200, 64)])
def test_it_is_the_direct_sum(inputs: int, outputs: int, height: int, width: int) -> None:
    x, weight, bias = example(2, inputs, outputs, height, width)
    assert kernel.is_supported(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    check(kernel.convolve(x, weight, bias, (1, 1)), x, weight, bias, (1, 1))


@pytest.mark.parametrize("padding", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_padding_and_no_bias(padding: tuple[int, int]) -> None:
    x, weight, _ = example(1, 16, 32, 10, 7)
    check(kernel.convolve(x, weight, None, padding), x, weight, None, padding)


def test_more_tiles_than_are_transformed_at_a_time() -> None:
    x, weight, bias = example(3, 8, 32, 30, 34)  # 216 tiles
    check(kernel.convolve(x, weight, bias, (1, 1)), x, weight, bias, (1, 1))


def test_threads_and_batches_give_the_same_bits() -> None:
    x, weight, bias = example(3, 72, 64, 20, 36)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernel.convolve(x, weight, bias, (1, 1))
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(kernel.convolve(x, weight, bias, (1, 1)), one)
    finally:
        torch.set_num_threads(before)
    alone = [kernel.convolve(picture[None], weight, bias, (1, 1)) for picture in x]
    assert torch.equal(torch.cat(alone), one)


def test_what_is_not_finite_stays_so() -> None:
    x, weight, bias = example()
    x[0, 3, 5, 5] = torch.nan
    y = kernel.convolve(x, weight, bias, (1, 1))
    assert y[0, :, 4:7, 4:7].isnan().all()
    assert y[0, :, :4, :4].isfinite().all()  # another tile


def test_a_layer_uses_it_without_gradients_only() -> None:
    x, weight, bias = example(1, 16, 32, 8, 8)
    layer = Conv2d(16, 32, 3, padding=1).to(memory_format=torch.channels_last)
    layer.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        assert torch.equal(layer(x), kernel.convolve(x, weight, bias, (1, 1)))
    assert layer(x).requires_grad
    assert torch.equal(layer(x).detach(), F.conv2d(x, layer.weight.detach(), bias, padding=1))


@pytest.mark.parametrize("inputs, outputs", [(32, 32), (96, 64)])
@pytest.mark.parametrize(
    "height, width, padding",
    [(1, 1, (1, 1)), (3, 5, (0, 0)), (3, 5, (2, 1)), (13, 30, (0, 1)), (13, 30, (1, 1)), (13, 30, (2, 2))],
)
def test_the_gradient_by_the_input(
    inputs: int, outputs: int, height: int, width: int, padding: tuple[int, int]
) -> None:
    _, weight, _ = example(1, inputs, outputs)
    gradient = example(2, outputs, 32, height, width)[0]
    assert kernel.is_supported(gradient, weight, None, (1, 1), padding, (1, 1), 1, transposed=True)
    y = kernel.convolve(gradient, weight, None, padding, transposed=True)
    assert y.shape == (2, inputs, height + 2 - 2 * padding[0], width + 2 - 2 * padding[1])
    turned = weight.transpose(0, 1).flip(2, 3)  # the gradient of a convolution is a convolution with these weights
    check(y, gradient, turned, None, (2 - padding[0], 2 - padding[1]))


def test_a_frozen_layer_is_differentiated_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = example(2, 32, 64, 9, 7)
    layer = Conv2d(32, 64, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None
    exact = x.detach().double().requires_grad_()
    F.conv2d(exact, weight.double(), bias.double(), padding=1).square().sum().backward()
    assert exact.grad is not None
    terms = 9 * (32 + 64)  # roundings of both passes
    assert (x.grad - exact.grad).abs().max() <= 4 * EPSILON * terms**0.5 * exact.grad.abs().max()
    calls = list[bool]()
    convolve = kernel.convolve
    monkeypatch.setattr(
        kernel, "convolve", lambda *a, transposed=False: calls.append(transposed) or convolve(*a, transposed=transposed)
    )
    layer(x).sum().backward()
    assert calls == [False, True]


def test_what_it_does_not_take_is_torchs() -> None:
    x, weight, bias = example(1, 16, 32, 8, 8)
    same = (1, 1), (1, 1), (1, 1), 1
    assert kernel.is_supported(x, weight, bias, *same)
    refused = [
        (x.contiguous(), weight, None, *same),
        (x, weight.contiguous(), None, *same),
        (x.double(), weight.double(), None, *same),
        (x.bfloat16(), weight.bfloat16(), None, *same),
        (x, weight[:24], None, *same),
        (x[:, :12], weight[:, :12], None, *same),
        (x, weight[:, :, 1:2, 1:2], None, *same),
        (x, weight, None, (2, 2), (1, 1), (1, 1), 1),
        (x, weight, None, (1, 1), (1, 1), (2, 2), 1),
        (x.to("meta"), weight.to("meta"), None, *same),
        (x, weight, bias.clone().requires_grad_(), *same),
    ]
    for arguments in refused:
        assert not kernel.is_supported(*arguments)
    assert not kernel.is_supported(x, weight, None, (1, 1), (3, 1), (1, 1), 1)
    gradient = example(1, 32, 32)[0]
    assert not kernel.is_supported(gradient, weight, None, *same, transposed=True)  # 16 channels of the input
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, weight, bias, padding=(1, 1)).dtype == torch.bfloat16
    half = conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), padding=(1, 1))
    assert torch.equal(half, F.conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), padding=1))


def _in_a_fork(queue: multiprocessing.Queue[list[float]]) -> None:
    torch.set_num_threads(2)
    x, weight, bias = example()
    queue.put(kernel.convolve(x, weight, bias, (1, 1)).flatten().tolist())


def test_a_fork_does_not_wait_for_threads_that_it_lacks() -> None:
    before = torch.get_num_threads()
    x, weight, bias = example()
    try:
        torch.set_num_threads(2)
        here = kernel.convolve(x, weight, bias, (1, 1))
    finally:
        torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == here.flatten().tolist()
    process.join()
    assert process.exitcode == 0


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.describe() == "3x3 convolutions, linear layers, attention in float32 (AVX2)"
    monkeypatch.setattr(kernels, "_load", kernels._load.__wrapped__)
    monkeypatch.setenv(kernels.VARIABLE, "off")
    assert kernels.describe() == "not used: MEZZOTINT_KERNELS is off"
    assert kernels.library() is None


def test_with_avx512_linear_layers_and_attention_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vectors are twice as wide; the convolution, with a quarter of the multiplications, stays."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x, weight, _ = example(1, 64, 64, 16, 16)
    heads = torch.randn(1, 8, 256, 40)
    assert kernel.is_supported(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    assert not linear.is_supported(torch.randn(256, 256), torch.randn(256, 256), None)
    assert not attention.is_supported(heads, heads, heads, None, False)
    assert kernels.describe() == "3x3 convolutions in float32 (AVX2)"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert linear.is_supported(torch.randn(256, 256), torch.randn(256, 256), None)
    assert attention.is_supported(heads, heads, heads, None, False)


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of an editable installation that was not built again: its functions may take other arguments."""
    folder = kernels.LIBRARY.parent
    for path in (kernels.LIBRARY, *folder.glob("*.c"), *folder.glob("*.h")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "float32.so")
    assert not isinstance(kernels._load.__wrapped__(), str)
    with (tmp_path / "simd.h").open("a") as file:
        file.write("\n")
    reason = "float32.so was compiled from other sources; install mezzotint again"
    assert kernels._load.__wrapped__() == reason


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler")
def test_a_library_without_the_functions_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.c").write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "float32.so", tmp_path / "empty.c"], check=True)
    monkeypatch.setattr(kernels, "_load", kernels._load.__wrapped__)
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "float32.so")
    assert kernels.library() is None
    assert "float32.so cannot be loaded (" in kernels.describe()


def test_a_damaged_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "float32.so").write_bytes(b"no library")
    monkeypatch.setattr(kernels, "_load", kernels._load.__wrapped__)
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "float32.so")
    assert kernels.library() is None
    assert kernels.describe().startswith("not used: float32.so cannot be loaded (")


def test_a_record_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, request = mezzotint.load(device="cpu"), mezzotint.Request(prompt="a lemon", seed=1, steps=1)
    with_it = read(pipe.generate(request).images[0].info)
    monkeypatch.setattr(kernels, "library", lambda: None)
    without = read(pipe.generate(request).images[0].info)
    assert with_it and without
    assert list(changes(with_it, without)) == ["the instruction set of our own kernels was AVX2 and is now none"]
