"""`vae=`: a file, a folder or a checkpoint in place of a model's own VAE, against diffusers' of the same weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mezzotint
import tiny
from mezzotint import Request
from mezzotint.again import again, judge, read_source, select_options
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.memory.planner import plan as plan_memory
from mezzotint.weights import Parts, inspect_model, open_model
from test_single_file import Model, ldm_vae, same_weights

OTHER = tiny.vae(seed=9)  # its own weights; 16 latents' worth of difference in every picture


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """An SD1-shaped file without a VAE."""
    model = Model("sd1")
    weights = {key: tensor for key, tensor in model.single().items() if not key.startswith("first_stage_model.")}
    path = tmp_path_factory.mktemp("files") / "novae.safetensors"
    save_file(weights, path)
    return path, model


def write(form: str, folder: Path) -> Path:
    """OTHER in one of the forms that people have."""
    if form in ("folder", "model folder", "diffusers file"):
        OTHER.save_pretrained(folder / "vae")
        return {"folder": folder / "vae", "model folder": folder}.get(
            form, folder / "vae/diffusion_pytorch_model.safetensors"
        )
    original = ldm_vae(OTHER.state_dict(), 4)
    if form == "file":
        original = {key.removeprefix("first_stage_model."): tensor for key, tensor in original.items()}
    elif form == "checkpoint":
        original |= {"model.diffusion_model.x": torch.zeros(1)}
    elif form == "bare diffusers file":
        original = OTHER.state_dict()
    elif form.endswith("."):  # diffusers' names behind it
        original = {form + key: tensor for key, tensor in OTHER.state_dict().items()}
    original = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in original.items()}
    if form == "pt":
        torch.save({"state_dict": original}, folder / "vae.pt")
        return folder / "vae.pt"
    save_file(original, folder / "vae.safetensors")
    return folder if form == "folder of one file" else folder / "vae.safetensors"


FORMS = (
    "file",
    "pt",
    "checkpoint",
    "folder of one file",
    "diffusers file",
    "bare diffusers file",
    "folder",
    "model folder",
    "vae.",
    "first_stage_model.",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = checkpoint
    parts = open_model(path, config=model.config, vae=write(form, tmp_path))
    same_weights(parts.vae, OTHER)
    same_weights(parts.unet, model.unet)
    assert parts.vae.config.scaling_factor == 0.18215
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = OTHER.decode(z / OTHER.config.scaling_factor).sample
        torch.testing.assert_close(parts.vae.decode(parts.vae.unscale(z)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_a_checkpoint_may_have_diffusers_names(prefix: str, checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = checkpoint
    vae = {prefix + key: tensor.contiguous() for key, tensor in model.vae.state_dict().items()}
    save_file(load_file(path) | vae, tmp_path / "a.safetensors")
    same_weights(open_model(tmp_path / "a.safetensors", config=model.config).vae, model.vae)


def test_without_one_the_option_is_named(checkpoint: tuple[Path, Model]) -> None:
    path, model = checkpoint
    with pytest.raises(CheckpointError, match=r"has no vae, which an sd1 model needs: give one .* --vae FILE"):
        open_model(path, config=model.config)
    assert any("--vae" in problem for problem in inspect_model(path).problems)


def test_what_the_latents_are_stays_the_models(tmp_path: Path) -> None:
    """A file says nothing of it; a folder's config does, as diffusers' pipe.vae would."""
    model = Model("sdxl")
    save_file(
        model.single() | {"edm_mean": torch.zeros(4), "edm_std": torch.full((4,), 2.0)}, tmp_path / "xl.safetensors"
    )
    given = open_model(tmp_path / "xl.safetensors", config=model.config, vae=write("file", tmp_path)).vae.config
    assert (given.scaling_factor, given.latents_std) == (0.5, (2.0,) * 4)
    shutil.rmtree(tmp_path / "vae", ignore_errors=True)
    given = open_model(tmp_path / "xl.safetensors", config=model.config, vae=write("folder", tmp_path)).vae.config
    assert (given.scaling_factor, given.latents_std) == (0.18215, None)


def test_a_folder_keeps_its_scaling_and_needs_no_vae(sd1_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd1_folder, tmp_path / "tiny"))
    weights = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    changed = {name: tensor + 0.01 for name, tensor in weights.items()}
    save_file(changed, tmp_path / "mine.safetensors")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    config: dict[str, Any] = {"vae": {"norm_num_groups": 4}}
    parts = open_model(folder, vae=tmp_path / "mine.safetensors", config=config)
    assert torch.equal(parts.vae.decoder.conv_out.weight, changed["decoder.conv_out.weight"])
    assert parts.vae.config.scaling_factor == 0.5  # of the folder's vae/config.json
    assert not any(name.startswith("vae/") for name in parts.hashes)
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match=r"needs its vae; give one with vae, .* --vae FOLDER"):
        open_model(folder)


def test_what_is_no_vae_for_this_model(checkpoint: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = checkpoint

    def refused(vae: Path | str) -> str:
        with pytest.raises(CheckpointError) as error:
            open_model(path, config=model.config, vae=vae)
        return str(error.value)

    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert "lora.safetensors holds a LoRA, not a VAE" in refused(tmp_path / "lora.safetensors")
    assert "the VAE 'nowhere.safetensors' does not exist" in refused("nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    assert "empty has no VAE" in refused(tmp_path / "empty")
    tiny.vae(latent_channels=16).save_pretrained(tmp_path / "wide")
    assert "a VAE of 16 latent channels" in refused(tmp_path / "wide")
    (tmp_path / "wide/config.json").write_text(json.dumps({"_class_name": "AsymmetricAutoencoderKL"}))
    assert "AsymmetricAutoencoderKL" in refused(tmp_path / "wide")


def test_a_file_of_other_groups_is_refused_before_anything_is_built(sd1_folder: Path, tmp_path: Path) -> None:
    """A file does not tell the number of groups, for which 32 is assumed."""
    shutil.copy(sd1_folder / "vae/diffusion_pytorch_model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="norm_num_groups 32, which must divide each of block_out_channels"):
        plan_memory(sd1_folder, "2GiB", REQUEST, vae=tmp_path / "alone.safetensors")


@pytest.fixture(scope="module")
def given(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A VAE file for the tiny folder, and the options that use it."""
    path = tmp_path_factory.mktemp("vae") / "mine.safetensors"
    weights = load_file(sd1_folder / "vae/diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, path)
    config = {"vae": {"norm_num_groups": 4}, "scheduler": {"rescale_betas_zero_snr": True}}
    return path, {"vae": str(path), "prediction": "v_prediction", "config": config}


REQUEST = Request(prompt="a lemon", width=32, height=32, steps=2, seed=4)


def test_the_record_and_again(sd1_folder: Path, given: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, options = given
    image = mezzotint.load(sd1_folder, device="cpu", **options).generate(REQUEST).images[0]
    plain = mezzotint.load(sd1_folder, device="cpu").generate(REQUEST).images[0]
    assert image.tobytes() != plain.tobytes()
    model = json.loads(image.info["mezzotint"])["model"]
    assert model["vae"] == {"mine.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert model["options"] == {name: value for name, value in options.items() if name != "vae"}
    assert str(path.parent) not in image.info["mezzotint"]
    image.save(tmp_path / "lemon.png")
    source = read_source(tmp_path / "lemon.png")
    with pytest.raises(RequestError, match=r"the VAE 'mine.safetensors' \(SHA-256 \w{10}\.\.\.\); give it with --vae"):
        select_options(source, {})
    chosen = select_options(source, {"vae": str(path)})
    assert chosen == options
    assert judge(source, again(mezzotint.load(sd1_folder, device="cpu", **chosen), source)[0]).identical
    other = mezzotint.load(sd1_folder, device="cpu", **{name: options[name] for name in ("prediction", "config")})
    sentences = " ".join(judge(source, again(other, source)[0]).sentences)
    assert "the VAE's mine.safetensors was" in sentences
    assert (
        select_options(read_source(tmp_path / "lemon.png"), {"vae": "x", "prediction": "epsilon"})["prediction"]
        == "epsilon"
    )


def test_what_pictures_depend_on(sd1_folder: Path, given: tuple[Path, dict[str, Any]]) -> None:
    """`identity` tells runs of bulk, grid and report apart."""
    parts: list[Parts] = [open_model(sd1_folder, **chosen) for chosen in ({}, given[1], {"prediction": "v_prediction"})]
    identities = [parts.identity for parts in parts]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == 3
    assert identities[2].items() > identities[0].items()
    assert identities[0] == parts[0].hashes


def test_a_memory_plan_is_for_these_options(sd1_folder: Path, given: tuple[Path, dict[str, Any]]) -> None:
    planned = plan_memory(sd1_folder, "2GiB", REQUEST, device="cpu", **given[1])
    assert mezzotint.load(sd1_folder, device="cpu", memory=planned, **given[1]).parts.given_files
    for other in ({}, given[1] | {"prediction": "epsilon"}):
        with pytest.raises(RequestError, match="memory is a plan for"):
            mezzotint.load(sd1_folder, device="cpu", memory=planned, **other)
