"""The implementations of attention.

| name | implementation | exact |
|---|---|---|
| sdpa | torch's scaled_dot_product_attention | yes |
| math | softmax(q kᵀ) v with all scores in memory, for comparison | yes |
| sliced | the same for a few heads and queries at a time, whose scores fit into a number of bytes | yes |
| xformers, flash | the memory-efficient kernels of xformers and flash-attn; CUDA | yes |
| sage | SageAttention: queries and keys in int8; CUDA | no |
| auto | our own kernel on the CPU, xformers where it supports the call, otherwise sdpa; never raises | yes |

Where a package does not support a mask, device, dtype or head size, sdpa is used, and each reason is logged once.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.kernels import attention as kernel
from mezzotint.kernels import is_eager
from mezzotint.placement import DEFAULT_SLICE_BYTES, parse_size

log = logging.getLogger("mezzotint")


@dataclass(frozen=True)
class Backend:
    """A chosen backend: its name, and for `sliced` the bytes that the scores may take."""

    name: str = "auto"
    bytes: int = DEFAULT_SLICE_BYTES

    @classmethod
    def of(cls, text: str, size: int | str | None = None) -> Backend:
        """Parse a backend.

        Args:
            text: Its name, also with the memory for the scores, as in "sliced:64MiB".
            size: That memory, if it is not in the text.

        Raises:
            RequestError: If there is no such backend, or it takes no size.
            BudgetError: If the size is not one.
            MissingExtraError: If the package is not installed or does not work.
        """
        name, _, written = text.partition(":")
        if name not in NAMES or (size is not None and written):
            raise RequestError(f"attention is {text!r}; it must be one of {', '.join(NAMES)}, or sliced:64MiB")
        if name != "sliced" and (written or size is not None):
            raise RequestError(f"attention is {text!r} with a size; only sliced takes one")
        if name in PACKAGES and isinstance(found := _import(name), str):
            raise MissingExtraError(f"attention backend {name} {found}")
        return cls(name, parse_size((written or DEFAULT_SLICE_BYTES) if size is None else size, "attention's size"))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Compute attention, as `attention.attention` does."""
        if self.name == "sliced":
            return sliced(q, k, v, mask, is_causal, self.bytes)
        if self.name == "math":
            return plain(q, k, v, mask, is_causal)
        if self.name == "auto" and kernel.is_supported(q, k, v, mask, is_causal):
            return kernel.attend(q, k, v)
        if self.name == "auto" and _is_trainable(q, k, v, mask, is_causal):
            y: Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
            return y
        package = "xformers" if self.name == "auto" else self.name
        if package in PACKAGES and (self.name != "auto" or _is_installed(package)):
            return _foreign(package, q, k, v, mask, is_causal, asked=self.name != "auto")
        return sdpa(q, k, v, mask, is_causal)


def _is_trainable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Tell whether `_Attention` can be used, where gradients are wanted."""
    if not torch.is_grad_enabled() or not is_eager(q, k, v):
        return False
    return kernel.is_supported(q.detach(), k.detach(), v.detach(), mask, is_causal)


class _Attention(torch.autograd.Function):
    """Attention with our own kernel in the forward pass and torch's fused kernel in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, logsumexp = kernel.attend_with_logsumexp(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients: tuple[Tensor, Tensor, Tensor] = backward(gradient, *ctx.saved_tensors, 0.0, False)
        return gradients


# ---- torch's, and the plain formula ----------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute attention with torch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute softmax(q kᵀ / sqrt(d) + mask) v in the dtype of q, with two tensors (B, heads, Tq, Tk) in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, Tq, Tk)
    if mask is not None:
        scores = scores + mask
    if is_causal:
        scores = scores.masked_fill(_after(0, q.shape[2], k), -torch.inf)
    y: Tensor = scores.softmax(dim=-1) @ v
    return y


