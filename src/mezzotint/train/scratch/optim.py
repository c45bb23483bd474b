"""Muon for weight matrices and AdamW for the rest: fewer steps than AdamW alone, at small widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix to g (m, n): quintic Newton-Schulz, Jordan et al. 2024.

    The iteration x <- (a + b x xT + c (x xT)^2) x is run on x xT alone, which is square and small, and its product of
    factors is applied to x once: 2 to 3 times fewer operations for a convolution's long rows.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at 0: singular values end in about [0.7, 1.2]
    x = g / (g.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    gram = x @ x.T
    eye = torch.eye(len(gram), dtype=g.dtype, device=g.device)
    product = eye
    for _ in range(steps):
        factor = a * eye + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if tall else x  # type: ignore[no-any-return]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices and convolutions (seen as (out, in * kh * kw)).

    Jordan et al. 2024; scaled as in Liu et al. 2025 (arXiv 2502.16982), so that learning rate and weight decay are
    AdamW's. torch.optim.Muon is not used because it computes in bf16, which is 9 to 30 times slower than float32 on a
    CPU without AMX, and refuses convolutions.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
                velocity = self.state[p]["velocity"]
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(velocity, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update.view_as(p), alpha=group["lr"] * 0.2 * max(update.shape) ** 0.5)


class Optimiser:
    """One `step` and one state over both: matrices of hidden layers go to Muon, everything else to AdamW.

    Embeddings, norms, biases and the layers named in `plain` (first and last ones) are AdamW's, as Jordan advises.
    """

    def __init__(self, module: nn.Module, lr: float, plain: tuple[str, ...] = (), weight_decay: float = 0.01):
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, p in module.named_parameters():
            hidden = p.ndim >= 2 and "embedding" not in name and not any(word in name for word in plain)
            (matrices if hidden else rest).append(p)
        self.lr = lr
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        ]
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay))

    def step(self, scale: float) -> None:
        """One step at `scale` times the learning rate, and gradients cleared."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
