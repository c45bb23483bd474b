"""What the walk predicts, against what fresh processes and the networks themselves hold, in every mode."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_bytes import live_bytes

from mezzotint import kernels
from mezzotint.config import CLIPConfig, UNetConfig, VAEConfig
from mezzotint.kernels import convolution as kernel
from mezzotint.kernels import linear as linear_kernel
from mezzotint.memory import walk
from mezzotint.memory.walk import Moment, Workspace, vae_peak, walk_text_encoder, walk_unet, walk_vae
from mezzotint.models import tiles, vae_modes
from mezzotint.models.attention import backend
from mezzotint.models.blocks import GEGLU, ImageAttention
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.strips import decode_in_strips, encode_in_strips
from mezzotint.models.tiles import decode_in_tiles, encode_in_tiles
from mezzotint.models.unet import Condition, UNet
from mezzotint.models.vae import VAE

UNET = {
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
VAE_SHAPE = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}

CHILD = """
import json, sys
from pathlib import Path
from mezzotint.memory import system
system.return_freed()
import torch
from mezzotint.config import UNetConfig, VAEConfig
from mezzotint.models.attention import backend
from mezzotint.models.unet import Condition, UNet
from mezzotint.models.vae import VAE

torch.set_num_threads(1)
unet, vae = (json.loads(text) for text in sys.argv[1:])

def status(name):
    rows = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith(name)).split()[1]) * 1024

def held(call):
    call()  # what libraries load and keep when they first run
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

def format(network):
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

