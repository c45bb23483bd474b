"""ControlNet Union against diffusers' ControlNetUnionModel and its pipelines: residuals, files, public keys, pictures.

    PYTHONPATH=tests python tests/parity/test_controlnet_union.py

prints how far apart pictures are in every case, and how far the attention over the batch is from others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetUnionModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from safetensors.torch import save_file
from tolerances import EPS
from torch import Tensor

import pictures
import tiny
from mezzotint.config import ControlNetUnionConfig, UNetConfig
from mezzotint.models.controlnet_union import ControlNetUnion
from mezzotint.models.unet import Condition, UNet
from mezzotint.placement import Placement
from mezzotint.weights import inspect_model
from mezzotint.weights.control_files import scan_control
from pictures import Drawn, Pair, different, draw, same
from test_controlled_pictures import SIZE, blot, drawing
from test_controlnet import FULL, OF_UNET, inputs, original

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

LOUD = ("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out", "spatial_ch_projs")
TYPES = 8


def theirs(seed: int = 50, types: int = TYPES, **changes: Any) -> ControlNetUnionModel:
    """A Union for SDXL whose layers of zeros are not zero."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in tiny.UNETS["sdxl"].items() if name not in OF_UNET}
    fields |= {"num_trans_channel": 32, "num_proj_channel": 32, "conditioning_embedding_out_channels": (8, 8, 16, 16)}
    model = ControlNetUnionModel(**fields | {"num_control_type": types} | changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(LOUD):
                parameter.normal_(std=0.2)
    return model


def ours(model: ControlNetUnionModel) -> ControlNetUnion:
    network = ControlNetUnion(ControlNetUnionConfig.model_validate(dict(model.config))).eval()
    network.load_state_dict(model.state_dict(), strict=True)
    return network


def given(types: list[int], batch: int) -> tuple[dict[str, Any], Tensor, Condition, list[Tensor]]:
    """Inputs of their network for a batch of the same pictures, and of ours."""
    sample, condition, _ = inputs("sdxl")
    draw = torch.Generator().manual_seed(4)
    hints = [torch.rand(1, 3, 72, 56, generator=draw) for _ in types]
    sample, context, pooled = sample[:batch], condition.context[:batch], condition.pooled
    assert pooled is not None and condition.time_ids is not None
    marks = torch.zeros(batch, TYPES)
    marks[:, types] = 1
    named = {
        "encoder_hidden_states": context,
        "controlnet_cond": [hint.repeat(batch, 1, 1, 1) for hint in hints],
        "control_type": marks,
        "control_type_idx": types,
        "added_cond_kwargs": {"text_embeds": pooled[:batch], "time_ids": condition.time_ids[:batch]},
        "return_dict": False,
    }
    return named, sample, Condition(context, pooled[:batch], condition.time_ids[:batch]), hints


@pytest.mark.parametrize("types", [[3], [1, 6], [7, 0, 4]])
@pytest.mark.parametrize("guess", [False, True], ids=["", "guess"])
@torch.no_grad()
def test_the_residuals_are_diffusers(types: list[int], guess: bool) -> None:
    """Alone the residuals are multiplied by the scale, together the features are."""
    model = theirs()
    network = ours(model)
    named, sample, condition, hints = given(types, 2)
    scales = [0.7, 1.3, 0.5][: len(types)]
    expected = model(sample, 481, conditioning_scale=scales, guess_mode=guess, **named)
    factors = torch.logspace(-1, 0, network.residual_count).tolist() if guess else [1.0] * network.residual_count
    features = network.fuse(hints, types, scales)
    down, mid = network(
        sample, 481.0, condition, features, time_embedding=network.embed_types(types),
        scales=[factor * scales[0] for factor in factors] if len(types) == 1 else factors,
    )  # fmt: skip
    for one, other in zip((*down, mid), (*expected[0], expected[1]), strict=True):
        assert tiny.apart(one, other) < 100 * EPS


@torch.no_grad()
def attention_distances() -> dict[str, float]:
    """How far other readings of the network's attention are from diffusers' for two pictures, batch of 2."""
    model, over_tokens, types = theirs(), theirs(), [1, 6]
    for each in (model, over_tokens):
        each.task_embedding.mul_(0.1)  # so that the pictures count beside it
    named, sample, _, hints = given(types, 2)

    def middle(network: ControlNetUnionModel, rows: slice = slice(None), **changes: Any) -> Tensor:
        keys = ("encoder_hidden_states", "control_type")
        own = named | {key: named[key][rows] for key in keys} | changes
        own["controlnet_cond"] = [hint[rows] for hint in own["controlnet_cond"]]
        own["added_cond_kwargs"] = {key: value[rows] for key, value in named["added_cond_kwargs"].items()}
        result: Tensor = network(sample[rows], 481, conditioning_scale=[1.0, 1.0], **own)[1]
        return result

    both = middle(model)
    halves = torch.cat([middle(model, slice(k, k + 1)) for k in range(2)])
    other = torch.zeros(1, 3, 72, 56)
    mixed = {"controlnet_cond": [torch.cat([hint, other]) for hint in hints]}
    mixed_halves = torch.cat([middle(model, slice(k, k + 1), **mixed) for k in range(2)])
    for block in over_tokens.transformer_layes:
        block.attn.batch_first = True
    return {
        "each half alone": tiny.apart(halves, both),
        "each half alone, other pictures beside it": tiny.apart(mixed_halves, middle(model, **mixed)),
        "over the tokens": tiny.apart(middle(over_tokens), both),
    }


def test_a_picture_does_not_depend_on_its_batch() -> None:
    """As in diffusers where a batch has the same pictures; there attention over the batch is each token's to itself.

    With different pictures in a batch, and with attention over the tokens, it would be another result.
    """
    found = attention_distances()
    assert found["each half alone"] < 100 * EPS
    assert found["each half alone, other pictures beside it"] > 1e-4 and found["over the tokens"] > 1e-3


# ---- files -----------------------------------------------------------------------------------------------------------

# controlnet-union-sdxl-1.0, and its promax form; their config.json has the usual widths of the picture's convolutions
PUBLIC = FULL["sdxl"] | {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
PARAMETERS = {6: 1_255_958_800, 8: 1_256_614_800}


@pytest.mark.parametrize("types", PARAMETERS)
def test_full_size_keys_and_shapes(types: int) -> None:
    fields = PUBLIC | {"num_control_type": types}
    with torch.device("meta"):
        model, network = ControlNetUnionModel(**fields), ControlNetUnion(ControlNetUnionConfig.model_validate(fields))
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in network.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[types]
    assert expected["task_embedding"] == (types, 320)
    assert expected["control_add_embedding.linear_1.weight"] == (1280, 256 * types)
    assert expected["transformer_layes.0.attn.in_proj_weight"] == (960, 320)


@torch.no_grad()
def test_every_form_of_a_file_holds_the_same_network(tmp_path: Path) -> None:
    """A folder, also one whose config.json is that of another number of types; single files with either names."""
    model = theirs(attention_head_dim=(1, 1), norm_num_groups=32)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "folder")
    theirs(types=6, attention_head_dim=(1, 1), norm_num_groups=32).save_pretrained(tmp_path / "six")
    model.save_pretrained(tmp_path / "six" / "again")
    (tmp_path / "six" / "again" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "six" / "promax.safetensors")
    save_file(state, tmp_path / "diffusers.safetensors")
    of_union = ("task_embedding", "transformer_layes", "spatial_ch_projs", "control_add_embedding")
    renamed = {key if key.startswith(of_union) else original(key): tensor for key, tensor in state.items()}
    save_file(renamed, tmp_path / "original.safetensors")
    unet = UNetConfig.model_validate(tiny.UNETS["sdxl"] | {"attention_head_dim": (1, 1)})
    _, sample, condition, hints = given([6], 2)

    def middle(network: Any) -> Tensor:
        features = network.fuse(hints, [6], [1.0])
        mid: Tensor = network(sample, 481.0, condition, features, time_embedding=network.embed_types([6]))[1]
        return mid

    expected = middle(ours(model))
    for name in ("folder", "six/promax.safetensors", "diffusers.safetensors", "original.safetensors"):
        found = scan_control(str(tmp_path / name), unet)
        network = found.load(UNet(unet), torch.float32, torch.device("cpu"), Placement())
        assert tiny.apart(middle(network), expected) < 100 * EPS, name
        report = inspect_model(tmp_path / name)
        assert report.kind.startswith("a ControlNet Union of 8 types for Stable Diffusion XL"), name
        assert not report.problems


# ---- pictures --------------------------------------------------------------------------------------------------------

FROM_PICTURE = {"image": drawing(5), "strength": 0.6, "steps": 8}
MASKED = FROM_PICTURE | {"mask": blot(), "strength": 1.0}
ONE: dict[str, Any] = {"image": drawing(1), "type": "canny", "scale": 0.8}
DEPTH: dict[str, Any] = {"image": drawing(2, (60, 90)), "type": 1, "scale": 0.6}
# what is drawn: the entries, and other fields of the request
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one, a part of the steps": ([ONE | {"end": 0.6}], {"sampler": "euler", "count": 2}),
    "two in one": ([ONE | {"more": [DEPTH]}], {"sampler": "ddim"}),
    "two networks": ([ONE, DEPTH | {"start": 0.3}], {"sampler": "euler"}),
    "guess": ([ONE | {"mode": "guess"}], {"sampler": "dpmpp_2m"}),
    "guess, two in one": ([ONE | {"mode": "guess", "more": [DEPTH]}], {"sampler": "euler"}),
    "image to image": ([ONE | {"more": [DEPTH]}], FROM_PICTURE | {"sampler": "euler"}),
    "inpainting": ([{"type": "repaint", "scale": 0.9}], MASKED | {"sampler": "ddim"}),
}
PIPELINES = {
    "text": diffusers.StableDiffusionXLControlNetUnionPipeline,
    "picture": diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline,
    "mask": diffusers.StableDiffusionXLControlNetUnionInpaintPipeline,
}
NUMBERS = {"canny": 3, "repaint": 7}


