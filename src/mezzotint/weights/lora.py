"""Read LoRA files and their relatives for a model, whatever program wrote them (lora_keys.py has the names).

A change is multiplied by alpha / rank. Alpha is the file's tensor, or that in peft's configuration in the file's
metadata, or the rank itself. The rank of LoHa and LoKr is that of their second factor; a LoKr of two full matrices has
no rank, and its factor is 1.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError
from mezzotint.models.adapters import (
    Change,
    Changes,
    Decomposed,
    Full,
    Hadamard,
    Kronecker,
    LayerChange,
    LowRank,
    MergedWeights,
    merge,
)
from mezzotint.models.offload import weight_shape
from mezzotint.reading import hash_file, read_text
from mezzotint.weights.embeddings import BUNDLED
from mezzotint.weights.files import TensorFile
from mezzotint.weights.hub import resource
from mezzotint.weights.lora_keys import detect_family, layer_names, split_key
from mezzotint.weights.model_files import join_names

NAMES = (  # the usual names in a folder or repository, by precedence
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
SUFFIXES = (".safetensors", ".bin", ".pt")  # of other names; the safest first
CONFIG = "adapter_config.json"  # in the folder of peft's own files
METADATA = "lora_adapter_metadata"  # key of peft's configurations in a file of diffusers
MAX_CONFIG_BYTES = 2**20  # bytes
FAMILIES = {"sd1": "SD 1", "sd2": "SD 2", "sdxl": "SDXL"}

Tensors = dict[str, Tensor]  # role, as in lora_keys.ENDINGS -> tensor


@dataclass(frozen=True)
class Scale:
    """The scale of an adapter in each layer.

    Attributes:
        unet: Scale in the UNet.
        text: Scale in the text encoders.
        blocks: Further factors by the prefix of a layer's name ("unet.down_blocks.1"). The longest prefix counts.
    """

    unet: float = 1.0
    text: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()

    def of(self, layer: str) -> float:
        """Return the scale in a layer."""
        fitting = [(len(block), factor) for block, factor in self.blocks if f"{layer}.".startswith(f"{block}.")]
        whole = self.unet if layer.startswith("unet.") else self.text
        return whole * (max(fitting)[1] if fitting else 1.0)


@dataclass(frozen=True)
class Coverage:
    """What part of a LoRA file fits a model.

    Attributes:
        matched: The layers that it changes.
        unmatched: Names in the file that belong to no layer.
        wrong: Sentences about tensors that do not fit their layer.
        bundled: Keys of textual inversions, which embeddings.py reads.
    """

    matched: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    bundled: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the coverage as text, with every name."""
        networks = Counter(layer.partition(".")[0] for layer in self.matched)
        places = ", ".join(f"{count} in {network}" for network, count in networks.items())
        lines = [f"{len(self.matched)} layers matched" + (f": {places}" if places else "")]
        lines += [f"matches no layer  {name}" for name in self.unmatched]
        lines += [f"wrong shape       {sentence}" for sentence in self.wrong]
        lines += [f"embedding         {key}" for key in self.bundled]
        return "\n".join(lines)

    def __str__(self) -> str:
        counts = [f"{len(self.matched)} layers matched"]
        if self.unmatched:
            counts.append(f"{len(self.unmatched)} names match no layer: {join_names(self.unmatched)}")
        if self.wrong:
            counts.append(f"{len(self.wrong)} of the wrong shape: {join_names(self.wrong)}")
        if self.bundled:
            counts.append(f"{len(self.bundled)} tensors of bundled embeddings")
        return "; ".join(counts)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA file, read for a model.

    Attributes:
        path: The file.
        digest: SHA-256 of the file.
        changes: The changes by layer ("unet.conv_in").
        coverage: What part of the file fits the model.
    """

    path: Path
    digest: str
    changes: Mapping[str, LayerChange]
    coverage: Coverage


def read_adapter(path: Path, networks: Mapping[str, nn.Module], table: Mapping[str, str] | None = None) -> Adapter:
    """Read the changes in a file that fit these networks, on the CPU.

    Args:
        path: A file, or a folder with one LoRA.
        networks: The networks by name: "unet", "text_encoder", "text_encoder_2".
        table: What `layer_names` returns for them, if it is known.

    Returns:
        The changes. Names that match no layer are listed in the coverage.

    Raises:
        CheckpointError: If nothing matches, a shape is wrong, a tensor is missing, or a number is not finite.
    """
    path = _find_file(path)
    file = TensorFile(path)
    changes, coverage = _match(file, networks, layer_names(networks) if table is None else table, real=True)
    if coverage.wrong or not (changes or coverage.bundled):
        made_for = detect_family(file.shapes, file.metadata)
        hint = f": it is for {made_for}" if made_for else ""
        if coverage.wrong:
            raise CheckpointError(f"{path} does not fit this model{hint}; {join_names(coverage.wrong, 2)}")
        raise CheckpointError(
            f"{path} is not a LoRA for this model{hint}; its names match no layer: "
            f"{join_names(coverage.unmatched) or 'it is empty'}"
        )
    return Adapter(path, hash_file(path), changes, coverage)


def read_unet_lora(path: Path, unet: nn.Module) -> Changes:
    """Read a LoRA that changes this UNet and nothing else, whole: the changes, at a scale of 1.

    Raises:
        CheckpointError: If the file is damaged, or any of its tensors does not belong to a layer of this UNet.
    """
    adapter = read_adapter(path, {"unet": unet})
    if foreign := [*adapter.coverage.unmatched, *adapter.coverage.bundled]:
        raise CheckpointError(f"{path} has tensors that match no layer of this UNet: {join_names(foreign)}")
    return {layer: [(change, 1.0)] for layer, change in adapter.changes.items()}


def coverage(path: Path, networks: Mapping[str, nn.Module]) -> Coverage:
    """Return what part of a file fits networks, from its names and shapes alone. They may be on the meta device."""
    return _match(TensorFile(_find_file(path)), networks, layer_names(networks), real=False)[1]


def _find_file(path: Path) -> Path:
    """Return the file, or the one LoRA in a folder."""
    if not path.is_dir():
        return path
    there = _candidates(file.name for file in path.iterdir() if file.is_file())
    if len(there) != 1:
        raise CheckpointError(f"{path} is a folder with {len(there)} LoRA files; it must have one, such as {NAMES[0]}")
    return path / there[0]


def _choose_files(name: str, listing: Iterable[str]) -> list[str]:
    """Choose the LoRA among a repository's files, and peft's configuration if there is one."""
    listing = list(listing)
    there = _candidates(file for file in listing if "/" not in file)
    if len(there) != 1:
        found = (
            f"{len(there)} files that could be the LoRA ({join_names(there)})"
            if there
            else "no .safetensors, .bin or .pt file"
        )
        raise CheckpointError(f"The hub's {name} has {found} at its top; download the LoRA and give its path")
    return [*there, *(file for file in listing if file == CONFIG)]


def _candidates(names: Iterable[str]) -> list[str]:
    """Return the file with a usual name, or all files of the safest format."""
    there = sorted(names)
    usual = [name for name in NAMES if name in there]
    kinds = ([name for name in there if name.endswith(suffix)] for suffix in SUFFIXES)
    return usual[:1] or next(filter(None, kinds), [])


def _match(
    file: TensorFile, networks: Mapping[str, nn.Module], table: Mapping[str, str], *, real: bool
) -> tuple[dict[str, LayerChange], Coverage]:
    """Match a file's tensors with layers. With `real` they are read; without, only their shapes are compared."""
    layers: dict[str, dict[str, str]] = {}  # layer -> role -> key
    unmatched: list[str] = []
    bundled: list[str] = []
    for key in file.entries:
        found = split_key(key)
        if BUNDLED.fullmatch(key):
            bundled.append(key)
        elif found and found[0] in table:
            roles = layers.setdefault(table[found[0]], {})
            if found[1] in roles:
                raise CheckpointError(f"{file.path} has {roles[found[1]]} and {key}, which mean the same tensor")
            roles[found[1]] = key
        else:
            unmatched.append(found[0] if found else key)
    alphas = _Alphas.of(file)
    changes: dict[str, LayerChange] = {}
    wrong: dict[str, str] = {}
    for name in [name for name, roles in layers.items() if [*roles] == ["alpha"]]:  # pruned layers leave one
        unmatched.append(layers.pop(name)["alpha"])
    for name, roles in layers.items():
        network, _, path = name.partition(".")
        layer = networks[network].get_submodule(path)
        empty = {role: torch.empty(file.entries[key].shape, device="meta") for role, key in roles.items()}
        problem = _find_mismatch(name, layer, empty)
        if problem:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in empty.values())
            wrong[name] = (
                f"{name}, whose weight is {tuple(weight_shape(layer))}, has tensors of {shapes}{problem}".rstrip()
            )
        elif real:
            parts = {role: _read(file, key) for role, key in roles.items()}
            changes[name] = _build_change(parts, partial(alphas.factor, name, parts.get("alpha")))
    matched = tuple(name for name in layers if name not in wrong)
    return changes, Coverage(matched, tuple(dict.fromkeys(unmatched)), tuple(wrong.values()), tuple(bundled))


