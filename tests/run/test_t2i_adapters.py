"""T2I-Adapters of a request: sentences, scales, modes, grey pictures, the record, memory, what they compose with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import WIDTH, tiny_unet
from tests.run.test_controls import drawing

import mezzotint
from controls import WEIGHTS, write_control
from mezzotint import Request
from mezzotint.again import again, find_inputs, judge, read_source
from mezzotint.config import ScheduleConfig, T2IAdapterConfig
from mezzotint.denoiser import Denoiser
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.entries.control import Control
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.models.t2i_adapter import T2IAdapter, T2IRun
from mezzotint.models.unet import Condition
from mezzotint.run.controls import feature_scales
from mezzotint.weights.save_tensors import write_tensors


def tiny_adapter(channels: int = 3, seed: int = 40, **fields: Any) -> T2IAdapter:
    """A T2I-Adapter for the tiny SD1-shaped model."""
    config = {"channels": tiny_unet(0).config.block_out_channels, "in_channels": channels}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T2IAdapter(T2IAdapterConfig.model_validate(config | fields)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a coloured adapter, one of a grey one, one for SDXL, a ControlNet, and their picture."""
    place = tmp_path_factory.mktemp("t2i")
    write_tensors(place / "colour.safetensors", tiny_adapter().state_dict())
    write_tensors(place / "grey.safetensors", tiny_adapter(1).state_dict())
    xl = tiny_adapter(adapter_type="full_adapter_xl", downscale_factor=16)
    write_tensors(place / "xl.safetensors", xl.state_dict())
    with torch.random.fork_rng():
        write_control(place / "net" / WEIGHTS, tiny_unet(0).config)
    drawing().save(place / "edge.png")
    return place


def entry(folder: Path, name: str = "colour.safetensors", **fields: Any) -> dict[str, Any]:
    return {"file": folder / name, "image": folder / "edge.png", **fields}


def test_the_factor_of_each_feature_and_step() -> None:
    """As diffusers' adapter_conditioning_factor, and A1111's soft weights, which hires-fix's second pass always has."""
    one = Control(file="a", scale=0.5, end=0.29)
    steps = feature_scales(one, 4, 100, second_pass=False)
    assert [scales is not None for scales in steps] == [k < int(100 * 0.29) for k in range(100)]
    assert steps[0] == (0.5,) * 4
    soft = (0.125, 0.31, 0.4125, 0.5)
    for mode in ("prompt", "control"):
        assert feature_scales(one.replace(mode=mode), 4, 100, second_pass=False)[0] == soft
    assert feature_scales(one, 4, 100, second_pass=True)[0] == soft
    late = feature_scales(Control(file="a", start=0.5), 4, 4, second_pass=False)
    assert [scales is not None for scales in late] == [False, False, True, True]


def test_what_does_not_fit_is_a_sentence(sd1: mezzotint.Pipeline, sdxl: mezzotint.Pipeline, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"control\[0\].file: .* a T2I-Adapter for .* XL; the model is .* 1 or 2"):
        sd1.plan(Request("a lemon", control=[entry(folder, "xl.safetensors")]))
    with pytest.raises(CheckpointError, match=r"control\[0\].file: .* for Stable Diffusion 1 or 2; the model is .* XL"):
        sdxl.plan(Request("a lemon", control=[entry(folder)]))
    with pytest.raises(
        RequestError, match=r"control\[1\].mode is guess, which a T2I-Adapter does not have; it must be"
    ):
        sd1.plan(Request("a lemon", control=[entry(folder), entry(folder, mode="guess")]))
    notices = sd1.plan(Request("a lemon", control=[entry(folder, start=0.3, end=0.4)])).notices
    assert "control[0] acts in none of 4 steps" in notices[0]


