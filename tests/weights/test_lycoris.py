"""Files of LyCORIS in every algorithm that it has: a layer's output with them is LyCORIS' own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint import Pipeline
from mezzotint.models.adapters import apply_adapters, merge
from mezzotint.weights.checkpoint import inspect_model
from mezzotint.weights.lora import Adapters, Scale

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR, WIDE = f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.2"  # 16 x 16, 16 x 64
CONV, NORM = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1"  # 16 x 16 x 3 x 3
SCALES = (1.0, 0.7, -0.5)
# Two chains of float32 sums of at most 144 terms, so 288 roundings of half an ulp of the largest on either side; the
# inverse of I - Q is well-conditioned, since Q is skew-symmetric and small
TOLERANCE = 288 * torch.finfo(torch.float32).eps

KINDS = {
    "lora": ("lora", WIDE, {}),
    "locon": ("lora", CONV, {}),
    "locon, Tucker": ("lora", CONV, {"use_tucker": True}),
    "dora": ("lora", WIDE, {"weight_decompose": True}),
    "dora, inputs": ("lora", WIDE, {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("loha", WIDE, {}),
    "loha, convolution": ("loha", CONV, {}),
    "loha, Tucker": ("loha", CONV, {"use_tucker": True}),
    "loha, dora": ("loha", WIDE, {"weight_decompose": True}),
    "lokr": ("lokr", WIDE, {"factor": 4, "lora_dim": 1}),
    "lokr, both": ("lokr", WIDE, {"factor": 4, "lora_dim": 1, "decompose_both": True}),
    "lokr, whole": ("lokr", CONV, {"factor": 4, "full_matrix": True}),
    "lokr, Tucker": ("lokr", CONV, {"factor": 4, "lora_dim": 1, "use_tucker": True}),
    "lokr, dora": ("lokr", WIDE, {"factor": 4, "weight_decompose": True}),
    "rslora": ("lora", WIDE, {"rs_lora": True}),
    "dylora": ("dylora", WIDE, {"block_size": 2}),
    "full": ("full", CONV, {}),
    "norm": ("norm", NORM, {}),
    "ia3": ("ia3", WIDE, {}),
    "ia3, inputs": ("ia3", WIDE, {"train_on_input": True}),
    "ia3, convolution": ("ia3", CONV, {}),
    "ia3, inputs of a convolution": ("ia3", CONV, {"train_on_input": True}),
    "glora": ("glora", WIDE, {}),
    "glora, convolution": ("glora", CONV, {}),
    "oft": ("diag-oft", WIDE, {}),
    "oft, constraint": ("diag-oft", CONV, {"constraint": 0.05}),
    "oft, rescaled": ("diag-oft", WIDE, {"rescaled": True}),
    "boft": ("boft", WIDE, {}),
    "boft, constraint": ("boft", LINEAR, {"constraint": 0.05}),
    "boft, rescaled": ("boft", CONV, {"rescaled": True}),
}
# At a scale s, LyCORIS and ComfyUI disagree about DoRA: docs/fidelity.md
ONE_SCALE = {kind for kind, (_, _, options) in KINDS.items() if "weight_decompose" in options}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def plain(layer: nn.Module) -> nn.Module:
    """Return torch's own layer with the same weights."""
    if isinstance(layer, nn.Linear):
        copy: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    elif isinstance(layer, nn.Conv2d):
        copy = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    else:
        assert isinstance(layer, nn.GroupNorm)
        copy = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps)
    copy.load_state_dict(layer.state_dict())
    return copy.requires_grad_(False)


