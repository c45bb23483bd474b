"""Textual inversion files of every producer, written here as they write them; and what is refused."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint import Pipeline, Request
from mezzotint.errors import CheckpointError
from mezzotint.weights import hub
from mezzotint.weights.checkpoint import inspect_model
from mezzotint.weights.embeddings import Library, read_embeddings
from mezzotint.weights.files import TensorFile

VECTORS = torch.arange(24.0).view(3, 8)
PAIR = {"clip_l": VECTORS, "clip_g": torch.arange(36.0).view(3, 12)}


def a1111(vectors: Tensor) -> dict[str, Any]:
    """What modules/textual_inversion saves."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": nn.Parameter(vectors)},
        "name": "another name",
        "step": 5000,
        "sd_checkpoint": "abc",
        "sd_checkpoint_name": "model",
    }


def original(vectors: Tensor) -> dict[str, Any]:
    """What Gal et al.'s code saves: a ParameterDict, as torch 1.11 pickled it, with its fields beside it."""
    table = nn.ParameterDict()
    table.__dict__["_parameters"] = {"*": nn.Parameter(vectors)}
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {
        name: tmp_path / name
        for name in (
            "style.pt", "old.pt", "legacy.pt", "learned_embeds.bin", "one.bin", "cat.safetensors",
            "kohya.safetensors", "xl.safetensors", "lora.safetensors",
        )
    }  # fmt: skip
    torch.save(a1111(VECTORS), paths["style.pt"])
    torch.save(original(VECTORS), paths["old.pt"])
    torch.save(a1111(VECTORS), paths["legacy.pt"], _use_new_zipfile_serialization=False)
    torch.save({"<cat-toy>": VECTORS}, paths["learned_embeds.bin"])
    torch.save({"<one>": VECTORS[0]}, paths["one.bin"])
    save_file({"<Cat>": VECTORS.half()}, paths["cat.safetensors"])
    save_file({"emb_params": VECTORS}, paths["kohya.safetensors"])
    save_file(PAIR, paths["xl.safetensors"])
    save_file(
        {
            "lora_unet_mid_block.lora_down.weight": torch.ones(2, 2),
            "bundle_emb.bundled.string_to_param.*": VECTORS,
            "bundle_emb.second.string_to_param.*": VECTORS + 1,
        },
        paths["lora.safetensors"],
    )
    return paths


@pytest.mark.parametrize(
    ("name", "triggers"),
    [
        ("style.pt", {"style"}),
        ("old.pt", {"old"}),
        ("legacy.pt", {"legacy"}),
        ("learned_embeds.bin", {"cat-toy", "learned_embeds"}),
        ("cat.safetensors", {"cat"}),
        ("kohya.safetensors", {"kohya"}),
    ],
)
def test_every_producer(files: dict[str, Path], name: str, triggers: set[str]) -> None:
    library = Library([str(files[name])], [8])
    assert {*library} == triggers
    for trigger in triggers:
        (vectors,) = library[trigger]
        assert torch.equal(vectors, VECTORS) and vectors.dtype == torch.float32


def test_one_vector_is_a_row(files: dict[str, Path]) -> None:
    (vectors,) = Library([str(files["one.bin"])], [8])["one"]
    assert torch.equal(vectors, VECTORS[:1])


def test_both_encoders_of_sdxl(files: dict[str, Path]) -> None:
    first, second = Library([str(files["xl.safetensors"])], [8, 12])["xl"]
    assert torch.equal(first, PAIR["clip_l"]) and torch.equal(second, PAIR["clip_g"])


def test_those_bundled_in_a_lora(files: dict[str, Path], tmp_path: Path) -> None:
    library = Library([str(files["lora.safetensors"])], [8])
    assert {*library} == {"bundled", "second"}
    assert torch.equal(library["second"][0], VECTORS + 1)
    save_file({f"bundle_emb.x.{key}": tensor for key, tensor in PAIR.items()}, tmp_path / "xl-lora.safetensors")
    assert [vectors.shape for vectors in Library([str(tmp_path / "xl-lora.safetensors")], [8, 12])["x"]] == [
        (3, 8),
        (3, 12),
    ]


def test_a_folder(files: dict[str, Path], tmp_path: Path) -> None:
    """All of it; of two formats of one embedding the safer."""
    (tmp_path / "in" / "side").mkdir(parents=True)
    torch.save({"<a>": VECTORS}, tmp_path / "in" / "a.bin")
    save_file({"<a>": VECTORS + 1}, tmp_path / "in" / "a.safetensors")
    save_file({"emb_params": VECTORS}, tmp_path / "in" / "side" / "b.safetensors")
    (tmp_path / "in" / "README.md").write_text("no embedding")
    library = Library([str(tmp_path / "in")], [8])
    assert {*library} == {"a", "b"} and torch.equal(library["a"][0], VECTORS + 1)


