"""Where a run starts: from noise alone, or from a picture under noise, of which a mask may keep a part.

The draws are diffusers', in its order (DESIGN.md, contract 7), each from the image's own stream: of a picture, the
sample of its posterior; the run's noise; and with a mask, or a network made for inpainting, the sample of the picture
with the masked part grey. What is drawn is drawn whether it is used or not, or the steps' noise would be another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.diffusion.blend import Blend, Denoiser
from mezzotint.diffusion.noise import SeededNoise
from mezzotint.diffusion.variation import paste_center, slerp
from mezzotint.errors import RequestError
from mezzotint.images.init_image import InitImage
from mezzotint.images.io import from_pil
from mezzotint.models.vae import VAE, Posterior
from mezzotint.request import Job, Request
from mezzotint.run.plan import RunPlan

Encode = Callable[[Tensor], Posterior]  # of pixels (1, 3, H, W) in [-1, 1]


@dataclass(frozen=True, eq=False)
class Run:
    """One batch of pictures in the making; their plans differ in words and seeds alone.

    Attributes:
        plans: The plan of each picture.
        seeds: The seed of each picture.
        latents: Starting noise (pictures, C, h, w) where it is given instead of drawn.
        pictures: What each picture is drawn on, if anything; latents as they are.
        upcast_parts: Gets the names of networks that had to run in float32.
    """

    plans: Sequence[RunPlan]
    seeds: Sequence[int]
    latents: Tensor | None = None
    pictures: Sequence[InitImage | Tensor] = ()
    upcast_parts: list[str] = field(default_factory=list)

    @property
    def plan(self) -> RunPlan:
        """The first one, for all in which they agree."""
        return self.plans[0]

    @property
    def request(self) -> Request:
        """The first plan's request."""
        return self.plan.request

    @property
    def group(self) -> list[Job]:
        """The request and the seed of each picture."""
        return [(plan.request, seed) for plan, seed in zip(self.plans, self.seeds, strict=True)]

    @property
    def placed(self) -> list[InitImage]:
        """The pictures that are put back into what they were taken from."""
        return [picture for picture in self.pictures if isinstance(picture, InitImage)]

    @property
    def notices(self) -> list[str]:
        """What a person should be told of the pictures."""
        return [notice for placed in distinct(self.placed) for notice in placed.notices]


@dataclass(frozen=True, eq=False)
class Start:
    """x (B, C, h, w): at the run's first level. inpaint_channels (B, C', h, w): what an inpainting
    network is given beside it.

    keep, x0, noise: of `Blend`, where a part of the picture is kept in the loop; `skip_above` as there.
    """

    x: Tensor
    inpaint_channels: Tensor | None = None
    keep: Tensor | None = None
    x0: Tensor | None = None
    noise: Tensor | None = None
    skip_above: float = float("inf")

    def wrap(self, denoise: Denoiser) -> Denoiser | Blend:
        """The denoiser, with the kept part kept."""
        if self.keep is None or self.x0 is None or self.noise is None:
            return denoise
        return Blend(denoise, self.keep, self.x0, self.noise, self.skip_above)

    def kept(self, x: Tensor, scale: float) -> Tensor:
        """The run's last x, its kept part the original without noise; `scale` is what x is divided by after it."""
        if self.keep is None or self.x0 is None:
            return x
        return self.keep * self.x0 * scale + (1.0 - self.keep) * x


