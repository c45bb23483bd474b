r"""ComfyUI's `{a|b}` choices and `__name__` wildcards, drawn from a seed; the result is an ordinary prompt.

Choices are drawn once, from the outside in, and only the drawn option is expanded further. `\{`, `\|` and `\}` are
literal, `// ...` and `/* ... */` are comments, and an unclosed choice ends with the text, as in ComfyUI's web page. A
wildcard is a line of the file name.txt in the folder (`__colours/warm__` is colours/warm.txt); empty lines and lines
that begin with # are skipped. A line may contain choices and wildcards.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from mezzotint.errors import RequestError
from mezzotint.files import read_text

_MAX_DRAWS = 10_000
_MAX_LENGTH = 1_000_000  # characters; nested wildcards can grow exponentially

_COMMENT = re.compile(r"/\*|//[^\n\r]*")
_TOKEN = re.compile(r"\\.|[{|}]|__((?:[^_\n{|}\\]|_(?!_))+)__", re.DOTALL)


def expand(text: str, seed: int, folder: str | Path | None = None) -> str:
    """Draw every choice and wildcard. The same text, seed and files give the same result.

    Args:
        text: The prompt.
        seed: The seed of the draws.
        folder: The folder of wildcard files.

    Raises:
        RequestError: If a wildcard's file is missing, empty, outside of the folder or recursive, or if nothing is left
            of the prompt.
    """
    draw = random.Random(seed)
    out: list[str] = []
    first = _Template(_strip_comments(text))
    pending: list[tuple[_Template, int, int, tuple[str, ...]]] = [(first, 0, len(first.text), ())]
    draws = length = 0
    while pending:
        source, start, end, files = pending.pop()
        match = source.next_draw(start, end)
        stop = match.start() if match else end
        out.append(re.sub(r"\\([{|}])", r"\1", source.text[start:stop]))
        draws, length = draws + 1, length + len(out[-1])
        if draws > _MAX_DRAWS or length > _MAX_LENGTH:
            raise RequestError(
                f"prompt is too long with its choices drawn; it must have at most {_MAX_DRAWS:,} choices and "
                f"{_MAX_LENGTH:,} characters"
            )
        if match is None:
            continue
        if match[0] == "{":
            ends = source.options[match.start()]
            pending.append((source, ends[-1] + 1, end, files))
            option = int(draw.random() * len(ends))
            pending.append((source, ends[option - 1] + 1 if option else match.end(), ends[option], files))
        else:
            pending.append((source, match.end(), end, files))
            lines = _read_lines(match[1], folder, files)
            line = _Template(lines[int(draw.random() * len(lines))])
            pending.append((line, 0, len(line.text), (*files, match[1])))
    result = "".join(out)
    if text.strip() and not result.strip():
        raise RequestError(f"prompt is empty with the choices of seed {seed}; it must leave some words")
    return result


class _Template:
    """A text with the ends of the options of each `{`: at its own bars, and at its `}`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.options: dict[int, list[int]] = {}
        open_braces: list[int] = []
        for match in _TOKEN.finditer(text):
            match match[0]:
                case "{":
                    open_braces.append(match.start())
                    self.options[match.start()] = []
                case "|" if open_braces:
                    self.options[open_braces[-1]].append(match.start())
                case "}" if open_braces:
                    self.options[open_braces.pop()].append(match.start())
        for unclosed in open_braces:
            self.options[unclosed].append(len(text))

    def next_draw(self, start: int, end: int) -> re.Match[str] | None:
        """Return the next choice or wildcard between start and end."""
        return next((match for match in _TOKEN.finditer(self.text, start, end) if match[0] == "{" or match[1]), None)


def _strip_comments(text: str) -> str:
    """Remove comments; an unclosed one is text."""
    kept, start = [], 0
    match = _COMMENT.search(text)
    while match:
        end = match.end() if match[0] != "/*" else text.find("*/", match.end()) + 2
        if end < 2:  # no later /* is closed either, but a // may follow
            match = re.compile(r"//[^\n\r]*").search(text, match.end())
            continue
        kept.append(text[start : match.start()])
        start = end
        match = _COMMENT.search(text, start)
    return "".join([*kept, text[start:]])


def _read_lines(name: str, folder: str | Path | None, files: tuple[str, ...]) -> list[str]:
    """Return the lines of a wildcard's file."""
    if folder is None:
        raise RequestError(f"prompt has the wildcard __{name}__, but no folder of wildcards is given")
    if name in files:
        raise RequestError(
            f"wildcard {name}.txt refers to itself through {' and '.join(files)}; wildcards must not be recursive"
        )
    try:
        root = Path(folder).resolve()
        path = (root / f"{name}.txt").resolve()
        if not path.is_relative_to(root):
            raise RequestError(f"wildcard {name}.txt is outside of {folder}; it must be inside that folder")
        text = read_text(path, "utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"wildcard file {path} is not UTF-8 text; it must have one choice per line") from None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links
        raise RequestError(
            f"wildcard file {name}.txt is not in {folder}; it must be there, with one choice per line"
        ) from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise RequestError(f"wildcard file {path} has no choices; it must have one choice per line")
    return lines
