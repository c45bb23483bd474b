"""TAESD against diffusers' AutoencoderTiny: the network, whole pictures with it, its files, and the public key list."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import mezzotint
import test_img2img
import tiny
from mezzotint.config import TinyVAEConfig
from mezzotint.errors import CheckpointError
from mezzotint.memory.planner import plan as plan_memory
from mezzotint.models.convolution import seamless
from mezzotint.models.tiny_vae import TinyVAE, reach
from mezzotint.weights import inspect_model, open_model
from mezzotint.weights.tiny_vae_files import half_of
from pictures import Pair, apart, fields, load, ours, pixels, same, theirs
from test_single_file import Model

pytestmark = test_img2img.pytestmark

INPAINT = {"sd1": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline}
SMALL: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1, 1, 2, 1),
    "num_decoder_blocks": (2, 1, 1, 1),
}


def taesd(seed: int = 5, **changes: Any) -> AutoencoderTiny:
    """A small random one, whose pictures are not grey."""
    torch.manual_seed(seed)
    vae = AutoencoderTiny(**SMALL | changes).eval()
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(30)
        vae.decoder.layers[-1].weight.mul_(8)
    return vae


OTHER = taesd()


def original(half: str) -> dict[str, Tensor]:
    """A half under its authors' names: the decoder's layers are counted from a clamp on."""
    shift = half == "decoder"
    made = {}
    for key, tensor in getattr(OTHER, half).state_dict().items():
        _, number, rest = key.split(".", 2)
        made[f"{int(number) + shift}.{rest}"] = tensor.clone()
    return made


def write(form: str, folder: Path) -> Path:
    """OTHER in one of the forms that people have."""
    if form in ("folder", "diffusers file"):
        OTHER.save_pretrained(folder)
        return folder if form == "folder" else folder / "diffusion_pytorch_model.safetensors"
    if form == "one file":  # ComfyUI's
        both = {
            f"taesd_{half}.{key}": tensor for half in ("encoder", "decoder") for key, tensor in original(half).items()
        }
        save_file(
            both | {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}, folder / "taesd.safetensors"
        )
        return folder / "taesd.safetensors"
    suffix = "pth" if form == "pth pair" else "safetensors"
    for half in ("encoder", "decoder"):
        path = folder / f"taesd_{half}.{suffix}"
        if suffix == "pth":
            torch.save(original(half), path)
        else:
            save_file(original(half), path)
    return {"encoder": folder / f"taesd_encoder.{suffix}", "folder of a pair": folder}.get(
        form, folder / f"taesd_decoder.{suffix}"
    )


FORMS = ("folder", "diffusers file", "one file", "pth pair", "encoder", "folder of a pair")


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, sd1_folder: Path, tmp_path: Path) -> None:
    vae = write(form, tmp_path)
    parts = open_model(sd1_folder, vae=vae)
    assert isinstance(parts.vae, TinyVAE) and parts.vae.config.scaling_factor == 1.0
    assert not [notice for notice in parts.notices if "not used" in notice]
    random = torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 4, 9, 13, generator=random) * 2, torch.rand(2, 3, 72, 104, generator=random) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(parts.vae.decode(z), OTHER.decode(z).sample, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(parts.vae.encode(x).mean, OTHER.encode(x).latents, rtol=1e-6, atol=1e-6)
    line = next(line for line in inspect_model(sd1_folder, vae=vae).lines() if line.startswith("  vae"))
    assert line.endswith("tensors  TAESD (AutoencoderTiny)")


@pytest.mark.parametrize("axes", ["", "y", "xy"])
def test_strips_are_exact(axes: str) -> None:
    """In float64 only the order of sums differs; a margin of one row less shows."""
    torch.manual_seed(1)
    config = TinyVAEConfig(**SMALL)
    vae = TinyVAE(config).double().requires_grad_(False)
    z, x = torch.randn(1, 4, 29, 3).double(), torch.rand(1, 3, 29 * 8, 24).double() * 2 - 1
    with seamless(axes):
        assert (vae.decode_in_strips(z, 3) - vae.decode(z)).abs().max() < 1e-12
        assert (vae.encode_in_strips(x, 3).mean - vae.encode(x).mean).abs().max() < 1e-12
    z.requires_grad_()
    for blocks, network, given, rows in (
        (config.num_decoder_blocks, vae.decoder, z, 8),
        (config.num_encoder_blocks[::-1], vae.encoder, x.requires_grad_(), 1),
    ):
        middle = network(given)[:, :, 14 * rows : 15 * rows]
        (slope,) = torch.autograd.grad(middle.abs().sum(), given)
        felt = slope.abs().amax(dim=(0, 1, 3)).nonzero().flatten() // (8 // rows)
        assert 14 - int(felt.min()) <= reach(blocks) <= 14 - int(felt.min()) + 2


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model of each family with a TAESD in its folder, as diffusers wrote it."""
    folder = tmp_path_factory.mktemp("taesd")
    pipe = pairs[request.param].theirs
    own, pipe.vae = pipe.vae, OTHER
    pipe.save_pretrained(folder)
    pipe.vae = own
    return load(folder, request.param)


