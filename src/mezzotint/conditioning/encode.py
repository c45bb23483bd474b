"""Words become Conditions: each dialect's own arithmetic on what the text encoders make of a prompt's chunks.

    z       hidden states of one chunk (T, D); those of a longer text follow one another on the token axis
    w       the weight of each token; 1 for BOS, EOS and padding
    e       the empty prompt's hidden states

    a1111   z w, times mean(z) / mean(z w): the means over this chunk of all variants that the prompt has in the course
            of the run (modules/sd_emphasis.py). Emphasis "no_norm" leaves the means out, "ignore" the weights.
    comfy   e + w (z - e)  (comfy/sd1_clip.py)
    compel  the same; where a fragment has w < 1, this and the same with that fragment hidden from all others are
            averaged with the weights 1 and tan((1 - w) pi / 2); `.and()` and `.blend()` join texts  (Compel 2.4)
    plain   z

Where all weights are 1 each of them is exactly z. The pooled vector of SDXL is the first chunk's, at its first EOS;
Compel's is that of the prompt as it was typed.
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
from mezzotint.conditioning.chunks import Chunk, chunked
from mezzotint.errors import RequestError
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition
from mezzotint.prompt import Part, Plan, Span, Variant
from mezzotint.request import Request

LEAST = 1e-5  # Compel's lower bound of a weight, below which its tangent grows without end

Timeline = Sequence[tuple[int, Condition]]
Laid = list[list[Chunk]]  # a text: for each encoder its chunks, as many for one as for the other
Weigh = Callable[[int, Tensor, Tensor], Tensor]  # (encoder, z (B, T, D), w (B, T, 1)) -> (B, T, D)


@dataclass(frozen=True, eq=False)
class Encoded:
    """One part of a prompt through the run; a prompt without AND is one part.

    weight: AND's. timeline: in order (last step that it holds for, Condition of batch 1, float32); steps count from 0.
    A text that comes back is the same object. float32: the text encoder had to run in it (nan_guard.py).
    """

    weight: float
    timeline: Timeline
    float32: bool = False

    def copy(self) -> Encoded:
        """The same in memory of its own."""
        own = {
            c: Condition(c.context.clone(), None if c.pooled is None else c.pooled.clone()) for _, c in self.timeline
        }
        return Encoded(self.weight, [(until, own[condition]) for until, condition in self.timeline], self.float32)


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads prompts: plan -> Conditions.

    tokenizers and encoders go together: one (SD 1, 2: the last layer but `clip_skip`, normed, and no pooled vector) or
    two (SDXL: of both the layer before, not normed, joined along D, and the second one's pooled vector). emphasis:
    "original", "no_norm" or "ignore", for a1111. embeddings: trigger -> for each encoder its vectors (n, width).
    """

    tokenizers: Sequence[Tokenizer]
    encoders: Sequence[CLIPTextModel]
    clip_skip: int = 0
    emphasis: str = "original"
    embeddings: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def shape(self, plan: Plan) -> tuple[tuple[float, ...], int]:
        """(weight of each part, number of tokens) of what `encode` makes of the plan, without encoding anything."""
        counts = []
        for variant in (variant for part in plan.parts for variant in _texts(part).values()):
            each = [len(self._laid(clause.spans, plan.syntax)[0]) for clause in variant.clauses]
            counts.append(sum(each) if variant.join == "concat" else max(each))
        return tuple(part.weight for part in plan.parts), max(counts) * self.tokenizers[0].max_length

    def encode(self, plan: Plan) -> list[Encoded]:
        """The parts of a prompt, each Condition as long as the longest: its last vector is repeated, as in A1111."""
        parts = [self._part(plan, part) for part in plan.parts]
        longest = max(c.context.shape[1] for texts in parts for c in texts.values())
        encoded = []
        for part, texts in zip(plan.parts, parts, strict=True):
            texts = {text: _extended(condition, longest) for text, condition in texts.items()}
            encoded.append(Encoded(part.weight, [(v.until, texts[v.text]) for v in part.variants]))
        return encoded

    def key(self, plan: Plan) -> tuple[Hashable, ...]:
        """All that `encode` depends on, but the embeddings."""
        parameters = [p for encoder in self.encoders for p in encoder.parameters()]
        state = hash(tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters))  # sees training
        parts = tuple((part.weight, *((v.until, v.text) for v in part.variants)) for part in plan.parts)
        return plan.syntax, plan.source, parts, self.clip_skip, self.emphasis, state

    def _part(self, plan: Plan, part: Part) -> dict[str, Condition]:
        """The texts of a part, encoded."""
        if plan.syntax == "compel":
            return {text: self._compel(plan, variant) for text, variant in _texts(part).items()}
        texts = {text: self._laid(variant.spans, plan.syntax) for text, variant in _texts(part).items()}
        often = Counter(variant.text for variant in part.variants)  # A1111 encodes a text each time that it is named
        shares = torch.tensor([often[text] for text in texts], dtype=torch.float32)

        def a1111(_: int, z: Tensor, w: Tensor) -> Tensor:
            weighted = z * w
            if self.emphasis == "no_norm":
                return weighted
            before, after, size = (t.mean((1, 2)) @ shares.to(t.device) for t in (z, weighted, weighted.abs()))
            # an untrained layer norm's mean is 0, and nothing can be restored by it
            return weighted * torch.where(after.abs() > 1e-6 * size, before / after, 1.0)

        weigh = {"a1111": a1111, "comfy": self._from_empty}.get(plan.syntax)
        if plan.syntax == "a1111" and self.emphasis == "ignore":
            weigh = None
        contexts, pooled = self._hidden(list(texts.values()), weigh)
        context = torch.cat(contexts, dim=-1)  # (texts, tokens, D)
        rows = range(len(texts))
        return {
            text: Condition(context[k : k + 1], None if pooled is None else pooled[k : k + 1])
            for k, text in zip(rows, texts, strict=True)
        }

    def _compel(self, plan: Plan, variant: Variant) -> Condition:
        texts = [self._compel_text(clause.spans) for clause in variant.clauses]  # for each, each encoder's (1, T, D)
        shares = [clause.weight for clause in variant.clauses]
        longest = max(text[0].shape[1] for text in texts)
        if variant.join == "blend" and not sum(shares):
            raise RequestError("the weights of .blend() sum to 0; give weights that do not, or no_normalize")
        contexts = []
        for k in range(len(self.encoders)):
            parts = [text[k] for text in texts]
            empty = self._empty[k]
            if variant.join == "concat":
                pads = [empty.repeat(1, part.shape[1] // empty.shape[1], 1) for part in parts]
                parts = [
                    part if share == 1.0 else pad + share * (part - pad)
                    for part, pad, share in zip(parts, pads, shares, strict=True)
                ]
                contexts.append(torch.cat(parts, dim=1))
            else:
                stacked = torch.cat([_padded(part, empty, longest) for part in parts])  # (texts, T, D)
                weights = torch.tensor(shares, device=stacked.device)[:, None, None]
                weights = weights / weights.sum() if variant.join == "blend" else weights
                contexts.append((stacked * weights).sum(0, keepdim=True))
        pooled = None
        if len(self.encoders) > 1:
            typed = prompt.plan(plan.source, "plain").parts[0].variants[0].spans
            pooled = self._states(1, self._laid(typed, "plain")[1][0])[1]
        return Condition(torch.cat(contexts, dim=-1), pooled)

    def _compel_text(self, spans: Sequence[Span]) -> list[Tensor]:
        """Each encoder's (1, T, D) of one text: where fragments weigh less than 1, without them as well."""
        laid = self._laid(spans, "compel")
        whole, _ = self._hidden([laid], self._from_empty)
        mixed, total = [z.clone() for z in whole], 1.0
        spoken: dict[int, list[int]] = {}  # span -> the chunks that it is in
        for chunks in laid:
            for i, chunk in enumerate(chunks):
                for token in chunk:
                    spoken.setdefault(token.span, []).append(i)
        window, own = self.tokenizers[0].max_length, [0.0] * len(laid[0])
        for number in (number for number, span in enumerate(spans) if span.weight < 1.0 and number in spoken):
            first, end = min(spoken[number]), max(spoken[number]) + 1
            share = math.tan((1.0 - max(spans[number].weight, LEAST)) * math.pi / 2)
            without, _ = self._hidden([[chunks[first:end] for chunks in laid]], self._from_empty, hide=number)
            for z, other in zip(mixed, without, strict=True):
                z[:, first * window : end * window] += share * other
            own[first:end] = [sum_ + share for sum_ in own[first:end]]
            total += share
        for i, sum_ in enumerate(own):  # in all other chunks hiding it changes nothing
            for z, same in zip(mixed, whole, strict=True):
                z[:, i * window : (i + 1) * window] += (total - 1.0 - sum_) * same[:, i * window : (i + 1) * window]
        joined = [z / total for z in mixed]
        for z, chunks, tokenizer in zip(joined, laid, self.tokenizers, strict=True):
            for k, chunk in enumerate(chunks):  # each later chunk ends as the first one does
                z[:, k * tokenizer.max_length + 1 + len(chunk)] = z[:, 1 + len(chunks[0])]
        return joined

    def _from_empty(self, encoder: int, z: Tensor, w: Tensor) -> Tensor:
        """ComfyUI's and Compel's: the way from the empty prompt to this one, w times as far."""
        empty = self._empty[encoder]
        return torch.where(w == 1.0, z, empty + w * (z - empty))

    @cached_property
    def _empty(self) -> list[Tensor]:
        """Each encoder's hidden states of the empty prompt, (1, T, D)."""
        return [self._states(k, ())[0] for k in range(len(self.encoders))]

    def _laid(self, spans: Sequence[Span], syntax: str) -> Laid:
        laid = [chunked(spans, syntax, tokenizer, self.embeddings, k) for k, tokenizer in enumerate(self.tokenizers)]
        count = max(len(chunks) for chunks in laid)  # SDXL's tokenizers split "!!" differently
        return [chunks + [()] * (count - len(chunks)) for chunks in laid]

    def _hidden(
        self, texts: Sequence[Laid], weigh: Weigh | None, hide: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Each encoder's hidden states (B, tokens, D) of a batch of texts, weighed; and the pooled vectors (B, P).

        Texts with fewer chunks than others get empty ones. `hide`: number of the span that no token may look at.
        """
        contexts, pooled = [], None
        for k, tokenizer in enumerate(self.tokenizers):
            columns = []
            for i in range(max(len(text[k]) for text in texts)):
                rows = [text[k][i] if i < len(text[k]) else () for text in texts]
                seen = None if hide is None else _seen(texts[0][k], i, hide, tokenizer.max_length)
                states = [self._states(k, row, seen) for row in rows]  # one by one: no text's bits hang on its company
                z = torch.cat([hidden for hidden, _ in states])  # (B, T, D)
                w = torch.ones(z.shape[:2])
                for row, chunk in zip(w, rows, strict=True):
                    row[1 : 1 + len(chunk)] = torch.tensor([token.weight for token in chunk])
                columns.append(z if weigh is None or (w == 1.0).all() else weigh(k, z, w.to(z.device)[..., None]))
                pooled = torch.cat([vector for _, vector in states]) if i == 0 and k > 0 else pooled
            contexts.append(torch.cat(columns, dim=1))
        return contexts, pooled

    def _states(self, encoder: int, chunk: Chunk, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states (1, T, D) and pooled vector (1, P) of a chunk, float32."""
        tokenizer, model = self.tokenizers[encoder], self.encoders[encoder]
        table = model.text_model.embeddings.token_embedding
        device = model.text_model.final_layer_norm.weight.device
        ids = torch.tensor([tokenizer.window([token.id for token in chunk])], device=device)
        inputs = table(ids) if any(token.vector for token in chunk) else None
        for place, token in enumerate(chunk, 1):
            if inputs is not None and token.vector:
                name, row = token.vector
                inputs[0, place] = self.embeddings[name][encoder][row].to(inputs)
        two = len(self.encoders) > 1
        seen = None if seen is None else seen.to(ids.device)
        hidden, pooled = model(ids, skip=self.clip_skip + two, normed=not two, inputs_embeds=inputs, seen=seen)
        return hidden.float(), pooled.float()


def parse_prompt(request: Request, text: str, steps: int, *, negative: bool, base_steps: int | None = None) -> Plan:
    """Parse a prompt of this request.

    Args:
        request: Says the prompt's syntax.
        text: The prompt or the negative prompt.
        steps: Steps of the run, by which the prompt may change.
        negative: Whether it is the negative prompt.
        base_steps: Of a second pass, the steps of the first.

    Raises:
        RequestError: If the text is wrong, or is all signs and no words.
    """
    plan = prompt.plan(text, request.prompt_syntax or "a1111", steps, negative=negative, base_steps=base_steps)
    clauses = [clause for part in plan.parts for variant in part.variants for clause in variant.clauses]
    has_words = any(span.text.strip() for clause in clauses for span in clause.spans)
    if text.strip() and not (has_words or plan.networks or negative):
        raise RequestError(f"the prompt {text[:60]!r} resolves to nothing; it must have words, or be empty")
    return plan


class Cache:
    """Encoded prompts, the last used ones, of which it holds at most `limit` bytes. Threads may share it."""

    def __init__(self, limit: int = 64_000_000) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._held: OrderedDict[Hashable, list[Encoded]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], list[Encoded]]) -> list[Encoded]:
        """What is held under the key; else what `make` makes, once even where several threads ask at once."""
        with self._lock:
            if key not in self._held:
                self._held[key] = make()
            self._held.move_to_end(key)
            found = self._held[key]
            while sum(map(_bytes, self._held.values())) > self._limit:
                self._held.popitem(last=False)
            return found


def together(rows: Sequence[Timeline], time_ids: Tensor | None = None) -> Timeline:
    """The timelines of several pictures as that of their batch; time_ids (1, 6) are those of each."""
    made: dict[tuple[Condition, ...], Condition] = {}
    batched = []
    for until in sorted({until for row in rows for until, _ in row}):
        now = tuple(next((c for end, c in row if until <= end), row[-1][1]) for row in rows)
        if now not in made:
            batch = Condition.cat(now)
            ids = None if time_ids is None else time_ids.repeat(len(rows), 1)
            made[now] = Condition(batch.context, batch.pooled, ids)
        batched.append((until, made[now]))
    return batched


def lengthened(slots: Sequence[Sequence[Timeline]], empties: Sequence[Timeline]) -> list[list[Timeline]]:
    """The rows of all slots made equally long with their slot's empty prompt, as Compel does for prompts that meet."""
    longest = max(c.context.shape[1] for slot in slots for row in slot for _, c in row)
    return [
        [
            [(until, Condition(_padded(c.context, empty[0][1].context, longest), c.pooled)) for until, c in row]
            for row in slot
        ]
        for slot, empty in zip(slots, empties, strict=False)
    ]


def _padded(context: Tensor, empty: Tensor, length: int) -> Tensor:
    missing = (length - context.shape[1]) // empty.shape[1]
    return torch.cat([context, empty.repeat(1, missing, 1)], dim=1) if missing else context


def zeros_like(condition: Condition) -> Condition:
    """What SDXL means by no negative prompt (`force_zeros_for_empty_prompt`)."""
    pooled = None if condition.pooled is None else torch.zeros_like(condition.pooled)
    return Condition(torch.zeros_like(condition.context), pooled, condition.time_ids)


def _texts(part: Part) -> dict[str, Variant]:
    """The texts of a part, each once."""
    return {variant.text: variant for variant in part.variants}


def _extended(condition: Condition, length: int) -> Condition:
    context = condition.context
    missing = length - context.shape[1]
    if not missing:
        return condition
    return Condition(torch.cat([context, context[:, -1:].expand(-1, missing, -1)], dim=1), condition.pooled)


def _seen(chunks: Sequence[Chunk], i: int, hide: int, window: int) -> Tensor:
    """(1, window), False where chunk i of a text lies between the hidden span's first and last token.

    Where that crosses from one chunk to the next, EOS and padding on the way are hidden too, but for the first and the
    last place of each window, as in Compel.
    """
    places = [
        k * window + place
        for k, chunk in enumerate(chunks)
        for place, token in enumerate(chunk, 1)
        if token.span == hide
    ]
    seen = torch.ones(len(chunks) * window, dtype=torch.bool)
    if places:
        seen[places[0] : places[-1] + 1] = False
    seen[::window] = seen[window - 1 :: window] = True
    return seen[None, i * window : (i + 1) * window]


def _bytes(parts: Sequence[Encoded]) -> int:
    held = {condition for part in parts for _, condition in part.timeline}
    return sum(c.context.nbytes + (0 if c.pooled is None else c.pooled.nbytes) for c in held)
