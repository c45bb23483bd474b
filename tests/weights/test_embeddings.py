"""Textual inversion files of every producer, written here as they write them; and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.errors import CheckpointError
from mezzotint.weights import hub
from mezzotint.weights.embeddings import Library, read_embeddings

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
    assert calls == [{"local_files_only": True}]
