"""Build the change of one layer from the tensors of a LoRA file, and check it before a tensor is read.

A change is multiplied by alpha / rank. Alpha is the file's tensor, or that in peft's configuration in the file's
metadata, or the rank itself. The rank of LoHa and LoKr is that of their second factor; a LoKr of two full matrices has
no rank, and its factor is 1. In OFT and BOFT, alpha is the constraint on the rotation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.errors import CheckpointError
from mezzotint.files import read_text
from mezzotint.models.adapters import (
    Change,
    Decomposed,
    Full,
    Hadamard,
    Kronecker,
    LayerChange,
    LowRank,
    RelativeChange,
)
from mezzotint.models.offload import weight_shape
from mezzotint.models.relative_adapters import Butterfly, Generalized, Rotation, Scaling, cayley
from mezzotint.weights.files import TensorFile
from mezzotint.weights.lora_files import CONFIG

METADATA = "lora_adapter_metadata"  # key of peft's configurations in a file of diffusers
MAX_CONFIG_BYTES = 2**20  # bytes
MAX_RANK = 8192  # no layer of these models is wider
MAX_ALPHA = 1e6
MAX_SKEW = 1e6  # of OFT's blocks; far larger ones make no accurate rotation, and trained ones are below 1
LATENT_CHANNELS = 4  # of the UNets that LoRA files are made for
SAFE_BOUND = 1e37  # below float32's largest number

Tensors = dict[str, Tensor]  # role, as in lora_keys.ENDINGS -> tensor
Factor = Callable[[int], float]  # rank -> alpha / rank


def find_mismatch(name: str, layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return a sentence about why tensors of these shapes do not fit the layer, or None if they fit."""
    shape, bias = tuple(weight_shape(layer)), getattr(layer, "bias", None)
    parts = {role: torch.empty(size, device="meta") for role, size in shapes.items()}
    problem = ""
    try:
        change = build_change(name, shape, parts, _check_rank)
        fits = change.weight is None or change.weight.fits(shape)
    except CheckpointError as error:
        fits, problem = False, f": {error}"
    except (RuntimeError, IndexError, AttributeError, AssertionError, ValueError, OverflowError):
        fits = False
    else:
        fits = fits and all(part.numel() for part in parts.values())
        fits = fits and (change.bias is None or (bias is not None and change.bias.shape == bias.shape))
    if fits:
        return None
    return f"{name}, whose weight is {shape}, has tensors of {', '.join(map(str, shapes.values()))}{problem}"


def read_change(name: str, layer: nn.Module, file: TensorFile, keys: Mapping[str, str], alphas: Alphas) -> LayerChange:
    """Read the change of a layer whose tensors `find_mismatch` has found to fit.

    Args:
        name: The layer ("unet.conv_in").
        layer: The layer.
        file: The file.
        keys: The key of each role.
        alphas: The file's configuration.

    Raises:
        CheckpointError: If a tensor or a product of tensors is not finite, or alpha is not a number within bounds.
    """
    parts = {role: _read(file, role, key) for role, key in keys.items()}
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    shape, used = tuple(weight_shape(layer)), 1.0

    def factor(rank: int) -> float:
        nonlocal used
        if alpha is not None and not abs(alpha) <= MAX_ALPHA:
            raise CheckpointError(f"its alpha is {alpha:g}; it must be from {-MAX_ALPHA:g} to {MAX_ALPHA:g}")
        used = alphas.factor(name, alpha, rank)
        return used

    try:
        change = build_change(name, shape, parts, factor)
        bound = abs(used) * math.prod(_bound(part) for part in parts.values())
        if bound > SAFE_BOUND and not (change.weight is None or _is_finite(change.weight)):
            raise CheckpointError("its tensors are so large that their product is not finite; the file is damaged")
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {name}: {error}") from None
    return change


