"""CLIP's tokenizer: text -> ids of its byte-pair encoding, exactly those of transformers' CLIPTokenizer (its fast one).

Contract: `encode` gives ids without BOS and EOS, of any length; `window` makes of them one window that a text encoder
takes: BOS, ids, EOS, padding, `max_length` in all. A Tokenizer never changes once built, and threads may share it.

What the text goes through: NFC, white space runs become one space, lower case, then split into runs of letters, single
digits, runs of other signs and English contractions, then BPE on the UTF-8 bytes of each. As in the fast tokenizer,
HTML entities stay as they are and control characters count as signs (the old slow one, with ftfy, unescaped the
first and dropped the others). Added tokens, special ones among them, are found in the text before all that: where "!"
is the pad token, as in SDXL's second tokenizer, each "!" of a prompt is that token.
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

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77  # CLIP's window
WORD_END = "</w>"

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A long text is encoded in pieces cut before a space, where no word and no combining character crosses, because the
# library's cost per character grows with the length of what it is given.
_PIECES = re.compile(r"(?s).{1,65536}[^ \n]*")

Merges = Sequence[tuple[str, str]]


class Tokenizer:
    """A CLIP tokenizer.

    vocab: token -> id. merges: pairs in the order of their rank. named: special tokens by their transformers names
    ("pad_token" ...), where they differ from CLIP's. added: tokens found whole in the text, before words are split;
    extra: special ones among them that come last. A token that `vocab` lacks gets the next id.
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
        given = {name: _plain(content) for name, content in _DEFAULTS.items()} | dict(named or {})
        special = {name: given[name] for name in _NAMED if name in given}
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
        backend.add_tokens(tokens)  # of two that describe the same token, the last decides, as in transformers

        self.max_length = max_length
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.bos, self.eos, self.pad = (self.vocab[names[name]] for name in ("bos_token", "eos_token", "pad_token"))
        backend.post_processor = processors.RobertaProcessing(
            (names["eos_token"], self.eos), (names["bos_token"], self.bos), trim_offsets=False, add_prefix_space=False
        )
        self._names = names
        self._merges = merges
        self._backend = backend
        self._in_pieces = not any(re.search(r"\s", token.content) for token in tokens)

    @classmethod
    def clip(cls, pad: str = END) -> Self:
        """CLIP's own tokenizer (49,408 tokens), from the table in this package. SDXL's second one has `pad="!"`."""
        merges = _clip_merges()
        return cls(_numbered(merges), merges, named=_like_the_hub(pad))

    @classmethod
    def subset(cls, texts: Iterable[str], max_length: int = MAX_LENGTH) -> Self:
        """The smallest cut of CLIP's tokenizer that splits the words of `texts` as the whole one does.

        It holds all 512 single bytes (inside a word and ending one), the merges that these words use, in CLIP's
        order, and the two special tokens; ids are numbered anew. Any other text is still encoded, in smaller bits.
        """
        merges = _clip_merges()
        parents = {left + right: (left, right) for left, right in merges}
        whole, open_, used = cls.clip(), set[str](), set[str]()
        for text in texts:
            open_.update(whole.token(id) for id in whole.encode(text))
        while open_:
            token = open_.pop()
            if token in parents and token not in used:
                used.add(token)
                open_.update(parents[token])
        kept = [merge for merge in merges if merge[0] + merge[1] in used]
        return cls(_numbered(kept), kept, named=_like_the_hub(END), max_length=max_length)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read a tokenizer folder as transformers does: tokenizer.json, else vocab.json and merges.txt; beside them
        tokenizer_config.json, special_tokens_map.json and added_tokens.json, whichever exist.

        Raises CheckpointError when the files are missing, broken, or not those of a CLIP tokenizer.
        """
        folder = Path(path)
        try:
            vocab, merges = _read_table(folder)
            settings = _read_settings(folder)
            known = set(vocab) | {token.content for token in settings["added"]}
            for name in ("bos_token", "eos_token"):
                token = settings["named"].get(name, _plain(_DEFAULTS[name])).content
                if token not in known:
                    raise CheckpointError(
                        f"{folder} is not a CLIP tokenizer: its vocabulary lacks {token!r}, its {name}."
                    )
            return cls(vocab, merges, **settings)
        except CheckpointError:
            raise
        except Exception as error:  # a foreign file may have any shape, and the library raises bare Exception
            raise CheckpointError(f"The tokenizer in {folder} is damaged: {error!r}.") from error

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS, however many. Raises RequestError for text that is not Unicode."""
        return [id for _, encoding in self._encodings(text) for id in encoding.ids]

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of each token: it stands for text[start:end]. Raises RequestError as `encode` does."""
        return [
            (id, first + start, first + end)
            for first, encoding in self._encodings(text)
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _encodings(self, text: str) -> Iterator[tuple[int, Encoding]]:
        """(index of its first character, encoding) of each piece of the text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The prompt's character {error.start + 1} is half of a surrogate pair: give it as valid UTF-8."
            ) from None
        pieces = [(m.start(), m[0]) for m in _PIECES.finditer(text)] if self._in_pieces else [(0, text)]
        for first, piece in pieces:
            yield first, self._backend.encode(piece, add_special_tokens=False)

    def window(self, ids: Sequence[int]) -> list[int]:
        """BOS, as many of `ids` as fit, EOS, then padding: exactly `max_length` ids."""
        window = [self.bos, *ids[: self.max_length - 2], self.eos]
        return window + [self.pad] * (self.max_length - len(window))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with one space after each word; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text.replace(WORD_END, " ").strip()

    def token(self, id: int) -> str:
        """The token as it stands in the vocabulary, such as "lemon</w>". Raises IndexError when there is none."""
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
        described = {str(id): _described(token) for id, token in sorted(added.items())}
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
        _write_json(folder / "tokenizer.json", json.loads(self._backend.to_str()), indent=None)


