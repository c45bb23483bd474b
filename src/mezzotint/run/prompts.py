"""Encode the prompts of a batch into what the UNet is conditioned on; encoded prompts are cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mezzotint.conditioning.encode import (
    Conditioner,
    EncodedPart,
    EncodingCache,
    batch_timelines,
    pad_contexts,
    zeros_like,
)
from mezzotint.denoiser import Timeline
from mezzotint.models.adapters import apply_adapters
from mezzotint.models.attention import chosen
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.edits import Snapshot, is_customized
from mezzotint.models.offload import onload
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition
from mezzotint.prompt import PromptPlan
from mezzotint.run.nan_guard import with_fp32_fallback
from mezzotint.run.plan import RunPlan
from mezzotint.weights.lora import Adapters


class PromptEncoder:
    """Encodes prompts with one model's text encoders."""

    def __init__(
        self, tokenizers: Sequence[Tokenizer], text_encoders: Sequence[CLIPTextModel], adapters: Adapters
    ) -> None:
        self.tokenizers, self.text_encoders, self.adapters = tokenizers, text_encoders, adapters
        self._cache = EncodingCache()
        self._weights, self._version = Snapshot(*text_encoders), 0

    def encode_batch(self, plans: Sequence[RunPlan], upcast_parts: list[str] | None = None) -> list[Timeline]:
        """Encode the prompts of the pictures of a batch.

        Args:
            plans: The plan of each picture; they differ only in prompts and seeds.
            upcast_parts: Receives "text_encoder" if that had to run in float32.

        Returns:
            The conditions of the UNet: one for each part of the prompt and of the regions' prompts, and with guidance
            the unconditional one; for Perp-Neg that of the empty prompt comes before it.
        """
        plan = plans[0]
        rows = _distinct_rows(plans)
        prompts = [
            [
                part
                for prompt in (row.positive, *row.regions)
                for part in self.encode_prompt(row, prompt, upcast_parts=upcast_parts)
            ]
            for row in rows
        ]
        slots: list[list[Timeline]] = [[part.timeline for part in parts] for parts in zip(*prompts, strict=True)]
        if plan.guides:
            slots += self._encode_negatives(rows, slots[0], upcast_parts)
        if plan.request.prompt_syntax == "compel":
            slots = self._pad_slots(plan, slots, upcast_parts)
        parts = len(plan.weights)
        return [batch_timelines(slot, _time_ids(plan, negative=k >= parts)) for k, slot in enumerate(slots)]

    def encode_prompt(
        self,
        plan: RunPlan,
        prompt: PromptPlan,
        *,
        clip_skip: bool = True,
        upcast_parts: list[str] | None = None,
    ) -> list[EncodedPart]:
        """Encode a prompt of this plan, or take it from the cache: one EncodedPart for each part that AND joins."""
        request = plan.request
        skip = (request.clip_skip or 0) if clip_skip else 0
        conditioner = Conditioner(
            self.tokenizers,
            self.text_encoders,
            skip,
            request.emphasis or "original",
            plan.embeddings,
            plan.model.is_sdxl,
        )
        # attention backends differ in the last bits
        key = (*conditioner.key(prompt), chosen(), *sorted(plan.embeddings.digests.items()), *self._weights_key(plan))

        def encode() -> list[EncodedPart]:
            networks = {name: network for name, network in self.adapters.networks.items() if name != "unet"}
            with apply_adapters(networks, self.adapters.changes(plan.scaled_adapters)):
                return _encode_finite(conditioner, prompt)

        # a hook or a module of a user's own must see every prompt
        encoded = encode() if any(map(is_customized, self.text_encoders)) else self._cache.get(key, encode)
        if upcast_parts is not None and any(part.float32 for part in encoded) and "text_encoder" not in upcast_parts:
            upcast_parts.append("text_encoder")
        return encoded

    def clear(self) -> None:
        """Discard the encoded prompts."""
        self._cache = EncodingCache()

    def batch_shape(self, plan: RunPlan) -> tuple[object, ...]:
        """Return what two plans' prompts must have in common to share a batch: their lengths and weights."""
        conditioner = Conditioner(self.tokenizers, self.text_encoders, embeddings=plan.embeddings)
        return conditioner.shape(plan.positive), conditioner.shape(plan.negative), plan.loras

    def _encode_negatives(
        self, rows: Sequence[RunPlan], positives: Sequence[Timeline], upcast_parts: list[str] | None
    ) -> list[list[Timeline]]:
        """Return the slots of the negative prompt, and for Perp-Neg before it that of the empty prompt."""
        columns: list[list[PromptPlan | None]] = [[_negative(row) for row in rows]]
        empty = rows[0].model.empty_prompt
        if rows[0].uses_empty_prompt and any(row.request.negative_prompt != empty for row in rows):
            columns.insert(0, [None if empty is None else row.empty for row in rows])
        return [
            [
                [(0, zeros_like(first[0][1]))] if prompt is None else self._encode_negative(row, prompt, upcast_parts)
                for row, prompt, first in zip(rows, column, positives, strict=True)
            ]
            for column in columns
        ]

    def _encode_negative(self, plan: RunPlan, prompt: PromptPlan, upcast_parts: list[str] | None) -> Timeline:
        """Encode a negative prompt, which has no AND; clip_skip is the prompt's alone, as in diffusers."""
        return self.encode_prompt(plan, prompt, clip_skip=False, upcast_parts=upcast_parts)[0].timeline

    def _pad_slots(
        self, plan: RunPlan, slots: list[list[Timeline]], upcast_parts: list[str] | None
    ) -> list[list[Timeline]]:
        """Pad all slots to the longest with the empty prompt, as Compel does."""
        positive = self.encode_prompt(plan, plan.empty, upcast_parts=upcast_parts)[0].timeline
        negative = self._encode_negative(plan, plan.empty, upcast_parts)
        return pad_contexts(slots, [positive] * len(plan.weights) + [negative] * 2)

    def _weights_key(self, plan: RunPlan) -> list[object]:
        """Return the cache key of the text encoders' weights: which they are, and the LoRAs of this plan."""
        if not self._weights.matches(*self.text_encoders):
            self._weights, self._version = Snapshot(*self.text_encoders), self._version + 1
        on_text = [
            (adapter, scale)
            for adapter, scale in plan.scaled_adapters
            if any(not layer.startswith("unet.") for layer in adapter.changes)
        ]
        return [self._version, *((adapter.digest, scale.text, scale.blocks) for adapter, scale in on_text)]


