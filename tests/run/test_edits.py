"""Hooks, replaced modules and edited weights mean what they mean in PyTorch, whatever is fused, merged or cached."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_unet
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mezzotint
from mezzotint import Pipeline, Placement, Request, RequestError
from mezzotint.again import again, read_source
from mezzotint.models.blocks import Attention
from mezzotint.models.edits import Snapshot
from mezzotint.weights.save_lora import save_lora

LEMON = Request(prompt="a lemon", seed=7, steps=2)
PROJECTIONS = [f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")]


@pytest.fixture
def pipe(sd1: Pipeline) -> Pipeline:
    """A tiny model of the test's own, which it may edit."""
    return copy.deepcopy(sd1)


def latents(pipe: Pipeline, request: Request = LEMON) -> Tensor:
    return [*pipe.stream(request)][-1].x


def block(pipe: Pipeline) -> nn.Module:
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0]  # type: ignore[union-attr,index,return-value]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of float32's sums, which a matmul of three layers and three of one differ in."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def edited(pipe: Pipeline) -> list[str]:
    model = json.loads(pipe.generate(LEMON.replace(steps=1)).images[0].info["mezzotint"])["model"]
    return model.get("edited", [])  # type: ignore[no-any-return]


class Doubled(nn.Linear):
    """A layer of a user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", PROJECTIONS)
def test_each_projection_calls_its_hooks_and_does_what_they_say(pipe: Pipeline, name: str) -> None:
    layer, calls = block(pipe).get_submodule(name), []
    plain = latents(pipe)
    before = layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    after = layer.register_forward_hook(lambda layer, inputs, output: calls.append("after") or 2 * output)
    hooked = latents(pipe)
    assert calls == ["before", "after"] * 2  # at each step, also what is else computed once a run
    assert pipe.edited == ["unet"]
    before.remove()
    after.remove()
    assert torch.equal(latents(pipe), plain) and not pipe.edited
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    assert close(hooked, latents(pipe)) and not close(hooked, plain)


def test_a_hook_that_changes_in_the_course_of_a_run_is_heard(pipe: Pipeline) -> None:
    steps = []
    block(pipe).attn2.to_k.register_forward_hook(lambda *_: steps.append(1))  # type: ignore[union-attr,operator]
    for k, _ in enumerate(pipe.stream(LEMON), start=1):
        assert len(steps) == k


@pytest.mark.parametrize("kind", ["class", "parametrization", "forward", "global hook", "bias", "weight"])
@pytest.mark.parametrize("name", ["attn1.to_v", "attn2.to_v"])
def test_a_projection_of_another_kind_is_called(pipe: Pipeline, name: str, kind: str) -> None:
    plain, (where, _, leaf) = latents(pipe), name.partition(".")
    parent, layer = getattr(block(pipe), where), block(pipe).get_submodule(name)
    with torch.no_grad():
        layer.weight.mul_(2)  # type: ignore[union-attr,operator]
        expected = latents(pipe)
        layer.weight.div_(2)  # type: ignore[union-attr,operator]
    hook = None
    if kind == "class":
        other = Doubled(layer.in_features, layer.out_features, bias=False)  # type: ignore[arg-type]
        other.load_state_dict(layer.state_dict())
        setattr(parent, leaf, other)
    elif kind == "parametrization":
        parametrize.register_parametrization(layer, "weight", Double())
    elif kind == "forward":
        layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)  # type: ignore[method-assign,arg-type]
    elif kind == "global hook":
        hook = nn.modules.module.register_module_forward_hook(lambda m, _, y: 2 * y if m is layer else None)
    elif kind == "weight":
        layer.weight = nn.Parameter(2 * layer.weight.detach())  # type: ignore[operator,union-attr]
    else:  # a bias of a third of the output's size
        layer.bias = nn.Parameter(torch.ones(layer.out_features))  # type: ignore[call-overload]
    try:
        found = latents(pipe)
    finally:
        if hook:
            hook.remove()
    assert not close(found, plain)
    assert kind == "bias" or close(found, expected)
    assert kind == "global hook" or pipe.edited == ["unet"]


@pytest.mark.parametrize("edit", ["in place", "data", "load_state_dict", "assign"])
def test_edited_weights_are_seen_in_every_network(pipe: Pipeline, sd1: Pipeline, edit: str) -> None:
    for part in ("text_encoders", "unet", "vae"):
        image = pipe(LEMON.prompt, seed=7, steps=1)
        for network in getattr(pipe, part) if part == "text_encoders" else [getattr(pipe, part)]:
            with torch.no_grad():
                state = {name: 0.9 * tensor for name, tensor in network.state_dict().items()}
                if edit == "in place":
                    for parameter in network.parameters():
                        parameter.mul_(0.9)
                elif edit == "data":
                    for parameter in network.parameters():
                        parameter.data.mul_(0.9)
                else:
                    network.load_state_dict(state, assign=edit == "assign")
        other = copy.deepcopy(pipe)
        found = pipe(LEMON.prompt, seed=7, steps=1)
        assert found.tobytes() == other(LEMON.prompt, seed=7, steps=1).tobytes() != image.tobytes()
    assert edited(pipe) == ["unet", "vae", "text_encoder"] == edited(other) and not edited(sd1)


def test_single_elements_written_through_data_need_refresh_and_one_layer_does_not(pipe: Pipeline) -> None:
    pipe.unet.conv_in.weight.data.mul_(0)
    assert pipe.edited == ["unet"]
    pipe.refresh()
    assert pipe.edited == ["unet", "vae", "text_encoder"]


def test_weights_of_keys_that_are_edited_during_a_run_are_used_from_then_on(pipe: Pipeline) -> None:
    weight, found = block(pipe).attn2.to_v.weight, []  # type: ignore[union-attr]
    for first, last in ((1.0, 1.0), (1.0, 3.0)):
        for step in pipe.stream(LEMON):
            with torch.no_grad():
                weight.mul_(last / first if step.index == 0 else 1.0)  # type: ignore[operator]
        found.append(step.x)
    assert not close(*found)


def test_a_text_encoder_calls_its_hooks_at_each_call_and_then_is_cached_again(pipe: Pipeline) -> None:
    plain, calls = latents(pipe), []
    layer = pipe.text_encoders[0].text_model.encoder.layers[1].self_attn.q_proj  # type: ignore[union-attr]
    hook = layer.register_forward_hook(lambda _, __, y: calls.append(1) or 0 * y)  # type: ignore[operator,union-attr]
    found = [latents(pipe) for _ in range(2)]
    assert len(calls) == 4 and torch.equal(*found) and not close(found[0], plain)  # the prompt and the negative one
    hook.remove()
    assert torch.equal(latents(pipe), plain)


def test_blocks_of_the_vae_call_their_hooks(pipe: Pipeline) -> None:
    calls, plain = [], pipe(LEMON.prompt, seed=7)
    for half in (pipe.vae.encoder.down_blocks, pipe.vae.decoder.up_blocks):
        half[1].register_forward_hook(lambda module, *_: calls.append(module))
    assert pipe(LEMON.prompt, seed=7).tobytes() == plain.tobytes()
    pipe.encode_image(plain)
    assert calls == [pipe.vae.decoder.up_blocks[1], pipe.vae.encoder.down_blocks[1]]


@pytest.mark.parametrize("mode", ["strips", "tiles"])
def test_a_vae_in_pieces_refuses_a_hook(sd1_folder: Path, mode: str) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu", placement=Placement(vae=mode))  # type: ignore[arg-type]
    pipe.vae.decoder.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(RequestError, match=f"vae='{mode}' of the placement does not call"):
        pipe.generate(LEMON)


def test_other_modules_in_place_of_a_blocks_are_used_and_take_loras(pipe: Pipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    save_lora(tmp_path / "lora.safetensors", {"unet": {path: (torch.randn(2, 32), torch.randn(32, 2))}})
    request = LEMON.replace(loras=[(str(tmp_path / "lora.safetensors"), 1.0)])
    plain, with_lora = latents(pipe), latents(pipe, request)
    other = copy.deepcopy(block(pipe))
    for attn in (module for module in other.modules() if isinstance(module, Attention)):
        attn.to_v = Doubled(attn.to_v.in_features, attn.to_v.out_features, bias=False)
        attn.to_v.weight.requires_grad_(False).normal_()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0] = other  # type: ignore[union-attr,operator,index]
    resnet = copy.deepcopy(pipe.unet.up_blocks[0].resnets[0])  # type: ignore[union-attr,index]
    resnet.time_emb_proj.weight.detach().mul_(3)
    pipe.unet.up_blocks[0].resnets[0] = resnet  # type: ignore[union-attr,operator,index]
    changed, both = latents(pipe), latents(pipe, request)
    assert not any(close(a, b) for a, b in ((changed, plain), (both, changed), (both, with_lora)))
    twin = mezzotint.load(pipe.parts.source, device="cpu")
    twin.unet = pipe.unet
    assert torch.equal(latents(twin), changed) and torch.equal(latents(twin, request), both)


def test_another_unet_is_seen_everywhere(pipe: Pipeline, sd1: Pipeline, tmp_path: Path) -> None:
    other = tiny_unet(9)
    pipe.unet = other  # type: ignore[assignment]
    assert pipe.unet is other and edited(pipe) == ["unet"] and not edited(sd1)
    found = latents(pipe)
    with torch.no_grad():
        for parameter, own in zip(other.parameters(), sd1.unet.parameters(), strict=True):
            parameter.copy_(own)
    assert close(latents(pipe), latents(sd1)) and not close(found, latents(sd1))

    path = tmp_path / "lemon.png"
    pipe.generate(LEMON).save(path)
    with pytest.raises(RequestError, match="with a unet that had been edited or replaced in memory"):
        again(sd1, read_source(path))
    (same,) = again(pipe, read_source(path))
    assert same.info["mezzotint"] == pipe.generate(LEMON).images[0].info["mezzotint"]
    assert len(again(sd1, read_source(path), {"steps": 2})) == 1  # another picture anyway


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            nn.Linear(1, 1),
            "unet is a torch.nn.modules.linear.Linear; it must be the UNet of mezzotint.models.unet, or",
        ),
        (tiny_unet(0, cross_attention_dim=24), "cross_attention_dim 24, but the text encoders are 16 wide"),
        (tiny_unet(0, in_channels=8, out_channels=8), "the UNet has 8 out_channels, but the VAE 4 latent_channels"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(pipe: Pipeline, given: nn.Module, sentence: str) -> None:
    own = pipe.unet
    with pytest.raises(RequestError, match=sentence):
        pipe.unet = given  # type: ignore[assignment]
    assert pipe.unet is own and not pipe.edited


@pytest.mark.parametrize("options", [{"placement": Placement(weights="offload")}, {"memory": "4GiB"}])
def test_a_placement_that_another_network_would_not_keep_is_a_sentence(sd1_folder: Path, options: object) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu", **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="unet cannot be replaced: it was loaded with a placement or a memory"):
        pipe.unet = tiny_unet(9)  # type: ignore[assignment]


def test_merged_loras_are_no_edit_and_prevent_a_replacement(pipe: Pipeline, tmp_path: Path) -> None:
    layer = "conv_in"
    save_lora(tmp_path / "lora.safetensors", {"unet": {layer: (torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1))}})
    pipe.merge([(str(tmp_path / "lora.safetensors"), 0.5)])
    assert not edited(pipe)
    with pytest.raises(RequestError, match="unet cannot be replaced while LoRA files are merged; call unmerge"):
        pipe.unet = tiny_unet(9)  # type: ignore[assignment]
    pipe.unmerge()
    assert not edited(pipe)


@pytest.mark.parametrize("weight", [torch.randn(64, 64), torch.randn(64, 128)[:, ::2], torch.randn(64, 64).t()])
def test_a_part_that_is_written_through_data_shows(weight: Tensor) -> None:
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(weight)
    for part in (slice(32), slice(32, 64)):
        snapshot = Snapshot(layer)
        assert snapshot.matches(layer)
        layer.weight.data[part] += 1
        assert not snapshot.matches(layer)
