"""ControlNets of a request: sentences, scales, masks, modes, the record, memory, and what they compose with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import WIDTH, tiny_unet

import mezzotint
from mezzotint import Request
from mezzotint.again import again, find_inputs, judge, read_source
from mezzotint.cli.fields import control_of
from mezzotint.config import ControlNetConfig, ScheduleConfig
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.entries.control import Control
from mezzotint.errors import CheckpointError, MissingExtraError, RequestError
from mezzotint.images.control import canny
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.models.controlnet import ControlNet, ControlRun
from mezzotint.models.unet import Condition
from mezzotint.run.controls import control_scales
from mezzotint.weights.save_tensors import write_tensors


def drawing(size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def tiny_control(seed: int = 20) -> ControlNet:
    """A ControlNet for the tiny SD1-shaped model, whose zero convolutions are loud."""
    unet = tiny_unet(0).config
    fields = unet.model_dump() | {"conditioning_embedding_out_channels": (4, 4, 8, 8)}
    torch.manual_seed(seed)
    network = ControlNet(ControlNetConfig.model_validate(fields)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "controlnet_" in name:
                parameter.normal_(std=0.3)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ControlNet in diffusers' layout, and its picture."""
    place = tmp_path_factory.mktemp("control")
    with torch.random.fork_rng():
        network = tiny_control()
    (place / "net").mkdir()
    fields = network.config.model_dump(mode="json") | {"_class_name": "ControlNetModel"}
    (place / "net" / "config.json").write_text(json.dumps(fields))
    write_tensors(place / "net" / "diffusion_pytorch_model.safetensors", network.state_dict())
    drawing().save(place / "edge.png")
    return place


def entry(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"file": folder / "net", "image": folder / "edge.png", **fields}


