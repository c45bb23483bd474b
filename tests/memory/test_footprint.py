"""The predicted peak of a run against the measured one, in fresh processes, and what it is predicted from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mezzotint
from mezzotint.memory import system
from mezzotint.memory.footprint import predict
from mezzotint.memory.headers import ModelHeaders, Weights
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.weights.files import TensorFile

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
BASE = 250 * 10**6


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of a fixed size: the system may map more of their pages at any time."""
    monkeypatch.setattr(system, "mapped", lambda: 100 * 2**20)


def foreseen(fields: dict[str, object], placement: dict[str, object] | None = None, **options: object) -> int:
    """Of the bundled model."""
    model = ModelHeaders.of(device="cpu", **options)  # type: ignore[arg-type]
    return predict(model, Request(prompt="a", **fields), Placement(**placement or {}), base=BASE).peak  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "row",
    [
        {"width": 256, "height": 256, "placement": {}},
        {"width": 128, "height": 128, "placement": {"weights": "stream"}, "guidance_scale": 1.0},
        {
            "width": 128,
            "height": 128,
            "placement": {"weights": "offload", "storage": "float16"},
            "count": 2,
            "batch": 2,
        },
    ],
)
def test_the_peak_is_foreseen(row: dict[str, object]) -> None:
    """Above by at most 10 %, below by at most 3 %: of the whole process, Python and torch with it."""
    command = [sys.executable, str(BENCHMARK), "draw", json.dumps({"model": "emoji", "steps": 1, **row})]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    record = json.loads(child.stdout.splitlines()[-1])
    assert 0.97 < record["predicted_over_measured"] < 1.10, record


def test_weights_are_counted_from_headers(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFile, "_bytes", lambda *_: pytest.fail("a weight was read"))
    model = ModelHeaders.of(sd1_folder, device="cpu")
    monkeypatch.undo()
    pipe = mezzotint.load(sd1_folder, device="cpu")
    for name, networks in (("unet", [pipe.unet]), ("text", pipe.text_encoders), ("decoder", [pipe.vae.decoder])):
        count = sum(parameter.numel() for network in networks for parameter in network.parameters())
        weights = model.weights[name]
        assert weights.large + weights.small == count, name
        assert weights.stored == 4 * count, "the folder is float32"


def test_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks run on the meta device: no convolution or product has data."""

    def refuse(x: torch.Tensor, *_: object) -> None:
        assert x.is_meta

    functions = torch.nn.functional
    for name in ("conv2d", "linear"):
        original = getattr(functions, name)
        monkeypatch.setattr(functions, name, lambda x, *args, f=original: (refuse(x), f(x, *args))[1])
    predict(ModelHeaders.of(device="cpu"), Request(prompt="a lemon", count=4), base=BASE)


def test_more_takes_more() -> None:
    least = foreseen({})
    assert foreseen({"width": 512, "height": 512}) > least
    assert foreseen({"count": 4, "batch": 4}) > foreseen({"count": 4, "batch": 2}) > least
    assert foreseen({"hires": 2.0}) > least
    model, wide = ModelHeaders.of(device="cpu"), Request(prompt="a", width=512, height=512)

    def step(request: Request, **placement: object) -> int:
        return predict(model, request, Placement(**placement), base=BASE).stages["step"]  # type: ignore[arg-type]

    assert step(wide.replace(guidance_scale=1.0)) < step(wide) < step(wide, attention="math")
    assert step(wide, guidance="split") < step(wide)


def test_a_window_has_two_tokens_less_than_the_encoder() -> None:
    """One begins it and one ends it."""
    model = ModelHeaders.of(device="cpu")
    window = model.encoders[0].max_position_embeddings - 2
    work = [
        predict(model, Request(prompt="a " * tokens), Placement(), base=BASE).macs for tokens in (window, window + 1)
    ]
    assert work[0] == predict(model, Request(prompt="a"), Placement(), base=BASE).macs < work[1]


def test_measures_take_less() -> None:
    fields = {"width": 1024, "height": 1024}
    whole = foreseen(fields)
    strips = foreseen(fields, {"vae": "strips"})
    streamed = foreseen(fields, {"vae": "strips", "weights": "stream"})
    assert whole > strips > streamed
    small: dict[str, object] = {"width": 64, "height": 64}
    kept = [foreseen(small, {"storage": storage}) for storage in (None, "float16", "float8")]
    assert kept == sorted(kept, reverse=True)
    assert foreseen(small, {"weights": "offload"}) < kept[0]


def test_storage_in_the_computed_dtype_is_none() -> None:
    small: dict[str, object] = {"width": 64, "height": 64}
    assert foreseen(small, {"storage": "bfloat16"}, dtype="bfloat16") == foreseen(small, dtype="bfloat16")


def test_bytes_of_large_weights() -> None:
    weights = Weights(large=1000, rows=10)
    assert [weights.stored_bytes(s, 4) for s in (None, "bfloat16", "float8", "int8")] == [4000, 2000, 1040, 1040]


def test_guidance_by_several_conditions_counts() -> None:
    fields: dict[str, object] = {"width": 1024, "height": 1024}
    model = ModelHeaders.of(device="cpu")

    def step(**more: object) -> int:
        request = Request(**{"prompt": "a", **fields, **more})  # type: ignore[arg-type]
        return predict(model, request, base=BASE).stages["step"]

    assert step(guidance_scale=1.0) < step() < step(prompt="a AND b")
    assert step() < step(guidance_method="perp_neg", negative_prompt="x") == step(pag_scale=3.0)
    assert step() == step(guidance_scale=1.0, pag_scale=3.0)
    assert step(regions=[{"prompt": "b", "box": (0, 0, 0.5, 1)}]) == step(prompt="a AND b")
    assert step(prompt="a AND b") < step(prompt="a AND b", pag_scale=3.0)
    assert step(prompt="word " * 200) > step()
    assert step(prompt="柠" * 200) > step(prompt="w" * 200), "a sign takes more tokens than a letter"
    assert step(prompt="[a:b:0.5]") > step(), "keys and values of both stay"
    assert step(prompt="[a|b]", steps=8) == step(prompt="[a|b]", steps=4) < step(prompt="[a|b|c]")