def _find_mismatch(name: str, layer: nn.Module, parts: Tensors) -> str | None:
    """Return why the shapes do not fit the layer, " " if there is no more to say, or None if they fit."""
    try:
        change = _build_change(parts, lambda *_: 1.0)
    except CheckpointError as error:
        return f": {error}"
    except (RuntimeError, IndexError, AttributeError, AssertionError):
        return " "
    shape, bias = tuple(weight_shape(layer)), getattr(layer, "bias", None)
    if change.bias is not None and (bias is None or change.bias.shape != bias.shape):
        return " "
    if change.weight is None:
        return None
    try:
        made = tuple(change.weight.product().shape)
    except (RuntimeError, IndexError):
        return " "
    flat = (shape[0], math.prod(shape[1:]))
    fits = made in (shape, flat, (*shape, 1, 1)) or (*made, 1, 1) == shape
    if isinstance(change.weight, LowRank) and change.weight.mid is None:
        rest = tuple(change.weight.down.shape[1:])
        fits = fits and (rest == shape[1:] or (*rest, 1, 1) == shape[1:] or rest == (*shape[1:], 1, 1))
    if isinstance(change.weight, Decomposed):
        wanted = shape[1] if change.weight.inputs else shape[0]
        fits = fits and change.weight.magnitude.numel() == wanted
    return None if fits and not any(not part.numel() for part in parts.values()) else " "


