"""Gradient checkpointing: the same gradients bit for bit, less kept, and which blocks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from mezzotint.config import CLIPConfig, UNetConfig
from mezzotint.errors import RequestError
from mezzotint.models import blocks as parts
from mezzotint.models.attention import backend
from mezzotint.models.backends import Backend
from mezzotint.models.checkpointing import KINDS, checkpointed, checkpointing
from mezzotint.models.clip import CLIPTextModel, EncoderLayer
from mezzotint.models.unet import Condition, UNet

CHOICES: list[tuple[Any, int]] = [
    ("all", 1),
    ("all", 2),
    ("all", 3),
    ("resnets", 1),
    ("transformers", 1),
    ("attentions", 1),
    ("feedforwards", 1),
    ("up_blocks", 1),
    (["resnets", "attentions"], 1),
    (["transformers", "down_blocks.0", "mid_block"], 1),
]


def build(depth: int = 1) -> UNet:
    torch.manual_seed(0)
    return UNet(
        UNetConfig(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            transformer_layers_per_block=(depth, 1),
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    )


def build_clip() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPConfig(
            vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            projection_dim=16,
        )
    )  # fmt: skip


def unet_loss(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 6, 5, generator=generator)
    condition = Condition(torch.randn(2, 7, 24, generator=generator))
    loss: Tensor = unet(sample, 500.0, condition).square().mean()
    return loss


def clip_loss(clip: nn.Module) -> Tensor:
    ids = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden, pooled = clip(ids, skip=1)
    loss: Tensor = hidden.square().mean() + pooled.square().mean()
    return loss


def gradients(network: nn.Module, loss: Callable[[nn.Module], Tensor], *how: Any) -> dict[str, Tensor]:
    """Of every parameter that learns; `how` are checkpointing's arguments, none of them for none."""
    network.zero_grad()
    if how:
        with checkpointing(network, *how):
            loss(network).backward()
    else:
        loss(network).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name


@pytest.mark.parametrize(("blocks", "every"), CHOICES)
def test_a_unets_gradients_are_the_same_bits(blocks: str | Sequence[str], every: int) -> None:
    unet = build(depth=2)
    plain = gradients(unet, unet_loss)
    assert all(name in plain for name, _ in unet.named_parameters())
    assert_same(gradients(unet, unet_loss, blocks, every), plain)


@pytest.mark.parametrize(("blocks", "every"), [("all", 1), ("layers", 2), ("text_model.encoder.layers.1", 1)])
def test_a_text_encoders_gradients_are_the_same_bits(blocks: str, every: int) -> None:
    clip = build_clip()
    assert_same(gradients(clip, clip_loss, blocks, every), gradients(clip, clip_loss))


@pytest.mark.parametrize("name", ["math", "sliced:1KiB"])
def test_under_another_attention(name: str) -> None:
    unet = build()
    with backend(name):
        assert_same(gradients(unet, unet_loss, "all"), gradients(unet, unet_loss))


def test_a_lora_with_dropout_on_frozen_weights() -> None:
    """Nothing that goes in has a gradient, and the numbers that dropout draws are drawn again."""
    config = peft.LoraConfig(
        r=2, lora_dropout=0.3, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False
    )
    lora = peft.get_peft_model(build(), config)  # type: ignore[arg-type]
    learning = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learning)
    runs = []
    for how in ((), ("all",), ("up_blocks",), ("attentions",), ("all",)):
        torch.manual_seed(7)
        runs.append((gradients(lora, unet_loss, *how), torch.rand(3)))
    for found, after in runs[1:]:
        assert_same(found, runs[0][0])
        assert torch.equal(after, runs[0][1]), "what is drawn next is the same too"
    assert set(runs[0][0]) == learning
    torch.manual_seed(8)
    other = gradients(lora, unet_loss)
    assert any(not torch.equal(other[name], runs[0][0][name]) for name in other), "dropout drops something"


