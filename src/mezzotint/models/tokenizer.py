"""CLIP's tokenizer: text to token ids by byte-pair encoding, identical to transformers' fast CLIPTokenizer.

`encode` returns ids of any length, without BOS and EOS; `window` makes them one window of a text encoder: BOS, ids, EOS
and padding, `max_length` in total. A Tokenizer is immutable and thread-safe.

A text is normalized to NFC, whitespace is collapsed to single spaces, and letters are lower-cased; then it is split
into runs of letters, single digits, runs of other characters and English contractions, and BPE is applied to the UTF-8
bytes of each. As in the fast tokenizer, HTML entities are not unescaped and control characters are kept (the old slow
one with ftfy differs in both). Added tokens, including special ones, are matched in the text before that: where "!" is
the padding token, as in SDXL's second tokenizer, each "!" of a prompt is that token.
"""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

from tokenizers import AddedToken, Encoding, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from mezzotint.errors import CheckpointError, RequestError
from mezzotint.files import read_text

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77  # CLIP's window
FILES = (  # of a tokenizer folder
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
WORD_END = "</w>"

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A long text is encoded in pieces that end before a space, which never splits a word or a combining character, because
# the library's cost per character grows with the length of the text.
_PIECES = re.compile(r"(?s).{1,65536}[^ \n]*")

Merges = Sequence[tuple[str, str]]


class Tokenizer:
    """A CLIP tokenizer.

    Args:
        vocab: Token ids. A token that is missing gets the next id.
        merges: Pairs in the order of their rank.
        named: Special tokens by their transformers names ("pad_token", ...), where they differ from CLIP's.
        added: Tokens that are matched in the text before words are split.
        extra: Special tokens that are added last.
        max_length: Length of a window.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Merges,
        *,
        named: Mapping[str, AddedToken] | None = None,
        added: Sequence[AddedToken] = (),
        extra: Sequence[AddedToken] = (),
        max_length: int = MAX_LENGTH,
    ) -> None:
        given = {name: _special_token(content) for name, content in _DEFAULTS.items()} | dict(named or {})
        special = {name: given[name] for name in _SPECIAL_NAMES if name in given}
        names = {name: token.content for name, token in special.items()}
        bpe = BPE(
            vocab=dict(vocab),
            merges=list(merges),
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            unk_token=names["unk_token"],
        )
        backend = Backend(bpe)
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        declared = {token.content for token in added}
        tokens = [*added, *(token for token in (*special.values(), *extra) if token.content not in declared)]
        for token in tokens:
            token.special = token.special or token.content in names.values()
        backend.add_tokens(tokens)  # of duplicates the last one counts, as in transformers

        self.max_length = max_length
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.bos, self.eos, self.pad = (self.vocab[names[name]] for name in ("bos_token", "eos_token", "pad_token"))
        backend.post_processor = processors.RobertaProcessing(
            (names["eos_token"], self.eos), (names["bos_token"], self.bos), trim_offsets=False, add_prefix_space=False
        )
        self._names = names
        self._merges = merges
        self._backend = backend
        self._splits_text = not any(re.search(r"\s", token.content) for token in tokens)

    @classmethod
    @functools.cache
    def clip(cls, pad: str = END) -> Self:
        """Return CLIP's own tokenizer (49,408 tokens), bundled with the package. SDXL's second one has `pad="!"`."""
        merges = _clip_merges()
        return cls(_number_tokens(merges), merges, named=_hub_special_tokens(pad))

    @classmethod
    def subset(cls, texts: Iterable[str], max_length: int = MAX_LENGTH) -> Self:
        """Return the smallest subset of CLIP's tokenizer that splits the words of `texts` in the same way.

        It has all 512 single bytes (inside a word and at its end), the merges that these words use, in CLIP's order,
        and the two special tokens, with new ids. Any other text can still be encoded, in smaller pieces.
        """
        merges = _clip_merges()
        parents = {left + right: (left, right) for left, right in merges}
        whole, pending, used = cls.clip(), set[str](), set[str]()
        for text in texts:
            pending.update(whole.token(id) for id in whole.encode(text))
        while pending:
            token = pending.pop()
            if token in parents and token not in used:
                used.add(token)
                pending.update(parents[token])
        kept = [merge for merge in merges if merge[0] + merge[1] in used]
        return cls(_number_tokens(kept), kept, named=_hub_special_tokens(END), max_length=max_length)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read a tokenizer folder as transformers does.

        That is tokenizer.json, or vocab.json and merges.txt, and, if they exist, tokenizer_config.json,
        special_tokens_map.json and added_tokens.json.

        Raises:
            CheckpointError: If the files are missing, damaged, or not those of a CLIP tokenizer.
        """
        folder = Path(path)
        try:
            vocab, merges = _read_table(folder)
            settings = _read_settings(folder)
            known = set(vocab) | {token.content for token in settings["added"]}
            for name in ("bos_token", "eos_token"):
                token = settings["named"].get(name, _special_token(_DEFAULTS[name])).content
                if token not in known:
                    raise CheckpointError(
                        f"{folder} is not a CLIP tokenizer: its vocabulary lacks {token!r}, its {name}."
                    )
            unknown = settings["named"].get("unk_token", _special_token(END)).content
            lost = next((token for token in _number_tokens(()) if token not in vocab), None)
            if lost and unknown not in vocab:  # then a text may have no tokens
                raise CheckpointError(
                    f"{folder} is not a CLIP tokenizer: its vocabulary lacks {lost!r}, and its unk_token {unknown!r}."
                )
            return cls(vocab, merges, **settings)
        except CheckpointError:
            raise
        except Exception as error:  # a foreign file may have any shape, and the library raises bare Exception
            raise CheckpointError(f"The tokenizer in {folder} is damaged: {error!r}.") from error

    def encode(self, text: str) -> list[int]:
        """Return all token ids of a text, without BOS and EOS.

        Raises:
            RequestError: If the text is not valid Unicode.
        """
        return [id for _, encoding in self._encodings(text) for id in encoding.ids]

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """Return (id, start, end) of each token, which stands for text[start:end].

        Raises:
            RequestError: If the text is not valid Unicode.
        """
        return [
            (id, first + start, first + end)
            for first, encoding in self._encodings(text)
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _encodings(self, text: str) -> Iterator[tuple[int, Encoding]]:
        """Yield (index of its first character, encoding) of each piece of the text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The prompt has half of a surrogate pair at character {error.start + 1}; it must be valid Unicode."
            ) from None
        pieces = [(m.start(), m[0]) for m in _PIECES.finditer(text)] if self._splits_text else [(0, text)]
        for first, piece in pieces:
            yield first, self._backend.encode(piece, add_special_tokens=False)

    def window(self, ids: Sequence[int]) -> list[int]:
        """Return BOS, as many ids as fit, EOS and padding: exactly `max_length` ids."""
        window = [self.bos, *ids[: self.max_length - 2], self.eos]
        return window + [self.pad] * (self.max_length - len(window))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, with a space after each word; invalid UTF-8 becomes U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text.replace(WORD_END, " ").strip()

    def token(self, id: int) -> str:
        """Return the token as it is in the vocabulary, such as "lemon</w>".

        Raises:
            IndexError: If there is no such id.
        """
        token: str | None = self._backend.id_to_token(id) if id >= 0 else None
        if token is None:
            raise IndexError(f"No token has the id {id}: this tokenizer has {len(self.vocab)} tokens.")
        return token

    def save(self, path: str | Path) -> None:
        """Write a folder that `from_folder` and transformers' CLIPTokenizer read as this tokenizer."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        added: dict[int, AddedToken] = self._backend.get_added_tokens_decoder()
        own = self._backend.get_vocab(with_added_tokens=False)
        described = {str(id): _describe_token(token) for id, token in sorted(added.items())}
        by_content = {token["content"]: token for token in described.values()}
        config = {
            "added_tokens_decoder": described,
            **self._names,
            "clean_up_tokenization_spaces": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        special = {
            name: {key: value for key, value in by_content[content].items() if key != "special"}
            for name, content in self._names.items()
        }
        _write_json(folder / "vocab.json", dict(sorted(own.items(), key=lambda item: item[1])), indent=None)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", special)
        (folder / "tokenizer.json").write_text(self._backend.to_str() + "\n", encoding="utf-8", newline="\n")


def _special_token(content: str) -> AddedToken:
    """Return a special token that a file gives by its text alone."""
    return AddedToken(content, special=True)


def _hub_special_tokens(pad: str) -> dict[str, AddedToken]:
    """Return the special tokens as Stable Diffusion's files describe them."""
    start, end = (AddedToken(content, normalized=True, special=True) for content in (START, END))
    return {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": _special_token(pad)}


@functools.cache
def _clip_merges() -> Merges:
    """Read CLIP's merges."""
    data = (importlib.resources.files("mezzotint") / "data" / "clip" / "merges.txt.gz").read_bytes()
    return _parse_merges(gzip.decompress(data).decode("utf-8"), "data/clip/merges.txt.gz")


def _number_tokens(merges: Merges) -> dict[str, int]:
    """Assign ids in CLIP's order: 256 bytes, 256 bytes at the end of a word, one token per merge, start, end.

    A byte is written as one printable character: its own in Latin-1, or the next from U+0100 on (GPT-2's
    bytes_to_unicode); the printable ones come first.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, printable), *(chr(0x100 + i) for i in range(256 - len(printable)))]
    words = [letter + WORD_END for letter in letters]
    tokens = [*letters, *words, *(left + right for left, right in merges), START, END]
    return {token: id for id, token in enumerate(tokens)}


def _parse_merges(text: str, source: object) -> Merges:
    """Parse a merges.txt."""
    merges = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#version"):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(f"{source}, line {number}, should be two tokens with a space between: {line[:40]!r}.")
        merges.append((left, right))
    return merges


def _read_table(folder: Path) -> tuple[dict[str, int], Merges]:
    """Read the vocabulary and the merges of a tokenizer folder."""
    if (path := folder / "tokenizer.json").is_file():
        model = _read_json(path).get("model", {})
        if model.get("type", "BPE") != "BPE" or model.get("merges") is None:
            raise CheckpointError(f"{path} is not a CLIP tokenizer: its model should be BPE, with a vocab and merges.")
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        return model["vocab"], [(left, right) for left, right in pairs]
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        merges = folder / "merges.txt"
        return _read_json(folder / "vocab.json"), _parse_merges(_read_text(merges), merges)
    raise CheckpointError(f"{folder} has no tokenizer: it should hold tokenizer.json, or vocab.json and merges.txt.")


class _Settings(TypedDict):
    """The settings of a tokenizer folder."""

    named: dict[str, AddedToken]
    added: list[AddedToken]
    extra: list[AddedToken]
    max_length: int


def _read_settings(folder: Path) -> _Settings:
    """Read the special and added tokens of a tokenizer folder.

    As in transformers, only tokenizer_config.json is used if it has `added_tokens_decoder`; otherwise
    special_tokens_map.json, added_tokens.json and the added tokens of tokenizer.json are.
    """
    config = _read_json(path) if (path := folder / "tokenizer_config.json").is_file() else {}
    named = {name: _parse_added_token(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
    extra = _parse_added_tokens(config.get("extra_special_tokens") or config.get("additional_special_tokens"))
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        added = {int(id): _parse_added_token(token) for id, token in config["added_tokens_decoder"].items()}
    else:
        if (path := folder / "special_tokens_map.json").is_file():
            special = _read_json(path)
            named |= {
                name: _parse_added_token(special[name], special=True) for name in _SPECIAL_NAMES if special.get(name)
            }
            extra = _parse_added_tokens(special.get("additional_special_tokens")) or extra
        if (path := folder / "added_tokens.json").is_file():
            names = {token.content for token in (*named.values(), *extra)}
            for content, id in _read_json(path).items():
                added[id] = AddedToken(content, normalized=content not in names, special=content in names)
        if (path := folder / "tokenizer.json").is_file():
            added |= {token["id"]: _parse_added_token(token) for token in _read_json(path).get("added_tokens", [])}
    length = config.get("model_max_length") or MAX_LENGTH
    max_length = int(length) if 2 <= length <= 1_000_000 else MAX_LENGTH  # transformers writes 1e30 for "no limit"
    return _Settings(named=named, added=[added[id] for id in sorted(added)], extra=extra, max_length=max_length)


def _parse_added_tokens(values: Sequence[Any] | dict[str, Any] | None) -> list[AddedToken]:
    """Parse a list of tokens."""
    return [_parse_added_token(value) for value in (values.values() if isinstance(values, dict) else values or ())]


def _parse_added_token(value: str | dict[str, Any], special: bool = False) -> AddedToken:
    """Parse a token, given as a text (which makes it special) or as an object with flags."""
    if isinstance(value, str):
        return _special_token(value)
    flags = {key: value[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in value}
    return AddedToken(value["content"], special=special or value.get("special", False), **flags)


def _describe_token(token: AddedToken) -> dict[str, Any]:
    """Return a token as an object with flags."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {flag: getattr(token, flag) for flag in flags}


def _read_text(path: Path) -> str:
    try:
        return read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8", newline="\n")
