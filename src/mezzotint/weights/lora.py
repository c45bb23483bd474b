"""Read LoRA files and their relatives for a model, whatever program wrote them (lora_keys.py has the names)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from mezzotint.errors import CheckpointError
from mezzotint.files import hash_file
from mezzotint.models.adapters import Changes, LayerChange, MergedWeights, merge
from mezzotint.weights.embeddings import BUNDLED
from mezzotint.weights.files import TensorFile
from mezzotint.weights.hub import resource
from mezzotint.weights.lora_changes import Alphas, find_mismatch, read_change
from mezzotint.weights.lora_files import choose_files, find_file
from mezzotint.weights.lora_keys import detect_family, layer_names, other_kind, split_key
from mezzotint.weights.model_files import join_names

MAX_FILE_BYTES = 2**34  # bytes; every weight of SDXL in float32 has 14 GB


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


def read_adapter(
    path: str | Path, networks: Mapping[str, nn.Module], table: Mapping[str, str] | None = None
) -> Adapter:
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
    path = find_file(path)
    file = TensorFile(path)
    if file.size > MAX_FILE_BYTES:  # all of it is hashed, whatever belongs to a layer
        raise CheckpointError(f"{path} has {file.size:,} bytes; a LoRA may have at most {MAX_FILE_BYTES:,}")
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


def read_unet_lora(path: str | Path, unet: nn.Module) -> Changes:
    """Read a LoRA that changes this UNet and nothing else, whole: the changes, at a scale of 1.

    Raises:
        CheckpointError: If the file is damaged, or any of its tensors does not belong to a layer of this UNet.
    """
    adapter = read_adapter(path, {"unet": unet})
    if foreign := [*adapter.coverage.unmatched, *adapter.coverage.bundled]:
        raise CheckpointError(f"{path} has tensors that match no layer of this UNet: {join_names(foreign)}")
    return {layer: [(change, 1.0)] for layer, change in adapter.changes.items()}


def coverage(path: str | Path, networks: Mapping[str, nn.Module]) -> Coverage:
    """Return what part of a file fits networks, from its names and shapes alone. They may be on the meta device."""
    return _match(TensorFile(find_file(path)), networks, layer_names(networks), real=False)[1]


def _match(
    file: TensorFile, networks: Mapping[str, nn.Module], table: Mapping[str, str], *, real: bool
) -> tuple[dict[str, LayerChange], Coverage]:
    """Match a file's tensors with layers. With `real` they are read; without, only their shapes are compared."""
    layers: dict[str, dict[str, str]] = {}  # layer -> role -> key
    unmatched: list[str] = []
    bundled: list[str] = []
    for key in file.entries:
        if kind := other_kind(key):
            raise CheckpointError(
                f"{file.path} is {kind} ({key[:200]}), which cannot be applied; merge it into its model with the "
                "program that trained it, and load that model"
            )
        found = split_key(key)
        if BUNDLED.fullmatch(key):
            bundled.append(key)
        elif found and found[1] == "scale" and f"{found[0]}.on_input" not in file.entries:
            unmatched.append(key)
        elif found and found[0] in table:
            roles = layers.setdefault(table[found[0]], {})
            if found[1] in roles:
                raise CheckpointError(f"{file.path} has {roles[found[1]]} and {key}, which mean the same tensor")
            roles[found[1]] = key
        else:
            unmatched.append(found[0] if found else key)
    alphas = Alphas.of(file)
    changes: dict[str, LayerChange] = {}
    wrong: dict[str, str] = {}
    for name in [name for name, roles in layers.items() if [*roles] == ["alpha"]]:  # pruned layers leave one
        unmatched.append(layers.pop(name)["alpha"])
    for name, roles in layers.items():
        network, _, path = name.partition(".")
        layer = networks[network].get_submodule(path)
        problem = find_mismatch(name, layer, {role: file.entries[key].shape for role, key in roles.items()})
        if problem:
            wrong[name] = problem
        elif real:
            changes[name] = read_change(name, layer, file, roles, alphas)
    matched = tuple(name for name in layers if name not in wrong)
    return changes, Coverage(matched, tuple(dict.fromkeys(unmatched)), tuple(wrong.values()), tuple(bundled))


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
            place = self._places[name] = resource(name, "LoRA", partial(choose_files, name))
        try:
            path = find_file(place)
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
                    found.setdefault(layer, []).extend(change.to(place.device, place.dtype).at(amount))
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
