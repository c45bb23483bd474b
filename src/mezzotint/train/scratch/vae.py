"""The VAE's stage: reconstruct pictures from nearly Gaussian latents (Rombach et al. 2022, stage one)."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.models.vae import VAE
from mezzotint.train.scratch.stage import Losses

KL_WEIGHT = 1e-3  # on the mean over latent elements; keeps latents near unit scale without blurring


def image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences between neighbouring pixels, down and right."""
    return x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]


def vae_losses(vae: VAE, pixels: Tensor, generator: torch.Generator) -> Losses:
    """Return L1 of pixels plus L1 of their gradients plus the weighted KL. pixels: (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(pixels)
    decoded = vae.decode(posterior.sample(generator))
    l1 = (decoded - pixels).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(image_gradients(decoded), image_gradients(pixels), strict=True))
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1.0 - posterior.logvar).mean()
    mse = (decoded.detach().clamp(-1, 1) - pixels).square().mean((1, 2, 3))
    psnr = (10 * torch.log10(4.0 / mse)).mean()
    return {"loss": l1 + edges + KL_WEIGHT * kl, "l1": l1.detach(), "kl": kl.detach(), "psnr": psnr}
