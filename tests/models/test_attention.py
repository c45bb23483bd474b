"""Attention's backends against the formula in float64; what they hold, who sees which, and packages not here."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import live_bytes
from torch import Tensor

from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.errors import BudgetError, MissingExtraError, RequestError
from mezzotint.models import backends
from mezzotint.models.attention import attention, backend, chosen, probabilities, recording
from mezzotint.models.backends import NAMES, PACKAGES, Backend, available, slice_shape
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import Condition, UNet
from mezzotint.models.vae import VAE

EVERYWHERE = ["auto", "sdpa", "math", "sliced", "sliced:1KiB", "sliced:30KiB"]
SHAPES = {  # batch, heads, queries, keys, head size
    "self": (2, 3, 64, 64, 40),
    "cross": (2, 2, 37, 77, 5),
    "one": (1, 1, 1, 1, 3),
    "vae": (1, 1, 45, 45, 512),
}


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Vaswani et al. 2017 eq. 1 in float64, one query after another."""
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for i in range(q.shape[2]):
        scores = (q[:, :, i, None] * k).sum(-1) / q.shape[-1] ** 0.5  # (B, heads, Tk)
        if mask is not None:
            scores = scores + mask.double().expand(*q.shape[:3], k.shape[2])[:, :, i]
        if is_causal:
            scores[..., i + 1 :] = -torch.inf
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * v).sum(2))
    return torch.stack(rows, dim=2)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as the networks make them: views of (B, T, heads * d)."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, queries, keys, dim = shape
    tokens = [torch.randn(batch, t, heads * dim, generator=generator).to(dtype) for t in (queries, keys, keys)]
    return [x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in tokens]


