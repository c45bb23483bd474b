"""IP-Adapters of a request: sentences, files and encoders, embeddings, the record, memory, what they compose with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ip_adapters import VISION, face, tensors, write_adapters, write_encoder
from PIL import Image
from tests.conftest import WIDTH, tiny_unet

import mezzotint
from mezzotint import Request
from mezzotint.again import again, find_inputs, judge, read_source
from mezzotint.cli.fields import ip_adapter_of
from mezzotint.config import CLIPVisionConfig, ScheduleConfig
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.entries.ip_adapter import IPAdapter
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.models.clip_vision import CLIPVisionModel
from mezzotint.models.ip_adapter import ImagePrompt, cross_layers
from mezzotint.models.unet import Condition
from mezzotint.run.image_prompts import layer_scales
from mezzotint.weights import vision_files
from mezzotint.weights.checkpoint import inspect_model
from mezzotint.weights.ip_adapter_files import save_embeds
from mezzotint.weights.save_tensors import write_tensors
from mezzotint.weights.vision_files import KnownEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters and their encoder as h94/IP-Adapter has them, and pictures."""
    place = tmp_path_factory.mktemp("adapters")
    with torch.random.fork_rng():
        write_adapters(place, tiny_unet(0).config, "plain", "full", "face id")
    for k in range(3):
        face(k).save(place / f"{k}.png")
    return place


def entry(folder: Path, *numbers: int, **fields: Any) -> dict[str, Any]:
    images = [folder / f"{number}.png" for number in numbers or (0,)]
    return {"file": folder / "models" / "plain.safetensors", "image": [*map(str, images)], **fields}


