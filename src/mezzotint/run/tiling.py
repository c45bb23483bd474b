"""A picture from a picture, drawn tile by tile: more pixels at once than the model draws well, or than fit into memory.

The whole picture is encoded once, and all noise is that of the whole run, of which each tile sees its own part. So
tiles agree where they overlap, as far as the network does, and a run of one tile is the run without tiles, bit for bit.
Each tile takes all steps. Their last latents are blended by linear weights (`ramp`), and decoded as one picture.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.diffusion.noise import Window
from mezzotint.models.tiles import Span, spans
from mezzotint.models.upscaler import ramp
from mezzotint.run.plan import RunPlan


class Tile(NamedTuple):
    """A tile, in latents."""

    row: Span
    column: Span

    def part(self, x: Tensor) -> Tensor:
        """Return the tile of whole latents (B, C, h, w)."""
        return x[:, :, self.row.cells(1), self.column.cells(1)]

    @property
    def weights(self) -> Tensor:
        """The weight of each of its cells, (h, w) float32, which add up to 1 with the neighbours'."""
        return (ramp(self.row)[:, None] * ramp(self.column)).float()

    def window(self, plan: RunPlan) -> Window:
        """Return where it lies in the noise of the whole run."""
        return Window(plan.latent_shape[1:], self.row.cells(1), self.column.cells(1))


def tiles_of(plan: RunPlan) -> list[Tile]:
    """Return the tiles that a plan is drawn in, of equal size, row by row."""
    side = (plan.request.tile or 0) // plan.model.downscale
    rows, columns = (spans(length, side, side // 4) for length in plan.latent_shape[1:])
    return [Tile(row, column) for row, column in product(rows, columns)]


def tile_plan(plan: RunPlan, tile: Tile) -> RunPlan:
    """Return the plan of one tile; for SDXL it is a crop of the whole picture."""
    side = plan.model.downscale
    top, left = tile.row.first * side, tile.column.first * side
    height, width = ((span.last - span.first) for span in tile)
    changes: dict[str, object] = {"width": width * side, "height": height * side}
    if plan.request.crop is not None:
        changes["crop"] = plan.request.crop[0] + top, plan.request.crop[1] + left
        if plan.request.target_size == (plan.request.height, plan.request.width):
            changes["target_size"] = height * side, width * side
    return replace(plan, request=plan.request.replace(**changes), latent_shape=(plan.latent_shape[0], height, width))


class Canvas:
    """The latents of the whole picture while its tiles are drawn.

    Args:
        start: The encoded picture, (B, C, h, w), which is shown where nothing has been drawn yet.
    """

    def __init__(self, start: Tensor) -> None:
        self._start, self._sum = start, torch.zeros_like(start)
        self._weights = torch.zeros(start.shape[2:], device=start.device)

    def with_tile(self, tile: Tile, x: Tensor) -> Tensor:
        """Return the whole with a tile that is not finished yet."""
        weights = tile.weights.to(x.device)
        total, left = self._sum.clone(), 1.0 - self._weights
        tile.part(total).add_(x * weights)
        left[tile.row.cells(1), tile.column.cells(1)] -= weights
        return total + self._start * left.clamp(min=0.0)

    def add(self, tile: Tile, x: Tensor) -> None:
        """Add a finished tile."""
        weights = tile.weights.to(x.device)
        tile.part(self._sum).add_(x * weights)
        self._weights[tile.row.cells(1), tile.column.cells(1)] += weights