def blackened() -> Any:
    """The input of type repaint: the picture, black where it is masked, as its authors' example has it."""
    levels = np.array(drawing(5))
    levels[np.asarray(blot()) > 127] = 0
    return pictures.Image.fromarray(levels)


def both(pair: Pair, case: str, place: Path) -> tuple[Drawn, Drawn]:
    """The picture of a case, ours and theirs."""
    entries, changes = CASES[case]
    nets = [theirs(50 + k) for k in range(len(entries))]
    for k, net in enumerate(nets):
        net.save_pretrained(place / str(k))
    request = pictures.fields(guidance_scale=6.0) | changes
    control = [{"file": place / str(k), **entry} for k, entry in enumerate(entries)]
    mine = pictures.ours(pair, request | {"control": control})

    mode, many = pictures.kind_of(request), len(nets) > 1
    for net in nets:  # in guess mode the pipelines pass the types of both halves of guidance
        plain = net.forward
        net.forward = lambda sample, *rest, control_type, plain=plain, **named: plain(
            sample, *rest, control_type=control_type[: len(sample)], **named
        )
    pipe = PIPELINES[mode](**pair.theirs.components, controlnet=MultiControlNetUnionModel(nets) if many else nets[0])
    grouped = [[entry, *entry.get("more", ())] for entry in entries]
    shown = [[one.get("image") or blackened() for one in group] for group in grouped]
    if mode != "text":
        shown = [[each.resize(SIZE, pictures.Image.Resampling.LANCZOS) for each in group] for group in shown]
    kinds = [[NUMBERS.get(one["type"], one["type"]) for one in group] for group in grouped]
    scales = [[one["scale"] for one in group] for group in grouped]
    starts, ends = ([float(entry.get(name, usual)) for entry in entries for _ in grouped[0]]
                    for name, usual in (("start", 0.0), ("end", 1.0)))  # fmt: skip
    expected = draw(
        pipe,
        pair.scheduler,
        pictures.unsized(request) if mode == "picture" else request,
        # of several networks each has one picture, which the pipelines put in a list of its own
        control_image=[one for group in shown for one in group],
        control_mode=[kind for group in kinds for kind in group],
        controlnet_conditioning_scale=[each for group in scales for each in group],
        control_guidance_start=starts,
        control_guidance_end=ends,
        guess_mode=entries[0].get("mode") == "guess",
    )
    if mode == "mask":
        pictures.only_inside(blot(), mine, expected)
    return mine, expected


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers(pairs: dict[str, Pair], case: str, tmp_path: Path) -> None:
    mine, expected = both(pairs["sdxl"], case, tmp_path)
    same(mine, expected)
    if case == "two in one":
        different(mine, pictures.ours(pairs["sdxl"], pictures.fields(guidance_scale=6.0) | CASES[case][1]))


if __name__ == "__main__":
    for name, distance in attention_distances().items():
        print(f"attention, {name}: {distance:.1e}")
    pictures.print_table("ControlNet Union", ("sdxl",), CASES, lambda pairs, family, *rest: both(pairs[family], *rest))