# ---- the request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"scale": float("nan")}, "ip_adapter[1].scale is nan; it must be a number from -100 to 100"),
        ({"scale": {"up": {"first": 1}}}, "ip_adapter[1].scale is (('up.first', 1),); it must be a number"),
        ({"start": 0.5, "end": 0.4}, "ip_adapter[1].end is 0.4; it must be a share of the steps from 0 to 1, above"),
        ({"weight": 1}, "ip_adapter[1] has no field 'weight'; it has file, image"),
        ({"image": 3}, "ip_adapter[1].image is 3; it must be a picture"),
        ({"mask": []}, "ip_adapter[1].mask is (); it must be a picture"),
    ],
)
def test_a_wrong_entry_is_named(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as error:
        Request("a", ip_adapter=["a.bin", {"file": "b.bin", **wrong}])
    assert str(error.value).startswith(sentence)


def test_an_entry_is_read_in_every_form() -> None:
    """Pictures in memory, diffusers' dictionaries and tensors, JSON; and the command line's."""
    scale = {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5}
    given = {"file": Path("b"), "image": [face(), "c.png"], "scale": scale, "end": None}
    request = Request("a", ip_adapter=[given, {"file": "d", "embeds": [torch.ones(2, 1, 3)]}])
    assert request.ip_adapter is not None and request.ip_adapter[0].image is not None
    assert request.ip_adapter[0].scale == (("down.block_2", (0.0, 1.0)), ("mid", 0.5))
    assert isinstance(request.ip_adapter[0].image[0], bytes) and isinstance(request.ip_adapter[1].embeds, bytes)
    assert "bytes>" in repr(request) and hash(request)
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert request.replace(seed=3).ip_adapter == request.ip_adapter
    text = 'C:\\nets\\a, b.bin:image=a, b.png,image=c.png,scale={"down": {"block_2": [0, 1]}, "mid": 0.5},start=0.1'
    fields = ip_adapter_of(text)
    assert fields["file"] == "C:\\nets\\a, b.bin" and fields["image"] == ["a, b.png", "c.png"]
    read = IPAdapter(**fields)
    assert read.scale == request.ip_adapter[0].scale and read.start == 0.1


def test_what_does_not_fit_is_a_sentence(
    sd1: mezzotint.Pipeline, sdxl: mezzotint.Pipeline, folder: Path, tmp_path: Path
) -> None:
    def refused(wrong: dict[str, Any], sentence: str, pipe: mezzotint.Pipeline = sd1, **fields: Any) -> None:
        with pytest.raises((RequestError, CheckpointError), match=sentence):
            pipe.generate(Request("a lemon", ip_adapter=[wrong], **fields))

    models = folder / "models"
    refused({"file": "a.bin"}, r"ip_adapter\[0\].image and ip_adapter\[0\].embeds are both missing")
    refused(entry(folder, file="nowhere.bin"), r"ip_adapter\[0\].file: the IP-Adapter 'nowhere.bin' does not exist")
    refused(entry(folder), "this model's cross-attentions take 32", sdxl)
    refused(entry(folder, file=models / "face id.safetensors"), "a FaceID adapter, which reads .*insightface")
    refused(entry(folder, file=models / "image_encoder" / "model.safetensors"), "must be an IP-Adapter")
    alone = write_tensors(tmp_path / "own" / "a.safetensors", tensors(sd1.unet.config))
    refused(entry(folder, file=alone), r"ip_adapter\[0\].encoder: a.safetensors needs its image encoder, .*of 12")
    other = write_encoder(tmp_path / "other", projection_dim=20)
    refused(entry(folder, encoder=other), "has hidden states of 16 and an embedding of 20; give the one")
    refused(entry(folder, 0, 1, mask=[face()] * 3), r"mask has 3 masks for 2 pictures")
    refused(entry(folder, 0, 1, scale=[1, 0.5]), r"scale has 2 numbers, one for each picture, and they have no mask")
    tiled = {"image": face(size=(96, 64)), "tile": 64}
    refused(entry(folder, mask=face()), "mask and tile are given; a mask is one of the whole picture", **tiled)
    refused(entry(folder, mask=face(size=(40, 20))), r"mask\[0\] is 40x20; it must have the shape .* picture, 32x32")
    refused(entry(folder, scale={"up": {"block_7": 1}}), r"scale names up.block_7; the cross-attentions .* are in down")
    refused(entry(folder, scale={"mid": [1, 1]}), r"scale has 2 numbers for mid; it has 1 transformers")
    embeds = {"file": models / "plain.safetensors", "embeds": torch.ones(2, 1, 5)}
    refused(embeds, r"embeds \(a tensor\) has shape \(2, 1, 5\); for plain.safetensors it must be \(2, pictures, 12\)")
    plan = sd1.plan(Request("a lemon", ip_adapter=[entry(folder, start=0.3, end=0.4)]))
    assert "ip_adapter[0] acts in none of 4 steps" in plan.notices[0]


def test_where_people_get_an_encoder_is_said(sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    """For a file of the public sizes: which encoder it is, the hub id and the folder there."""
    shapes = tensors(sd1.unet.config) | {"image_proj.proj.weight": torch.zeros(4 * WIDTH, 1024)}
    file = write_tensors(tmp_path / "a.safetensors", shapes)
    with pytest.raises(CheckpointError, match=r"CLIP ViT-H/14 \(embedding of 1024\).*h94/IP-Adapter has in models"):
        sd1.plan(Request("a", ip_adapter=[{"file": file, "image": face()}]))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_inspect_names_them(folder: Path) -> None:
    models = folder / "models"
    plain = inspect_model(models / "plain.safetensors").kind
    assert plain == "an IP-Adapter for a model of another size, 4 tokens, a CLIP vision encoder (embedding of 12)"
    assert "for whole faces" in inspect_model(models / "full.safetensors").kind
    assert "FaceID" in inspect_model(models / "face id.safetensors").problems[0]


def test_an_encoder_is_found_and_may_be_a_file(
    sd1: mezzotint.Pipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the adapter, in models beside its folder (as sdxl_models/ip-adapter_sdxl_vit-h needs it), a file."""
    request = Request("a lemon", seed=1, ip_adapter=[entry(folder)])
    expected = sd1.generate(request).latents
    elsewhere = write_tensors(folder / "sdxl_models" / "a.safetensors", tensors(sd1.unet.config))
    assert sd1.generate(request.replace(ip_adapter=[entry(folder, file=elsewhere)])).latents.equal(expected)
    file = (tmp_path / "clip.safetensors").resolve()
    file.write_bytes((folder / "models" / "image_encoder" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="its file alone does not describe; give a folder"):
        sd1.generate(request.replace(ip_adapter=[entry(folder, encoder=file)]))
    known = KnownEncoder("tiny", None, VISION)
    monkeypatch.setattr(vision_files, "KNOWN", (known,))
    assert sd1.generate(request.replace(ip_adapter=[entry(folder, encoder=file)])).latents.equal(expected)


def test_embeddings_are_computed_once_and_saved(sd1: mezzotint.Pipeline, folder: Path, tmp_path: Path) -> None:
    """From a file, a tensor, and diffusers' list of one tensor: the picture is that of the pictures themselves."""
    for name in ("plain", "full"):
        file = folder / "models" / f"{name}.safetensors"
        own = entry(folder, 0, 1, file=file)
        expected = sd1.generate(Request("a lemon", seed=1, ip_adapter=[own])).latents
        embeds = mezzotint.embed_images(file, own["image"], device="cpu")
        assert embeds.shape == ((2, 2, 12) if name == "plain" else (2, 2, 5, 16))
        saved = save_embeds(tmp_path / f"{name}.safetensors", embeds)
        for given in (saved, embeds, [embeds]):
            request = Request("a lemon", seed=1, ip_adapter=[{"file": file, "embeds": given}])
            assert sd1.generate(request).latents.equal(expected)


# ---- the arithmetic --------------------------------------------------------------------------------------------------


def test_scales_by_block() -> None:
    config = tiny_unet(0).config
    names = [layer.name for layer in cross_layers(config)]
    assert layer_scales(config, 0.5, "a") == [0.5] * len(names)
    scales = layer_scales(config, (("mid", 0.25), ("up", ((0.5, 0.75),))), "a")
    wanted = [0.25 if name.startswith("mid") else (0.5, 0.75) if name.startswith("up") else 0.0 for name in names]
    assert scales == wanted


@torch.no_grad()
def test_pictures_act_on_the_prompts_parts_in_their_steps() -> None:
    """Each part that AND joins takes the picture, the unconditional output takes none; split guidance is the same."""
    with torch.random.fork_rng():
        unet = tiny_unet(0).eval()
    draw = torch.Generator().manual_seed(1)
    conditions = [Condition(torch.randn(1, 7, WIDTH, generator=draw)) for _ in range(3)]

    def layers(zero: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shapes = [(1, layer.heads, 3, layer.dim // layer.heads) for layer in cross_layers(unet.config)]
        found = [(torch.randn(s, generator=draw), torch.randn(s, generator=draw)) for s in shapes]
        return [(k, 0 * v) for k, v in found] if zero else found

    image = ImagePrompt(layers(), layers(zero=True), [1.0] * len(cross_layers(unet.config)), None, 0.0, 0.5)
    schedule = Schedule.from_config(ScheduleConfig())
    x = torch.randn(2, 4, 4, 4, generator=draw)

    def outputs(*images: ImagePrompt, sigma: float = 5.0, split: bool = False) -> tuple[torch.Tensor, ...]:
        denoiser = Denoiser(
            unet, schedule, Prediction.from_config(ScheduleConfig()), conditions, split=split,
            levels=[5.0, 2.0, 0.0], prompts=2, image_prompts=images,
        )  # fmt: skip
        return denoiser.outputs(x, sigma, perturbed=1)

    free, with_image = outputs(), outputs(image)
    for k, other in enumerate(outputs(image, split=True)):
        assert torch.allclose(with_image[k], other, atol=1e-5)
        assert torch.allclose(with_image[k], free[k], atol=1e-5) == (k == 2)  # 3 is the first one, perturbed
    for one, other in zip(outputs(image, sigma=2.0), outputs(sigma=2.0), strict=True):
        assert one.equal(other)


def test_layers_with_hooks_are_called(sd1: mezzotint.Pipeline, folder: Path) -> None:
    """A user's hook on a projection is called in each step, beside the pictures."""
    request = Request("a lemon", seed=1, ip_adapter=[entry(folder)])
    expected, calls = sd1.generate(request).latents, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    layer = next(sd1.unet.cross_attentions()).to_k
    handle = layer.register_forward_hook(count)
    try:
        assert torch.allclose(sd1.generate(request).latents, expected, atol=1e-5) and calls > 1
    finally:
        handle.remove()


# ---- whole pictures --------------------------------------------------------------------------------------------------


def test_it_composes_and_is_drawn_again(sd1: mezzotint.Pipeline, folder: Path, tmp_path: Path) -> None:
    """With hires-fix, AND, a batch, two adapters, masks: the record has base names, and again gives the same bits."""
    Image.new("L", (16, 16), 255).save(folder / "mask.png")
    adapters = [
        entry(folder, 0, 1, mask=folder / "mask.png", scale=[0.8, 0.3], end=0.8),
        {"file": folder / "models" / "full.safetensors", "embeds": torch.ones(2, 1, 5, 16)},
    ]
    request = Request("a lemon AND a background", seed=3, count=2, batch=2, hires=2, hires_steps=2, ip_adapter=adapters)
    result = sd1.generate(request)
    plain = sd1.generate(request.replace(ip_adapter=None))
    assert not torch.allclose(result.latents, plain.latents, atol=1e-2)
    path = tmp_path / "picture.png"
    result.images[1].save(path)
    assert str(folder) not in str(result.images[1].info)
    source = read_source(path)
    assert source.record is not None and source.request.ip_adapter is not None
    recorded = source.request.ip_adapter[0]
    assert (recorded.file, recorded.image, recorded.mask) == ("plain.safetensors", ("0.png", "1.png"), ("mask.png",))
    assert [*source.record.model.ip_adapters] == ["plain.safetensors", "full.safetensors"]
    assert [*source.record.model.image_encoders] == ["image_encoder"]
    names = [f"ip_adapter[0].{name}" for name in ("image[0]", "image[1]", "mask[0]")]
    assert [*source.record.inputs] == [*names, "ip_adapter[1].embeds"]
    with pytest.raises(RequestError, match=r"--ip-adapter FILE:image=PICTURE"):
        find_inputs(source, {}, [])
    save_embeds(tmp_path / "embeds.safetensors", torch.ones(2, 1, 5, 16))
    (tmp_path / "embeds.safetensors").write_bytes(request.ip_adapter[1].embeds)  # type: ignore[index,arg-type]
    found, _ = find_inputs(source, {}, [folder, tmp_path])
    with pytest.raises(RequestError, match=r"generated with the IP-Adapters plain.*, full.*, and 0 were given"):
        again(sd1, source, inputs=found)
    files = [{"file": str(folder / "models" / f"{name}.safetensors")} for name in ("plain", "full")]
    assert judge(source, again(sd1, source, inputs=found, ip_adapters=files)[0]).identical


def test_masks_act_beside_regions_and_pictures_in_tiles(sd1: mezzotint.Pipeline, folder: Path) -> None:
    """A mask of no place changes nothing; one of all places is none; each tile takes the picture."""
    regions = [
        {"prompt": "a lemon", "box": (0.0, 0.0, 0.5, 1.0)},
        {"prompt": "a background", "box": (0.5, 0.0, 1.0, 1.0)},
    ]
    request = Request("", seed=2, steps=2, regions=regions)

    def latents(**fields: Any) -> torch.Tensor:
        return sd1.generate(request.replace(ip_adapter=[entry(folder, **fields)])).latents

    everywhere = latents()
    assert torch.allclose(latents(mask=Image.new("L", (8, 8), 255)), everywhere, atol=1e-5)
    assert torch.allclose(latents(mask=Image.new("L", (8, 8))), sd1.generate(request).latents, atol=1e-5)
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    assert not torch.allclose(latents(mask=half), everywhere, atol=1e-2)
    tiled = Request("a lemon", seed=2, steps=2, image=face(size=(96, 64)), strength=0.5, tile=64)
    adapted = sd1.generate(tiled.replace(ip_adapter=[entry(folder)])).latents
    assert not torch.allclose(adapted, sd1.generate(tiled).latents, atol=1e-2)


def test_what_overflows_runs_in_float32(sd1_folder: Path, folder: Path) -> None:
    pipe = mezzotint.load(sd1_folder, device="cpu", dtype="float16")
    request = Request("a lemon", seed=1, ip_adapter=[entry(folder, scale=100.0)])
    with torch.no_grad():
        for attention in pipe.unet.cross_attentions():
            attention.to_out[0].weight.mul_(2e3)
    result = pipe.generate(request)
    assert "unet" in str(result.notices) and result.latents.isfinite().all()


def test_memory_counts_adapter_and_encoder(sd1_folder: Path, folder: Path) -> None:
    """The encoder and the adapter are there while pictures are encoded, and no longer."""
    model = ModelHeaders.of(sd1_folder, device="cpu")
    request = Request("a lemon", ip_adapter=[entry(folder, 0, 1)])
    predict(model, request, base=0)  # which maps the last libraries
    prompted, plain = predict(model, request, base=0), predict(model, Request("a lemon"), base=0)
    sizes = (tensor.numel() for tensor in CLIPVisionModel(CLIPVisionConfig.model_validate(VISION)).parameters())
    constant = plain.stages["png"] - 3 * 4 * 3 * 32 * 32
    assert prompted.stages["picture prompts"] - constant > 4 * sum(sizes)
    kept = prompted.stages["decode"] - plain.stages["decode"]
    # 2 x 4 tokens, with pictures and without: their keys and values
    assert kept == sum(2 * 2 * 8 * layer.dim * 4 for layer in cross_layers(model.unet))
    assert prompted.stages["step"] - plain.stages["step"] > kept and prompted.macs > plain.macs
