"""pipe.save and pipe.to: what is saved loads again bit for bit, and what cannot move says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import mezzotint
from mezzotint import CheckpointError, Pipeline, Placement, Request, RequestError
from mezzotint.weights.save_lora import save_lora

LEMON = Request(prompt="a lemon", seed=7, steps=2)


@pytest.fixture
def pipe(sd1_folder: Path) -> Pipeline:
    return mezzotint.load(sd1_folder, device="cpu")


def states(pipe: Pipeline) -> list[torch.Tensor]:
    return [
        tensor for network in (pipe.unet, pipe.vae, *pipe.text_encoders) for tensor in network.state_dict().values()
    ]


def same(pipe: Pipeline, path: Path, dtype: str = "float32") -> None:
    """The saved model has the same weights, and draws the same picture."""
    loaded = mezzotint.load(path, device="cpu", dtype=dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(states(pipe), states(loaded), strict=True))
    ours, theirs = pipe.generate(LEMON), loaded.generate(LEMON)
    assert torch.equal(ours.latents, theirs.latents) and ours.images[0].tobytes() == theirs.images[0].tobytes()
    assert ours.request == theirs.request and not loaded.edited


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_comes_back_bit_for_bit_edits_included(pipe: Pipeline, tmp_path: Path, dtype: str) -> None:
    pipe.to(dtype)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(0.9)
    pipe.scheduler_config = {**pipe.scheduler_config, "_class_name": "EulerDiscreteScheduler"}
    assert pipe.save(tmp_path / "saved") == tmp_path / "saved"
    same(pipe, tmp_path / "saved", dtype)
    pipe.save(str(tmp_path / "saved"))  # over itself
    same(pipe, tmp_path / "saved", dtype)


def test_sdxl_comes_back_as_a_folder(sdxl: Pipeline, tmp_path: Path) -> None:
    sdxl.save(tmp_path / "saved")
    loaded = mezzotint.load(tmp_path / "saved", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(states(sdxl), states(loaded), strict=True))
    # convolutions are loaded channels last, and sum in another order: 1e-6 of the largest value
    assert torch.allclose(sdxl.generate(LEMON).latents, loaded.generate(LEMON).latents, rtol=1e-4, atol=1e-3)


def test_what_belongs_to_a_model_is_saved_with_it(sd1_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sd1_folder, tmp_path / "source"))
    (source / "lora.safetensors").write_bytes(b"the LoRA")
    settings = json.loads((source / "mezzotint.json").read_text())
    settings["few_step"] = {"sampler": "lcm", "steps": 3, "guidance_scale": 1.5, "lora": "lora.safetensors"}
    (source / "mezzotint.json").write_text(json.dumps(settings))
    mezzotint.load(source, device="cpu").save(tmp_path / "saved")
    assert (tmp_path / "saved" / "lora.safetensors").read_bytes() == b"the LoRA"
    assert json.loads((tmp_path / "saved" / "mezzotint.json").read_text()) == settings


def test_merged_loras_are_saved_as_weights(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"unet": {"conv_in": (torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1))}})
    pipe.merge([(str(path), 0.5)])
    pipe.save(tmp_path / "saved")
    same(pipe, tmp_path / "saved")


def test_a_model_that_one_file_cannot_express_says_so(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save it as a folder"):
        pipe.save(tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match=r"x.ckpt cannot be written; give a name that ends in .safetensors"):
        pipe.save(tmp_path / "x.ckpt")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="file is a file; give a folder"):
        pipe.save(tmp_path / "file")
    pipe.unet.conv_in = nn.Sequential(pipe.unet.conv_in)  # type: ignore[assignment]
    with pytest.raises(RequestError, match=r"the unet cannot be saved: it has modules .*\(conv_in.0.bias"):
        pipe.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_to_casts_and_returns_the_pipeline(pipe: Pipeline, sd1_folder: Path) -> None:
    half = mezzotint.load(sd1_folder, device="cpu", dtype="bfloat16")
    assert pipe.to("bfloat16") is pipe and pipe.dtype == torch.bfloat16
    a, b = pipe.generate(LEMON), half.generate(LEMON)
    assert torch.equal(a.latents, b.latents) and a.images[0].info == b.images[0].info and not pipe.edited
    assert pipe.to("cpu", torch.bfloat16).to(device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert pipe.to(torch.float32).edited == ["unet", "vae", "text_encoder"]  # rounded, so not as in the files
    with torch.inference_mode():
        parts = [attn._project(torch.ones(1, 2, 32), attn.to_q, attn.to_k, attn.to_v) for attn in self_attentions(pipe)]
    assert parts and all(part.dtype == torch.float32 for each in parts for part in each)


def self_attentions(pipe: Pipeline) -> list[mezzotint.models.blocks.Attention]:
    return [block.attn1 for block in pipe.unet.mid_block.attentions[0].transformer_blocks]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("cuda:9", "device is 'cuda:9', which is not available"),
        (torch.float64, "dtype is torch.float64; it can be float32, bfloat16, float16"),
    ],
)
def test_to_somewhere_else_is_a_sentence(pipe: Pipeline, target: object, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        pipe.to(target)  # type: ignore[arg-type]
    assert (pipe.device.type, pipe.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize(
    "options",
    [{"placement": Placement(weights="offload")}, {"placement": Placement(storage="int8")}, {"memory": "4GiB"}],
)
def test_a_placement_that_would_not_be_kept_is_a_sentence(sd1_folder: Path, tmp_path: Path, options: object) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu", **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="the model cannot be moved: it was loaded with a placement"):
        pipe.to("bfloat16")
    if pipe.placement.storage:
        with pytest.raises(RequestError, match="the model cannot be saved: its weights are stored as int8, rounded"):
            pipe.save(tmp_path / "saved")
    else:
        pipe.save(tmp_path / "saved")
        same(pipe, tmp_path / "saved")
