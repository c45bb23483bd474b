"""The four grammars: a table of prompts worked out by the published rules, and properties of any text.

Rows of the table were checked against the programs themselves (A1111's parser with lark, ComfyUI's, Compel 2.5's); they
are facts about those programs, bugs and all.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mezzotint import prompt
from mezzotint.errors import RequestError
from mezzotint.prompt import SYNTAXES, convert, expand, lint, parse, plan, write

TABLE = runpy.run_path(str(Path(__file__).with_name("prompt_table.py")))
BOTH, A1111, COMFY, COMPEL = TABLE["BOTH"], TABLE["A1111"], TABLE["COMFY"], TABLE["COMPEL"]
PLANS, REFUSED, SCHEDULES = TABLE["PLANS"], TABLE["REFUSED"], TABLE["SCHEDULES"]

PIECES = [*"ab1 .:,+-=|\\\"'()[]{}<>#_\n\t", "BREAK", "AND", "é", "\U0001f34b", "1.2", ".swap(", ".and("]
SMALL = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)
ANY = st.one_of(SMALL, st.text(max_size=60))


def same(left: list[tuple[str, float]], right: list[tuple[str, float]]) -> bool:
    return [text for text, _ in left] == [text for text, _ in right] and all(
        a == pytest.approx(b, rel=1e-8) for (_, a), (_, b) in zip(left, right, strict=True)
    )


def spoken(text: str, syntax: str) -> list[tuple[str, float]] | None:
    try:
        return parse(text, syntax)
    except RequestError:
        return None


ROWS = [
    *(("a1111", *row) for row in A1111 + BOTH),
    *(("comfy", *row) for row in COMFY + BOTH),
    *(("compel", *row) for row in COMPEL),
]


@pytest.mark.parametrize(("syntax", "text", "meaning"), ROWS, ids=[f"{row[0]} {row[1]!r}"[:60] for row in ROWS])
def test_weights(syntax: str, text: str, meaning: list[tuple[str, float]]) -> None:
    assert same(parse(text, syntax), meaning), parse(text, syntax)
    assert parse(write(parse(text, syntax), syntax), syntax) == parse(text, syntax)


@pytest.mark.parametrize(("text", "steps", "base", "meaning"), SCHEDULES, ids=[repr(row[0])[:50] for row in SCHEDULES])
def test_schedules(text: str, steps: int, base: int | None, meaning: list[tuple[int, str]]) -> None:
    """Prompt editing as a list of (last step, text); `base` is the number of steps of a first pass."""
    (part,) = plan(text, "a1111", steps, negative=True, base_steps=base).parts
    assert [(variant.until, variant.text) for variant in part.variants] == meaning


@pytest.mark.parametrize(("syntax", "text", "meaning"), PLANS, ids=[repr(row[1])[:50] for row in PLANS])
def test_plans(syntax: str, text: str, meaning: object) -> None:
    """(weight of the part, how its texts are joined, [(weight of the text, its spans)]) for each part; the networks."""
    found = plan(text, syntax)
    parts = [
        (part.weight, v.join, [(c.weight, [(s.text, s.weight) for s in c.spans]) for c in v.clauses])
        for part in found.parts
        for v in part.variants[:1]
    ]
    assert (parts, [(n.kind, n.name, *n.args, *n.options.items()) for n in found.networks]) == meaning


@pytest.mark.parametrize(("syntax", "text", "words"), REFUSED, ids=[repr(row[1])[:30] for row in REFUSED])
def test_refused(syntax: str, text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        plan(text, syntax)


def test_parse_reports_what_plan_refuses() -> None:
    """Weights that no picture can have, and half characters, are no errors where the original has none."""
    assert parse("(a:nan) (b:inf)", "comfy")[2][1] == float("inf")
    assert parse("(a:1e308)", "comfy") == [("a", 1e308)]
    assert parse("\ud800") == [("\ud800", 1.0)]


def test_a_step_is_counted_as_the_sampler_does() -> None:
    """A1111's schedule counts from 1, its sampler from 0 and takes the first entry with step <= end."""
    (part,) = plan("[a:b:3]", steps=6).parts
    assert [part.at(step).text for step in range(7)] == ["a"] * 4 + ["b"] * 3
    (part,) = plan("[a|b]", steps=4).parts
    assert [part.at(step).text for step in range(4)] == ["a", "a", "b", "a"]


