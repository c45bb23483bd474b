"""A placement leaves the picture as it was: exactly, or by the figure that docs/memory.md gives."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from live_bytes import live_bytes
from PIL import Image
from safetensors.torch import load_file, save_file
from short_form import short_form
from torch import nn

import mezzotint
from mezzotint import BudgetError, CheckpointError, MezzotintError, Pipeline, Request, RequestError
from mezzotint.again import again, judge, read_source
from mezzotint.conditioning.encode import Conditioner
from mezzotint.explain.maps import explain
from mezzotint.images.io import save
from mezzotint.models import backends, offload
from mezzotint.models.adapters import ChangedWeight, LayerChange, LowRank, merge_copy
from mezzotint.models.attention import backend, chosen
from mezzotint.models.offload import OffloadedLayer, OffloadedWeight
from mezzotint.placement import MIN_OFFLOAD_NUMEL, Placement
from mezzotint.records.record import changes, read
from mezzotint.run.execute import adapt_placement
from mezzotint.run.plan import RunPlan
from mezzotint.weights import save_folder
from mezzotint.weights.lora import read_unet_lora
from mezzotint.weights.save_lora import save_lora

LEMON = Request(prompt="a lemon on a blue background", negative_prompt="a lemon", seed=7, steps=2, count=3, batch=2)
MOVING = ("offload", "stream")
EXACT: list[dict[str, Any]] = [
    {"weights": "offload"},
    {"weights": "stream"},
    {"guidance": "split"},
    {"vae": "strips"},
    {"weights": "stream", "vae": "strips"},
    {"weights": "offload", "guidance": "split"},
]
# PSNR that docs/memory.md states for `emoji`, less a margin for another processor's rounding
QUALITY = {"float16": 80.0, "bfloat16": 50.0, "int8": 42.0, "int8_dynamic": 40.0, "float8": 34.0}


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly every weight of the tiny model counts as large."""
    monkeypatch.setattr(offload, "MIN_OFFLOAD_NUMEL", 100)


def load(folder: Path | None, dtype: str = "float32", **fields: Any) -> Pipeline:
    return mezzotint.load(folder, device="cpu", dtype=dtype, placement=Placement.of(**fields))


def modules(pipe: Pipeline) -> list[OffloadedLayer]:
    networks: list[nn.Module] = [pipe.unet, pipe.vae, *pipe.text_encoders]
    return [module for network in networks for module in network.modules() if isinstance(module, OffloadedLayer)]


def count_onloaded(pipe: Pipeline) -> int:
    """Count the offloaded weights that are on the device now."""
    return sum(
        isinstance(m.weight_source, OffloadedWeight) and m.weight_source._onloaded is not None for m in modules(pipe)
    )


def pixels(images: list[Any]) -> Any:
    return np.stack([np.array(image) for image in images]).astype(float)


