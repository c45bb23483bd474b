"""The tokenizer by itself: ids that are known, folders good and bad, the cut. Against transformers: tests/parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezzotint.errors import CheckpointError, RequestError
from mezzotint.models.tokenizer import END, START, Tokenizer

CAPTIONS = ["a lemon left of a whale on a pink background", "a blue lemon's café 😀", "2 small whales!!!"]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_clip_is_the_published_table(clip: Tokenizer) -> None:
    assert len(clip.vocab) == 49408
    assert sorted(clip.vocab.values()) == list(range(49408))
    assert (clip.bos, clip.eos, clip.pad, clip.max_length) == (49406, 49407, 49407, 77)
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]  # as every CLIP tokenizer
    assert clip.token(2368) == "cat</w>"


def test_window_is_always_full(clip: Tokenizer) -> None:
    assert clip.window([]) == [49406] + [49407] * 76
    assert clip.window(range(1000, 1100)) == [49406, *range(1000, 1075), 49407]
    assert Tokenizer.clip(pad="!").window([5]) == [49406, 5, 49407] + [0] * 74


@pytest.mark.parametrize("text", ["", " ", "\n\t \u3000"])
def test_nothing_gives_no_ids(clip: Tokenizer, text: str) -> None:
    assert clip.encode(text) == []


def test_decode_gives_the_words_back(clip: Tokenizer) -> None:
    assert clip.decode(clip.encode("A  Café,\n日本 😀")) == "a café , 日本 😀"
    assert clip.decode([clip.bos, 2368, clip.eos]) == f"{START}cat {END}"
    assert clip.decode([127]) == "\ufffd"  # one byte of two


def test_special_tokens_are_found_in_a_text(clip: Tokenizer) -> None:
    assert clip.encode(f"cat{END}cat") == [2368, 49407, 2368]
    assert Tokenizer.clip(pad="!").encode("cat!!") == [2368, 0, 0]  # the pad token is found before words are split
    assert clip.encode("cat!!") == [2368, 748]


def test_a_long_text_is_the_sum_of_its_words(clip: Tokenizer) -> None:
    text = "a lemon's e\u0301 \u0301 字,\t12 \x1c! \u2028" * 10_000  # 240,000 characters: several pieces
    ids = clip.encode(text[: len(text) // 10_000])
    assert clip.encode(text) == ids * 10_000


def test_half_a_surrogate_pair_is_refused(clip: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 3"):
        clip.encode("ab\ud83d")


@pytest.mark.parametrize("id", [-1, 49408])
def test_no_such_token(clip: Tokenizer, id: int) -> None:
    with pytest.raises(IndexError, match="49408 tokens"):
        clip.token(id)


def test_cut_splits_its_words_as_clip_does(clip: Tokenizer) -> None:
    cut = Tokenizer.subset(CAPTIONS, max_length=24)
    for text in [*CAPTIONS, "a pink whale left of a lemon"]:
        assert [cut.token(id) for id in cut.encode(text)] == [clip.token(id) for id in clip.encode(text)]
    assert cut.decode(cut.encode("Zebra ÿ 字")) == "zebra ÿ 字"  # other words are there too, in smaller bits
    assert len(cut.window(cut.encode(CAPTIONS[0]))) == cut.max_length == 24


def test_cut_holds_nothing_needless(clip: Tokenizer) -> None:
    cut = Tokenizer.subset(["a lemon"])
    assert sorted(cut.vocab, key=cut.vocab.__getitem__)[512:] == [
        "on</w>",
        "le",
        "mon</w>",
        "lemon</w>",
        START,
        END,
    ]
    assert (cut.bos, cut.eos, cut.pad) == (516, 517, 517)
    larger = Tokenizer.subset(CAPTIONS)
    order = [clip.vocab[larger.token(id)] for id in range(len(larger.vocab))]
    assert order == sorted(order)  # CLIP's own order


def test_cut_of_nothing_is_bytes() -> None:
    assert len(Tokenizer.subset([]).vocab) == 514


@pytest.mark.parametrize("gone", [(), ("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer_config.json",)])
def test_save_and_read_again(tmp_path: Path, gone: tuple[str, ...]) -> None:
    cut = Tokenizer.subset(CAPTIONS, max_length=24)
    cut.save(tmp_path / "new" / "tokenizer")
    for name in gone:
        (tmp_path / "new" / "tokenizer" / name).unlink()
    again = Tokenizer.from_folder(tmp_path / "new" / "tokenizer")
    assert again.vocab == cut.vocab
    assert (again.bos, again.eos, again.pad) == (cut.bos, cut.eos, cut.pad)
    assert again.max_length == (77 if "tokenizer_config.json" in gone else 24)
    assert [again.encode(text) for text in CAPTIONS] == [cut.encode(text) for text in CAPTIONS]


@pytest.mark.parametrize("value", [None, 1e30])
def test_no_window_length_means_77(tmp_path: Path, value: float | None) -> None:
    Tokenizer.subset([]).save(tmp_path)
    edit(tmp_path / "tokenizer_config.json", model_max_length=value)
    assert Tokenizer.from_folder(tmp_path).max_length == 77


def bare(tmp_path: Path) -> Path:
    """A small folder of vocab.json and merges.txt only."""
    Tokenizer.subset(CAPTIONS).save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    return tmp_path


def test_windows_line_ends(tmp_path: Path) -> None:
    merges = bare(tmp_path) / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_folder(tmp_path).vocab == Tokenizer.subset(CAPTIONS).vocab


@pytest.mark.parametrize("name", ["", "missing"])
def test_folder_without_a_tokenizer(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer: it should hold tokenizer\.json, or"):
        Tokenizer.from_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("vocab.json", b'{"a": 0,', "vocab.json is not valid JSON"),
        ("vocab.json", b"[" * 100_000, "vocab.json is not valid JSON"),
        ("vocab.json", b'{"a": ' + b"9" * 5000 + b"}", "vocab.json is not valid JSON"),
        ("vocab.json", b"[1, 2]", "vocab.json should hold a JSON object"),
        ("vocab.json", b"\xff\xfe", "vocab.json cannot be read as text"),
        ("vocab.json", b'{"a": "b", "<|startoftext|>": 1, "<|endoftext|>": 2}', "is damaged"),
        ("vocab.json", b'{"<s>": 0, "</s>": 1}', r"lacks '<\|startoftext\|>', its bos_token"),
        ("vocab.json", b'{"<|startoftext|>": 1, "<|endoftext|>": 2}', "is damaged"),  # merges of unknown tokens
        ("merges.txt", b"#version: 0.2\na b\na b c\n", "merges.txt, line 3, should be two tokens"),
        ("merges.txt", b"\x00\x01", "merges.txt, line 1"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": []}}', "its model should be BPE"),
        ("tokenizer.json", b"{}", "its model should be BPE"),
        ("tokenizer.json", b'{"model": 1}', "is damaged"),
        ("tokenizer_config.json", b"", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "is damaged"),
        ("tokenizer_config.json", b'{"model_max_length": "long"}', "is damaged"),
        ("special_tokens_map.json", b'{"pad_token": 7}', "is damaged"),
        ("added_tokens.json", b"nonsense", "added_tokens.json is not valid JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, file: str, content: bytes, sentence: str) -> None:
    (bare(tmp_path) / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        Tokenizer.from_folder(tmp_path)


def test_tokens_know_their_places() -> None:
    """In a text of several pieces too, and where a letter is several bytes."""
    clip, text = Tokenizer.clip(), "A red  lemon, ÉTÉ " * 5000
    found = clip.encode_with_offsets(text)
    assert [id for id, _, _ in found] == clip.encode(text)
    for id, start, end in found[:: len(found) // 100]:
        assert clip.decode([id]) == text[start:end].lower()