def mask_for(kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    batch, _, queries, keys, _ = shape
    seen = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[..., 0] = True
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"mask": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)},
        "bias of keys": {"mask": torch.linspace(-3, 3, keys).reshape(1, 1, 1, keys)},
    }[kind]


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "bias of keys"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_every_backend_is_the_formula(name: str, kind: str, shape: tuple[int, ...]) -> None:
    q, k, v = inputs(shape)
    extra = mask_for(kind, shape)
    before = [x.clone() for x in (q, k, v)]
    with backend(name):
        out = attention(q, k, v, **extra)
    assert out.dtype == q.dtype and out.shape == q.shape
    torch.testing.assert_close(out.double(), oracle(q, k, v, **extra), atol=1e-6, rtol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("size", [1, 77 * 4, 36 * 77 * 4, 37 * 77 * 4, 2 * 37 * 77 * 4 - 1, 2**20, 2**50])
@torch.no_grad()
def test_slices_of_any_size_are_exact(size: int) -> None:
    q, k, v = inputs(SHAPES["cross"])
    for kind in ("plain", "causal", "mask"):
        extra = mask_for(kind, SHAPES["cross"])
        with backend("sliced", bytes=size):
            out = attention(q, k, v, **extra)
        torch.testing.assert_close(out.double(), oracle(q, k, v, **extra), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_slices_of_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = inputs(SHAPES["cross"], dtype)
    with backend("sliced", bytes=5000):
        out = attention(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out, oracle(q, k, v).float().to(dtype), atol=0, rtol=torch.finfo(dtype).eps)


sizes = st.integers(1, 5000)


@given(st.integers(1, 20), sizes, sizes, st.sampled_from([4, 8]), st.integers(1, 2**31))
def test_a_slice_fits_and_none_larger_would(heads: int, queries: int, keys: int, itemsize: int, size: int) -> None:
    several, rows = slice_shape(heads, queries, keys, itemsize, size)
    row = keys * itemsize
    assert 1 <= several <= heads and 1 <= rows <= queries
    assert several == 1 or rows == queries
    assert several * rows * row <= size or (several, rows) == (1, 1)
    if rows < queries:
        assert (rows + 1) * row > size
    elif several < heads:
        assert (several + 1) * queries * row > size


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
def test_gradients(name: str, kind: str) -> None:
    shape = SHAPES["cross"]
    leaves = [x.double().requires_grad_() for x in inputs(shape)]
    extra = mask_for(kind, shape)
    extra = {key: value.double() if isinstance(value, Tensor) else value for key, value in extra.items()}
    weight = torch.randn(*shape[:3], shape[4], dtype=torch.double, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((oracle(*leaves, **extra) * weight).sum(), leaves)
    with backend(name):
        out = attention(*leaves, **extra)
    for ours, theirs in zip(torch.autograd.grad((out * weight).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_slices_keep_no_scores_for_the_way_back() -> None:
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    q, k, v = (x.requires_grad_() for x in inputs((1, 2, 256, 256, 8)))
    scores = 2 * 256 * 256 * 4
    for name, least, most in (("math", scores, 10 * scores), ("sliced:64KiB", 0, scores // 4)):
        kept.clear()
        with backend(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention(q, k, v).sum().backward()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}  # slices share theirs
        assert least <= sum(storages.values()) <= most


MEASURE = """
import torch
from mezzotint.models.attention import attention, backend

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

torch.set_grad_enabled(False)
torch.set_num_threads(1)
q = torch.randn(1, 2048, 8, 40).transpose(1, 2)
with backend("sliced:1KiB"):
    attention(q[:, :1, :8], q, q)
before = peak()
for name in ("sliced:8MiB", "sliced:32MiB", "math"):
    with backend(name):
        attention(q, q, q)
    print(peak() - before)
"""


@pytest.mark.parametrize(
    ("name", "least", "most"), [("sliced:8MiB", 8, 8 + 8), ("sliced:32MiB", 32, 32 + 8), ("math", 256, 400)]
)
def test_the_bytes_of_the_slices_are_live(name: str, least: int, most: int) -> None:
    """8 heads of 2048 tokens: a table of scores takes 128 MiB, and what is written 2.5 MiB."""
    q = torch.randn(1, 2048, 8, 40).transpose(1, 2)
    with backend(name), torch.inference_mode():
        assert least <= live_bytes(lambda: attention(q, q, q))[1] / 2**20 <= most


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_bytes_of_the_slices_are_kept() -> None:
    """8 heads of 2048 tokens: a table of scores takes 128 MiB, what is written 2.5 MiB, the allocator what it likes."""
    ran = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    small, large, whole = map(float, ran.stdout.split())
    assert 8 <= small <= 8 + 16
    assert 32 <= large <= 32 + 16
    assert whole >= 256


# ---- who chooses -----------------------------------------------------------------------------------------------------


def test_a_choice_ends_with_its_block() -> None:
    assert chosen() is None
    with backend("math"):
        assert chosen() == Backend("math")
        with backend("sliced", bytes="3MiB"):
            assert chosen() == Backend("sliced", 3 * 2**20)
        with pytest.raises(ZeroDivisionError), backend("sliced"):
            assert chosen() == Backend("sliced", 8 * 2**20)
            raise ZeroDivisionError
        assert chosen() == Backend("math")
    assert chosen() is None
    assert Backend.of("sliced:8MiB") == Backend.of("sliced") == Backend.of("sliced", 2**23)


def test_threads_do_not_see_each_others_choice() -> None:
    meet = threading.Barrier(2, timeout=30)
    seen: dict[str, Any] = {}

    def work(name: str) -> None:
        with backend(name):
            meet.wait()  # both have chosen
            seen[name] = chosen()
            meet.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("math", "sliced")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"math": Backend("math"), "sliced": Backend("sliced")}
    assert chosen() is None


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("vanilla",), RequestError, "'vanilla'; it must be one of auto, sdpa, math, sliced, xformers, flash, sage"),
        (("",), RequestError, "must be one of"),
        (("sdpa:64MiB",), RequestError, "only sliced takes one"),
        (("sdpa", 64), RequestError, "only sliced takes one"),
        (("sliced:64MiB", 64), RequestError, "sliced:64MiB"),
        (("sliced", 0), BudgetError, "more than 0"),
        (("sliced:0",), BudgetError, "attention's size is '0'; it must be more than 0"),
        (("sliced:many",), BudgetError, "a size such as 4GiB, 600MB$"),
        (("sliced:4 gigs",), BudgetError, "4 gigs"),
    ],
)
def test_what_is_no_backend(arguments: tuple[Any, ...], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence), backend(arguments[0], bytes=arguments[1] if arguments[1:] else None):
        pass
    assert chosen() is None


# ---- the networks ----------------------------------------------------------------------------------------------------


def unet() -> tuple[UNet, tuple[Tensor, float, Condition]]:
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return UNet(config).eval(), (torch.randn(2, 4, 9, 7), 500.0, Condition(torch.randn(2, 11, 24)))


def clip() -> tuple[CLIPTextModel, tuple[Tensor]]:
    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPConfig(
            vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=16,
        )
    )  # fmt: skip
    return model, (torch.randint(0, 99, (2, 77)),)


def vae() -> tuple[Callable[[Tensor], Tensor], tuple[Tensor]]:
    torch.manual_seed(0)
    return VAE(VAEConfig(block_out_channels=(8,) * 4, norm_num_groups=4)).decode, (torch.randn(1, 4, 9, 13),)


@pytest.mark.parametrize("network", [unet, clip, vae])
@pytest.mark.parametrize("name", ["math", "sliced:1KiB", "sliced"])
@torch.no_grad()
def test_a_network_is_the_same_under_each(network: Callable[[], Any], name: str) -> None:
    model, arguments = network()
    with backend("sdpa"):
        expected = model(*arguments)
    calls: list[str] = []
    with backend(name), pytest.MonkeyPatch.context() as patch:
        call = Backend.__call__
        patch.setattr(Backend, "__call__", lambda self, *rest: calls.append(self.name) or call(self, *rest))
        found = model(*arguments)
    assert set(calls) == {name.partition(":")[0]}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EVERYWHERE)
@torch.no_grad()
def test_a_recorder_is_handed_queries_and_keys_under_each(name: str) -> None:
    model, arguments = unet()
    seen: list[Tensor] = []
    with backend("sdpa"), recording(lambda layer, q, k: seen.append(probabilities(q, k))):
        model(*arguments)
    expected = list(seen)
    seen.clear()
    with backend(name), recording(lambda layer, q, k: seen.append(probabilities(q, k))):
        model(*arguments)
    assert len(seen) == len(expected) == 4
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# ---- packages --------------------------------------------------------------------------------------------------------

LAYOUT = """
import torch
import torch.nn.functional as F

calls = []

class LowerTriangularMask: pass

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    calls.append(tuple(query.shape))
    assert query.shape[::2] == (2, 3), "(B, T, heads, d)"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=isinstance(attn_bias, LowerTriangularMask))
    return out.transpose(1, 2).contiguous()

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return memory_efficient_attention(q, k, v, LowerTriangularMask() if causal else None)

def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True):
    calls.append(tuple(q.shape))
    assert tensor_layout == "HND" and q.shape[-1] in (64, 128)
    k -= k.mean(dim=2, keepdim=True)  # as version 1 does, in place
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a stand-in of a package where Python finds it; its backend then takes the CPU and float32."""

    def forget() -> None:
        for cached in (backends._say, backends._is_installed, backends._import):
            cached.cache_clear()
        for module in [name for name in sys.modules if name.partition(".")[0] in roots.values()]:
            del sys.modules[module]

    def put(name: str, code: str = LAYOUT, cpu: bool = True, **others: str) -> None:
        folder = tmp_path / roots[name]
        folder.mkdir()
        (folder / "__init__.py").write_text("" if name == "xformers" else code)
        for file, text in {"ops": code, **others}.items():
            (folder / f"{file}.py").write_text(text)
        (tmp_path / f"{roots[name]}-0.0.7.dist-info").mkdir()
        (tmp_path / f"{roots[name]}-0.0.7.dist-info" / "METADATA").write_text(f"Name: {roots[name]}\nVersion: 0.0.7\n")
        if cpu:
            able = dataclasses.replace(PACKAGES[name], devices=("cpu",), dtypes=(torch.float32,))
            monkeypatch.setitem(PACKAGES, name, able)

    roots = {name: package.module.partition(".")[0] for name, package in PACKAGES.items()}
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield put
    monkeypatch.undo()
    forget()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mezzotint"]


def stand_in(name: str) -> ModuleType:
    return sys.modules[PACKAGES[name].module]


@pytest.mark.parametrize("name", [*PACKAGES, "auto"])
@pytest.mark.parametrize("kind", ["plain", "causal"])
@torch.no_grad()
def test_a_package_is_called_in_its_own_layout(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture, name: str, kind: str
) -> None:
    package = "xformers" if name == "auto" else name
    install(package)
    shape = (2, 3, 12, 12, 40)
    q, k, v = inputs(shape)
    keys = k.clone()
    extra = mask_for(kind, shape)
    with backend(name):
        out = attention(q, k, v, **extra)
    assert stand_in(package).calls == [(2, 3, 12, 64) if name == "sage" else (2, 12, 3, 40)]
    torch.testing.assert_close(out.double(), oracle(q, k, v, **extra), atol=1e-6, rtol=1e-6)
    assert torch.equal(k, keys), "the run's keys serve the next step too"
    assert lines(caplog) == []


@torch.no_grad()
def test_sage_pads_heads_and_keeps_the_keys_of_those_it_need_not_pad(install: Callable[..., None]) -> None:
    install("sage")
    for dim, padded in ((64, 64), (80, 128), (128, 128)):
        q, k, v = inputs((2, 3, 12, 12, dim))
        keys = k.clone()
        with backend("sage"):
            out = attention(q, k, v)
        assert stand_in("sage").calls[-1][-1] == padded
        torch.testing.assert_close(out.double(), oracle(q, k, v), atol=1e-6, rtol=1e-6)
        assert torch.equal(k, keys)


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "masks": ({"kind": "mask"}, "is given no masks"),
    "dtype": ({"dtype": torch.float64}, "takes float32, not float64"),
    "head size": ({"shape": (2, 3, 12, 12, 41)}, "not of 41"),
    "causal": ({"shape": (2, 3, 12, 13, 40), "kind": "causal"}, "causal"),
}


