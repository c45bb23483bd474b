"""What each word did: the cross-attention of a run, recorded while it draws. `page.py` shows what this finds.

    explanation = explain(pipe, Request(prompt="a lemon left of a whale", seed=7))
    explanation.map("lemon")                (H, W) at the picture's size: where the word was looked at
    explanation.maps[picture][layer]        (steps, tokens, h, w): the attention itself

Each cell of a UNet's feature map asks a question q, each token of the prompt offers a key k, and softmax(q kᵀ /
sqrt(d)) says how much of the answer comes from which token. That is what is kept, averaged over the heads. It is
computed beside the run, which goes on with its own attention, whatever computes it: the picture stays the same to the
last bit. Of the batch only the rows under the prompt are kept, not those that guidance adds.
Sources: Hertz et al. 2022, "Prompt-to-Prompt", section 3; Tang et al. 2023, "What the DAAM", section 3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.conditioning.chunks import Embeddings, split_into_chunks
from mezzotint.errors import BudgetError, RequestError
from mezzotint.models.attention import probabilities, recording
from mezzotint.models.blocks import Attention
from mezzotint.models.tokenizer import WORD_END, Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.pipeline import OnStep, Pipeline
from mezzotint.prompt import PromptPlan, Variant
from mezzotint.request import Request, Result

LIMIT = 2**30  # bytes that the maps may take
COARSE = 8  # cells: a grid with a shorter side smears what it shows over the things beside it

Grids = Mapping[Attention, tuple[int, int]]  # (h, w) of the cells of each layer
Places = Sequence[tuple[int, int, int]]  # index of a token, its part of the prompt, its position in the part's context


@dataclass(frozen=True)
class Token:
    """A token that stands for prompt[start:end] in a part of the prompt (AND), from 0.

    text: as in the vocabulary, such as "lemon</w>"; of an embedding its name, and `row` then says which of its vectors.
    """

    text: str
    start: int
    end: int
    part: int = 0
    row: int | None = None


@dataclass(frozen=True)
class Word:
    """A word, as the tokenizer parts them, or an embedding: prompt[start:end], the tokens of these indices."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Explanation:
    """A picture, and where the network attended to each word of its prompt.

    Attributes:
        result: What the run gave, as from `Pipeline.generate`.
        tokens: The tokens of the prompts.
        words: The words of the prompts, each of one or more tokens.
        layers: Names of the UNet's cross-attentions, in the order in which they run.
        steps: For each picture the steps that were kept, from 0.
        maps: For each picture and layer a tensor (steps, tokens, h, w), float32: the share of its attention that a cell
            gives each token, averaged over the heads and the calls of a step; NaN in steps of which the token is not
            a part. The shares of a cell sum to 1 with those of BOS, EOS and padding, which are not kept.
    """

    result: Result
    tokens: tuple[Token, ...]
    words: tuple[Word, ...]
    layers: tuple[str, ...]
    steps: tuple[tuple[int, ...], ...]
    maps: tuple[tuple[Tensor, ...], ...]

    def map(
        self,
        word: str | int | Word,
        *,
        picture: int = 0,
        steps: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        relative: bool = True,
    ) -> Tensor:
        """(H, W) float32 at the picture's size: how much a word was looked at, and where; 0 and above.

        word: one or several as typed (all places where they stand), a Word, or a token's index. steps: of the run,
        from 0; else the later half of those that have the word, when each thing has found its place. layers: indices;
        else all whose grid has 8 cells and more along both sides, or all, if there are none. A layer is averaged over
        the steps and over the word's tokens and enlarged bilinearly; the layers are averaged.

        relative: how much more than the other tokens. Each token's map is divided by its own mean over the picture,
        and the mean of the other tokens' is subtracted; in the end what is below 0 becomes 0. Else the plain shares of
        attention, of which most lies on BOS, and much of the rest wherever any object is.

        Raises RequestError for a word, a step or a layer that is not there.
        """
        tokens, kept, maps = self._tokens(word), self.steps[picture], self.maps[picture]
        there = [step for step, now in zip(kept, maps[0], strict=True) if now[tokens].isfinite().any()]
        wanted = there[len(there) // 2 :] if steps is None else steps
        every = range(len(self.layers))
        fine = [layer for layer in every if min(maps[layer].shape[2:]) >= COARSE]
        chosen = layers if layers is not None else fine or every
        if not wanted or not set(wanted) <= set(there):
            raise RequestError(f"steps is {list(wanted)}; recorded with {word!r} were {', '.join(map(str, there))}")
        if not chosen or not set(chosen) <= set(every):
            raise RequestError(f"layers is {list(chosen)}; it must be some of 0 to {len(self.layers) - 1}")
        rows = [kept.index(step) for step in wanted]
        image = self.result.images[picture]
        total = torch.zeros(image.height, image.width)
        for layer in chosen:
            shares = maps[layer][rows].nanmean(0)  # (tokens, h, w)
            found = _contrast(shares, tokens) if relative else shares[tokens].nanmean(0)
            total += F.interpolate(found[None, None], size=total.shape, mode="bilinear", align_corners=False)[0, 0]
        return total.clamp(min=0.0) / len(chosen)

    def share(self, word: str | int | Word, *, picture: int = 0) -> float:
        """Return a word's share of all attention, 0 to 1, averaged over the picture, its layers and its steps."""
        shares = [layer[:, self._tokens(word)].nanmean((0, 2, 3)).nansum() for layer in self.maps[picture]]
        return float(torch.stack(shares).mean())

    def _tokens(self, word: str | int | Word) -> list[int]:
        """Return the indices of a word's tokens."""
        if isinstance(word, Word):
            return list(word.tokens)
        if isinstance(word, int):
            if not 0 <= word < len(self.tokens):
                raise RequestError(f"token {word} is asked for; the prompt has the tokens 0 to {len(self.tokens) - 1}")
            return [word]
        wanted, texts = word.lower().split(), [w.text.lower() for w in self.words]
        starts = [i for i in range(len(texts)) if wanted and texts[i : i + len(wanted)] == wanted]
        if not starts:
            raise RequestError(f"the prompt has no word {word!r}; it has {', '.join(dict.fromkeys(texts))}")
        return [token for i in starts for w in self.words[i : i + len(wanted)] for token in w.tokens]


def _contrast(shares: Tensor, tokens: Sequence[int]) -> Tensor:
    """(tokens, h, w) -> (h, w): the ones named, each over its own mean, less the same of all others."""
    scaled = shares / shares.mean((1, 2), keepdim=True).clamp(min=1e-12)
    others = [i for i in range(len(shares)) if i not in tokens and shares[i].isfinite().all()]
    return scaled[tokens].nanmean(0) - (scaled[others].mean(0) if others else 1.0)  # alone: the mean of a flat map


def explain(
    pipe: Pipeline,
    request: Request,
    latents: Tensor | None = None,
    *,
    on_step: OnStep | None = None,
    limit: int = LIMIT,
) -> Explanation:
    """Draw a request as `pipe.generate` does, with the same arguments, and record where its words were looked at.

    limit: bytes that the maps may take; they are 4 * pictures * steps * tokens * cells of all layers, and where that is
    more, only every second, third ... step is kept; a pipeline with a budget may leave them less. Raises BudgetError
    where a single step is too much, and RequestError where the prompt has no words.
    """
    plan = pipe.plan(request)
    request, steps = plan.request, len(plan.sigmas) - 1
    tokens, words, places = _read(plan.positive, pipe.tokenizers[0], plan.embeddings)
    if not words:
        raise RequestError(f"prompt is {request.prompt[:60]!r}, which has no words; there is nothing to explain")
    side = pipe.vae.config.downscale
    layers = _layers(pipe.unet_for(plan), ((request.height or 0) // side, (request.width or 0) // side))
    if not layers:
        raise RequestError("this model's UNet has no cross-attention; it looks at no word")
    grids = dict(layers.values())
    step_bytes = 4 * request.count * len(tokens) * sum(h * w for h, w in grids.values())
    spare = pipe.spare_memory(plan)
    if spare is not None:
        limit = min(limit, spare - _scores(pipe, request, grids))
    if step_bytes > limit:
        remedy = "raise the limit" if spare is None else "load the model with more memory"
        raise BudgetError(
            f"the maps of one step take {step_bytes:,} bytes and the limit is {max(limit, 0):,}; draw fewer pictures "
            f"at once, or smaller ones, or {remedy}"
        )
    every = math.ceil(steps / (limit // step_bytes))
    recorder = _Recorder(grids, len(tokens), places, request, every)

    def step_done(done: int, total: int) -> None:
        recorder.step_done()
        if on_step:
            on_step(done, total)

    with recording(recorder):
        result = pipe.generate(request, latents, on_step=step_done, on_image=lambda k, image: recorder.image_done())
    return Explanation(result, tokens, words, tuple(layers), tuple(recorder.steps), tuple(recorder.maps))


def _scores(pipe: Pipeline, request: Request, grids: Grids) -> int:
    """Bytes of the largest layer's shares of attention, of all heads, and of the products that they are made from."""
    cells = max(layer.heads * height * width for layer, (height, width) in grids.items())
    pictures = min(request.batch or 1, request.count)
    return 2 * 4 * 2 * pictures * cells * pipe.text_encoders[0].config.max_position_embeddings


def _read(
    planned: PromptPlan, tokenizer: Tokenizer, embeddings: Embeddings
) -> tuple[tuple[Token, ...], tuple[Word, ...], list[Places]]:
    """Return the tokens of a prompt, the words that they belong to, and the places of the tokens in each step.

    A token that several variants of an edited prompt share is one. With SDXL, the first tokenizer's.
    """
    # of each part and variant: ((token, how many like it stand before it), position)
    laid: list[list[list[tuple[tuple[Token, int], int]]]] = []
    for number, part in enumerate(planned.parts):
        laid.append([])
        for variant in part.variants:
            before: Counter[Token] = Counter()
            laid[-1].append([])
            for token, position in _laid(variant, number, planned.syntax, tokenizer, embeddings):
                laid[-1][-1].append(((token, before[token]), position))
                before[token] += 1
    met = dict.fromkeys(found for part in laid for variant in part for found, _ in variant)
    order = {found: i for i, found in enumerate(sorted(met, key=lambda found: (found[0].part, found[0].start)))}
    tokens = tuple(token for token, _ in order)

    words: list[Word] = []
    first = 0
    for i, (token, after) in enumerate(zip_longest(tokens, tokens[1:]), start=1):
        ends = token.text.endswith(WORD_END) if token.row is None else after is None or after.row in (None, 0)
        if ends or after is None or after.part != token.part:
            start, end = tokens[first].start, token.end
            words.append(Word(planned.source[start:end], start, end, tuple(range(first, i))))
            first = i

    places: list[Places] = []
    made: dict[tuple[int, ...], Places] = {}
    for step in range(planned.steps):
        now = tuple(part.variants.index(part.at(step)) for part in planned.parts)
        if now not in made:
            made[now] = [
                (order[found], number, position)
                for number, variant in enumerate(now)
                for found, position in laid[number][variant]
            ]
        places.append(made[now])
    return tokens, tuple(words), places


def _laid(
    variant: Variant, part: int, syntax: str, tokenizer: Tokenizer, embeddings: Embeddings
) -> Iterator[tuple[Token, int]]:
    """Return the tokens of one text and their positions in the context; the texts of a blend share positions."""
    offset = 0
    for clause in variant.clauses:
        chunks = split_into_chunks(clause.spans, syntax, tokenizer, embeddings)
        for k, chunk in enumerate(chunks):
            for place, token in enumerate(chunk, start=1):
                name, row = token.vector or (tokenizer.token(token.id), None)
                yield Token(name, token.start, token.end, part, row), offset + k * tokenizer.max_length + place
        offset += len(chunks) * tokenizer.max_length if variant.join == "concat" else 0


def _layers(unet: UNet, grid: tuple[int, int]) -> dict[str, tuple[Attention, tuple[int, int]]]:
    """Return the UNet's cross-attentions by name, each with the size (h, w) of its cells for latents of size `grid`."""
    grids = [grid]
    for _ in unet.config.block_out_channels[1:]:
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))  # as Downsample rounds
    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.cross:
            block, place, *_ = name.split(".")
            level = int(place) if block == "down_blocks" else -1 - int(place) if block == "up_blocks" else -1
            found[name] = module, grids[level]
    return found


class _Recorder:
    """Takes every cross-attention of a run: adds up those of a step, and files them by picture."""

    def __init__(self, grids: Grids, tokens: int, places: Sequence[Places], request: Request, every: int) -> None:
        self.grids, self.tokens, self.places, self.every = grids, tokens, places, every
        self.count, self.batch = request.count, request.batch or 1
        self.steps: list[tuple[int, ...]] = []  # of each picture
        self.maps: list[tuple[Tensor, ...]] = []
        self.length = 0  # of the prompt's context, known from the first call
        self._start()

    def _start(self) -> None:
        """Start a batch of `size` pictures."""
        self.size, self.row, self.step = min(self.batch, self.count - len(self.maps)), 0, 0
        self.sums: dict[Attention, tuple[Tensor, int]] = {}  # of this step's calls: shares, and how many
        self.kept: list[tuple[int, dict[Attention, Tensor]]] = []  # steps, and each layer's (pictures, tokens, h, w)

    def __call__(self, layer: Attention, q: Tensor, k: Tensor) -> None:
        """Record the rows of the prompt, one per picture and part; Denoiser puts them first."""
        now, after = (self.places[min(step, len(self.places) - 1)] for step in (self.step, self.step + 1))
        self.length = self.length or k.shape[2]
        if self.step % self.every or k.shape[2] != self.length:  # the latter is what guidance adds
            return
        if now is not after and layer in self.sums:  # a second call of this step is under what the next one says
            return
        shares = torch.full((self.size, self.tokens, q.shape[2]), torch.nan)
        for part in {part for _, part, _ in now}:
            indices, positions = zip(*((i, at) for i, of, at in now if of == part), strict=True)
            for picture in range(self.size):  # one by one: all heads of all rows would be large
                row = slice(part * self.size + picture, part * self.size + picture + 1)
                whole = probabilities(q[row], k[row])[0]  # (heads, cells, T)
                shares[picture, list(indices)] = whole[:, :, list(positions)].mean(0).T.cpu()
        total, calls = self.sums.get(layer, (torch.zeros(()), 0))
        self.sums[layer] = total + shares.view(*shares.shape[:2], *self.grids[layer]), calls + 1

    def step_done(self) -> None:
        if self.sums:
            self.kept.append((self.step, {layer: total / calls for layer, (total, calls) in self.sums.items()}))
        self.sums = {}
        self.step += 1

    def image_done(self) -> None:
        self.steps.append(tuple(step for step, _ in self.kept))
        self.maps.append(tuple(torch.stack([maps[layer][self.row] for _, maps in self.kept]) for layer in self.grids))
        self.row += 1
        if self.row == self.size:
            self._start()
