"""Count the memory and the operations of the networks by running them on the meta device, without data.

A network is built on torch's meta device, where tensors have a shape but no data, and called once. `TensorCounter` sees
every operation and counts each tensor from the operation that creates it until nothing refers to it. What torch's CPU
kernels allocate beyond their results is added by formula (`Workspace`):

    the weight of a convolution larger than 1x1, which oneDNN copies into its own layout at each call; in a dtype that
    oneDNN has no convolution for on this processor, the unfolded input instead
    a weight that is stored elsewhere or in another dtype, and is computed for the call that uses it
    the attention scores, where the backend writes them to memory
    what our own kernels need; one of them computes a GEGLU without writing the projection, so that a walk records its
    memory with and without it

Walks are cached: one for each configuration, size, dtype and, for a VAE, mode. Batch, placement of the weights and
attention backend are accounted for afterwards.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mezzotint.config import (
    CLIPConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    SafetyCheckerConfig,
    T2IAdapterConfig,
    UNetConfig,
    VAEConfig,
)
from mezzotint.kernels import convolution as kernel
from mezzotint.kernels import linear as linear_kernel
from mezzotint.memory.meta_ops import RESULTS, aten
from mezzotint.models import strips, tiles
from mezzotint.models.attention import backend
from mezzotint.models.backends import Backend
from mezzotint.models.blocks import GEGLU, ImageAttention, KeysValues
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.clip_vision import CLIPVisionModel
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.freeu import FreeU
from mezzotint.models.offload import WeightSource, can_offload, offload_weight
from mezzotint.models.safety_checker import SafetyChecker
from mezzotint.models.strips import Strips
from mezzotint.models.t2i_adapter import T2IAdapter
from mezzotint.models.tiles import Half
from mezzotint.models.tiny_vae import TinyVAE, make_vae
from mezzotint.models.unet import Condition, DownPath, UNet
from mezzotint.models.upscaler import Upscaler
from mezzotint.models.vae import VAE
from mezzotint.models.vae_modes import VAEMode, decode, encode
from mezzotint.placement import DEFAULT_SLICE_BYTES, parse_size

CONVOLUTION_WEIGHTS = {aten.conv2d: 1, aten.convolution: 1, aten.convolution_backward: 2}  # where in their arguments
SIXTEEN_BITS = 2


@dataclass(frozen=True)
class Workspace:
    """How networks run, and what their kernels allocate.

    Attributes:
        itemsize: Bytes of a number.
        copies_conv_weights: Whether convolutions copy their weights into another layout, and our own kernels may run
            (on the CPU).
        unfolds_conv_inputs: Whether convolutions unfold their inputs instead (on the CPU, in some dtypes).
        materializes_weights: Whether a large weight is computed at each use, because it is stored elsewhere or in
            another dtype.
        buffer: Bytes needed in addition to a weight while it is computed.
        attention: The attention backend, as in `Placement.attention`.
        fuses_geglu: Whether our own kernel computes the UNet's GEGLUs, where it can.
    """

    itemsize: int = 4
    copies_conv_weights: bool = True
    unfolds_conv_inputs: bool = False
    materializes_weights: bool = False
    buffer: int = 0
    attention: str = "auto"
    fuses_geglu: bool = False

    def scores(self, heads: int, queries: int, keys: int) -> int:
        """Return the bytes of attention scores that the backend writes to memory; `heads` counts the whole batch."""
        whole = 2 * heads * queries * keys * self.itemsize  # and their softmax
        if self.attention.startswith("sliced"):
            return min(whole, parse_size(self.attention.partition(":")[2] or DEFAULT_SLICE_BYTES))
        return whole if self.attention == "math" else 0


class TensorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all tensors that are created inside the block, for as long as they exist.

    Attributes:
        now: Bytes that exist now.
        peak: The largest `now` so far, with the copied weight of a convolution while it runs.
    """

    def __init__(self, *networks: nn.Module) -> None:
        """Start at 0; parameters and buffers of `networks` do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        tensors = (t for network in networks for t in (*network.parameters(), *network.buffers()))
        self._sizes = {t.untyped_storage()._cdata: 0 for t in tensors}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # otherwise the first operation imports torch's compiler: 2 s and 80 MB
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        if (place := CONVOLUTION_WEIGHTS.get(func.overloadpacket)) is not None:
            weight = args[place]
            if weight.shape[-1] > 1:
                self.peak = max(self.peak, self.now + weight.nbytes)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Moment:
    """The memory during one operation, for one picture.

    Attributes:
        tensors: Bytes of the tensors that exist.
        weights: Bytes of weights that were computed for the layer.
        scratch: Bytes of the convolution's weight in oneDNN's layout, or of what our own kernel needs.
        unfolded: Bytes of the convolution's unfolded input.
        scores: (heads, queries, keys) of an attention.
        fused: Whether this is inside a GEGLU with (True) or without (False) our own kernel; None: elsewhere.
    """

    tensors: int
    weights: int = 0
    scratch: int = 0
    unfolded: int = 0
    scores: tuple[int, int, int] | None = None
    fused: bool | None = None

    def bytes(self, workspace: Workspace, batch: int) -> int:
        """Return what exists at this moment in a batch."""
        total = batch * self.tensors
        if workspace.materializes_weights and self.weights:
            total += self.weights + workspace.buffer
        if workspace.unfolds_conv_inputs:
            total += batch * self.unfolded
        elif workspace.copies_conv_weights:
            total += self.scratch
        if self.scores:
            heads, queries, keys = self.scores
            total += workspace.scores(batch * heads, queries, keys)
        return total


@dataclass
class Footprint:
    """What a walk counted, for one picture.

    Attributes:
        moments: The memory during each operation.
        macs: Multiply-accumulates.
        result: Bytes of the result.
    """

    moments: set[Moment] = field(default_factory=set)
    macs: int = 0
    result: int = 0

    def peak(self, workspace: Workspace, batch: int = 1) -> int:
        """Return the bytes that exist at most, beyond the weights and the inputs."""
        moments = (moment for moment in self.moments if moment.fused in (None, workspace.fuses_geglu))
        return max(moment.bytes(workspace, batch) for moment in moments)


class _Walk(TensorCounter):  # type: ignore[no-untyped-call]
    """Record a forward pass without gradients. Weights from `_MetaWeight` are counted separately."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.made = 0  # bytes of weights that exist now
        self.fused: bool | None = None  # as in `Moment`
        self.footprint = Footprint()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket
        result = RESULTS[op](*args, **kwargs) if op in RESULTS else func(*args, **kwargs)
        if op is aten.empty_strided:  # only _MetaWeight makes tensors so
            storage = result.untyped_storage()
            self.made += result.nbytes
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._release_weight, storage._cdata, result.nbytes)
            return result
        before = self.now
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        if self.now > before:
            self.record()
        if op is aten.conv2d:
            self._convolution(args[1], result, *args[3:4])
        elif op is aten.linear:
            self.footprint.macs += result.numel() * args[1].shape[1]
            if linear_kernel.takes(args[1]):
                self.record(scratch=linear_kernel.scratch_bytes())
        return result

    def record(self, **more: Any) -> None:
        """Add this moment."""
        self.footprint.moments.add(Moment(self.now, self.made, fused=self.fused, **more))

    def _convolution(self, weight: Tensor, result: Tensor, stride: Sequence[int] = (1, 1)) -> None:
        _, inputs, height, width = weight.shape
        self.footprint.macs += result.numel() * inputs * height * width
        if height * width > 1:
            cells = result.shape[0] * result.shape[2] * result.shape[3]
            unfolded = cells * inputs * height * width * result.itemsize
            ours = kernel.takes(weight) and tuple(stride) == (1, 1)
            scratch = kernel.scratch_bytes(inputs) if ours else weight.nbytes
            self.record(scratch=scratch, unfolded=unfolded)
        elif linear_kernel.takes(weight.flatten(1)):
            self.record(scratch=linear_kernel.scratch_bytes())

    def _release_weight(self, key: int, size: int) -> None:
        self._sizes.pop(key)
        self.made -= size