def test_negative_prompts_have_neither_and_nor_networks() -> None:
    found = plan("a AND b :2 <lora:x:1>", negative=True)
    assert not found.networks and [part.weight for part in found.parts] == [1.0]
    assert found.parts[0].variants[0].spans[0].text == "a AND b :2 <lora:x:1>"


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("a1111", "a [big:(red:1.2):3] d\\(og <lora:x:1> (tail:0.5) AND # c\nand (more) :2"),
        ("a1111", "[x|[yy:(zz):4]] \\[q BREAK w"),
        ("comfy", "a (b\\) (c:1.2) d:1.4) ((e"),
        ("compel", "a,b (cat and (dog)1.2)1.5 \\(x\\) w++ y.swap(z)"),
        ("plain", "as (it:1.2) is"),
    ],
)
def test_places(syntax: str, text: str) -> None:
    """Every character comes from the place in the source that it names; only Compel puts in spaces of its own."""
    for part in plan(text, syntax, 8).parts:
        for variant in part.variants:
            for span in (span for clause in variant.clauses for span in clause.spans):
                assert len(span.places) == len(span.text)
                for letter, place in zip(span.text, span.places, strict=True):
                    assert letter == text[place] or (letter in " \n" and syntax in ("compel", "a1111"))
    spans = plan("a (cat:1.5) x", "a1111").parts[0].variants[0].spans
    assert [(span.start, span.end, span.where(0, 1)) for span in spans] == [
        (0, 2, (0, 1)),
        (3, 6, (3, 4)),
        (11, 13, (11, 12)),
    ]


@pytest.mark.parametrize("syntax", SYNTAXES)
@settings(max_examples=200, deadline=None)
@given(text=ANY)
def test_any_text(syntax: str, text: str) -> None:
    """Nothing but the sentence is raised, and what is written reads as what was read."""
    meaning = spoken(text, syntax)
    lint(text, syntax)
    assume(meaning is not None and all(abs(weight) < float("inf") for _, weight in meaning))
    assert meaning is not None
    assert parse(write(meaning, syntax), syntax) == meaning
    try:
        found = plan(text, syntax, 5)
    except RequestError:
        return
    for part in found.parts:
        assert [variant.until for variant in part.variants] == sorted({variant.until for variant in part.variants})
        assert part.variants[-1].until == 5


@settings(max_examples=150, deadline=None)
@given(text=ANY, source=st.sampled_from(SYNTAXES), target=st.sampled_from(SYNTAXES))
def test_any_conversion_is_read_by_its_target(text: str, source: str, target: str) -> None:
    try:
        plan(text, source)
    except RequestError:
        return
    converted, lost = convert(text, source, target)
    assert all(isinstance(sentence, str) for sentence in lost)
    parse(converted, target)


