"""Keys and tensors as other programs write them: scaled float8, wrappers, nested tables, other names, variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.errors import CheckpointError
from mezzotint.placement import Placement
from mezzotint.weights import inspect_model, open_model
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import vae_sources

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
ROWS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def mark(**fields: Any) -> Tensor:
    """ComfyUI's mark of a quantized layer: JSON as bytes."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def quantize(weights: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """Quantize two layers, one with a scale for each row; return what they stand for."""
    exact = {}
    for layer, dims in ((LAYER, None), (ROWS, (1,))):
        weight = weights[f"{layer}.weight"]
        scale = weight.abs().amax(dims, keepdim=dims is not None) / 448.0
        weights[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{layer}.{suffix}"] = scale
        exact[f"{layer}.weight"] = weights[f"{layer}.weight"].float() * scale
    return exact


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("placement", [Placement(), Placement(weights="stream")], ids=["resident", "stream"])
def test_scaled_float8_is_multiplied_by_its_scale(suffix: str, placement: Placement, folder: Path) -> None:
    weights = load_file(folder / UNET)
    exact = quantize(weights, suffix)
    weights |= {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), f"{LAYER}.scale_input": torch.tensor(0.1)}
    if suffix == "weight_scale":
        weights[f"{LAYER}.comfy_quant"] = mark(format="float8_e4m3fn")
    save_file(weights, folder / UNET)
    parts = open_model(folder, dtype=torch.float32, placement=placement)
    assert parts.notices == [] and inspect_model(folder).problems == []
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for name, expected in exact.items():
        layer = parts.unet.get_submodule(name.removesuffix(".weight"))
        if placement.weights == "resident":
            assert torch.equal(layer.weight, expected)  # type: ignore[arg-type]
        else:
            inputs = x[:, : expected.shape[1]]
            bias = weights.get(name.replace("weight", "bias"))
            torch.testing.assert_close(layer(inputs), torch.nn.functional.linear(inputs, expected, bias))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nowhere.scale_weight": torch.tensor(2.0)}, "nowhere.scale_weight is a scale that belongs to no weight"),
        ({f"{LAYER}.scale_weight": torch.ones(3)}, "must be one number, or one for each row"),
        ({f"{LAYER}.weight_scale_2": torch.tensor(2.0)}, "weight_scale_2 is a scale"),
        ({f"{LAYER}.comfy_quant": mark(format="int8_tensorwise", convrot=True)}, "int8_tensorwise with convrot"),
        ({f"{LAYER}.comfy_quant": torch.zeros(3)}, "no format in JSON"),
    ],
)
def test_what_would_be_ignored_is_an_error(changes: dict[str, Tensor], words: str, folder: Path) -> None:
    save_file(load_file(folder / UNET) | changes, folder / UNET)
    with pytest.raises(CheckpointError, match=words):
        open_model(folder)
    assert any(words in problem for problem in inspect_model(folder).problems)


def test_int8_and_gguf_are_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / UNET)
    weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"].to(torch.int8)
    save_file(weights, folder / UNET)
    with pytest.raises(CheckpointError, match="int8 with convrot, which is not supported"):
        open_model(folder)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="is a GGUF file, which is not supported"):
        open_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off_names(wrapper: str, tmp_path: Path) -> None:
    weights = {f"{wrapper}a.weight": torch.ones(2), f"model.{wrapper}b.submodule.weight": torch.zeros(3)}
    save_file(weights, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert {name: file.read(name).tolist() for name in file.entries} == {
        "a.weight": [1, 1],
        "model.b.submodule.weight": [0, 0, 0],
    }
    save_file(weights | {"a.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="contains a tensor twice"):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
@pytest.mark.parametrize("legacy", [False, True])
def test_nested_tables_are_the_files_own(name: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({name: {"x.weight": torch.ones(2)}, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    assert TensorFile(path).shapes == {"x.weight": (2,)}


@pytest.mark.parametrize("names", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")])
def test_diffusers_names_of_a_vaes_attention_in_a_single_file(names: tuple[str, ...]) -> None:
    shapes = {f"encoder.mid.attn_1.{name}.weight": (8, 8) for name in names}
    sources, unknown = vae_sources(shapes | {"encoder.down.0.block.0.norm1.weight": (8,)}, "sd1")
    attention = {f"encoder.mid_block.attentions.0.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert unknown == [] and attention < sources.keys()


def test_a_folder_with_other_variants_only_says_which(folder: Path) -> None:
    for variant in ("ema", "non_ema"):
        save_file(load_file(folder / UNET), folder / UNET.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    (folder / UNET).unlink()
    with pytest.raises(CheckpointError, match=r"only weights of the variants ema, non_ema.*--variant ema"):
        open_model(folder)


def test_folders_that_are_no_base_model_are_named(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for changes, words in (
        ({"_class_name": "StableUnCLIPImg2ImgPipeline"}, "is a StableUnCLIPImg2ImgPipeline, which is not supported"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(CheckpointError, match=words):
            open_model(folder)
    (folder / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(CheckpointError, match=r"contains only one network \(AutoencoderTiny\)"):
        inspect_model(folder / "vae")
