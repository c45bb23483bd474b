"""Record the cross-attention maps of a run, token by token. `page.py` draws them.

    explanation = explain(pipe, Request(prompt="a lemon left of a whale", seed=7))
    explanation.map("lemon")                (H, W) at the picture's size: where the network attended to the word
    explanation.maps[picture][layer]        (steps, tokens, h, w): the attention weights

In cross-attention each cell of a UNet's feature map has a query q, each token of the prompt a key k, and softmax(q kᵀ /
sqrt(d)) weights the tokens. These weights are recorded, averaged over the heads. They are computed in addition to the
run's own attention, so the picture stays the same, bit for bit. Only the rows of the prompt are recorded, not those
that guidance adds.
Sources: Hertz et al. 2022, "Prompt-to-Prompt", section 3; Tang et al. 2023, "What the DAAM", section 3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.conditioning.chunks import Embeddings, split_into_chunks
from mezzotint.errors import BudgetError, RequestError
from mezzotint.models.attention import probabilities, recording
from mezzotint.models.blocks import Attention
from mezzotint.models.tokenizer import WORD_END, Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.pipeline import Pipeline
from mezzotint.prompt import PromptPlan, Variant
from mezzotint.request import Request
from mezzotint.result import Result
from mezzotint.run.networks import unwrap
from mezzotint.run.runner import OnStep

MAX_MAP_BYTES = 2**30
MIN_GRID_SIDE = 8  # cells; coarser layers blur a word's map into its neighbours

Grids = Mapping[Attention, tuple[int, int]]  # (h, w) of each layer's feature map
Positions = Sequence[tuple[int, int, int]]  # index of a token, part of the prompt, position in the part's context


@dataclass(frozen=True)
class Token:
    """A token of the prompt, made from prompt[start:end].

    Attributes:
        text: The token in the vocabulary, such as "lemon</w>", or the name of an embedding.
        start: The start of its text in the prompt.
        end: The end of its text in the prompt.
        part: The part of the prompt (separated by AND), from 0.
        row: The index of an embedding's vector, or None.
    """

    text: str
    start: int
    end: int
    part: int = 0
    row: int | None = None


@dataclass(frozen=True)
class Word:
    """A word, as the tokenizer splits the prompt, or an embedding.

    Attributes:
        text: prompt[start:end].
        start: Its start in the prompt.
        end: Its end in the prompt.
        tokens: The indices of its tokens.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Explanation:
    """A picture, and where the network attended to each word of its prompt.

    Attributes:
        result: The result of the run, as `Pipeline.generate` returns it.
        tokens: The tokens of the prompts.
        words: The words of the prompts, each of one or more tokens.
        layers: The names of the UNet's cross-attentions, in the order in which they run.
        steps: The recorded steps of each picture, from 0.
        maps: For each picture and layer a float32 tensor (steps, tokens, h, w): the attention weights, averaged over
            the heads and over the calls of a step; NaN in steps whose prompt does not contain the token. A cell's
            weights sum to 1 together with those of BOS, EOS and padding, which are not recorded.
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
        """Return the heat map of a word: how much the network attended to it in each place.

        A layer's maps are averaged over the steps and the word's tokens and enlarged bilinearly; then the layers are
        averaged.

        Args:
            word: One or several words as typed (all their occurrences), a Word, or the index of a token.
            picture: The index of the picture.
            steps: Steps of the run, from 0; by default the later half of those that contain the word, in which objects
                have settled.
            layers: Indices of layers; by default those of at least 8x8 cells, or all if there are none.
            relative: Whether to compare with the other tokens: divide each token's map by its mean over the picture,
                subtract the mean of the other tokens' maps, and clip negative values to 0. If False, return the plain
                attention weights, most of which fall on BOS and on every object.

        Returns:
            A float32 tensor (H, W) of the picture's size, non-negative.

        Raises:
            RequestError: If the word, a step or a layer was not recorded.
        """
        tokens, recorded, maps = self._tokens(word), self.steps[picture], self.maps[picture]
        available = [step for step, shares in zip(recorded, maps[0], strict=True) if shares[tokens].isfinite().any()]
        chosen_steps = available[len(available) // 2 :] if steps is None else steps
        all_layers = range(len(self.layers))
        fine = [layer for layer in all_layers if min(maps[layer].shape[2:]) >= MIN_GRID_SIDE]
        chosen_layers = layers if layers is not None else fine or all_layers
        if not chosen_steps or not set(chosen_steps) <= set(available):
            right = f"{word!r} was recorded in the steps {', '.join(map(str, available))}"
            raise RequestError(f"steps is {list(chosen_steps)}; {right}")
        if not chosen_layers or not set(chosen_layers) <= set(all_layers):
            right = f"it must be one or more of 0 to {len(self.layers) - 1}"
            raise RequestError(f"layers is {list(chosen_layers)}; {right}")
        rows = [recorded.index(step) for step in chosen_steps]
        image = self.result.images[picture]
        total = torch.zeros(image.height, image.width)
        for layer in chosen_layers:
            shares = maps[layer][rows].nanmean(0)  # (tokens, h, w)
            heat = _contrast(shares, tokens) if relative else shares[tokens].nanmean(0)
            total += F.interpolate(heat[None, None], size=total.shape, mode="bilinear", align_corners=False)[0, 0]
        return total.clamp(min=0.0) / len(chosen_layers)

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
                raise RequestError(f"word is {word}; it must be the index of a token, from 0 to {len(self.tokens) - 1}")
            return [word]
        phrase, texts = word.lower().split(), [w.text.lower() for w in self.words]
        starts = [i for i in range(len(texts)) if phrase and texts[i : i + len(phrase)] == phrase]
        if not starts:
            raise RequestError(f"the prompt has no word {word!r}; it has {', '.join(dict.fromkeys(texts))}")
        return [token for i in starts for w in self.words[i : i + len(phrase)] for token in w.tokens]


def _contrast(shares: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return (h, w) from (tokens, h, w): the mean map of these tokens less that of the others, each over its mean."""
    scaled = shares / shares.mean((1, 2), keepdim=True).clamp(min=1e-12)
    others = [i for i in range(len(shares)) if i not in tokens and shares[i].isfinite().all()]
    return scaled[tokens].nanmean(0) - (scaled[others].mean(0) if others else 1.0)  # 1: a uniform map


