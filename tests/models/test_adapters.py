"""Changes put on for a run, or merged: against the weight that their papers write, W + s ΔW, set by hand."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import UNetConfig
from mezzotint.models.adapters import (
    Change,
    Changes,
    Decomposed,
    Full,
    Hadamard,
    Kronecker,
    LayerChange,
    LowRank,
    apply_adapters,
    is_adapted,
    merge,
)
from mezzotint.models.checkpointing import checkpointing
from mezzotint.models.convolution import Conv2d, seamless
from mezzotint.models.offload import StoredWeight, offload_weight
from mezzotint.models.relative_adapters import Generalized
from mezzotint.models.unet import Condition, UNet


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


def net(layer: nn.Module) -> dict[str, nn.Module]:
    return {"unet": nn.Sequential(layer)}


def kinds() -> dict[str, tuple[nn.Module, Tensor, Change, Tensor]]:
    """Layer, its input, the change, and ΔW written out another way than the change's own."""
    torch.manual_seed(0)
    linear, conv, norm = nn.Linear(6, 8), Conv2d(6, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 6)
    x, picture = r(2, 5, 6), r(2, 6, 8, 10)
    down, up, mid = r(3, 6), r(8, 3), r(3, 3, 3, 3)
    a, b, c, d = r(8, 2), r(2, 6), r(8, 2), r(2, 6)
    ca, cb, cc, cd = r(8, 2), r(2, 54), r(8, 2), r(2, 54)
    t1, t2, p, q, s, t = r(2, 2, 3, 3), r(2, 2, 3, 3), r(2, 8), r(2, 6), r(2, 8), r(2, 6)
    w1, w2, k2 = r(2, 3), r(4, 2), r(4, 2, 3, 3)
    tucker = torch.einsum("oi,ijkl,jc->ockl", up, mid, down)
    first, second = (torch.einsum("ijkl,io,jc->ockl", *three) for three in ((t1, p, q), (t2, s, t)))
    blocks = torch.cat([torch.cat([w1[i, j] * k2 for j in range(3)], 1) for i in range(2)])
    moved, size = linear.weight.detach() + 2 * up @ down, torch.rand(8) + 0.5
    rows = size[:, None] * moved / moved.norm(dim=1, keepdim=True) - linear.weight.detach()
    columns = size[:6] * moved / moved.norm(dim=0, keepdim=True) - linear.weight.detach()
    return {
        "low rank": (linear, x, LowRank(down, up, factor=2), 2 * up @ down),
        "low rank, written as a convolution": (
            linear,
            x,
            LowRank(down[..., None, None], up[..., None, None]),
            up @ down,
        ),
        "low rank of a convolution": (
            conv,
            picture,
            LowRank((r3 := r(3, 6, 3, 3)), up[..., None, None], factor=0.5),
            0.5 * torch.einsum("or,rckl->ockl", up, r3),
        ),
        "Tucker": (conv, picture, LowRank(down[..., None, None], up[..., None, None], mid, 0.5), 0.5 * tucker),
        "Hadamard": (linear, x, Hadamard(a, b, c, d, factor=0.5), 0.5 * (a @ b) * (c @ d)),
        "Hadamard of a convolution": (
            conv,
            picture,
            Hadamard(ca, cb, cc, cd),
            ((ca @ cb) * (cc @ cd)).view(8, 6, 3, 3),
        ),
        "Hadamard, Tucker": (conv, picture, Hadamard(p, q, s, t, t1, t2), first * second),
        "Kronecker": (linear, x, Kronecker(w1=w1, w2=w2), torch.kron(w1, w2)),
        "Kronecker of a convolution": (conv, picture, Kronecker(w1=w1, w2=k2, factor=3), 3 * blocks),
        "Kronecker of products": (
            linear,
            x,
            Kronecker(w1_a=(r21 := r(2, 1)), w1_b=(r13 := r(1, 3)), w2_a=(r41 := r(4, 1)), w2_b=(r12 := r(1, 2))),
            torch.kron(r21 @ r13, r41 @ r12),
        ),
        "full": (conv, picture, Full(k := r(8, 6, 3, 3)), k),
        "norm": (norm, picture, Full(n := r(6)), n),
        "layer norm": (nn.LayerNorm(6), x, Full(n), n),
        "decomposed": (linear, x, Decomposed(LowRank(down, up, factor=2), size), rows),
        "decomposed along its inputs": (linear, x, Decomposed(LowRank(down, up, factor=2), size[:6], True), columns),
    }


