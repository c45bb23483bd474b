"""A model's files, described by their configs, indexes and tables of contents before any weights are read.

`ModelFiles` describes a whole model and `NetworkFiles` one of its networks, which it also loads. What is wrong with a
model is a list of sentences, `ModelFiles.problems` and `NetworkFiles.problems`: `inspect_model` shows them all and
`open_model` raises the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn
from torch.overrides import TorchFunctionMode

from mezzotint import samplers
from mezzotint.config import (
    CLIPConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    ControlNetUnionConfig,
    ImageProcessorConfig,
    SafetyCheckerConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from mezzotint.errors import CheckpointError
from mezzotint.model_options import ModelOptions
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.clip_vision import CLIPVisionModel
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.controlnet_union import ControlNetUnion
from mezzotint.models.offload import can_offload, offload_weight
from mezzotint.models.safety_checker import SafetyChecker
from mezzotint.models.t2i_adapter import T2IAdapter
from mezzotint.models.tiny_vae import make_vae
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.placement import Placement
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import Family, Source, Sources
from mezzotint.weights.offload import FileWeight, WeightPlacer
from mezzotint.weights.quantized import pair_scales

Config = UNetConfig | VAEConfig | CLIPConfig | CLIPVisionConfig | SafetyCheckerConfig | T2IAdapterConfig

TINY_VAE = "AutoencoderTiny"  # a VAE of diffusers with a config and a module of its own

# By network: the classes that model_index.json may name, our config, our module.
NETWORKS: dict[str, tuple[tuple[str, ...], type[Config], Callable[[Any], nn.Module]]] = {
    "unet": (("UNet2DConditionModel",), UNetConfig, UNet),
    "vae": (("AutoencoderKL", TINY_VAE), VAEConfig, VAE),
    "text_encoder": (("CLIPTextModel", "CLIPTextModelWithProjection"), CLIPConfig, CLIPTextModel),
    "text_encoder_2": (("CLIPTextModelWithProjection", "CLIPTextModel"), CLIPConfig, CLIPTextModel),
    "safety_checker": (("StableDiffusionSafetyChecker",), SafetyCheckerConfig, SafetyChecker),
    "controlnet": (("ControlNetModel",), ControlNetConfig, ControlNet),
    "controlnet_union": (("ControlNetUnionModel", "ControlNetModel_Union"), ControlNetUnionConfig, ControlNetUnion),
    "t2i_adapter": (("T2IAdapter",), T2IAdapterConfig, T2IAdapter),
    "image_encoder": (("CLIPVisionModelWithProjection",), CLIPVisionConfig, CLIPVisionModel),
}
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
AESTHETIC = "requires_aesthetics_score"  # the field of model_index.json that only SDXL's refiner has set


def encoder_names(model_index: Mapping[str, Any]) -> list[str]:
    """Return the names of a model's text encoders, or more than it has; SDXL's refiner has the second alone."""
    return [*ENCODERS][bool(model_index.get(AESTHETIC)) :]


def config_class(name: str, class_name: object) -> type[Config]:
    """Return our config of a network of this class of diffusers."""
    return TinyVAEConfig if name == "vae" and class_name == TINY_VAE else NETWORKS[name][1]


def make_network(name: str, config: Config) -> nn.Module:
    """Build a network from its config."""
    return make_vae(config) if isinstance(config, VAEConfig) else NETWORKS[name][2](config)


NO_PROJECTION = (
    "has no text_projection of the second text encoder; its pooled vector is used as it is, so pictures follow the "
    "prompt less"
)
NATURAL = (torch.float16, torch.bfloat16, torch.float32)
# Fields that a file's size bounds.
COUNTS = (
    "num_hidden_layers",
    "layers_per_block",
    "num_encoder_blocks",
    "num_decoder_blocks",
    "num_res_blocks",
    "num_trans_layer",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)


class _WithoutInit(TorchFunctionMode):
    """Skip the initialization of parameters, which takes more than a third of the time to build a network."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor that a function of `torch.nn.init` is given; call any other function."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@dataclass