def build_change(name: str, shape: tuple[int, ...], parts: Tensors, factor: Factor) -> LayerChange:
    """Build a change from tensors.

    Args:
        name: The layer ("unet.conv_in").
        shape: Shape of its weight.
        parts: The tensors; they may be on the meta device.
        factor: Called with the rank, returns alpha / rank.

    Raises:
        CheckpointError: If a tensor is missing, or ranks differ.
    """
    weight: Change | None = None
    bias: Tensor | None = parts.get("diff_b")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise CheckpointError(f"its alpha is a tensor of shape {tuple(parts['alpha'].shape)}; it must be a number")
    if "down" in parts or "up" in parts:
        down, up = _require(parts, "down", "up")
        weight = _low_rank(down, up, parts.get("mid"), factor)
        if "up_bias" in parts:
            bias = parts["up_bias"] * weight.factor
    elif "w1_a" in parts or "w2_a" in parts:
        w1_a, w1_b, w2_a, w2_b = _require(parts, "w1_a", "w1_b", "w2_a", "w2_b")
        _check_rank(len(w2_b))
        weight = Hadamard(w1_a, w1_b, w2_a, w2_b, parts.get("t1"), parts.get("t2"), factor(len(w1_b)))
    elif any(role.startswith("k_") for role in parts):
        weight = _kronecker(parts, factor)
    elif any(role in parts for role in ("a1", "a2", "b1", "b2")):
        weight = _generalized(parts, shape, factor)
    elif "oft_blocks" in parts:
        weight = _rotation(parts)
    elif "on_input" in parts:
        weight = _scaling(parts, shape)
    elif "diff" in parts:
        weight = Full(parts["diff"])
    if weight is None and bias is None:
        raise CheckpointError(f"{', '.join(parts)} alone do not make a change")
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    if weight is not None and magnitude is None and name == "unet.conv_in":
        weight = _pad_channels(weight, shape)
    if weight is not None and magnitude is not None:
        # LyCORIS' shape shows the axis that it is for; peft's is always for the outputs
        inputs = "dora_scale" in parts and magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
        weight = Decomposed(weight, magnitude.flatten(), inputs)
    return LayerChange(weight, bias)


def _low_rank(down: Tensor, up: Tensor, mid: Tensor | None, factor: Factor) -> LowRank:
    if up.ndim < 2 or up.shape[1] != len(down if mid is None else mid) or up[0, 0].numel() != 1:
        raise CheckpointError(f"its up and down have different ranks, {tuple(up.shape)} and {tuple(down.shape)}")
    _check_rank(up.shape[1])
    return LowRank(down, up, mid, factor(len(down)))


def _kronecker(parts: Tensors, factor: Factor) -> Kronecker:
    for side in ("w1", "w2"):
        if f"k_{side}" not in parts:
            _check_rank(len(_require(parts, f"k_{side}_a", f"k_{side}_b")[1]))
    second = parts.get("k_w2_b", parts.get("k_w1_b"))
    scale = 1.0 if second is None else factor(len(second))
    own = {role.removeprefix("k_"): tensor for role, tensor in parts.items() if role.startswith("k_")}
    return Kronecker(**own, factor=scale)


def _generalized(parts: Tensors, shape: tuple[int, ...], factor: Factor) -> Generalized:
    """Build a GLoRA. Its first version had the names of the two matrices of a product the other way round."""
    a1, a2, b1, b2 = _require(parts, "a1", "a2", "b1", "b2")
    if len(a1) != shape[1] == len(a2):
        a1, a2, b1, b2 = a2, a1, b2, b1
    inner = _low_rank(b2, b1, parts.get("bm"), factor)
    if a1.flatten(1).shape[1] != len(inner.down):
        raise CheckpointError(f"its a1 and b2 have different ranks, {tuple(a1.shape)} and {tuple(b2.shape)}")
    return Generalized(inner, a1.flatten(1), a2.flatten(1), inner.factor)


def _rotation(parts: Tensors) -> Rotation:
    """Build an OFT or BOFT; alpha times the number of outputs bounds the norm of its rotations."""
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or not blocks.numel():
        raise CheckpointError(f"its oft_blocks have the shape {tuple(blocks.shape)}; the last two must be equal")
    kind = Rotation if blocks.ndim == 3 else Butterfly
    if blocks.is_meta:
        return kind(blocks, rescale)
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    if not blocks.abs().max() <= MAX_SKEW:
        raise CheckpointError(f"its oft_blocks have {blocks.abs().max():g}; they must be at most {MAX_SKEW:g}")
    return kind(cayley(blocks, alpha * math.prod(blocks.shape[-3:-1])), rescale)


def _scaling(parts: Tensors, shape: tuple[int, ...]) -> Scaling:
    """Build an (IA)^3."""
    (scale,), on_input = _require(parts, "scale"), parts["on_input"]
    if on_input.numel() != 1:
        raise CheckpointError(f"its on_input is a tensor of shape {tuple(on_input.shape)}; it must be 0 or 1")
    inputs = scale.numel() == shape[1] if scale.is_meta else bool(on_input)
    change = Scaling(scale.flatten(), inputs)
    if not change.fits(shape) and not scale.is_meta:
        raise CheckpointError(f"its on_input is {int(inputs)}, but it has {scale.numel()} factors for {shape}")
    return change


