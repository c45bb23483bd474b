"""Previews: latents to small RGB pictures by a matrix that is fitted to the model's own VAE, without running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.images.io import from_pil, to_pil

SIDE = 16  # of the latents that the matrix is fitted to
SAMPLES = 4


class LatentPreview:
    """Shows latents at once, and roughly.

    Args:
        decode: Decodes latents to pictures; it is called once, with small latents.
        channels: The number of latent channels.
        downscale: Pixels of a picture for one of its latents, in each direction.
    """

    def __init__(self, decode: Callable[[Tensor], Sequence[Image.Image]], channels: int, downscale: int) -> None:
        random = torch.Generator().manual_seed(0)
        patches = [
            F.interpolate(torch.randn(SAMPLES, channels, side, side, generator=random), size=SIDE, mode="nearest")
            for side in (2, 4, 8)
        ]
        latents = torch.cat(patches)
        pixels = torch.cat([from_pil(image) for image in decode(latents)])
        means = F.avg_pool2d(pixels, downscale)  # of the pixels of one latent
        self._downscale = downscale
        self._matrix = torch.linalg.lstsq(_rows(latents), means.movedim(1, -1).reshape(-1, 3)).solution

    def picture(self, latents: Tensor) -> Image.Image:
        """Return latents (B, C, h, w) as one picture of h x 8 by B x w x 8 pixels, side by side."""
        count, _, height, width = latents.shape
        rgb = (_rows(latents.float().cpu()) @ self._matrix).reshape(count, height, width, 3).movedim(-1, 1)
        rgb = torch.cat(list(rgb.nan_to_num()), dim=-1)[None]
        (image,) = to_pil(F.interpolate(rgb, scale_factor=float(self._downscale), mode="bilinear"))
        return image


def _rows(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as rows (B h w, C + 1); the last column is 1, for an offset."""
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return F.pad(rows, (0, 1), value=1.0)
