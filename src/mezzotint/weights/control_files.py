"""Find and describe a ControlNet: a diffusers folder, a single file in any of its forms, or a hub id.

What is found may be a T2I-Adapter too, which t2i_files.py describes.

Two forms hold a difference from the UNet that it is used with: a Control-LoRA (the tensor `lora_controlnet`) has
factors of some changes and takes all else from the UNet, and the other (`difference`) is added to it tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mezzotint.config import ControlNetConfig, ControlNetUnionConfig, UNetConfig
from mezzotint.errors import CheckpointError
from mezzotint.files import hash_file
from mezzotint.model_options import FAMILIES, ModelOptions
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.unet import UNet
from mezzotint.placement import Placement
from mezzotint.weights import controlnet_keys as keys
from mezzotint.weights.files import TensorFile
from mezzotint.weights.folder import choose_weights, read_json, read_part
from mezzotint.weights.hub import BUNDLED_CONTROL, network_files, resource
from mezzotint.weights.keys import Family, Shapes, Sources
from mezzotint.weights.kinds import describe_kind
from mezzotint.weights.model_files import NETWORKS, NetworkFiles
from mezzotint.weights.t2i_files import CLASS as T2I_CLASS
from mezzotint.weights.t2i_files import T2IFiles, describe_t2i, is_t2i_file, is_t2i_folder, read_t2i

NAME = "controlnet"  # of its folder in a model
CLASS = "ControlNetModel"
UNION = "controlnet_union"
CLASSES = (CLASS, *NETWORKS[UNION][0])
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
HINTS = ("controlnet_cond_embedding.", "input_hint_block.", "control_model.")  # how keys of a ControlNet begin


@dataclass(frozen=True, eq=False)
class ControlFiles:
    """A ControlNet before its weights are read.

    Attributes:
        network: Its network; of a Control-LoRA `sources` has what the file holds whole.
        layout: The form of its files, in words.
        factors: By parameter, the keys of the two factors of its change (Control-LoRA).
        adds: The parameters whose tensor is a difference from the UNet's.
        paths: All its files.
    """

    network: NetworkFiles
    layout: str
    factors: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    adds: frozenset[str] = frozenset()
    paths: tuple[Path, ...] = ()

    @property
    def config(self) -> ControlNetConfig:
        """The configuration."""
        return cast(ControlNetConfig, self.network.config)

    @property
    def family(self) -> Family:
        """The family of the models that it is for."""
        config = self.config
        if config.addition_embed_type:
            return "sdxl"
        return "sd2" if config.cross_attention_dim == 1024 or config.use_linear_projection else "sd1"

    @property
    def types(self) -> int:
        """How many types of picture a ControlNet Union has; of others 0."""
        return self.config.num_control_type if isinstance(self.config, ControlNetUnionConfig) else 0

    @property
    def digest(self) -> str:
        """SHA-256 of the weights' file; of several that of the first."""
        return hash_file(self.paths[-1])

    @property
    def depends_on_unet(self) -> bool:
        """Whether it is stored as a difference from a UNet."""
        return bool(self.factors or self.adds)

    def load(self, unet: UNet, dtype: torch.dtype, device: torch.device, placement: Placement) -> ControlNet:
        """Build the network and read its weights.

        Args:
            unet: The UNet that it is used with.
            dtype: What it computes in.
            device: Where it computes.
            placement: Where large weights are stored. One that depends on the UNet is always on the device.

        Raises:
            CheckpointError: If a change does not fit.
        """
        network = cast(ControlNet, self.network.network())
        if not self.depends_on_unet:
            self.network.load(network, dtype, device, placement)
            return network.requires_grad_(False)
        for name in network.state_dict():
            owner, _, leaf = name.rpartition(".")
            weight = nn.Parameter(self._tensor(name, unet, dtype, device), requires_grad=False)
            network.get_submodule(owner).register_parameter(leaf, weight)
        return network.eval()

    def _tensor(self, name: str, unet: UNet, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a parameter: the file's, or the UNet's with the file's change; unchanged it is the UNet's own."""
        own = self.network.sources.get(name)
        read = self.network.files
        if own is not None and name not in self.adds:
            return read[own.key].read(own.key).to(device, dtype).reshape(self._shape(name, unet))
        owner, _, leaf = name.rpartition(".")
        base: torch.Tensor = getattr(unet.get_submodule(owner), leaf).detach()
        if own is not None:
            change = read[own.key].read(own.key).float()
        elif name in self.factors:
            up, down = (read[key].read(key).float().flatten(1) for key in self.factors[name])
            change = up @ down
        else:
            return base
        return (base.float() + change.to(device).reshape(base.shape)).to(dtype)

    def _shape(self, name: str, unet: UNet) -> torch.Size:
        """Return the shape of a parameter that the file holds whole."""
        source = self.network.sources[name]
        shape = self.network.files[source.key].entries[source.key].shape
        owner, _, leaf = name.rpartition(".")
        try:
            return cast(torch.Size, getattr(unet.get_submodule(owner), leaf).shape)  # a linear layer for a 1x1 one
        except AttributeError:
            return torch.Size(shape)


def scan_control(name: str, unet: UNetConfig) -> ControlFiles | T2IFiles:
    """Describe a ControlNet or a T2I-Adapter without reading weights.

    Args:
        name: A file, a folder, a hub id, or the bundled one's name.
        unet: The configuration of the UNet that it is used with.

    Raises:
        CheckpointError: If it is missing, damaged, neither of them, or one for another model.
    """
    path = _find(_locate(name))
    found = read_t2i(path) if _is_t2i(path) else read_control(path, unet)
    if reason := found.mismatch(unet) if isinstance(found, T2IFiles) else _mismatch(found, unet):
        raise CheckpointError(f"{found.network.path} {reason}")
    whole = isinstance(found, T2IFiles) or not found.factors
    for problem in found.network.problems(found.network.network()) if whole else ():
        raise CheckpointError(problem)
    return found


def _is_t2i(path: Path) -> bool:
    """Return whether a folder or file is a T2I-Adapter's."""
    return is_t2i_folder(path) if path.is_dir() else path.is_file() and is_t2i_file(TensorFile(path).shapes)


def is_control_folder(path: Path) -> bool:
    """Return whether a folder is a ControlNet's or a T2I-Adapter's."""
    config = path / "config.json"
    return config.is_file() and read_json(config).get("_class_name") in (*CLASSES, T2I_CLASS)


def describe_control(path: Path, shapes: Shapes) -> tuple[str, list[str]]:
    """Describe a ControlNet's or T2I-Adapter's folder or file in words, and what is wrong with it.

    Args:
        path: The folder or file.
        shapes: The shapes in the file.
    """
    if is_t2i_folder(path) if path.is_dir() else is_t2i_file(shapes):
        return describe_t2i(path)
    if keys.MARKERS[0] in shapes:
        pairs = [shape[1] for key, shape in shapes.items() if key.endswith(keys.FACTORS[0]) and len(shape) > 1]
        added = any(key.startswith("label_emb.") for key in shapes)
        context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.down")), 0)
        family = FAMILIES["sdxl" if added else "sd2" if context == 1024 else "sd1"]
        return f"a Control-LoRA for {family}, {len(pairs)} changes of rank {max(pairs, default=0)}", []
    try:
        found = read_control(path, UNetConfig())
        types = f" Union of {found.types} types" if found.types else ""
        kind = f"a ControlNet{types} for {FAMILIES[found.family]} ({found.layout})"
        return kind, found.network.problems(found.network.network())
    except CheckpointError as error:
        return "a ControlNet", [str(error)]


def read_control(path: Path, unet: UNetConfig) -> ControlFiles:
    """Describe a ControlNet's folder or file, whatever UNet it fits.

    Raises:
        CheckpointError: If it is damaged or not a ControlNet.
    """
    if path.is_dir():
        described = read_json(path / "config.json").get("_class_name", CLASS)
        if described not in CLASSES:
            raise CheckpointError(f"{path} is a {str(described)[:100]}; it must be a {' or '.join(CLASSES[:2])}")
        network = _read_folder(path, described)
        weights = sorted({file.path for file in network.files.values()})
        return ControlFiles(network, "diffusers folder", paths=(path / "config.json", *weights))
    file = TensorFile(path)
    shapes = file.shapes
    if not any(key.startswith(HINTS) for key in shapes):
        raise CheckpointError(f"{path} holds {describe_kind(shapes)}, not a ControlNet or T2I-Adapter")
    is_union = any(key.endswith(keys.TASKS) for key in shapes)
    is_lora, is_difference = (marker in shapes for marker in keys.MARKERS)
    try:
        sources, unknown = keys.sources_of(shapes, unet)
        by_name = {target: shapes[source.key] for target, source in sources.items()}
        if is_lora:
            fields = unet.model_dump() | keys.embedding_fields(by_name)
        else:
            fields = _described(path) or keys.config_fields(by_name, unet)
            fields |= keys.union_fields(by_name) if is_union else {}
    except KeyError as error:
        raise CheckpointError(f"{path} (a ControlNet) lacks {error.args[0]}") from None
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} is not a ControlNet that can be read: {error}") from None
    factors = _factors(sources) if is_lora else {}
    whole = {target: source for target, source in sources.items() if not target.endswith(keys.FACTORS)}
    files = dict.fromkeys(file.entries, file)
    network = NetworkFiles.of(
        UNION if is_union else NAME, path, {**fields, "time_cond_proj_dim": None}, files, whole, unknown
    )
    of_unet = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
    adds = frozenset(target for target in whole if target.startswith(of_unet)) if is_difference else frozenset()
    layout = "Control-LoRA" if is_lora else "difference" if is_difference else "single file"
    return ControlFiles(network, layout, factors, adds, (path,))