def test_another_models_embedding_names_both_widths(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"kohya\.safetensors.*'kohya' have width 8,.* 16"):
        Library([str(files["kohya.safetensors"])], [16])
    with pytest.raises(CheckpointError, match=r"width 8 and 12,.* 8$"):
        Library([str(files["xl.safetensors"])], [8])
    with pytest.raises(CheckpointError, match=r"width 8,.* 8 and 12"):
        Library([str(files["kohya.safetensors"])], [8, 12])
    (tmp_path / "in").mkdir()  # in a folder only where it is asked for
    files["kohya.safetensors"].rename(tmp_path / "in" / "kohya.safetensors")
    library = Library([str(tmp_path / "in")], [16])
    with pytest.raises(CheckpointError, match=r"width 8,.* 16"):
        library["kohya"]


def test_two_of_one_name(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    save_file({"emb_params": VECTORS + 1}, tmp_path / "other" / "KOHYA.safetensors")
    with pytest.raises(CheckpointError, match="both hold an embedding named 'KOHYA'; rename one"):
        Library([str(files["kohya.safetensors"]), str(tmp_path / "other")], [8])
    Library([str(files["kohya.safetensors"])] * 2, [8])  # twice the same is no question


def test_a_file_that_changed_is_read_again(files: dict[str, Path]) -> None:
    path = files["kohya.safetensors"]
    before = Library([str(path)], [8])
    save_file({"emb_params": VECTORS * 2}, path)
    os.utime(path, ns=(1, 1))
    after = Library([str(path)], [8])
    assert torch.equal(after["kohya"][0], VECTORS * 2) and torch.equal(before["kohya"][0], VECTORS)
    assert before.digests["kohya"] != after.digests["kohya"]


def test_a_damaged_file_of_a_folder_matters_only_where_a_prompt_names_it(tmp_path: Path, sd1: Pipeline) -> None:
    width = sd1.text_encoders[0].config.hidden_size
    save_file({"emb_params": torch.ones(1, width)}, tmp_path / "good.safetensors")
    (tmp_path / "bad.pt").write_bytes(b"no tensors")
    save_file({"emb_params": torch.full((1, width), float("nan"))}, tmp_path / "nothing.safetensors")
    save_file({"lora_unet_conv_in.alpha": torch.ones(())}, tmp_path / "lemon.safetensors")  # something else
    request = Request(prompt="a lemon good", embeddings=(str(tmp_path),), steps=1, width=32, height=32)
    assert sd1.plan(request).embedding_digests.keys() == {"good"}
    sd1.generate(request)
    with pytest.raises(CheckpointError, match=r"bad\.pt is neither a safetensors nor a PyTorch file"):
        sd1.generate(request.replace(prompt="a bad lemon"))
    with pytest.raises(CheckpointError, match="'emb_params' is not an embedding; its values must be finite"):
        sd1.generate(request.replace(prompt="a lemon", negative_prompt="embedding:nothing"))
    with pytest.raises(CheckpointError, match="neither"):  # a file that is named itself
        Library([str(tmp_path / "bad.pt")], [width])
    save_file({"emb_params": torch.ones(1, width)}, tmp_path / "bad.pt")  # replaced
    sd1.generate(request.replace(prompt="a bad lemon"))


def test_the_other_files_of_a_training_run_are_no_embeddings(tmp_path: Path) -> None:
    """Of ours and of diffusers' scripts: its cache, checkpoints and states, of which some look like embeddings."""
    save_file({"<cat>": VECTORS}, tmp_path / "learned_embeds.safetensors")
    save_file({"<cat>": VECTORS}, tmp_path / "learned_embeds-steps-500.safetensors")
    for name in (
        "cache/ab/cd.safetensors", "checkpoint-500/learned_embeds.safetensors", "logs/x.safetensors",
        "optimizer.bin", "scheduler.bin", "random_states_0.pt", "state.pt", "cat.preview.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"hidden": VECTORS + 1}, tmp_path / name)
    assert {*Library([str(tmp_path)], [8])} == {"cat", "learned_embeds", "learned_embeds-steps-500"}


@pytest.mark.parametrize("as_folder", [True, False])
def test_sdxls_two_files_of_diffusers_are_paired_by_width(tmp_path: Path, as_folder: bool) -> None:
    """What examples/textual_inversion_sdxl.py writes: one word, a file for each encoder, read in any order."""
    first, second = PAIR["clip_l"], PAIR["clip_g"]
    names = ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    for order in (names, names[::-1]):
        save_file({"<cat>": first}, tmp_path / order[0])
        save_file({"<cat>": second}, tmp_path / order[1])
        library = Library([str(tmp_path)] if as_folder else [str(tmp_path / name) for name in names], [8, 12])
        assert {*library} == {"cat", "learned_embeds", "learned_embeds_2"}
        assert all(torch.equal(a, b) for a, b in zip(library["cat"], (first, second), strict=True))
        assert len(set(library.digests.values())) == 1
    with pytest.raises(CheckpointError, match=r"width 8, and the text encoder's width is 8 and 12"):
        Library([str(tmp_path / names[1])], [8, 12])  # one alone
    with pytest.raises(CheckpointError, match="both hold an embedding named 'cat'"):
        Library([str(tmp_path)], [8])


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"), ("clip_g", "clip_l")])
def test_sdxls_two_tensors_are_paired_by_width(tmp_path: Path, keys: tuple[str, str]) -> None:
    save_file(dict(zip(keys, PAIR.values(), strict=True)), tmp_path / "cat.safetensors")
    first, second = Library([str(tmp_path / "cat.safetensors")], [8, 12])["cat"]
    assert torch.equal(first, PAIR["clip_l"]) and torch.equal(second, PAIR["clip_g"])


def test_shapes_are_checked_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("a tensor was read"))
    for shape, words in (((4097, 8), "(4097, 8)"), ((1, 16385), "(1, 16385)"), ((0, 8), "(0, 8)")):
        save_file({"emb_params": torch.zeros(shape)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=re.escape(f"of shape {words} is not an embedding")):
            read_embeddings(tmp_path / "a.safetensors")
    save_file({"emb_params": torch.zeros(1, 8, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is int32; an embedding must be floating-point"):
        read_embeddings(tmp_path / "a.safetensors")


# ---- A1111's PNG files -----------------------------------------------------------------------------------------------


def web_ui_json(vectors: Tensor, name: str | None = "Style") -> bytes:
    """What modules/textual_inversion/image_embedding.py makes of an embedding."""
    table = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}, "step": 500}
    return json.dumps(table | ({} if name is None else {"name": name})).encode()


def in_text(path: Path, data: bytes) -> None:
    chunks = PngInfo()
    chunks.add_text("sd-ti-embedding", base64.b64encode(data).decode())
    Image.new("RGB", (16, 16), "white").save(path, pnginfo=chunks)


def in_pixels(path: Path, data: bytes, height: int = 32) -> None:
    """Its insert_image_data_embed, with a checkerboard for its pattern of dots: bytes halved, repeated and masked."""
    packed = np.frombuffer(zlib.compress(data, 9), np.uint8)
    length = len(packed) + height - len(packed) % height
    length += height * 3 - length % (height * 3)
    state, mask = 0, []
    for _ in range(length):
        state = (1664525 * state + 1013904223) % 2**32
        mask.append(state % 255 & 0x0F)
    assert mask[:8] == [253 & 15, 242 & 15, 127 & 15, 44 & 15, 157 & 15, 27 & 15, 239 & 15, 133 & 15]  # its own test's
    blocks = []
    for half in (packed & 0x0F, packed >> 4):
        block = np.resize(half, length).reshape(height, -1, 3)
        dots = np.indices(block.shape[:2]).sum(0)[..., None] % 2 * 0x50 + 0x10
        blocks.append((block ^ dots ^ np.array(mask).reshape(block.shape)).astype(np.uint8))
    picture, black = np.full((height, 20, 3), 200, np.uint8), np.zeros((height, 1, 3), np.uint8)
    Image.fromarray(np.concatenate([blocks[0], black, picture, black, blocks[1]], 1)).save(path)


def test_inspect_names_a_textual_inversion(tmp_path: Path, files: dict[str, Path]) -> None:
    in_pixels(tmp_path / "a.png", web_ui_json(VECTORS))
    kinds = {
        tmp_path / "a.png": "a textual inversion in a picture: Style, 3 vectors of width 8",
        files["style.pt"]: "a textual inversion: style, 3 vectors of width 8",
        files["learned_embeds.bin"]: "a textual inversion: <cat-toy> or learned_embeds, 3 vectors of width 8",
        files["xl.safetensors"]: "a textual inversion: xl, 3 vectors of width 8 and 12",
    }
    for path, kind in kinds.items():
        assert inspect_model(path).kind == kind.replace("<cat-toy>", "cat-toy")


@pytest.mark.parametrize("write", [in_text, in_pixels])
def test_a_png_of_the_web_ui(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    """Both ways; its trigger is the name in it, or the file's; JSON holds float32 exactly."""
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    write(tmp_path / "a.png", web_ui_json(vectors))
    write(tmp_path / "b.png", web_ui_json(vectors + 1, None))
    Image.new("RGB", (40, 40), "black").save(tmp_path / "preview.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "noise.png")
    library = Library([str(tmp_path)], [8])
    assert {*library} == {"style", "b"}
    assert torch.equal(library["style"][0], vectors) and torch.equal(library["b"][0], vectors + 1)
    assert torch.equal(Library([str(tmp_path / "a.png")], [8])["style"][0], vectors)
    with pytest.raises(CheckpointError, match="is a picture without an embedding in it"):
        Library([str(tmp_path / "preview.png")], [8])


@pytest.mark.parametrize("write", [in_text, in_pixels])
@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"[" * 100_000,
        b'{"string_to_param": {"*": {"TORCHTENSOR": [[1], [1, 2]]}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [[1' + b"0" * 4000 + b"]]}}}",
        b'{"string_to_param": {"*": {"TORCHTENSOR": "x"}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [[NaN]]}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [1, 2]}}}',
        b'{"string_to_param": {}}',
        b'{"string_to_param": 1}',
        b" " * (2**24 + 1),
    ],
)
def test_a_damaged_png_is_a_sentence(tmp_path: Path, write: Callable[[Path, bytes], None], data: bytes) -> None:
    write(tmp_path / "a.png", data)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "a.png"))):
        read_embeddings(tmp_path / "a.png")


