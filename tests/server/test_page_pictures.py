"""The page in a headless Chromium: what is done with a picture."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from browser import DROP, PASTE, Page, serving

ChangeRow = Callable[..., None]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the server."""
    return tmp_path_factory.mktemp("server") / "data"


@pytest.fixture(scope="module")
def url(data: Path) -> Iterator[str]:
    """The URL of a server with the bundled model."""
    with serving(data) as found:
        yield found


@pytest.fixture
def change_row(data: Path) -> ChangeRow:
    """Return a function that writes columns of a picture's row, as a run would have that cannot be had here."""

    def change(picture: dict[str, Any], **columns: object) -> None:
        with sqlite3.connect(data / "mezzotint.db") as db:
            for name, value in columns.items():
                db.execute(f"UPDATE pictures SET {name} = ? WHERE id = ?", (value, picture["id"]))
        db.close()

    return change


def test_inpaints_with_the_brush(page: Page) -> None:
    page.draw("a lemon on a green background", steps=5)
    page.finished("a lemon on a green background")
    page.click("#inpaint")
    size = page.wait(lambda: page.text(".tool-size"))
    page.one("#canvas").send_keys("]")
    page.wait(lambda: page.text(".tool-size") != size)
    page.stroke()
    for tool in ("undo", "invert", "clear", "eraser", "brush"):
        page.click(f"#tool-{tool}")
    page.stroke()
    page.write("#canvas-prompt", "a strawberry on a green background")
    page.check_axe()
    page.click("#canvas-draw")
    picture = page.finished("a strawberry on a green background")
    request = page.api("GET", f"/api/jobs/{picture['job']}")["request"]
    assert request["image"] != request["mask"]
    assert page.form()["mask"] == request["mask"]


def test_outpaints_by_dragging_a_side(page: Page) -> None:
    page.draw("a lemon on a red background", steps=5)
    page.finished("a lemon on a red background")
    page.click("#inpaint")
    size = page.one("#canvas").size
    reach = min(size["width"], size["height"]) // 2 - 36  # the square picture ends so far from the centre
    page.stroke(x=reach, y=0, by=(80, 0))
    wide = page.wait(lambda: int(page.value("#side-right")))
    assert wide % 8 == 0
    page.click("#canvas-keep")
    page.wait(lambda: not page.all("dialog"))
    form = page.form()
    assert form["outpaint"] == [0, 0, wide, 0]
    assert (form["width"], form["height"]) == (128 + wide, 128)
    page.click("#source-inpaint")
    page.stroke()
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog"))
    assert "mask" not in page.form()
    page.click(".toast .link")  # closed by mistake
    page.wait(lambda: page.form().get("mask"))


def test_a_dropped_picture_gives_its_settings(page: Page, tmp_path: Path) -> None:
    page.draw("a penguin on a grey background", steps=7)
    picture = page.finished("a penguin on a grey background")
    page.write("#prompt", "something else")
    page.script(DROP, page.file(picture))
    page.wait(lambda: page.text(".info-prompt") == "a penguin on a grey background")
    page.check_axe()
    page.click("#info-settings")
    page.wait(lambda: page.value("#prompt") == "a penguin on a grey background")
    assert page.value("#steps") == "7"
    assert page.value("#seed") == str(picture["seed"])
    page.click("#draw")  # the same settings give the same bits
    again = page.wait(lambda: next((one for one in page.pictures()[:1] if one["id"] != picture["id"]), None))
    assert again["sha256"] == picture["sha256"]


def test_a_pasted_picture_is_the_start_of_the_next(page: Page) -> None:
    page.draw("a frog on a white background", steps=3)
    first = page.finished("a frog on a white background")
    page.script(PASTE, page.file(first))
    page.wait(lambda: page.text(".info-prompt") == "a frog on a white background")
    page.click("#info-image")
    page.wait(lambda: page.form().get("image"))
    page.write("#prompt", "a green apple on a white background")
    page.click("#draw")
    second = page.finished("a green apple on a white background")
    request = page.job(second)["request"]
    assert request["strength"] == 0.6
    assert request["image"] == page.form()["image"]
    page.click("#source-remove")
    page.wait(lambda: "image" not in page.form())


