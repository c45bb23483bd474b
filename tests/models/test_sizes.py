"""What networks are said to hold, against what fresh processes hold, and against the networks themselves."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mezzotint.config import UNetConfig, VAEConfig
from mezzotint.models import sizes
from mezzotint.models.attention import backend
from mezzotint.models.sizes import Ledger, Working
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_are_those_of_fresh_processes() -> None:
    """Above by at most 10 %, below by at most 3 %, and 1.5 MB for what is smaller than the ledger looks at."""
    command = [sys.executable, "-c", CHILD, json.dumps(UNET), json.dumps(VAE_SHAPE)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    unet, vae = UNetConfig.model_validate(UNET), VAEConfig.model_validate(VAE_SHAPE)
    math = Working(attention="math")
    said = {
        "unet 2 auto": sizes.unet(unet, 2, 32, 32, 77, Working()).peak,
        "unet 1 math": sizes.unet(unet, 1, 32, 32, 77, math).peak,
        "vae whole": sizes.vae_peak(vae, 1, 192, 192, "decode", "whole", Working()),
    }
    for name, peak in said.items():
        assert 0.97 * measured[name] - 1.5e6 < peak < 1.10 * measured[name] + 1.5e6, (name, peak, measured)


def test_a_ledger_ends_with_what_is_left() -> None:
    """After the whole walk only the output and what it was made of are held: no hold without its drop."""
    ledger = sizes.unet(UNetConfig.model_validate(UNET), 2, 16, 24, 77, Working())
    assert ledger.now == 2 * 16 * 24 * (64 + 64 + 4) * 4  # the last map, that normed, and the output


def test_keys_and_values_are_the_networks() -> None:
    config = UNetConfig.model_validate(UNET | {"transformer_layers_per_block": (2, 1)})
    network = UNet(config)
    made = network.keys_values(Condition(torch.zeros(1, 77, 64)))
    assert sizes.keys_values(config, 77) == sum(k.numel() + v.numel() for k, v in made)


def test_work_is_torchs_count() -> None:
    """Multiplications, within 2 %: torch counts two operations for each."""
    from torch.utils.flop_counter import FlopCounterMode

    config = UNetConfig.model_validate(UNET)
    network = UNet(config).requires_grad_(False)
    condition = Condition(torch.zeros(2, 77, 64))
    given = network.keys_values(condition)
    with FlopCounterMode(display=False) as counter, backend("math"), torch.inference_mode():
        network(torch.zeros(2, 4, 16, 16), 1.0, condition, keys_values=given)
    assert sizes.unet(config, 2, 16, 16, 77, Working()).work == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    vae = VAE(VAEConfig.model_validate(VAE_SHAPE))
    with FlopCounterMode(display=False) as counter, backend("math"), torch.inference_mode():
        vae.decode(torch.zeros(1, 4, 16, 16))
    assert sizes.vae_work(vae.config, 32, 32, "decode") == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    with FlopCounterMode(display=False) as counter, backend("math"), torch.inference_mode():
        vae.encode(torch.zeros(1, 3, 32, 32))
    assert sizes.vae_work(vae.config, 32, 32, "encode") == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


def test_made_weights_and_scores_count() -> None:
    config = UNetConfig.model_validate(UNET)

    def peak(**fields: object) -> int:
        return sizes.unet(config, 2, 8, 8, 77, Working(**fields)).peak  # type: ignore[arg-type]

    largest = 256 * 128 * 9 * 4  # of the first resnet on the way up
    assert peak(makes=True, beside=1000) - peak() == largest + 1000
    assert peak() - peak(lays_out=False) > 0.6 * largest
    assert Working(attention="math").scores(8, 64, 77) == 2 * 8 * 64 * 77 * 4
    assert Working(attention="sliced:1KiB").scores(8, 64, 77) < Working(attention="math").scores(8, 64, 77)


def test_a_ledger_keeps_its_peak() -> None:
    ledger = Ledger()
    ledger.hold(5)
    ledger.touch(3)
    ledger.drop(4)
    ledger.hold(2)
    assert (ledger.now, ledger.peak) == (3, 8)