def start(run: Run, vae: VAE, encode: Encode, noise: SeededNoise, sigma: float, pure: float, channels: int) -> Start:
    """The start of a run at the noise level `sigma`; one from noise alone starts at `pure` times it.

    noise: the run's, not yet drawn from. channels: what the network takes. Raises RequestError where the network has no
    place for a mask, where the mask marks no cell of the latents, and for latents of a wrong shape.
    """
    request, latent, side = run.request, noise.shape[0], vae.config.downscale
    inpaints = channels == 2 * latent + 1
    if not inpaints and channels != latent:
        raise RequestError(
            f"this model's UNet takes {channels} channels; one that draws takes {latent}, and one for inpainting "
            f"{2 * latent + 1}"
        )
    placed = run.placed
    mask = _latent_mask([p.mask for p in placed if p.mask], side, noise)
    from_noise = mask is not None and request.strength == 1.0
    x0 = None
    if placed and not (inpaints and from_noise):
        x0 = _sampled([_pixels(p) for p in distinct(placed)], placed, vae, encode, noise)
    elif known := [picture for picture in run.pictures if isinstance(picture, Tensor)]:
        x0 = torch.cat(known)
    drawn = _first(run, noise, side)
    inpaint_channels = None
    if inpaints:
        grey = torch.zeros(1, 3, noise.shape[1] * side, noise.shape[2] * side)
        shown = [grey] if mask is None else [_pixels(p, hidden=True) for p in distinct(placed)]
        masked = _sampled(shown, () if mask is None else placed, vae, encode, noise)
        inpaint_channels = torch.cat([torch.ones_like(masked[:, :1]) if mask is None else mask, masked], dim=1)
    elif mask is not None:
        noise.draw()
    if x0 is None or from_noise:
        x, skip_above = drawn * pure, sigma
    else:
        below = x0 if mask is None or request.masked_content != "noise" else x0 * (1.0 - mask) + drawn * mask
        x, skip_above = below + sigma * drawn, float("inf")
    if mask is None or inpaints:
        return Start(x, inpaint_channels)
    return Start(x, None, 1.0 - mask, x0, drawn, skip_above)


def _first(run: Run, noise: SeededNoise, side: int) -> Tensor:
    """The noise that the run starts from, (B, C, h, w) float32: given, or its own, or a variation of that."""
    if run.latents is not None:
        given, right = tuple(run.latents.shape), (len(run.plans), *noise.shape)
        if given != right:
            raise RequestError(f"latents has the shape {given}; it must be {right}")
        return run.latents.to(noise.device, torch.float32)
    own, request = noise.draw(), run.request
    if not request.variation_strength and request.seed_size is None:
        return own
    channels, *size = noise.shape
    height, width = size if request.seed_size is None else [number // side for number in reversed(request.seed_size)]
    shape, kind = (channels, height, width), request.noise or "seeded"
    varied = own if shape == noise.shape else SeededNoise(run.seeds, shape, noise.device, kind).draw()
    if request.variation_strength:
        others = [plan.request.variation_seed or 0 for plan in run.plans]
        varied = slerp(varied, SeededNoise(others, shape, noise.device, kind).draw(), request.variation_strength)
    return varied if shape == noise.shape else paste_center(own, varied)


def distinct(placed: Sequence[InitImage]) -> list[InitImage]:
    """Each picture once, in order: a batch of one picture is encoded once."""
    return list({id(p): p for p in placed}.values())


def _pixels(placed: InitImage, hidden: bool = False) -> Tensor:
    """(1, 3, H, W) in [-1, 1]; hidden: 0, a middle grey, where the mask is."""
    pixels = from_pil(placed.image)
    if not hidden or placed.mask is None:
        return pixels
    return pixels * torch.from_numpy(np.asarray(placed.mask) < 128)


def _sampled(
    shown: Sequence[Tensor], placed: Sequence[InitImage], vae: VAE, encode: Encode, noise: SeededNoise
) -> Tensor:
    """Latents (B, C, h, w) float32, each from the posterior of its picture; `shown`: the pixels of distinct(placed)."""
    posteriors = [encode(pixels.to(noise.device)) for pixels in shown]
    order = distinct(placed)
    rows = [order.index(p) for p in placed] or [0]
    mean, logvar = (torch.cat([getattr(posteriors[row], name).float() for row in rows]) for name in ("mean", "logvar"))
    return vae.scale(mean + torch.exp(0.5 * logvar) * noise.draw())


def _latent_mask(masks: Sequence[Image.Image], side: int, noise: SeededNoise) -> Tensor | None:
    """(B, 1, h, w), 1 where the run draws: the mask at each cell's first pixel, as diffusers takes it."""
    if not masks:
        return None
    mask = torch.from_numpy(np.stack([np.asarray(mask)[None, ::side, ::side] for mask in masks]) >= 128)
    if not mask.any():
        raise RequestError(
            f"mask is too small: it reaches no cell of {side}x{side} pixels; draw it larger, or give only_masked, "
            "which draws its surroundings larger"
        )
    return mask.to(noise.device, torch.float32)
