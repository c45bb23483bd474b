"""Folders that save_folder writes: read back by us, by diffusers and transformers, and never half-written."""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.errors import CheckpointError, WriteError
from mezzotint.weights import open_model, save_folder


def save(folder: Path, model: Any, **options: Any) -> Path:
    parts = {name: getattr(model, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    defaults: dict[str, Any] = {"scheduler_config": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}}
    save_folder(folder, **parts, **defaults | options)
    return folder


def test_shards_are_no_larger_than_asked(tiny_model: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", tiny_model, dtype=torch.float32, shard_bytes=100_000)
    shards = sorted(folder.glob("unet/*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 100_000 + 10_000 for path in shards)  # and the header
    index = json.loads((folder / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    parts = open_model(folder)
    for name, tensor in parts.unet.state_dict().items():
        assert torch.equal(tensor, tiny_model.unet.state_dict()[name])


def test_half_precision_is_the_default(tiny_model: Any, tmp_path: Path) -> None:
    parts = open_model(save(tmp_path / "m", tiny_model))
    assert parts.unet.conv_in.weight.dtype == torch.float16
    assert parts.settings == {}


def test_saving_again_replaces_the_weights_and_leaves_other_files(tiny_model: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", tiny_model, shard_bytes=20_000)
    (folder / "README.md").write_text("a card")
    save(folder, tiny_model)
    assert [path.name for path in folder.glob("unet/*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert (folder / "README.md").read_text() == "a card"
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_file_mode_follows_the_umask(tiny_model: Any, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = save(tmp_path / "m", tiny_model)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, mode)
    assert any(name.endswith(".safetensors") for name in modes)


def test_a_failed_save_leaves_the_old_model(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "m", tiny_model)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mezzotint.weights.save_tensors.save_file", disk_full)
    with pytest.raises(WriteError, match="cannot be written: No space left on device"):
        save(folder, tiny_model)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_scheduler_needs_its_class(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="_class_name"):
        save(tmp_path / "m", tiny_model, scheduler_config={})
    assert not (tmp_path / "m").exists()


def test_a_place_that_cannot_be_written(tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"):
        save(tmp_path / "file", tiny_model)


@pytest.mark.parametrize("shard_bytes", [15_000_000, 30_000])
def test_diffusers_loads_the_folder(shard_bytes: int, tiny_model: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = save(tmp_path / "m", tiny_model, dtype=torch.float32, shard_bytes=shard_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    theirs = pipe.text_encoder.state_dict()
    theirs = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in theirs.items()}
    for ours, other in (
        (tiny_model.unet.state_dict(), pipe.unet.state_dict()),
        (tiny_model.vae.state_dict(), pipe.vae.state_dict()),
        (tiny_model.text_encoder.state_dict(), theirs),
    ):
        assert ours.keys() == {key for key in other if not key.endswith("position_ids")}
        assert all(torch.equal(ours[key], other[key]) for key in ours)

    window = tiny_model.tokenizer.window(tiny_model.tokenizer.encode("a lemon"))
    assert pipe.tokenizer("a lemon", padding="max_length", max_length=77)["input_ids"] == window
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    ids, z = torch.tensor([window]), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, pooled = tiny_model.text_encoder(ids)
        other = pipe.text_encoder(ids)
        torch.testing.assert_close(hidden, other[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled, other[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tiny_model.vae.decode(z), pipe.vae.decode(z).sample, rtol=1e-4, atol=1e-5)
        from mezzotint.models.unet import Condition

        ours = tiny_model.unet(z, torch.tensor([7]), Condition(hidden))
        torch.testing.assert_close(ours, pipe.unet(z, 7, hidden).sample, rtol=1e-4, atol=1e-5)
