"""Changes of LyCORIS whose ΔW depends on the weight W itself.

    Scaling        ΔW = w * W, w per output or per input                   (IA)^3, Liu et al. 2022
    Generalized    ΔW = W a1 a2 + b1 b2                                    GLoRA, Chavan et al. 2023
    Rotation       W' = r * (R^T W), R of blocks along the diagonal        OFT, Qiu et al. 2023
    Butterfly      W' = r * (R_m ... R_1 W), each R_i of permuted blocks   BOFT, Liu et al. 2023

Each block of R is orthogonal, the Cayley transform (I + Q)(I - Q)^-1 of a skew-symmetric Q; r is an optional factor per
output. A scale s of a rotation interpolates each R between I and itself, sR + (1 - s)I, as LyCORIS does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.models.adapters import LowRank, RelativeChange, composed_shape


@dataclass(frozen=True, eq=False)
class Scaling(RelativeChange):
    """A factor 1 + w for each output of the layer, or with `inputs` for each input."""

    scale: Tensor  # (outputs,), or (inputs,)
    inputs: bool = False

    def delta(self, weight: Tensor) -> Tensor:
        axis = 1 if self.inputs else 0
        return weight.float() * self.scale.float().view([-1 if k == axis else 1 for k in range(weight.ndim)])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self.scale.numel() == (shape[1] if self.inputs else shape[0])


@dataclass(frozen=True, eq=False)
class Generalized(RelativeChange):
    """A product of low rank, and another that multiplies the weight's inputs.

    Attributes:
        inner: b1 b2, of the shape of the weight.
        a1: Shape (inputs, rank).
        a2: Shape (rank, inputs).
        factor: alpha / rank, of the second product; `inner` has its own.
    """

    inner: LowRank
    a1: Tensor
    a2: Tensor
    factor: float = 1.0

    def product(self) -> Tensor:
        """Return a1 a2 (inputs, inputs) in float32."""
        return (self.a1.float() @ self.a2.float()).mul_(self.factor)

    def delta(self, weight: Tensor) -> Tensor:
        mixed = torch.einsum("oi...,ij,jk->ok...", weight.float(), self.a1.float() * self.factor, self.a2.float())
        return self.inner.delta(weight) + mixed

    def fits(self, shape: tuple[int, ...]) -> bool:
        return (
            len(shape) > 1 and self.inner.fits(shape) and composed_shape(None, self.a1, self.a2) == (shape[1], shape[1])
        )


@dataclass(frozen=True, eq=False)
class Rotation(RelativeChange):
    """A rotation of the weight's outputs, block by block.

    Attributes:
        blocks: R, of shape (outputs / n, n, n), in float32.
        rescale: A factor for each output, or None.
    """

    blocks: Tensor
    rescale: Tensor | None = None

    def delta(self, weight: Tensor) -> Tensor:
        before = weight.float().flatten(1)
        turned = self.turn(before)
        if self.rescale is not None:
            turned = turned * self.rescale.float().view(-1, 1)
        return (turned - before).view(weight.shape)

    def turn(self, rows: Tensor) -> Tensor:
        """Return the rotated rows (outputs, ...)."""
        parts = rows.view(*self.blocks.shape[:2], -1)
        return torch.einsum("knm,kni->kmi", self.blocks, parts).flatten(0, 1)

    def fits(self, shape: tuple[int, ...]) -> bool:
        count, size, other = self.blocks.shape
        return size == other and count * size == shape[0] and self.rescales(shape)

    def rescales(self, shape: tuple[int, ...]) -> bool:
        """Return whether `rescale`, if there is one, is one for a weight of this shape."""
        return len(shape) > 1 and (self.rescale is None or self.rescale.numel() == shape[0])

    def at(self, scale: float) -> tuple[Rotation, float]:
        identity = torch.eye(self.blocks.shape[-1], device=self.blocks.device)
        return replace(self, blocks=torch.lerp(identity.expand_as(self.blocks), self.blocks, scale)), 1.0


@dataclass(frozen=True, eq=False)
class Butterfly(Rotation):
    """Rotations of the weight's outputs, one after another, each of blocks of n outputs at larger distances.

    Attributes:
        blocks: R_i, of shape (m, outputs / n, n, n), in float32. R_i rotates outputs 2^i n/2 apart.
        rescale: A factor for each output, or None.
    """

    def turn(self, rows: Tensor) -> Tensor:
        width, size = rows.shape[1], self.blocks.shape[-1]
        for stage, blocks in enumerate(self.blocks):
            stride = 2**stage * size // 2
            rows = rows.view(-1, 2, stride, width).transpose(1, 2).reshape(-1, size, width)
            rows = torch.einsum("bij,bjk->bik", blocks, rows)
            rows = rows.reshape(-1, stride, 2, width).transpose(1, 2).reshape(-1, width)
        return rows

    def fits(self, shape: tuple[int, ...]) -> bool:
        stages, count, size, other = self.blocks.shape
        return (
            size == other
            and size % 2 == 0
            and count * size == shape[0]
            and 0 < stages < 32
            and shape[0] % (2**stages * size // 2) == 0
            and self.rescales(shape)
        )


def cayley(blocks: Tensor, constraint: float = 0.0) -> Tensor:
    """Return the rotations of unconstrained blocks B: (I + Q)(I - Q)^-1 in float32, with Q = B - B^T.

    Args:
        blocks: Shape (..., n, n).
        constraint: The largest norm of all Q together; larger ones are scaled down. 0 for no constraint.
    """
    skew = blocks.double() - blocks.double().mT
    if constraint > 0:
        skew = skew * (constraint / skew.norm().add(1e-8)).clamp(max=1.0)
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotations: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return rotations.float()