def _distinct_rows(plans: Sequence[RunPlan]) -> Sequence[RunPlan]:
    """Return the plans, or only the first one if all have the same prompts."""
    words = {(plan.request.prompt, plan.request.negative_prompt) for plan in plans}
    return plans[:1] if len(words) == 1 else plans


def _negative(plan: RunPlan) -> PromptPlan | None:
    """Return the negative prompt; None stands for a context of zeros."""
    return None if plan.request.negative_prompt is None else plan.negative


def _time_ids(plan: RunPlan, negative: bool) -> Tensor | None:
    """Return SDXL's time ids (1, 6): original size, crop and target size; for its refiner (1, 5), with a score."""
    request = plan.request
    if not (request.original_size and request.crop and request.target_size):
        return None
    last: tuple[float | None, ...] = request.target_size
    if plan.model.has_aesthetic_score:
        last = (request.negative_aesthetic_score if negative else request.aesthetic_score,)
    return torch.tensor([[*request.original_size, *request.crop, *last]], dtype=torch.float32)


def _encode_finite(conditioner: Conditioner, prompt: PromptPlan) -> list[EncodedPart]:
    """Encode a prompt, in float32 if the encoders' own dtype overflows."""

    def encode(encoders: torch.nn.ModuleList) -> list[EncodedPart]:
        with onload(encoders):
            return replace(conditioner, encoders=list(encoders)).encode(prompt)  # type: ignore[arg-type]

    def tensors(parts: list[EncodedPart]) -> list[Tensor]:
        conditions: list[Condition] = [condition for part in parts for _, condition in part.timeline]
        return [tensor for c in conditions for tensor in (c.context, c.pooled) if tensor is not None]

    upcast_parts: list[str] = []
    encoders = torch.nn.ModuleList(conditioner.encoders)
    encoded = with_fp32_fallback("text_encoder", encoders, encode, tensors, upcast_parts)
    return [replace(part, float32=True) for part in encoded] if upcast_parts else encoded
