"""The diffusion stage: text encoder and UNet learn together to denoise latents (Ho et al. 2020).

The caller mixes in the empty captions that guidance needs (Ho and Salimans 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import Condition, UNet
from mezzotint.train.scratch.stage import Losses


class TextToLatents(nn.Module):
    """The networks trained in this stage."""

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
    """Return the mean squared error of the network's output.

    Args:
        model: text encoder and UNet.
        latents: (B, C, h, w), scaled.
        ids: (B, T), token windows of the captions.
        schedule: the noise schedule. Timesteps are uniform and stratified over the batch.
        prediction: the prediction type.
        generator: a CPU generator for timesteps and noise.
        with_shuffled: add the loss with each caption moved to the next picture ("shuffled"). While it equals "right",
            the model ignores the captions, however low the loss is.
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