class _MetaWeight(WeightSource):
    """A weight without data, created at each use."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, _contiguous(self.shape), dtype=dtype, device="meta")

    def rows(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*ids.shape, self.shape[1], dtype=dtype, device="meta")


class _Attention(Backend):
    """Attention that allocates only its result, and records the size of its scores."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        batch, heads, queries, _ = q.shape
        result = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
        walk = torch.utils._python_dispatch._get_current_dispatch_mode()
        assert isinstance(walk, _Walk)
        walk.record(scores=(batch * heads, queries, k.shape[2]))
        walk.footprint.macs += batch * heads * queries * k.shape[2] * (q.shape[-1] + v.shape[-1])
        return result


class _GEGLU(GEGLU):
    """A GEGLU that records the memory both without and with our own kernel, which does not write the projection."""

    def forward(self, x: Tensor) -> Tensor:
        walk = torch.utils._python_dispatch._get_current_dispatch_mode()
        assert isinstance(walk, _Walk)
        takes = linear_kernel.takes(self.proj.weight, gated=True)
        walk.fused = False if takes else None
        y = super().forward(x)
        if takes:
            walk.fused = True
            walk.record(scratch=linear_kernel.scratch_bytes(gated=True))
        walk.fused = None
        return y


class _FewStrips(Strips):
    """Only the first and last strips of each layer and tiles of a picture; those between need no more memory."""

    def each(self, pieces: Any) -> Any:
        return pieces if len(pieces) < 6 else [*pieces[:3], *pieces[-2:]]