HOSTILE = [
    "(",
    "[",
    "(a",
    "([a",
    "[a:",
    "[(a|",
    ")",
    "<a:",
    "\\",
    "BREAK ",
    ": ",
    "#",
    "AND ",
    "{",
    "__a",
    "/*",
    "a++ ",
    '"',
    "a.swap(",
    "x,",
    "\\(",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_work_grows_with_the_text(unit: str) -> None:
    """Four times the text executes at most five times as many lines: the parsers are linear."""

    def executed_lines(count: int) -> int:
        text, lines = unit * count + ")" * (count // 2), 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for syntax in SYNTAXES:
                spoken(text, syntax)
                with suppress(RequestError):
                    plan(text, syntax, 2)
            with suppress(RequestError):
                expand(text, 1)
        finally:
            sys.settrace(before)
        return lines

    assert executed_lines(800) <= 5 * executed_lines(200)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a (b:1.2) ", "(", "[a", "\\", "word, "])
def test_ten_megabytes(unit: str) -> None:
    for syntax in SYNTAXES:
        spoken(unit * (10_000_000 // len(unit)), syntax)


@pytest.mark.parametrize(
    ("text", "source", "target", "converted", "sentences"),
    [
        ("a ((b:1.3)) c", "a1111", "comfy", "a (b:1.43) c", 0),
        ("a (b c:1.3) d", "a1111", "compel", "a (b c)1.3 d", 0),
        ("(a b)1.3 c", "compel", "a1111", "(a b:1.3)c", 0),
        ("[a] \\(b\\)", "a1111", "comfy", "(a:0.909091) \\(b\\)", 0),
        ("[a] AND <lora:x:1>", "comfy", "a1111", "\\[a\\] A\\ND <\\lora:x:1>", 0),
        ("a BREAK b", "a1111", "compel", '("a", "b").and()', 0),
        ('("a", "b").and()', "compel", "a1111", "a BREAK b", 0),
        ("a BREAK b", "a1111", "comfy", "a, b", 1),
        ("a <lora:x:0.5>", "a1111", "compel", "a withLora(x, 0.5)", 0),
        ("a <lora:x:0.5>", "a1111", "comfy", "a", 1),
        ("[a:b:0.7] c", "a1111", "plain", "a c", 1),
        ("(a:-1) b", "a1111", "compel", "(a)0 b", 1),
        ("(a:1.2) b", "a1111", "plain", "a b", 1),
        ('("a", "b").blend(1, 2)', "compel", "comfy", "a, b", 1),
        ("a AND b :2", "a1111", "compel", '("a", "b").and(1, 2)', 1),
    ],
)
def test_convert(text: str, source: str, target: str, converted: str, sentences: int) -> None:
    result, lost = convert(text, source, target)
    assert (result, len(lost)) == (converted, sentences), lost


@pytest.mark.parametrize(
    ("syntax", "text", "start", "words"),
    [
        ("compel", "x (a:1.3)", 2, r"has no meaning in compel; did you mean `\(a\)1.3`\?"),
        ("a1111", "(a)1.3", 0, r"did you mean `\(a:1.3\)`\?"),
        ("comfy", "[a] b", 0, r"did you mean `\(a:0.91\)`\?"),
        ("comfy", "a BREAK b", 2, "a1111 syntax"),
        ("plain", "(a:1.3)", 0, "no meaning in plain"),
        ("a1111", "a (b", 2, "never closed, and closes at the end"),
        ("comfy", "a) b", 1, "closes no bracket"),
        ("a1111", "(a BREAK b)", 3, "does not end the chunk"),
        ("a1111", "a # b", 2, "hides the rest of its line"),
        ("a1111", "a :1.2", 0, "weights the whole prompt"),
        ("a1111", "[a:b:c]", 0, "not prompt editing"),
        ("compel", "a.swap(b)", 1, "has no effect"),
        ("a1111", "(a:.)", 0, "must be a number"),
        ("comfy", "(a:1e308)", 0, "at most"),
        ("comfy", "embedding:a,embedding:b", 0, "both embeddings are used, but ComfyUI loads neither"),
        ("comfy", "a lemon,embedding:b", 2, "`lemon,embedding:b` is read as words"),
    ],
)
def test_lint(syntax: str, text: str, start: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):  # pytest.raises has the matching of sentences that is wanted
        raise RequestError(next((remark.sentence for remark in lint(text, syntax) if remark.start == start), "none"))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_lint_has_nothing_to_say_of_plain_words(syntax: str) -> None:
    assert lint("a lemon, left of a whale", syntax) == []
    assert lint(r"a lemon \(left\) of a whale\[", syntax) == []


def test_choices(tmp_path: Path) -> None:
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "colour.txt").write_text("red\n\n# not this\n{orange|__fruit__}\n", encoding="utf-8")
    (tmp_path / "fruit.txt").write_text("lemon\nlime\n", encoding="utf-8")
    drawn = {expand("a __warm/colour__ {big|small|{old|new}} car", seed, tmp_path) for seed in range(200)}
    assert drawn == {
        f"a {c} {s} car" for c in ("red", "orange", "lemon", "lime") for s in ("big", "small", "old", "new")
    }
    assert expand("{a|b|c} {d|e}", 7) == expand("{a|b|c} {d|e}", 7)
    assert {expand("a {|b} c", seed) for seed in range(20)} == {"a  c", "a b c"}


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        (r"\{a\|b\}", "{a|b}"),
        ("{a}", "a"),
        ("a {b", "a b"),
        ("a } | b", "a } | b"),
        ("{a\\|b}", "a|b"),
        ("a // gone\nb /* gone */ c", "a \nb  c"),
        ("a /* not gone", "a /* not gone"),
        ("snake_case __init", "snake_case __init"),
        ("", ""),
    ],
)
def test_choices_that_leave_no_choice(text: str, drawn: str) -> None:
    assert expand(text, 0) == drawn


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("__none__", "none.txt is not in"),
        ("__empty__", "empty.txt has no choices"),
        ("__loop__", "loop.txt refers to itself"),
        ("__../secret__", "outside of"),
        ("__/etc/hostname__", "outside of"),
        ("__a\0b__", "is not in"),
        ("__binary__", "not UTF-8"),
        ("{|}", "is empty with the choices"),
        ("__double__", "too long"),
    ],
)
def test_choices_refused(tmp_path: Path, text: str, words: str) -> None:
    folder = tmp_path / "wildcards"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (folder / "empty.txt").write_text("# nothing\n\n", encoding="utf-8")
    (folder / "loop.txt").write_text("a __pool__", encoding="utf-8")
    (folder / "pool.txt").write_text("b __loop__", encoding="utf-8")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "double.txt").write_text("__d0__ __d0__", encoding="utf-8")
    (folder / "d20.txt").write_text("x", encoding="utf-8")
    for level in range(20):
        (folder / f"d{level}.txt").write_text(f"__d{level + 1}__ __d{level + 1}__", encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        expand(text, 0, folder)
    with pytest.raises(RequestError, match=r"no folder|is empty with"):
        expand(text, 0)


def test_an_unknown_dialect_is_answered_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean comfy"):
        parse("a", "comfyui")
    with pytest.raises(RequestError, match="steps"):
        plan("a", "a1111", 0)
    with pytest.raises(RequestError, match="0 or more"):
        write([("a", -1.0)], "compel")
    with pytest.raises(RequestError, match="finite"):
        write([("a", float("inf"))])


def test_no_torch() -> None:
    code = "import sys; from mezzotint import prompt; prompt.plan('a'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert prompt.parse("a BREAK b") == [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)]


def test_what_lint_suggests_is_read_as_words() -> None:
    [part] = plan("ratio 16:\\9").parts
    assert (part.weight, part.variants[0].spans[0].text) == (1.0, "ratio 16:9")
    assert [remark.sentence for remark in lint("ratio 16:9")] == [
        "the number at the end weights the whole prompt (9), although there is no AND; write `:\\9` to have it read as "
        "words"
    ]