@torch.no_grad()
def train(algorithm: str, layer: nn.Module, options: dict[str, object]) -> tuple[dict[str, Tensor], nn.Module]:
    """Return LyCORIS' module for a layer, with random values, and the tensors that it saves of it."""
    from lycoris.modules import get_module, make_module
    from lycoris.modules.norms import NormModule
    from lycoris.wrapper import network_module_dict

    torch.manual_seed(7)
    kind = {**network_module_dict, "norm": NormModule}[algorithm]
    module = kind("x", layer, **{"lora_dim": 4, "alpha": 2, **options})
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3 + (1.0 if name in ("rescale", "dora_scale") else 0.0))
    tensors = {f"x.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    if algorithm in ("dylora", "full"):  # while they are trained, the rank is random, or the weight not the difference
        module = make_module(*get_module(tensors, "x"), "x", layer)
    return tensors, module.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_the_file_is_lycoris_own(sd1: Pipeline, tmp_path: Path, kind: str) -> None:
    """At run time and merged, at several scales. (LyCORIS 4.1 merges LoHa and LoKr with alpha / rank squared.)"""
    algorithm, name, options = KINDS[kind]
    layer = sd1.unet.get_submodule(name)
    tensors, module = train(algorithm, oracle := plain(layer), options)
    stem, path = f"lycoris_{name.replace('.', '_')}", tmp_path / "a.safetensors"
    save_file({stem + key.removeprefix("x"): tensor for key, tensor in tensors.items()}, path)
    adapters, networks = Adapters(sd1.unet, []), {"unet": sd1.unet}
    adapter = adapters.read(str(path))
    assert adapter.coverage.matched == (f"unet.{name}",) and not adapter.coverage.unmatched
    x = torch.randn((2, 3, layer.in_features) if isinstance(layer, nn.Linear) else (2, 16, 6, 5))
    for scale in SCALES[: 1 if kind in ONE_SCALE else None]:
        module.multiplier = scale
        changes = adapters.changes([(adapter, Scale(scale, scale))])
        with torch.no_grad():
            wanted = module(x)
            with apply_adapters(networks, changes):
                found = layer(x)
            undo = merge(networks, changes)
            merged = layer(x)
            undo.undo()
            distances = [float((y - wanted).abs().max() / wanted.abs().max()) for y in (found, merged)]
            moved = float((wanted - oracle(x)).abs().max() / wanted.abs().max())
        print(f"{kind} at {scale}: {max(distances):.1e} of {moved:.2f}")
        assert moved > 0.01 and max(distances) < TOLERANCE


def test_dora_at_a_scale_is_comfyuis(sd1: Pipeline, tmp_path: Path) -> None:
    """ComfyUI adds s (W' - W); LyCORIS rescales W + ΔV, whole at any s, so that 0 is not the model's own."""
    layer = sd1.unet.get_submodule(WIDE)
    tensors, module = train("lora", oracle := plain(layer), {"weight_decompose": True})
    path = tmp_path / "a.safetensors"
    save_file({f"lycoris_{WIDE.replace('.', '_')}" + key.removeprefix("x"): t for key, t in tensors.items()}, path)
    change = Adapters(sd1.unet, []).read(str(path)).changes[f"unet.{WIDE}"].weight
    weight, scale = oracle.weight.double(), 0.25
    up, down, m = (tensors[f"x.{k}"].double() for k in ("lora_up.weight", "lora_down.weight", "dora_scale"))
    moved = weight + up @ down * (2 / 4)
    whole = m * moved / moved.norm(dim=1, keepdim=True)
    assert change is not None
    ours = weight + scale * change.delta(oracle.weight).double()
    assert (ours - (weight + scale * (whole - weight))).abs().max() < TOLERANCE * whole.abs().max()
    theirs = moved * (scale * (m / moved.norm(dim=1, keepdim=True) - 1) + 1)
    assert (module.get_merged_weight(scale)[0] - theirs).abs().max() < TOLERANCE * whole.abs().max()
    assert (ours - theirs).abs().max() > 0.1 * whole.abs().max()


def test_inspect_names_the_kinds_of_changes(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for number, kind in enumerate(("locon, Tucker", "loha", "lokr", "dora", "full", "ia3", "glora", "oft", "boft")):
        algorithm, _, options = KINDS[kind]
        layer = nn.Conv2d(16, 16, 3) if "Tucker" in kind else nn.Linear(64, 16)
        tensors |= {
            f"lora_unet_{number}{key[1:]}": tensor for key, tensor in train(algorithm, layer, options)[0].items()
        }
    tensors["bundle_emb.word.emb_params"] = torch.zeros(2, 8)
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1", "ss_output_name": "style"})
    names = ("(IA)^3", "BOFT", "DoRA", "GLoRA", "LoCon", "LoHa", "LoKr", "OFT", "full difference")
    listed = ", ".join(f"{name} in 1 layers" for name in names)
    kind = inspect_model(tmp_path / "a.safetensors").kind
    assert kind == f"a LoRA file, {listed}, for SD 1, trained as 'style', with 1 textual inversions"
    save_file({"x.lambda_layer": torch.zeros(1, 4)}, tmp_path / "a.safetensors")
    assert inspect_model(tmp_path / "a.safetensors").kind == "T-LoRA, which is not supported"
