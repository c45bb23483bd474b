"""Regional prompts in a run: the weight of each prompt at each place.

Where regions cover a share m of a place, the prompt of the request has the weight 1 - (1 - region_base) min(m, 1), and
each region its own weight times its mask; all of them are divided by their sum. So outside the regions the prompt is
alone; with a region_base of 0 it is not in them at all, and with 1 the parts are averaged as ComfyUI averages
conditionings with masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.entries.regions import Region
from mezzotint.errors import RequestError
from mezzotint.images.init_image import digests, open_mask
from mezzotint.request import Request

if TYPE_CHECKING:
    from mezzotint.run.plan import RunPlan


def mask_sources(request: Request) -> dict[str, str | bytes]:
    """Return the masks of the regions, by "regions[0].mask"."""
    entries = enumerate(request.regions or ())
    return {f"regions[{k}].mask": region.mask for k, region in entries if region.mask is not None}


def mask_digests(request: Request) -> dict[str, dict[str, str | None]]:
    """Return path (None if bytes were given) and SHA-256 of the masks of the regions."""
    return digests(mask_sources(request))


def open_masks(request: Request) -> tuple[Image.Image | None, ...]:
    """Open the mask of each region; None for one with a box.

    Raises:
        RequestError: If a region has both or neither, or a mask cannot be opened or is black everywhere.
    """
    opened = []
    for k, region in enumerate(request.regions or ()):
        name = f"regions[{k}]"
        if (region.box is None) == (region.mask is None):
            both = "both box and mask" if region.box else "neither box nor mask"
            raise RequestError(f"{name} has {both}; it must have one of them")
        mask = None if region.mask is None else open_mask(region.mask, f"{name}.mask")
        if mask is not None and mask.getbbox() is None:
            raise RequestError(f"{name}.mask is black everywhere; it must be white where its prompt is drawn")
        opened.append(mask)
    return tuple(opened)


def part_weights(plan: RunPlan, device: torch.device) -> Sequence[float | Tensor]:
    """Return the weight of each part of the prompt and then of each region's: a number, or a map (1, 1, h, w)."""
    if not plan.regions:
        return plan.weights
    size = plan.latent_shape[1:]
    maps = [_area(region, mask, size) for region, mask in zip(plan.request.regions or (), plan.masks, strict=True)]
    covered = torch.stack(maps).sum(0).clamp(max=1.0)
    prompt_map = 1.0 - (1.0 - (plan.request.region_base or 0.0)) * covered
    weighted = [region.weight * area for region, area in zip(plan.request.regions or (), maps, strict=True)]
    total = prompt_map + torch.stack(weighted).sum(0)
    shares = [(share / total)[None, None].to(device) for share in (prompt_map, *weighted)]
    prompts = [plan.positive, *plan.regions]
    return [part.weight * share for share, prompt in zip(shares, prompts, strict=True) for part in prompt.parts]


def _area(region: Region, mask: Image.Image | None, size: tuple[int, int]) -> Tensor:
    """Return the share of each cell of the latents that a region covers, (h, w) float32."""
    height, width = size
    if mask is not None:
        resized = mask.convert("F").resize((width, height), Image.Resampling.BOX)
        return torch.from_numpy(np.array(resized, np.float32)) / 255.0
    left, top, right, bottom = region.box or (0.0, 0.0, 1.0, 1.0)
    return _covered(top, bottom, height)[:, None] * _covered(left, right, width)[None]


def _covered(begin: float, end: float, cells: int) -> Tensor:
    """Return the share of each of a row's cells that lies between two shares of its length."""
    edges = torch.arange(cells, dtype=torch.float64)
    return (torch.clamp(edges + 1.0, max=end * cells) - torch.clamp(edges, min=begin * cells)).clamp(min=0.0).float()
