"""A run is planned once: count how often samplers are resolved, prompts parsed, files read and folders listed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mezzotint import Pipeline, Request, RequestError, prompt, samplers
from mezzotint.memory import footprint
from mezzotint.run.model_info import ModelInfo
from mezzotint.run.plan import plan_run
from mezzotint.weights import checkpoint, embeddings, lora
from mezzotint.weights.listing import list_files

LEMON = Request(prompt="a lemon blob", steps=2, width=32, height=32, seed=7)


@pytest.fixture
def folders(sd1: Pipeline, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with two LoRA files, and one with two embeddings."""
    loras, words = tmp_path / "loras" / "below", tmp_path / "words"
    loras.mkdir(parents=True)
    words.mkdir()
    for name in ("style", "other"):
        write_lora(loras / f"{name}.safetensors")
    for name in ("blob", "thing"):
        write_embedding(sd1, words / f"{name}.safetensors")
    return tmp_path / "loras", words


def write_lora(path: Path, scale: float = 0.1) -> None:
    tensors = {"lora_down": torch.full((1, 4, 3, 3), scale), "lora_up": torch.full((16, 1, 1, 1), scale)}
    save_file({f"lora_unet_conv_in.{name}.weight": tensor for name, tensor in tensors.items()}, path)


def write_embedding(pipe: Pipeline, path: Path) -> None:
    width = pipe.text_encoders[0].config.hidden_size
    save_file({"emb_params": torch.randn(1, width, generator=torch.Generator().manual_seed(len(path.name)))}, path)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """Count what a plan is made of, by function and by what it was called with."""
    calls: Counter[Any] = Counter()

    def count(owner: Any, name: str, key: Callable[..., Any]) -> None:
        function = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[(name, key(*arguments))] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(samplers, "resolve", lambda *_: None)
    count(prompt, "plan", lambda text, *_: text)
    count(os, "scandir", str)
    count(lora, "read_adapter", lambda path, *_: path.name)
    count(embeddings, "_read", lambda path, *_: Path(path).name)
    return calls


