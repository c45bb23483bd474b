"""The facts of a model that planning a run needs: its configuration and defaults, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mezzotint.config import UNetConfig, VAEConfig
from mezzotint.weights.keys import Family
from mezzotint.weights.model_files import AESTHETIC, CheckerFiles, FewStep


class ModelFacts(Protocol):
    """Facts that both a loaded model (`Parts`) and one whose weights were not read provide."""

    family: Family
    settings: dict[str, Any]
    scheduler_config: dict[str, Any]
    model_index: dict[str, Any]
    few_step: FewStep | None
    notices: list[str]
    checker: CheckerFiles | None
    unchecked: str


@dataclass(frozen=True)
class ModelInfo:
    """The facts of a model that planning a run depends on.

    Attributes:
        family: "sd1", "sd2" or "sdxl".
        native_size: Side, in pixels, of the pictures that the model was trained on.
        settings: The model's own defaults, from mezzotint.json.
        scheduler_config: The model's scheduler_config.json.
        pipeline_class: Class name in model_index.json, or "".
        unet_channels: Input channels of the UNet.
        embeds_guidance: Whether the guidance scale is an input of the UNet (LCM models), which then needs no
            unconditional output.
        latent_channels: Channels of the VAE's latents.
        downscale: The VAE's factor: pixels per latent cell along one side.
        force_upcast: Whether the VAE overflows float16.
        empty_prompt: The default negative prompt: "", or None for a context of zeros.
        few_step: The model's few-step form, if it has one.
        device_type: "cpu", "cuda", ...: decides the default batch.
        notices: What a user should know of the model, such as a guess of its prediction type.
        has_checker: Whether the model has a safety checker.
        self_attentions: Names of the UNet's self-attentions.
        has_aesthetic_score: Whether the model is conditioned on an aesthetic score instead of the target size, as
            SDXL's refiner is.
        unchecked: Why the safety checker that the model should have cannot be used.
    """

    family: Family
    native_size: int
    settings: dict[str, Any]
    scheduler_config: dict[str, Any]
    pipeline_class: str
    unet_channels: int
    embeds_guidance: bool
    latent_channels: int
    downscale: int
    force_upcast: bool
    empty_prompt: str | None
    few_step: FewStep | None
    device_type: str
    notices: tuple[str, ...] = ()
    has_checker: bool = False
    unchecked: str = ""
    self_attentions: tuple[str, ...] = ()
    has_aesthetic_score: bool = False

    @classmethod
    def of(cls, facts: ModelFacts, unet: UNetConfig, vae: VAEConfig, device_type: str) -> ModelInfo:
        """Collect the facts of a model, loaded or not."""
        has_zeros = facts.model_index.get("force_zeros_for_empty_prompt", facts.family == "sdxl")  # diffusers' default
        return cls(
            family=facts.family,
            native_size=(unet.sample_size or 64) * vae.downscale,
            settings=facts.settings,
            scheduler_config=dict(facts.scheduler_config),
            pipeline_class=str(facts.model_index.get("_class_name", "")),
            unet_channels=unet.in_channels,
            embeds_guidance=unet.time_cond_proj_dim is not None,
            latent_channels=vae.latent_channels,
            downscale=vae.downscale,
            force_upcast=vae.force_upcast,
            empty_prompt=None if has_zeros else "",
            few_step=facts.few_step,
            device_type=device_type,
            notices=tuple(facts.notices),
            has_checker=facts.checker is not None,
            unchecked=facts.unchecked,
            self_attentions=tuple(unet.self_attentions),
            has_aesthetic_score=bool(facts.model_index.get(AESTHETIC)),
        )

    @property
    def is_sdxl(self) -> bool:
        """Whether the model is conditioned on sizes and crops."""
        return self.family == "sdxl"

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the VAE in a model of `dtype`: SDXL's published VAE overflows float16."""
        return torch.float32 if dtype == torch.float16 and self.is_sdxl and self.force_upcast else dtype
