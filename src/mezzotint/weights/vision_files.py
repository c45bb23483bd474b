"""Find and describe CLIP vision encoders, in diffusers' folders and in single files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mezzotint.config import CLIPVisionConfig, ImageProcessorConfig
from mezzotint.errors import CheckpointError
from mezzotint.files import hash_file
from mezzotint.model_options import ModelOptions
from mezzotint.weights.files import TensorFile
from mezzotint.weights.folder import read_json, read_part
from mezzotint.weights.keys import Source
from mezzotint.weights.kinds import describe_kind
from mezzotint.weights.model_files import CheckerFiles, NetworkFiles
from mezzotint.weights.safety import find_processor

NAME = "image_encoder"  # of its folder beside an adapter
CLASS = "CLIPVisionModelWithProjection"
KEYS = ("vision_model.", "visual_projection.")
CLASS_TOKEN = "vision_model.embeddings.class_embedding"


@dataclass(frozen=True)
class KnownEncoder:
    """An encoder that public adapters were trained with.

    Attributes:
        name: Its name.
        folder: Where h94/IP-Adapter on the hub has it; None if it does not.
        fields: Its configuration, of which shapes do not tell all.
    """

    name: str
    folder: str | None
    fields: dict[str, Any]

    @property
    def widths(self) -> tuple[int, int]:
        """Sizes of the hidden states and of the embedding."""
        return self.fields["hidden_size"], self.fields["projection_dim"]


def _known(name: str, folder: str | None, hidden: int, inner: int, layers: int, embed: int, act: str) -> KnownEncoder:
    fields = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "projection_dim": embed}
    return KnownEncoder(name, folder, {**fields, "num_attention_heads": 16, "patch_size": 14, "hidden_act": act})


KNOWN = (
    _known("CLIP ViT-H/14", "models/image_encoder", 1280, 5120, 32, 1024, "gelu"),
    _known("CLIP ViT-bigG/14", "sdxl_models/image_encoder", 1664, 8192, 48, 1280, "gelu"),
    _known("CLIP ViT-L/14", None, 1024, 4096, 24, 768, "quick_gelu"),
)


@dataclass(frozen=True, eq=False)
class VisionFiles(CheckerFiles):
    """A CLIP vision encoder before its weights are read; the last of `paths` has weights."""

    @property
    def config(self) -> CLIPVisionConfig:
        """The configuration."""
        return cast(CLIPVisionConfig, self.network.config)

    @property
    def widths(self) -> tuple[int, int]:
        """Sizes of the hidden states and of the embedding."""
        return self.config.hidden_size, self.config.projection_dim

    @property
    def digest(self) -> str:
        """SHA-256 of the weights' file; of several that of the last."""
        return hash_file(self.paths[-1])


def is_vision_folder(path: Path) -> bool:
    """Return whether a folder is that of a CLIP vision encoder."""
    config = path / "config.json"
    return config.is_file() and CLASS in (read_json(config).get("architectures") or ())


def scan_vision(path: Path) -> VisionFiles:
    """Describe a CLIP vision encoder's folder or file without reading weights.

    Raises:
        CheckpointError: If it is missing, damaged, or something else.
    """
    network = read_part(path, NAME, CLASS, ModelOptions()) if path.is_dir() else _of_file(path)
    for problem in network.problems(network.network()):
        raise CheckpointError(problem)
    folder = path if path.is_dir() else path.parent
    processor, described = find_processor(folder) if path.is_dir() else (None, [])
    side = cast(CLIPVisionConfig, network.config).image_size
    if processor is None or not described:
        processor = ImageProcessorConfig(size=side, crop_size=(side, side))
    elif processor.crop_size != (side, side):
        height, width = processor.crop_size
        raise CheckpointError(f"{described[0]} crops pictures to {width}x{height}; the encoder's image_size is {side}")
    weights = sorted({file.path for file in network.files.values()})
    configs = [path / "config.json", *described] if path.is_dir() else []
    return VisionFiles(network, processor, [*configs, *weights])


def _of_file(path: Path) -> NetworkFiles:
    """Describe a single file, with transformers' names of the tensors."""
    file = TensorFile(path)
    shapes = file.shapes
    sizes = shapes.get(CLASS_TOKEN, ()), shapes.get("visual_projection.weight", ())
    known = next((one for one in KNOWN if sizes == ((one.widths[0],), one.widths[::-1])), None)
    if CLASS_TOKEN not in shapes:
        raise CheckpointError(f"{path} is {describe_kind(shapes)}; it must be a CLIP vision encoder")
    if known is None:
        raise CheckpointError(
            f"{path} is a CLIP vision encoder that its file alone does not describe; give a folder with its config.json"
        )
    sources = {key: Source(key) for key in shapes if key.startswith(KEYS)}
    return NetworkFiles.of(NAME, path, known.fields, dict.fromkeys(shapes, file), sources, [])