def test_a_request_is_resolved_parsed_and_looked_up_once(
    sd1: Pipeline, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loras, words = folders
    calls = count_calls(monkeypatch)
    text = "a lemon blob <lora:style:0.5>"
    request = LEMON.replace(
        prompt=text, negative_prompt="a whale", count=16, batch=4, lora_folder=str(loras), embeddings=(str(words),)
    )
    result = sd1.generate(request)
    assert len(result.images) == 16
    assert calls == {
        ("resolve", None): 1,
        ("plan", text): 1,
        ("plan", "a whale"): 1,
        ("scandir", str(loras)): 1,
        ("scandir", str(loras / "below")): 1,
        ("scandir", str(words)): 1,
        ("read_adapter", "style.safetensors"): 1,
        ("_read", "blob.safetensors"): 1,
        ("_read", "thing.safetensors"): 1,
    }
    record = result.images[15].info["mezzotint"]
    assert "style.safetensors" in record and "blob" in record


def test_a_second_pass_parses_its_own_steps_and_looks_at_no_folder_again(
    sd1: Pipeline, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    text = "a [lemon:whale:1] <lora:style:0.5>"
    sd1.generate(LEMON.replace(prompt=text, negative_prompt="", hires=2.0, lora_folder=str(folders[0])))
    assert calls[("resolve", None)] == calls[("scandir", str(folders[0]))] == 1
    assert calls[("plan", text)] == 2


def test_files_that_change_are_seen_by_the_next_request(sd1: Pipeline, folders: tuple[Path, Path]) -> None:
    """New, replaced, renamed and removed, at once: nothing is remembered of a folder."""
    loras, words = folders
    request = LEMON.replace(prompt="a blob <lora:style:1>", lora_folder=str(loras), embeddings=(str(words),))
    before = sd1.plan(request)
    write_lora(loras / "new.safetensors", 0.2)
    write_embedding(sd1, words / "newer.safetensors")
    assert sd1.plan(request.replace(prompt="a newer <lora:new:1>")).embedding_digests.keys() == {"newer"}
    os.replace(loras / "new.safetensors", loras / "below" / "style.safetensors")
    os.replace(words / "newer.safetensors", words / "blob.safetensors")
    after = sd1.plan(request)
    assert before.lora_digests.keys() == after.lora_digests.keys() and before.lora_digests != after.lora_digests
    assert before.embedding_digests != after.embedding_digests
    (loras / "below" / "style.safetensors").rename(loras / "renamed.safetensors")
    (words / "blob.safetensors").unlink()
    with pytest.raises(RequestError, match="names the LoRA 'style'"):
        sd1.plan(request)
    renamed = sd1.plan(request.replace(prompt="a blob <lora:renamed:1>"))
    assert not renamed.embedding_digests and renamed.lora_digests.keys() == {str(loras / "renamed.safetensors")}


def test_a_listing_is_sorted_folder_by_folder(tmp_path: Path) -> None:
    for name in ("b.pt", "a/z.pt", "a-b/c.pt", "a/y/x.pt", "a/none.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.pt").symlink_to(tmp_path / "b.pt")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = list_files(tmp_path, (".pt",))
    assert found == ["a/y/x.pt", "a/z.pt", "a-b/c.pt", "b.pt", "link.pt"]
    assert [tmp_path / name for name in found] == sorted(tmp_path / name for name in found)


def test_a_model_info_from_headers_is_that_of_the_loaded_model(sd1: Pipeline, sd1_folder: Path) -> None:
    found = footprint.ModelHeaders(checkpoint.scan_model(sd1_folder), torch.device("cpu"), torch.float32)
    assert found.info == ModelInfo.of(sd1.parts, sd1.unet.config, sd1.vae.config, "cpu")
    ours, theirs = sd1.plan(LEMON), found.plan(LEMON)
    assert ours.request == theirs.request and ours.sigmas == theirs.sigmas
    assert ours.condition_count == theirs.condition_count == 2


@pytest.mark.parametrize(
    ("fields", "guides", "conditions"),
    [
        ({}, True, 2),
        ({"guidance_scale": 1.0}, False, 1),
        ({"guidance_scale": (1.0, 1.5)}, True, 2),
        ({"guidance_scale": 1.0, "prompt": "a AND b"}, True, 3),
        ({"guidance_scale": 1.0, "prompt": "a :0.5 AND b :0.5"}, False, 2),
        ({"guidance_scale": 0.6, "sampler": "euler_cfg_pp"}, True, 2),
        ({"guidance_method": "perp_neg"}, True, 3),
    ],
)
def test_when_guidance_is_on(sd1: Pipeline, fields: dict[str, Any], guides: bool, conditions: int) -> None:
    plan = plan_run(sd1._model.info, LEMON.replace(**fields))
    assert (plan.guides, plan.condition_count) == (guides, conditions)
    assert len(sd1._model.prompts.encode_batch([sd1.plan(LEMON.replace(**fields))])) in (conditions, conditions - 1)


def test_cfg_pp_has_a_guidance_scale_of_its_own(sd1: Pipeline) -> None:
    """0.6 corresponds to 7.5 (Chung et al. 2024); A1111 divides its own by 12.5."""
    scales = {"euler_cfg_pp": 0.6, "DDIM CFG++": 7.5}
    found = {name: plan_run(sd1._model.info, Request(prompt="a lemon", sampler=name)) for name in scales}
    assert {name: plan.request.guidance_scale for name, plan in found.items()} == pytest.approx(scales)
    assert [plan.guidance_scales for plan in found.values()] == [pytest.approx((0.6,))] * 2


def test_a_string_is_a_request(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in {"steps": 1, "width": 32, "height": 32, "seed": 7}.items():
        monkeypatch.setitem(sd1._model.info.settings, field, value)
    one = sd1.generate("a lemon")
    assert one.request.prompt == "a lemon" and len(sd1.generate(["a lemon", "a whale"])) == 2
    assert [step.index for step in sd1.stream("a lemon")] == [0]


def test_a_pipeline_is_one_line_for_a_person(sd1: Pipeline) -> None:
    text = repr(sd1)
    assert text.startswith("Pipeline(") and sd1.name in text and "sd1, float32 on cpu" in text and "\n" not in text
    assert text.endswith("M parameters)")
