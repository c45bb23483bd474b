"""The diffusion stage: the text encoder and the UNet together learn to denoise latents (Ho et al. 2020; Ho and Salimans
2022 for the empty captions that guidance needs, which the caller mixes in)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import Condition, UNet
from mezzotint.train.scratch.stage import Losses


class TextToLatents(nn.Module):
    """What is trained in this stage."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet


def diffusion_losses(
    model: TextToLatents,
    latents: Tensor,
    ids: Tensor,
    schedule: Schedule,
    prediction: Prediction,
    generator: torch.Generator,
    *,
    with_shuffled: bool = False,
) -> Losses:
    """Mean squared error of the network's output. latents (B, C, h, w) scaled; ids (B, T) windows of the captions.

    Timesteps are uniform and stratified over the batch. `with_shuffled` adds the same loss with each caption given to
    the next picture: when the two are equal, the words are not followed, however low the loss is.
    """
    batch, length = len(latents), schedule.num_train_timesteps
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timesteps = (strata * length).long().clamp(max=length - 1)
    sigma = torch.from_numpy(schedule.sigmas).float()[timesteps].to(latents.device).view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    sample = (latents + sigma * noise) / (sigma.square() + 1.0).sqrt()
    sample = sample.contiguous(memory_format=torch.channels_last)
    target = prediction.target(latents, noise, sigma)
    timesteps = timesteps.to(latents.device)

    def error(ids: Tensor) -> Tensor:
        context, _ = model.text_encoder(ids)
        return (model.unet(sample, timesteps, Condition(context)) - target).square().mean()  # type: ignore[no-any-return]

    losses = {"loss": error(ids)}
    if with_shuffled:
        with torch.no_grad():
            losses["shuffled"] = error(ids.roll(1, 0))
            losses["right"] = losses["loss"].detach()
    return losses