@lru_cache(maxsize=8)
def _build(kind: Callable[[Any], nn.Module], config: Any, dtype: torch.dtype) -> Any:
    """Build a network on the meta device whose large weights are created at each use."""
    with torch.device("meta"):
        network = kind(config).eval().requires_grad_(False).to(dtype)
    offload_to_meta(network)
    for layer in network.modules():
        if type(layer) is GEGLU:
            layer.__class__ = _GEGLU
    return network


def offload_to_meta(network: nn.Module) -> None:
    """Replace the network's large weights by weights without data that are created at each use."""
    for layer in network.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and can_offload(layer, weight):
            offload_weight(layer, _MetaWeight(weight.shape), weight.dtype, weight.device)


def _walk(network: nn.Module, call: Callable[[], Tensor]) -> Footprint:
    with torch.inference_mode(), backend(_Attention()), _Walk(network) as walk:
        result = call()
        walk.footprint.result = result.nbytes
        del result
    footprint: Footprint = walk.footprint
    return footprint


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _empty_keys_values(network: DownPath, tokens: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    shapes = [(1, attn.heads, tokens, attn.to_k.out_features // attn.heads) for attn in network.cross_attentions()]
    return [(empty, empty) for empty in (_empty(*shape, dtype=dtype) for shape in shapes)]


def _dtype(itemsize: int) -> torch.dtype:
    return torch.bfloat16 if itemsize == SIXTEEN_BITS else torch.float32


@lru_cache(maxsize=64)
def walk_unet(
    config: UNetConfig,
    height: int,
    width: int,
    tokens: int,
    itemsize: int = 4,
    freeu: FreeU | None = None,
    image_tokens: tuple[int, ...] = (),
) -> Footprint:
    """Walk one call of the UNet on latents of this size.

    The keys and values of `tokens`, and of those of each IP-Adapter's pictures, are inputs.
    """
    dtype = _dtype(itemsize)
    network: UNet = _build(UNet, config, dtype)
    with torch.inference_mode():
        keys_values: list[KeysValues] = [*_empty_keys_values(network, tokens, dtype)]
        if image_tokens:
            terms = [_empty_keys_values(network, each, dtype) for each in image_tokens]
            keys_values = [
                (k, v, [ImageAttention(*one) for one in own])
                for (k, v, *_), own in zip(keys_values, zip(*terms, strict=True), strict=True)
            ]
        times = [_empty(1, resnet.conv1.out_channels, dtype=dtype) for resnet in network.resnets()]
        x, condition = _empty(1, config.in_channels, height, width, dtype=dtype), Condition(_empty(1, dtype=dtype))
    options = {"keys_values": keys_values, "time_projections": times, "freeu_factors": freeu}
    return _walk(network, lambda: network(x, 0.0, condition, **options))


@lru_cache(maxsize=64)
def walk_control(config: ControlNetConfig, height: int, width: int, tokens: int, itemsize: int = 4) -> Footprint:
    """Walk one call of a ControlNet on latents of this size; its picture's features and keys and values are inputs.

    The result is all residuals.
    """
    dtype = _dtype(itemsize)
    network: ControlNet = _build(ControlNet, config, dtype)
    with torch.inference_mode():
        keys_values = _empty_keys_values(network, tokens, dtype)
        x, pooled = _empty(1, config.in_channels, height, width, dtype=dtype), None
        if config.addition_embed_type:
            numbers = config.projection_class_embeddings_input_dim or 0
            pooled = _empty(1, numbers - 6 * (config.addition_time_embed_dim or 0), dtype=dtype)
        condition = Condition(_empty(1, dtype=dtype), pooled, _empty(1, 6, dtype=dtype))
        features = _empty(1, config.block_out_channels[0], height, width, dtype=dtype)
    sizes: list[int] = []

    def call() -> Tensor:
        down, mid = network.forward(x, 0.0, condition, features, keys_values=keys_values)
        sizes.extend(residual.nbytes for residual in (*down, mid))
        return mid

    footprint = _walk(network, call)
    footprint.result = sum(sizes)
    return footprint


@lru_cache(maxsize=64)
def walk_hint(config: ControlNetConfig, height: int, width: int, itemsize: int = 4) -> Footprint:
    """Walk the part of a ControlNet that reads its picture, of this size in pixels."""
    dtype = _dtype(itemsize)
    network: ControlNet = _build(ControlNet, config, dtype)
    return _walk(network, lambda: network.embed(_empty(1, config.conditioning_channels, height, width, dtype=dtype)))


@lru_cache(maxsize=64)
def walk_t2i(config: T2IAdapterConfig, height: int, width: int, itemsize: int = 4) -> Footprint:
    """Walk a T2I-Adapter on a picture of this size in pixels. The result is all features."""
    dtype = _dtype(itemsize)
    network: T2IAdapter = _build(T2IAdapter, config, dtype)
    sizes: list[int] = []

    def call() -> Tensor:
        features: list[Tensor] = network(_empty(1, config.in_channels, height, width, dtype=dtype))
        sizes.extend(feature.nbytes for feature in features)
        return features[-1]

    footprint = _walk(network, call)
    footprint.result = sum(sizes)
    return footprint


def keys_values_numel(config: UNetConfig, tokens: int, kind: Callable[[Any], DownPath] = UNet) -> int:
    """Return how many numbers the keys and values of one condition have, over all layers."""
    network: DownPath = _build(kind, config, torch.float32)
    return sum(2 * tokens * attn.to_k.out_features for attn in network.cross_attentions())


@lru_cache(maxsize=64)
def walk_text_encoder(config: CLIPConfig, itemsize: int = 4) -> Footprint:
    """Walk one call of a text encoder on one window of tokens."""
    dtype = _dtype(itemsize)
    network: CLIPTextModel = _build(CLIPTextModel, config, dtype)
    window = config.max_position_embeddings
    encoder = network.text_model.encoder
    return _walk(network, lambda: encoder(_empty(1, window, config.hidden_size, dtype=dtype))[-1])


@lru_cache(maxsize=64)
def walk_vision(config: CLIPVisionConfig, itemsize: int = 4) -> Footprint:
    """Walk a CLIP vision encoder on one picture."""
    dtype = _dtype(itemsize)
    network: CLIPVisionModel = _build(CLIPVisionModel, config, dtype)
    pixels = _empty(1, config.num_channels, config.image_size, config.image_size, dtype=dtype)
    return _walk(network, lambda: network(pixels).pooled)


@lru_cache(maxsize=64)
def walk_checker(config: SafetyCheckerConfig, itemsize: int = 4) -> Footprint:
    """Walk the vision encoder of a safety checker on one picture."""
    dtype = _dtype(itemsize)
    network: SafetyChecker = _build(SafetyChecker, config, dtype)
    vision = config.vision_config
    pixels = _empty(1, vision.num_channels, vision.image_size, vision.image_size, dtype=dtype)
    return _walk(network, lambda: network(pixels)[1])


@lru_cache(maxsize=64)
def walk_vae(
    config: VAEConfig, height: int, width: int, half: Half, mode: VAEMode = "whole", itemsize: int = 4
) -> Footprint:
    """Walk one half of the VAE on one picture of this size in pixels."""
    dtype = _dtype(itemsize)
    vae: VAE = _build(make_vae, config, dtype)
    side = config.downscale
    encoding = half == "encode"
    with torch.inference_mode():
        x = (
            _empty(1, config.in_channels, height, width, dtype=dtype)
            if encoding
            else _empty(1, config.latent_channels, height // side, width // side, dtype=dtype)
        )
    few = _FewStrips()
    if isinstance(vae, TinyVAE):
        return _walk(vae, lambda: encode(vae, x, mode).mean if encoding else decode(vae, x, mode))
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("decode", "whole"): lambda: vae.decode(x),
        ("encode", "whole"): lambda: vae.quant_conv(vae.encoder(x)),
        ("decode", "strips"): lambda: strips.decode_one(few, vae, x),
        ("encode", "strips"): lambda: strips.encode_one(few, vae, x),
        ("decode", "tiles"): lambda: tiles.decode_one(few, vae, x),
        ("encode", "tiles"): lambda: tiles.encode_one(few, vae, x),
    }
    return _walk(vae, calls[half, mode])


def vae_peak(
    config: VAEConfig, batch: int, height: int, width: int, half: Half, mode: VAEMode, workspace: Workspace
) -> int:
    """Return the bytes that one half of the VAE needs on a batch of pictures, beyond its weights.

    Strips and tiles take one picture after another, and their results are put together at the end.
    """
    walk = walk_vae(config, height, width, half, mode, workspace.itemsize)
    if mode == "whole":
        return walk.peak(workspace, batch)
    return walk.peak(workspace) + 2 * (batch - 1) * walk.result


def count_upscaler(upscaler: Upscaler, height: int, width: int) -> int | None:
    """Return the bytes of an upscaler's tensors for a picture of this size; None if it cannot run without data."""
    try:
        module = copy.deepcopy(upscaler.module).to("meta")
        dtype = next(module.parameters()).dtype
        with torch.inference_mode(), TensorCounter(module) as counter:
            module(_empty(1, 3, height, width, dtype=dtype))
        return int(counter.peak)
    except Exception:  # a network of another package, which may do anything
        return None


def _contiguous(shape: torch.Size) -> list[int]:
    """Strides of a contiguous tensor."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
