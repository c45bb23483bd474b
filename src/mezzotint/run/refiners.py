"""The refiner of a run: a second model, which takes the last steps with prompts of its own, and the first one's VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mezzotint.conditioning.encode import Conditioner
from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.diffusion.blend import Denoiser
from mezzotint.diffusion.prediction import Prediction
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.files import hash_file
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.placement import Placement
from mezzotint.run.kept import Descriptions, LastRun
from mezzotint.run.model_info import ModelInfo
from mezzotint.run.networks import fuse_projections
from mezzotint.run.resolve import check_pag
from mezzotint.weights.checkpoint import load_networks, scan_refiner
from mezzotint.weights.lora import Adapters
from mezzotint.weights.model_files import ModelFiles

if TYPE_CHECKING:
    from mezzotint.run.plan import RunPlan
    from mezzotint.run.prompts import PromptEncoder


@dataclass(frozen=True, eq=False)
class RefinerInput:
    """The refiner of a planned run.

    Attributes:
        files: Its files.
        info: The facts that plans depend on, with the other model's VAE.
    """

    files: ModelFiles
    info: ModelInfo

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each of its files by the name relative to its folder."""
        root = self.files.path if self.files.path.is_dir() else self.files.path.parent
        return {path.relative_to(root).as_posix(): hash_file(path) for path in self.files.files}

    @cached_property
    def tokenizers(self) -> list[Tokenizer]:
        """The tokenizer of each of its text encoders."""
        return [make() for make in self.files.tokenizers]

    @property
    def widths(self) -> list[int]:
        """Hidden size of each of its text encoders."""
        return [part.config.hidden_size for part in self.files.parts if isinstance(part.config, CLIPConfig)]

    def batch_shape(self, plan: RunPlan) -> tuple[object, ...]:
        """Return what the prompts of two plans must have in common to share a batch, as `PromptEncoder` does."""
        conditioner = Conditioner(self.tokenizers, (), embeddings=plan.embeddings)
        return conditioner.shape(plan.positive), conditioner.shape(plan.negative)


@dataclass(frozen=True, eq=False)
class Refiner:
    """A loaded refiner.

    Attributes:
        unet: Its UNet.
        prompts: Encodes prompts for it.
    """

    unet: UNet
    prompts: PromptEncoder


class Refiners:
    """The refiners of one model. Files are described once; the networks of the last run are kept."""

    def __init__(self, vae: VAEConfig, device: torch.device, dtype: torch.dtype, placement: Placement) -> None:
        """Keep what refiners are loaded for.

        Args:
            vae: The model's VAE.
            device: Where they compute.
            dtype: What they compute in.
            placement: The model's placement.
        """
        self._vae, self._device, self._dtype, self._placement = vae, device, dtype, placement
        self._described = Descriptions[RefinerInput](lambda found: found.files.files)
        self._loaded = LastRun[Refiner]()

    def read(self, source: str) -> RefinerInput:
        """Describe a refiner.

        Raises:
            CheckpointError: If it is missing, damaged, or of another family; the sentence names the field.
        """
        return self._described.get(source, lambda: describe_refiner(source, self._vae, self._device.type))

    def load(self, wanted: RefinerInput | None) -> Refiner | None:
        """Return a loaded refiner, and forget another one."""
        return self._loaded.get({wanted: partial(self._load, wanted)} if wanted else {}).get(wanted)

    def _load(self, wanted: RefinerInput) -> Refiner:
        from mezzotint.run.prompts import PromptEncoder  # which imports run/plan.py, as that does this module

        networks: dict[str, Any] = load_networks(
            wanted.files, self._dtype, self._device, self._placement, wanted.tokenizers
        )
        for network in networks.values():
            network.eval().requires_grad_(False)
        unet: UNet = networks.pop("unet")
        fuse_projections(unet)
        encoders: list[CLIPTextModel] = list(networks.values())
        return Refiner(unet, PromptEncoder(wanted.tokenizers, encoders, Adapters(unet, encoders)))


def describe_refiner(source: str, vae: VAEConfig, device_type: str) -> RefinerInput:
    """Describe a refiner.

    Args:
        source: A folder, a file or a hub id.
        vae: The VAE of the model that it follows.
        device_type: "cpu", "cuda", ...

    Raises:
        CheckpointError: If it is missing, damaged, or of another family.
    """
    try:
        files = scan_refiner(source)
    except CheckpointError as error:
        raise CheckpointError(f"refiner: {error}") from None
    unet = cast(UNetConfig, files.config("unet"))
    info = ModelInfo.of(files, unet, vae, device_type)
    wrong = None
    if not info.is_sdxl:
        wrong = f"a model of the family {info.family}"
    elif (unet.in_channels, unet.out_channels) != (vae.latent_channels, vae.latent_channels):
        wrong = f"a model whose UNet takes {unet.in_channels} channels and gives {unet.out_channels}"
    elif files.scheduler_config.get("sigma_data") is not None:
        wrong = "a model without timesteps (EDM)"
    if wrong:
        raise CheckpointError(
            f"refiner: {source} is {wrong}; it must be SDXL's refiner, or another text-to-image model of that family"
        )
    return RefinerInput(files, info)


def plan_refined(plan: RunPlan, refiner: RefinerInput) -> RunPlan:
    """Return the refiner's plan for the end of a pass, with the same noise levels.

    LoRAs, ControlNets, IP-Adapters and FreeU are the first model's alone. A negative prompt that was not given is the
    refiner's own.

    Raises:
        RequestError: If the refiner lacks the layers of perturbed-attention guidance.
    """
    request = plan.request.replace(freeu=None, control=None, ip_adapter=None)
    if request.negative_prompt is None:
        request = request.replace(negative_prompt=refiner.info.empty_prompt)
    try:
        check_pag(refiner.info, request, plan.sampler)
    except RequestError as error:
        raise RequestError(f"refiner: {error}") from None
    trained = plan.sampler.schedule.model_copy(update={"prediction_type": refiner.files.prediction})
    return replace(
        plan,
        model=refiner.info,
        request=request,
        prediction=Prediction.from_config(trained),
        loras=(),
        adapters=(),
        embeddings=plan.embeddings.for_widths(refiner.widths),
        few_step=None,
        controls=(),
        ip_adapters=(),
        second_pass=None,
        upscaler=None,
        refiner=None,
        refined=None,
    )


class Handover:
    """A denoiser that becomes another one at the first call at a noise level or below, and stays that.

    Args:
        first: The denoiser of the calls before.
        last: The denoiser of the calls from then on.
        sigma: The noise level.
        take_over: Called once, before `last` is.
    """

    def __init__(self, first: Denoiser, last: Denoiser, sigma: float, take_over: Callable[[], None]) -> None:
        self._current, self._last, self._sigma, self._take_over = first, last, sigma, take_over

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the denoised estimate, of the shape of x (B, C, h, w)."""
        return self._at(sigma)(x, sigma)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Return the (guided, unconditional) denoised estimates."""
        return self._at(sigma).pair(x, sigma)

    def _at(self, sigma: float) -> Denoiser:
        if self._current is not self._last and sigma <= self._sigma:
            self._take_over()
            self._current = self._last
        return self._current