def test_a_png_that_is_too_large_or_cut_is_a_sentence(tmp_path: Path) -> None:
    Image.new("1", (2**12, 2**12)).save(tmp_path / "a.png")
    with pytest.raises(CheckpointError, match="4096x4096 pixels, more than"):
        read_embeddings(tmp_path / "a.png")
    for data in (b"", b"PNG", (tmp_path / "a.png").read_bytes()[:60]):
        (tmp_path / "b.png").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"is not a whole PNG file|pixels"):
            read_embeddings(tmp_path / "b.png")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": VECTORS}, "x": Evil(tmp_path / "canary")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        read_embeddings(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()


def test_inspect_says_what_is_wrong_with_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16), "white").save(path)
    with pytest.raises(CheckpointError, match=r"a\.png is a picture without an embedding in it"):
        inspect_model(path)
    in_text(path, b'{"string_to_param": {}}')
    with pytest.raises(CheckpointError, match=r"a\.png has an embedding that cannot be read; it must be JSON"):
        inspect_model(path)
    in_text(path, web_ui_json(VECTORS, "x" * 1001))  # which is no name: the file's counts
    assert "a textual inversion in a picture: a, 3 vectors" in inspect_model(path).text()


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"unet.conv_in.weight": torch.ones(2, 2)}, "is not a textual inversion.*unet.conv_in.weight"),
        ({"alpha": torch.tensor(1.0)}, "is not a textual inversion"),
        ({"emb_params": torch.full((1, 8), float("nan"))}, "is not an embedding"),
        ({"clip_l": torch.ones(1, 2, 8), "clip_g": torch.ones(1, 12)}, "is not an embedding"),
    ],
)
def test_what_is_no_embedding(tmp_path: Path, tensors: dict[str, Tensor], sentence: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        read_embeddings(tmp_path / "a.safetensors")


def test_missing_and_damaged_files(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'nowhere\.pt' does not exist"):
        Library(["nowhere.pt"], [8])
    files["style.pt"].write_bytes(files["style.pt"].read_bytes()[:300])
    with pytest.raises(CheckpointError, match="damaged"):
        Library([str(files["style.pt"])], [8])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="a folder without"):
        Library([str(tmp_path / "empty")], [8])


def test_a_hub_id(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of the concepts library holds learned_embeds.bin, pictures, and a text; and no path is looked up."""
    asked: list[str] = []

    def snapshot(name: str, choose: Any) -> Path:
        asked.append(name)
        assert choose(["README.md", "learned_embeds.bin", "concept_images/1.bin", "token_identifier.txt"]) == [
            "learned_embeds.bin"
        ]
        with pytest.raises(CheckpointError, match="is not an embedding"):
            choose(["README.md", "unet/a.safetensors"])
        (tmp_path / "snapshot").mkdir()
        files["learned_embeds.bin"].rename(tmp_path / "snapshot" / "learned_embeds.bin")
        return tmp_path / "snapshot"

    monkeypatch.setattr(hub, "snapshot", snapshot)
    assert "cat-toy" in Library(["sd-concepts-library/cat-toy"], [8])
    assert asked == ["sd-concepts-library/cat-toy"]
    for name in ("a/b.safetensors", "./a/b", "/a/b"):
        with pytest.raises(CheckpointError, match="does not exist"):
            Library([name], [8])
    assert asked == ["sd-concepts-library/cat-toy"]


def test_the_hubs_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache without a question; else the chosen files alone."""
    import huggingface_hub

    (tmp_path / "a.bin").write_bytes(b"")
    calls: list[Any] = []

    def download(name: str, **options: Any) -> str:
        calls.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.snapshot("a/b", lambda listing: sorted(listing)) == tmp_path
    assert calls == [{"local_files_only": True, "allow_patterns": []}]