@pytest.mark.parametrize("kind", kinds())
def test_at_run_time_and_merged_it_is_the_weight_moved(kind: str) -> None:
    layer, x, change, delta = kinds()[kind]
    bias = r(len(layer.bias))
    expected = deepcopy(layer)
    with torch.no_grad():
        expected.weight += 0.7 * delta
        expected.bias += 0.7 * bias
    changes: Changes = {"unet.0": [(LayerChange(change, bias), 0.7)]}
    networks = net(layer)
    plain = layer(x)
    for way in ("", "x"):
        with seamless(way):
            with apply_adapters(networks, changes):
                at_run_time = layer(x)
            torch.testing.assert_close(at_run_time, expected(x), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        change.delta(layer.weight.detach()), delta.view(layer.weight.shape), atol=1e-5, rtol=1e-5
    )
    before = layer.weight, layer.bias, layer.weight.detach().clone()
    merged = merge(networks, changes)
    torch.testing.assert_close(layer(x), expected(x), atol=2e-5, rtol=1e-5)
    merged.undo()
    assert layer.weight is before[0] and layer.bias is before[1] and torch.equal(layer.weight, before[2])
    assert torch.equal(layer(x), plain)


def test_several_add_up_and_other_layers_stay() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x, one, two = r(3, 4), LowRank(r(2, 4), r(4, 2)), Full(r(4, 4))
    with apply_adapters({"unet": network}, {"unet.1": [(LayerChange(one), 0.5), (LayerChange(two), -2.0)]}):
        assert is_adapted(network[1]) and not is_adapted(network[0])
        found = network(x)
    weight = network[1].weight + 0.5 * one.product() - 2 * two.product()
    torch.testing.assert_close(found, F.linear(network[0](x), weight, network[1].bias), atol=1e-5, rtol=1e-5)
    assert not is_adapted(network[1])


def test_each_thread_has_its_own() -> None:
    """Two threads in one network, each with another change, and one with none, all at once."""
    torch.manual_seed(2)
    networks = net(nn.Linear(4, 4))
    x = r(3, 4)
    changes = [Full(r(4, 4)), Full(r(4, 4)), None]
    expected, found, meet = [], [torch.empty(0)] * 3, threading.Barrier(3)
    for change in changes:
        weight = networks["unet"][0].weight + (0 if change is None else change.product())  # type: ignore[index]
        expected.append(F.linear(x, weight, networks["unet"][0].bias))  # type: ignore[index]

    def run(k: int, change: Change | None) -> None:
        own: Changes = {} if change is None else {"unet.0": [(LayerChange(change), 1.0)]}
        with apply_adapters(networks, own):
            for _ in range(20):
                meet.wait()
                found[k] = networks["unet"](x)

    threads = [threading.Thread(target=run, args=(k, change)) for k, change in enumerate(changes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y, want in zip(found, expected, strict=True):
        torch.testing.assert_close(y, want)


def tiny() -> UNet:
    torch.manual_seed(3)
    return UNet(
        UNetConfig(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    ).eval()


def everywhere(unet: UNet) -> Changes:
    """A change of each kind of layer, among them one projection of three that are fused."""
    torch.manual_seed(4)
    ends = ("attn1.to_q", "attn2.to_v", "ff.net.2", "conv1", "norm2", "time_emb_proj", "conv_in", "conv_out")
    return {
        f"unet.{name}": [(LayerChange(Full(0.3 * torch.randn_like(layer.weight))), 1.0)]  # type: ignore[arg-type]
        for name, layer in unet.named_modules()
        if name.endswith(ends)
    }


def test_a_whole_unet_fused_and_under_checkpointing() -> None:
    """Outputs equal those of the merged weights; so do gradients, where blocks are computed again."""
    unet = tiny()
    changes, sample = everywhere(unet), r(1, 4, 8, 8).requires_grad_()
    inputs = sample, 7.0, Condition(r(1, 5, 8))
    unet.requires_grad_(False)
    unet.fuse_projections()
    undo = merge({"unet": unet}, changes)
    expected = unet(*inputs)
    (slope,) = torch.autograd.grad(expected.square().sum(), sample)
    undo.undo()
    with apply_adapters({"unet": unet}, changes), torch.no_grad():
        torch.testing.assert_close(unet(*inputs), expected.detach(), atol=1e-4, rtol=1e-4)
    with checkpointing(unet), apply_adapters({"unet": unet}, changes):
        found = unet(*inputs)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), sample)[0], slope, atol=1e-3, rtol=1e-3)