def _read_folder(path: Path, described: str) -> NetworkFiles:
    """Describe a folder's network. A Union's shapes decide, since a folder may hold weights for 6 types and for 8."""
    if described == CLASS:
        network = read_part(path, NAME, CLASS, ModelOptions())
        if keys.TASKS not in network.files:
            return network
    network = read_part(path, UNION, CLASSES[1], ModelOptions())
    try:
        own = keys.union_fields({key: file.entries[key].shape for key, file in network.files.items()})
        network.config = ControlNetUnionConfig.model_validate(network.config.model_dump() | own)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a ControlNet Union that can be read: {error}") from None
    return network


def _factors(sources: Sources) -> dict[str, tuple[str, str]]:
    """Return the two keys of each parameter that a Control-LoRA changes."""
    up, down = keys.FACTORS
    stems = [target.removesuffix(up) for target in sources if target.endswith(up)]
    return {f"{stem}.weight": (sources[stem + up].key, sources[stem + down].key) for stem in stems}


def _described(path: Path) -> dict[str, Any] | None:
    """Return the config.json beside a file of diffusers, if it is a ControlNet's."""
    config = path.with_name("config.json")
    fields = read_json(config) if config.exists() else {}
    return fields if fields.get("_class_name") in CLASSES else None


def _mismatch(found: ControlFiles, unet: UNetConfig) -> str | None:
    """Return why a ControlNet does not fit a UNet, as the rest of a sentence; None if it does."""
    own, family = found.config, family_of(unet)
    if found.factors:
        return _wrong_factor(found, unet)
    if found.family != family:
        return f"is a ControlNet for {FAMILIES[found.family]}; the model is {FAMILIES[family]}"
    attends = any(map(any, own.down_depths)) or own.mid_depth
    for name, have, want in (
        ("in_channels", own.in_channels, unet.out_channels),
        ("block_out_channels", own.block_out_channels, unet.block_out_channels),
        ("layers_per_block", own.per_level(own.layers_per_block), unet.per_level(unet.layers_per_block)),
        ("cross_attention_dim", own.cross_attention_dim if attends else unet.cross_attention_dim,
         unet.cross_attention_dim),
        ("projection_class_embeddings_input_dim", own.projection_class_embeddings_input_dim,
         unet.projection_class_embeddings_input_dim),
    ):  # fmt: skip
        if have != want:
            return f"is a ControlNet for another model: its {name} is {have}, the UNet's {want}"
    return None


