"""What a run of a placed model computes inside: its attention, its VAE's way, and alone where weights move.

A Placement's words about weights were followed when the model was loaded (weights/offload.py); the rest of them are
here and in the Denoiser, which takes the conditions one by one where guidance is "split".
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from mezzotint.errors import MissingExtraError
from mezzotint.models.attention import backend, chosen, watcher
from mezzotint.models.convolution import seamless
from mezzotint.models.offload import onload
from mezzotint.models.vae import VAE, Posterior
from mezzotint.models.vae_modes import decode, encode
from mezzotint.placement import Placement
from mezzotint.run.nan_guard import with_fp32_fallback


def possible(placement: Placement, device: torch.device, dtype: str | None) -> Placement:
    """A placement that another machine may have made, or what is nearest to it and can be on this device: attention
    without the package that is not here; weights kept as they are, and moved otherwise.
    """
    changes = {}
    try:
        with backend(placement.attention):
            pass
    except MissingExtraError:
        changes["attention"] = "auto"
    if device.type == "cpu" and placement.weights == "stream" and placement.storage not in (None, dtype):
        changes["weights"] = "offload"
    return placement.model_copy(update=changes)


class Executor:
    """Of one pipeline."""

    def __init__(self, placement: Placement, one: bool = False) -> None:
        """one: run at a time, whatever the placement. Raises MissingExtraError where its attention needs a package that
        is not here.
        """
        with backend(placement.attention):
            self.placement = placement
        self._lock = threading.RLock() if one or placement.weights != "resident" else None

    @property
    def now(self) -> Placement:
        """What a run here follows: the placement, with the attention that the caller has chosen, and where a recorder
        looks on with the conditions side by side, in an order that it knows.
        """
        changes: dict[str, str] = {"guidance": "batched"} if watcher.get() else {}
        if (own := chosen()) is not None:
            changes["attention"] = f"sliced:{own.bytes}B" if own.name == "sliced" else own.name
        return self.placement.model_copy(update=changes)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread's run is inside with this one where weights move, or a budget is kept: two would need twice
        the memory.
        """
        with self._lock or nullcontext():
            yield

    @contextmanager
    def computing(self, joined: str | None = None) -> Iterator[None]:
        """What networks run inside: alone, without gradients, with the placement's attention (unless the caller has
        chosen another by `with backend(...)`) and with the sides of `joined` joined.

        All of it is the thread's, so it must not stay on while a caller looks at a step.
        """
        attention = nullcontext() if chosen() else backend(self.placement.attention)
        with self.alone(), torch.inference_mode(), attention, seamless(joined):
            yield

    def decode(self, vae: VAE, z: Tensor, upcast_parts: list[str]) -> Tensor:
        """Unscaled latents (B, C, h, w) -> pixels (B, 3, H, W), about in [-1, 1]. upcast_parts: of nan_guard.py."""

        def run(vae: VAE) -> Tensor:
            with onload(vae.decoder):
                return decode(vae, z.to(vae.decoder.conv_in.weight.dtype), self.placement.vae)

        return with_fp32_fallback("vae", vae, run, lambda x: [x], upcast_parts)

    def encode(self, vae: VAE, pixels: Tensor, upcast_parts: list[str]) -> Posterior:
        """Pixels (B, 3, H, W) in [-1, 1] -> the posterior of unscaled latents."""

        def run(vae: VAE) -> Posterior:
            with onload(vae.encoder):
                return encode(vae, pixels.to(vae.encoder.conv_in.weight.dtype), self.placement.vae)

        return with_fp32_fallback("vae", vae, run, lambda posterior: [posterior.mean, posterior.logvar], upcast_parts)