# ---- the request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"scale": float("nan")}, "control[1].scale is nan; it must be a number from 0 to 100"),
        ({"start": 0.5, "end": 0.4}, "control[1].end is 0.4; it must be a share of the steps from 0 to 1, above start"),
        ({"mode": "strong"}, "control[1].mode is 'strong'; it must be balanced, prompt, control or guess"),
        ({"weight": 1}, "control[1] has no field 'weight'; it has file, image, scale"),
        ({"image": 3}, "control[1].image is 3; it must be a picture"),
    ],
)
def test_a_wrong_entry_is_named(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as error:
        Request("a", control=["a.pth", {"file": "b.pth", **wrong}])
    assert str(error.value).startswith(sentence)


def test_an_entry_is_read_in_every_form() -> None:
    """A path alone, a picture in memory, a table with empty cells, JSON; and the command line's."""
    picture = drawing((8, 8))
    request = Request("a", control=[Path("a.pth"), {"file": "b", "image": picture, "end": None}])
    assert request.control is not None and request.control[0] == Control(file="a.pth")
    assert isinstance(request.control[1].image, bytes) and request.control[1].end == 1.0
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert request.replace(seed=3).control == request.control
    text = "C:\\nets\\canny, v1.pth:image=a, b.png,scale=0.8,end=0.6"
    assert control_of(text) == {"file": "C:\\nets\\canny, v1.pth", "image": "a, b.png", "scale": "0.8", "end": "0.6"}
    assert Request("a", control=[control_of(text)]).control[0].scale == 0.8  # type: ignore[index]
    assert control_of("owner/name") == {"file": "owner/name"}
    with pytest.raises(RequestError, match=r"control\[0\] has no field 'weight'"):
        Request("a", control=[control_of("a.pth:scale=1,weight=2")])


def test_what_does_not_fit_is_a_sentence(sd1: mezzotint.Pipeline, sdxl: mezzotint.Pipeline, folder: Path) -> None:
    with pytest.raises(RequestError, match=r"control\[0\].image is missing"):
        sd1.plan(Request("a lemon", control=[folder / "net"]))
    with pytest.raises(CheckpointError, match=r"control\[0\].file: .*Stable Diffusion 1; the model is .* XL"):
        sdxl.plan(Request("a lemon", control=[entry(folder)]))
    with pytest.raises(CheckpointError, match=r"control\[0\].file: the ControlNet 'nowhere.pth' does not exist"):
        sd1.plan(Request("a lemon", control=[entry(folder, file="nowhere.pth")]))
    wide = drawing((64, 32))
    notices = sd1.plan(Request("a lemon", control=[entry(folder, image=wide, start=0.3, end=0.4)])).notices
    assert "control[0] acts in none of 4 steps" in notices[0] and "is 64x32 and is stretched to 32x32" in notices[1]


# ---- the arithmetic --------------------------------------------------------------------------------------------------


def test_the_factor_of_each_residual_and_step() -> None:
    """Steps as in diffusers, guess mode's logspace, A1111's soft weights, which hires-fix's second pass always has."""
    one = Control(file="a", scale=0.5, start=0.2, end=0.8)
    steps = control_scales(one, 13, 10, second_pass=False)
    keeps = [k / 10 >= 0.2 and (k + 1) / 10 <= 0.8 for k in range(10)]
    assert [scales is not None for scales in steps] == keeps
    assert steps[2] == (0.5,) * 13
    soft = tuple(0.5 * 0.825 ** (12 - k) for k in range(13))
    assert control_scales(one.replace(mode="prompt"), 13, 10, second_pass=False)[2] == soft
    assert control_scales(one.replace(mode="control"), 10, 10, second_pass=False)[2] == soft[:10]
    assert control_scales(one, 13, 10, second_pass=True)[2] == soft
    guess = control_scales(one.replace(mode="guess"), 13, 10, second_pass=True)[2]
    assert guess is not None and (guess[0], guess[12]) == pytest.approx((0.05, 0.5), rel=1e-6)


def outputs(mode_only: bool, split: bool, controlled: bool = True) -> tuple[torch.Tensor, ...]:
    """The outputs for two parts of a prompt and the unconditional one."""
    with torch.random.fork_rng():
        unet, network = tiny_unet(0).eval(), tiny_control()
    draw = torch.Generator().manual_seed(1)
    conditions = [Condition(torch.randn(1, 7, WIDTH, generator=draw)) for _ in range(3)]
    hint = torch.rand(1, 3, 32, 32, generator=draw)
    schedule = Schedule.from_config(ScheduleConfig())
    controls = [ControlRun(network, hint, [(1.0,) * 5], mode_only)] if controlled else []
    denoiser = Denoiser(
        unet, schedule, Prediction.from_config(ScheduleConfig()), conditions, split=split,
        levels=[5.0, 0.0], controls=controls, prompts=2,
    )  # fmt: skip
    return denoiser.outputs(torch.randn(2, 4, 4, 4, generator=draw), 5.0)


@torch.no_grad()
def test_control_mode_acts_on_the_prompts_alone() -> None:
    """On each part that AND joins, not on the unconditional output; one condition at a time gives the same."""
    free, all_of, some = outputs(False, False, controlled=False), outputs(False, False), outputs(True, False)
    for k in range(2):
        assert torch.allclose(some[k], all_of[k], atol=1e-5) and not torch.allclose(some[k], free[k], atol=1e-2)
    assert torch.allclose(some[2], free[2], atol=1e-5) and not torch.allclose(all_of[2], free[2], atol=1e-2)
    for one, other in zip(outputs(True, True), some, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# ---- whole pictures --------------------------------------------------------------------------------------------------


def test_it_composes_and_is_drawn_again(sd1: mezzotint.Pipeline, folder: Path, tmp_path: Path) -> None:
    """With hires-fix, AND, a batch, seamless: the record has base names, and again gives the same bits."""
    control = [entry(folder, scale=0.8, end=0.8), entry(folder, image=drawing(seed=4), mode="control")]
    request = Request(
        "a lemon AND a background", seed=3, count=2, batch=2, hires=2, hires_steps=2, seamless="x", control=control
    )
    result = sd1.generate(request)
    plain = sd1.generate(request.replace(control=None))
    assert not torch.allclose(result.latents, plain.latents, atol=1e-2)
    path = tmp_path / "picture.png"
    result.images[1].save(path)
    drawing(seed=4).save(tmp_path / "other.png")
    source = read_source(path)
    assert source.record is not None and source.request.control is not None
    assert source.request.control[0].file == "net" and source.request.control[0].image == "edge.png"
    assert str(folder) not in str(result.images[1].info)
    assert "My prompt" not in result.images[1].info["parameters"]
    assert "Control Mode: ControlNet is more important" in result.images[1].info["parameters"]
    with pytest.raises(RequestError, match=r"give it with --control FILE:image=PICTURE|give the picture or its folder"):
        find_inputs(source, {}, [])
    recorded = {name: given.sha256 for name, given in source.record.inputs.items()}
    assert [*recorded] == ["control[0].image", "control[1].image"]
    inputs = {"control[0].image": str(folder / "edge.png"), "control[1].image": str(tmp_path / "bytes.png")}
    Path(inputs["control[1].image"]).write_bytes(request.control[1].image)  # type: ignore[index,arg-type]
    found, _ = find_inputs(source, {}, [folder, tmp_path])
    assert found == inputs
    with pytest.raises(RequestError, match="generated with the ControlNets net, net, and 0 were given"):
        again(sd1, source, inputs=found)
    files = [{"file": str(folder / "net")}] * 2
    assert judge(source, again(sd1, source, inputs=found, controls=files)[0]).identical


def test_what_is_missing_runs_in_float32_too(folder: Path, sd1_folder: Path) -> None:
    """A ControlNet that overflows is repeated in float32, with the UNet."""
    pipe = mezzotint.load(sd1_folder, device="cpu", dtype="float16")
    request = Request("a lemon", seed=1, control=[entry(folder)])
    plan = pipe.plan(request)
    (network,) = pipe._model.controls.load(plan.controls)
    with torch.no_grad():
        network.controlnet_mid_block.weight.mul_(2e4)
    result = pipe.generate(plan)
    assert "unet" in str(result.notices) and result.latents.isfinite().all()


def test_memory_counts_the_networks(sd1_folder: Path, folder: Path) -> None:
    model = ModelHeaders.of(sd1_folder, device="cpu")
    requests = [Request("a lemon", control=[entry(folder)] * 2), Request("a lemon")]
    predict(model, requests[0], base=0)  # which maps the last libraries
    controlled, plain = (predict(model, request, base=0) for request in requests)
    weights = sum(4 * tensor.numel() for tensor in tiny_control().state_dict().values())
    assert controlled.stages["decode"] - plain.stages["decode"] == weights  # once: both entries are one network
    assert controlled.stages["step"] - plain.stages["step"] > weights and controlled.macs > plain.macs


# ---- edges -----------------------------------------------------------------------------------------------------------


def test_other_preprocessors_are_a_sentence() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install controlnet_aux, then controlnet_aux\.OpenposeDetector"):
        _ = mezzotint.control.openpose
    with pytest.raises(RequestError, match="low is 3 and high 2"):
        canny(drawing(), 3, 2)
