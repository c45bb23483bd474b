"""What training leaves behind, read back: whole models as a folder and as one original file, by us and by diffusers;
SDXL's LoRA in kohya's names; a learnt word. Random models of the smallest widths that the original layout can say.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import mezzotint
from mezzotint.cli.commands import app
from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.errors import CheckpointError, RequestError, WriteError
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.pipeline import Pipeline
from mezzotint.train.recipe import Recipe
from mezzotint.train.saving import check_saving, inference_parts, save_embedding, save_kohya, save_model, save_peft
from mezzotint.train.trainable import TrainableModel
from mezzotint.weights import Parts, open_model
from mezzotint.weights.save_single import check_single, save_single
from mezzotint.weights.single import clip_tokenizer, default_scheduler

# diffusers' Euler makes its table with np.array(a tensor), of which NumPy 2 warns
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WIDTH = 64  # one head of CLIP, the narrowest that a single file says by its shapes
FAMILIES = ("sd1", "sd2", "sdxl")
FEW_STEP = {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0, "lora": "lcm.safetensors"}
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "height": 32, "width": 32}


def encoder(kind: str, layers: int, eos: int) -> CLIPTextModel:
    """SDXL's second ("projected") is twice as wide, since diffusers tells the two apart by their widths."""
    projected = kind == "projected"
    return CLIPTextModel(
        CLIPConfig(
            hidden_size=(1 + projected) * WIDTH,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=1 + projected,
            projection_dim=(1 + projected) * WIDTH,
            hidden_act="quick_gelu" if kind == "clip" else "gelu",
            eos_token_id=eos,
            architectures=("CLIPTextModelWithProjection" if projected else "CLIPTextModel",),
        )
    )


def parts_of(family: str, eos: int = 2) -> Parts:
    """A copy of the family's model; its tokenizers never change, and are not copied."""
    made = built(family, eos)
    torch.manual_seed(7)  # for what the caller draws
    memo = {id(tokenizer): tokenizer for tokenizer in made.tokenizers}
    return copy.deepcopy(made, memo)


@cache
def built(family: Any, eos: int) -> Parts:
    """A model of this family that a single file can hold: 32 channels a norm's group, heads 64 wide, CLIP's tokens."""
    torch.manual_seed(7)
    fields: dict[str, Any] = {
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "sample_size": {"sd1": 64, "sd2": 64, "sdxl": 128}[family],
    }
    if family != "sd1":
        fields |= {"use_linear_projection": True, "attention_head_dim": (1, 2), "upcast_attention": family == "sd2"}
    if family == "sdxl":
        fields |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 3 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 2 * WIDTH,
        }
    unet = UNet(UNetConfig(**fields))
    nn.init.normal_(unet.conv_out.weight, std=0.2)
    vae = VAE(VAEConfig(block_out_channels=(32,) * 4, scaling_factor=0.13025 if family == "sdxl" else 0.18215))
    encoders = {
        "sd1": [encoder("clip", 2, eos)],
        "sd2": [encoder("open_clip", 23, eos)],  # of ViT-H's 24, as diffusers has it
        "sdxl": [encoder("clip", 2, eos), encoder("projected", 2, eos)],
    }[family]
    kinds = {"sd1": ["clip"], "sd2": ["open_clip"], "sdxl": ["clip", "open_clip"]}[family]
    index = {"_class_name": "StableDiffusionPipeline"}
    if family == "sdxl":
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    return Parts(
        family=family,
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoders=[each.eval() for each in encoders],
        tokenizers=[clip_tokenizer(kind) for kind in kinds],
        scheduler_config=default_scheduler(family),
        model_index=index,
        settings={},
        source=Path(f"tiny-{family}"),
        files=[],
    )


