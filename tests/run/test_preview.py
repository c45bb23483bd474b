"""Previews of latents: the matrix is the decoder's where that is linear, and near it on a trained VAE."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.images.io import from_pil, to_pil
from mezzotint.run.preview import LatentPreview


def test_the_matrix_of_a_linear_decoder_is_found() -> None:
    """Eight bits a channel round by at most 1/255; the fit's error is no larger, and its own picture rounds again."""
    random = torch.Generator().manual_seed(1)
    matrix, offset = 0.1 * torch.randn(3, 4, generator=random), 0.1 * torch.randn(3, generator=random)

    def decode(z: Tensor) -> list[Image.Image]:
        rgb = torch.einsum("rc,bchw->brhw", matrix, z) + offset[:, None, None]
        return to_pil(F.interpolate(rgb, scale_factor=8, mode="nearest"))

    latents = torch.randn(2, 4, 3, 5, generator=random)
    shown = LatentPreview(decode, 4, 8).picture(latents)
    assert shown.size == (2 * 5 * 8, 3 * 8)
    rgb = torch.cat(list(torch.einsum("rc,bchw->brhw", matrix, latents) + offset[:, None, None]), dim=-1)[None]
    wanted = F.interpolate(rgb, scale_factor=8.0, mode="bilinear").clamp(-1, 1)
    assert (from_pil(shown) - wanted).abs().max() <= 2 * 2 / 255


def test_values_that_are_not_finite_are_shown() -> None:
    preview = LatentPreview(lambda z: [Image.new("RGB", (128, 128), "grey")] * len(z), 4, 8)
    assert preview.picture(torch.full((1, 4, 2, 2), torch.nan)).size == (16, 16)
