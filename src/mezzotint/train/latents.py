"""Cached encodings of pictures by the VAE and of captions by text encoders, neither of which is trained here.

Files are named by a hash of everything they depend on, so a cache is never stale, and are written atomically. For a
picture the posterior's mean and log variance are stored in float32, so that each epoch can sample other latents.
Pictures and captions are encoded one at a time, so results do not depend on the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from mezzotint import prompt
from mezzotint.conditioning.chunks import split_into_chunks
from mezzotint.conditioning.encode import Conditioner, pad_contexts
from mezzotint.errors import MezzotintError, WriteError
from mezzotint.files import write_atomically
from mezzotint.images.io import from_pil
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition
from mezzotint.models.vae import VAE, Posterior
from mezzotint.models.vae_modes import VAEMode, encode
from mezzotint.train.buckets import Size
from mezzotint.train.data import Example

LAYOUT = 1  # of cached files; part of their names


@dataclass(frozen=True)
class View:
    """A transform of pictures: resize to `resized` (width, height), mirror if `flip`, crop `size` at (left, top)."""

    resized: Size
    flip: bool
    left: int
    top: int
    size: Size

    @classmethod
    def of(cls, picture: Size, size: Size, flip: bool = False, cut: tuple[float, float] | None = None) -> View:
        """Return the view that just covers `size`, cropped in the middle or at `cut`, two numbers in [0, 1)."""
        scale = max(size[0] / picture[0], size[1] / picture[1])
        width, height = (max(round(side * scale), least) for side, least in zip(picture, size, strict=True))
        over = width - size[0], height - size[1]
        left, top = (
            int((pixels + 1) * share) if cut else pixels // 2
            for pixels, share in zip(over, cut or (0.5, 0.5), strict=True)
        )
        return cls((width, height), flip, left, top, size)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Transform a picture."""
        if image.size != self.resized:
            image = image.resize(self.resized, Image.Resampling.LANCZOS)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.crop((self.left, self.top, self.left + self.size[0], self.top + self.size[1]))


class Store:
    """A cache of tensors by name, in files below a folder or, without one, in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, Tensor]] = {}

    def get(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a name (hex digits), made by `make` if they are not cached. Raises WriteError."""
        if self.folder is None:
            if name not in self._memory:
                self._memory[name] = make()
            return self._memory[name]
        path = self.folder / name[:2] / f"{name}.safetensors"
        try:
            return safetensors.torch.load(path.read_bytes())
        except (FileNotFoundError, SafetensorError):  # missing or damaged: made again
            tensors = make()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, safetensors.torch.save(tensors))
        except OSError as error:
            raise WriteError(
                f"{path} cannot be written ({error.strerror or error}); it caches encoded pictures and captions"
            ) from None
        return tensors


class Latents:
    """Latents of pictures by a VAE, cached below `folder` or, without one, in memory."""

    def __init__(self, vae: VAE, folder: Path | None = None, vae_mode: VAEMode = "whole") -> None:
        """`vae_mode`: how the VAE encodes, as in Placement.vae."""
        self.vae, self.vae_mode = vae, vae_mode
        self.store = Store(folder and folder / "latents")

    def posterior(self, example: Example, view: View, keep: bool = True) -> Posterior:
        """Return the posterior of a picture: mean and logvar (1, C, h, w), float32 on the CPU.

        Args:
            example: the picture.
            view: its resizing and crop.
            keep: whether to cache the result.

        Raises:
            RequestError: if the picture does not decode.
            MezzotintError: if the VAE's output is not finite.
            WriteError: if the cache cannot be written.
        """

        def make() -> dict[str, Tensor]:
            return self._encode(example, view)

        name = _key("latents", example.digest, json.dumps(astuple(view)), self._digest) if keep else ""
        moments = self.store.get(name, make) if keep else make()
        return Posterior(moments["mean"], moments["logvar"])

    def sample(self, posterior: Posterior, generator: torch.Generator) -> Tensor:
        """Sample latents, scaled for the UNet."""
        return self.vae.scale(posterior.sample(generator))

    @cached_property
    def _digest(self) -> str:
        return digest(self.vae)

    @torch.no_grad()
    def _encode(self, example: Example, view: View) -> dict[str, Tensor]:
        weight = next(self.vae.parameters())
        pixels = from_pil(view(example.open())).to(weight.device, weight.dtype)
        posterior = encode(self.vae, pixels, self.vae_mode)
        moments = {"mean": posterior.mean, "logvar": posterior.logvar}
        moments = {name: tensor.float().cpu().contiguous() for name, tensor in moments.items()}
        if not all(tensor.isfinite().all() for tensor in moments.values()):
            raise MezzotintError(
                f"the VAE's output for {example.place!r} is not finite in {weight.dtype}; precision float32 may help"
            )
        return moments


class Texts:
    """Embeddings of captions by text encoders, as of plain prompts in generation; cached like Latents."""

    def __init__(
        self,
        tokenizers: Sequence[Tokenizer],
        text_encoders: Sequence[CLIPTextModel],
        folder: Path | None = None,
        clip_skip: int = 0,
    ) -> None:
        self.conditioner = Conditioner(tokenizers, text_encoders, clip_skip)
        self.store = Store(folder and folder / "texts")

    def __call__(self, captions: Sequence[str], keep: bool = True) -> Condition:
        """Return the context (B, T, D) and pooled embedding (B, P) of captions, float32 on the CPU.

        Captions with fewer windows are padded with the empty caption. keep: whether to cache the result.
        """
        conditions = [self._condition(caption, keep) for caption in captions]
        if len({condition.context.shape[1] for condition in conditions}) > 1:
            slot = [[(0, condition)] for condition in conditions]
            (rows,) = pad_contexts([slot], [[(0, self._condition("", keep))]])
            conditions = [row[0][1] for row in rows]
        return Condition.cat(conditions)

    def _condition(self, caption: str, keep: bool) -> Condition:
        @torch.no_grad()
        def make() -> dict[str, Tensor]:
            condition = self.conditioner.encode(plan)[0].timeline[0][1]
            tensors = {"context": condition.context, "pooled": condition.pooled}
            return {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}

        plan = prompt.plan(caption, "plain")
        if keep:
            spans = plan.parts[0].variants[0].spans
            ids = [
                [[t.id for t in chunk] for chunk in split_into_chunks(spans, "plain", own)]
                for own in self.conditioner.tokenizers
            ]
            name = _key("texts", json.dumps(ids), str(self.conditioner.clip_skip), self._digest)
        tensors = self.store.get(name, make) if keep else make()
        return Condition(tensors["context"], tensors.get("pooled"))

    @cached_property
    def _digest(self) -> str:
        windows = [[own.window([]), own.max_length] for own in self.conditioner.tokenizers]  # BOS, EOS, padding
        return _key(json.dumps(windows), *(digest(encoder) for encoder in self.conditioner.encoders))


def digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights: their names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for prefix, layer in sorted(network.named_modules()):
        own: dict[str, Tensor] = {}
        layer._save_to_state_dict(own, f"{prefix}.", keep_vars=False)  # one by one,
        for name, tensor in sorted(own.items()):  # since an offloaded network reads its weights here
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join((str(LAYOUT), *parts)).encode()).hexdigest()
