"""The words of a batch: what its prompts and negative prompts are to the UNet, encoded once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mezzotint import samplers
from mezzotint.conditioning import Cache, Encoded, Reader, lengthened, plan_of, together, zeros_like
from mezzotint.denoiser import Timeline
from mezzotint.guard import watched
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.held import turn
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.prompt import Plan
from mezzotint.request import Request
from mezzotint.resolving import Resolver
from mezzotint.weights.embeddings import Library


class Wording:
    """Of one model, whose text encoders these are. All requests here are resolved. What was encoded is kept."""

    def __init__(
        self, tokenizers: Sequence[Tokenizer], text_encoders: Sequence[CLIPTextModel], resolver: Resolver
    ) -> None:
        self.tokenizers, self.text_encoders, self.resolver = tokenizers, text_encoders, resolver
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
        key = (*reader.key(planned), *sorted(library.digests.items()))
        encoded = self._encoded.get(key, lambda: _encoded(reader, planned))
        if noted is not None and any(part.float32 for part in encoded) and "text_encoder" not in noted:
            noted.append("text_encoder")
        return encoded

    def shapes(self, request: Request) -> list[object]:
        """Of the prompt and the negative prompt what two requests must have in common to share a batch."""
        reader = Reader(self.tokenizers, self.text_encoders, embeddings=self.library(request))
        texts = ((request.prompt, False), (request.negative_prompt, True))
        steps = self.resolver.counted(request)
        return [reader.shape(plan_of(request, text or "", steps, negative)) for text, negative in texts]

    def library(self, request: Request) -> Library:
        """The textual inversions that the request names."""
        return Library(request.embeddings or (), [encoder.config.hidden_size for encoder in self.text_encoders])

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
