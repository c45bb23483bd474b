"""The attention of the C library, against softmax(q kᵀ / sqrt(d)) v in float64."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint import kernels
from mezzotint.kernels import attention as kernel
from mezzotint.models.attention import attention, backend
from mezzotint.models.backends import sdpa

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"kernels {kernels.describe()}")
EPSILON = torch.finfo(torch.float32).eps
ROUNDING = torch.finfo(torch.bfloat16).eps / 2  # the largest relative error of rounding to bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small attentions be done by the kernel too."""
    monkeypatch.setattr(kernel, "LEAST_WORK", 0)


@functools.cache
def emulated() -> ctypes.CDLL:
    """Compile the library for bfloat16 with its instructions emulated, for any processor."""
    sources = [kernels.LIBRARY.with_name(f"{name}.c") for name in ("attention", "parallel")]
    flags = ["-O2", "-std=c11", "-mavx2", "-mfma", "-ffp-contract=fast", "-Wno-psabi", "-pthread", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "emulated.so")
        defined = ["-DBFLOAT16", f'-DSOURCES="{kernels._hash_sources()}"']
        subprocess.run(["gcc", *flags, *defined, *sources, "-o", library, "-lm"], check=True)
        found = kernels._open(library)
    assert not isinstance(found, str), found
    return found


LIBRARIES = ["float32", "bfloat16, emulated"]
if torch.cpu.get_capabilities().get("avx512_bf16"):
    LIBRARIES.append("bfloat16")


@pytest.fixture(params=LIBRARIES)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype, with its library enabled."""
    if request.param == "float32":
        return torch.float32
    if request.param == "bfloat16":
        library = kernels._open(kernels.LIBRARY_BFLOAT16)
        assert not isinstance(library, str), library
    else:
        if shutil.which("gcc") is None:
            pytest.skip("there is no compiler")
        library = emulated()
    monkeypatch.setattr(kernel, "library_bfloat16", lambda: library)
    return torch.bfloat16


def example(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q, k and v as the projections leave them: views of (B, T, heads * d)."""
    generator = torch.Generator().manual_seed(dim + keys)
    q = torch.randn(batch, queries, heads * dim, generator=generator).to(dtype)
    k, v = torch.randn(batch, keys, 2 * heads * dim, generator=generator).to(dtype).chunk(2, -1)
    return split(q, heads), split(k, heads), split(v, heads)


def split(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention in float64."""
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v.double()


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that the result differs from the exact one as sums of as many roundings in float32 do, at most.

    In bfloat16 each share, of which an output is the sum over the keys, and the output are rounded to bfloat16 too.
    """
    assert kernel.is_supported(q, k, v, None, False)
    y, expected = kernel.attend(q, k, v), exact(q, k, v)
    assert y.shape == q.shape
    assert y.dtype == q.dtype
    assert y.transpose(1, 2).is_contiguous()
    terms = q.shape[-1] + k.shape[2]  # of a score and of an output; each is rounded by epsilon / 2 at most
    if q.dtype == torch.bfloat16:
        bound = 2 * ROUNDING * exact(q, k, v.abs()) + 4 * EPSILON * terms**0.5 * expected.abs().max()
        assert ((y - expected).abs() <= bound).all()
        return
    typical = (y - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert typical <= EPSILON * terms**0.5
    assert (y - expected).abs().max() <= 4 * EPSILON * terms**0.5 * expected.abs().max()


@pytest.mark.parametrize("queries, keys", [(1, 1), (7, 3), (16, 16), (33, 77), (64, 97), (130, 200)])
@pytest.mark.parametrize("dim", [1, 5, 8, 15, 40, 41, 64, 80, 160, 192])
def test_it_is_the_formula_in_float64(dim: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    check(*example(2, 3, queries, keys, dim, dtype))


def test_more_queries_than_one_unit_of_work_has(dtype: torch.dtype) -> None:
    check(*example(1, 2, 2 * 2048 + 5, 301, 8, dtype))


@pytest.mark.parametrize("dim", [40, 41])
def test_strides_change_nothing(dim: int, dtype: torch.dtype) -> None:
    q, k, v = example(2, 3, 50, 60, dim, dtype)
    expected = kernel.attend(q, k, v)
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k[:, :, :50], v[:, :, :50])], -1)
    views = [split(part, 3) for part in fused.chunk(3, -1)]
    assert torch.equal(kernel.attend(*views), kernel.attend(*(x.contiguous() for x in views)))
    assert torch.equal(kernel.attend(q.contiguous(), k.contiguous(), v), expected)
    one = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
    assert torch.equal(kernel.attend(q, *one), kernel.attend(q, *(x.contiguous() for x in one)))