def kept(network: nn.Module, loss: Callable[[nn.Module], Tensor], *how: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    tensors: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        tensors.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        if how:
            with checkpointing(network, *how):
                loss(network)
        else:
            loss(network)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_less_is_kept_the_more_blocks_are_chosen() -> None:
    unet = build(depth=2)
    amounts = [kept(unet, unet_loss, *how) for how in (("all", 1), ("all", 2), ("all", 4), ())]
    assert amounts == sorted(set(amounts))
    assert amounts[0] < amounts[-1] / 3
    for blocks in ("resnets", "transformers", "attentions", "feedforwards", "up_blocks"):
        assert amounts[0] < kept(unet, unet_loss, blocks) < amounts[-1]
    assert kept(build_clip(), clip_loss, "all") < kept(build_clip(), clip_loss) / 2


# ---- which -----------------------------------------------------------------------------------------------------------


def test_the_blocks_chosen() -> None:
    unet, clip = build(depth=2), build_clip()

    def count_checkpointed(*how: Any) -> Counter[str]:
        return Counter(type(module).__name__ for module in checkpointed(unet, *how).values())

    # resnets: 1, 1 down, 2 in the middle, 2, 2 up; transformer blocks: 2 down, 1 in the middle, 2 x 2 up
    assert count_checkpointed("all") == {"ResnetBlock": 8, "TransformerBlock": 7}
    assert count_checkpointed("resnets") == {"ResnetBlock": 8}
    assert count_checkpointed(["resnets"], 3) == {"ResnetBlock": 3}
    assert count_checkpointed("attentions") == {"Attention": 14}
    assert count_checkpointed("feedforwards") == {"FeedForward": 7}
    assert count_checkpointed("up_blocks") == {"ResnetBlock": 4, "TransformerBlock": 4}
    assert count_checkpointed(["transformers", "mid_block"]) == {"TransformerBlock": 1}
    names = list(checkpointed(unet, ["resnets", "up_blocks.1", "down_blocks.0"]))
    assert names == ["down_blocks.0.resnets.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]
    wrapped = nn.ModuleDict({"module": unet})
    assert list(checkpointed(wrapped, ["resnets", "up_blocks.1"])) == [f"module.{name}" for name in names[1:]]
    layers = [f"text_model.encoder.layers.{i}" for i in range(4)]
    assert list(checkpointed(clip)) == list(checkpointed(clip, "layers")) == layers
    assert list(checkpointed(clip, every=2)) == layers[::2]
    assert {kind for kinds in KINDS.values() for kind in kinds} == {
        parts.ResnetBlock, parts.TransformerBlock, parts.Attention, parts.FeedForward, EncoderLayer
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("blocks",), "'blocks': the UNet has no such part; it must be one of all, resnets"),
        (("down_block",), "has no such part"),
        (("up_blocks.7",), "'up_blocks.7'"),
        (("layers",), "layers: the UNet has no such blocks"),
        ((["transformers", "conv_in"],), "transformers, conv_in: the UNet has no such blocks"),
        (("all", 0), "every 0 blocks: it must be 1"),
        (("all", -1), "every -1"),
    ],
)
def test_what_no_network_has(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence), checkpointing(build(), *arguments):
        pass


# ---- what it leaves --------------------------------------------------------------------------------------------------


def calls_of(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    count: Counter[str] = Counter()
    for name in ("ResnetBlock", "FeedForward"):
        forward = getattr(parts, name).forward

        def counting(self: nn.Module, *x: Any, name: str = name, forward: Any = forward) -> Any:
            count[name] += 1
            return forward(self, *x)

        monkeypatch.setattr(getattr(parts, name), "forward", counting)
    return count


def test_the_way_back_may_come_later_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build()
    count = calls_of(unet, monkeypatch)
    with checkpointing(unet, "resnets"):
        loss = unet_loss(unet)
    assert count == {"ResnetBlock": 8, "FeedForward": 4}
    loss.backward()  # type: ignore[no-untyped-call]
    assert count == {"ResnetBlock": 16, "FeedForward": 4}
    with pytest.raises(ZeroDivisionError), checkpointing(unet):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in unet.modules())
    gradients(unet, unet_loss)
    assert count == {"ResnetBlock": 24, "FeedForward": 8}


def test_twice_is_refused() -> None:
    unet = build()
    with checkpointing(unet, "resnets"):
        with checkpointing(unet, "transformers"):
            pass
        with pytest.raises(RequestError, match=r"down_blocks.0.resnets.0: it already is"), checkpointing(unet):
            pass
        assert "forward" in vars(checkpointed(unet, "resnets")["down_blocks.0.resnets.0"])


@torch.no_grad()
def test_drawing_inside_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build()
    expected = unet_loss(unet)
    count = calls_of(unet, monkeypatch)
    with checkpointing(unet):
        assert torch.equal(unet_loss(unet), expected)
    assert count == {"ResnetBlock": 8, "FeedForward": 4}


def test_a_way_back_in_another_thread_has_this_ones_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where torch runs it in a thread of its own."""
    unet = build()
    seen: list[tuple[bool, str]] = []
    call = Backend.__call__

    def recording_call(self: Backend, *x: Any) -> Tensor:
        seen.append((threading.current_thread() is threading.main_thread(), self.name))
        return call(self, *x)

    monkeypatch.setattr(Backend, "__call__", recording_call)
    with backend("math"), checkpointing(unet):
        loss = unet_loss(unet)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert seen == [(True, "math")] * 8 + [(False, "math")] * 8
    found = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    with backend("math"):
        expected = gradients(unet, unet_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():  # another thread may sum in another order: sums of at most 60 terms
        limit = 60 * torch.finfo(torch.float32).eps * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0.0, atol=limit, msg=name)