def _build_change(parts: Tensors, factor: Callable[[int], float]) -> LayerChange:
    """Build a change from tensors; `factor` maps its rank to alpha / rank. Raises CheckpointError if one is missing."""
    weight: Change | None = None
    bias: Tensor | None = parts.get("diff_b")
    if "down" in parts or "up" in parts:
        down, up = _require(parts, "down", "up")
        rank = len(down)
        if up.ndim < 2 or up.shape[1] != len(parts.get("mid", down)) or up[0, 0].numel() != 1:
            raise CheckpointError(f"its up and down have different ranks, {tuple(up.shape)} and {tuple(down.shape)}")
        weight = LowRank(down, up, parts.get("mid"), factor(rank))
        if "up_bias" in parts:
            bias = parts["up_bias"] * factor(rank)
    elif "w1_a" in parts or "w2_a" in parts:
        w1_a, w1_b, w2_a, w2_b = _require(parts, "w1_a", "w1_b", "w2_a", "w2_b")
        weight = Hadamard(w1_a, w1_b, w2_a, w2_b, parts.get("t1"), parts.get("t2"), factor(len(w1_b)))
    elif any(role.startswith("k_") for role in parts):
        for side in ("w1", "w2"):
            if f"k_{side}" not in parts:
                _require(parts, f"k_{side}_a", f"k_{side}_b")
        second = parts.get("k_w2_b", parts.get("k_w1_b"))
        scale = 1.0 if second is None else factor(len(second))
        own = {role.removeprefix("k_"): tensor for role, tensor in parts.items() if role.startswith("k_")}
        weight = Kronecker(**own, factor=scale)
    elif "diff" in parts:
        weight = Full(parts["diff"])
    if weight is None and bias is None:
        raise CheckpointError(f"{', '.join(parts)} alone do not make a change")
    if weight is not None and (magnitude := parts.get("magnitude", parts.get("dora_scale"))) is not None:
        # LyCORIS' shape shows the axis that it is for; peft's is always for the outputs
        inputs = "dora_scale" in parts and magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
        weight = Decomposed(weight, magnitude.flatten(), inputs)
    return LayerChange(weight, bias)


def _require(parts: Tensors, *roles: str) -> list[Tensor]:
    missing = [role for role in roles if role not in parts]
    if missing:
        raise CheckpointError(f"{' and '.join(missing)} missing, with {', '.join(parts)} present")
    return [parts[role] for role in roles]


