"""Prompts in Compel's dialect against the package itself: CompelForSD and CompelForSDXL over transformers' encoders."""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Any

import pyparsing
import pytest
import torch
from compel import Compel, CompelForSD, CompelForSDXL

import mezzotint
from pictures import Pair
from test_prompt import FAMILIES, LIMIT, pairs  # noqa: F401 (pairs is a fixture)

WORDS = ("lemon", "red whale", "a", "left of", "background", "blue", "Whale!", "7.5")
LONG = "lemon " * 74
WRITTEN = (
    "",
    "a lemon",
    "a lemon+ left-",
    "a lemon++ left--- of a whale+++++",
    "(a red whale)1.4, blue",
    "(a red whale)0.5, blue",
    "(a red whale)0, blue",
    "a (red (whale)1.2)0.7 lemon",
    "((a lemon)0.5 left)1.5",
    "(a (red)++ whale)- lemon",
    "'a lemon'.and()",
    '("a lemon", "a red whale").and()',
    '("a lemon", "a red whale", "blue").and(1, 0.5, 2)',
    '("a lemon", "a red whale").blend(0.7, 0.3)',
    '("a lemon", "a red whale").blend(3, 1)',
    '("a lemon", "a red whale").blend(3, 1, no_normalize)',
    '("a (lemon)0.5", "a red whale++").blend(1, -0.5)',
    '("a lemon+", "(blue)0.3 whale", "left").and(0.2, 1, 1.3)',
    r"a \(lemon\) left",
    LONG,
    LONG + "whale",
    LONG + "whale " * 90,
    LONG + "(red whale)0.5 left",
    LONG + "(red whale)1.4 left " * 30,
    "lemon " * 60 + ". (red whale)0.5 " + "left " * 50 + ", " + "red " * 40,
    "lemon, " * 50 + "blue. " * 20,
    "(" + "lemon " * 100 + ")0.5 blue",
)


def random_prompt(rng: random.Random) -> str:
    """Fragments with weights of each kind, now and then beyond a window."""

    def fragment() -> str:
        words = " ".join(rng.choices(WORDS, k=rng.choice((1, 2, 3, 40))))
        return rng.choice((words, f"({words}){rng.choice((0.3, 0.9, 1.2, 2))}", f"({words}){rng.choice(('+', '--'))}"))

    return rng.choice((" ", ", ", ". ")).join(fragment() for _ in range(rng.randint(1, 5)))


RANDOM = [random_prompt(random.Random(seed)) for seed in range(12)]
CASES = [(family, prompt) for prompt in (*WRITTEN, *RANDOM) for family in FAMILIES]
# Compel 2.5.1 raises AttributeError for a conjunction with weights when it also has to return a pooled vector.
CASES = [case for case in CASES if case[0] == "sd1" or not re.search(r"\.and\([^)]", case[1])]

# Its parser takes seconds for a long prompt, and SDXL's two encoders and SD1's have it parsed each for itself.
pyparsing.ParserElement.enable_packrat()
parse = cache(Compel.parse_prompt_string)


@pytest.fixture(autouse=True)
def _parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compel, "parse_prompt_string", lambda _, prompt: parse(prompt))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("family", "prompt"), CASES, ids=lambda text: text[:30])
def test_the_package_gives_the_same(pairs: dict[str, Pair], family: str, prompt: str) -> None:  # noqa: F811
    pair = pairs[family]
    package: Any = (CompelForSDXL if family == "sdxl" else CompelForSD)(pair.theirs)
    with torch.no_grad():
        theirs = package(prompt)
    found = pair.ours.encode(prompt, mezzotint.Request(prompt="", prompt_syntax="compel"))
    assert found.context.shape == theirs.embeds.shape
    assert float((found.context - theirs.embeds).abs().max() / theirs.embeds.abs().max()) < LIMIT
    if family == "sdxl":
        assert float((found.pooled - theirs.pooled_embeds).abs().max() / theirs.pooled_embeds.abs().max()) < LIMIT
