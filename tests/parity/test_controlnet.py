"""ControlNet against diffusers.ControlNetModel: outputs of small random networks, and the keys of the public files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import save_file
from tolerances import EPS
from torch import Tensor

import tiny
from mezzotint.config import ControlNetConfig, UNetConfig
from mezzotint.errors import CheckpointError
from mezzotint.models.controlnet import ControlNet
from mezzotint.models.unet import Condition, UNet
from mezzotint.placement import Placement
from mezzotint.weights import inspect_model
from mezzotint.weights.control_files import scan_control

FAMILIES = ("sd1", "sd2", "sdxl")
OF_UNET = ("sample_size", "up_block_types")  # fields that a ControlNet does not have


def theirs(family: str, seed: int = 10, **changes: Any) -> ControlNetModel:
    """A ControlNet of a family whose zero convolutions are not zero."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in tiny.UNETS[family].items() if name not in OF_UNET}
    model = ControlNetModel(**fields | {"conditioning_embedding_out_channels": (8, 8, 16, 16)} | changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                parameter.normal_(std=0.2)
    return model


def ours(model: ControlNetModel) -> ControlNet:
    network = ControlNet(ControlNetConfig.model_validate(dict(model.config))).eval()
    network.load_state_dict(model.state_dict(), strict=True)
    return network


def inputs(family: str) -> tuple[Tensor, Condition, Tensor]:
    draw = torch.Generator().manual_seed(1)
    width = tiny.UNETS[family]["cross_attention_dim"]
    sample, hint = torch.randn(2, 4, 9, 7, generator=draw), torch.rand(2, 3, 72, 56, generator=draw)
    context, pooled = torch.randn(2, 7, width, generator=draw), torch.randn(2, tiny.WIDTH, generator=draw)
    return sample, Condition(context, pooled, torch.full((2, 6), 1001.0)), hint


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "bgr": ("sd1", {"controlnet_conditioning_channel_order": "bgr"}),
    "pooled": ("sd1", {"global_pool_conditions": True}),
    "no attention": ("sd1", {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("guess", [False, True], ids=["", "guess"])
@torch.no_grad()
def test_the_residuals_are_diffusers(name: str, guess: bool) -> None:
    family, changes = CHANGES[name]
    model = theirs(family, **changes)
    network = ours(model)
    sample, condition, hint = inputs(family)
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    expected = model(
        sample, 481, condition.context, hint, 0.7, guess_mode=guess, added_cond_kwargs=added, return_dict=False
    )
    pooled = changes.get("global_pool_conditions", False)
    scales = [0.7] * network.residual_count
    if guess and not pooled:
        scales = (torch.logspace(-1, 0, network.residual_count) * 0.7).tolist()
    down, mid = network(sample, 481.0, condition, network.embed(hint), scales=scales)
    for one, other in zip((*down, mid), (*expected[0], expected[1]), strict=True):
        assert tiny.apart(one, other) < 100 * EPS


FULL: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in tiny.FULL_UNETS[name].items() if key not in OF_UNET}
    for name in ("sd1.5", "sd2.1", "sdxl")
}
FULL["sdxl-small"] = FULL["sdxl"] | {
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
}
PARAMETERS = {"sd1.5": 361_279_120, "sd2.1": 364_228_240, "sdxl": 1_251_014_160, "sdxl-small": 125_690_640}


@pytest.mark.parametrize("name", FULL)
def test_full_size_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model, network = ControlNetModel(**FULL[name]), ControlNet(ControlNetConfig.model_validate(FULL[name]))
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in network.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


# ---- files -----------------------------------------------------------------------------------------------------------

HEADS = {"sd1": 8, "sd2": (1, 1), "sdxl": (1, 1)}  # as published: eight, or 64 channels each
HINT = {"conv_in": 0, "conv_out": 14, **{f"blocks.{i}": 2 * i + 2 for i in range(6)}}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "controlnet_mid_block": "middle_block_out.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",  # of networks with one layer a level
}


def original(name: str) -> str:
    """The original name of a tensor of a ControlNet with two levels of one layer each."""
    owner, _, leaf = name.rpartition(".")
    if owner in ENDS:
        return f"{ENDS[owner]}.{leaf}"
    if owner.startswith("controlnet_cond_embedding."):
        return f"input_hint_block.{HINT[owner.partition('.')[2]]}.{leaf}"
    if owner.startswith("controlnet_down_blocks."):
        return f"zero_convs.{owner.rpartition('.')[2]}.0.{leaf}"
    if owner.startswith("mid_block."):
        _, kind, number, *rest = owner.split(".")
        block = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        _, level, kind, _, *rest = owner.split(".")
        block = f"input_blocks.{2 * int(level) + 1}.{int(kind == 'attentions')}"
    inner = ".".join(rest)
    return f"{block}.{RESNET.get(inner, inner)}.{leaf}"


