"""The ways to run the VAE, by the names that a placement gives them; a TAESD's tiles are strips, which are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from mezzotint.errors import RequestError
from mezzotint.models.edits import is_customized
from mezzotint.models.strips import decode_in_strips, encode_in_strips
from mezzotint.models.tiles import decode_in_tiles, encode_in_tiles
from mezzotint.models.tiny_vae import TinyVAE
from mezzotint.models.vae import VAE, Posterior

VAEMode = Literal["whole", "strips", "tiles"]

DECODE: dict[str, Callable[[VAE, Tensor], Tensor]] = {
    "whole": lambda vae, z: vae.decode(z),
    "strips": decode_in_strips,
    "tiles": decode_in_tiles,
}
ENCODE: dict[str, Callable[[VAE, Tensor], Posterior]] = {
    "whole": lambda vae, pixels: vae.encode(pixels),
    "strips": encode_in_strips,
    "tiles": encode_in_tiles,
}


def decode(vae: VAE, z: Tensor, vae_mode: VAEMode = "whole") -> Tensor:
    """Decode unscaled latents (B, 4, h, w) to pixels (B, 3, 8h, 8w)."""
    _check_hooks(vae, vae_mode)
    if isinstance(vae, TinyVAE) and vae_mode != "whole":
        return vae.decode_in_strips(z)
    return DECODE[vae_mode](vae, z)


def encode(vae: VAE, pixels: Tensor, vae_mode: VAEMode = "whole") -> Posterior:
    """Encode pixels (B, 3, H, W) in [-1, 1] to the posterior of unscaled latents."""
    _check_hooks(vae, vae_mode)
    if isinstance(vae, TinyVAE) and vae_mode != "whole":
        return vae.encode_in_strips(pixels)
    return ENCODE[vae_mode](vae, pixels)


def _check_hooks(vae: VAE, vae_mode: VAEMode) -> None:
    """Raise RequestError if a mode that computes layers in pieces, without calling them, would pass by."""
    if vae_mode != "whole" and is_customized(vae):
        raise RequestError(
            f"the VAE has a hook or a module of another class, which vae={vae_mode!r} of the placement does not call; "
            'remove it, or load the model with vae="whole"'
        )
