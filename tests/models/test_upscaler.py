"""Enlarging: tiles against the whole picture, the record, the sentences; spandrel in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import mezzotint
from mezzotint.again import again, describe_file, judge, read_source
from mezzotint.enlarge import choose_tile
from mezzotint.errors import BudgetError, CheckpointError, MissingExtraError, RequestError
from mezzotint.memory.footprint import predict as footprint
from mezzotint.memory.headers import ModelHeaders
from mezzotint.memory.walk import count_upscaler
from mezzotint.models.tiles import spans
from mezzotint.models.upscaler import Upscaler, blend_tiles, ramp
from mezzotint.weights import inspect_model, upscaler_files

PYTHON = os.environ.get("MEZZOTINT_UPSCALE_PYTHON", "")  # of an environment with spandrel and torchvision


class Twice(nn.Module):
    """Convolutions that reach `reach` pixels, and a pixel shuffle."""

    def __init__(self, reach: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(reach - 2)]
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *inner, nn.Conv2d(8, 12, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.layers(x), 2)


def upscaler(reach: int = 4) -> Upscaler:
    network = Twice(reach).double().requires_grad_(False)
    return Upscaler("Twice", network, network, 2, file=("twice.pth", "0" * 64))


@pytest.mark.parametrize(("height", "width"), [(67, 131), (40, 40), (16, 200)])
def test_tiles_are_exact_where_the_field_fits(height: int, width: int) -> None:
    """A network that reaches a quarter of the overlap sees all that it needs; one that reaches further does not."""
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    for reach, exact in ((4, True), (8, height == width)):
        network = upscaler(reach)
        whole = network.enlarge(pixels, None)
        apart = (network.enlarge(pixels, 64, overlap=16) - whole).abs().max()
        assert (apart < 1e-6) == exact  # float32 holds 6e-8 of values below 1
    weights = torch.zeros(height, dtype=torch.float64)
    for span in spans(height, 64, 16):
        weights[span.cells(1)] += ramp(span)
    torch.testing.assert_close(weights, torch.ones(height, dtype=torch.float64), rtol=0, atol=1e-15)


def test_no_seam_is_left() -> None:
    """Tiles that disagree by a constant pass into each other evenly: no step is larger than the ramp's own."""
    values = iter([0.0, 1.0, 0.0, 1.0])
    made = blend_tiles(torch.zeros(1, 1, 64, 112), lambda part: torch.full_like(part, next(values)), 64, 16)
    ramps = (made[0, 0, 0, 1:] - made[0, 0, 0, :-1]).abs()
    assert made.min() == 0.0 and made.max() == 1.0 and ramps.max() <= 1 / 8 + 1e-6


