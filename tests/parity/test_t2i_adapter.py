"""T2I-Adapter against diffusers.T2IAdapter and its pipelines: features, files, keys of the public ones, pictures.

    python tests/parity/test_t2i_adapter.py

prints how far apart pictures are, in every case with every family. A pipeline that takes no adapter is given one by
adding its features in every call of its UNet.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import MultiAdapter, T2IAdapter
from PIL import Image
from safetensors.torch import save_file
from tolerances import EPS
from torch import Tensor

import pictures
import tiny
from mezzotint.config import T2IAdapterConfig, UNetConfig
from mezzotint.errors import CheckpointError
from mezzotint.models import t2i_adapter as module
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import Condition, UNet
from mezzotint.placement import Placement
from mezzotint.weights import inspect_model
from mezzotint.weights.control_files import scan_control
from mezzotint.weights.save_tensors import write_tensors
from mezzotint.weights.t2i_files import _config_fields
from pictures import NEGATIVE, PROMPT, Drawn, Pair, different, draw, same
from test_adapters import factors, peft
from test_controlled_pictures import blot, drawing
from test_controlnet import theirs as controlnet

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning"),
]

KINDS: dict[str, dict[str, Any]] = {  # for the small networks of two levels
    "full": {"channels": [32, 64]},
    "grey": {"channels": [32, 64], "in_channels": 1},
    "light": {"channels": [32], "adapter_type": "light_adapter", "num_res_blocks": 4},
    "xl": {"channels": [32, 64], "adapter_type": "full_adapter_xl", "downscale_factor": 16},
}
LIGHT = {"block_out_channels": (32, 32)}  # of a UNet that takes the light one's features


def theirs(kind: str, seed: int = 30, **changes: Any) -> T2IAdapter:
    torch.manual_seed(seed)
    return T2IAdapter(**KINDS[kind] | changes).eval()


def ours(model: T2IAdapter) -> module.T2IAdapter:
    network = module.T2IAdapter(T2IAdapterConfig.model_validate(dict(model.config))).eval()
    network.load_state_dict(model.state_dict(), strict=True)
    return network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_features_are_diffusers(kind: str) -> None:
    """Also where pooling meets an odd side."""
    model = theirs(kind)
    picture = torch.rand(2, model.config.in_channels, 112, 80, generator=torch.Generator().manual_seed(1))
    for one, other in zip(ours(model)(picture), model(picture), strict=True):
        assert tiny.apart(one, other) < 100 * EPS


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_the_unet_adds_features_where_diffusers_does(family: str) -> None:
    """Before the downsampling of a level with attention, after that of another; then in the middle."""
    model = tiny.unet(family)
    network = UNet(UNetConfig.model_validate(dict(model.config))).eval()
    network.load_state_dict(model.state_dict())
    draw = torch.Generator().manual_seed(2)
    width = model.config.cross_attention_dim
    sample, context = torch.randn(2, 4, 9, 7, generator=draw), torch.randn(2, 7, width, generator=draw)
    condition = Condition(context, torch.randn(2, tiny.WIDTH, generator=draw), torch.full((2, 6), 1001.0))
    levels = [(32, 5, 4), (64, 5, 4), (64, 5, 4)] if family == "sdxl" else [(32, 9, 7), (64, 5, 4), (64, 5, 4)]
    features = [torch.randn(1, *shape, generator=draw).expand(2, -1, -1, -1) for shape in levels]
    for count in range(4):
        expected = model(
            sample, 481, context,
            added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": condition.time_ids},
            down_intrablock_additional_residuals=[feature.clone() for feature in features[:count]],
        ).sample  # fmt: skip
        found = network(sample, 481.0, condition, features=[feature[:1] for feature in features[:count]])
        assert tiny.apart(found, expected) < 100 * EPS


# ---- files -----------------------------------------------------------------------------------------------------------

# the published networks: config.json, parameters, and the shape of the first tensor of their single file
GREY, XL = {"in_channels": 1}, {"adapter_type": "full_adapter_xl", "downscale_factor": 16}
COLOR = {"channels": [320, 640, 1280], "num_res_blocks": 4, "adapter_type": "light_adapter"}
FULL: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "t2iadapter_canny_sd14v1, t2iadapter_sketch_sd15v2": (GREY, 77_000_640, (320, 64, 3, 3)),
    "t2iadapter_depth_sd14v1, t2iadapter_depth_sd15v2": ({}, 77_369_280, (320, 192, 3, 3)),
    "t2iadapter_color_sd14v1": (COLOR, 18_689_200, (80, 192, 1, 1)),
    "t2i-adapter-canny-sdxl-1.0": (XL, 79_028_160, (320, 768, 3, 3)),
    "an adapter for SDXL of one channel": (XL | GREY, 77_553_600, (320, 256, 3, 3)),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_keys_and_shapes(name: str) -> None:
    """And the configuration that the shapes of a single file give."""
    fields, parameters, first = FULL[name]
    with torch.device("meta"):
        model = T2IAdapter(**fields)
        network = module.T2IAdapter(T2IAdapterConfig.model_validate(dict(model.config)))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    light = model.config.adapter_type == "light_adapter"
    assert expected[f"adapter.{'body.0.in_conv' if light else 'conv_in'}.weight"] == first
    assert T2IAdapterConfig.model_validate(_config_fields(expected)) == network.config


def original(name: str, light: bool) -> str:
    """A tensor's name as the adapter's authors have it: the residual blocks of a full one are in one list."""
    own = name.removeprefix("adapter.")
    if light or not own.startswith("body."):
        return own.replace(".resnets.", ".body.")
    _, feature, layer, *rest = own.split(".")
    block = int(rest.pop(0)) if layer == "resnets" else 0
    return ".".join(["body", str(2 * int(feature) + block), *([] if layer == "resnets" else [layer]), *rest])


def load(path: Path, unet: UNetConfig) -> module.T2IAdapter:
    network = scan_control(str(path), unet).load(UNet(unet), torch.float32, torch.device("cpu"), Placement())
    assert isinstance(network, module.T2IAdapter)
    return network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_form_of_a_file_holds_the_same_network(kind: str, tmp_path: Path) -> None:
    """A folder, diffusers' names with and without a prefix, the authors' names, alone or in a table "adapter"."""
    model = theirs(kind)
    state, light = model.state_dict(), kind == "light"
    renamed = {original(key, light): tensor for key, tensor in state.items()}
    model.save_pretrained(tmp_path / "folder")
    save_file(state, tmp_path / "diffusers.safetensors")
    save_file({key.removeprefix("adapter."): tensor for key, tensor in state.items()}, tmp_path / "bare.safetensors")
    torch.save(renamed, tmp_path / "original.pth")
    torch.save({"adapter": renamed}, tmp_path / "nested.pth")
    unet = unet_config(kind)
    picture = torch.rand(1, model.config.in_channels, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = model(picture)
    for name in ("folder", "diffusers.safetensors", "bare.safetensors", "original.pth", "nested.pth"):
        found = load(tmp_path / name, unet)(picture)
        assert max(map(tiny.apart, found, expected)) < 100 * EPS, name
        report = inspect_model(tmp_path / name)
        words = {"grey": "full, of grey", "light": "light, of coloured"}.get(kind, "full, of coloured")
        family = "XL" if kind == "xl" else "1 or 2"
        assert report.kind.startswith(f"a T2I-Adapter for Stable Diffusion {family} ({words} pictures"), name
        assert not report.problems and report.parts[0].name == "t2i_adapter"
        assert report.parts[0].parameters == sum(tensor.numel() for tensor in state.values())


def unet_config(kind: str) -> UNetConfig:
    family = tiny.UNETS["sdxl" if kind == "xl" else "sd1"]
    return UNetConfig.model_validate(family | (LIGHT if kind == "light" else {}))


def test_what_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    theirs("xl").save_pretrained(tmp_path / "xl")
    with pytest.raises(CheckpointError, match=r"a T2I-Adapter for Stable Diffusion XL; the model is .* 1 or 2"):
        scan_control(str(tmp_path / "xl"), unet_config("full"))
    theirs("full").save_pretrained(tmp_path / "full")
    with pytest.raises(CheckpointError, match="for Stable Diffusion 1 or 2; the model is Stable Diffusion XL"):
        scan_control(str(tmp_path / "full"), unet_config("xl"))
    sentence = "another model: its features have 32 channels at 1/1, 64 channels at 1/2; the UNet takes 32 channels"
    with pytest.raises(CheckpointError, match=sentence):
        scan_control(str(tmp_path / "full"), unet_config("light"))
    save_file(theirs("full").state_dict() | {"body.2.down_opt.op.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a T2I-Adapter of an unsupported form: body.2.down_opt"):
        scan_control(str(tmp_path / "a.safetensors"), unet_config("full"))
    state = theirs("full").state_dict()
    del state["adapter.conv_in.weight"]
    save_file(state, tmp_path / "b.safetensors")
    assert inspect_model(tmp_path / "b.safetensors").problems[0].endswith("lacks adapter.conv_in.weight")


# ---- pictures --------------------------------------------------------------------------------------------------------

SIZE = (48, 64)  # 16 divides it
ONE: dict[str, Any] = {"image": drawing(1), "scale": 0.8}
OTHER: dict[str, Any] = {"image": drawing(2, (60, 90)).convert("L"), "scale": 0.6}
FROM_PICTURE = {"image": drawing(5, SIZE), "strength": 0.6, "steps": 8}
MASKED = FROM_PICTURE | {"mask": blot().resize(SIZE, Image.Resampling.NEAREST), "strength": 1.0}
# what is drawn: a kind or "controlnet" and the entry, and other fields of the request
CASES: dict[str, tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]] = {
    "one": ([("full", ONE)], {"sampler": "euler", "count": 2}),
    "two": ([("full", ONE), ("grey", OTHER)], {"sampler": "ddim"}),
    "a part of the steps": ([("full", ONE | {"end": 0.6})], {"sampler": "dpmpp_2m", "steps": 8}),
    "light": ([("light", ONE)], {"sampler": "euler"}),
    "image to image": ([("full", ONE), ("grey", OTHER)], FROM_PICTURE | {"sampler": "euler"}),
    "inpainting": ([("full", ONE)], MASKED | {"sampler": "ddim"}),
    "with a LoRA": ([("full", ONE)], {"sampler": "euler", "loras": 0.6}),
    "with a ControlNet": ([("full", ONE), ("controlnet", {"image": drawing(3)})], {"sampler": "euler"}),
}
PIPELINES = {
    "": (diffusers.StableDiffusionAdapterPipeline, diffusers.StableDiffusionXLAdapterPipeline),
    "picture": (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionXLImg2ImgPipeline),
    "mask": (diffusers.StableDiffusionInpaintPipeline, diffusers.StableDiffusionXLInpaintPipeline),
    "controlnet": (diffusers.StableDiffusionControlNetPipeline, diffusers.StableDiffusionXLControlNetPipeline),
}


@contextmanager
def adding(unet: Any, adapters: list[T2IAdapter], entries: list[dict[str, Any]]) -> Iterator[None]:
    """Add features to every call of a UNet, for the pipelines that take no adapter."""
    features: list[Tensor] = []
    for adapter, entry in zip(adapters, entries, strict=True):
        picture = (
            entry["image"]
            .resize(SIZE, Image.Resampling.LANCZOS)
            .convert("L" if adapter.config.in_channels == 1 else "RGB")
        )
        levels = torch.from_numpy(np.atleast_3d(np.asarray(picture, np.float32) / 255.0)).permute(2, 0, 1)
        scaled = [entry["scale"] * feature for feature in adapter(levels[None])]
        features = [a + b for a, b in zip_longest(features, scaled, fillvalue=0)]  # type: ignore[misc]
    if not adapters:
        yield
        return
    plain = unet.forward

    def forward(sample: Tensor, *inputs: Any, **named: Any) -> Any:
        added = [feature.repeat(len(sample), 1, 1, 1) for feature in features]
        return plain(sample, *inputs, down_intrablock_additional_residuals=added, **named)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


@torch.no_grad()
def both(pair: Pair, family: str, case: str, place: Path) -> tuple[Drawn, Drawn]:
    """The picture of a case, ours and theirs."""
    given, changes = CASES[case]
    xl = family == "sdxl"
    nets: list[Any] = []
    for k, (kind, _) in enumerate(given):
        seed, more = 30 + k, KINDS["xl"] | {"in_channels": 1 if kind == "grey" else 3} if xl else {}
        nets.append(controlnet(family, seed) if kind == "controlnet" else theirs(kind, seed, **more))
        nets[-1].save_pretrained(place / str(k))
    entries = [entry for _, entry in given]
    request = pictures.fields(guidance_scale=6.0, width=SIZE[0], height=SIZE[1]) | changes
    control = [{"file": place / str(k), **entry} for k, entry in enumerate(entries)]
    lora = changes.get("loras")
    own = {"loras": [(str(write_lora(place / "lora.safetensors", pair)), lora)]} if lora else {}
    mine = pictures.ours(pair, request | {"control": control} | own)
    request.pop("loras", None)

    adapters = [net for net in nets if isinstance(net, T2IAdapter)]
    kind = pictures.kind_of(request)
    mode = "" if kind == "text" else kind
    mode = mode or ("controlnet" if len(adapters) < len(nets) else "")
    parts = {key: part for key, part in pair.theirs.components.items() if key != "image_encoder" or mode}
    parts["unet"] = copy.deepcopy(parts["unet"]) if lora else parts["unet"]
    if mode == "controlnet":
        parts["controlnet"] = nets[-1]
    elif not mode:
        parts["adapter"] = MultiAdapter(nets) if len(nets) > 1 else nets[0]
    pipe = PIPELINES[mode][xl](**parts, **({} if xl else {"requires_safety_checker": False}))
    options: dict[str, Any] = {}
    if lora:
        pipe.load_lora_weights(place / "lora.safetensors", adapter_name="one")
        pipe.set_adapters("one", lora)
    if not mode:
        shown = [entry["image"] for entry in entries]
        scales = [entry["scale"] for entry in entries]
        options["image"] = shown if len(nets) > 1 else shown[0]
        options["adapter_conditioning_scale"] = scales if len(nets) > 1 else scales[0]
        if "end" in entries[0]:
            options["adapter_conditioning_factor"] = entries[0]["end"]
    elif mode == "controlnet":
        options["image"] = entries[-1]["image"]
    with adding(pipe.unet, adapters if mode else [], entries[: len(adapters)] if mode else []):
        sized = pictures.unsized(request) if mode == "picture" else request
        expected = draw(pipe, pair.scheduler, sized, **options)
    if mode == "mask":
        pictures.only_inside(request["mask"], mine, expected)
    return mine, expected


def write_lora(path: Path, pair: Pair) -> Path:
    """Write a random LoRA for the UNet."""
    return write_tensors(path, peft({name: pair for name, pair in factors(pair).items() if name.startswith("unet.")}))


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_light(tmp_path_factory.mktemp("light"))


def build_light(folder: Path) -> Pair:
    """A model of Stable Diffusion 1's shape whose two levels are as wide as each other."""
    tokenizer = Tokenizer.subset([PROMPT, NEGATIVE])
    ids = {"vocab_size": len(tokenizer.vocab), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    pictures.save(folder, "sd1", tokenizer, [tiny.clip("sd1", **ids)], tiny.unet("sd1", **LIGHT), tiny.vae())
    return pictures.load(folder, "sd1")


TESTED = [
    *(("sd1", case) for case in CASES if case not in ("a part of the steps", "with a LoRA")),
    *(("sdxl", case) for case in CASES if case not in ("light", "with a ControlNet")),
]


@pytest.mark.parametrize(("family", "case"), TESTED)
def test_pictures_are_those_of_diffusers(
    pairs: dict[str, Pair], light: Pair, family: str, case: str, tmp_path: Path
) -> None:
    pair = light if case == "light" else pairs[family]
    mine, expected = both(pair, family, case, tmp_path)
    same(mine, expected)
    if case in ("one", "light"):
        different(mine, pictures.ours(pair, pictures.fields(width=SIZE[0], height=SIZE[1], **CASES[case][1])))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        narrow = build_light(Path(folder))

        def of_case(pairs: dict[str, Pair], family: str, case: str, place: Path) -> tuple[Drawn, Drawn] | None:
            pair = narrow if case == "light" else pairs[family]
            return both(pair, family, case, place) if (family, case) in TESTED else None

        pictures.print_table("T2I-Adapter", ("sd1", "sdxl"), CASES, of_case)


if __name__ == "__main__":
    main()
