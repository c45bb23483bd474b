"""Take the screenshots of docs/images again, with the bundled model: `make screenshots`."""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.keys import Keys

import mezzotint
from browser import Page, serving, start_browser

OUTLINE = Path(mezzotint.__file__).parent / "data" / "emoji-outline"  # a ControlNet for the bundled model
IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZES = ((390, 844), (1024, 768), (1600, 900))
COLOURS = 255  # of the palette; a third of the size of a file of all colours
PROMPTS = (
    "a lemon on a blue background",
    "a fox on a pink background",
    "a whale on a teal background",
    "a strawberry on grass",
    "an owl on a purple background",
    "a red apple on a white background",
    "a mushroom on a green background",
    "a bee on a yellow background",
    "a tulip on a grey background",
    "a crab on a blue background",
    "a cherry on a pink background",
    "a penguin on a yellow background",
)
SETTLED = 0.8  # seconds until images and transitions are at rest


def save(page: Page, name: str) -> None:
    """Write what the window shows as a PNG file of few colours."""
    time.sleep(SETTLED)
    data = base64.b64decode(page.driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    image = Image.open(io.BytesIO(data)).convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT)
    image.save(IMAGES / f"{name}.png", optimize=True)


def fill(page: Page) -> None:
    """Draw the gallery, rate and tag some pictures, verify the last one, and leave something in the queue."""
    for number, prompt in enumerate(PROMPTS):
        page.draw(prompt, seed=number + 7)
        picture = page.finished(prompt)
        if number % 4 == 3:
            page.script("document.querySelectorAll('.stars button')[arguments[0]].click()", 4 - number % 3)
            page.wait(lambda id=picture["id"]: page.api("GET", f"/api/pictures/{id}")["rating"])
    page.click("#badge")
    page.wait(lambda: page.text("#badge").startswith("Verified"))
    page.one("#add-tag").send_keys("birds", Keys.ENTER)
    page.wait(lambda: page.texts(".still .tag-name"))
    page.script("document.activeElement.blur()")


def queue(page: Page) -> None:
    """Queue a long job and two more, and show the newest finished picture meanwhile."""
    page.clear()
    page.click("#seed-lock")
    for prompt, steps in (
        ("a (red:1.3) cat on a [blue:green:0.5] background", 150),
        ("an owl in a tree", 30),
        ("a snail", 30),
    ):
        page.draw(prompt, steps=steps)
    page.write("#prompt", "a (red:1.3) cat on a [blue:green:0.5] background")
    page.wait(lambda: page.all(".now img[src]") and page.all(".variant"))
    page.click(".gallery .tile")


@contextmanager
def looking(page: Page, width: int, height: int, scheme: str) -> Iterator[None]:
    """Look at the page in a window of a size while the block runs."""
    page.emulate(width, height, scheme)
    try:
        yield
    finally:
        page.emulate()


def open_canvas(page: Page) -> None:
    page.click("#inpaint")
    page.one("#canvas")
    time.sleep(SETTLED)
    page.stroke(x=-60, y=60, by=(150, 30))
    page.write("#canvas-prompt", "a penguin with a red scarf on a yellow background")


def open_maps(page: Page) -> None:
    page.click("#maps")
    page.click(".map-word:nth-child(2)")


def open_compare(page: Page) -> None:
    page.click("#plate button")
    page.click("#compare-next")


DIALOGS: dict[str, tuple[str, Callable[[Page], None]]] = {
    "page-inpaint": ("light", open_canvas),
    "page-maps": ("dark", open_maps),
    "page-compare": ("light", open_compare),
}


def controls(folder: Path) -> tuple[str, str]:
    """Make a folder of ControlNets; return the options that name it."""
    shutil.copytree(OUTLINE, folder / "controls" / OUTLINE.name)
    return "--controls", str(folder / "controls")


def main() -> None:
    driver = start_browser()
    try:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "data", *controls(Path(folder))) as url:
            page = Page(driver, url)
            page.open()
            with looking(page, 1600, 900, "light"):
                fill(page)
            for width, height in SIZES:
                for scheme in ("light", "dark"):
                    with looking(page, 1600, 900, scheme):
                        queue(page)
                        page.emulate(width, height, scheme)
                        save(page, f"page-{width}-{scheme}")
            page.clear()
            for name, (scheme, show) in DIALOGS.items():
                with looking(page, 1280, 800, scheme):
                    page.open()
                    show(page)
                    save(page, name)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