def sliced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    size: int = DEFAULT_SLICE_BYTES,
) -> Tensor:
    """Compute `plain`, at least in float32, for a slice of the heads and queries at a time.

    The scores of a slice take at most `size` bytes, or those of a single query if they take more. With gradients, each
    slice is recomputed in the backward pass, and its three tensors of scores share `size`.
    """
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    several, rows = slice_shape(heads, queries, keys, dtype.itemsize, size // (3 if learning else 1))
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)

    def part(b: int, h: int, i: int, table: Tensor | None = None) -> Tensor:
        """Return the slice of picture b that begins at head h and query i, (several, rows, d)."""
        some, these = slice(h, h + several), slice(i, i + rows)
        bias = None if mask is None else mask[b, some, these].to(dtype)
        a, c, d = (x.to(dtype) for x in (q[b, some, these], k[b, some], v[b, some]))
        if is_causal:
            later = _after(i, a.shape[1], k)
            bias = a.new_zeros(later.shape).masked_fill(later, -torch.inf)
        a = a * a.shape[-1] ** -0.5
        if table is not None:
            return _in_place(a, c, d, bias, table).to(v.dtype)
        y: Tensor = checkpoint(_slice, a, c, d, bias, use_reentrant=False)
        return y.to(v.dtype)

    starts, firsts = range(0, heads, several), range(0, queries, rows)
    if learning:
        pictures = [torch.cat([torch.cat([part(b, h, i) for i in firsts], 1) for h in starts]) for b in range(batch)]
        return torch.stack(pictures)
    out = v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)  # so that the heads are joined without a copy
    table = q.new_empty(several * rows * keys, dtype=dtype)
    for b in range(batch):
        for h in starts:
            for i in firsts:
                out[b, h : h + several, i : i + rows] = part(b, h, i, table)
    return out


