"""The safety checker of Stable Diffusion: how near a picture's CLIP embedding is to embeddings of given concepts.

A picture is flagged if its cosine similarity to a concept exceeds the concept's threshold. If it exceeds that of one of
a few "special care" concepts, all thresholds that are compared afterwards are lower by SPECIAL_CARE. Embeddings and
thresholds are weights of the file. This is diffusers' StableDiffusionSafetyChecker, whose keys the attributes spell.
See Rando et al. 2022, "Red-Teaming the Stable Diffusion Safety Filter".
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import SafetyCheckerConfig
from mezzotint.errors import CheckpointError
from mezzotint.models.clip_vision import CLIPVisionModel
from mezzotint.models.linear import Linear

SPECIAL_CARE = 0.01
DECIMALS = 3  # similarities above the threshold are rounded to as many, and count if they are above 0 then


class SafetyChecker(nn.Module):
    """The vision encoder, and the embeddings and thresholds of the concepts."""

    def __init__(self, config: SafetyCheckerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionModel(config.vision_config, projection=False)
        self.visual_projection = Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(config.concepts, config.projection_dim))
        self.special_care_embeds = nn.Parameter(torch.ones(config.special_care, config.projection_dim))
        self.concept_embeds_weights = nn.Parameter(torch.ones(config.concepts))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(config.special_care))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine similarities of pictures to the special-care concepts and to the concepts.

        Args:
            pixels: What `preprocess` returns, (B, 3, image_size, image_size).

        Returns:
            Two tensors in float32, (B, special_care) and (B, concepts).
        """
        embeds = self.visual_projection(self.vision_model(pixels).pooled)
        return _cosines(embeds, self.special_care_embeds), _cosines(embeds, self.concept_embeds)

    def flags(self, pixels: Tensor) -> list[bool]:
        """Return whether each picture is flagged.

        Raises:
            CheckpointError: If a similarity or a threshold is not finite: it would be above no threshold.
        """
        special, concepts = self(pixels)
        thresholds = _numbers(self.special_care_embeds_weights), _numbers(self.concept_embeds_weights)
        if not all(np.isfinite(numbers).all() for numbers in (_numbers(special), _numbers(concepts), *thresholds)):
            raise CheckpointError(
                "the safety checker has numbers that are not finite (NaN or infinite); its weights are damaged: give "
                "another with safety_checker (--safety-checker), or safety off (--safety off)"
            )
        return [
            is_flagged(_numbers(one), _numbers(other), *thresholds)
            for one, other in zip(special, concepts, strict=True)
        ]


Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def is_flagged(special: Numbers, concepts: Numbers, special_thresholds: Numbers, thresholds: Numbers) -> bool:
    """Compare one picture's similarities with the thresholds, in float32 and in the order of the file.

    Args:
        special: Cosine similarities to the special-care concepts.
        concepts: Cosine similarities to the concepts.
        special_thresholds: Thresholds of the special-care concepts.
        thresholds: Thresholds of the concepts.
    """
    adjustment = np.float32(0.0)
    for similarity, threshold in zip(special, special_thresholds, strict=True):
        if np.round(similarity - threshold + adjustment, DECIMALS) > 0:
            adjustment = np.float32(SPECIAL_CARE)
    return bool((np.round(concepts - thresholds + adjustment, DECIMALS) > 0).any())


def _cosines(embeds: Tensor, concepts: Tensor) -> Tensor:
    """Return the cosine similarities (B, concepts) in float32."""
    return F.normalize(embeds.float()) @ F.normalize(concepts.float()).t()


def _numbers(tensor: Tensor) -> Numbers:
    """Return a tensor's numbers as float32 on the CPU."""
    return tensor.detach().float().cpu().numpy()