class NetworkFiles:
    """One network: its config, and the tensor in a file for each of its parameters."""

    name: str
    path: Path  # the folder or file, for error messages
    config: Config
    files: Mapping[str, TensorFile]  # tensor name -> its file
    sources: Sources
    unknown: list[str]  # tensors that match no parameter
    quantization: list[str] = field(default_factory=list)  # sentences on quantized weights that cannot be read

    @classmethod
    def of(
        cls,
        name: str,
        path: Path,
        fields: Mapping[str, Any],
        files: Mapping[str, TensorFile],
        sources: Sources,
        unknown: list[str],
    ) -> NetworkFiles:
        """Validate `fields` as the network's config.

        Raises:
            CheckpointError: If a field is wrong; it names the first.
        """
        try:
            config = config_class(name, fields.get("_class_name")).model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its fields"
            raise CheckpointError(f"{path}: the config of {name} is wrong at {where}: {first['msg']}") from None
        widths, groups = getattr(config, "block_out_channels", ()), getattr(config, "norm_num_groups", 1)
        if any(width % groups for width in widths):
            raise CheckpointError(
                f"{path}: the config of {name} has norm_num_groups {groups}, which must divide each of "
                f"block_out_channels, {widths}; give it as config, such as {{'{name}': {{'norm_num_groups': 8}}}}"
            )
        return cls(name, path, config, files, *pair_scales(files, sources, unknown))

    def network(self) -> nn.Module:
        """Build the network on the meta device. Raises CheckpointError if its config is impossible."""
        for name in COUNTS:
            count = getattr(self.config, name, None)
            if max(_flatten(count), default=0) > len(self.sources):
                raise CheckpointError(f"{self.path}: {name} is {count}, but there are {len(self.sources)} tensors")
        try:
            with torch.device("meta"), _WithoutInit():
                return make_network(self.name, self.config).eval()
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        except (RuntimeError, ValueError, TypeError, ArithmeticError, IndexError) as error:
            raise CheckpointError(f"{self.path}: its config does not describe a valid {self.name}: {error}") from None

    def notices(self, network: nn.Module) -> list[str]:
        """Return a sentence about the tensors that no layer uses, if there are any."""
        wanted = network.state_dict().keys()
        extra = self.unknown + [source.key for name, source in self.sources.items() if name not in wanted]
        count = f"{len(extra)} tensor{'s' * (len(extra) > 1)}"
        return [f"{self.path} ({self.name}): {count} not used by any layer: {join_names(extra)}"] if extra else []

    def problems(self, network: nn.Module) -> list[str]:
        """Return sentences about missing tensors, wrong shapes and wrong dtypes."""
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        here = f"{self.path} ({self.name})"
        found = [f"{here}: {problem}" for problem in self.quantization]
        missing = [name for name in wanted if name not in self.sources]
        if missing:
            found.append(f"{here} lacks {join_names(missing)}")
        for name, want in wanted.items():
            if name not in self.sources:
                continue
            source = self.sources[name]
            have, dtype = self._shape(source), self.files[source.key].entries[source.key].dtype
            if not dtype.is_floating_point:
                how = (
                    " (quantized, for example int8 with convrot, which is not supported)" if dtype.itemsize == 1 else ""
                )
                found.append(f"{here}: {source.key} is {dtype_name(dtype)}{how}; weights must be floating-point")
            elif not _fits(have, want):
                found.append(f"{here}: {source.key} has shape {have}; by its config it must be {want}")
        return found

    def _shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of the tensor after `load` has converted it."""
        shape = self.files[source.key].entries[source.key].shape
        if source.third is not None and shape and shape[0] % 3 == 0:
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if source.transpose else shape

    def dtypes(self) -> Counter[torch.dtype]:
        """Count the elements of each dtype in the files."""
        total: Counter[torch.dtype] = Counter()
        for key in {source.key for source in self.sources.values()}:
            entry = self.files[key].entries[key]
            total[entry.dtype] += entry.count
        return total

    def natural_dtype(self) -> torch.dtype:
        """Return the dtype of most weights; float16 for 8-bit floats and float32 for float64."""
        most = self.dtypes().most_common(1)[0][0]
        if most in NATURAL:
            return most
        return torch.float16 if most.itemsize == 1 else torch.float32

    def load(
        self,
        network: nn.Module,
        dtype: torch.dtype | None,
        device: torch.device,
        placement: Placement = Placement(),  # noqa: B008  # frozen
    ) -> None:
        """Read the weights into a network, one tensor at a time.

        Args:
            network: A network from `network`, without `problems`.
            dtype: The dtype of the weights. By default `natural_dtype`.
            device: Where the network computes.
            placement: Where large weights are stored.

        Raises:
            RequestError: If the placement is not possible on this device.
        """
        dtype = dtype or self.natural_dtype()
        placer = WeightPlacer(placement, dtype, device)
        for name, empty in network.state_dict(keep_vars=True).items():
            source = self.sources[name]
            scale = None if source.scale is None else self.files[source.scale].read(source.scale).float()
            weight = FileWeight(self.files[source.key], source, empty.shape, scale)
            owner, _, leaf = name.rpartition(".")
            layer = network.get_submodule(owner)
            if placer.replaces_parameters and leaf == "weight" and can_offload(layer, empty):
                offload_weight(layer, placer.place(weight), dtype, device)
            else:
                layer.register_parameter(leaf, nn.Parameter(weight.tensor(dtype, device)))


@dataclass(frozen=True)
class CheckerFiles:
    """A network that reads pictures, a safety checker or an adapter's vision encoder, before its weights are read.

    Attributes:
        network: Its network.
        processor: How pictures become its input.
        paths: All its files.
    """

    network: NetworkFiles
    processor: ImageProcessorConfig
    paths: list[Path]


class FewStep(BaseModel):
    """The field `few_step` of mezzotint.json: the solver and the UNet's LoRA for generation in few steps.

    Attributes:
        sampler: The solver that uses the LoRA.
        steps: Default number of steps with it.
        guidance_scale: Default guidance scale with it.
        lora: Name of a file in the folder of mezzotint.json.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: str
    steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=1.0, le=1000.0)
    lora: str = Field(pattern=r"^[\w-][\w.-]*\.safetensors$")

    @field_validator("sampler")
    @classmethod
    def _solver_is_known(cls, value: str) -> str:
        if value not in samplers.SOLVERS:
            raise ValueError(f"{value[:60]!r} is not a solver of `mezzotint samplers`")
        return value