def _plain(content: str) -> AddedToken:
    """A special token that a file names by its text alone."""
    return AddedToken(content, special=True)


def _like_the_hub(pad: str) -> dict[str, AddedToken]:
    """The special tokens as Stable Diffusion's own files describe them."""
    start, end = (AddedToken(content, normalized=True, special=True) for content in (START, END))
    return {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": _plain(pad)}


@functools.cache
def _clip_merges() -> Merges:
    data = (importlib.resources.files("mezzotint") / "data" / "clip" / "merges.txt.gz").read_bytes()
    return _parse_merges(gzip.decompress(data).decode("utf-8"), "data/clip/merges.txt.gz")


def _numbered(merges: Merges) -> dict[str, int]:
    """CLIP's order of ids: the 256 bytes, the 256 bytes that end a word, one token a merge, start, end.

    A byte is written as one printable character: itself where Latin-1 has one, else the next from U+0100 on (GPT-2's
    bytes_to_unicode); the printable ones come first.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, printable), *(chr(0x100 + i) for i in range(256 - len(printable)))]
    words = [letter + WORD_END for letter in letters]
    tokens = [*letters, *words, *(left + right for left, right in merges), START, END]
    return {token: id for id, token in enumerate(tokens)}


def _parse_merges(text: str, source: object) -> Merges:
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
    """(vocabulary, merges) of a tokenizer folder."""
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
    named: dict[str, AddedToken]
    added: list[AddedToken]
    extra: list[AddedToken]
    max_length: int


def _read_settings(folder: Path) -> _Settings:
    """What a tokenizer folder says beside the table.

    As in transformers, tokenizer_config.json decides alone where it has `added_tokens_decoder`; else
    special_tokens_map.json, added_tokens.json and the tokens that tokenizer.json declares have their say.
    """
    config = _read_json(path) if (path := folder / "tokenizer_config.json").is_file() else {}
    named = {name: _added(config[name]) for name in _NAMED if config.get(name)}
    extra = _list(config.get("extra_special_tokens") or config.get("additional_special_tokens"))
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        added = {int(id): _added(token) for id, token in config["added_tokens_decoder"].items()}
    else:
        if (path := folder / "special_tokens_map.json").is_file():
            special = _read_json(path)
            named |= {name: _added(special[name], special=True) for name in _NAMED if special.get(name)}
            extra = _list(special.get("additional_special_tokens")) or extra
        if (path := folder / "added_tokens.json").is_file():
            names = {token.content for token in (*named.values(), *extra)}
            for content, id in _read_json(path).items():
                added[id] = AddedToken(content, normalized=content not in names, special=content in names)
        if (path := folder / "tokenizer.json").is_file():
            added |= {token["id"]: _added(token) for token in _read_json(path).get("added_tokens", [])}
    length = config.get("model_max_length") or MAX_LENGTH
    max_length = int(length) if 2 <= length <= 1_000_000 else MAX_LENGTH  # transformers writes 1e30 for "no limit"
    return _Settings(named=named, added=[added[id] for id in sorted(added)], extra=extra, max_length=max_length)


def _list(values: Sequence[Any] | dict[str, Any] | None) -> list[AddedToken]:
    return [_added(value) for value in (values.values() if isinstance(values, dict) else values or ())]


def _added(value: str | dict[str, Any], special: bool = False) -> AddedToken:
    """A token as a file describes it: its text alone (then it is special), or an object with flags."""
    if isinstance(value, str):
        return _plain(value)
    flags = {key: value[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in value}
    return AddedToken(value["content"], special=special or value.get("special", False), **flags)


def _described(token: AddedToken) -> dict[str, Any]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {flag: getattr(token, flag) for flag in flags}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8", newline="\n")