def test_the_record_is_kept_and_says_how(sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    sd1("a lemon", seed=3, width=32, height=32).save(tmp_path / "lemon.png")
    small = Image.open(tmp_path / "lemon.png").convert("RGB")
    large = mezzotint.upscale(tmp_path / "lemon.png")
    assert large.size == (128, 128)
    assert large.tobytes() == small.resize((128, 128), Image.Resampling.LANCZOS).tobytes()
    done: list[tuple[int, int]] = []
    larger = mezzotint.upscale(large, upscaler(), tile=64, on_step=lambda k, total: done.append((k, total)))
    assert larger.size == (256, 256) and done == [(k + 1, 9) for k in range(9)]
    larger.save(tmp_path / "larger.png")
    found = describe_file(tmp_path / "larger.png")
    assert found["seed"] == 3 and found["request"]["prompt"] == "a lemon"
    assert found["enlarged"] == [
        "4 times, Lanczos", "2 times by twice.pth (SHA-256 0000000000...), Twice, in tiles of 64"
    ]  # fmt: skip
    assert "parameters" in found["texts"] and str(tmp_path) not in json.dumps(found["texts"])
    source = read_source(tmp_path / "larger.png")
    verdict = judge(source, again(sd1, source)[0])
    assert verdict.identical and verdict.sentences[0].startswith("identical before it was enlarged (4 times, Lanczos; ")
    larger.putpixel((0, 0), (1, 2, 3))
    larger.save(tmp_path / "larger.png")
    assert "edited after that" in judge(source, again(sd1, source)[0]).sentences[0]
    assert mezzotint.upscale(small, upscaler(), scale=1.5).size == (48, 48)
    assert not mezzotint.upscale(Image.new("RGB", (8, 8))).info


def test_hires_by_a_file(
    sd1: mezzotint.Pipeline, sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass starts from the first one's picture, enlarged by the network and resampled to the size."""
    network = Twice().requires_grad_(False)
    known = Upscaler("Twice", network, network, 2, file=("twice.pth", "a" * 64))
    for module in ("run.plan", "memory.footprint"):
        monkeypatch.setattr(f"mezzotint.{module}.load_upscaler", lambda *_: known)
    run = mezzotint.Request(prompt="a lemon", seed=2, width=32, height=32, steps=2)
    file = str(tmp_path / "mine" / "twice.pth")
    hires = run.replace(hires=1.5, hires_upscale=file, hires_strength=0.5, hires_steps=4)
    image = sd1.generate(hires).images[0]
    larger = known(sd1.generate(run).images[0]).resize((48, 48), Image.Resampling.LANCZOS)
    second = sd1.generate(run.replace(image=larger, width=48, height=48, steps=4, strength=0.5))
    assert image.tobytes() == second.images[0].tobytes()
    assert image.tobytes() != sd1.generate(hires.replace(hires_upscale="pixels")).images[0].tobytes()
    image.save(tmp_path / "lemon.png")
    texts = describe_file(tmp_path / "lemon.png")
    assert "mine" not in json.dumps(texts["texts"]) and "Hires upscaler: twice," in texts["texts"]["parameters"]
    assert texts["request"]["hires_upscale"] == "twice.pth" and texts["facts"]["the upscaler twice.pth"] == "a" * 64
    source = read_source(tmp_path / "lemon.png")
    with pytest.raises(
        RequestError, match=r"the upscaler 'twice.pth' \(SHA-256 aaaaaaaaaa...\); give its file with --hires"
    ):
        again(sd1, source)
    assert judge(source, again(sd1, source, upscaler=file)[0]).identical
    monkeypatch.setattr("mezzotint.memory.system.mapped", lambda: 0)
    headers = ModelHeaders.of(sd1_folder, device="cpu")
    with_file, without = (
        footprint(headers, request, base=0) for request in (hires, hires.replace(hires_upscale="pixels"))
    )
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert with_file.stages["step"] == without.stages["step"] + weights
    assert with_file.stages["upscale"] > with_file.stages["load"]


def test_tiles_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network = upscaler()
    assert count_upscaler(network, 512, 512) == 4 * count_upscaler(network, 256, 256)  # type: ignore[operator]
    with pytest.raises(
        BudgetError, match=r"memory is 1.00 MiB, but enlarging 640x480 with this upscaler needs at least"
    ):
        choose_tile(network, (640, 480), "1MiB")
    assert choose_tile(network, (640, 480), "1000GiB") is None
    monkeypatch.setattr("mezzotint.memory.system.resident", lambda: 0)
    for side in (512, 64):
        needed = 1.1 * (12 * 640 * 480 * 17 + (count_upscaler(network, min(side, 480), side) or 0))
        assert choose_tile(network, (640, 480), int(needed) + 1) == side
    solid = dataclasses.replace(network, tiled=False)
    assert choose_tile(solid, (640, 480), "1MiB") is None


def test_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (32, 32))
    for arguments, sentence in (
        ({"scale": 0.0}, "scale is 0.0; it must be a number above 0"),
        ({"tile": 8}, "tile is 8; it must be a whole number of pixels from 16"),
        ({"scale": 64.0, "image": Image.new("RGB", (1024, 32))}, "gives 65536x2048; a side may have at most 32768"),
    ):
        with pytest.raises(RequestError, match=sentence):
            mezzotint.upscale(**{"image": picture, **arguments})
    with pytest.raises(CheckpointError, match="cannot be read"):
        mezzotint.upscale(picture, tmp_path / "none.pth")
    save_file({"body.0.weight": torch.zeros(8, 3, 3, 3), "body.1.weight": torch.zeros(8)}, tmp_path / "4x.safetensors")
    for name in ("spandrel", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"needs spandrel: pip install 'mezzotint\[upscale\]'"):
        mezzotint.upscale(picture, tmp_path / "4x.safetensors")
    torch.save({"params_ema": {"conv_first.weight": torch.ones(1)}, "params": {"conv_first.weight": torch.zeros(1)}},
               tmp_path / "ema.pth")  # fmt: skip
    assert inspect_model(tmp_path / "ema.pth").kind == "an upscaler (ESRGAN or a relative)"
    assert upscaler_files.TensorFile(tmp_path / "ema.pth").read("conv_first.weight") == 1


def test_a_torchvision_of_another_torch_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision does, the package registers implementations of operators that its own library would define."""
    for name, text in (
        ("spandrel", "import torchvision\n"),
        ("torchvision", "import torch\nfor name in ('nms', 'qnms'):\n    torch.library.register_fake("
         "f'torchvision::{name}')(lambda *_: None)\n"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert upscaler_files.import_spandrel().__name__ == "spandrel"
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('built for torch 9')")
    for name in ("spandrel", "torchvision"):
        del sys.modules[name]
    with pytest.raises(
        MissingExtraError, match=r"cannot be imported \(built for torch 9\): install the torchvision that"
    ):
        upscaler_files.import_spandrel()
    upscaler_files._declared.clear()


CHILD = """
import sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from safetensors.torch import save_file
import mezzotint
from mezzotint.errors import CheckpointError
from mezzotint.weights.upscaler_files import import_spandrel, load_upscaler
folder = Path(sys.argv[1])
spandrel = import_spandrel()
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
torch.manual_seed(0)
picture = Image.effect_noise((70, 50), 90).convert("RGB")
pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
for name, network, scale in (
    ("compact", Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=4), 4),
    ("esrgan", ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=2), 2),
):
    network.eval()
    with torch.no_grad():
        wanted = network(pixels).clamp(0, 1).mul(255).round()[0].permute(1, 2, 0).to(torch.uint8).numpy()
    save_file(network.state_dict(), folder / "a.safetensors")
    older = {key: tensor * 0 for key, tensor in network.state_dict().items()}
    torch.save({"params": older, "params_ema": network.state_dict()}, folder / "a.pth")
    for file in ("a.safetensors", "a.pth"):
        for tile in (10_000, 48):
            made = np.asarray(mezzotint.upscale(picture, folder / file, tile=tile, device="cpu"))
            assert made.shape == wanted.shape == (50 * scale, 70 * scale, 3)
            assert np.abs(made.astype(int) - wanted.astype(int)).max() <= 1, (name, file, tile)
    print(load_upscaler(folder / file, torch.device("cpu"), torch.float32).name)
half = {"body.0.weight": torch.zeros(8, 3, 3, 3), "body.1.weight": torch.zeros(8)}
for weights in ({"x.weight": torch.zeros(2)}, half):
    save_file(weights, folder / "b.safetensors")
    try:
        mezzotint.upscale(picture, folder / "b.safetensors", device="cpu")
    except CheckpointError as error:
        print(str(error).removeprefix(str(folder)))
"""


@pytest.mark.skipif(not PYTHON, reason="MEZZOTINT_UPSCALE_PYTHON names no Python with spandrel; see CONTRIBUTING.md")
def test_with_spandrel(tmp_path: Path) -> None:
    """Pixels within 1/255 of the networks' own, from both kinds of file, whole and in tiles."""
    source = Path(mezzotint.__file__).parents[1]
    ran = subprocess.run(
        [PYTHON, "-c", CHILD, tmp_path], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:2] == ["RealESRGAN Compact", "ESRGAN"]
    assert "in which spandrel" in lines[2] and "finds no upscaler; give a file of an architecture" in lines[2]
    assert "is not a whole upscaler" in lines[3]