def test_hires_variations_and_another_seed_are_one_click(page: Page) -> None:
    page.draw("a cherry on a grey background", steps=2)
    first = page.finished("a cherry on a grey background")
    page.click("#hires")
    large = page.wait(lambda: next((one for one in page.pictures() if one["width"] == 2 * first["width"]), None))
    assert (large["height"], large["seed"]) == (2 * first["height"], first["seed"])
    request = page.job(large)["request"]
    assert (request["hires"], request["hires_upscale"], request["hires_strength"]) == (2, "pixels", 0.1)
    page.click(f".gallery [data-picture='{large['id']}']")
    page.click("#hires")  # which has had its second pass: a run from the picture
    larger = page.wait(lambda: next((one for one in page.pictures() if one["width"] == 4 * first["width"]), None))
    request = page.job(larger)["request"]
    assert ("hires" in request, request["strength"]) == (False, 0.1)
    page.click(f".gallery [data-picture='{first['id']}']")
    before = len(page.pictures())
    page.click("#variations")
    page.wait(lambda: len(page.pictures()) == before + 4)
    found = page.pictures()[:4]
    strengths = {page.job(one)["request"]["variation_strength"] for one in found}
    assert len(strengths) == 1 and 0 < strengths.pop() < 1
    assert len({one["sha256"] for one in found}) == 4
    page.click(f".gallery [data-picture='{first['id']}']")
    page.click("#another")
    page.wait(lambda: len(page.pictures()) == before + 5)
    assert page.pictures()[0]["seed"] != first["seed"]


def test_deletes_with_undo_rates_and_searches(page: Page) -> None:
    page.draw("a tulip on a yellow background", steps=2)
    picture = page.finished("a tulip on a yellow background")
    tile = f".gallery [data-picture='{picture['id']}']"
    page.click(tile)
    page.press("4")
    page.wait(lambda: page.api("GET", f"/api/pictures/{picture['id']}")["rating"] == 4)
    page.press("0")
    page.wait(lambda: page.api("GET", f"/api/pictures/{picture['id']}")["rating"] == 0)
    page.click("#delete")
    page.wait(lambda: not page.all(tile))
    page.click(".toast .link")
    page.wait(lambda: page.all(tile))
    page.one("#search").send_keys("tulip yel")
    page.wait(lambda: len(page.all(".gallery .tile")) == 1)
    page.one("#search").send_keys("x")
    page.wait(lambda: not page.all(".gallery .tile"))
    page.draw("a plum on a yellow background", steps=2)  # which the search does not find, but somebody waits for
    page.wait(lambda: page.text(".still .caption") == "a plum on a yellow background")
    assert not page.all(".gallery .tile")


def test_tags_are_added_filter_the_gallery_and_go(page: Page) -> None:
    for prompt in ("a pear on a white background", "a plum on a white background"):
        page.draw(prompt, steps=1)
        picture = page.finished(prompt)
    page.one("#add-tag").send_keys("stone fruit", Keys.ENTER)
    page.wait(lambda: page.texts(".still .tag-name") == ["stone fruit"])
    assert page.api("GET", f"/api/pictures/{picture['id']}")["tags"] == ["stone fruit"]
    page.one("#add-tag").send_keys("<b>ripe</b>", Keys.ENTER)  # typed on: the input keeps the focus
    page.wait(lambda: page.texts(".still .tag-name") == ["stone fruit", "<b>ripe</b>"])
    page.click(".still .tag-name")
    page.wait(lambda: len(page.all(".gallery .tile")) == 1)
    page.check_axe()
    page.click("#all-tags")
    page.wait(lambda: len(page.all(".gallery .tile")) > 1)
    page.click(f".gallery [data-picture='{picture['id']}']")
    page.click(".still .tag .icon-button")
    page.wait(lambda: page.api("GET", f"/api/pictures/{picture['id']}")["tags"] == ["<b>ripe</b>"])


def test_the_badge_says_what_is_known(page: Page, change_row: ChangeRow) -> None:
    page.draw("a snail on a white background", steps=3)
    picture = page.finished("a snail on a white background")
    assert page.text("#badge") == "Verify"
    page.api("POST", "/api/queue/pause")
    page.press("v")
    page.wait(lambda: page.text("#badge") == "Waits to be verified")
    assert not page.one("#badge").is_enabled()
    page.api("POST", "/api/queue/resume")
    page.wait(lambda: page.text("#badge") == "Verified: same bits")
    page.wait(lambda: page.all(f".gallery [data-picture='{picture['id']}'] .mark-verified"))
    sentence = "12 of 49,152 values differ, the largest by 1"
    change_row(picture, verified=json.dumps({"identical": False, "sentences": [sentence]}))
    page.open()
    page.wait(lambda: page.text("#badge") == "Differs")
    assert page.text(".differs") == sentence
    page.check_axe()