def explain(
    pipe: Pipeline,
    request: Request,
    latents: Tensor | None = None,
    *,
    on_step: OnStep | None = None,
    limit: int = MAX_MAP_BYTES,
) -> Explanation:
    """Generate a request as `pipe.generate` does, and record where the network attended to its words.

    Args:
        pipe: The pipeline.
        request: What to generate.
        latents: Starting noise, as for `pipe.generate`.
        on_step: Called with (steps done, steps in total) after each step.
        limit: Maximal size of the maps in bytes; a pipeline with a memory budget may lower it. They take 4 * pictures *
            steps * tokens * cells of all layers; above the limit only every second, third, ... step is recorded.

    Raises:
        BudgetError: If the maps of a single step exceed the limit.
        RequestError: If the prompt has no words, or a refiner takes all steps.
    """
    plan = pipe.plan(request)
    request, steps = plan.request, len(plan.sigmas) - 1
    tokens, words, positions = _locate_tokens(plan.positive, pipe.tokenizers[0], plan.embeddings)
    if not words:
        raise RequestError(f"prompt is {request.prompt[:60]!r}, which has no words to explain")
    if plan.switch and plan.sigmas[0] <= plan.switch.sigma:
        raise RequestError("the refiner takes all steps, and only the first model's are recorded; give a refiner_at")
    side = pipe.vae.config.downscale
    unet = cast(UNet, unwrap(pipe.unet_for(plan)))
    layers = _layers(unet, ((request.height or 0) // side, (request.width or 0) // side))
    if not layers:
        raise RequestError("this model's UNet has no cross-attention, so there are no maps to record")
    grids = dict(layers.values())
    step_bytes = 4 * request.count * len(tokens) * sum(h * w for h, w in grids.values())
    spare = pipe.spare_memory(plan)
    if spare is not None:
        limit = min(limit, spare - _weights_size(pipe, request, grids))
    if step_bytes > limit:
        remedy = "raise the limit" if spare is None else "load the model with more memory"
        raise BudgetError(
            f"the maps of one step take {step_bytes:,} bytes, and the limit is {max(limit, 0):,}; generate fewer or "
            f"smaller pictures, or {remedy}"
        )
    every = math.ceil(steps / (limit // step_bytes))
    recorder = _Recorder(grids, len(tokens), positions, request, every)

    def step_done(done: int, total: int) -> None:
        recorder.step_done()
        if on_step:
            on_step(done, total)

    with recording(recorder):
        result = pipe.generate(request, latents, on_step=step_done, on_image=lambda k, image: recorder.image_done())
    return Explanation(result, tokens, words, tuple(layers), tuple(recorder.steps), tuple(recorder.maps))


def _weights_size(pipe: Pipeline, request: Request, grids: Grids) -> int:
    """Return the bytes of the largest layer's attention weights and of their logits, over all heads."""
    cells = max(layer.heads * height * width for layer, (height, width) in grids.items())
    pictures = min(request.batch or 1, request.count)
    return 2 * 4 * 2 * pictures * cells * pipe.text_encoders[0].config.max_position_embeddings


def _locate_tokens(
    plan: PromptPlan, tokenizer: Tokenizer, embeddings: Embeddings
) -> tuple[tuple[Token, ...], tuple[Word, ...], list[Positions]]:
    """Return the tokens of a prompt, its words, and the tokens' positions in the context at each step.

    A token that occurs in several variants of a scheduled prompt is one token. SDXL's are those of the first tokenizer.
    """
    # for each part and variant: ((token, number of earlier tokens equal to it), position)
    occurrences: list[list[list[tuple[tuple[Token, int], int]]]] = []
    for number, part in enumerate(plan.parts):
        occurrences.append([])
        for variant in part.variants:
            earlier: Counter[Token] = Counter()
            occurrences[-1].append([])
            for token, position in _token_positions(variant, number, plan.syntax, tokenizer, embeddings):
                occurrences[-1][-1].append(((token, earlier[token]), position))
                earlier[token] += 1
    keys = dict.fromkeys(key for part in occurrences for variant in part for key, _ in variant)
    indices = {key: i for i, key in enumerate(sorted(keys, key=lambda key: (key[0].part, key[0].start)))}
    tokens = tuple(token for token, _ in indices)

    words: list[Word] = []
    first = 0
    for i, (token, following) in enumerate(zip_longest(tokens, tokens[1:]), start=1):
        ends = token.text.endswith(WORD_END) if token.row is None else following is None or following.row in (None, 0)
        if ends or following is None or following.part != token.part:
            start, end = tokens[first].start, token.end
            words.append(Word(plan.source[start:end], start, end, tuple(range(first, i))))
            first = i

    positions: list[Positions] = []
    by_variants: dict[tuple[int, ...], Positions] = {}
    for step in range(plan.steps):
        variants = tuple(part.variants.index(part.at(step)) for part in plan.parts)
        if variants not in by_variants:
            by_variants[variants] = [
                (indices[key], number, position)
                for number, variant in enumerate(variants)
                for key, position in occurrences[number][variant]
            ]
        positions.append(by_variants[variants])
    return tokens, tuple(words), positions


def _token_positions(
    variant: Variant, part: int, syntax: str, tokenizer: Tokenizer, embeddings: Embeddings
) -> Iterator[tuple[Token, int]]:
    """Yield the tokens of a variant and their positions in the context; the texts of a blend share positions."""
    offset = 0
    for clause in variant.clauses:
        chunks = split_into_chunks(clause.spans, syntax, tokenizer, embeddings)
        for k, chunk in enumerate(chunks):
            for i, token in enumerate(chunk, start=1):
                name, row = token.vector or (tokenizer.token(token.id), None)
                yield Token(name, token.start, token.end, part, row), offset + k * tokenizer.max_length + i
        offset += len(chunks) * tokenizer.max_length if variant.join == "concat" else 0


def _layers(unet: UNet, grid: tuple[int, int]) -> dict[str, tuple[Attention, tuple[int, int]]]:
    """Return the UNet's cross-attentions by name, each with its feature map's (h, w) for latents of size `grid`."""
    grids = [grid]
    for _ in unet.config.block_out_channels[1:]:
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))  # as Downsample rounds
    layers = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.cross:
            block, index, *_ = name.split(".")
            level = int(index) if block == "down_blocks" else -1 - int(index) if block == "up_blocks" else -1
            layers[name] = module, grids[level]
    return layers


class _Recorder:
    """Receives the cross-attention of a run, averages it over a step's calls, and collects it by picture."""

    def __init__(self, grids: Grids, tokens: int, positions: Sequence[Positions], request: Request, every: int) -> None:
        self.grids, self.tokens, self.positions, self.every = grids, tokens, positions, every
        self.count, self.batch = request.count, request.batch or 1
        self.steps: list[tuple[int, ...]] = []  # of each picture
        self.maps: list[tuple[Tensor, ...]] = []
        self.length = 0  # of the prompt's context, known from the first call
        self._start_batch()

    def _start_batch(self) -> None:
        """Start a batch of `size` pictures."""
        self.size, self.row, self.step = min(self.batch, self.count - len(self.maps)), 0, 0
        self.sums: dict[Attention, tuple[Tensor, int]] = {}  # sum over this step's calls, and their number
        self.recorded: list[tuple[int, dict[Attention, Tensor]]] = []  # step, each layer's (pictures, tokens, h, w)

    def __call__(self, layer: Attention, q: Tensor, k: Tensor) -> None:
        """Record the rows of the prompt, one per picture and part; Denoiser puts them first."""
        if layer not in self.grids:  # another network's, such as a refiner's
            return
        last = len(self.positions) - 1
        now, following = (self.positions[min(step, last)] for step in (self.step, self.step + 1))
        self.length = self.length or k.shape[2]
        if self.step % self.every or k.shape[2] != self.length:  # another length: a call that guidance adds
            return
        if now is not following and layer in self.sums:  # the step's second call uses the next step's prompt
            return
        shares = torch.full((self.size, self.tokens, q.shape[2]), torch.nan)
        for part in {part for _, part, _ in now}:
            indices, positions = zip(*((i, position) for i, of, position in now if of == part), strict=True)
            for picture in range(self.size):  # one by one, to save memory
                row = slice(part * self.size + picture, part * self.size + picture + 1)
                weights = probabilities(q[row], k[row])[0]  # (heads, cells, T)
                shares[picture, list(indices)] = weights[:, :, list(positions)].mean(0).T.cpu()
        total, calls = self.sums.get(layer, (torch.zeros(()), 0))
        self.sums[layer] = total + shares.view(*shares.shape[:2], *self.grids[layer]), calls + 1

    def step_done(self) -> None:
        """Average the step's calls."""
        if self.sums:
            self.recorded.append((self.step, {layer: total / calls for layer, (total, calls) in self.sums.items()}))
        self.sums = {}
        self.step += 1

    def image_done(self) -> None:
        """Collect the maps of the batch's next picture."""
        self.steps.append(tuple(step for step, _ in self.recorded))
        self.maps.append(
            tuple(torch.stack([maps[layer][self.row] for _, maps in self.recorded]) for layer in self.grids)
        )
        self.row += 1
        if self.row == self.size:
            self._start_batch()
