"""The safety checker of a model, from its folder to the delivered picture: a tiny one, whose flags are set by hand."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint import cli
from mezzotint.again import again, judge, read_source
from mezzotint.config import SafetyCheckerConfig
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.images.io import save
from mezzotint.memory import footprint
from mezzotint.models.clip_vision import preprocess
from mezzotint.models.safety_checker import SafetyChecker
from mezzotint.pipeline import Pipeline
from mezzotint.placement import Placement
from mezzotint.records import record
from mezzotint.request import Request
from mezzotint.result import Result
from mezzotint.run.safety import PictureChecker, conceal
from mezzotint.weights.checkpoint import inspect_model, scan_model

VISION = {
    "hidden_size": 256,  # so that its layers are large enough to be offloaded
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LEMON = Request(prompt="a lemon", seed=3, steps=2, count=4, batch=2)


def write_checker(folder: Path) -> None:
    """Write a random checker with two concepts that no picture reaches, and how pictures become its input."""
    config = {"vision_config": VISION, "projection_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = SafetyChecker(SafetyCheckerConfig.model_validate({**config, "concepts": 2, "special_care": 1}))
        for name, parameter in network.named_parameters():  # the class token knows only what it sees in the patches
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.0 if "position" in name else 0.1)
    (folder / "safety_checker").mkdir()
    (folder / "feature_extractor").mkdir()
    tensors = {
        **network.state_dict(),
        "concept_embeds_weights": torch.ones(2),
        "special_care_embeds_weights": torch.ones(1),
    }
    save_file(tensors, folder / "safety_checker" / "model.safetensors")
    (folder / "safety_checker" / "config.json").write_text(json.dumps(config))
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps({"size": 32, "crop_size": 32}))


@pytest.fixture(scope="module")
def checked_folder(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD1-shaped model with a checker that flags LEMON's second and third picture."""
    folder = tmp_path_factory.mktemp("checked") / "tiny"
    shutil.copytree(sd1_folder, folder)
    write_checker(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    files = scan_model(folder).checker
    assert files
    network = files.network.network()
    files.network.load(network, torch.float32, torch.device("cpu"))
    images = mezzotint.load(folder, device="cpu").generate(LEMON).images
    with torch.no_grad():
        embeds = network.visual_projection(network.vision_model(preprocess(files.processor, images)).pooled)  # type: ignore[operator]
    first, second, third, fourth = torch.nn.functional.normalize(embeds)
    path = folder / "safety_checker" / "model.safetensors"
    tensors = load_file(path)
    tensors["concept_embeds"] = torch.stack([second, third])
    others = max(float(a @ b) for a in (second, third) for b in (first, fourth))
    assert others < 0.999
    tensors["concept_embeds_weights"] = torch.full((2,), (1.0 + others) / 2)
    save_file(tensors, path)
    return folder


@pytest.fixture(scope="module")
def pipe(checked_folder: Path) -> Pipeline:
    return mezzotint.load(checked_folder, device="cpu")


@pytest.fixture(scope="module")
def results(pipe: Pipeline) -> dict[str | None, Result]:
    modes = (None, "off", "flag", "blur", "black")
    return {mode: pipe.generate(LEMON.replace(safety=mode)) for mode in modes}


def flagged_in(image: Image.Image) -> bool | None:
    read = record.read({"mezzotint": image.info["mezzotint"]})
    assert read
    return read.flagged


def test_the_flags_are_delivered(pipe: Pipeline, results: dict[str | None, Result]) -> None:
    for mode in (None, "flag", "blur", "black"):
        assert results[mode].flagged == [False, True, True, False]
        assert [flagged_in(image) for image in results[mode].images] == results[mode].flagged
        assert "2 flagged" in repr(results[mode])
    assert results["off"].flagged is None and {flagged_in(image) for image in results["off"].images} == {None}
    assert "flagged" not in json.loads(results["off"].images[0].info["mezzotint"])
    assert pipe.check(results["off"].images) == [False, True, True, False]


def test_the_bits_do_not_depend_on_it(results: dict[str | None, Result]) -> None:
    off = results["off"]
    for mode, result in results.items():
        assert torch.equal(result.latents, off.latents) and result.seeds == off.seeds
        for k, (image, plain) in enumerate(zip(result.images, off.images, strict=True)):
            want = conceal(plain, mode or "off") if off.seeds[k] in (4, 5) else plain
            assert image.tobytes() == want.tobytes()
    assert not any(results["black"].images[1].tobytes())
    blurred = results["blur"].images[1]
    assert blurred.size == (32, 32) and blurred.tobytes() != off.images[1].tobytes()


def test_requests_with_different_modes_share_a_batch(pipe: Pipeline, results: dict[str | None, Result]) -> None:
    wanted = ["off", "black", "blur", None]
    requests = [LEMON.replace(count=1, seed=3 + k, safety=mode) for k, mode in enumerate(wanted)]
    for k, (mode, result) in enumerate(zip(wanted, pipe.generate(requests), strict=True)):
        assert result.images[0].tobytes() == results[mode].images[k].tobytes()
        group = json.loads(result.images[0].info["mezzotint"])["group"]
        assert group == [3, 4] if k < 2 else group == [5, 6]
        assert result.flagged == (None if mode == "off" else [k in (1, 2)])


@pytest.mark.parametrize("mode", ["flag", "blur", "black"])
def test_again_delivers_the_same(pipe: Pipeline, results: dict[str | None, Result], mode: str, tmp_path: Path) -> None:
    save(results[mode].images[1], tmp_path / "a.png")
    source = read_source(tmp_path / "a.png")
    (image,) = again(pipe, source)
    assert image.tobytes() == results[mode].images[1].tobytes() and judge(source, image).identical
    checker = json.loads(image.info["mezzotint"])["model"].get("safety_checker", {})
    assert set(checker) == (
        set() if mode == "flag" else {"config.json", "model.safetensors", "preprocessor_config.json"}
    )
    (plain,) = again(pipe, source, {"safety": "off"})  # in the same batch
    assert plain.tobytes() == results["off"].images[1].tobytes()
    assert json.loads(plain.info["mezzotint"])["group"] == [3, 4]


@pytest.mark.parametrize("weights", ["offload", "stream"])
def test_a_placement_changes_no_flag(checked_folder: Path, results: dict[str | None, Result], weights: str) -> None:
    moved = mezzotint.load(checked_folder, device="cpu", placement=Placement.of(weights=weights))
    assert moved.check(results["off"].images) == [False, True, True, False]


def test_where_there_is_no_checker_nothing_is_checked(sd1: Pipeline) -> None:
    request = LEMON.replace(count=1)
    for mode in (None, "off"):
        result = sd1.generate(request.replace(safety=mode))
        assert result.flagged is None and result.notices == ()
    result = sd1.generate(request.replace(safety="flag"))
    assert result.flagged is None
    assert result.notices == ("pictures are not checked: the model has no safety checker",)
    for mode in ("blur", "black"):
        with pytest.raises(RequestError, match=f"safety is '{mode}', but the model has no safety checker; load one"):
            sd1.plan(request.replace(safety=mode))
    with pytest.raises(RequestError, match="has no safety checker"):
        sd1.check(result.images)


def lose_folder(folder: Path) -> None:
    shutil.rmtree(folder / "safety_checker")


def lose_tensor(folder: Path) -> None:
    path = folder / "safety_checker" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "concept_embeds"}, path)