found = {}
with torch.inference_mode():
    network = format(UNet(UNetConfig(**unet)))
    network.fuse_projections()
    for batch, name in ((2, "auto"), (1, "math")):
        x, condition = torch.randn(batch, 4, 32, 32), Condition(torch.randn(batch, 77, 64))
        given = network.keys_values(condition)
        with backend(name):
            found[f"unet {batch} {name}"] = held(lambda: network(x, 500.0, condition, keys_values=given))
    network, z = format(VAE(VAEConfig(**vae))), torch.randn(1, 4, 96, 96)
    found["vae whole"] = held(lambda: network.decode(z))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_are_those_of_fresh_processes() -> None:
    """Above by at most 10 %, below by at most 3 %, and 1.5 MB for what is smaller than a walk looks at."""
    command = [sys.executable, "-c", CHILD, json.dumps(UNET), json.dumps(VAE_SHAPE)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    unet, vae = UNetConfig.model_validate(UNET), VAEConfig.model_validate(VAE_SHAPE)
    step = walk_unet(unet, 32, 32, 77)
    predicted = {
        "unet 2 auto": step.peak(Workspace(), 2),
        "unet 1 math": step.peak(Workspace(attention="math")),
        "vae whole": vae_peak(vae, 1, 192, 192, "decode", "whole", Workspace()),
    }
    for name, peak in predicted.items():
        assert 0.97 * measured[name] - 1.5e6 < peak < 1.10 * measured[name] + 1.5e6, (name, peak, measured)


def live(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors that exist at once while `run` runs."""
    return live_bytes(run)[1]


TENSORS = Workspace(copies_conv_weights=False)  # oneDNN's copies of weights are no tensors


@pytest.fixture(autouse=True)
def torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave everything to torch, whose own memory is not that of tensors."""
    monkeypatch.setattr(kernel, "takes", lambda *_: False)
    monkeypatch.setattr(linear_kernel, "takes", lambda *_, **__: False)


@pytest.mark.skipif(kernels.library() is None, reason=f"kernels {kernels.describe()}")
@torch.inference_mode()
def test_a_step_needs_what_the_walk_predicts_with_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "LEAST_WORK", 0)
    monkeypatch.setattr(linear_kernel, "LEAST_WORK", 0)
    walk_unet.cache_clear()
    config = UNetConfig.model_validate(UNET)
    network = UNet(config).eval().to(memory_format=torch.channels_last)
    x, condition = torch.zeros(1, 4, 32, 24), Condition(torch.zeros(1, 77, 64))
    given, times = network.keys_values(condition), network.time_projections(1.0, condition)
    held = live(lambda: network(x, 1.0, condition, keys_values=given, time_projections=times))
    workspace = Workspace(copies_conv_weights=True, attention="sdpa", fuses_geglu=True)
    predicted = walk_unet(config, 32, 24, 77).peak(workspace)
    walk_unet.cache_clear()
    assert predicted == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("name", ["sdpa", "math", "sliced:64KiB"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_a_step_needs_what_the_walk_predicts(name: str, batch: int) -> None:
    """Batch 2 is guidance in one call. `math` also scales its queries, and the fused kernel has a buffer."""
    config = UNetConfig.model_validate(UNET)
    network = UNet(config).eval().to(memory_format=torch.channels_last)
    x, condition = torch.zeros(batch, 4, 32, 24), Condition(torch.zeros(batch, 77, 64))
    given, times = network.keys_values(condition), network.time_projections(1.0, condition)
    with backend(name):
        held = live(lambda: network(x, 1.0, condition, keys_values=given, time_projections=times))
    predicted = walk_unet(config, 32, 24, 77).peak(Workspace(copies_conv_weights=False, attention=name), batch)
    assert predicted == pytest.approx(held, rel=0.03)


@torch.inference_mode()
def test_a_step_with_freeu_needs_what_the_walk_predicts() -> None:
    config, factors = UNetConfig.model_validate(UNET), (1.5, 1.6, 0.9, 0.2)
    network = UNet(config).eval().to(memory_format=torch.channels_last)
    x, condition = torch.zeros(1, 4, 32, 24), Condition(torch.zeros(1, 77, 64))
    given, times = network.keys_values(condition), network.time_projections(1.0, condition)
    options = {"keys_values": given, "time_projections": times, "freeu_factors": factors}
    held = live(lambda: network(x, 1.0, condition, **options))
    assert walk_unet(config, 32, 24, 77, freeu=factors).peak(TENSORS) == pytest.approx(held, rel=0.03)


@torch.inference_mode()
def test_a_step_under_a_picture_needs_what_the_walk_predicts() -> None:
    """The term of an IP-Adapter in every cross-attention, with a mask."""
    config = UNetConfig.model_validate(UNET)
    network = UNet(config).eval().to(memory_format=torch.channels_last)
    x, condition = torch.zeros(1, 4, 32, 24), Condition(torch.zeros(1, 77, 64))
    given, times = network.keys_values(condition), network.time_projections(1.0, condition)
    tokens = network.keys_values(Condition(torch.zeros(1, 16, 64)))
    terms = [ImageAttention(k, v, 0.5, torch.ones(1, 1, 256, 192)) for k, v, *_ in tokens]
    options = {"keys_values": [(k, v, [own]) for (k, v, *_), own in zip(given, terms, strict=True)]}
    network(x, 1.0, condition, time_projections=times, **options)  # resizes the masks, once for a run
    held = live(lambda: network(x, 1.0, condition, time_projections=times, **options))
    assert walk_unet(config, 32, 24, 77, image_tokens=(16,)).peak(TENSORS) == pytest.approx(held, rel=0.03)


@torch.inference_mode()
def test_a_text_encoder_needs_what_the_walk_predicts() -> None:
    config = CLIPConfig(vocab_size=100, hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    network, ids = CLIPTextModel(config).eval(), torch.zeros(1, 77, dtype=torch.long)
    assert walk_text_encoder(config).peak(TENSORS) == pytest.approx(live(lambda: network(ids)), rel=0.06)


@pytest.mark.parametrize(
    "changes", [{}, {"block_out_channels": (8, 64), "mid_block_add_attention": False}], ids=["sd", "f=2"]
)
@torch.inference_mode()
def test_the_vae_needs_what_the_walk_predicts(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole VAE to 2 % and 64 KiB, strips and tiles to four strips."""
    fields = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8, "layers_per_block": 2} | changes
    config = VAEConfig.model_validate(fields)
    vae = VAE(config).eval().to(memory_format=torch.channels_last)
    side, strip = config.downscale, 2**15
    tile = 64 // side
    pixels, z = torch.zeros(1, 3, 192, 128), torch.zeros(1, 4, 192 // side, 128 // side)
    runs: dict[tuple[vae_modes.VAEMode, tiles.Half], Callable[[], object]] = {
        ("whole", "decode"): lambda: vae.decode(z),
        ("whole", "encode"): lambda: vae.encode(pixels),
        ("strips", "decode"): lambda: decode_in_strips(vae, z, strip),
        ("strips", "encode"): lambda: encode_in_strips(vae, pixels, strip),
        ("tiles", "decode"): lambda: decode_in_tiles(vae, z, tile, tile // 4, strip),
        ("tiles", "encode"): lambda: encode_in_tiles(vae, pixels, tile, tile // 4, strip),
    }
    monkeypatch.setattr(walk, "_FewStrips", partial(walk._FewStrips, strip))
    small = {name: partial(getattr(tiles, name), tile=tile, overlap=tile // 4) for name in ("decode_one", "encode_one")}
    monkeypatch.setattr(walk, "tiles", SimpleNamespace(**small))
    walk_vae.cache_clear()
    held = {key: live(run) for key, run in runs.items()}
    for (mode, half), bytes_ in held.items():
        predicted = vae_peak(config, 1, 192, 128, half, mode, TENSORS)
        margin = 0.02 * bytes_ + 2**16 if mode == "whole" else 4 * strip * 4
        assert abs(predicted - bytes_) < margin, (mode, half, predicted, bytes_)
    walk_vae.cache_clear()
    assert held["tiles", "decode"] < held["strips", "decode"] < 0.8 * held["whole", "decode"]


@pytest.mark.parametrize("mode", ["whole", "strips", "tiles"])
def test_the_strips_between_need_no_more(mode: vae_modes.VAEMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk that takes every strip and tile finds the same peak."""
    config = VAEConfig.model_validate(VAE_SHAPE | {"block_out_channels": (32, 32, 64, 64)})
    few = {half: vae_peak(config, 2, 512, 768, half, mode, Workspace()) for half in ("decode", "encode")}
    monkeypatch.setattr(walk._FewStrips, "each", lambda self, pieces: pieces)
    walk_vae.cache_clear()
    assert few == {half: vae_peak(config, 2, 512, 768, half, mode, Workspace()) for half in few}
    walk_vae.cache_clear()


def test_keys_and_values_are_the_networks() -> None:
    config = UNetConfig.model_validate(UNET | {"transformer_layers_per_block": (2, 1)})
    network = UNet(config)
    made = network.keys_values(Condition(torch.zeros(1, 77, 64)))
    assert walk.keys_values_numel(config, 77) == sum(k.numel() + v.numel() for k, v in made)


def test_macs_are_torchs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplications, within 2 %: torch counts two operations for each."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(kernels, "_load", lambda: "torch does not see what they compute")

    def count(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter, backend("math"), torch.inference_mode():
            call()
        return float(counter.get_total_flops() / 2)

    config = UNetConfig.model_validate(UNET)
    network = UNet(config).requires_grad_(False)
    condition = Condition(torch.zeros(2, 77, 64))
    given = network.keys_values(condition)
    step = count(lambda: network(torch.zeros(2, 4, 16, 16), 1.0, condition, keys_values=given))
    assert 2 * walk_unet(config, 16, 16, 77).macs == pytest.approx(step, rel=0.02)
    vae = VAE(VAEConfig.model_validate(VAE_SHAPE))
    z, pixels = torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 32, 32)
    assert walk_vae(vae.config, 32, 32, "decode").macs == pytest.approx(count(lambda: vae.decode(z)), rel=0.02)
    assert walk_vae(vae.config, 32, 32, "encode").macs == pytest.approx(count(lambda: vae.encode(pixels)), rel=0.02)


def test_placement_of_weights_and_attention_count() -> None:
    step = walk_unet(UNetConfig.model_validate(UNET), 8, 8, 77)

    def peak(**fields: Any) -> int:
        return step.peak(Workspace(**fields), 2)

    largest = 256 * 128 * 9 * 4  # of the first resnet on the way up
    assert peak(materializes_weights=True, buffer=1000) - peak() == largest + 1000
    assert peak() - peak(copies_conv_weights=False) > 0.6 * largest
    assert peak(itemsize=4, unfolds_conv_inputs=True) > peak(copies_conv_weights=False)
    assert Workspace(attention="math").scores(8, 64, 77) == 2 * 8 * 64 * 77 * 4
    assert Workspace(attention="sliced:1KiB").scores(8, 64, 77) < Workspace(attention="math").scores(8, 64, 77)


def test_a_moment_counts_what_exists() -> None:
    moment = Moment(tensors=10, weights=100, scratch=1000, unfolded=10**4, scores=(1, 2, 3))
    assert moment.bytes(Workspace(), 2) == 20 + 1000
    assert moment.bytes(Workspace(materializes_weights=True, buffer=1), 2) == 20 + 101 + 1000
    assert moment.bytes(Workspace(unfolds_conv_inputs=True), 2) == 20 + 2 * 10**4
    assert moment.bytes(Workspace(copies_conv_weights=False, attention="math"), 2) == 20 + 2 * 2 * 2 * 3 * 4


@pytest.mark.skipif(kernels.library() is None, reason=f"kernels {kernels.describe()}")
def test_our_kernel_does_not_write_the_projection_of_a_geglu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(linear_kernel, "LEAST_WORK", 0)
    layer, x = GEGLU(64, 256), torch.zeros(2, 96 * 96, 64)
    meta, empty = GEGLU(64, 256).to("meta"), x.to("meta")
    meta.__class__ = walk._GEGLU
    footprint = walk._walk(meta, lambda: meta(empty))
    with torch.inference_mode():
        assert footprint.peak(Workspace(fuses_geglu=True)) == live(lambda: layer(x))
        monkeypatch.setattr(linear_kernel, "takes", lambda *_, **__: False)
        assert footprint.peak(Workspace(copies_conv_weights=False)) == live(lambda: layer(x))


def test_a_walk_imports_no_compiler() -> None:
    """torch._dynamo and sympy take seconds and 80 MB: no operation of the networks may need them."""
    script = """
import sys
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders
from mezzotint.placement import Placement
from mezzotint.request import Request
model = ModelHeaders.of(device="cpu")
for mode in ("whole", "strips", "tiles"):
    predict(model, Request(prompt="a", width=1024, height=1024, hires=1.5, hires_upscale="pixels"), Placement(vae=mode))
found = {"torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", script], check=True)
