"""Encodes prompts as Conditions, weighting the text encoders' output as each dialect does.

    z       hidden states of one chunk, (T, D); the chunks of a longer text are concatenated along the tokens
    w       the weight of each token; 1 for BOS, EOS and padding
    e       the hidden states of the empty prompt

    a1111   z w mean(z) / mean(z w), with means over this chunk of all variants that the prompt has during the run
            (modules/sd_emphasis.py). Emphasis "no_norm" omits the means, "ignore" the weights.
    comfy   e + w (z - e)  (comfy/sd1_clip.py)
    compel  the same, but a fragment with w < 1 is averaged with the text in which it is hidden from all others, with
            weights 1 and tan((1 - w) pi / 2); `.and()` and `.blend()` combine texts  (Compel 2.4)
    plain   z

If all weights are 1, each of them is exactly z. SDXL's pooled vector is that of the first chunk, at its first EOS; for
Compel it is that of the prompt as it was typed.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mezzotint import prompt
from mezzotint.conditioning.chunks import Chunk, split_into_chunks
from mezzotint.errors import RequestError
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition
from mezzotint.prompt import Part, PromptPlan, Span, Variant
from mezzotint.request import Request

MIN_COMPEL_WEIGHT = 1e-5  # Compel's lower bound of a weight; the tangent diverges at 0

Timeline = Sequence[tuple[int, Condition]]
ChunksByEncoder = list[list[Chunk]]  # a text's chunks for each encoder, the same number for all
WeightFunction = Callable[[int, Tensor, Tensor], Tensor]  # (encoder, z (B, T, D), w (B, T, 1)) -> (B, T, D)


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """One part of a prompt during the run; a prompt without AND has one part.

    Attributes:
        weight: The weight of the part (AND).
        timeline: (last step, Condition of batch size 1 in float32), in order; steps count from 0. A repeated text is
            the same object.
        float32: Whether the text encoder had to run in float32 (run/nan_guard.py).
    """

    weight: float
    timeline: Timeline
    float32: bool = False

    def copy(self) -> EncodedPart:
        """Return a copy with memory of its own."""
        own = {
            c: Condition(c.context.clone(), None if c.pooled is None else c.pooled.clone()) for _, c in self.timeline
        }
        return EncodedPart(self.weight, [(until, own[condition]) for until, condition in self.timeline], self.float32)


@dataclass(frozen=True, eq=False)
class Conditioner:
    """Encodes the plan of a prompt with one or two text encoders.

    SD 1 and 2 use the last layer but `clip_skip`, normalized, and no pooled vector. SDXL uses the penultimate layer of
    both encoders, not normalized, concatenated along D, and the pooled vector of the second. Its refiner has the second
    alone.

    Attributes:
        tokenizers: One tokenizer for each encoder.
        encoders: The text encoders.
        clip_skip: Number of last layers to skip.
        emphasis: "original", "no_norm" or "ignore", for a1111.
        embeddings: For each trigger, the vectors (n, width) for each encoder.
        is_sdxl: Whether one encoder is that of SDXL's refiner.
    """

    tokenizers: Sequence[Tokenizer]
    encoders: Sequence[CLIPTextModel]
    clip_skip: int = 0
    emphasis: str = "original"
    embeddings: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    is_sdxl: bool = False

    def shape(self, plan: PromptPlan) -> tuple[tuple[float, ...], int]:
        """Return the weight of each part and the number of tokens of an encoded plan, without encoding it."""
        counts = []
        for variant in (variant for part in plan.parts for variant in _texts(part).values()):
            each = [len(self._split(clause.spans, plan.syntax)[0]) for clause in variant.clauses]
            counts.append(sum(each) if variant.join == "concat" else max(each))
        return tuple(part.weight for part in plan.parts), max(counts) * self.tokenizers[0].max_length

    def encode(self, plan: PromptPlan) -> list[EncodedPart]:
        """Encode the parts of a prompt, all as long as the longest; the last vector is repeated, as in A1111."""
        parts = [self._encode_part(plan, part) for part in plan.parts]
        longest = max(c.context.shape[1] for texts in parts for c in texts.values())
        encoded = []
        for part, texts in zip(plan.parts, parts, strict=True):
            texts = {text: extend(condition, longest) for text, condition in texts.items()}
            encoded.append(EncodedPart(part.weight, [(v.until, texts[v.text]) for v in part.variants]))
        return encoded

    def key(self, plan: PromptPlan) -> tuple[Hashable, ...]:
        """Return a key of everything that `encode` depends on, except for the embeddings and the encoders."""
        parts = tuple((part.weight, *((v.until, v.text) for v in part.variants)) for part in plan.parts)
        return plan.syntax, plan.source, parts, self.clip_skip, self.emphasis

    def _encode_part(self, plan: PromptPlan, part: Part) -> dict[str, Condition]:
        """Encode each text of a part."""
        if plan.syntax == "compel":
            return {text: self._encode_compel(plan, variant) for text, variant in _texts(part).items()}
        texts = {text: self._split(variant.spans, plan.syntax) for text, variant in _texts(part).items()}
        counts = Counter(variant.text for variant in part.variants)  # A1111 encodes a text each time that it occurs
        shares = torch.tensor([counts[text] for text in texts], dtype=torch.float32)

        def a1111(_: int, z: Tensor, w: Tensor) -> Tensor:
            weighted = z * w
            if self.emphasis == "no_norm":
                return weighted
            before, after, size = (t.mean((1, 2)) @ shares.to(t.device) for t in (z, weighted, weighted.abs()))
            # the mean after an untrained layer norm is 0 and cannot be restored
            return weighted * torch.where(after.abs() > 1e-6 * size, before / after, 1.0)

        apply_weights = {"a1111": a1111, "comfy": self._weight_from_empty}.get(plan.syntax)
        if plan.syntax == "a1111" and self.emphasis == "ignore":
            apply_weights = None
        contexts, pooled = self._encode_texts(list(texts.values()), apply_weights)
        context = torch.cat(contexts, dim=-1)  # (texts, tokens, D)
        rows = range(len(texts))
        return {
            text: Condition(context[k : k + 1], None if pooled is None else pooled[k : k + 1])
            for k, text in zip(rows, texts, strict=True)
        }

    def _encode_compel(self, plan: PromptPlan, variant: Variant) -> Condition:
        """Encode a variant as Compel does."""
        texts = [
            self._encode_compel_text(clause.spans) for clause in variant.clauses
        ]  # for each, each encoder's (1, T, D)
        shares = [clause.weight for clause in variant.clauses]
        longest = max(text[0].shape[1] for text in texts)
        if variant.join == "blend" and not sum(shares):
            raise RequestError("the weights of .blend() sum to 0; change them, or add no_normalize")
        contexts = []
        for k in range(len(self.encoders)):
            parts = [text[k] for text in texts]
            empty = self._empty_states[k]
            if variant.join == "concat":
                pads = [empty.repeat(1, part.shape[1] // empty.shape[1], 1) for part in parts]
                parts = [
                    part if share == 1.0 else pad + share * (part - pad)
                    for part, pad, share in zip(parts, pads, shares, strict=True)
                ]
                contexts.append(torch.cat(parts, dim=1))
            else:
                stacked = torch.cat([_pad(part, empty, longest) for part in parts])  # (texts, T, D)
                weights = torch.tensor(shares, device=stacked.device)[:, None, None]
                weights = weights / weights.sum() if variant.join == "blend" else weights
                contexts.append((stacked * weights).sum(0, keepdim=True))
        pooled = None
        if self._pools:
            typed = prompt.plan(plan.source, "plain").parts[0].variants[0].spans
            pooled = self._encode_chunk(len(self.encoders) - 1, self._split(typed, "plain")[-1][0])[1]
        return Condition(torch.cat(contexts, dim=-1), pooled)

    def _encode_compel_text(self, spans: Sequence[Span]) -> list[Tensor]:
        """Encode one text as Compel does, (1, T, D) for each encoder."""
        chunks_by_encoder = self._split(spans, "compel")
        whole, _ = self._encode_texts([chunks_by_encoder], self._weight_from_empty)
        mixed, total = [z.clone() for z in whole], 1.0
        chunk_indices: dict[int, list[int]] = {}  # span -> the chunks that it is in
        for chunks in chunks_by_encoder:
            for i, chunk in enumerate(chunks):
                for token in chunk:
                    chunk_indices.setdefault(token.span, []).append(i)
        window, own = self.tokenizers[0].max_length, [0.0] * len(chunks_by_encoder[0])
        for number in (number for number, span in enumerate(spans) if span.weight < 1.0 and number in chunk_indices):
            first, end = min(chunk_indices[number]), max(chunk_indices[number]) + 1
            share = math.tan((1.0 - max(spans[number].weight, MIN_COMPEL_WEIGHT)) * math.pi / 2)
            without, _ = self._encode_texts(
                [[chunks[first:end] for chunks in chunks_by_encoder]], self._weight_from_empty, hidden_span=number
            )
            for z, other in zip(mixed, without, strict=True):
                z[:, first * window : end * window] += share * other
            own[first:end] = [sum_ + share for sum_ in own[first:end]]
            total += share
        for i, sum_ in enumerate(own):  # in the other chunks, hiding the span changes nothing
            for z, same in zip(mixed, whole, strict=True):
                z[:, i * window : (i + 1) * window] += (total - 1.0 - sum_) * same[:, i * window : (i + 1) * window]
        return [z / total for z in mixed]

    def _weight_from_empty(self, encoder: int, z: Tensor, w: Tensor) -> Tensor:
        """Interpolate from the empty prompt by the weights, as ComfyUI and Compel do."""
        empty = self._empty_states[encoder]
        return torch.where(w == 1.0, z, empty + w * (z - empty))

    @property
    def _pools(self) -> bool:
        """Whether the encoders are used as in SDXL."""
        return self.is_sdxl or len(self.encoders) > 1

    @cached_property
    def _empty_states(self) -> list[Tensor]:
        """Hidden states of the empty prompt for each encoder, (1, T, D)."""
        return [self._encode_chunk(k, ())[0] for k in range(len(self.encoders))]

    def _split(self, spans: Sequence[Span], syntax: str) -> ChunksByEncoder:
        """Split a text into chunks for each encoder."""
        chunks_by_encoder = [
            split_into_chunks(spans, syntax, tokenizer, self.embeddings, k)
            for k, tokenizer in enumerate(self.tokenizers)
        ]
        count = max(len(chunks) for chunks in chunks_by_encoder)  # SDXL's tokenizers split "!!" differently
        return [chunks + [()] * (count - len(chunks)) for chunks in chunks_by_encoder]

    def _encode_texts(
        self, texts: Sequence[ChunksByEncoder], apply_weights: WeightFunction | None, hidden_span: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Encode and weight a batch of texts; missing chunks are empty.

        Args:
            texts: The texts.
            apply_weights: Weights the hidden states; None leaves them unchanged.
            hidden_span: Number of a span that no token attends to.

        Returns:
            Hidden states (B, tokens, D) for each encoder, and the pooled vectors (B, P).
        """
        contexts, pooled = [], None
        for k, tokenizer in enumerate(self.tokenizers):
            columns = []
            for i in range(max(len(text[k]) for text in texts)):
                rows = [text[k][i] if i < len(text[k]) else () for text in texts]
                mask = None
                if hidden_span is not None:
                    mask = _attention_mask(texts[0][k], i, hidden_span, tokenizer.max_length)
                # one by one, so that the bits of a text do not depend on the others in the batch
                states = [self._encode_chunk(k, row, mask) for row in rows]
                z = torch.cat([hidden for hidden, _ in states])  # (B, T, D)
                w = torch.ones(z.shape[:2])
                for row, chunk in zip(w, rows, strict=True):
                    row[1 : 1 + len(chunk)] = torch.tensor([token.weight for token in chunk])
                if apply_weights is not None and (w != 1.0).any():
                    z = apply_weights(k, z, w.to(z.device)[..., None])
                columns.append(z)
                if i == 0 and self._pools:  # the last encoder's
                    pooled = torch.cat([vector for _, vector in states])
            contexts.append(torch.cat(columns, dim=1))
        return contexts, pooled

    def _encode_chunk(self, encoder: int, chunk: Chunk, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the hidden states (1, T, D) and the pooled vector (1, P) of a chunk, in float32."""
        tokenizer, model = self.tokenizers[encoder], self.encoders[encoder]
        table = model.text_model.embeddings.token_embedding
        device = model.text_model.final_layer_norm.weight.device
        ids = torch.tensor([tokenizer.window([token.id for token in chunk])], device=device)
        inputs = table(ids) if any(token.vector for token in chunk) else None
        for position, token in enumerate(chunk, 1):
            if inputs is not None and token.vector:
                name, row = token.vector
                inputs[0, position] = self.embeddings[name][encoder][row].to(inputs)
        attention_mask = None if attention_mask is None else attention_mask.to(ids.device)
        hidden, pooled = model(
            ids,
            skip=self.clip_skip + self._pools,
            final_norm=not self._pools,
            inputs_embeds=inputs,
            attention_mask=attention_mask,
        )
        return hidden.float(), pooled.float()


def parse_prompt(
    request: Request, text: str, steps: int, *, negative: bool, base_steps: int | None = None
) -> PromptPlan:
    """Parse a prompt of this request.

    Args:
        request: The request, which determines the syntax.
        text: The prompt, or the negative prompt.
        steps: Number of steps of the run.
        negative: Whether it is the negative prompt.
        base_steps: Number of steps of the first pass, for a second pass.

    Raises:
        RequestError: If the prompt is not empty, but has no words to encode.
    """
    plan = prompt.plan(text, request.prompt_syntax or "a1111", steps, negative=negative, base_steps=base_steps)
    clauses = [clause for part in plan.parts for variant in part.variants for clause in variant.clauses]
    has_words = any(span.text.strip() for clause in clauses for span in clause.spans)
    if text.strip() and not (has_words or plan.networks or negative):
        raise RequestError(f"the prompt {text[:60]!r} has no words to encode; it must have words, or be empty")
    return plan


class EncodingCache:
    """The most recently used encoded prompts, up to `limit` bytes. It is thread-safe."""

    def __init__(self, limit: int = 64_000_000) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._entries: OrderedDict[Hashable, list[EncodedPart]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], list[EncodedPart]]) -> list[EncodedPart]:
        """Return the entry of a key; if there is none, make it, once even if several threads ask at the same time."""
        with self._lock:
            if key not in self._entries:
                self._entries[key] = make()
            self._entries.move_to_end(key)
            found = self._entries[key]
            while sum(map(_bytes, self._entries.values())) > self._limit:
                self._entries.popitem(last=False)
            return found


def batch_timelines(rows: Sequence[Timeline], time_ids: Tensor | None = None) -> Timeline:
    """Combine the timelines of several pictures into that of their batch.

    Args:
        rows: One timeline for each picture.
        time_ids: SDXL's micro-conditioning of each picture, (1, 6).
    """
    batches: dict[tuple[Condition, ...], Condition] = {}
    batched = []
    for until in sorted({until for row in rows for until, _ in row}):
        current = tuple(next((c for end, c in row if until <= end), row[-1][1]) for row in rows)
        if current not in batches:
            batch = Condition.cat(current)
            ids = None if time_ids is None else time_ids.repeat(len(rows), 1)
            batches[current] = Condition(batch.context, batch.pooled, ids)
        batched.append((until, batches[current]))
    return batched


def pad_contexts(slots: Sequence[Sequence[Timeline]], empties: Sequence[Timeline]) -> list[list[Timeline]]:
    """Pad all contexts to the same length with their slot's empty prompt, as Compel does.

    Args:
        slots: For each slot (conditions, unconditional, negatives), the timelines of its rows.
        empties: The timeline of the empty prompt for each slot.
    """
    longest = max(c.context.shape[1] for slot in slots for row in slot for _, c in row)
    return [
        [
            [(until, Condition(_pad(c.context, empty[0][1].context, longest), c.pooled)) for until, c in row]
            for row in slot
        ]
        for slot, empty in zip(slots, empties, strict=False)
    ]


def _pad(context: Tensor, empty: Tensor, length: int) -> Tensor:
    """Repeat the empty prompt at the end of a context up to a length."""
    missing = (length - context.shape[1]) // empty.shape[1]
    return torch.cat([context, empty.repeat(1, missing, 1)], dim=1) if missing else context


def zeros_like(condition: Condition) -> Condition:
    """Return a condition of zeros, SDXL's missing negative prompt (`force_zeros_for_empty_prompt`)."""
    pooled = None if condition.pooled is None else torch.zeros_like(condition.pooled)
    return Condition(torch.zeros_like(condition.context), pooled, condition.time_ids)


def _texts(part: Part) -> dict[str, Variant]:
    """Return the distinct texts of a part."""
    return {variant.text: variant for variant in part.variants}


def extend(condition: Condition, length: int) -> Condition:
    """Repeat the last vector of a condition up to a length."""
    context = condition.context
    missing = length - context.shape[1]
    if not missing:
        return condition
    return Condition(torch.cat([context, context[:, -1:].expand(-1, missing, -1)], dim=1), condition.pooled)


def _attention_mask(chunks: Sequence[Chunk], i: int, hidden_span: int, window: int) -> Tensor:
    """Return a mask (1, window), False from the first to the last token of the hidden span in chunk i of a text.

    If the span continues in the next chunk, EOS and padding in between are hidden too, except for the first and the
    last position of each window, as in Compel.
    """
    positions = [
        k * window + position
        for k, chunk in enumerate(chunks)
        for position, token in enumerate(chunk, 1)
        if token.span == hidden_span
    ]
    attention_mask = torch.ones(len(chunks) * window, dtype=torch.bool)
    if positions:
        attention_mask[positions[0] : positions[-1] + 1] = False
    attention_mask[::window] = attention_mask[window - 1 :: window] = True
    return attention_mask[None, i * window : (i + 1) * window]


def _bytes(parts: Sequence[EncodedPart]) -> int:
    """Return the size of encoded parts."""
    held = {condition for part in parts for _, condition in part.timeline}
    return sum(c.context.nbytes + (0 if c.pooled is None else c.pooled.nbytes) for c in held)
