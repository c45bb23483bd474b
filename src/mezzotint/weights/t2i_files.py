"""Find and describe a T2I-Adapter: a diffusers folder, or a single file with diffusers' names or its authors'.

Its authors number the residual blocks of all features in one list; diffusers has a list for each feature. Full adapters
for SDXL have the same names and inner shapes as those for Stable Diffusion 1, and four times the input channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mezzotint.config import T2IAdapterConfig, UNetConfig
from mezzotint.errors import CheckpointError
from mezzotint.files import hash_file
from mezzotint.model_options import FAMILIES, ModelOptions
from mezzotint.models.t2i_adapter import T2IAdapter
from mezzotint.models.unet import UNet
from mezzotint.placement import Placement
from mezzotint.weights.files import TensorFile
from mezzotint.weights.folder import read_json, read_part
from mezzotint.weights.keys import Shapes, count_numbers, rename_keys
from mezzotint.weights.model_files import NetworkFiles, join_names

NAME = "t2i_adapter"
CLASS = "T2IAdapter"
PREFIX = "adapter."
XL_INPUTS = (256, 768)  # channels after unshuffling by 16, of one or three; by 8 they are 64 and 192
PER_FEATURE = 2  # residual blocks of a full adapter whose authors numbered them
UNSUPPORTED = re.compile(r"\.(down_opt|skep)\.")  # layers that no published adapter of diffusers has


@dataclass(frozen=True, eq=False)
class T2IFiles:
    """A T2I-Adapter before its weights are read.

    Attributes:
        network: Its network.
        layout: The form of its files, in words.
        paths: All its files.
    """

    network: NetworkFiles
    layout: str
    paths: tuple[Path, ...]
    depends_on_unet = False

    @property
    def config(self) -> T2IAdapterConfig:
        """The configuration."""
        return cast(T2IAdapterConfig, self.network.config)

    @property
    def families(self) -> str:
        """The families of the models that it is for, in words."""
        if self.config.adapter_type == "full_adapter_xl":
            return FAMILIES["sdxl"]
        return f"{FAMILIES['sd1']} or 2"  # it knows nothing of the text encoder

    @property
    def digest(self) -> str:
        """SHA-256 of the weights' file; of several that of the last."""
        return hash_file(self.paths[-1])

    def load(self, unet: UNet, dtype: torch.dtype, device: torch.device, placement: Placement) -> T2IAdapter:
        """Build the network and read its weights.

        Args:
            unet: Not used; a ControlNet's files may depend on it.
            dtype: What it computes in.
            device: Where it computes.
            placement: Where large weights are stored.
        """
        del unet
        network = cast(T2IAdapter, self.network.network())
        self.network.load(network, dtype, device, placement)
        return network.requires_grad_(False)

    def mismatch(self, unet: UNetConfig) -> str | None:
        """Return why it does not fit a UNet, as the rest of a sentence; None if it does."""
        is_xl, wants_xl = self.config.adapter_type == "full_adapter_xl", unet.addition_embed_type == "text_time"
        if is_xl != wants_xl:
            model = FAMILIES["sdxl"] if wants_xl else f"{FAMILIES['sd1']} or 2"
            return f"is a T2I-Adapter for {self.families}; the model is {model}"
        first = self.config.features[0][1]
        have = [(width, pixels // first) for width, pixels in self.config.features]
        places = feature_places(unet)
        want = [(width, scale // places[0][1]) for width, scale in places]
        if have != want[: len(have)]:
            return (
                f"is a T2I-Adapter for another model: its features have {_describe(have)}; the UNet takes "
                f"{_describe(want)}"
            )
        return None


def feature_places(unet: UNetConfig) -> list[tuple[int, int]]:
    """Return where a UNet takes features: the channels, and latents to one place of it along a side."""
    last = len(unet.block_out_channels) - 1
    places = []
    for level, (width, depths) in enumerate(zip(unet.block_out_channels, unet.down_depths, strict=True)):
        places.append((width, 1 << (level if any(depths) else min(level + 1, last))))
    return [*places, (unet.block_out_channels[-1], 1 << last)]


def is_t2i_file(shapes: Shapes) -> bool:
    """Return whether a file is a T2I-Adapter's."""
    keys = {key.removeprefix(PREFIX) for key in shapes}
    return any(re.match(r"body\.\d+\.(block1|in_conv|(resnets|body)\.\d+\.block1)\.", key) for key in keys)


def read_t2i(path: Path) -> T2IFiles:
    """Describe a T2I-Adapter's folder or file, whatever UNet it fits.

    Raises:
        CheckpointError: If it is damaged or not a T2I-Adapter.
    """
    if path.is_dir():
        network = read_part(path, NAME, CLASS, ModelOptions())
        weights = sorted({file.path for file in network.files.values()})
        return T2IFiles(network, "diffusers folder", (path / "config.json", *weights))
    file = TensorFile(path)
    if strange := [key for key in file.shapes if UNSUPPORTED.search(key)]:
        raise CheckpointError(f"{path} is a T2I-Adapter of an unsupported form: {join_names(strange)}")
    prefix = PREFIX if any(key.startswith(PREFIX) for key in file.shapes) else ""
    own = {key.removeprefix(prefix): shape for key, shape in file.shapes.items() if key.startswith(prefix)}
    try:
        sources, unknown = rename_keys(own, {key: f"{PREFIX}{_module_name(key, own)}" for key in own})
        fields = _config_fields({target: own[source.key] for target, source in sources.items()})
    except KeyError as error:
        raise CheckpointError(f"{path} (a T2I-Adapter) lacks {error.args[0]}") from None
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} is not a T2I-Adapter that can be read: {error}") from None
    sources = {target: source._replace(key=prefix + source.key) for target, source in sources.items()}
    files = dict.fromkeys(file.entries, file)
    network = NetworkFiles.of(NAME, path, fields, files, sources, [prefix + key for key in unknown])
    return T2IFiles(network, "single file", (path,))


def describe_t2i(path: Path) -> tuple[str, list[str]]:
    """Describe a T2I-Adapter's folder or file in words, and what is wrong with it."""
    try:
        found = read_t2i(path)
        kind = "light" if found.config.adapter_type == "light_adapter" else "full"
        channels = "grey" if found.config.in_channels == 1 else "coloured"
        words = f"a T2I-Adapter for {found.families} ({kind}, of {channels} pictures; {found.layout})"
        return words, found.network.problems(found.network.network())
    except CheckpointError as error:
        return "a T2I-Adapter", [str(error)]


def is_t2i_folder(path: Path) -> bool:
    """Return whether a folder is a T2I-Adapter's."""
    config = path / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == CLASS


def _module_name(key: str, shapes: Shapes) -> str:
    """Return the name of a tensor in diffusers' numbering."""
    if any(".resnets." in each for each in shapes):
        return key
    if any(".body." in each for each in shapes):  # a light adapter
        return re.sub(r"^body\.(\d+)\.body\.", r"body.\1.resnets.", key)
    found = re.fullmatch(r"body\.(\d+)\.(block\d|in_conv)\.(\w+)", key)
    if found is None:
        return key
    feature, block = divmod(int(found[1]), PER_FEATURE)
    if found[2] == "in_conv":
        return f"body.{feature}.in_conv.{found[3]}"
    return f"body.{feature}.resnets.{block}.{found[2]}.{found[3]}"


def _config_fields(shapes: Shapes) -> dict[str, Any]:
    """Return T2IAdapterConfig fields from the shapes by module name. Raises KeyError if a tensor is missing."""
    body = f"{PREFIX}body"
    count = count_numbers(shapes, rf"{re.escape(body)}\.(\d+)\.")
    light = f"{body}.0.out_conv.weight" in shapes
    first = shapes[f"{body}.0.in_conv.weight" if light else f"{PREFIX}conv_in.weight"]
    xl = not light and first[1] in XL_INPUTS
    scale = 16 if xl else 8
    if first[1] % scale**2:
        raise ValueError(
            f"its first convolution has {first[1]} input channels, not {scale}x{scale} pixels of a picture"
        )
    last = "out_conv" if light else "resnets.0.block1"
    widths = [shapes[f"{body}.{k}.{last}.weight"][0] for k in range(count)]
    return {
        "in_channels": first[1] // scale**2,
        "channels": widths[:-1] if light else widths,
        "num_res_blocks": count_numbers(shapes, rf"{re.escape(body)}\.0\.resnets\.(\d+)\."),
        "downscale_factor": scale,
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if xl else "full_adapter",
    }


def _describe(features: list[tuple[int, int]]) -> str:
    """Say how wide features are, and at which of the UNet's resolutions."""
    return ", ".join(f"{width} channels at 1/{scale}" for width, scale in features)