@pytest.mark.parametrize("queries, keys", [(300, 130), (40, 40)])
def test_threads_and_batches_give_the_same_bits(queries: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = example(2, 3, queries, keys, 40, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernel.attend(q, k, v)
        for threads in range(2, 9):
            torch.set_num_threads(threads)
            assert torch.equal(kernel.attend(q, k, v), one)
    finally:
        torch.set_num_threads(before)
    alone = [kernel.attend(*(x[i : i + 1, j : j + 1] for x in (q, k, v))) for i in range(2) for j in range(3)]
    assert torch.equal(torch.cat(alone).view_as(one), one)
    some = kernel.attend(q[:, :, 7:20], k, v)
    assert torch.equal(some, one[:, :, 7:20])


def test_the_exponential_is_accurate_and_ends_at_zero() -> None:
    q = torch.linspace(0, 100, 4001).view(1, 1, -1, 1)
    k, v = torch.tensor([0.0, -1.0]).view(1, 1, 2, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    y, expected = kernel.attend(q, k, v).double(), exact(q, k, v)  # exp(-q) / (1 + exp(-q))
    relative = ((y - expected) / expected).abs()
    normal = q < 126 * math.log(2)
    # rounded: log2(e), to which the exponent is proportional, 1 + exp(-q), the power, the output; the polynomial's own
    # error is less than epsilon
    assert (relative <= EPSILON * (4 + q))[normal].all()
    assert (y[q > 127 * math.log(2)] == 0).all()


@pytest.mark.parametrize("size", [2.0**7, 2.0**13, 2.0**66])
def test_large_scores_do_not_overflow(size: float, dtype: torch.dtype) -> None:
    q, k, v = example(1, 2, 40, 120, 64, dtype)
    q, k = q.sign(), k.sign()  # so that the scores are integers, and exact
    best = (q @ k.transpose(-2, -1)).argmax(-1, keepdim=True)
    k = k.scatter_add(2, best[:, :, :1].expand(-1, -1, -1, 64), q[:, :, :1])  # the first query has one best key
    y = kernel.attend(q * size, k, v)
    assert y.isfinite().all()
    assert torch.equal(y[:, :, :1], v.gather(2, best[:, :, :1].expand(-1, -1, -1, 64)))
    check(q * size, k, v)  # ties are averaged


def test_only_differences_of_scores_matter(dtype: torch.dtype) -> None:
    q, k, v = example(1, 2, 40, 120, 64, dtype)
    q, k = q.sign(), k.sign()
    q[..., 0] = 2.0**20
    k[..., 0] = -1  # all scores are about -131072, and exact
    check(q, k, v)


def test_nan_and_infinity_are_those_of_the_formula(dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    for place, value in [("q", nan), ("k", nan), ("v", nan), ("q", inf), ("k", inf), ("k", -inf), ("v", inf)]:
        inputs = dict(zip("qkv", example(1, 2, 40, 130, 24, dtype), strict=True))
        inputs[place][0, 1, 20, 3] = value
        y = kernel.attend(**inputs)
        expected = sdpa(**inputs) if dtype == torch.float32 else exact(**inputs)  # torch makes 0 of inf - inf
        assert torch.equal(y.isnan(), expected.isnan()), (place, value)
        assert torch.equal(y.isinf(), expected.isinf()), (place, value)
        finite = expected.isfinite()
        assert finite[0, 0].all() and not finite[0, 1].all()
        assert (y - expected)[finite].abs().max() <= (1e-6 if dtype == torch.float32 else 0.05)


def test_auto_uses_it_and_sdpa_does_not(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    q, k, v = example(1, 2, 50, 77, 40, dtype)
    result = kernel.attend(q, k, v)
    monkeypatch.setattr(kernel, "attend", lambda q, k, v: result)
    assert attention(q, k, v) is result
    with backend("auto"):
        assert attention(q, k, v) is result
    with backend("sdpa"):
        assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_what_it_does_not_take_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = example(2, 2, 20, 20, 40)
    assert kernel.is_supported(q, k, v, None, False)
    wide = example(1, 1, 20, 20, 200)
    refused = [
        (q, k, v, torch.zeros(20, 20), False),
        (q, k, v, None, True),
        (q.double(), k.double(), v.double(), None, False),
        (q.bfloat16(), k.bfloat16(), v.bfloat16(), None, False),
        (q.to("meta"), k.to("meta"), v.to("meta"), None, False),
        (q, k.double(), v, None, False),
        (q[0], k[0], v[0], None, False),
        (q, k[:1], v[:1], None, False),
        (q, k[:, :1], v[:, :1], None, False),
        (q, k, v[..., :32], None, False),
        (q[..., ::2], k[..., ::2], v[..., ::2], None, False),
        (q[:, :, :0], k, v, None, False),
        (q, k[:, :, :0], v[:, :, :0], None, False),
        (*wide, None, False),
    ]
    for arguments in refused:
        assert not kernel.is_supported(*arguments)
    monkeypatch.setattr(kernel, "LEAST_WORK", q.numel() * 20 + 1)
    assert not kernel.is_supported(q, k, v, None, False)


@pytest.mark.parametrize("queries, keys, dim", [(1, 1, 1), (7, 3, 5), (130, 200, 40), (40, 77, 192)])
def test_gradients_are_those_of_the_formula(queries: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    inputs = example(2, 3, queries, keys, dim, dtype)
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact_leaves = [x.double().requires_grad_() for x in inputs]
    out, expected = attention(*leaves), exact(*exact_leaves)
    assert torch.equal(out, kernel.attend(*inputs))
    by_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, leaves, by_output)
    terms = dim + max(queries, keys)
    for x, y in zip(gradients, torch.autograd.grad(expected, exact_leaves, by_output.double()), strict=True):
        epsilon = torch.finfo(dtype).eps
        assert (x - y).abs().max() <= 8 * epsilon * terms**0.5 * max(y.abs().max(), by_output.abs().max())


def test_the_logarithms_of_the_sums(dtype: torch.dtype) -> None:
    q, k, v = example(2, 3, 130, 200, 40, dtype)
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(40)
    out, logsumexp = kernel.attend_with_logsumexp(q, k, v)
    assert torch.equal(out, kernel.attend(q, k, v))
    assert (logsumexp - scores.logsumexp(-1)).abs().max() <= EPSILON * 240**0.5 * scores.abs().max()


def test_one_input_alone_may_need_a_gradient() -> None:
    q, k, v = example(1, 2, 20, 30, 16)
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q, k, v).sum(), [v])
    shares = (q.double() @ k.double().transpose(-2, -1) / 4).softmax(-1).sum(2)  # (B, heads, Tk)
    assert (gradient - shares[..., None]).abs().max() <= 4 * EPSILON * 46**0.5 * shares.max()
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), kernel.attend(q, k, v))


def test_a_gradient_of_a_gradient_is_refused_as_torch_refuses_it() -> None:
    inputs = [x.detach().requires_grad_() for x in example(1, 2, 20, 30, 16)]
    for compute in (attention, F.scaled_dot_product_attention):
        with pytest.raises(RuntimeError, match="not implemented"):
            gradients = torch.autograd.grad(compute(*inputs).pow(2).sum(), inputs, create_graph=True)
            torch.autograd.grad(gradients[0].sum(), inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batched attention
def test_autocast_and_vmap_are_torchs() -> None:
    q, k, v = example(2, 2, 20, 20, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype
    both = torch.func.vmap(attention)(*(x[:, None] for x in (q, k, v)))[:, 0]
    assert (both - exact(q, k, v)).abs().max() <= 4 * EPSILON * 60**0.5
