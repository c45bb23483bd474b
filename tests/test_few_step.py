"""The few-step form of a model: a LoRA next to its mezzotint.json, merged if the solver that it was made for runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mezzotint
from mezzotint import CheckpointError, Pipeline, Request
from mezzotint.models.adapters import Changes, LayerChange, LowRank, merge_copy
from mezzotint.models.unet import Condition, UNet
from mezzotint.weights import inspect_model
from mezzotint.weights.lora import read_unet_lora
from mezzotint.weights.save_lora import save_lora

RANK = 4
FEW_STEP = {"sampler": "lcm", "steps": 3, "guidance_scale": 1.5, "lora": "lcm_lora.safetensors"}
LEMON = Request(prompt="a lemon", seed=7, count=2)


Pairs = dict[str, tuple[Tensor, Tensor]]


def layers(unet: UNet) -> dict[str, nn.Linear | nn.Conv2d]:
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def changes(pairs: Pairs) -> Changes:
    return {f"unet.{name}": [(LayerChange(LowRank(*pair)), 1.0)] for name, pair in pairs.items()}


def save(path: Path, pairs: Pairs, dtype: torch.dtype = torch.float16) -> None:
    save_lora(path, {"unet": pairs}, dtype)


def random_lora(unet: UNet, scale: float = 1.0) -> Pairs:
    """A change of rank 4 to every layer, about `scale` times as large as the weight."""
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, layer in layers(unet).items():
        weight = layer.weight
        down = torch.randn((RANK, *weight.shape[1:]), generator=generator)
        up = torch.randn((len(weight), RANK, *(1 for _ in weight.shape[2:])), generator=generator)
        lora[name] = down, scale * up * weight.std() / RANK**0.5
    return lora


@pytest.fixture
def folder(sd1_folder: Path, sd1: Pipeline, tmp_path: Path) -> Path:
    """The tiny model with a few-step form: 3 steps of lcm, guidance 1.5."""
    path = Path(shutil.copytree(sd1_folder, tmp_path / "tiny"))
    save(path / "lcm_lora.safetensors", random_lora(sd1.unet), torch.float32)
    settle(path, FEW_STEP)
    return path


def settle(folder: Path, few_step: Any) -> None:
    settings = json.loads((folder / "mezzotint.json").read_text()) | {"few_step": few_step}
    (folder / "mezzotint.json").write_text(json.dumps(settings))


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ---- the file and the merged UNet ------------------------------------------------------------------------------------


def test_what_is_written_is_read(sd1: Pipeline, tmp_path: Path) -> None:
    lora = random_lora(sd1.unet)
    save(tmp_path / "lora.safetensors", lora, torch.float32)
    read = read_unet_lora(tmp_path / "lora.safetensors", sd1.unet)
    assert read.keys() == changes(lora).keys()
    for name, (down, up) in lora.items():
        ((change, scale),) = read[f"unet.{name}"]
        assert isinstance(change.weight, LowRank) and change.bias is None and scale == change.weight.factor == 1.0
        assert torch.equal(change.weight.down, down) and torch.equal(change.weight.up, up)
    save(tmp_path / "half.safetensors", lora)
    size = sum(2 * tensor.numel() for pair in lora.values() for tensor in pair)
    assert size < (tmp_path / "half.safetensors").stat().st_size < size + 200 * len(lora) * 2


def test_merged_weights_are_the_sum_and_the_rest_is_shared(sd1: Pipeline) -> None:
    lora = {name: pair for name, pair in random_lora(sd1.unet).items() if "attn2" not in name}
    before = {name: p.clone() for name, p in sd1.unet.named_parameters()}
    second = merge_copy(sd1.unet, changes(lora))
    first = dict(sd1.unet.named_parameters())
    for name, parameter in second.named_parameters():
        layer, _, leaf = name.rpartition(".")
        assert torch.equal(first[name], before[name]) and not parameter.requires_grad
        if leaf == "weight" and layer in lora:
            down, up = lora[layer]
            change = torch.einsum("or,r...->o...", up.flatten(1), down)
            torch.testing.assert_close(parameter, before[name] + change)
            assert parameter.stride() == first[name].stride(), name
        else:
            assert parameter.data_ptr() == first[name].data_ptr(), name


def test_fusing_the_second_unet_leaves_the_first_fused(sd1: Pipeline) -> None:
    queries = {name: pair for name, pair in random_lora(sd1.unet).items() if name.endswith("attn1.to_q")}
    pointers = [p.data_ptr() for p in sd1.unet.parameters()]
    merge_copy(sd1.unet, changes(queries)).fuse_projections()
    assert queries and pointers == [p.data_ptr() for p in sd1.unet.parameters()]


# ---- drawing with it -------------------------------------------------------------------------------------------------


def test_lcm_draws_with_the_change_and_its_own_defaults(folder: Path, sd1: Pipeline) -> None:
    pipe = mezzotint.load(folder, device="cpu")
    result = pipe.generate(LEMON.replace(sampler="lcm"))
    assert (result.request.steps, result.request.guidance_scale) == (3, 1.5)
    plain = sd1.generate(LEMON.replace(sampler="lcm", steps=3, guidance_scale=1.5)).latents
    assert error(result.latents, plain) > 0.1  # the change is heard

    settings = json.loads((folder / "mezzotint.json").read_text())
    del settings["few_step"]
    (folder / "mezzotint.json").write_text(json.dumps(settings))
    whole = mezzotint.load(folder, device="cpu")
    unet, lora = whole.unet, random_lora(sd1.unet)
    with torch.no_grad():
        for name, layer in layers(unet).items():
            down, up = lora[name]
            layer.weight += torch.einsum("or,r...->o...", up.flatten(1), down)
    expected = whole.generate(LEMON.replace(sampler="lcm", steps=3, guidance_scale=1.5)).latents
    assert error(result.latents, expected) < 1e-4

    record = json.loads(result.images[0].info["mezzotint"])
    assert record["model"]["lora"] == "lcm_lora.safetensors"
    asked = pipe.generate(LEMON.replace(sampler="LCM", steps=2, guidance_scale=1.0)).request
    assert (asked.steps, asked.guidance_scale) == (2, 1.0)
    assert pipe.resolve(LEMON.replace(sampler="LCM")).steps == 3  # A1111's name for the same solver


def test_the_second_unet_is_made_once(folder: Path) -> None:
    pipe = mezzotint.load(folder, device="cpu")
    few = LEMON.replace(sampler="lcm")
    plain, fast = pipe.plan(LEMON), pipe.plan(few)
    assert pipe.unet_for(plain) is pipe.unet and pipe.unet_for(fast) is pipe.unet_for(fast) is not pipe.unet


def test_with_a_hook_the_first_unet_runs_itself(folder: Path) -> None:
    pipe, few, calls = mezzotint.load(folder, device="cpu"), LEMON.replace(sampler="lcm"), []
    merged = pipe.generate(few).latents
    hook = pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,operator]
    applied = pipe.generate(few).latents
    assert len(calls) == 2 * 3 and error(applied, merged) < 1e-4  # two pictures of three steps
    hook.remove()
    assert torch.equal(pipe.generate(few).latents, merged) and len(calls) == 2 * 3


@pytest.mark.parametrize("edit", ["in place", "load_state_dict", "parameter", "module", "assign", "data"])
def test_the_second_unet_follows_edited_weights(folder: Path, edit: str) -> None:
    pipe, fresh = (mezzotint.load(folder, device="cpu") for _ in range(2))
    few = LEMON.replace(sampler="lcm")
    before = pipe.generate(few).latents
    with torch.no_grad():
        for each in (pipe, fresh):
            layer, halved = each.unet.conv_in, {"weight": each.unet.conv_in.weight / 2, "bias": each.unet.conv_in.bias}
            if each is fresh or edit == "in place":
                layer.weight.div_(2)
            elif edit == "parameter":
                layer.weight = nn.Parameter(halved["weight"])
            elif edit == "module":
                each.unet.conv_in = type(layer)(4, 16, 3, padding=1).to(memory_format=torch.channels_last)
                each.unet.conv_in.load_state_dict(halved)
            elif edit == "data":
                layer.weight.data.div_(2)
            else:
                layer.load_state_dict(halved, assign=edit == "assign")
    after = pipe.generate(few).latents
    assert error(after, before) > 0.01 and torch.equal(after, fresh.generate(few).latents)


def test_other_samplers_are_as_they_were(folder: Path, sd1: Pipeline) -> None:
    pipe = mezzotint.load(folder, device="cpu")
    pipe.generate(LEMON.replace(sampler="lcm"))
    for sampler in (None, "tcd", "euler_a"):
        request = LEMON.replace(sampler=sampler)
        result, expected = pipe.generate(request), sd1.generate(request)
        assert torch.equal(result.latents, expected.latents) and result.request == expected.request
        keys = json.loads(result.images[0].info["mezzotint"])["model"].keys()
        assert keys - {"kernels"} == {"name", "family", "files", "device", "dtype", "threads"}


def test_models_without_the_field_are_as_they_were(sd1: Pipeline) -> None:
    resolved = sd1.resolve(LEMON.replace(sampler="lcm"))
    assert (resolved.steps, resolved.guidance_scale) == (4, 1.0)  # the scheduler's own
    image = sd1.generate(LEMON.replace(sampler="lcm")).images[0]
    assert "lora" not in json.loads(image.info["mezzotint"])["model"]


def test_the_file_is_part_of_the_models_identity(folder: Path) -> None:
    pipe = mezzotint.load(folder, device="cpu")
    assert "lcm_lora.safetensors" in pipe.parts.identity


# ---- what is wrong with it -------------------------------------------------------------------------------------------


def draw(folder: Path) -> None:
    mezzotint.load(folder, device="cpu").generate(LEMON.replace(sampler="lcm"))


def test_a_missing_file_stops_only_what_needs_it(folder: Path) -> None:
    (folder / "lcm_lora.safetensors").unlink()
    mezzotint.load(folder, device="cpu").generate(LEMON)
    with pytest.raises(CheckpointError, match=r"lcm_lora\.safetensors is missing: mezzotint\.json names it"):
        draw(folder)


def test_a_foreign_or_damaged_file_is_refused(folder: Path, sd1: Pipeline) -> None:
    path, lora = folder / "lcm_lora.safetensors", random_lora(sd1.unet)
    save(path, {**lora, "another.layer": next(iter(lora.values()))})
    with pytest.raises(CheckpointError, match=r"match no layer of this UNet: unet\.another\.layer"):
        draw(folder)
    name = "mid_block.resnets.0.conv1"
    save(path, lora | {name: (lora[name][0][:, :3], lora[name][1])})
    with pytest.raises(
        CheckpointError, match=r"does not fit this model.*unet\.mid_block\.resnets\.0\.conv1, whose weight is"
    ):
        draw(folder)
    save(path, lora | {name: (lora[name][0], lora[name][1][:, :3])})
    with pytest.raises(CheckpointError, match="different ranks"):
        draw(folder)
    save_file({f"unet.{name}.lora_A.weight": lora[name][0]}, path)
    with pytest.raises(CheckpointError, match=r"unet\.mid_block\.resnets\.0\.conv1.*up missing"):
        draw(folder)
    save(path, lora)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"lcm_lora\.safetensors"):
        draw(folder)


@pytest.mark.parametrize(
    ("few_step", "where"),
    [
        ("lcm", "few_step: "),
        (FEW_STEP | {"sampler": "lcmm"}, r"few_step\.sampler: .*'lcmm' is not a solver"),
        (FEW_STEP | {"steps": 0}, r"few_step\.steps: "),
        (FEW_STEP | {"guidance_scale": 0.5}, r"few_step\.guidance_scale: "),
        (FEW_STEP | {"lora": "../other.safetensors"}, r"few_step\.lora: "),
        (FEW_STEP | {"rank": 4}, r"few_step\.rank: "),
        ({"sampler": "lcm"}, r"few_step\.steps: "),
    ],
)
def test_settings_that_are_wrong_are_named(folder: Path, few_step: Any, where: str) -> None:
    settle(folder, few_step)
    with pytest.raises(CheckpointError, match=r"mezzotint\.json has an invalid " + where):
        mezzotint.load(folder, device="cpu")
    assert "has an invalid few_step" in inspect_model(folder).problems[0]


# ---- against the ecosystem -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_diffusers_reads_the_file_and_draws_the_same(folder: Path) -> None:
    from diffusers import LCMScheduler, StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(folder)
    peer.set_progress_bar_config(disable=True)
    peer.scheduler = LCMScheduler.from_config(peer.scheduler.config)
    peer.load_lora_weights(folder, weight_name="lcm_lora.safetensors")
    pipe = mezzotint.load(folder, device="cpu")
    size = {"width": 32, "height": 32}
    for steps, scale in ((3, 1.5), (4, 1.0)):
        options = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent", **size}
        theirs = peer("a lemon", generator=torch.Generator().manual_seed(7), **options).images
        ours = pipe.generate(
            Request(prompt="a lemon", seed=7, steps=steps, guidance_scale=scale, sampler="lcm", **size)
        )
        assert error(ours.latents, theirs) < 1e-4


def test_the_unet_with_adapters_of_peft_is_the_merged_one(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    peer = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    peer.load_lora_adapter(folder / "lcm_lora.safetensors", prefix="unet")
    pipe = mezzotint.load(folder, device="cpu")
    lora = read_unet_lora(folder / "lcm_lora.safetensors", pipe.unet)
    generator = torch.Generator().manual_seed(0)
    sample, context = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.inference_mode():
        ours = merge_copy(pipe.unet, lora)(sample, 500.0, Condition(context))
        theirs = peer(sample, 500, context).sample
    assert error(ours, theirs) < 1e-4


def test_a_lora_imports_no_compiler() -> None:
    """torch._dynamo and sympy take 2 s and 70 MB."""
    script = """
import sys
import mezzotint
mezzotint.load(device="cpu").generate(mezzotint.Request("a lemon", sampler="lcm", steps=1))
found = {"torch._dynamo", "sympy"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", script], check=True)