def _wrong_factor(found: ControlFiles, unet: UNetConfig) -> str | None:
    """Return why a Control-LoRA does not fit a UNet; None if it does."""
    network = found.network.network()
    have = {name: found.network.files[source.key].entries[source.key].shape
            for name, source in found.network.sources.items()}  # fmt: skip
    for name, tensor in network.state_dict().items():
        if name in found.factors:
            up, down = (found.network.files[key].entries[key].shape for key in found.factors[name])
            fits = up[0] == tensor.shape[0] and up[1] == down[0] and up[0] * _size(down) == tensor.numel()
        else:
            fits = name not in have or torch.Size(have[name]).numel() == tensor.numel()
            if name not in have and name.startswith("controlnet_"):
                return f"lacks {name}"
        if not fits:
            return f"is a Control-LoRA for another model: its change of {name} has another shape"
    return None


def _size(shape: tuple[int, ...]) -> int:
    """Return the elements of one row."""
    return torch.Size(shape[1:]).numel()


def family_of(unet: UNetConfig) -> Family:
    """Return the family of a UNet."""
    if unet.addition_embed_type == "text_time":
        return "sdxl"
    return "sd2" if unet.cross_attention_dim == 1024 or unet.use_linear_projection else "sd1"


def _locate(name: str) -> Path:
    """Return an existing path, the bundled ControlNet for its name, or a snapshot from the hub."""
    if name == BUNDLED_CONTROL.name and not Path(name).exists():
        return BUNDLED_CONTROL
    return resource(name, "ControlNet", partial(_choose, name))


def _find(path: Path) -> Path:
    """Return a ControlNet's file, or its folder: the path itself, its folder controlnet, or its one file."""
    if not path.is_dir():
        return path
    for folder in (path, path / NAME):
        if (folder / "config.json").is_file() and choose_weights((file.name for file in folder.iterdir()), None):
            return folder
    return path / _one_file(str(path), [file.name for file in path.iterdir()])


def _choose(name: str, listing: Iterable[str]) -> list[str]:
    """Choose the files of a ControlNet in a hub repository."""
    names = set(listing)
    for folder in ("", f"{NAME}/"):
        files = network_files(names, folder, None)
        if f"{folder}config.json" in names and files:
            return files
    return [_one_file(name, names)]


def _one_file(name: str, names: Iterable[str]) -> str:
    """Return the only file of tensors among the names. Raises CheckpointError if it is not one."""
    there = sorted(each for each in names if "/" not in each)
    found = next(filter(None, ([n for n in there if n.endswith(suffix)] for suffix in SUFFIXES)), [])
    if len(found) != 1:
        raise CheckpointError(
            f"{name} has {len(found)} files that could be the ControlNet; it must have config.json and weights, or one "
            "file; otherwise name the file or the folder in it"
        )
    return found[0]
