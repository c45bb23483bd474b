"""CLIP's vision encoder: pixels (B, 3, H, W) -> hidden states of the patches, and a vector for each picture.

The encoders of the safety checker (ViT-L/14) and of image adapters (ViT-H/14, ViT-bigG/14) are configurations of it.
Attributes spell the keys of the hub's checkpoints (`vision_model.encoder.layers.0.self_attn.q_proj.weight`,
`visual_projection.weight`). See Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision".

    pixels = preprocess(ImageProcessorConfig(), pictures)        # as transformers' CLIPImageProcessor, bit for bit
    states, pooled, embeds = CLIPVisionModel(CLIPVisionConfig())(pixels)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mezzotint.config import CLIPVisionConfig, ImageProcessorConfig
from mezzotint.models.clip import Encoder
from mezzotint.models.convolution import Conv2d
from mezzotint.models.linear import Linear


class VisionOutput(NamedTuple):
    """Output of the encoder for a batch of pictures.

    Attributes:
        hidden_states: The input of the first layer and the output of each layer, each (B, 1 + patches, hidden_size).
        pooled: The class token of the last one, normalized, (B, hidden_size).
        embeds: `pooled`, projected, (B, projection_dim); None if the model has no projection.
    """

    hidden_states: list[Tensor]
    pooled: Tensor
    embeds: Tensor | None


class VisionEmbeddings(nn.Module):
    """The class token and the patches, each with its position: (B, 3, H, W) -> (B, 1 + patches, dim)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = Conv2d(config.num_channels, dim, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.positions, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed pictures."""
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)  # (B, N, dim)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        return x + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """The part that checkpoints call `vision_model`: everything except the projection of the pooled vector."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # the checkpoints' spelling
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class CLIPVisionModel(nn.Module):
    """A CLIP vision encoder, with a projection of the pooled vector unless it is left out."""

    def __init__(self, config: CLIPVisionConfig, projection: bool = True) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False) if projection else None

    def forward(self, pixels: Tensor) -> VisionOutput:
        """Encode pictures.

        Args:
            pixels: What `preprocess` returns, (B, 3, image_size, image_size).
        """
        model = self.vision_model
        states = model.encoder(model.pre_layrnorm(model.embeddings(pixels)))
        pooled = model.post_layernorm(states[-1][:, 0])  # (B, dim)
        embeds = None if self.visual_projection is None else self.visual_projection(pooled)
        return VisionOutput(states, pooled, embeds)


def preprocess(config: ImageProcessorConfig, pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures as an encoder's pixels (B, 3, height, width) float32: resized, cropped and normalized."""
    return torch.from_numpy(np.stack([_pixels(config, picture.convert("RGB")) for picture in pictures]))


def _pixels(config: ImageProcessorConfig, picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return one picture's pixels (3, height, width), with the roundings of CLIPImageProcessor."""
    if config.do_resize:
        width, height = picture.size
        if isinstance(config.size, int):
            short = min(width, height)
            width, height = int(config.size * width / short), int(config.size * height / short)
        else:
            height, width = config.size
        picture = picture.resize((width, height), Image.Resampling(config.resample))
    if config.do_center_crop:
        picture = _center_crop(picture, *config.crop_size)
    exact = np.asarray(picture).astype(np.float64)  # (H, W, 3)
    pixels = (exact * config.rescale_factor if config.do_rescale else exact).astype(np.float32)
    if config.do_normalize:
        mean, std = (np.asarray(numbers, np.float32) for numbers in (config.image_mean, config.image_std))
        pixels = (pixels - mean) / std
    return pixels.transpose(2, 0, 1)


def _center_crop(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Crop a picture around its centre; black surrounds one that is smaller."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
