"""The VAE's stage: pictures through nearly Gaussian latents and back (Rombach et al. 2022, stage one)."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.models.vae import VAE
from mezzotint.train.scratch.stage import Losses

KL_WEIGHT = 1e-3  # on the mean over latent elements: enough to keep latents near unit scale, too little to blur


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, down and right."""
    return x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]


def vae_losses(vae: VAE, pixels: Tensor, generator: torch.Generator) -> Losses:
    """L1 of pixels, L1 of their gradients (edges), and the KL to a unit Gaussian. pixels (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(pixels)
    drawn = vae.decode(posterior.sample(generator))
    l1 = (drawn - pixels).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(drawn), gradients(pixels), strict=True))
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1.0 - posterior.logvar).mean()
    mse = (drawn.detach().clamp(-1, 1) - pixels).square().mean((1, 2, 3))
    psnr = (10 * torch.log10(4.0 / mse)).mean()
    return {"loss": l1 + edges + KL_WEIGHT * kl, "l1": l1.detach(), "kl": kl.detach(), "psnr": psnr}