def _pad_channels(weight: Change, shape: tuple[int, ...]) -> Change:
    """Pad a change made for 4 latent channels with zeros, for a UNet that takes a mask or picture as well."""
    extra, kernel = shape[1] - LATENT_CHANNELS, math.prod(shape[2:])
    if extra <= 0 or isinstance(weight, RelativeChange):
        return weight
    if isinstance(weight, LowRank):
        down = weight.down
        if down.ndim != 4 or down.shape[1] != LATENT_CHANNELS:
            return weight
        return replace(weight, down=F.pad(down, (0, 0, 0, 0, 0, extra)))
    made = weight.product()
    if made.numel() != shape[0] * LATENT_CHANNELS * kernel or len(made) != shape[0]:
        return weight
    return Full(F.pad(made.reshape(shape[0], LATENT_CHANNELS, *shape[2:]), (0, 0, 0, 0, 0, extra)))


def _require(parts: Tensors, *roles: str) -> list[Tensor]:
    missing = [role for role in roles if role not in parts]
    if missing:
        raise CheckpointError(f"{' and '.join(missing)} missing, with {', '.join(parts)} present")
    return [parts[role] for role in roles]


def _check_rank(rank: int) -> float:
    if rank > MAX_RANK:
        raise CheckpointError(f"its rank is {rank}; it must be at most {MAX_RANK}")
    return 1.0


def _bound(part: Tensor) -> float:
    """Return a number that the part's factor in any product cannot exceed."""
    return max(1.0, float(part.float().abs().max())) * max(part.shape, default=1)


def _is_finite(change: Change) -> bool:
    if isinstance(change, Rotation | Scaling):
        return True  # linear in tensors that are finite
    if isinstance(change, Generalized) and not _is_finite(change.inner):
        return False
    return bool(change.product().isfinite().all())


def _read(file: TensorFile, role: str, key: str) -> Tensor:
    tensor = file.read(key)
    if tensor.is_complex() or not (tensor.is_floating_point() or role in ("alpha", "on_input")):
        raise CheckpointError(f"{file.path}: {key} is {tensor.dtype}; it must be floating-point")
    if not tensor.float().isfinite().all():
        raise CheckpointError(f"{file.path}: {key} has values that are not finite; the file is damaged")
    return tensor


@dataclass(frozen=True)
class Alphas:
    """The peft configurations of a file, by network, or "" for all networks."""

    path: Path  # of the file with the configurations
    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, file: TensorFile) -> Alphas:
        """Read the configuration in a file's metadata or in the file next to it.

        Raises:
            CheckpointError: If it is invalid.
        """
        text, path = file.metadata.get(METADATA), file.path
        config_path = path.with_name(CONFIG)
        configs: dict[str, dict[str, Any]] = {}
        if text is not None:
            for key, value in _parse_json(path, text).items():
                network, _, name = key.partition(".")
                configs.setdefault(network, {})[name] = value
        elif path.name.startswith("adapter_model.") and config_path.is_file():
            path = config_path
            try:
                configs = {"": _parse_json(path, read_text(path, limit=MAX_CONFIG_BYTES))}
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                raise CheckpointError(f"{path} cannot be read: {reason}") from None
        for config in configs.values():
            _check_config(path, config)
        return cls(path, configs)

    def factor(self, layer: str, alpha: float | None, rank: int) -> float:
        """Return alpha / rank of a layer's change; `alpha` is the file's own."""
        _check_rank(rank)
        if alpha is not None:
            return alpha / rank
        network, _, name = layer.partition(".")
        config = self.configs.get(network, self.configs.get("", {}))
        patterns = config.get("alpha_pattern") or {}
        fitting = [value for pattern, value in patterns.items() if f".{name}".endswith(f".{pattern.removeprefix('^')}")]
        value = fitting[0] if fitting else config.get("lora_alpha")
        if value is None:
            return 1.0
        return float(value) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check the fields that are used. Raises CheckpointError."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: alpha_pattern is {ascii(patterns)[:60]}; it must be a table of numbers")
    for name, value in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        if value is None and name == "lora_alpha":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_ALPHA:
            raise CheckpointError(
                f"{path}: the alpha {name[:60]} is {ascii(value)[:60]}; it must be a number from {-MAX_ALPHA:g} to "
                f"{MAX_ALPHA:g}"
            )
    if not isinstance(rslora := config.get("use_rslora"), bool | None):
        raise CheckpointError(f"{path}: use_rslora is {ascii(rslora)[:60]}; it must be true or false")


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        if len(text) > MAX_CONFIG_BYTES:
            raise ValueError
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: its LoRA configuration is not a JSON object of at most {MAX_CONFIG_BYTES} bytes"
        )
    return found
