"""The documentation site builds without a warning, is complete, and fetches nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mezzotint.request import Request
from mezzotint.samplers.names import SPACINGS, TABLE

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(r"^\s*(?:[a-z]+:)?//", re.IGNORECASE)
FETCHED_BY_CSS = re.compile(r"""url\(\s*["']?\s*(?:https?:)?//|@import\s+["'](?:https?:)?//""", re.IGNORECASE)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetched(HTMLParser):
    """Collects the addresses that a browser fetches by itself; links that a person clicks are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.addresses += [values[name] for name in ("src", "poster", "data") if name in values]
        self.addresses += [part.split()[0] for part in values.get("srcset", "").split(",") if part.split()]
        if tag in ("link", "use", "image") and values.get("rel") != "canonical":
            self.addresses += [values[name] for name in ("href", "xlink:href") if name in values]
        if FETCHED_BY_CSS.search(values.get("style", "")):
            self.addresses.append(f"//{values['style']}")


def fetched(html: str) -> list[str]:
    parser = Fetched()
    parser.feed(html)
    return [address for address in parser.addresses if ELSEWHERE.match(address)]


def test_the_scan_finds_what_a_browser_would_fetch() -> None:
    for html in (
        '<script src="https://x/y.js"></script>',
        '<link rel="stylesheet" href="//x/y.css">',
        '<link rel="preconnect" href="https://x">',
        '<img srcset="a.png 1x, https://x/b.png 2x">',
        '<p style="background: url(https://x/y.png)">',
    ):
        assert fetched(html), html
    assert not fetched('<a href="https://x">x</a> <img src="a.png"> <img src="data:image/png;base64,//8="> ')
    assert FETCHED_BY_CSS.search("@font-face { src: url('https://x/y.woff2') }")
    assert not FETCHED_BY_CSS.search("a { background: url(data:image/svg+xml;charset=utf-8,x) }")


def test_a_page_fetches_nothing_from_other_hosts(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    assert {page.name: found for page in pages if (found := fetched(page.read_text(encoding="utf-8")))} == {}
    styles = sorted(site.rglob("*.css"))
    assert styles
    assert not [style.name for style in styles if FETCHED_BY_CSS.search(style.read_text(encoding="utf-8"))]


def test_the_tables_are_those_of_the_code(site: Path) -> None:
    fields = (site / "reference" / "request.html").read_text(encoding="utf-8")
    assert all(f"<td><code>{name}</code></td>" in fields for name in Request.model_fields)
    names = (site / "reference" / "samplers.html").read_text(encoding="utf-8")
    assert all(f"<td><code>{row.name}</code></td>" in names for row in TABLE)
    assert all(f"<code>{name}</code>" in names for name in SPACINGS)
    commands = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert "Usage: mezzotint generate [OPTIONS] [PROMPT]" in commands and "default: 1]" in commands


def test_the_public_names_are_documented(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in ("pipeline.load", "pipeline.Pipeline", "request.Request", "result.Result", "result.Result.save"):
        assert f'id="mezzotint.{name}"' in page
    assert 'id="mezzotint.errors.BudgetError"' in page and "TODO" not in page


def test_nothing_is_left_of_the_marks(site: Path) -> None:
    assert not [page for page in site.rglob("*.html") if "<!-- table:" in page.read_text(encoding="utf-8")]