def test_held_weights() -> None:
    """A layer whose weight is kept in 8 bits: at run time and merged, from what it is there; and back."""
    torch.manual_seed(5)
    layer, x = nn.Linear(8, 8), r(2, 8)
    change = Decomposed(LowRank(r(2, 8), r(8, 2)), torch.rand(8))
    offload_weight(
        layer, StoredWeight.from_tensor(layer.weight.detach().clone(), "int8"), torch.float32, torch.device("cpu")
    )
    networks, changes = net(layer), {"unet.0": [(LayerChange(change), 1.0)]}
    kept, plain = layer.weight_source, layer(x)  # type: ignore[attr-defined]
    expected = F.linear(x, layer.weight + change.delta(layer.weight), layer.bias)
    with apply_adapters(networks, changes):
        torch.testing.assert_close(layer(x), expected)
    merged = merge(networks, changes)
    torch.testing.assert_close(layer(x), expected)
    merged.undo()
    assert layer.weight_source is kept and torch.equal(layer(x), plain)  # type: ignore[attr-defined]


def test_a_merged_weight_is_rounded_once_and_in_its_format() -> None:
    layer = Conv2d(4, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    own, change = layer.weight.detach().clone(), Full(torch.randn(4, 4, 3, 3) * 1e-3)
    merge(net(layer), {"unet.0": [(LayerChange(change), 1.0), (LayerChange(change), 1.0)]})
    assert torch.equal(layer.weight, (own.float() + 2 * change.diff).bfloat16())
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_copy_of_a_network_with_hooks_has_them() -> None:
    """nan_guard.py runs a copy in float32 where half precision fails."""
    layer, x = nn.Linear(4, 4), r(2, 4)
    networks, changes = net(layer), {"unet.0": [(LayerChange(Full(r(4, 4))), 1.0)]}
    with apply_adapters(networks, changes):
        torch.testing.assert_close(
            deepcopy(networks["unet"]).double()(x.double()), networks["unet"](x).double(), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(6, 8, 3, padding=1)])
def test_decomposed_is_pefts(layer: nn.Module) -> None:
    """At the scale 1; for another one ours is another (docs/lora.md)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    own, x = deepcopy(layer), r(2, 6) if isinstance(layer, nn.Linear) else r(1, 6, 5, 5)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=True)
    theirs = get_peft_model(nn.Sequential(layer), config).eval()
    wrapped = theirs.base_model.model[0]
    with torch.no_grad():
        down, up = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight.normal_()
        magnitude = wrapped.lora_magnitude_vector["default"].weight
        magnitude.mul_(torch.rand_like(magnitude) + 0.5)
        with apply_adapters(
            net(own), {"unet.0": [(LayerChange(Decomposed(LowRank(down, up), magnitude.flatten())), 1.0)]}
        ):
            torch.testing.assert_close(own(x), theirs(x), atol=1e-5, rtol=1e-5)


SHAPES = [(8,), (8, 6), (8, 6, 1, 1), (8, 6, 3, 3), (6, 8)]
DOWNS = [(4,), (4, 6), (4, 6, 1, 1), (4, 6, 3, 3), (4, 54), (3, 6), (4, 6, 9)]
UPS = [(8,), (8, 4), (8, 4, 1, 1), (8, 4, 2, 2), (8, 3), (6, 4)]
MIDS = [None, (4, 4, 3, 3), (4, 4, 1, 1), (4, 3, 3, 3), (4, 4)]


@pytest.mark.parametrize("mid", MIDS)
def test_a_low_rank_change_fits_where_its_product_has_the_shape(mid: tuple[int, ...] | None) -> None:
    fitting = 0
    for down, up, shape in itertools.product(DOWNS, UPS, SHAPES):
        change = LowRank(torch.ones(down), torch.ones(up), None if mid is None else torch.ones(mid))
        rest = change.down.shape[1:]
        try:
            product = tuple(change.product().shape)
            flat = (shape[0], math.prod(shape[1:]))
            expected = product in (shape, flat, (*shape, 1, 1)) or (*product, 1, 1) == shape
            # LoRA's down and up are a convolution of the layer's size and one of 1x1
            expected &= mid is not None or rest in (shape[1:], (*shape[1:], 1, 1)) or (*rest, 1, 1) == shape[1:]
        except (RuntimeError, IndexError, ValueError):
            expected = False
        try:
            found = change.fits(shape)
        except (IndexError, ValueError):  # refused, as `find_mismatch` reads it
            found = False
        assert found == expected, (down, up, shape)
        fitting += found
    assert fitting or mid in ((4, 3, 3, 3), (4, 4))


PAIRS = list(itertools.product([None, (4, 4, 3, 3), (4, 3, 3, 3), (4, 4)], [(8, 4), (4, 8), (8, 3)], [(4, 6), (3, 6)]))


def shape_of(change: Change) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the shape of a change's product and its `shape()`, each None where there is none."""
    try:
        product = tuple(change.product().shape)
    except (RuntimeError, IndexError, ValueError):
        product = None
    try:
        return product, change.shape()
    except ValueError:
        return product, None


