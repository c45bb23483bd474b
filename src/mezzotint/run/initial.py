"""The latents that a run starts from: noise, or a picture under noise, of which a mask may keep a part.

Random numbers are drawn from each picture's own stream in diffusers' order: the sample of the init image's posterior;
the run's noise; with a mask, or with an inpainting network, the sample of the init image whose masked part is grey.
A draw that is not used is made all the same, because the noise of the steps comes from the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mezzotint.diffusion.blend import Blend, Denoiser, DifferentialBlend
from mezzotint.diffusion.noise import SeededNoise
from mezzotint.diffusion.variation import paste_center, slerp
from mezzotint.errors import RequestError
from mezzotint.images.init_image import HALF, InitImage, fit
from mezzotint.images.io import from_pil
from mezzotint.models.vae import VAE, Posterior
from mezzotint.run.batches import Batch, distinct_images

Encode = Callable[[Tensor], Posterior]  # of pixels (1, 3, H, W) in [-1, 1]


@dataclass(frozen=True, eq=False)
class InitialLatents:
    """What a run starts from.

    Attributes:
        x: Latents at the run's first noise level, (B, C, h, w).
        inpaint_channels: What an inpainting network is given in addition to x, (B, C', h, w).
        keep: 1 where the original is kept, (B, 1, h, w); None if nothing is kept, or the network itself keeps it.
        x0: The original's latents.
        noise: The noise that was added to them.
        skip_above: As in `Blend`.
        sigmas: In differential diffusion, in which `keep` is a share of the steps, the noise levels of the run.
    """

    x: Tensor
    inpaint_channels: Tensor | None = None
    keep: Tensor | None = None
    x0: Tensor | None = None
    noise: Tensor | None = None
    skip_above: float = float("inf")
    sigmas: Sequence[float] = ()

    def wrap(self, denoise: Denoiser) -> Denoiser:
        """Wrap a denoiser so that the kept part stays the original at each step."""
        if self.keep is None or self.x0 is None or self.noise is None:
            return denoise
        if self.sigmas:
            return DifferentialBlend(denoise, self.keep, self.x0, self.noise, self.sigmas)
        return Blend(denoise, self.keep, self.x0, self.noise, self.skip_above)

    def restore(self, x: Tensor, scale: float) -> Tensor:
        """Put the original without noise into the kept part of a run's last x.

        Args:
            x: The last x, (B, C, h, w).
            scale: What x is divided by afterwards.
        """
        if self.keep is None or self.x0 is None or self.sigmas:
            return x
        return self.keep * self.x0 * scale + (1.0 - self.keep) * x


def prepare_latents(batch: Batch, vae: VAE, encode: Encode, noise: SeededNoise) -> InitialLatents:
    """Prepare the latents that a batch starts from.

    Args:
        batch: The batch.
        vae: Scales what `encode` returns.
        encode: Encodes pixels to the posterior of unscaled latents.
        noise: The noise of the run, from which nothing has been drawn yet.

    Raises:
        RequestError: If the UNet has other input channels, if the mask covers no cell of the latents, or if the given
            latents have a wrong shape.
    """
    plan, request = batch.plan, batch.request
    channels, latent, side = plan.model.unet_channels, noise.shape[0], vae.config.downscale
    inpaints = channels == 2 * latent + 1
    if not inpaints and channels != latent:
        raise RequestError(
            f"this model's UNet takes {channels} input channels; a text-to-image UNet takes {latent}, and one for "
            f"inpainting {2 * latent + 1}"
        )
    opened = batch.opened_images
    masks = [image.mask for image in opened if image.mask]
    differential = bool(request.differential)
    keep = _downsample_grey(masks, noise) if differential else None
    mask = _downsample_masks(masks, side, noise) if keep is None else 1.0 - keep
    from_noise = mask is not None and request.strength == 1.0 and not differential
    x0 = None
    if opened and not (inpaints and from_noise):
        x0 = _sample_latents([_pixels(image) for image in distinct_images(opened)], opened, vae, encode, noise)
    elif given := [image for image in batch.init_images if isinstance(image, Tensor)]:
        x0 = torch.cat(given)
    unit = _unit_noise(batch, noise, side)
    inpaint_channels = None
    if inpaints:
        grey = torch.zeros(1, 3, noise.shape[1] * side, noise.shape[2] * side)
        shown = [grey] if mask is None else [_pixels(image, hide_masked=True) for image in distinct_images(opened)]
        masked = _sample_latents(shown, () if mask is None else opened, vae, encode, noise)
        inpaint_channels = torch.cat([torch.ones_like(masked[:, :1]) if mask is None else mask, masked], dim=1)
    elif mask is not None and not differential and vae.draws_noise:
        noise.draw()
    sigma = plan.sigmas[0]
    if x0 is None or from_noise:
        x, skip_above = unit * plan.noise_scale, sigma
    else:
        below = x0 if mask is None or request.masked_content != "noise" else x0 * (1.0 - mask) + unit * mask
        level, factor = plan.picture_noise
        x, skip_above = factor * (below + level * unit), float("inf")
    if mask is None or inpaints:
        return InitialLatents(x, inpaint_channels)
    if keep is not None:
        return InitialLatents(x, None, keep, x0, unit, sigmas=plan.sigmas)
    return InitialLatents(x, None, 1.0 - mask, x0, unit, skip_above)


def encode_batch_image(batch: Batch, vae: VAE, encode: Encode, noise: SeededNoise) -> tuple[Tensor, Tensor, int]:
    """Return what `prepare_latents` would make of a batch's whole picture before its noise is added.

    Returns:
        The picture's latents and the run's first unit noise, each (B, C, h, w); and how often noise was drawn.
    """
    opened = batch.opened_images
    x0 = _sample_latents([_pixels(image) for image in distinct_images(opened)], opened, vae, encode, noise)
    unit = _unit_noise(batch, noise, vae.config.downscale)
    return x0, unit, int(vae.draws_noise) + (batch.latents is None)


def enlarge_batch(batch: Batch, x: Tensor, decode: Callable[[Tensor], list[Image.Image]]) -> Batch:
    """Return the batch of hires-fix's second pass, which starts from the first one's final latents, enlarged.

    Args:
        batch: The batch of the first pass.
        x: Its final latents, (B, C, h, w).
        decode: Decodes them to pictures, if it is pictures that are enlarged.
    """
    plans = [plan.second_pass or plan for plan in batch.plans]
    enlarged: list[InitImage | Tensor]
    if batch.request.hires_upscale == "latent":
        enlarged = [*F.interpolate(x.float(), plans[0].latent_shape[1:], mode="bilinear")[:, None]]
    else:
        size = plans[0].request.width or 0, plans[0].request.height or 0
        pictures, upscaler = decode(x), batch.plan.upscaler
        enlarged = [InitImage(fit(upscaler(image) if upscaler else image, size)) for image in pictures]
    return Batch(plans, batch.seeds, init_images=enlarged, upcast_parts=batch.upcast_parts)


def _unit_noise(batch: Batch, noise: SeededNoise, side: int) -> Tensor:
    """Return the noise (B, C, h, w) float32 that a run starts from: the given one, its own, or a variation of it."""
    if batch.latents is not None:
        given, right = tuple(batch.latents.shape), (len(batch.plans), *noise.shape)
        if given != right:
            raise RequestError(f"latents has the shape {given}; it must be {right}")
        return batch.latents.to(noise.device, torch.float32)
    own, request = noise.draw(), batch.request
    if not request.variation_strength and request.seed_size is None:
        return own
    channels, *size = noise.shape
    height, width = size if request.seed_size is None else [number // side for number in reversed(request.seed_size)]
    shape, kind = (channels, height, width), request.noise or "seeded"
    varied = own if shape == noise.shape else SeededNoise(batch.seeds, shape, noise.device, kind).draw()
    if request.variation_strength:
        others = [plan.request.variation_seed or 0 for plan in batch.plans]
        varied = slerp(varied, SeededNoise(others, shape, noise.device, kind).draw(), request.variation_strength)
    return varied if shape == noise.shape else paste_center(own, varied)


def _pixels(image: InitImage, hide_masked: bool = False) -> Tensor:
    """Return an init image as pixels (1, 3, H, W) in [-1, 1], with the masked part middle grey if it is hidden."""
    pixels = from_pil(image.image)
    if not hide_masked or image.mask is None:
        return pixels
    return pixels * torch.from_numpy(np.asarray(image.mask) < HALF)


def _sample_latents(
    pixels: Sequence[Tensor], images: Sequence[InitImage], vae: VAE, encode: Encode, noise: SeededNoise
) -> Tensor:
    """Sample the scaled latents (B, C, h, w) float32 of each image; `pixels` are those of the distinct images."""
    posteriors = [encode(each.to(noise.device)) for each in pixels]
    distinct = distinct_images(images)
    rows = [distinct.index(image) for image in images] or [0]
    mean, logvar = (torch.cat([getattr(posteriors[row], name).float() for row in rows]) for name in ("mean", "logvar"))
    return vae.scale(mean + torch.exp(0.5 * logvar) * noise.draw() if vae.draws_noise else mean)


def _downsample_grey(masks: Sequence[Image.Image], noise: SeededNoise) -> Tensor:
    """Return how dark masks are, (B, 1, h, w) from 0 to 1, interpolated between the middle pixels of each cell."""
    dark = torch.from_numpy(np.stack([255.0 - np.asarray(mask, np.float32)[None] for mask in masks])) / 255.0
    return F.interpolate(dark, noise.shape[1:], mode="bilinear").to(noise.device)


def _downsample_masks(masks: Sequence[Image.Image], side: int, noise: SeededNoise) -> Tensor | None:
    """Return masks as (B, 1, h, w), 1 where the run repaints: the first pixel of each cell, as in diffusers."""
    if not masks:
        return None
    mask = torch.from_numpy(np.stack([np.asarray(mask)[None, ::side, ::side] for mask in masks]) >= HALF)
    if not mask.any():
        raise RequestError(
            f"mask is too small: it covers no cell of {side}x{side} pixels; enlarge it, or give only_masked, which "
            "draws the masked part at a larger scale"
        )
    return mask.to(noise.device, torch.float32)
