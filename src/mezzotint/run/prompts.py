"""The words of a batch: what its prompts and negative prompts are to the UNet, encoded once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mezzotint import samplers
from mezzotint.conditioning.encode import Cache, Encoded, Reader, lengthened, plan_of, together, zeros_like
from mezzotint.denoiser import Timeline
from mezzotint.errors import RequestError
from mezzotint.models.adapters import adapting, weights_version
from mezzotint.models.attention import chosen
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.offload import turn
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.prompt import Network, Plan
from mezzotint.prompt import plan as read_prompt
from mezzotint.request import Request
from mezzotint.run.nan_guard import watched
from mezzotint.run.resolve import Resolver
from mezzotint.weights.embeddings import Library
from mezzotint.weights.lora import Adapters, Named, Scale
from mezzotint.weights.model_plan import listed

MOST = 100  # of a LoRA's scale
SUFFIXES = (".safetensors", ".pt", ".bin")


class Wording:
    """Of one model, whose text encoders these are. All requests here are resolved. What was encoded is kept."""

    def __init__(
        self,
        tokenizers: Sequence[Tokenizer],
        text_encoders: Sequence[CLIPTextModel],
        resolver: Resolver,
        adapters: Adapters,
    ) -> None:
        self.tokenizers, self.text_encoders, self.resolver = tokenizers, text_encoders, resolver
        self.adapters = adapters
        self._encoded = Cache()

    def conditions(
        self, requests: Sequence[Request], noted: list[str] | None = None, before: int | None = None
    ) -> tuple[list[Timeline], tuple[float, ...]]:
        """For one batch (conditionals, unconditional, negative) and the weights of the conditionals: one for each part
        of the prompt, the second only where guidance asks for it, the third only where Perp-Neg does; else the second
        is the negative one. noted: gets "text_encoder" where that had to run in float32. before: of a second pass, the
        steps of the first.
        """
        read = partial(self.parts, noted=noted, before=before)

        def negative(request: Request, text: str) -> Timeline:  # which has no AND
            return read(request, text, negative=True)[0].timeline

        request = requests[0]
        same = all(r.prompt == request.prompt and r.negative_prompt == request.negative_prompt for r in requests)
        rows = requests[:1] if same else requests
        prompts = [read(r, r.prompt) for r in rows]
        weights = tuple(part.weight for part in prompts[0])
        slots: list[list[Timeline]] = [[part.timeline for part in parts] for parts in zip(*prompts, strict=True)]
        unskipped = request.replace(clip_skip=0)  # clip_skip is the prompt's alone, as in diffusers
        if self._guides(request, weights):
            texts: list[list[str | None]] = [[r.negative_prompt for r in rows]]
            empty = [self.resolver.empty_prompt for _ in rows]
            if request.guidance_method == "perp_neg" and texts[0] != empty:
                texts.insert(0, empty)
            for column in texts:
                slots.append(
                    [
                        [(0, zeros_like(first[0][1]))] if text is None else negative(unskipped, text)
                        for text, first in zip(column, slots[0], strict=True)
                    ]
                )
        if request.prompt_syntax == "compel":
            empties = [negative(request, "")] * len(weights) + [negative(unskipped, "")] * 2
            slots = lengthened(slots, empties)
        ids = None
        if request.original_size and request.crop and request.target_size:
            numbers = [*request.original_size, *request.crop, *request.target_size]
            ids = torch.tensor([numbers], dtype=torch.float32)
        return [together(slot, ids) for slot in slots], weights

    def parts(
        self,
        request: Request,
        text: str,
        negative: bool = False,
        noted: list[str] | None = None,
        before: int | None = None,
    ) -> list[Encoded]:
        """A prompt of this request, encoded; from the cache where it was before."""
        planned = plan_of(request, text, self.resolver.counted(request), negative, before)
        library = self.library(request)
        reader = Reader(
            self.tokenizers, self.text_encoders, request.clip_skip or 0, request.emphasis or "original", library
        )
        loras = self.loras(request)
        # other ways to sum attention, other last bits
        key = (*reader.key(planned), chosen(), *sorted(library.digests.items()), *self._key(loras))

        def encode() -> list[Encoded]:
            networks = {name: network for name, network in self.adapters.networks.items() if name != "unet"}
            with adapting(networks, self.adapters.changes(loras)):
                return _encoded(reader, planned)

        encoded = self._encoded.get(key, encode)
        if noted is not None and any(part.float32 for part in encoded) and "text_encoder" not in noted:
            noted.append("text_encoder")
        return encoded

    def shapes(self, request: Request) -> list[object]:
        """Of the prompt and the negative prompt what two requests must have in common to share a batch."""
        reader = Reader(self.tokenizers, self.text_encoders, embeddings=self.library(request))
        texts = ((request.prompt, False), (request.negative_prompt, True))
        steps = self.resolver.counted(request)
        shapes = [reader.shape(plan_of(request, text or "", steps, negative)) for text, negative in texts]
        return [*shapes, self.loras(request)]

    def library(self, request: Request) -> Library:
        """The textual inversions that the request names, and those bundled in its LoRAs."""
        bundled = [name for name, _ in self.loras(request) if self.adapters.read(name).coverage.bundled]
        sources = [*(request.embeddings or ()), *bundled]
        return Library(sources, [encoder.config.hidden_size for encoder in self.text_encoders])

    def loras(self, request: Request) -> tuple[tuple[str, Scale], ...]:
        """The LoRA files of a request and how much of each: `loras`, and where it has a folder those of its prompt.

        Raises CheckpointError and RequestError for a name in the prompt that is no file's.
        """
        named = [(entry[0], _scale(*entry[1:])) for entry in request.loras or ()]
        if request.lora_folder:
            networks = read_prompt(request.prompt, request.prompt_syntax or "a1111").networks
            files = lora_files(request.lora_folder) if networks else {}
            named += [_named(network, files) for network in networks if network.kind == "lora"]
        return tuple(named)

    def uncovered(self, request: Request) -> tuple[str, ...]:
        """A sentence on each LoRA of which a part matches nothing in the model."""
        covered = {name: self.adapters.read(name).coverage for name, _ in self.loras(request)}
        return tuple(f"{name}: {found}" for name, found in covered.items() if found.unmatched)

    def _key(self, loras: Named) -> list[object]:
        """What encoded prompts depend on in LoRAs: those that change a text encoder, and what is merged."""
        versions = [weights_version(encoder) for encoder in self.text_encoders]
        read = [(self.adapters.read(name), scale) for name, scale in loras]
        touching = [(a, s) for a, s in read if any(not layer.startswith("unet.") for layer in a.changes)]
        return [*versions, *((a.digest, s.text, s.blocks) for a, s in touching)]

    def used(self, request: Request) -> dict[str, str]:
        """Trigger -> sha256 of the embeddings that the prompts may name."""
        words = f"{request.prompt} {request.negative_prompt}".lower()
        return {name: digest for name, digest in self.library(request).digests.items() if name in words}

    def _guides(self, request: Request, weights: Sequence[float]) -> bool:
        """Whether any step asks for the unconditional output; CFG++ always does, and so does a sum of AND's parts."""
        scale = request.guidance_scale or 0.0
        highest = max(scale) if isinstance(scale, tuple) else scale
        cfg_pp = samplers.SOLVERS[self.resolver.sampler(request).solver].cfg_pp
        return highest > 1.0 or abs(sum(weights) - 1.0) > 1e-6 or cfg_pp