def test_pictures(pair: Pair) -> None:
    """Decoded whole, and in strips."""
    request = fields(steps=2, height=320)
    wanted = theirs(pair, request)
    same(ours(pair, request), wanted)
    cut = mezzotint.load(pair.ours.parts.source, device="cpu", placement=mezzotint.Placement(vae="strips"))
    same(ours(Pair(pair.theirs, cut, pair.scheduler), request), wanted)


@pytest.mark.parametrize("mask", [None, test_img2img.blot()], ids=["image", "mask"])
def test_pictures_from_pictures(pair: Pair, mask: Image.Image | None) -> None:
    """Nothing is drawn for an encoded picture, so the run's noise is the generator's first; euler_a draws on."""
    kind = INPAINT[pair.ours.parts.family] if mask else test_img2img.IMG2IMG[pair.ours.parts.family]
    width, height = test_img2img.SIZE
    request = test_img2img.fields(sampler="euler_a", **{"mask": mask, "width": width, "height": height} if mask else {})
    drawn, other = ours(pair, request), test_img2img.theirs(pair, kind, request)
    if mask is None:
        same(drawn, other)
    else:  # outside the mask diffusers returns the VAE's reconstruction
        inside = np.asarray(mask, dtype=bool)
        assert apart(drawn, other)[0] < 1e-4
        assert np.abs(drawn.pixels - other.pixels)[:, inside].max() <= 1


def test_a_network_of_diffusers_is_adopted_and_saved(sd1_folder: Path, tmp_path: Path) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu")
    pipe.vae = OTHER  # type: ignore[assignment]
    pipe.save(tmp_path / "model")
    again = AutoencoderTiny.from_pretrained(tmp_path / "model" / "vae")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), OTHER.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="save it as a folder"):
        pipe.save(tmp_path / "model.safetensors")
    request = mezzotint.Request(prompt="a lemon", seed=1, width=32, height=32)
    saved = mezzotint.load(tmp_path / "model", device="cpu").generate(request).images[0]
    assert saved.tobytes() == pipe.generate(request).images[0].tobytes()


CONVOLUTIONS = [f"conv.{place}.{kind}" for place in (0, 2, 4) for kind in ("weight", "bias")]
PUBLIC = {  # of madebyollin/taesd and madebyollin/taesdxl: layers with a weight alone, the two ends, and blocks
    "encoder": ((2, 6, 10), (0, 14), (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)),
    "decoder": ((7, 12, 17), (1, 19), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)),
}