def config_of_unet(family: str) -> UNetConfig:
    return UNetConfig.model_validate(tiny.UNETS[family] | {"attention_head_dim": HEADS[family]})


def load(path: Path, family: str) -> ControlNet:
    unet = UNet(config_of_unet(family))
    return scan_control(str(path), unet.config).load(unet, torch.float32, torch.device("cpu"), Placement())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_form_of_a_file_holds_the_same_network(family: str, tmp_path: Path) -> None:
    """A folder, diffusers' names without a config, the original names with and without a prefix."""
    model = theirs(family, attention_head_dim=HEADS[family], norm_num_groups=32)
    state = model.state_dict()
    renamed = {original(key): tensor for key, tensor in state.items()}
    back = convert_controlnet_checkpoint(dict(renamed), {"layers_per_block": 1})
    assert all(torch.equal(back[key], state[key]) for key in back if back[key] is not None)
    model.save_pretrained(tmp_path / "folder")
    save_file(state, tmp_path / "diffusers.safetensors")
    save_file(renamed, tmp_path / "bare.safetensors")
    torch.save({f"control_model.{key}": tensor for key, tensor in renamed.items()}, tmp_path / "original.pth")
    sample, condition, hint = inputs(family)

    def residuals(network: ControlNet) -> list[Tensor]:
        down, mid = network(sample, 481.0, condition, network.embed(hint))
        return [*down, mid]

    expected = residuals(ours(model))
    for name in ("folder", "diffusers.safetensors", "bare.safetensors", "original.pth"):
        network = load(tmp_path / name, family)
        assert network.state_dict().keys() == state.keys()
        assert max(map(tiny.apart, residuals(network), expected)) < 100 * EPS, name
        report = inspect_model(tmp_path / name)
        assert report.kind.startswith("a ControlNet for Stable Diffusion") and not report.problems
        assert report.parts[0].parameters == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_difference_is_added_to_the_unet(family: str, tmp_path: Path) -> None:
    """A Control-LoRA has factors of some changes, whole tensors, and leaves the rest; a difference has every tensor."""
    torch.manual_seed(3)
    unet = UNet(config_of_unet(family))
    base = unet.state_dict()
    expected = theirs(family, attention_head_dim=HEADS[family]).state_dict()
    rank, lora, whole = 2, {"lora_controlnet": torch.zeros(0)}, {"difference": torch.zeros(0)}
    wanted: dict[str, Tensor] = {}
    for key, tensor in expected.items():
        name = original(key)
        if key not in base:
            lora[name] = whole[f"control_model.{name}"] = wanted[key] = tensor
            continue
        whole[f"control_model.{name}"] = tensor - base[key]
        if key.endswith("conv1.weight") or ("attn1" in key and key.endswith(".weight")):
            up, down = torch.randn(tensor.shape[0], rank), torch.randn(rank, *tensor.shape[1:])
            lora[name.removesuffix(".weight") + ".up"], lora[name.removesuffix(".weight") + ".down"] = up, down
            wanted[key] = base[key] + (up @ down.flatten(1)).reshape(tensor.shape)
        else:
            wanted[key] = lora[name] = tensor
            if "proj_in" in key or "norm" in key:
                wanted[key] = base[key]
                del lora[name]
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(whole, tmp_path / "difference.safetensors")
    for name, right in (("lora", wanted), ("difference", expected)):
        found = scan_control(str(tmp_path / f"{name}.safetensors"), unet.config)
        state = found.load(unet, torch.float32, torch.device("cpu"), Placement()).state_dict()
        assert state.keys() == right.keys()
        assert max(tiny.apart(state[key], right[key]) for key in right) < 8 * EPS, name
    assert "a Control-LoRA" in inspect_model(tmp_path / "lora.safetensors").kind
    with pytest.raises(CheckpointError, match="is a Control-LoRA for another model"):
        scan_control(
            str(tmp_path / "lora.safetensors"),
            UNetConfig.model_validate(tiny.UNETS[family] | {"block_out_channels": (64, 64)}),
        )


def test_a_controlnet_for_another_model_is_refused(tmp_path: Path) -> None:
    theirs("sdxl").save_pretrained(tmp_path / "xl")
    with pytest.raises(CheckpointError, match="for Stable Diffusion XL; the model is Stable Diffusion 1"):
        scan_control(str(tmp_path / "xl"), UNetConfig.model_validate(tiny.UNETS["sd1"]))
    theirs("sd1", block_out_channels=(32, 32)).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"its block_out_channels is \(32, 32\), the UNet's \(32, 64\)"):
        scan_control(str(tmp_path / "other"), UNetConfig.model_validate(tiny.UNETS["sd1"]))
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="not a ControlNet"):
        scan_control(str(tmp_path / "vae.safetensors"), UNetConfig.model_validate(tiny.UNETS["sd1"]))