def test_a_flagged_picture_is_blurred_until_a_click(page: Page, change_row: ChangeRow) -> None:
    page.draw("a rose on a white background", steps=1)
    picture = page.finished("a rose on a white background")
    change_row(picture, flagged=1)
    page.open()
    blurred = "return document.querySelectorAll('img.veiled').length"
    page.wait(lambda: page.script(blurred) == 2)  # on the stage and in the gallery
    page.check_axe()
    page.press(Keys.ENTER)
    page.wait(lambda: page.all(".viewer-image.veiled"))
    page.check_axe()
    page.click(".viewer-cover #reveal")
    page.wait(lambda: page.script(blurred) == 0)
    assert page.all(".viewer-image") and not page.all("#reveal")
    page.open()
    page.wait(lambda: page.script(blurred) == 2)
    page.click("#reveal")
    page.wait(lambda: page.script(blurred) == 0)
    assert "flagged by the safety checker" in page.texts(".still .facts span")


def test_word_maps_lie_over_the_picture(page: Page) -> None:
    page.draw("a crab on a teal background", steps=3)
    page.finished("a crab on a teal background")
    page.click("#maps")
    page.wait(lambda: page.texts(".map-word")[:2] == ["a", "crab"])
    shaded = (
        "const context = document.querySelector('.map-canvas').getContext('2d', {willReadFrequently: true});"
        "return context.getImageData(0, 0, 384, 384).data.some(Boolean)"
    )
    assert not page.script(shaded)
    ActionChains(page.driver).move_to_element(page.one(".map-word:nth-child(2)")).perform()
    page.wait(lambda: page.script(shaded))
    ActionChains(page.driver).move_to_element(page.one(".viewer-plate")).perform()
    page.wait(lambda: not page.script(shaded))
    page.click(".map-word:nth-child(2)")  # a click keeps it
    ActionChains(page.driver).move_to_element(page.one(".viewer-plate")).perform()
    page.wait(lambda: page.script(shaded))


def test_compares_two_and_walks_with_arrows(page: Page) -> None:
    for prompt in ("a bee on a white background", "an owl on a white background"):
        page.draw(prompt, steps=2, seed=5)
        page.finished(prompt)
    first, second = page.all(".gallery .tile")[:2]
    first.click()
    ActionChains(page.driver).key_down(Keys.SHIFT).click(second).key_up(Keys.SHIFT).perform()
    page.wait(lambda: page.all("#compare"))
    differences = ["an owl on a white background", "a bee on a white background"]  # the seed and the steps are the same
    page.wait(lambda: page.texts(".viewer-caption") == differences)
    page.check_axe()
    clip = "return document.querySelectorAll('.compare-image')[1].style.clipPath"
    before = page.script(clip)
    ActionChains(page.driver).send_keys(Keys.HOME).perform()
    page.wait(lambda: page.script(clip) != before)
    ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    page.wait(lambda: not page.all("dialog"))
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: page.all(".gallery li:nth-child(2) .selected"))
    page.press(Keys.ENTER)
    page.wait(lambda: page.all(".viewer-image"))
    page.check_axe()
    last = page.pictures()[1]
    ActionChains(page.driver).send_keys(Keys.DELETE).perform()
    page.wait(lambda: last["id"] not in [one["id"] for one in page.pictures()])
    assert page.all(".viewer-image")  # of the picture that took its place
    page.click("dialog .toast .link")
    page.wait(lambda: last["id"] in [one["id"] for one in page.pictures()])
    page.press(Keys.ESCAPE)
    page.press("l")  # the newest is shown, so that the first arrow leads to the second
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: page.all(".gallery li:nth-child(2) .selected"))


def test_a_tall_window_shows_more_than_one_page_of_the_gallery(page: Page) -> None:
    page.draw("a plum", steps=1, width=64, height=64, count=70)
    page.wait(lambda: len(page.api("GET", "/api/pictures?limit=200")["pictures"]) >= 70)
    page.emulate(1600, 6000)
    try:
        page.open()
        page.wait(lambda: len(page.all(".gallery .tile")) >= 70)
    finally:
        page.emulate()