def ones(*shapes: tuple[int, ...] | None) -> list[torch.Tensor | None]:
    return [None if shape is None else torch.ones(shape) for shape in shapes]


def test_the_shape_of_a_hadamard_change_is_that_of_its_product() -> None:
    found = set()
    for (t1, w1_a, w1_b), (t2, w2_a, w2_b) in itertools.product(PAIRS, PAIRS):
        product, shape = shape_of(Hadamard(*ones(w1_a, w1_b, w2_a, w2_b, t1, t2)))  # type: ignore[arg-type]
        assert product == shape, (w1_a, w1_b, w2_a, w2_b, t1, t2)
        found.add(shape)
    assert found == {None, (8, 6), (8, 6, 3, 3)}


def test_the_shape_of_a_kronecker_change_is_that_of_its_product() -> None:
    found = set()
    wholes = [(2, 3), (2, 3, 3, 3), None]
    for w1, w2, (_, w1_a, w1_b), (t2, w2_a, w2_b) in itertools.product([(2, 3), None], wholes, PAIRS, PAIRS):
        product, shape = shape_of(Kronecker(*ones(w1, w1_a, w1_b, w2, w2_a, w2_b, t2)))
        assert product == shape, (w1, w1_a, w1_b, w2, w2_a, w2_b, t2)
        found.add(shape)
    assert {None, (4, 9), (4, 9, 3, 3), (16, 18, 3, 3), (64, 36), (64, 36, 3, 3)} <= found


def test_a_generalized_change_fits_where_its_product_has_the_shape() -> None:
    for a1, a2 in itertools.product([(6, 4), (4, 6), (8, 4), (6, 3)], [(4, 6), (3, 6), (4, 8), (6, 4)]):
        change = Generalized(LowRank(torch.ones(4, 6), torch.ones(8, 4)), torch.ones(a1), torch.ones(a2))
        try:
            expected = tuple(change.product().shape) == (6, 6)
        except RuntimeError:
            expected = False
        try:
            found = change.fits((8, 6))
        except ValueError:
            found = False
        assert found == expected, (a1, a2)


def test_a_shape_imports_no_compiler() -> None:
    """On the meta device, a product of matrices imports sympy, and torch.kron imports torch._dynamo: 2 s and 70 MB."""
    script = """
import sys
import torch
from mezzotint.weights.lora_changes import find_mismatch
down, up = (4, 6), (8, 4)
files = [
    {"down": down, "up": up},
    {"w1_a": up, "w1_b": down, "w2_a": up, "w2_b": down},
    {"k_w1": (2, 3), "k_w2": (4, 2)},
    {"k_w1_a": (2, 1), "k_w1_b": (1, 3), "k_w2_a": (4, 1), "k_w2_b": (1, 2)},
    {"a1": (6, 4), "a2": down, "b1": up, "b2": down},
    {"down": down, "up": up, "magnitude": (8,)},
]
for file in files:
    assert find_mismatch("unet.0", torch.nn.Linear(6, 8), file) is None, file
    assert find_mismatch("unet.0", torch.nn.Linear(7, 8), file), file
found = {"torch._dynamo", "sympy"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", script], check=True)
