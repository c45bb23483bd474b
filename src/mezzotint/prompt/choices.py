r"""ComfyUI's `{a|b}` choices and `__name__` wildcards, drawn from a seed. What comes out is an ordinary prompt.

Each choice is drawn once, from the outside in; only what was drawn is looked at further. `\{`, `\|` and `\}` are
letters, `// ...` and `/* ... */` are comments, a choice that is never closed ends with the text: all as in ComfyUI's
page. A wildcard is a line of the file name.txt in the folder (`__colours/warm__` is colours/warm.txt); empty lines and
lines that begin with # are not drawn. A line may hold choices and wildcards again.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from mezzotint.errors import RequestError

_MAX_DRAWS = 10_000
_MAX_LENGTH = 1_000_000  # characters, before Request's own limit: lines that name two lines each grow without end

_COMMENT = re.compile(r"/\*|//[^\n\r]*")
_TOKEN = re.compile(r"\\.|[{|}]|__((?:[^_\n{|}\\]|_(?!_))+)__", re.DOTALL)


def expand(text: str, seed: int, folder: str | Path | None = None) -> str:
    """The text with every choice and wildcard drawn. The same text, seed and files give the same result.

    RequestError for a wildcard whose file is missing, empty, outside of the folder or leads back to itself, and for a
    prompt of which nothing is left.
    """
    draw = random.Random(seed)
    out: list[str] = []
    first = _Source(_without_comments(text))
    pending: list[tuple[_Source, int, int, tuple[str, ...]]] = [(first, 0, len(first.text), ())]
    draws = length = 0
    while pending:
        source, start, end, files = pending.pop()
        match = source.next_draw(start, end)
        stop = match.start() if match else end
        out.append(re.sub(r"\\([{|}])", r"\1", source.text[start:stop]))
        draws, length = draws + 1, length + len(out[-1])
        if draws > _MAX_DRAWS or length > _MAX_LENGTH:
            raise RequestError(f"prompt draws too much: more than {_MAX_DRAWS:,} choices or {_MAX_LENGTH:,} characters")
        if match is None:
            continue
        if match[0] == "{":
            ends = source.options[match.start()]
            pending.append((source, ends[-1] + 1, end, files))
            option = int(draw.random() * len(ends))
            pending.append((source, ends[option - 1] + 1 if option else match.end(), ends[option], files))
        else:
            pending.append((source, match.end(), end, files))
            lines = _lines(match[1], folder, files)
            line = _Source(lines[int(draw.random() * len(lines))])
            pending.append((line, 0, len(line.text), (*files, match[1])))
    result = "".join(out)
    if text.strip() and not result.strip():
        raise RequestError(f"prompt resolves to nothing with seed {seed}; it must leave some words")
    return result


class _Source:
    """A text and, for each `{` in it, where its options end: at a bar of its own, and at its `}`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.options: dict[int, list[int]] = {}
        opened: list[int] = []
        for match in _TOKEN.finditer(text):
            match match[0]:
                case "{":
                    opened.append(match.start())
                    self.options[match.start()] = []
                case "|" if opened:
                    self.options[opened[-1]].append(match.start())
                case "}" if opened:
                    self.options[opened.pop()].append(match.start())
        for unclosed in opened:
            self.options[unclosed].append(len(text))

    def next_draw(self, start: int, end: int) -> re.Match[str] | None:
        """The next choice or wildcard in a stretch of the text."""
        return next((match for match in _TOKEN.finditer(self.text, start, end) if match[0] == "{" or match[1]), None)


def _without_comments(text: str) -> str:
    kept, start = [], 0
    match = _COMMENT.search(text)
    while match:
        end = match.end() if match[0] != "/*" else text.find("*/", match.end()) + 2
        if end < 2:  # a comment that is never closed is none, and so are those behind it; a // may still follow
            match = re.compile(r"//[^\n\r]*").search(text, match.end())
            continue
        kept.append(text[start : match.start()])
        start = end
        match = _COMMENT.search(text, start)
    return "".join([*kept, text[start:]])


def _lines(name: str, folder: str | Path | None, files: tuple[str, ...]) -> list[str]:
    if folder is None:
        raise RequestError(f"prompt names the wildcard __{name}__, but there is no folder of wildcards to find it in")
    if name in files:
        raise RequestError(
            f"wildcard {name}.txt leads back to itself through {' and '.join(files)}; it must end somewhere"
        )
    try:
        root = Path(folder).resolve()
        path = (root / f"{name}.txt").resolve()
        if not path.is_relative_to(root):
            raise RequestError(f"wildcard {name}.txt is outside of {folder}; it must lie in that folder")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"wildcard file {path} is not UTF-8 text; it must hold one choice a line") from None
    except (OSError, ValueError):
        raise RequestError(f"wildcard file {name}.txt is not in {folder}; it must hold one choice a line") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise RequestError(f"wildcard file {path} has no line to choose; it must hold one choice a line")
    return lines