@pytest.mark.parametrize("name", ["xformers", "auto"])
@pytest.mark.parametrize("why", CANNOT)
@torch.no_grad()
def test_what_a_package_cannot_sdpa_does_with_one_line(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture, name: str, why: str
) -> None:
    install("xformers")
    caplog.set_level(logging.INFO, "mezzotint")
    case, sentence = CANNOT[why]
    shape = case.get("shape", (2, 3, 12, 12, 40))
    q, k, v = inputs(shape, case.get("dtype", torch.float32))
    extra = mask_for(case.get("kind", "plain"), shape)
    extra = {key: value.to(q.dtype) if isinstance(value, Tensor) else value for key, value in extra.items()}
    with backend(name):
        out = [attention(q, k, v, **extra) for _ in range(3)][-1]
    torch.testing.assert_close(out.double(), oracle(q, k, v, **extra), atol=1e-6, rtol=1e-6)
    (line,) = lines(caplog)
    assert line.startswith("attention: xformers ") and sentence in line and line.endswith("sdpa does it")
    (record,) = caplog.records
    assert record.levelno == (logging.INFO if name == "auto" else logging.WARNING)


@torch.no_grad()
def test_on_the_cpu_xformers_gives_way(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    install("xformers", cpu=False)
    q, k, v = inputs(SHAPES["self"])
    with backend("xformers"):
        out = attention(q, k, v)
    assert torch.equal(out, backends.sdpa(q, k, v))
    assert lines(caplog) == ["attention: xformers runs on cuda only, not on cpu; sdpa does it"]
    assert "xformers" in dict(available())["xformers"] or "0.0.7" in dict(available())["xformers"]


@pytest.mark.parametrize("name", ["xformers", "auto"])
@pytest.mark.parametrize("error", ["NotImplementedError", "ValueError", "RuntimeError"])
@torch.no_grad()
def test_a_kernel_that_fails_is_replaced(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture, name: str, error: str
) -> None:
    install("xformers", f"def memory_efficient_attention(*x, **y): raise {error}('No operator\\nfound')")
    q, k, v = inputs(SHAPES["self"])
    with backend(name):
        assert torch.equal(attention(q, k, v), backends.sdpa(q, k, v))
        attention(q, k, v)
    assert lines(caplog) == ["attention: xformers failed: No operator; sdpa does it"]


def test_memory_that_runs_out_is_no_reason_to_try_again(install: Callable[..., None]) -> None:
    install("xformers", "import torch\ndef memory_efficient_attention(*x, **y): raise torch.OutOfMemoryError('full')")
    with backend("auto"), pytest.raises(torch.OutOfMemoryError, match="full"):
        attention(*inputs(SHAPES["self"]))


CPP = """
class Reason(Exception):
    def __str__(self): return "xFormers was built for: PyTorch 2.4.1 (you have another)"
_cpp_library_load_exception = Reason()
"""
BROKEN = {
    "ImportError": ("raise ImportError('undefined symbol: _ZN3c10, built for torch 2.4.1')", {}),
    "OSError": ("raise OSError('libtorch_cuda.so of torch 2.4.1')", {}),
    "RuntimeError": ("raise RuntimeError('torch 2.4.1 wanted')", {}),
    "quietly": ("from xformers import _cpp_lib\n" + LAYOUT, {"_cpp_lib": CPP}),
}


@pytest.mark.parametrize("how", BROKEN)
@torch.no_grad()
def test_xformers_of_another_torch(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    code, others = BROKEN[how]
    install("xformers", code, **others)
    with pytest.raises(MissingExtraError) as raised, backend("xformers"):
        pass
    sentence = str(raised.value)
    for word in ("xformers 0.0.7", torch.__version__, "2.4.1", "pip install"):
        assert word in sentence
    q, k, v = inputs(SHAPES["self"])
    with backend("auto"):
        assert torch.equal(attention(q, k, v), backends.sdpa(q, k, v))
        attention(q, k, v)
    (line,) = lines(caplog)
    assert "xformers 0.0.7 does not work with torch" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "0.0.7 does not work with torch" in dict(available())["xformers"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed(name: str, install: Callable[..., None], monkeypatch: Any) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    missing = pytest.raises(MissingExtraError, match=rf"attention backend {name} is not installed: pip install \S+")
    with missing, backend(name):
        pass
    assert dict(available())[name].startswith("not installed: pip install")
    assert list(dict(available())) == list(NAMES)
    assert dict(available())["sliced"] == dict(available())["auto"] == "available"


# ---- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Equal to the formula, and in less memory than its tables: 2 x 8 x 2048 x 2048 numbers, twice."""
    if name in PACKAGES and not dict(available())[name].startswith("available"):
        pytest.skip(dict(available())[name])
    q, k, v = (x.cuda() for x in inputs((2, 8, 2048, 2048, 40), dtype))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with backend(name, bytes=2**23 if name == "sliced" else None):
        out = attention(q, k, v)
    grown = torch.cuda.max_memory_allocated() - before
    expected = backends.plain(q.double(), k.double(), v.double())
    error = (out.double() - expected).abs().max().item()
    assert error <= (0.05 if name == "sage" else {4: 1e-4, 2: 2e-2}[dtype.itemsize])
    assert name == "math" or grown < 2 * 8 * 2048 * 2048 * dtype.itemsize
