"""Previews: latents to RGB pictures by a matrix that is fitted to the model's own VAE, or by the decoder of a TAESD."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import WriteError
from mezzotint.files import read_text, write_atomically
from mezzotint.images.io import from_pil, to_pil
from mezzotint.models.tiny_vae import TinyDecoder
from mezzotint.weights.vae_files import load_decoder

log = logging.getLogger("mezzotint")

SIDE = 16  # of the latents that the matrix is fitted to
SAMPLES = 4


class LatentPreview:
    """Shows latents at once, and roughly.

    Args:
        decode: Decodes latents to pictures; it is called once, with small latents, if no matrix is stored.
        channels: The number of latent channels.
        downscale: Pixels of a picture for one of its latents, in each direction.
        path: The file that stores the matrix, or None to fit it anew.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Sequence[Image.Image]],
        channels: int,
        downscale: int,
        path: Path | None = None,
    ) -> None:
        self._downscale = downscale
        found = _read(path, channels) if path else None
        matrix = _fit(decode, channels, downscale) if found is None else found
        if path and found is None:
            _write(path, matrix)
        self._matrix = matrix.numpy()

    def picture(self, latents: Tensor) -> Image.Image:
        """Return latents (B, C, h, w) as one picture of h x 8 by B x w x 8 pixels, side by side."""
        # NumPy and Pillow: torch's threads in another thread than the run's would slow the run down
        rows = np.moveaxis(latents.float().cpu().numpy(), 1, -1)  # (B, h, w, C)
        rgb = np.concatenate(list(rows @ self._matrix[:-1] + self._matrix[-1]), axis=1)  # (h, B w, 3), from -1 to 1
        image = Image.fromarray((np.nan_to_num(rgb).clip(-1.0, 1.0) * 127.5 + 127.5).round().astype(np.uint8))
        size = image.width * self._downscale, image.height * self._downscale
        return image.resize(size, Image.Resampling.BILINEAR)


class TinyPreview:
    """Shows latents as a TAESD decodes them.

    Args:
        decoder: Its decoder, in which no run computes.
    """

    def __init__(self, decoder: TinyDecoder) -> None:
        self._decoder = decoder

    @classmethod
    def open(cls, source: str, channels: int, device: torch.device) -> TinyPreview:
        """Load the decoder from a file, a folder or a hub id; its encoder may be missing.

        Args:
            source: The TAESD.
            channels: The latent channels of the model.
            device: Where it computes.

        Raises:
            CheckpointError: If it is missing or something else, or takes other latents.
        """
        return cls(load_decoder(source, channels, torch.float32 if device.type == "cpu" else torch.float16, device))

    @torch.inference_mode()
    def picture(self, latents: Tensor) -> Image.Image:
        """Return latents (B, C, h, w) as one picture of h x 8 by B x w x 8 pixels, side by side."""
        weight = self._decoder.conv_in.weight
        pixels = [self._decoder.in_strips(one.to(weight.device, weight.dtype)) for one in torch.split(latents, 1)]
        (image,) = to_pil(torch.cat(pixels, dim=-1).float().cpu().nan_to_num())
        return image


def matrix_path(hashes: Mapping[str, str], given: Mapping[str, str] | None) -> Path:
    """Return where the matrix of a VAE is stored in the user's cache, named by the SHA-256 of the VAE's files.

    Args:
        hashes: The SHA-256 of each of the model's files, by name; one file holds all networks, a folder one each.
        given: Those of a VAE that is used in place of the model's own.
    """
    import platformdirs

    own = {name: digest for name, digest in hashes.items() if name.startswith("vae/")}
    key = hashlib.sha256(json.dumps(sorted((given or own or hashes).values())).encode()).hexdigest()
    return Path(platformdirs.user_cache_dir("mezzotint", appauthor=False)) / "previews" / f"{key}.json"


def _fit(decode: Callable[[Tensor], Sequence[Image.Image]], channels: int, downscale: int) -> Tensor:
    """Return the matrix (C + 1, 3) from latents to colours that has the least squares."""
    random = torch.Generator().manual_seed(0)
    patches = [
        F.interpolate(torch.randn(SAMPLES, channels, side, side, generator=random), size=SIDE, mode="nearest")
        for side in (2, 4, 8)
    ]
    latents = torch.cat(patches)
    pixels = torch.cat([from_pil(image) for image in decode(latents)])
    means = F.avg_pool2d(pixels, downscale)  # of the pixels of one latent
    solution: Tensor = torch.linalg.lstsq(_rows(latents), means.movedim(1, -1).reshape(-1, 3)).solution
    return solution


def _read(path: Path, channels: int) -> Tensor | None:
    """Return the stored matrix, or None if there is none that can be used."""
    try:
        matrix = torch.tensor(json.loads(read_text(path)), dtype=torch.float32)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return matrix if matrix.shape == (channels + 1, 3) and bool(matrix.isfinite().all()) else None


def _write(path: Path, matrix: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(matrix.tolist()).encode())
    except (OSError, WriteError) as error:  # it is fitted again the next time
        log.info("the matrix of previews is not stored: %s", error)


def _rows(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as rows (B h w, C + 1); the last column is 1, for an offset."""
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return F.pad(rows, (0, 1), value=1.0)