def psnr(a: Any, b: Any) -> float:
    error = float(((a - b) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def scene(folder: Path) -> dict[str, Any]:
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(levels).save(folder / "scene.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:24, 4:20] = 255
    Image.fromarray(mask).save(folder / "hole.png")
    return {"image": str(folder / "scene.png"), "mask": str(folder / "hole.png"), "strength": 0.8}


def learned(folder: Path) -> dict[str, Any]:
    """A textual inversion."""
    save_file(
        {"emb_params": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}, folder / "fruit.safetensors"
    )
    return {"embeddings": (str(folder / "fruit.safetensors"),), "prompt": "fruit on a blue background"}


REQUESTS: dict[str, Callable[[Path], dict[str, Any]]] = {  # "text" alone draws its pictures in two batches
    "text": lambda _: {"count": 3},
    "no guidance": lambda _: {"guidance_scale": 1.0},
    "hires": lambda _: {"hires": 2.0},
    "seamless": lambda _: {"seamless": "x"},
    "inpainting": scene,
    "textual inversion": learned,
    "emphasis and AND": lambda _: {"prompt": "(a lemon:1.3) AND a blue background :0.5"},
}


@pytest.fixture(scope="module")
def drawn(sd1: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Request, Any]]:
    """Each request and what is drawn where nothing moves."""
    folder = tmp_path_factory.mktemp("scene")
    requests = {name: LEMON.replace(**({"count": 1} | fields(folder))) for name, fields in REQUESTS.items()}
    return {name: (request, sd1.generate(request)) for name, request in requests.items()}


@pytest.mark.parametrize("placement", EXACT, ids=str)
def test_what_is_exact_draws_the_same(
    placement: dict[str, Any], sd1_folder: Path, drawn: dict[str, tuple[Request, Any]]
) -> None:
    pipe = load(sd1_folder, **placement)
    assert bool(modules(pipe)) == (placement.get("weights") in MOVING)
    for name, (request, expected) in drawn.items():
        result = pipe.generate(request)
        assert (result.latents - expected.latents).abs().max() <= 1e-5 * expected.latents.abs().max(), name
        assert abs(pixels(result.images) - pixels(expected.images)).max() <= 1.0, name
        assert count_onloaded(pipe) == 0, name


@pytest.mark.parametrize(("weights", "dtype"), short_form(MOVING, ["bfloat16", "float16"]))
def test_in_16_bits_too(weights: str, dtype: str, sd1_folder: Path) -> None:
    expected, result = load(sd1_folder, dtype).generate(LEMON), load(sd1_folder, dtype, weights=weights).generate(LEMON)
    assert abs(pixels(result.images) - pixels(expected.images)).max() <= 2.0


@pytest.mark.parametrize("storage", QUALITY)
def test_storage_on_the_bundled_model(
    storage: str, emoji: tuple[Request, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own files are float16: kept so, the weights are the same, and only the order of roundings may differ."""
    monkeypatch.setattr(offload, "MIN_OFFLOAD_NUMEL", MIN_OFFLOAD_NUMEL)
    request, expected = emoji
    pipe = load(None, storage=storage)
    assert modules(pipe), "large weights are kept otherwise"
    if storage == "float16":
        resident = mezzotint.load(device="cpu").unet
        layers = [(name, layer) for name, layer in pipe.unet.named_modules() if isinstance(layer, OffloadedLayer)]
        assert layers and all(torch.equal(layer.weight, resident.get_submodule(name).weight) for name, layer in layers)
    found = psnr(pixels(pipe.generate(request).images), expected)
    assert found >= QUALITY[storage]
    assert storage == "float16" or found < 80.0


@pytest.fixture(scope="module")
def emoji() -> tuple[Request, Any]:
    request = Request(prompt="a lemon on a blue background", seed=7, steps=8, sampler="dpmpp_2m", count=1)
    return request, pixels(mezzotint.load(device="cpu").generate(request).images)


@pytest.mark.parametrize("weights", MOVING)
def test_weights_are_kept_as_asked(weights: str, sd1_folder: Path) -> None:
    kept = {
        "resident": load(sd1_folder, storage="int8"),
        "offload": load(sd1_folder, weights="offload", storage="int8"),
    }
    expected = kept["resident"].generate(LEMON)
    assert all(layer.weight_source.data.dtype == torch.int8 for layer in modules(kept["resident"]))  # type: ignore[attr-defined]
    assert torch.equal(kept["offload"].generate(LEMON).latents, expected.latents)
    pipe = load(sd1_folder, weights=weights)
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    own, exact = pipe.unet.state_dict(), load(sd1_folder).unet.state_dict()
    assert own.keys() == exact.keys()
    assert all(torch.equal(own[name], exact[name]) for name in exact)


def test_a_streamed_model_saves_whole(sd1_folder: Path, sd1: Pipeline, tmp_path: Path) -> None:
    pipe = load(sd1_folder, weights="stream")
    save_folder(
        tmp_path / "copy",
        unet=pipe.unet,
        vae=pipe.vae,
        text_encoder=pipe.text_encoders[0],
        tokenizer=pipe.tokenizers[0],
        scheduler_config=pipe.scheduler_config,
        dtype=torch.float32,
    )
    request = LEMON.replace(guidance_scale=3.0)
    assert torch.equal(load(tmp_path / "copy").generate(request).latents, sd1.generate(request).latents)


def test_invalid_placements_are_refused(sd1_folder: Path) -> None:
    with pytest.raises(RequestError, match=r"storage is 'int8' and weights 'stream'.*leave one of the two out"):
        load(sd1_folder, weights="stream", storage="int8")


@pytest.mark.parametrize("weights", MOVING)
def test_the_few_step_form(weights: str, sd1_folder: Path, sd1: Pipeline, tmp_path: Path) -> None:
    """Its change is made to weights that stay where they are."""
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name in ("conv_in", "mid_block.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"):
        weight = sd1.unet.get_submodule(name).weight
        down = torch.randn((2, *weight.shape[1:]), generator=generator)  # type: ignore[call-overload]
        up = torch.randn((len(weight), 2, *(1 for _ in weight.shape[2:])), generator=generator)  # type: ignore
        lora[name] = down, 0.05 * up
    save_lora(tmp_path / "a.safetensors", {"unet": lora}, torch.float32)
    pipe = load(sd1_folder, weights=weights)
    changed = merge_copy(pipe.unet, read_unet_lora(tmp_path / "a.safetensors", pipe.unet))
    expected = merge_copy(
        sd1.unet, {f"unet.{name}": [(LayerChange(LowRank(*pair)), 1.0)] for name, pair in lora.items()}
    )
    own, right = changed.state_dict(), expected.state_dict()
    assert own.keys() == right.keys()
    assert all(torch.equal(own[name], right[name]) for name in right)
    bases = [
        m.weight_source.base
        for m in changed.modules()
        if isinstance(m, OffloadedLayer) and isinstance(m.weight_source, ChangedWeight)
    ]
    assert len(bases) == 3
    with offload.onload(changed):
        assert all(
            (base._onloaded is not None) == (weights == "offload")
            for base in bases
            if isinstance(base, OffloadedWeight)
        )
    assert count_onloaded(pipe) == 0


@pytest.mark.parametrize(
    ("part", "placement"),
    short_form(["text_encoder", "unet", "vae"], [{"weights": "offload"}, {"weights": "stream"}, {"storage": "int8"}]),
    ids=str,
)
def test_what_overflows_runs_again_in_float32(part: str, placement: dict[str, Any], sd1_folder: Path) -> None:
    pipe = load(sd1_folder, "float16", **placement)
    network = {"text_encoder": pipe.text_encoders[0], "unet": pipe.unet, "vae": pipe.vae.decoder}[part]
    last = [m for m in network.modules() if not list(m.children())][-1]
    dtypes: set[torch.dtype] = set()

    def overflow(_: nn.Module, __: Any, made: torch.Tensor) -> torch.Tensor | None:
        dtypes.add(made.dtype)
        return made * math.inf if made.dtype == torch.float16 else None

    last.register_forward_hook(overflow)
    result = pipe.generate(LEMON)
    assert dtypes == {torch.float16, torch.float32}
    assert {tuple(json.loads(image.info["mezzotint"])["float32"]) for image in result.images} == {(part,)}
    assert pipe.dtype == torch.float16
    assert count_onloaded(pipe) == 0


@pytest.mark.parametrize(
    "placement",
    [
        *(pytest.param(each, marks=pytest.mark.slow if len(each) > 1 else ()) for each in EXACT),  # slow: two at once
        {"attention": "sliced:1KiB"},
    ],
    ids=str,
)
def test_where_words_were_looked_at(placement: dict[str, Any], sd1_folder: Path, sd1: Pipeline) -> None:
    request = LEMON.replace(prompt="a lemon AND blue", guidance_scale=3.0, count=1)
    expected, found = explain(sd1, request), explain(load(sd1_folder, **placement), request)
    for ours, right in zip(found.maps[0], expected.maps[0], strict=True):
        assert torch.allclose(ours, right, atol=1e-5, equal_nan=True)
    record = read(found.result.images[0].info)
    assert record is not None and record.model.placement.guidance == "batched"


# ---- who shares it, and what is left ---------------------------------------------------------------------------------


class Roomy:
    """A budget that all fits into."""

    def fit_batch(self, request: Request, _: Placement, __: int) -> Request:
        return request


@pytest.mark.parametrize("weights", [*MOVING, "resident"])
def test_two_threads_draw_one_after_another(weights: str, sd1_folder: Path, sd1: Pipeline) -> None:
    """Where weights move, and under a budget."""
    pipe = load(sd1_folder, weights=weights)
    if weights == "resident":
        pipe = Pipeline(pipe.parts, budget=Roomy())  # type: ignore[arg-type]
    requests = [
        LEMON.replace(prompt=words, seed=k, count=1) for k, words in enumerate(("a lemon", "blue", "a background"))
    ]
    expected = [sd1.generate(request).latents for request in requests]
    found: dict[int, torch.Tensor] = {}
    order: list[int] = []

    def work(k: int) -> None:
        found[k] = pipe.generate(requests[k], on_step=lambda done, total: order.append(k) or time.sleep(0.01)).latents

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k]) for k in range(3))
    assert sum(a != b for a, b in pairwise(order)) == 2, "no two at once"
    assert count_onloaded(pipe) == 0


@pytest.mark.parametrize("weights", MOVING)
def test_an_exception_leaves_it_usable(weights: str, sd1_folder: Path, sd1: Pipeline) -> None:
    pipe = load(sd1_folder, weights=weights)

    def stop(done: int, _: int) -> None:
        assert count_onloaded(pipe) > 0 or weights == "stream"
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.generate(LEMON, on_step=stop)
    assert count_onloaded(pipe) == 0
    assert torch.equal(pipe.generate(LEMON).latents, sd1.generate(LEMON).latents)


def test_looking_at_steps_and_leaving_early(sd1_folder: Path, sd1: Pipeline) -> None:
    """A caller may draw previews between steps, run another request there, and never come back."""
    pipe = load(sd1_folder, weights="offload")
    steps = pipe.stream(LEMON)
    first = next(steps)
    unet = count_onloaded(pipe)
    assert unet
    assert len(pipe.decode(first.denoised)) == 3
    assert torch.equal(pipe.generate(LEMON).latents, sd1.generate(LEMON).latents)
    assert count_onloaded(pipe) == unet
    del steps, first
    gc.collect()
    assert count_onloaded(pipe) == 0


def test_each_network_is_there_in_its_turn_alone(sd1_folder: Path) -> None:
    pipe = load(sd1_folder, weights="offload")
    parts = {"text": pipe.text_encoders[0], "unet": pipe.unet, "encoder": pipe.vae.encoder, "decoder": pipe.vae.decoder}
    there: dict[str, set[str]] = {}

    def look(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            there[name] = {
                other
                for other, part in parts.items()
                if any(isinstance(m, OffloadedLayer) and m.weight_source._onloaded is not None for m in part.modules())  # type: ignore
            }

        return note

    for name, part in parts.items():
        next(m for m in part.modules() if isinstance(m, OffloadedLayer)).register_forward_hook(look(name))
    pipe.generate(LEMON)
    assert there == {name: {name} for name in ("text", "unet", "decoder")}


def test_nothing_outlives_the_pipeline(sd1_folder: Path) -> None:
    pipe = load(sd1_folder, weights="offload")
    pipe.generate(LEMON)
    gone = [weakref.ref(layer.weight_source) for layer in modules(pipe)]
    del pipe
    gc.collect()
    assert gone and not any(reference() for reference in gone)


def test_a_file_that_changes_meanwhile_is_noticed(sd1_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(sd1_folder, tmp_path / "model"))
    pipe = load(folder, weights="stream")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    other = {name: tensor + 1.0 for name, tensor in load_file(file).items()}
    content = file.read_bytes()
    save_file(other, tmp_path / "other.safetensors")
    with file.open("r+b") as written:
        written.write((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="was changed after it had been opened"):
        pipe.generate(LEMON)
    assert len(content) == file.stat().st_size


CHILD = """
import json, sys
from pathlib import Path

def peak():
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024

import torch, mezzotint, mezzotint.pipeline
from mezzotint.placement import Placement

torch.set_num_threads(1)
before = peak()
pipe = mezzotint.load(device="cpu", placement=Placement.of(**json.loads(sys.argv[1])))
loaded = peak() - before
pipe("a lemon", seed=1, steps=2)
print(json.dumps([loaded, peak() - before]))
"""


def test_fewer_bytes_of_weights_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bundled model's 50 MB in float32 39 are large weights; a picture adds the same under every placement."""
    monkeypatch.undo()  # what is large is large

    def live(**fields: Any) -> tuple[float, float, float]:
        """Return the MB of tensors after loading, the most while loading and the most that a picture adds."""
        pipes: list[Pipeline] = []

        def load() -> None:
            pipes.append(mezzotint.load(device="cpu", placement=Placement.of(**fields)))

        kept, most = live_bytes(load)
        _, drawing = live_bytes(lambda: pipes[0]("a lemon", seed=1, steps=1, width=64, height=64))
        return kept / 1e6, most / 1e6, drawing / 1e6

    (whole, loading, drawing), in_file, in_8_bits = live(), live(weights="stream"), live(storage="int8")
    assert loading < whole + 1
    assert in_file[0] < whole - 35 and in_file[1] < loading - 35
    assert in_8_bits[0] < whole - 20 and in_8_bits[1] < loading - 20
    assert max(in_file[2], in_8_bits[2]) < drawing + 3, "one weight at a time"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_takes_less_memory() -> None:
    """Of the bundled model's 53 MB in float32 39 are large weights: what loading and drawing take in addition to torch,
    in fresh processes.
    """

    def taken(**fields: Any) -> list[float]:
        ran = subprocess.run([sys.executable, "-c", CHILD, json.dumps(fields)], check=True, capture_output=True)
        return [count / 1e6 for count in json.loads(ran.stdout)]

    (loaded, drawn), (in_file, streamed), (in_8_bits, _) = taken(), taken(weights="stream"), taken(storage="int8")
    assert in_file < loaded - 35
    assert in_8_bits < loaded - 20
    assert streamed < drawn - 30


# ---- the rest of a placement, and the record -------------------------------------------------------------------------


def test_the_caller_s_attention_comes_first(sd1_folder: Path) -> None:
    pipe = load(sd1_folder, attention="sliced:1KiB")
    seen: list[Any] = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: seen.append(chosen()))  # type: ignore[union-attr]
    pipe.text_encoders[0].register_forward_hook(lambda *_: seen.append(chosen()))
    pipe.vae.decoder.register_forward_hook(lambda *_: seen.append(chosen()))
    for step in pipe.stream(LEMON.replace(count=1)):
        assert chosen() is None, "nothing stays on between steps"
        pipe.decode(step.x)
    with backend("sliced:1KiB"):
        expected = chosen()
    assert len(seen) == 6 and all(found == expected for found in seen)
    seen.clear()
    with backend("math"):
        own = chosen()
        pipe.generate(LEMON.replace(prompt="blue"))
    assert seen and all(found is own for found in seen)
    with backend("sliced", bytes=1000):
        record = read(pipe.generate(LEMON).images[0].info)
    assert record is not None and record.model.placement.attention == "sliced:1000B", "the record says what was used"


def test_prompts_are_encoded_again_for_another_attention(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last bits may be others, and the record names it."""
    pipe, seen, encode = load(sd1_folder), list[Any](), Conditioner.encode
    monkeypatch.setattr(Conditioner, "encode", lambda *args: seen.append(chosen()) or encode(*args))
    pipe.encode("a lemon")
    with backend("math"):
        pipe.encode("a lemon")
    pipe.encode("a lemon")
    assert [found.name for found in seen] == ["auto", "math"]


def test_a_record_of_another_machine_is_followed_as_far_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    monkeypatch.setattr(backends, "_import", lambda name: "is not installed")
    asked = Placement(attention="xformers", guidance="split")
    assert adapt_placement(asked, here, "float32") == Placement(guidance="split")
    streamed = Placement(weights="stream", storage="float8")
    assert adapt_placement(streamed, here, "float32") == Placement(weights="offload", storage="float8")
    for same in (Placement(weights="stream", storage="bfloat16"), Placement(weights="stream"), Placement()):
        assert adapt_placement(same, here, "bfloat16") == same
    assert adapt_placement(streamed, torch.device("cuda"), "float32") == streamed


def test_missing_attention_is_an_error_on_loading(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(MezzotintError, match="sage"):
        load(sd1_folder, attention="sage")


def test_a_budget_is_asked_before_anything_is_drawn(sd1_folder: Path) -> None:
    class Budget:
        asked: ClassVar[list[tuple[int | None, int]]] = []

        def check(self, plan: RunPlan, _: Placement) -> None:
            self.asked.append((plan.request.batch, plan.request.count))
            raise BudgetError("too much")

        def fit_batch(self, plan: RunPlan, placement: Placement, pictures: int) -> RunPlan:
            if pictures == 3:
                self.check(plan, placement)
            assert pictures == 6
            return plan.with_batch(1)

    with pytest.raises(RequestError, match="placement and memory are both given"):
        mezzotint.load(sd1_folder, device="cpu", placement=Placement(), memory="4GiB")
    pipe = load(sd1_folder)
    pipe._budget = Budget()  # type: ignore[assignment]
    jobs = [(LEMON, 7), (LEMON, 8), (LEMON, 9), (LEMON, 10)]
    for draw in (lambda: pipe.generate(LEMON), lambda: pipe.stream(LEMON), lambda: pipe.draw(jobs)):
        with pytest.raises(BudgetError):
            draw()
    assert Budget.asked == [(2, 3), (3, 3), (4, 4)], "what is drawn at once"
    assert [result.request.batch for result in pipe.generate([LEMON, LEMON])] == [1, 1]


def test_it_is_part_of_the_record(sd1_folder: Path, tmp_path: Path) -> None:
    fields = {"weights": "offload", "storage": "int8", "guidance": "split"}
    pipe = load(sd1_folder, **fields)
    image = pipe.generate(LEMON).images[1]
    record = read(image.info)
    assert record is not None and record.model.placement == Placement.of(**fields)
    assert json.loads(image.info["mezzotint"])["model"]["placement"] == fields
    save(image, tmp_path / "lemon.png")
    source = read_source(tmp_path / "lemon.png")
    assert source.record is not None
    placed = mezzotint.load(sd1_folder, device="cpu", placement=source.record.model.placement)
    assert judge(source, again(placed, source)[0]).identical
    plain = load(sd1_folder)
    assert "placement" not in json.loads(plain.generate(LEMON).images[1].info["mezzotint"])["model"]
    other = judge(source, again(plain, source)[0])
    assert not other.identical
    assert "the placement's storage was int8 and is now none" in other.sentences


def test_a_placement_that_is_none_is_a_damaged_record(sd1: Pipeline) -> None:
    info = dict(sd1.generate(LEMON).images[0].info)
    record = json.loads(info["mezzotint"])
    record["model"]["placement"] = {"weights": "elsewhere"}
    with pytest.raises(RequestError, match=r"the record is wrong at model.placement.weights"):
        read({"mezzotint": json.dumps(record)})


def test_changes_are_recorded() -> None:
    record = read({"mezzotint": json.dumps(RECORD)})
    now = read({"mezzotint": json.dumps(RECORD | {"model": RECORD["model"] | {"placement": {"vae": "tiles"}}})})
    assert record and now
    assert list(changes(record, now)) == ["the placement's vae was none and is now tiles"]


RECORD: dict[str, Any] = {
    "request": {"prompt": "a lemon"},
    "seed": 1,
    "group": [1],
    "model": {"name": "tiny"},
    "versions": {},
}


def test_freed_pages_are_returned_before_a_large_decoding(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(sd1._runner, "trim_heap", lambda: trims.append(None))
    sd1.decode(torch.zeros(1, 4, 8, 8))
    assert not trims
    sd1.decode(torch.zeros(2, 4, 64, 32))
    assert len(trims) == 1