def slice_shape(heads: int, queries: int, keys: int, itemsize: int, size: int) -> tuple[int, int]:
    """Return (heads, queries) of a slice whose scores take at most `size` bytes: whole heads, or queries of one."""
    row = keys * itemsize
    several = min(heads, size // (queries * row))
    return (several, queries) if several else (1, min(queries, max(1, size // row)))


def _slice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Compute attention from scaled queries (n, rows, d) to k and v (n, Tk, d)."""
    scores = q @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def _in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
    """Compute `_slice` without gradients, with scores and probabilities in the memory of `table`."""
    shape = (*q.shape[:2], k.shape[1])
    scores = torch.bmm(q, k.transpose(-2, -1), out=table[: q.shape[0] * q.shape[1] * k.shape[1]].view(shape))
    if bias is not None:
        scores += bias
    return torch.softmax(scores, dim=-1, out=scores) @ v  # each row is read before it is written


def _after(first: int, rows: int, k: Tensor) -> Tensor:
    """Return whether each key comes after each query, for queries from `first`: boolean, (rows, Tk)."""
    return torch.ones(rows, k.shape[2], dtype=torch.bool, device=k.device).triu(first + 1)


# ---- the packages ----------------------------------------------------------------------------------------------------


def _xformers(package: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    bias = package.LowerTriangularMask() if is_causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, heads, d)
    y: Tensor = package.memory_efficient_attention(q, k, v, attn_bias=bias)
    return y.transpose(1, 2)


def _flash(package: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, heads, d)
    y: Tensor = package.flash_attn_func(q, k, v, causal=is_causal)
    return y.transpose(1, 2)


def _sage(package: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    dim = q.shape[-1]
    spare = (64 if dim <= 64 else 128) - dim  # its kernels are of these head sizes; zeros change no product
    q, k, v = (F.pad(x, (0, spare)) if spare else x for x in (q, k, v))
    k = k if spare else k.clone()  # SageAttention 1 takes the mean off its keys in place, and ours serve the whole run
    y: Tensor = package.sageattn(q, k, v, tensor_layout="HND", is_causal=is_causal, sm_scale=dim**-0.5)
    return y[..., :dim]


HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Package:
    """A package that computes attention: how to import, install and call it, and the inputs that it supports."""

    module: str
    install: str
    dtypes: tuple[torch.dtype, ...]
    largest: int  # head size
    multiple: int  # of which the head size must be one
    call: Callable[[Any, Tensor, Tensor, Tensor, bool], Tensor]
    devices: tuple[str, ...] = ("cuda",)

    def unable(self, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> str | None:
        """Return why the package does not support this call, or None."""
        if q.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only, not on {q.device.type}"
        if q.dtype not in self.dtypes:
            return f"takes {', '.join(str(dtype)[6:] for dtype in self.dtypes)}, not {str(q.dtype)[6:]}"
        if q.shape[-1] > self.largest or q.shape[-1] % self.multiple:
            return f"takes heads of at most {self.largest}, multiples of {self.multiple}, not of {q.shape[-1]}"
        if mask is not None:
            return "is given no masks"  # each has its own rules for them; they are 77 tokens long
        if is_causal and q.shape[2] != k.shape[2]:
            return "counts the tokens of a causal call from the other end"
        return None


PACKAGES = {
    "xformers": Package(
        "xformers.ops", "pip install 'mezzotint[xformers]'", (*HALF, torch.float32), 2**16, 8, _xformers
    ),
    "flash": Package("flash_attn", "pip install flash-attn --no-build-isolation", HALF, 256, 8, _flash),
    "sage": Package("sageattention", "pip install sageattention", HALF, 128, 1, _sage),
}
NAMES = ("auto", "sdpa", "math", "sliced", *PACKAGES)


def _foreign(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, asked: bool) -> Tensor:
    """Compute attention with a package, or with SDPA for inputs that it does not support.

    Warn about those if the backend was `asked` for by name.
    """
    package = PACKAGES[name]
    level = logging.WARNING if asked else logging.INFO
    reason = package.unable(q, k, mask, is_causal)
    if reason is None:
        level = logging.WARNING
        found = _import(name)
        if isinstance(found, str):
            reason = found
        else:
            try:
                return package.call(found, q, k, v, is_causal)
            except torch.OutOfMemoryError:
                raise  # sdpa would need as much
            except (RuntimeError, ValueError, AssertionError) as error:
                reason = f"failed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    _say(level, f"attention: {name} {reason}; sdpa does it")
    return sdpa(q, k, v, mask, is_causal)


@functools.cache
def _say(level: int, line: str) -> None:
    """Log a line once."""
    log.log(level, line)


@functools.cache
def _is_installed(name: str) -> bool:
    return find_spec(PACKAGES[name].module.partition(".")[0]) is not None


@functools.cache
def _import(name: str) -> Any:
    """Import a package once and return its module, or a sentence that says why it cannot be used."""
    package = PACKAGES[name]
    if not _is_installed(name):
        return f"is not installed: {package.install}"
    try:
        module = importlib.import_module(package.module)
        # xformers built for another torch says so on import, and then keeps the reason here
        broken = getattr(sys.modules.get("xformers._cpp_lib"), "_cpp_library_load_exception", None)
        if name != "xformers" or broken is None:
            return module
        why = str(broken)
    except Exception as error:  # a package built for another torch may raise anything
        why = str(error) or type(error).__name__
    why = " ".join(why.split()).partition(" Please ")[0][:300]
    return f"{_version(name)} does not work with torch {torch.__version__} ({why}): {package.install} for this torch"


def _version(name: str) -> str:
    try:
        return version(PACKAGES[name].module.partition(".")[0])
    except PackageNotFoundError:
        return "of unknown version"


def available() -> Iterator[tuple[str, str]]:
    """Yield each backend with "available" or the reason why it is not. Packages are imported only if there is a GPU."""
    for name in NAMES:
        if name not in PACKAGES:
            yield name, "available"
        elif not _is_installed(name):
            yield name, f"not installed: {PACKAGES[name].install}"
        elif not torch.cuda.is_available():
            yield name, f"{_version(name)} is installed, but it needs a CUDA device, and there is none"
        else:
            found = _import(name)
            yield name, found if isinstance(found, str) else f"available, {_version(name)}"