@dataclass
class ModelFiles:
    """A model before its weights are read."""

    path: Path
    layout: str  # "diffusers folder" or "single file"
    family: Family = "sd1"
    parts: list[NetworkFiles] = field(default_factory=list)
    tokenizers: list[Callable[[], Tokenizer]] = field(default_factory=list)
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    prediction_source: str = "scheduler_config.json"  # what says which prediction type it is
    model_index: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    few_step: FewStep | None = None
    files: list[Path] = field(default_factory=list)  # all that the model is made of
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # of what was guessed or left out; they do not prevent loading
    passed_over: list[str] = field(default_factory=list)
    options: ModelOptions = field(default_factory=ModelOptions)
    latents: dict[str, Any] = field(default_factory=dict)  # VAE config fields that belong to the UNet's latent space
    given_files: dict[str, list[Path]] = field(default_factory=dict)  # by option, files in place of the model's own
    checker: CheckerFiles | None = None
    unchecked: str = ""  # why the safety checker that model_index.json names cannot be used

    @property
    def prediction(self) -> str:
        """What its UNet predicts."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    def config(self, name: str) -> Config | None:
        """Return the config of a network, or None if the model does not have it."""
        return next((part.config for part in self.parts if part.name == name), None)


def join_names(names: Sequence[str], limit: int = 4) -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def _flatten(count: Any) -> Iterator[int]:
    """Yield the numbers in a number, in nested tuples of them, or in None."""
    if isinstance(count, tuple):
        for each in count:
            yield from _flatten(each)
    elif count is not None:
        yield count


def _fits(have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Return whether the shapes are equal, or those of a linear layer and a 1x1 convolution with the same elements."""
    return have == want or (*have, 1, 1) == want or have == (*want, 1, 1)