@pytest.fixture(scope="module", params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    with torch.random.fork_rng():
        yield parts_of(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A family's model as a folder and as one file, written once for all tests, which change neither."""

    @cache
    def save(family: str) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp(family)
        with torch.random.fork_rng():
            model = TrainableModel(parts_of(family), full(layout="both"))
        folder, file = save_model(model, place / "model", torch.float32)
        return folder, file

    return save


def full(**fields: Any) -> Recipe:
    return Recipe.of("full", None, {"data": "x", **fields})


def networks(parts: Parts) -> dict[str, nn.Module]:
    return {"unet": parts.unet, "vae": parts.vae} | {f"text {i}": e for i, e in enumerate(parts.text_encoders)}


def assert_same(read: Parts, written: Parts) -> None:
    """The same networks with the same bits, and all that drawing asks for."""
    assert read.family == written.family and networks(read).keys() == networks(written).keys()
    for name, network in networks(written).items():
        state = networks(read)[name].state_dict()
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in network.state_dict().items()), name
    assert [tokenizer.pad for tokenizer in read.tokenizers] == [tokenizer.pad for tokenizer in written.tokenizers]
    for key in ("prediction_type", "rescale_betas_zero_snr"):
        assert read.scheduler_config.get(key) == written.scheduler_config.get(key)
    zeros = "force_zeros_for_empty_prompt"
    assert read.model_index.get(zeros) == written.model_index.get(zeros)


def latents(parts: Parts, **fields: Any) -> Tensor:
    size = {"original_size": (32, 32), "target_size": (32, 32)} if parts.family == "sdxl" else {}
    own = {"prompt": "a lemon", "seed": 3, "steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
    return Pipeline(parts).generate(mezzotint.Request(**own | size | fields)).latents


def diffusers_class(family: str) -> Any:
    import diffusers

    return diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline


def theirs(pipe: Any, prompt: str = "a lemon") -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    drawn: Tensor = pipe(prompt, generator=[torch.Generator().manual_seed(3)], **OPTIONS).images
    return drawn


def assert_close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


# ---- whole models ------------------------------------------------------------------------------------------------


def test_a_folder_and_a_file_hold_the_same_bits(parts: Parts, saved: Callable[[str], tuple[Path, Path]]) -> None:
    folder, file = saved(parts.family)
    assert (folder.name, file.name) == ("model", "model.safetensors")
    assert_same(open_model(folder), parts)
    assert_same(open_model(file), parts)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "epsilon"


def test_a_pipeline_writes_a_file_that_draws_the_same_bits(
    parts: Parts, saved: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, file = saved(parts.family)
    pipe = mezzotint.load(file, device="cpu")
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(0.9)
    pipe.save(tmp_path / "edited.safetensors")
    drawn = latents(mezzotint.load(tmp_path / "edited.safetensors", device="cpu").parts)
    assert torch.equal(drawn, latents(pipe.parts)) and not torch.equal(drawn, latents(parts))


def test_diffusers_draws_the_same_from_folder_and_file(parts: Parts, saved: Callable[[str], tuple[Path, Path]]) -> None:
    folder, file = saved(parts.family)
    ours, kind = latents(parts), diffusers_class(parts.family)
    options = {} if parts.family == "sdxl" else {"safety_checker": None}
    assert_close(theirs(kind.from_pretrained(folder, local_files_only=True, **options)), ours)
    assert_close(theirs(kind.from_single_file(file, config=str(folder), local_files_only=True, **options)), ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_v_prediction_and_zero_snr_are_read_from_the_file(family: str, tmp_path: Path) -> None:
    changed = parts_of(family)
    changed.scheduler_config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    save_single(tmp_path / "v.safetensors", changed, torch.float32)
    assert_same(open_model(tmp_path / "v.safetensors"), changed)
    assert ("v_pred" in load_file(tmp_path / "v.safetensors")) == (family == "sdxl")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attention_head_dim": 4}, r"unet has heads \(4, 4\), not \(8, 8\)"),
        ({"norm_num_groups": 16}, "unet has norm_num_groups 16, not 32"),
    ],
)
def test_what_a_single_file_cannot_say_is_refused(change: dict[str, Any], sentence: str) -> None:
    sd1 = parts_of("sd1")
    unet = UNet(UNetConfig(**(sd1.unet.config.model_dump() | change)))
    with pytest.raises(CheckpointError, match=sentence):
        check_single(replace(sd1, unet=unet))


def test_a_model_with_its_own_words_is_refused_before_training(sd1: mezzotint.Pipeline) -> None:
    assert check_saving(full(), sd1.parts) == []
    with pytest.raises(RequestError, match=r"layout is 'both': .*its tokenizer is not CLIP's.*layout = \"folder\""):
        check_saving(full(layout="both"), replace(sd1.parts, unet=parts_of("sd1").unet, vae=parts_of("sd1").vae))
    trailing = {**parts_of("sd1").scheduler_config, "beta_end": 0.02}
    with pytest.raises(RequestError, match="its noise schedule is not the family's"):
        check_saving(full(layout="file"), replace(parts_of("sd1"), scheduler_config=trailing))


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model = TrainableModel(parts_of("sd1"), full(layout="file"))
    (tmp_path / "model.safetensors").write_bytes(b"the last one")
    monkeypatch.setattr("mezzotint.weights.save_tensors.save_file", full_disk)
    with pytest.raises(WriteError, match=r"model\.safetensors cannot be written: No space left on device"):
        save_model(model, tmp_path / "model")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.safetensors", b"the last one")]


def test_the_few_step_lora_goes_with_the_model_while_it_fits(sd1_folder: Path, tmp_path: Path) -> None:
    parts = open_model(sd1_folder)
    parts.settings["few_step"] = FEW_STEP
    few = mezzotint.weights.model_files.FewStep.model_validate(FEW_STEP)
    parts.few_step, parts.source = few, tmp_path
    (told,) = check_saving(full(), parts)
    assert "is not saved: it is missing" in told
    (tmp_path / "lcm.safetensors").write_bytes(b"a LoRA")
    (told,) = check_saving(full(), parts)
    assert "is copied unchanged" in told
    (told,) = check_saving(full(prediction="v_prediction"), parts)
    assert "is not saved" in told
    (folder,) = save_model(TrainableModel(parts, full()), tmp_path / "a")
    assert (folder / "lcm.safetensors").read_bytes() == b"a LoRA"
    assert open_model(folder).few_step == few
    (folder,) = save_model(TrainableModel(open_model(sd1_folder), full(prediction="v_prediction")), tmp_path / "b")
    assert "few_step" not in json.loads((folder / "mezzotint.json").read_text())


# ---- SDXL's LoRA -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora() -> TrainableModel:
    """SDXL with a LoRA in UNet and text encoders, as if it had learnt."""
    with torch.random.fork_rng():
        fields = {"data": "x", "rank": 4, "alpha": 2.0, "text_encoder": True, "convolutions": True}
        model = TrainableModel(parts_of("sdxl"), Recipe.of("lora", None, fields))
        for parameter in model.trainable_parameters().values():
            nn.init.normal_(parameter, std=0.1)
        return model


def test_sdxl_in_kohyas_names(lora: TrainableModel, tmp_path: Path) -> None:
    keys = {key.partition(".")[0] for key in load_file(save_kohya(lora, tmp_path / "k.safetensors", 5))}
    unet = {key.removeprefix("lora_unet_") for key in keys if key.startswith("lora_unet_")}
    assert {
        "input_blocks_0_0",
        "input_blocks_1_0_in_layers_2",
        "input_blocks_2_0_op",
        "input_blocks_3_0_skip_connection",
        "input_blocks_3_1_transformer_blocks_1_attn2_to_out_0",
        "middle_block_1_transformer_blocks_0_attn1_to_q",
        "output_blocks_1_2_conv",
        "out_2",
    } <= unet
    assert not [name for name in unet if "down_blocks" in name or "up_blocks" in name or "mid_block" in name]
    assert {key.split("_")[1] for key in keys} == {"unet", "te1", "te2"}


@pytest.mark.parametrize("save", ["kohya", "peft"])
def test_sdxls_lora_is_read_by_us_and_by_diffusers(
    save: str, lora: TrainableModel, saved: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    path = tmp_path / f"{save}.safetensors"
    if save == "kohya":
        save_kohya(lora, path, 5, torch.float32)
    else:
        save_peft(lora, path, torch.float32)
    learnt, bare = latents(inference_parts(lora)), parts_of("sdxl")
    before = latents(bare)
    assert (learnt - before).abs().max() > 0.05 * before.abs().max(), "the LoRA shows"
    assert_close(latents(bare, loras=(str(path),)), learnt)
    pipe = diffusers_class("sdxl").from_pretrained(saved("sdxl")[0], local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert_close(theirs(pipe), learnt)


# ---- a word ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_word_is_read_by_us_and_by_diffusers(family: str, tmp_path: Path) -> None:
    fields = {"data": "x", "token": "<hat>", "start": "cat", "vectors": 2}
    eos = 49407  # with SDXL's own 2 transformers pools at the highest id, which is then an added word's
    model = TrainableModel(parts_of(family, eos), Recipe.of("textual-inversion", None, fields))
    for vectors in model.vectors:
        nn.init.normal_(vectors)
    path = save_embedding(model, tmp_path / "hat.safetensors")
    bare = parts_of(family, eos)
    ours = latents(bare, prompt="a <hat> lemon", embeddings=(str(path),), prompt_syntax="plain")
    assert (ours - latents(bare)).abs().max() > 0.01 * ours.abs().max(), "the word shows"
    (folder,) = save_model(TrainableModel(bare, full()), tmp_path / "model", torch.float32)
    options = {} if family == "sdxl" else {"safety_checker": None}
    pipe = diffusers_class(family).from_pretrained(folder, local_files_only=True, **options)
    if family == "sdxl":
        state = load_file(path)
        for key, encoder, tokenizer in (
            ("clip_l", pipe.text_encoder, pipe.tokenizer),
            ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
        ):
            pipe.load_textual_inversion(state[key], token="<hat>", text_encoder=encoder, tokenizer=tokenizer)
    else:
        pipe.load_textual_inversion(tmp_path, weight_name=path.name)
    assert_close(theirs(pipe, "a <hat> lemon"), ours)


# ---- the command -------------------------------------------------------------------------------------------------


def train(method: str, model: Path, folder: Path, *options: str) -> Path:
    """`mezzotint train METHOD` on three pictures, two steps; the run's folder."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), colour).save(pictures / f"{number}.png")
    out = folder / "out"
    fixed = ["--steps", "2", "--resolution", "32", "--device", "cpu", "--set", "bucket_step=8", "--set", "lr=0.01"]
    result = CliRunner().invoke(
        app, ["train", method, str(pictures), "--out", str(out), "--model", str(model), *fixed, *options]
    )
    assert result.exit_code == 0, result.output
    return out


def test_the_command_learns_a_word(sd1_folder: Path, tmp_path: Path) -> None:
    word = ["--set", "token=<hat>", "--set", "start=lemon", "--set", "vectors=2", "--set", "prompt=a <hat> lemon"]
    out = train("textual-inversion", sd1_folder, tmp_path, *word)
    assert load_file(out / "hat.safetensors")["<hat>"].shape == (2, 16)
    fields = {"prompt": "a <hat> lemon", "embeddings": (str(out / "hat.safetensors"),), "prompt_syntax": "plain"}
    ours = latents(open_model(sd1_folder), **fields)
    pipe = diffusers_class("sd1").from_pretrained(sd1_folder, safety_checker=None, local_files_only=True)
    pipe.load_textual_inversion(out, weight_name="hat.safetensors")
    assert_close(theirs(pipe, "a <hat> lemon"), ours)


def test_the_command_saves_sdxl_whole(saved: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    before = parts_of("sdxl")
    out = train("full", saved("sdxl")[0], tmp_path, "--set", "layout=both", "--set", "prompt=a lemon")
    after, file = open_model(out / "model"), open_model(out / "model.safetensors")
    assert_same(file, after)
    assert not torch.equal(after.unet.conv_in.weight.float(), before.unet.conv_in.weight)
    for name in ("vae", "text 0", "text 1"):
        for key, tensor in networks(before)[name].state_dict().items():
            assert torch.equal(networks(after)[name].state_dict()[key], tensor.half())
