"""The tokenizer against transformers' CLIPTokenizer: the same ids, text and special tokens from each kind of folder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from mezzotint.models.tokenizer import END, START, Tokenizer

# What texts are made of: words, spaces, signs, accents, emoji, CJK, control characters, entities, special tokens.
BITS = [
    *"abcdefghijklmnopqrstuvwxyzABC 0123456789  \t\n'!?.,<>|&;-_()[]",
    *("é", "e\u0301", "\u0301", "\u0308", "ß", "İ", "ı", "Σ", "ς", "ﬁ", "Ａ", "Ω", "Å", "a\u0327\u0301", "ñandú"),
    *("字", "日本", "한", "각", "ᄀ", "ᅡ", "क्षि", "שּׁ", "ا", "٣", "²", "½", "Ⅷ"),
    *("🍋", "👩‍👩‍👧", "🏽", "\ufe0f", "\u200d", "\u200b", "\ufeff", "\ufffd", "\U0010ffff"),
    *("\x00", "\x07", "\x1c", "\x1f", "\x7f", "\x85", "\xa0", "\u2028", "\u3000"),
    *("&amp;", "&#39;", "&lt;b&gt;", "'s", "'S", "'LL", "’s", "</w>", "!!!", "a photo of a cat"),
    *(START, END, "<|ENDOFTEXT|>", "<|EndOfText|>", "sks", "SKS", "<cat-toy>", "my style", "My Style", "[PAD]", "<x>"),
]
LONG = ["", " ", "\n\t ", "a" * 1000, "qwertyuiop" * 300, "字" * 300, "!" * 500, "lemon " * 200, "x1y2" * 100]


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    mixed = ["".join(rng.choices(BITS, k=rng.randint(1, 40))) for _ in range(count)]
    any_ = [
        "".join(chr(c) for c in rng.choices(range(0x20000), k=30) if not 0xD800 <= c < 0xE000) for _ in range(count)
    ]
    return [*LONG, *BITS, *mixed, *any_]


def token(content: str, **flags: bool) -> dict[str, Any]:
    """A token as special_tokens_map.json describes one."""
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | flags


def old(content: str) -> dict[str, Any]:
    """A token as older tokenizer_config.json files describe one."""
    return {"__type": "AddedToken"} | token(content)


CONFIG = {"model_max_length": 77, "do_lower_case": True, "errors": "replace", "tokenizer_class": "CLIPTokenizer"}
OLD = CONFIG | {"bos_token": old(START), "eos_token": old(END), "unk_token": old(END), "pad_token": END}
MAP = {"bos_token": token(START), "eos_token": token(END), "unk_token": token(END)}
DECODER = {"49406": token(START, special=True), "49407": token(END, special=True)}
NEW = CONFIG | {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
TABLE = ("vocab.json", "merges.txt")

# name: (files of the table, {file next to it: content})
FOLDERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "table alone": (TABLE, {}),
    "sd1": (TABLE, {"special_tokens_map": MAP | {"pad_token": END}, "tokenizer_config": OLD}),
    "sd2": (TABLE, {"special_tokens_map": MAP | {"pad_token": "!"}, "tokenizer_config": OLD}),
    "sdxl second": (
        TABLE,
        {
            "special_tokens_map": MAP | {"pad_token": "!"},
            "tokenizer_config": NEW
            | {
                "pad_token": "!",
                "added_tokens_decoder": {"0": token("!", normalized=False, special=True)} | DECODER,
            },
        },
    ),
    "tokenizer.json alone": (("tokenizer.json",), {}),
    "tokenizer.json and config": (("tokenizer.json",), {"tokenizer_config": NEW | {"pad_token": "!"}}),
    "added_tokens.json": (
        TABLE,
        {
            "added_tokens": {"<cat-toy>": 49408, "My Style": 49409},
            "special_tokens_map": MAP | {"pad_token": "[PAD]"},
        },
    ),
    "added_tokens_decoder": (
        TABLE,
        {
            "tokenizer_config": NEW
            | {
                "added_tokens_decoder": DECODER
                | {
                    "49408": token("<cat-toy>", normalized=False, lstrip=True),
                    "49409": token("sks", single_word=True),
                },
                "additional_special_tokens": ["<x>"],
            }
        },
    ),
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    Tokenizer.clip().save(folder)
    return folder


def assert_same(ours: Tokenizer, theirs: Any, samples: list[str]) -> None:
    assert ours.vocab == theirs.get_vocab()
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    length = theirs.model_max_length if theirs.model_max_length < 10**6 else 77
    assert ours.max_length == length
    expected = theirs(samples, add_special_tokens=False).input_ids
    windows = theirs(samples, padding="max_length", truncation=True, max_length=length).input_ids
    for text, ids, window in zip(samples, expected, windows, strict=True):
        assert ours.encode(text) == ids, repr(text)
        assert ours.window(ids) == window, repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)


@pytest.mark.parametrize("name", FOLDERS)
def test_same_ids_from_every_folder(name: str, clip_folder: Path, tmp_path: Path) -> None:
    table, others = FOLDERS[name]
    for file in table:
        shutil.copy(clip_folder / file, tmp_path)
    for file, content in others.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    samples = texts(150 if name == "table alone" else 30)  # the folders differ in their special tokens
    assert_same(Tokenizer.from_folder(tmp_path), CLIPTokenizer.from_pretrained(tmp_path), samples)


@pytest.mark.parametrize("pad", [END, "!"])
def test_transformers_reads_what_save_wrote(pad: str, tmp_path: Path) -> None:
    Tokenizer.clip(pad).save(tmp_path)
    assert_same(Tokenizer.clip(pad), CLIPTokenizer.from_pretrained(tmp_path), texts(50))


@pytest.mark.parametrize("gone", [(), ("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_transformers_reads_a_cut(gone: tuple[str, ...], tmp_path: Path) -> None:
    cut = Tokenizer.subset(["a lemon left of a whale", "a blue café"], max_length=24)
    cut.save(tmp_path)
    for file in gone:
        (tmp_path / file).unlink()
    assert_same(cut, CLIPTokenizer.from_pretrained(tmp_path), texts(50))


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_the_shipped_table_reads_as_the_hub_folders_do(name: str, clip_folder: Path, tmp_path: Path) -> None:
    """A single file without a tokenizer gives the ids of the folder that it was made from."""
    for file in TABLE:
        shutil.copy(clip_folder / file, tmp_path)
    for file, content in FOLDERS[name][1].items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    ours = Tokenizer.clip(pad="!" if name == "sd2" else END)
    assert_same(ours, CLIPTokenizer.from_pretrained(tmp_path), texts(50))
