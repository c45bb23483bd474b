"""Configurations: those of published models are read, and no number of a file is used without bounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mezzotint.config import CLIPConfig, ScheduleConfig, UNetConfig, VAEConfig
from mezzotint.errors import CheckpointError
from mezzotint.weights.checkpoint import open_model, scan_model

# the numbers of hub configurations, by model
SD1 = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768, "norm_num_groups": 32, "norm_eps": 1e-05}
SD2 = SD1 | {"sample_size": 96, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
SDXL = {
    "sample_size": 128,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "time_cond_proj_dim": None,
}
PUBLISHED: list[tuple[type[Any], dict[str, Any]]] = [
    (UNetConfig, SD1),
    (UNetConfig, SD2),
    (UNetConfig, SDXL),
    (UNetConfig, SDXL | {"time_cond_proj_dim": 256}),  # LCM
    (UNetConfig, SDXL | {"transformer_layers_per_block": [0, 2, 4]}),
    (VAEConfig, {"block_out_channels": [128, 256, 512, 512], "sample_size": 512, "scaling_factor": 0.18215}),
    (VAEConfig, {"block_out_channels": [128, 256, 512, 512], "sample_size": 1024, "scaling_factor": 0.13025}),
    (VAEConfig, {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}),
    (CLIPConfig, {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408, "hidden_size": 768}),
    (CLIPConfig, {"eos_token_id": 49407, "num_hidden_layers": 32, "hidden_size": 1280, "num_attention_heads": 20}),
    (ScheduleConfig, {"beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None, "num_train_timesteps": 1000}),
    (ScheduleConfig, {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}),
]


@pytest.mark.parametrize(("kind", "fields"), PUBLISHED)
def test_published_configurations_are_read(kind: type[Any], fields: dict[str, Any]) -> None:
    kind.model_validate(fields)


@pytest.mark.parametrize("kind", [CLIPConfig, UNetConfig, VAEConfig, ScheduleConfig])
def test_every_number_has_bounds(kind: type[Any]) -> None:
    """No field accepts a huge, a negative huge or a non-finite number, alone or in a list, nor a list without end."""
    for name, field in kind.model_fields.items():
        if not any(word in str(field.annotation) for word in ("int", "float")) or "Literal" in str(field.annotation):
            continue
        values = (10**400, -(10**30), float("inf"), float("nan"), 10**12)
        for given in (*values, *([value] for value in values), [0.5] * 100_001):
            with pytest.raises(ValidationError):
                kind.model_validate({name: given})


@pytest.mark.parametrize("name", ["beta_start", "beta_end", "num_train_timesteps", "sigma_min", "sigma_data", "rho"])
def test_a_schedule_has_no_zeros(name: str) -> None:
    with pytest.raises(ValidationError):
        ScheduleConfig.model_validate({name: 0})


@pytest.fixture
def folder(sd1_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 10**9}, "steps is 1000000000; it must be a whole number from 1 to 1000"),
        ({"steps": "many"}, "steps is 'many'; it must be"),
        ({"width": 10**6}, "width is 1000000; it must be a multiple of 8"),
        ({"guidance_scale": {}}, "guidance_scale is {}; it must be"),
        ({"guidance_method": "pag"}, "guidance_method is 'pag'; it must be"),
        ({"apg_norm_threshold": -1}, "apg_norm_threshold is -1; it must be"),
    ],
)
def test_mezzotint_json_has_a_requests_types(folder: Path, settings: dict[str, Any], sentence: str) -> None:
    (folder / "mezzotint.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"mezzotint\.json: ") as error:
        scan_model(folder)
    assert sentence in str(error.value)


def test_mezzotint_json_is_converted_to_a_requests_types(folder: Path) -> None:
    (folder / "mezzotint.json").write_text(json.dumps({"steps": "7", "width": None, "anything": [1]}))
    assert scan_model(folder).settings == {"steps": 7, "anything": [1]}


def test_a_token_without_a_row(folder: Path) -> None:
    """As after adding special tokens to the tokenizer without resizing the text encoder."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    rows = json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"]
    path.write_text(json.dumps(config | {"additional_special_tokens": ["<new>"]}))
    with pytest.raises(
        CheckpointError, match=rf"gives '<new>' the id {rows}, but the table of text_encoder has {rows} "
    ):
        open_model(folder)


def test_a_shards_name_of_5000_letters(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    index = {"weight_map": {"conv_in.weight": "a" * 5000 + ".safetensors"}}
    (folder / "unet" / f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the shard 'a{100}'; a shard must be a file in the same folder"):
        scan_model(folder)
