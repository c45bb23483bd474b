"""How a placed model computes: exclusively if weights move, with the placement's attention and VAE mode.

The weights themselves were placed when the model was loaded (weights/offload.py). Split guidance is the Denoiser's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mezzotint.errors import MissingExtraError
from mezzotint.models.attention import backend, chosen, watcher
from mezzotint.models.convolution import seamless
from mezzotint.models.offload import onload
from mezzotint.models.vae import VAE, Posterior
from mezzotint.models.vae_modes import VAEMode, decode, encode
from mezzotint.placement import Placement
from mezzotint.run.nan_guard import with_fp32_fallback

Item = TypeVar("Item")


def adapt_placement(placement: Placement, device: torch.device, dtype: str | None) -> Placement:
    """Return a placement from another machine, or the nearest one that is possible here.

    Attention falls back to "auto" if its package is missing, and streaming to offloading if the weights cannot be
    streamed in this dtype on the CPU.
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


def iterate_inside(context: Callable[[], AbstractContextManager[None]], items: Iterator[Item]) -> Iterator[Item]:
    """Advance an iterator inside a context, and yield its items outside of it.

    Contexts belong to the thread, so they must not stay open while a caller looks at a step.
    """
    while True:
        with context():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


class Executor:
    """Runs one pipeline's networks as its placement says."""

    def __init__(self, placement: Placement, exclusive: bool = False) -> None:
        """Check that the placement is possible.

        Args:
            placement: Where the weights are and how the work is cut.
            exclusive: Whether runs exclude each other even if no weights move.

        Raises:
            MissingExtraError: If the placement's attention needs a package that is not installed.
        """
        with backend(placement.attention):
            self.placement = placement
        self._lock = threading.RLock() if exclusive or placement.weights != "resident" else None

    @property
    def effective_placement(self) -> Placement:
        """The placement of a run that starts now: with the attention that the caller has chosen.

        While a recorder watches attention, guidance is batched, whose order of conditions the recorder knows.
        """
        changes: dict[str, str] = {"guidance": "batched"} if watcher.get() else {}
        if (own := chosen()) is not None:
            changes["attention"] = f"sliced:{own.bytes}B" if own.name == "sliced" else own.name
        return self.placement.model_copy(update=changes)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Exclude other threads' runs if weights move or a budget is kept: two runs would need twice the memory."""
        with self._lock or nullcontext():
            yield

    @contextmanager
    def inference(self, tiled: str | None = None) -> Iterator[None]:
        """Enter the context in which networks run: exclusive, without gradients, with the placement's attention.

        Attention that the caller has chosen by `with backend(...)` takes precedence.

        Args:
            tiled: The directions, "x", "y" or "xy", in which the picture tiles.
        """
        attention = nullcontext() if chosen() else backend(self.placement.attention)
        with self.exclusive(), torch.inference_mode(), attention, seamless(tiled):
            yield

    def decode(self, vae: VAE, z: Tensor, upcast_parts: list[str]) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to pixels (B, 3, H, W), about in [-1, 1].

        Args:
            vae: The autoencoder.
            z: The latents.
            upcast_parts: Receives "vae" if it had to run in float32.
        """
        run = partial(self._run_vae, "decoder", decode, z)
        return with_fp32_fallback("vae", vae, run, lambda x: [x], upcast_parts)

    def encode(self, vae: VAE, pixels: Tensor, upcast_parts: list[str]) -> Posterior:
        """Encode pixels (B, 3, H, W) in [-1, 1] to the posterior of unscaled latents.

        Args:
            vae: The autoencoder.
            pixels: The pixels.
            upcast_parts: Receives "vae" if it had to run in float32.
        """
        run = partial(self._run_vae, "encoder", encode, pixels)
        return with_fp32_fallback(
            "vae", vae, run, lambda posterior: [posterior.mean, posterior.logvar.exp()], upcast_parts
        )

    def _run_vae(self, half: str, run: Callable[[VAE, Tensor, VAEMode], Item], x: Tensor, vae: VAE) -> Item:
        """Run a half of the VAE in the placement's mode and the weights' dtype."""
        network = getattr(vae, half)
        with onload(network):
            return run(vae, x.to(network.conv_in.weight.dtype), self.placement.vae)
