"""Folders and single files that open, those that are refused, and what `inspect_model` says of both."""

from __future__ import annotations

import errno
import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mezzotint
from mezzotint.errors import CheckpointError
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.weights import inspect_model, open_model
from mezzotint.weights.files import TensorFile
from mezzotint.weights.keys import unet_config
from mezzotint.weights.single import plan_file


def same(ours: nn.Module, theirs: nn.Module, tolerance: float = 0.0) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=tolerance, atol=tolerance)


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        open_model(path, **options)
    return str(error.value)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


# Folders


def test_a_folder_opens(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("a local path reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    parts = open_model(str(tiny_model.folder))
    same(parts.unet, tiny_model.unet)
    same(parts.vae, tiny_model.vae)
    same(parts.text_encoders[0], tiny_model.text_encoder)
    assert parts.family == "sd1"
    assert parts.settings == {"size": 16, "steps": 4}
    assert parts.scheduler_config["prediction_type"] == "v_prediction"
    assert parts.model_index["_class_name"] == "StableDiffusionPipeline"
    assert parts.tokenizers[0].encode("a lemon") == tiny_model.tokenizer.encode("a lemon")
    assert not parts.unet.training
    assert parts.unet.conv_in.weight.requires_grad
    assert not any(tensor.is_meta for tensor in parts.unet.state_dict().values())


def test_convolutions_are_channels_last_and_dtypes_as_asked(tiny_model: Any) -> None:
    parts = open_model(tiny_model.folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in parts.unet.parameters()} == {torch.bfloat16}
    assert parts.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert parts.vae.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    same(parts.vae, tiny_model.vae, tolerance=0.01)


def test_a_part_keeps_what_most_of_its_weights_are(folder: Path) -> None:
    def halve(weights: dict[str, Tensor]) -> None:
        for name in weights:
            if "norm" not in name:
                weights[name] = weights[name].half()

    rewrite(folder / "unet/diffusion_pytorch_model.safetensors", halve)
    parts = open_model(folder)
    assert {tensor.dtype for tensor in parts.unet.parameters()} == {torch.float16}
    assert {tensor.dtype for tensor in parts.vae.parameters()} == {torch.float32}


def test_identity_is_the_hash_of_every_file(tiny_model: Any) -> None:
    parts = open_model(tiny_model.folder)
    weights = tiny_model.folder / "unet/diffusion_pytorch_model.safetensors"
    assert (
        parts.identity["unet/diffusion_pytorch_model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "mezzotint.json"):
        assert name in parts.identity
    assert any(name.startswith("tokenizer/") for name in parts.identity)


def split(part: Path, stem: str, variant: str = "", suffix: str = "safetensors") -> None:
    """One weights file -> two shards and an index, as diffusers names them."""
    whole = part / f"{stem}.safetensors"
    weights = load_file(whole)
    whole.unlink()
    names, where = sorted(weights), {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}{variant}-{number:05}-of-00002.{suffix}"
        save_file({name: weights[name] for name in half}, part / shard)
        where |= dict.fromkeys(half, shard)
    index = part / f"{stem}.{suffix}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_sharded(variant: str, folder: Path, tiny_model: Any) -> None:
    for name, stem in PARTS.items():
        split(folder / name, stem, variant)
    parts = open_model(folder, variant=variant[1:] or None)
    same(parts.unet, tiny_model.unet)
    same(parts.text_encoders[0], tiny_model.text_encoder)
    same(open_model(folder).unet, tiny_model.unet)  # fp16 is what exists


def test_variant(folder: Path) -> None:
    for name, stem in PARTS.items():
        weights = load_file(folder / name / f"{stem}.safetensors")
        save_file({key: value.half() for key, value in weights.items()}, folder / name / f"{stem}.fp16.safetensors")
    assert open_model(folder).unet.conv_in.weight.dtype == torch.float32
    assert open_model(folder, variant="fp16").unet.conv_in.weight.dtype == torch.float16
    assert "no files of the variant 'ema'" in refused(folder, variant="ema")


def test_bin(folder: Path, tiny_model: Any) -> None:
    for name, stem in PARTS.items():
        path = folder / name / f"{stem}.safetensors"
        torch.save(load_file(path), folder / name / f"{'pytorch_model' if stem == 'model' else stem}.bin")
        path.unlink()
    parts = open_model(folder)
    same(parts.unet, tiny_model.unet)
    same(parts.text_encoders[0], tiny_model.text_encoder)


def test_old_and_new_spellings(folder: Path, tiny_model: Any) -> None:
    def without_prefix(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("text_model.")] = weights.pop(name)
        weights["embeddings.position_ids"] = torch.arange(77)[None]
        weights["text_projection.weight"] = torch.eye(16)

    def old_vae(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            new = name
            for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                new = new.replace(now, before)
            weights[new] = weights.pop(name)

    rewrite(folder / "text_encoder/model.safetensors", without_prefix)
    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", old_vae)
    parts = open_model(folder)
    same(parts.text_encoders[0], tiny_model.text_encoder)
    same(parts.vae, tiny_model.vae)


def test_parts_that_drawing_does_not_need_are_passed_over(folder: Path) -> None:
    edit(
        folder / "model_index.json",
        lambda index: index.update(
            image_encoder=["transformers", "CLIPVisionModelWithProjection"],
            feature_extractor=["transformers", "CLIPImageProcessor"],  # read with a safety checker
        ),
    )
    (folder / "image_encoder").mkdir()
    open_model(folder)
    assert inspect_model(folder).passed_over == [
        "image_encoder (CLIPVisionModelWithProjection): not needed to generate pictures"
    ]


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(name: str, folder: Path) -> None:
    (folder / name).rename(folder / "elsewhere")
    message = refused(folder)
    assert str(folder / name) in message
    assert "missing" in message
    assert message in inspect_model(folder).problems


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert f"{folder / 'vae'} has no weights" in refused(folder)
    split(folder / "unet", PARTS["unet"])
    (folder / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "diffusion_pytorch_model-00002-of-00002.safetensors is missing" in refused(folder)
    (folder / "unet/config.json").unlink()
    assert f"{folder / 'unet/config.json'} is missing" in refused(folder)


def test_wrong_missing_and_foreign_tensors_are_named(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    rewrite(weights, lambda table: table.update({"conv_in.weight": torch.ones(16, 4, 5, 5)}))
    assert "conv_in.weight has shape (16, 4, 5, 5); by its config it must be (16, 4, 3, 3)" in refused(folder)
    rewrite(weights, lambda table: table.update({"conv_in.weight": torch.ones(16, 4, 3, 3, dtype=torch.int32)}))
    assert "conv_in.weight is int32" in refused(folder)
    rewrite(weights, lambda table: table.pop("conv_in.weight"))
    assert "lacks conv_in.weight" in refused(folder)


def test_tensors_that_no_layer_uses_are_a_notice(folder: Path, tiny_model: Any) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    rewrite(weights, lambda table: table.update({"motion.w": torch.ones(1)}))
    notice = f"{folder / 'unet'} (unet): 1 tensor not used by any layer: motion.w"
    parts = open_model(folder)
    same(parts.unet, tiny_model.unet)
    assert parts.notices == [notice]
    report = inspect_model(folder)
    assert (report.problems, report.notices) == ([], [notice])
    assert f"notice          {notice}" in report.text()
    assert mezzotint.Pipeline(parts).plan("a lemon").notices == (notice,)


def test_a_truncated_part_is_named(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    message = refused(folder)
    assert str(weights) in message
    assert "cut short" in message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("unet/config.json", "{", "not valid JSON"),
        ("unet/config.json", "[]", "not a JSON object"),
        ("unet/config.json", '{"block_out_channels": "wide"}', "wrong at block_out_channels"),
        ("unet/config.json", '{"block_out_channels": [7, 7, 7, 7]}', "norm_num_groups"),
        ("text_encoder/config.json", '{"num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000, but"),
        ("vae/config.json", '{"layers_per_block": 1000000000}', "layers_per_block is 1000000000, but"),
        ("unet/config.json", '{"attention_head_dim": [8, 0]}', "wrong at attention_head_dim"),
        ("unet/config.json", '{"sample_size": 1025}', "wrong at sample_size"),
        ("text_encoder/config.json", '{"num_attention_heads": 0}', "wrong at num_attention_heads"),
        ("text_encoder/config.json", '{"num_attention_heads": 3}', "hidden_size must be a multiple of num_att"),
        ("vae/config.json", '{"block_out_channels": [-8]}', "config of vae is wrong at block_out_channels.0"),
        (
            "model_index.json",
            '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}',
            "FluxPipeline without",
        ),
        ("model_index.json", '{"unet": ["diffusers", "UNet3DConditionModel"]}', "is a UNet3DConditionModel"),
        ("scheduler/scheduler_config.json", "nothing", "not valid JSON"),
        ("mezzotint.json", "nothing", "not valid JSON"),
    ],
)
def test_descriptions_that_are_wrong(file: str, content: str, words: str, folder: Path) -> None:
    (folder / file).write_text(content)
    assert words in refused(folder)


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd.bin", "a\\b.bin", "..", 7, ""])
def test_a_shard_must_be_in_the_folder_of_its_index(shard: Any, folder: Path) -> None:
    split(folder / "unet", PARTS["unet"])
    edit(folder / "unet/diffusion_pytorch_model.safetensors.index.json", lambda t: t["weight_map"].update(x=shard))
    assert "in the same folder" in refused(folder)


def test_a_tokenizer_that_does_not_fit(folder: Path) -> None:
    """More positions than the text encoder has, and bytes that are neither tokens nor unknown."""
    settings, table = folder / "tokenizer/tokenizer_config.json", folder / "tokenizer/tokenizer.json"
    edit(settings, lambda t: t.update(model_max_length=78))
    assert "has model_max_length 78; it must be at most 77" in refused(folder)
    edit(settings, lambda t: t.update(model_max_length=77, unk_token="none"))
    assert Tokenizer.from_folder(folder / "tokenizer").encode("q")
    edit(table, lambda t: t["model"]["vocab"].pop("q</w>"))
    assert "its vocabulary lacks 'q</w>', and its unk_token 'none'" in refused(folder)


def test_a_byte_order_mark(folder: Path) -> None:
    """As Windows' Notepad writes it."""
    for name in ("model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    open_model(folder)


def test_a_folder_that_may_not_be_entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which even `exists` raises; the tests may run as root, who may enter every folder."""

    def is_file(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", is_file)
    assert refused(folder) == f"{folder}/tokenizer/added_tokens.json cannot be read: Permission denied"
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        inspect_model(folder)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "no model_index.json" in refused(tmp_path)


@pytest.mark.parametrize("name", ["no/such/place", "nowhere", "a.safetensors", "x" * 5000, "a\0b", "../a/b"])
def test_nothing_there(name: str) -> None:
    assert "does not exist" in refused(name)  # type: ignore[arg-type]


def test_arguments_are_checked(folder: Path) -> None:
    assert "sd1, sd2, sdxl" in refused(folder, family="sd4")
    assert "epsilon, v_prediction, sample" in refused(folder, prediction="v")
    assert "text_encoder_2" in refused(folder, config={"transformer": {}})
    wrong = refused(folder, config={"unet": {"norm_num_group": 4}})
    assert wrong == "config names unet.norm_num_group, which is not read; it has norm_num_groups"


def test_family_and_prediction_can_be_given(folder: Path) -> None:
    parts = open_model(folder, family="sd2", prediction="epsilon")
    assert (parts.family, parts.scheduler_config["prediction_type"]) == ("sd2", "epsilon")


# Single files (what opens is in tests/parity/test_single_file.py)


def single(path: Path, names: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path, metadata=metadata)
    return path


UNET = "model.diffusion_model."
SD2 = {
    f"{UNET}input_blocks.0.0.weight": (320, 4, 1, 1),
    f"{UNET}x.attn2.to_k.weight": (2, 1024),
    "cond_stage_model.model.ln_final.weight": (4,),
}
SDXL = {f"{UNET}label_emb.0.0.weight": (2, 2), "conditioner.embedders.0.transformer.x": (1,)}


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        (SD2, {}, ("sd2", "epsilon", "PNDMScheduler")),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("sd2", "v_prediction", "DDIMScheduler")),
        (SD2, {"modelspec.prediction_type": "epsilon"}, ("sd2", "epsilon", "PNDMScheduler")),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-512"}, ("sd2", "epsilon", "PNDMScheduler")),
        (SD2 | {f"{UNET}input_blocks.0.0.weight": (320, 9, 1, 1)}, {}, ("sd2", "epsilon", "PNDMScheduler")),
        (SDXL, {}, ("sdxl", "epsilon", "EulerDiscreteScheduler")),
        (SDXL, {"modelspec.prediction_type": "v"}, ("sdxl", "v_prediction", "EulerDiscreteScheduler")),
        (SDXL | {"v_pred": (), "ztsnr": ()}, {}, ("sdxl", "v_prediction", "EulerDiscreteScheduler")),
        ({f"{UNET}x": (1,)}, {}, ("sd1", "epsilon", "PNDMScheduler")),
    ],
)
def test_family_prediction_and_scheduler(names: Any, metadata: Any, expected: Any, tmp_path: Path) -> None:
    plan = plan_file(single(tmp_path / "a.safetensors", names, metadata))
    assert (plan.family, plan.scheduler_config["prediction_type"], plan.scheduler_config["_class_name"]) == expected
    assert plan.scheduler_config.get("rescale_betas_zero_snr", False) == ("ztsnr" in names)


def test_the_count_of_steps_in_sd2_base(tmp_path: Path) -> None:
    weights = {name: torch.zeros(shape) for name, shape in SD2.items()}
    torch.save({"state_dict": weights, "global_step": 875000}, tmp_path / "a.ckpt")
    assert plan_file(tmp_path / "a.ckpt").scheduler_config["prediction_type"] == "epsilon"


def test_a_part_that_a_single_file_lacks_is_named(tmp_path: Path) -> None:
    path = single(tmp_path / "a.safetensors", {f"{UNET}x": (1,), "first_stage_model.x": (1,)})
    assert any(f"{path} has no text_encoder" in problem for problem in inspect_model(path).problems)
    assert str(path) in refused(path)


def test_a_hostile_number_in_a_name(tmp_path: Path) -> None:
    names = {f"{UNET}input_blocks.999999999.0.x": (1,)}
    message = refused(single(tmp_path / "a.safetensors", names))
    assert "not in the original layout" in message or "lacks" in message


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA"),
        (["double_blocks.0.x"], "a Flux model"),
        (["first_stage_model.encoder.down.0.x"], "only a VAE"),
        (["down_blocks.0.resnets.0.norm1.weight"], "only a UNet"),
        (["text_model.x"], "only a text encoder"),
        (["nonsense"], "1 tensors of an unknown kind (such as nonsense)"),
        ([], "no tensors"),
    ],
)
def test_files_that_are_no_whole_model(names: list[str], kind: str, tmp_path: Path) -> None:
    path = single(tmp_path / "a.safetensors", dict.fromkeys(names, (2, 3)))
    assert f"contains {kind}; it must contain a whole Stable Diffusion model" in refused(path)
    report = inspect_model(path)
    assert report.kind == kind
    assert report.parts[0].parameters == 6 * len(names)
    json.dumps(report.to_dict())


def test_a_variant_of_a_file_is_refused(tmp_path: Path) -> None:
    path = single(tmp_path / "a.safetensors", {f"{UNET}x": (1,), "conditioner.embedders.0.model.x": (1,)})
    assert "no variant 'fp16'" in refused(path, variant="fp16")


def test_unet_config_needs_its_first_tensors() -> None:
    with pytest.raises(KeyError):
        unet_config({}, "sd1")


# inspect


def test_inspect_a_folder(tiny_model: Any) -> None:
    report = inspect_model(tiny_model.folder)
    assert report.problems == []
    assert (report.family, report.prediction, report.sampler) == ("sd1", "v_prediction", "DDIMScheduler")
    parameters = {part.name: part.parameters for part in report.parts}
    assert parameters["unet"] == sum(p.numel() for p in tiny_model.unet.parameters())
    assert report.keys == sum(part.keys for part in report.parts)
    text = report.text()
    assert "Stable Diffusion 1 (diffusers folder)" in text
    assert f"{parameters['vae']:,} parameters  float32" in text
    assert json.loads(json.dumps(report.to_dict()))["parts"][0]["dtypes"] == {"float32": parameters["unet"]}


def test_inspect_lists_every_problem(folder: Path) -> None:
    (folder / "vae/config.json").unlink()
    rewrite(folder / "unet/diffusion_pytorch_model.safetensors", lambda table: table.pop("conv_in.weight"))
    report = inspect_model(folder)
    assert len(report.problems) == 2
    assert "lacks conv_in.weight" in report.text()


def test_inspect_the_bundled_model_by_name() -> None:
    report = inspect_model("emoji")
    assert report.family == "sd1" and not report.problems


def test_inspect_nothing_and_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_model("x" * 5000)
    with pytest.raises(CheckpointError, match="no model_index"):
        inspect_model(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="not a whole safetensors"):
        inspect_model(tmp_path / "a.safetensors")


def test_reading_keeps_no_file_open(tiny_model: Any) -> None:
    path = tiny_model.folder / "unet/diffusion_pytorch_model.safetensors"
    file = TensorFile(path)
    handle = file._file
    del file
    assert handle.closed


def test_a_sparse_terabyte_in_the_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer" / "special_tokens_map.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"special_tokens_map.json has more than 50,000,000 bytes"):
        open_model(folder)