def crop_otherwise(folder: Path) -> None:
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"size": 224, "crop_size": 224}')


def write_processor(folder: Path, **fields: object) -> None:
    described = {"size": 32, "crop_size": 32, **fields}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(described))


def divide_by_zero(folder: Path) -> None:
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"image_std": [0.2, 0.0, 0.2]}')


def test_numbers_that_are_not_finite_flag_nothing(checked_folder: Path, tmp_path: Path) -> None:
    """NaN is above no threshold, so a damaged checker would let every picture pass."""
    for name in ("concept_embeds", "special_care_embeds_weights", "visual_projection.weight"):
        folder = tmp_path / name
        shutil.copytree(checked_folder, folder)
        path = folder / "safety_checker" / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path)
        damaged = mezzotint.load(folder, device="cpu")
        with pytest.raises(CheckpointError, match=r"not finite .* \(--safety off\)"):
            damaged.generate(LEMON.replace(count=1))
        assert damaged.generate(LEMON.replace(count=1, safety="off")).flagged is None


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: write_processor(folder, image_std=[1e-300] * 3), "wrong at image_std"),
        (lambda folder: write_processor(folder, rescale_factor=0), "wrong at rescale_factor"),
        (lambda folder: write_processor(folder, rescale_factor=1e300), "wrong at rescale_factor"),
        (lose_folder, "safety_checker"),
        (lose_tensor, "lacks concept_embeds"),
        (crop_otherwise, "cropped to 224x224 .* image_size 32"),
        (divide_by_zero, "preprocessor_config.json is wrong at image_std"),
    ],
)
def test_a_checker_that_cannot_be_used_is_said(
    checked_folder: Path, damage: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(checked_folder, folder)
    damage(folder)
    found = scan_model(folder)
    assert found.checker is None
    model = footprint.ModelHeaders(found, torch.device("cpu"), torch.float32)
    assert not model.plan(LEMON.replace(safety="off")).notices
    (notice,) = model.plan(LEMON).notices
    assert notice == f"pictures are not checked: {found.unchecked}"
    assert f"none, {notice}" in inspect_model(folder).text()
    with pytest.raises(RequestError, match="no safety checker that can be used"):
        model.plan(LEMON.replace(safety="black"))
    with pytest.raises(CheckpointError, match=why):
        scan_model(folder, safety_checker=folder)


def test_a_checker_from_elsewhere_and_none(
    sd1_folder: Path, checked_folder: Path, results: dict[str | None, Result], tmp_path: Path
) -> None:
    for place in (checked_folder, checked_folder / "safety_checker"):
        found = scan_model(sd1_folder, safety_checker=str(place)).checker
        assert found and found.processor.crop_size == (32, 32)
    alone = tmp_path / "checker"  # as the hub's repository of the checker alone
    shutil.copytree(checked_folder / "safety_checker", alone)
    with pytest.raises(CheckpointError, match="cropped to 224x224"):
        scan_model(sd1_folder, safety_checker=alone)
    shutil.copy(checked_folder / "feature_extractor" / "preprocessor_config.json", alone)
    given = mezzotint.load(sd1_folder, device="cpu", safety_checker=alone)
    assert given.check(results["off"].images) == [False, True, True, False]
    assert scan_model(checked_folder, safety_checker=None).checker is None
    assert mezzotint.load(checked_folder, device="cpu", safety_checker=None).generate(LEMON).flagged is None
    file = checked_folder / "model_index.json"
    for wrong, state in ((str(file), "a file"), ("no/such/folder", "not here"), (tmp_path / "no", "not here")):
        with pytest.raises(CheckpointError, match=f"safety_checker is .* which is {state}; it must be the folder"):
            scan_model(sd1_folder, safety_checker=wrong)


def test_inspect_tells_whether_pictures_are_checked(sd1_folder: Path, checked_folder: Path) -> None:
    assert "safety checker  none, pictures are not checked" in inspect_model(sd1_folder).text()
    report = inspect_model(checked_folder)
    assert "safety checker  2 concepts, 1 with special care" in report.text() and not report.problems
    assert report.parts[-1].name == "safety_checker"
    assert not any("safety" in line or "feature" in line for line in report.passed_over)


def test_the_plan_counts_the_checker(checked_folder: Path) -> None:
    model = footprint.ModelHeaders.of(checked_folder, device="cpu")
    weights = model.checker
    assert weights.large + weights.small == sum(
        t.numel() for t in load_file(checked_folder / "safety_checker" / "model.safetensors").values()
    )
    stages = footprint.predict(model, LEMON, base=0).stages
    assert 4 * (weights.large + weights.small) < stages["check"] - stages["load"]
    streamed = footprint.predict(model, LEMON, Placement(weights="stream"), base=0).stages
    assert streamed["check"] - footprint.READ_BUFFER_BYTES - streamed["load"] < stages["check"] - stages["load"]
    assert "check" not in footprint.predict(model, LEMON.replace(safety="off"), base=0).stages
    assert (
        "check"
        not in footprint.predict(
            footprint.ModelHeaders.of(checked_folder, device="cpu", safety_checker=None), LEMON, base=0
        ).stages
    )


@pytest.fixture
def run(
    checked_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """A command that draws the flagged picture into lemon.png, in this process."""

    def run(command: str, *more: str) -> tuple[str, str]:
        options = ["--seed", "4", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "lemon.png")]
        monkeypatch.setattr(
            "sys.argv", ["mezzotint", command, "a lemon", "--model", str(checked_folder), *options, *more]
        )
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert not done.value.code
        return capsys.readouterr()

    return run


def test_explain_reports_a_flag(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, err = run("explain", "--json")
    assert json.loads(out)["flagged"] is True and err == "the picture is flagged by the safety checker\n"
    plain = (tmp_path / "lemon.png").read_bytes()
    out, err = run("explain", "--safety", "black")
    assert "flagged" not in out and err == "the picture is flagged by the safety checker, and black\n"
    black = Image.open(tmp_path / "lemon.png")
    assert len({pixel for _, pixel in black.getcolors(2**24)}) < len(  # the page shows it as it is delivered
        {pixel for _, pixel in Image.open(io.BytesIO(plain)).getcolors(2**24)}
    )
    out, err = run("explain", "--safety", "off", "--json")
    assert json.loads(out)["flagged"] is None and not err


def test_the_command_line_reports_flags(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "lemon.png"
    out, err = run("generate", "--json")
    assert [image["flagged"] for image in json.loads(out)["images"]] == [True]
    assert err == f"{file}: flagged by the safety checker\n"
    _, err = run("generate", "--safety", "black")
    assert "flagged by the safety checker, and black" in err and not any(Image.open(file).tobytes())
    out, err = run("generate", "--safety", "off", "--json")
    assert json.loads(out)["images"][0]["flagged"] is None and not err


def test_a_stream_is_not_checked(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PictureChecker, "check", lambda *_: pytest.fail("checked"))
    assert len(list(pipe.stream(LEMON))) == 2