def _read(file: TensorFile, key: str) -> Tensor:
    tensor = file.read(key)
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        raise CheckpointError(f"{file.path}: {key} is {tensor.dtype}; it must be floating-point")
    if not tensor.float().isfinite().all():
        raise CheckpointError(f"{file.path}: {key} has values that are not finite; the file is damaged")
    return tensor


@dataclass(frozen=True)
class _Alphas:
    """The peft configurations of a file, by network, or "" for all networks."""

    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, file: TensorFile) -> _Alphas:
        text = file.metadata.get(METADATA)
        config = file.path.with_name(CONFIG)
        if text is None and file.path.name.startswith("adapter_model.") and config.is_file():
            try:
                text = read_text(config, limit=MAX_CONFIG_BYTES)
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                raise CheckpointError(f"{config} cannot be read: {reason}") from None
            configs = {"": _json(config, text)}
        elif text is None:
            configs = {}
        else:
            configs = {}
            for key, value in _json(file.path, text).items():
                network, _, name = key.partition(".")
                configs.setdefault(network, {})[name] = value
        return cls(configs)

    def factor(self, layer: str, alpha: Tensor | None, rank: int) -> float:
        """Return alpha / rank of a layer's change."""
        if alpha is not None:
            return float(alpha.flatten()[0]) / rank
        network, _, name = layer.partition(".")
        config = self.configs.get(network, self.configs.get("", {}))
        patterns = config.get("alpha_pattern") or {}
        fitting = [value for pattern, value in patterns.items() if f".{name}".endswith(f".{pattern.removeprefix('^')}")]
        value = fitting[0] if fitting else config.get("lora_alpha")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return 1.0
        return value / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its LoRA configuration is not a JSON object")
    return found


ScaledFiles = Sequence[tuple[str, Scale]]  # files and their scales


class Adapters:
    """The LoRA files of one model: each is read once, and applied to a run or merged into the weights."""

    def __init__(self, unet: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        names = ("text_encoder", "text_encoder_2")
        self.networks: dict[str, nn.Module] = {"unet": unet, **dict(zip(names, text_encoders, strict=False))}
        self.merged: tuple[tuple[str, Scale], ...] = ()
        self._undo: MergedWeights | None = None
        self._read: dict[tuple[Path, int, int, int], Adapter] = {}
        self._places: dict[str, Path] = {}
        self._table: dict[str, str] | None = None
        self._lock = threading.Lock()

    def read(self, name: str) -> Adapter:
        """Read a LoRA by file, folder or hub id, or return it from memory. Raises CheckpointError."""
        place = self._places.get(name)
        if place is None or not place.exists():
            place = self._places[name] = resource(name, "LoRA", partial(_choose_files, name))
        try:
            path = _find_file(place)
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"the LoRA {name[:200]!r} cannot be read: {error.strerror}") from None
        key = path, stat.st_mtime_ns, stat.st_size, stat.st_ino
        with self._lock:
            if key not in self._read:
                self._table = self._table or layer_names(self.networks)
                self._read[key] = read_adapter(path, self.networks, self._table)
            return self._read[key]

    def changes(self, adapters: Sequence[tuple[Adapter, Scale]]) -> Changes:
        """Return the changes of each layer on the layers' device, without those of scale 0."""
        found: dict[str, list[tuple[LayerChange, float]]] = {}
        for adapter, scale in adapters:
            for layer, change in adapter.changes.items():
                if amount := scale.of(layer):
                    network = self.networks[layer.partition(".")[0]]
                    place = next(network.parameters())
                    found.setdefault(layer, []).append((change.to(place.device, place.dtype), amount))
        return found

    def merged_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each merged file, by its name and scale."""
        return {f"{name} {scale}": self.read(name).digest for name, scale in self.merged}

    def merge(self, loras: ScaledFiles) -> None:
        """Merge LoRA files into the weights in place of those merged before. No run may be in progress."""
        changes = self.changes([(self.read(name), scale) for name, scale in loras])
        self.unmerge()
        self._undo, self.merged = merge(self.networks, changes), tuple(loras)

    def unmerge(self) -> None:
        """Restore the weights bit for bit."""
        if self._undo is not None:
            self._undo.undo()
        self._undo, self.merged = None, ()