def outputs(mode_only: bool, split: bool, controlled: bool = True) -> tuple[torch.Tensor, ...]:
    """The outputs for two parts of a prompt and the unconditional one."""
    with torch.random.fork_rng():
        unet = tiny_unet(0).eval()
    draw = torch.Generator().manual_seed(1)
    conditions = [Condition(torch.randn(1, 7, WIDTH, generator=draw)) for _ in range(3)]
    hint = torch.rand(1, 3, 32, 32, generator=draw)
    controls = [T2IRun(tiny_adapter(), hint, [(1.0, 1.0)], mode_only)] if controlled else []
    denoiser = Denoiser(
        unet, Schedule.from_config(ScheduleConfig()), Prediction.from_config(ScheduleConfig()), conditions, split=split,
        levels=[5.0, 0.0], controls=controls, prompts=2,
    )  # fmt: skip
    return denoiser.outputs(torch.randn(2, 4, 4, 4, generator=draw), 5.0)


@torch.no_grad()
def test_control_mode_acts_on_the_prompts_alone() -> None:
    free, all_of, some = outputs(False, False, controlled=False), outputs(False, False), outputs(True, False)
    for k in range(2):
        assert torch.allclose(some[k], all_of[k], atol=1e-5) and not torch.allclose(some[k], free[k], atol=1e-3)
    assert torch.allclose(some[2], free[2], atol=1e-5) and not torch.allclose(all_of[2], free[2], atol=1e-3)
    for one, other in zip(outputs(True, True), some, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_it_composes_and_is_drawn_again(sd1: mezzotint.Pipeline, folder: Path, tmp_path: Path) -> None:
    """Coloured, grey and a ControlNet, with hires-fix, AND and a batch: again gives the same bits from base names."""
    control = [entry(folder, scale=0.8), entry(folder, "grey.safetensors", mode="control"), entry(folder, "net")]
    request = Request("a lemon AND a background", seed=3, count=2, batch=2, hires=2, hires_steps=2, control=control)
    result = sd1.generate(request)
    for k in range(3):  # each of them acts
        without = sd1.generate(request.replace(control=control[:k] + control[k + 1 :]))
        assert not torch.allclose(result.latents, without.latents, atol=1e-3)
    path = tmp_path / "picture.png"
    result.images[1].save(path)
    source = read_source(path)
    assert source.record is not None and source.request.control is not None
    assert [each.file for each in source.request.control] == ["colour.safetensors", "grey.safetensors", "net"]
    assert str(folder) not in str(result.images[1].info)
    assert "Model: colour" in result.images[1].info["parameters"]
    found, _ = find_inputs(source, {}, [folder])
    files = [{"file": str(each["file"])} for each in control]
    assert judge(source, again(sd1, source, inputs=found, controls=files)[0]).identical


def test_a_grey_adapter_reads_luminance_and_the_first_picture(sd1: mezzotint.Pipeline, folder: Path) -> None:
    """A picture in colour gives what its grey form gives; without one the picture that the run starts from is read."""
    colour, grey = drawing(seed=6), drawing(seed=6).convert("L")
    both = [
        sd1.generate(Request("a lemon", seed=1, control=[entry(folder, "grey.safetensors", image=picture)])).latents
        for picture in (colour, grey)
    ]
    assert torch.equal(*both)
    alone = Request("a lemon", seed=1, image=colour, mask=grey, control=[{"file": folder / "colour.safetensors"}])
    given = alone.replace(control=[entry(folder, image=colour)])
    assert torch.equal(sd1.generate(alone).latents, sd1.generate(given).latents)


def test_memory_counts_the_network_once(sd1_folder: Path, folder: Path) -> None:
    model = ModelHeaders.of(sd1_folder, device="cpu")
    requests = [Request("a lemon", control=[entry(folder)] * 2), Request("a lemon")]
    predict(model, requests[0], base=0)  # which maps the last libraries
    controlled, plain = (predict(model, request, base=0) for request in requests)
    weights = sum(4 * tensor.numel() for tensor in tiny_adapter().state_dict().values())
    assert controlled.stages["decode"] - plain.stages["decode"] == weights
    assert controlled.stages["step"] - plain.stages["step"] > weights and controlled.macs > plain.macs
    with pytest.raises(RequestError, match=r"control\[0\].mode is guess"):
        predict(model, Request("a lemon", control=[entry(folder, mode="guess")]), base=0)
