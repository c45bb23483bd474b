"""The page in a headless Chromium: the login, the keyboard, text that stays text, and what axe finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from browser import DROP, Page, serving

pytestmark = pytest.mark.browser


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[str]:
    """The URL of a server that wants a token."""
    file = tmp_path / "token"
    file.write_text("open-sesame-0123456789\n")
    file.chmod(0o600)
    with serving(tmp_path / "data", "--token-file", str(file)) as url:
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_login_form_exchanges_the_token_for_a_cookie(driver: webdriver.Chrome, locked: str, scheme: str) -> None:
    page = Page(driver, locked)
    driver.delete_all_cookies()
    page.emulate(390, 844, scheme)
    try:
        driver.get(locked)
        page.wait(lambda: page.all("#token"))
        page.check_axe()
        page.press(Keys.ESCAPE)  # it comes again: nothing works without the token
        page.write("#token", "wrong")
        page.one("#token").send_keys(Keys.ENTER)
        page.wait(lambda: page.text(".login .warning") == "This is not the token.")
        page.check_axe()
        page.write("#token", "open-sesame-0123456789")
        page.one("#token").send_keys(Keys.ENTER)
        page.wait(lambda: page.script("return document.documentElement.dataset.ready") == "true")
        assert page.script("return document.cookie") == ""
        page.draw("a lemon", steps=1)
        page.wait(lambda: page.script("return document.querySelector('.still img')?.naturalWidth") == 128)
        page.open()  # the cookie stays
        page.wait(lambda: page.all(".gallery .tile"))
        assert not page.all("dialog")
    finally:
        page.emulate()


def test_keys_reach_search_prompt_help_and_the_brush(page: Page) -> None:
    page.draw("a moth on a white background", steps=4)
    picture = page.finished("a moth on a white background")
    focused = "return document.activeElement.id"
    page.press("/")
    assert page.script(focused) == "search"
    page.press("p")
    assert page.script(focused) == "prompt"
    page.press("?")
    page.wait(lambda: "Ctrl" in page.text("dialog .keys"))
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog"))
    page.press(Keys.DELETE)
    page.wait(lambda: not page.all(f".gallery [data-picture='{picture['id']}']"))
    page.click(".toast .link")
    page.wait(lambda: page.all(f".gallery [data-picture='{picture['id']}']"))
    page.press("s")
    page.wait(lambda: page.value("#seed") == str(picture["seed"]))
    page.press("i")
    size = page.wait(lambda: page.text(".tool-size"))
    page.one("#canvas").send_keys("[")
    page.wait(lambda: page.text(".tool-size") != size)
    page.one("#canvas").send_keys("]")
    page.wait(lambda: page.text(".tool-size") == size)
    page.one("#canvas").send_keys("e")
    assert page.one("#tool-eraser").get_attribute("aria-pressed") == "true"
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog"))


def test_markup_stays_text_everywhere(page: Page) -> None:
    prompt = "<img src=x onerror=document.title='hit'> <script>alert(1)</script>"
    page.api("POST", "/api/queue/pause")
    page.draw(prompt, steps=1)
    page.wait(lambda: prompt in page.texts(".jobs .job-prompt"))
    page.api("POST", "/api/queue/resume")
    picture = page.finished(prompt)
    page.one("#add-tag").send_keys(prompt, Keys.ENTER)
    page.wait(lambda: page.text(".still .tag-name") == prompt)
    page.wait(lambda: page.text(".still .caption") == prompt)
    page.press(Keys.ENTER)
    page.wait(lambda: page.text(".viewer-caption").startswith(prompt))
    page.press(Keys.ESCAPE)
    page.script(DROP, page.file(picture))
    page.wait(lambda: page.text(".info-prompt") == prompt)
    page.press(Keys.ESCAPE)
    page.click("#open-grid")
    page.wait(lambda: prompt in page.text(".grid-base"))
    page.press(Keys.ESCAPE)
    page.click("#maps")
    page.wait(lambda: page.all(".map-word"))
    assert not page.all("img[src=x], script:not([src])")
    assert "hit" not in page.driver.title


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 1600])
def test_axe_finds_nothing_on_the_main_screen(page: Page, scheme: str, width: int) -> None:
    page.emulate(width, 900, scheme)
    try:
        page.draw(f"a lemon at {width} in {scheme}", steps=1)
        page.finished(f"a lemon at {width} in {scheme}")
        page.api("POST", "/api/queue/pause")
        page.draw("a (red:1.3) cat and a [blue:cyan:0.5] quokkaish dog")
        page.wait(lambda: page.all(".jobs .job") and page.all(".word"))
        assert page.script("return document.documentElement.scrollWidth") <= width
        page.check_axe()
    finally:
        page.emulate()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_dialogs(page: Page, scheme: str) -> None:
    page.draw("a lemon on a blue background", steps=2)
    picture = page.finished("a lemon on a blue background")
    page.draw("a pear on a blue background", steps=2)
    page.finished("a pear on a blue background")

    def compare() -> None:
        page.click("#plate button")
        page.click("#compare-next")

    def canvas() -> None:
        page.click("#inpaint")
        page.click("#tool-clear")  # no tool is under another one

    dialogs: dict[str, Callable[[], object]] = {
        ".keys": lambda: page.click("#open-help"),
        ".picker": lambda: page.click("#pick-loras"),
        ".grid-page": lambda: page.click("#open-grid"),
        ".viewer-image": lambda: page.click("#plate button"),
        "#compare": compare,
        ".map-word": lambda: page.click("#maps"),
        "#canvas": canvas,
        "#info-settings": lambda: page.script(DROP, page.file(picture)),
    }
    page.emulate(390, 844, scheme)
    try:
        for mark, show in dialogs.items():
            show()
            page.wait(lambda mark=mark: page.all(mark))
            widths = "return [...document.querySelectorAll('html, dialog')].map((one) => one.scrollWidth)"
            assert max(page.script(widths)) <= 390, mark
            page.check_axe()
            page.script("for (const one of document.querySelectorAll('dialog')) one.close()")
            page.wait(lambda: not page.all("dialog"))
    finally:
        page.emulate()