def test_the_public_key_list(tmp_path: Path) -> None:
    """The published files, by name and shape, give the published network: 2.4 million parameters, no key too many."""
    ends = {"encoder": ((64, 3), (4, 64)), "decoder": ((64, 4), (3, 64))}
    for half, (plain, (first, last), blocks) in PUBLIC.items():
        names = [f"{n}.{name}" for n in blocks for name in CONVOLUTIONS] + [f"{n}.weight" for n in plain]
        shapes: dict[str, tuple[int, ...]] = {
            name: (64,) if name.endswith("bias") else (64, 64, 3, 3) for name in names
        }
        for place, (rows, columns) in zip((first, last), ends[half], strict=True):
            shapes |= {f"{place}.weight": (rows, columns, 3, 3), f"{place}.bias": (rows,)}
        save_file(
            {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / f"taesdxl_{half}.safetensors"
        )
    model = Model("sd1")
    save_file(model.single(), tmp_path / "model.safetensors")
    parts = open_model(
        tmp_path / "model.safetensors", config=model.config, vae=tmp_path / "taesdxl_decoder.safetensors"
    )
    with torch.device("meta"):
        full = AutoencoderTiny().state_dict()
    assert {key: tensor.shape for key, tensor in parts.vae.state_dict().items()} == {
        k: t.shape for k, t in full.items()
    }
    assert sum(math.prod(shape.shape) for shape in full.values()) == 2_445_063
    assert sorted(notice for notice in parts.notices) == [
        "taesdxl_decoder.safetensors is named as a TAESD of SDXL, and the model is sd1; if colours are wrong, give the "
        "other one"
    ]
    assert "TAESD" in inspect_model(tmp_path / "taesdxl_encoder.safetensors").kind


def test_what_is_wrong_with_a_file(sd1_folder: Path, tmp_path: Path) -> None:
    def refused(vae: Path, **more: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            open_model(sd1_folder, vae=vae, **more)
        return str(error.value)

    save_file(original("decoder"), tmp_path / "taesd_decoder.safetensors")
    assert "its encoder must lie beside it" in refused(tmp_path / "taesd_decoder.safetensors")
    save_file(original("decoder"), tmp_path / "taesd_encoder.safetensors")
    assert "is not the encoder of a TAESD" in refused(tmp_path / "taesd_decoder.safetensors")
    broken = {f"encoder.layers.{key}": tensor for key, tensor in original("encoder").items()}
    save_file(broken, tmp_path / "half.safetensors")
    assert "its decoder has 0 convolutions" in refused(tmp_path / "half.safetensors")
    taesd(latent_channels=16).save_pretrained(tmp_path / "wide")
    assert "a VAE of 16 latent channels" in refused(tmp_path / "wide")
    taesd(act_fn="silu").save_pretrained(tmp_path / "silu")
    assert "the config of vae is wrong at act_fn" in refused(tmp_path / "silu")


def test_the_planner_counts_it(sd1_folder: Path, tmp_path: Path) -> None:
    request = mezzotint.Request(prompt="a lemon", width=256, height=256)
    OTHER.save_pretrained(tmp_path)
    own, small = (plan_memory(sd1_folder, "2GiB", request, device="cpu", **given) for given in ({}, {"vae": tmp_path}))
    assert small.estimate.stages["decode"] != own.estimate.stages["decode"]
    assert small.model.weights["decoder"].small + small.model.weights["decoder"].large == sum(
        parameter.numel() for parameter in OTHER.decoder.parameters()
    )


def test_previews_are_decoded_by_a_decoder_alone(sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    save_file(original("decoder"), tmp_path / "taesd_decoder.safetensors")
    z = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    shown = sd1.preview(str(tmp_path / "taesd_decoder.safetensors")).picture(z)
    with torch.no_grad():
        wanted = torch.cat(list(OTHER.decode(z).sample), dim=-1).clamp(-1, 1).add(1).div(2).mul(255)
    assert (torch.from_numpy(pixels([shown])[0]).movedim(-1, 0) - wanted).abs().max() <= 1
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a LoRA, not the decoder of a TAESD"):
        sd1.preview(str(tmp_path / "lora.safetensors"))


def test_halves_are_told_apart() -> None:
    assert [half_of({key: (1,) for key in original(half)}) for half in ("encoder", "decoder")] == ["encoder", "decoder"]
    assert half_of({key: (1,) for key in OTHER.state_dict()}) == "both"
    assert half_of({key: (1,) for key in tiny.vae().state_dict()}) is None
