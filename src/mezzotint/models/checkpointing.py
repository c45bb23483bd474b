"""Gradient checkpointing: the activations of some blocks are not saved for the backward pass, but recomputed in it.

    with checkpointing(unet), checkpointing(text_encoder, every=2):
        loss = ...
        loss.backward()

Only the inputs of these blocks are saved, so a training step needs memory for them and the activations of one block,
and time for one more forward pass of the blocks. Gradients are the same bits: dropout repeats its random numbers.
Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mezzotint.errors import RequestError
from mezzotint.models.blocks import Attention, FeedForward, ResnetBlock, TransformerBlock
from mezzotint.models.clip import EncoderLayer

# none of "all" holds another: what is computed again computes its parts again, and checkpoints in it would do so twice
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (ResnetBlock, TransformerBlock, EncoderLayer),
    "resnets": (ResnetBlock,),
    "transformers": (TransformerBlock,),
    "attentions": (Attention,),  # of a transformer block only its two attentions
    "feedforwards": (FeedForward,),  # only its MLP
    "layers": (EncoderLayer,),  # of the text encoder
}


def checkpointed(network: nn.Module, blocks: str | Sequence[str] = "all", every: int = 1) -> dict[str, nn.Module]:
    """Return the blocks that `checkpointing` would choose, by name, in the network's order."""
    asked = [blocks] if isinstance(blocks, str) else list(blocks)
    places = [word for word in asked if word not in KINDS]
    kinds = tuple(kind for word in asked for kind in KINDS.get(word, ())) or KINDS["all"]
    if every < 1:
        raise RequestError(f"checkpointing every {every} blocks: it must be 1, each of them, or more")
    names = [(f".{name}.", name, module) for name, module in network.named_modules()]
    for place in places:
        if not any(f".{place}." in path for path, _, _ in names):
            raise RequestError(
                f"checkpointing {place!r}: the {type(network).__name__} has no such part; "
                f"it must be one of {', '.join(KINDS)}, or a part's name, such as up_blocks.1"
            )
    inside = [
        (name, module)
        for path, name, module in names
        if isinstance(module, kinds) and (not places or any(f".{place}." in path for place in places))
    ]
    if not inside:
        raise RequestError(f"checkpointing {', '.join(asked)}: the {type(network).__name__} has no such blocks")
    return dict(inside[::every])


@contextmanager
def checkpointing(network: nn.Module, blocks: str | Sequence[str] = "all", every: int = 1) -> Iterator[None]:
    """Checkpoint blocks of a UNet or text encoder, by itself or wrapped (peft, DDP), inside the block.

    The backward pass may run after the context. Calls without gradients do not change.

    Args:
        network: The network.
        blocks: "all" residual blocks, transformer blocks and encoder layers; "resnets", "transformers" or "layers" for
            those of one kind; "attentions" or "feedforwards" for these parts of the transformer blocks; the name of a
            part of the network ("up_blocks", "down_blocks.0") for the blocks in it; or several of these.
        every: Checkpoint only every n-th of them.

    Raises:
        RequestError: If the network has no such blocks, or they are checkpointed already.
    """
    chosen = checkpointed(network, blocks, every)
    for name, module in chosen.items():
        if "forward" in vars(module):
            raise RequestError(f"checkpointing {name}: it already is, or something else has replaced its forward")
    try:
        for module in chosen.values():
            module.forward = _again(module.forward)
        yield
    finally:
        for module in chosen.values():
            vars(module).pop("forward", None)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` so that it is checkpointed when gradients are needed."""

    def computed(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        # on a GPU the backward pass runs in another thread, where this thread's attention backend is not set
        context = copy_context()
        return checkpoint(lambda *x, **y: context.copy().run(forward, *x, **y), *inputs, use_reentrant=False, **named)

    return computed