def _scale(unet: float, text: float | None = None, blocks: tuple[tuple[str, float], ...] = ()) -> Scale:
    return Scale(unet, unet if text is None else text, blocks)


def _named(network: Network, files: dict[str, str]) -> tuple[str, Scale]:
    """A prompt's <lora:name:text encoder's scale:UNet's>, or te= and unet=, as A1111 reads it."""
    if network.name.lower() not in files:
        near = get_close_matches(network.name.lower(), files, 1)
        raise RequestError(
            f"prompt names the LoRA {network.name[:100]!r}, of which lora_folder has no file; "
            + (f"the nearest is {near[0]}" if near else f"it has {listed(sorted(files)) or 'none'}")
        )
    try:
        text = float(network.options.get("te", network.args[0] if network.args else 1.0))
        unet = float(network.options.get("unet", network.args[1] if len(network.args) > 1 else text))
        if not max(abs(unet), abs(text)) <= MOST:
            raise ValueError
    except ValueError:
        raise RequestError(
            f"prompt has the LoRA {network.name[:100]!r} with a scale that is no number from -{MOST} to {MOST}"
        ) from None
    return files[network.name.lower()], Scale(unet, text)


def lora_files(folder: str) -> dict[str, str]:
    """Name, in lower case -> path, of the LoRA files in a folder and those in it. Raises RequestError."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise RequestError(f"lora_folder is {folder[:200]!r}, which is no folder that is here")
    found = sorted(path for path in place.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return {path.stem.lower(): str(path) for path in reversed(found)}


def _encoded(reader: Reader, planned: Plan) -> list[Encoded]:
    """What the reader makes of a plan; where that is no number, what it makes in float32."""

    def encode(encoders: torch.nn.ModuleList) -> list[Encoded]:
        with turn(encoders):
            return replace(reader, encoders=list(encoders)).encode(planned)  # type: ignore[arg-type]

    def tensors(parts: list[Encoded]) -> list[Tensor]:
        conditions = [condition for part in parts for _, condition in part.timeline]
        return [tensor for c in conditions for tensor in (c.context, c.pooled) if tensor is not None]

    noted: list[str] = []
    encoded = watched("text_encoder", torch.nn.ModuleList(reader.encoders), encode, tensors, noted)
    return [replace(part, float32=True) for part in encoded] if noted else encoded
