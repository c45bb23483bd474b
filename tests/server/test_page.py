"""The page in a headless Chromium, over the bundled model: what a person does in the first five minutes.

Run by `make test-page`, which needs Debian's chromium and chromium-driver, and npm for axe-core.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementNotInteractableException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.browser
AXE = Path(__file__).parents[2] / "build" / "axe" / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
PATIENCE = 90  # seconds until a condition counts as never met
LONG = 150  # steps of a picture that is still drawn when the test has looked at it
WORKING = (StaleElementReferenceException, ElementNotInteractableException)  # while the page changes
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (one) => one.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], "a.png", {type: "image/png"}));
for (const name of ["dragover", "drop"])
  document.body.dispatchEvent(new DragEvent(name, {bubbles: true, cancelable: true, dataTransfer: data}));
"""


class Page:
    """The page of a server in a browser."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> None:
        self.driver.get(self.url)
        self.wait(lambda: self.script("return document.documentElement.dataset.ready") == "true")

    def api(self, method: str, path: str) -> Any:
        data, headers = (b"{}" if method == "POST" else None), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read() or b"null")

    def clear(self) -> None:
        """Cancel all jobs."""
        self.api("POST", "/api/queue/resume")
        for state in ("queued", "running"):
            for job in self.api("GET", f"/api/jobs?state={state}")["jobs"]:
                self.api("DELETE", f"/api/jobs/{job['id']}")
        self.wait(lambda: not self.api("GET", "/api/queue")["running"])

    def wait(self, condition: Callable[[], Any]) -> Any:
        waiter = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05, ignored_exceptions=WORKING)
        return waiter.until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        found: WebElement = self.wait(lambda: next((one for one in self.all(selector) if one.is_displayed()), None))
        return found

    def text(self, selector: str) -> str:
        found: str = self.script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
        return found

    def texts(self, selector: str) -> list[str]:
        listing = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
        found: list[str] = self.script(listing, selector)
        return found

    def value(self, selector: str) -> str:
        found: str = self.script("return document.querySelector(arguments[0]).value", selector)
        return found

    def click(self, selector: str) -> None:
        self.wait(lambda: self.one(selector).click() or True)

    def press(self, *keys: str) -> None:
        """Press keys while no input has the focus."""
        self.script("document.activeElement.blur()")
        ActionChains(self.driver).send_keys(*keys).perform()

    def write(self, selector: str, text: str) -> None:
        box = self.one(selector)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)

    def script(self, text: str, *values: Any) -> Any:
        return self.driver.execute_script(text, *values)

    def form(self) -> dict[str, Any]:
        """Return the request of the form, as it is kept for a reload."""
        text = self.script("dispatchEvent(new Event('pagehide')); return localStorage.getItem('mezzotint.form')")
        found: dict[str, Any] = json.loads(text)["request"]
        return found

    def pictures(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api("GET", "/api/pictures?limit=50")["pictures"]
        return found

    def draw(self, prompt: str, **settings: object) -> None:
        self.write("#prompt", prompt)
        for name, value in settings.items():
            self.write(f"#{name}", str(value))
        self.click("#draw")

    def finished(self, prompt: str) -> dict[str, Any]:
        """Wait until the newest picture has the prompt, and the gallery shows it; return it."""

        def look() -> dict[str, Any] | None:
            return next((one for one in self.pictures()[:1] if one["prompt"] == prompt), None)

        picture: dict[str, Any] = self.wait(look)
        self.wait(lambda: self.all(f".gallery [data-picture='{picture['id']}']"))
        self.wait(lambda: self.all(f".still[data-picture='{picture['id']}']"))
        return picture

    def check_axe(self) -> None:
        """Check that axe finds nothing on what the page shows now."""
        self.script(AXE.read_text())
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {runOnly: arguments[0]}).then((found) => done(found.violations));",
            RULES,
        )
        lines = [f"{one['id']}: {one['help']}: {node['html'][:200]}" for one in found for node in one["nodes"]]
        assert not lines, "\n".join(lines)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data = tmp_path_factory.mktemp("server") / "data"
    command = [sys.executable, "-m", "mezzotint", "serve", "--data", str(data), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, line
            yield found[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    chromedriver = shutil.which("chromedriver")
    if chromedriver is None:
        pytest.skip("chromedriver is not installed (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1400,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, url: str) -> Iterator[Page]:
    """The page with an empty form. Afterwards: no errors in the console, no request to another host."""
    page = Page(driver, url)
    page.clear()
    driver.get("about:blank")  # so that the page of the test before does not keep its form once more
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": url.rstrip("/"), "storageTypes": "local_storage"})
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    page.open()
    yield page
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors, "\n".join(errors)
    sent = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    asked = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}
    assert asked
    assert not [each for each in asked if not each.startswith((url, "data:", f"blob:{url}"))]


def test_draws_with_a_preview_and_the_time_left(page: Page) -> None:
    page.draw("a lemon on a blue background", steps=60)
    page.wait(lambda: page.all(".live .preview[src^='data:image/jpeg']"))
    page.wait(lambda: re.search(r"\d+ of 60 · .* left", page.text(".live .progress-text")))
    picture = page.finished("a lemon on a blue background")
    page.wait(lambda: page.script("return document.querySelector('.still img').naturalWidth") == picture["width"])


def test_ctrl_enter_draws_and_esc_cancels(page: Page) -> None:
    page.write("#steps", str(LONG))
    page.write("#prompt", "a slow whale")
    page.one("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.one(".live")
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.all(".live"))
    assert page.api("GET", "/api/jobs?state=cancelled&limit=1")["jobs"][0]["request"]["prompt"] == "a slow whale"


def test_the_queue_is_reordered_and_kept_over_a_reload(page: Page) -> None:
    def waiting() -> list[str]:
        return page.texts(".jobs .job-prompt")

    page.api("POST", "/api/queue/pause")
    for count, prompt in enumerate(("one", "two", "three"), 1):
        page.draw(prompt)
        page.wait(lambda count=count: len(waiting()) == count)
    page.click(".jobs .job:nth-child(3) .up")
    page.wait(lambda: waiting() == ["one", "three", "two"])
    page.open()
    page.wait(lambda: waiting() == ["one", "three", "two"])
    assert page.value("#prompt") == "three"  # the form is kept too
    jobs = {job["id"]: job["request"]["prompt"] for job in page.api("GET", "/api/jobs?state=queued")["jobs"]}
    assert [jobs[id] for id in page.api("GET", "/api/queue")["order"]] == ["one", "three", "two"]
    ActionChains(page.driver).drag_and_drop(*(page.one(f".jobs .job:nth-child({place})") for place in (3, 1))).perform()
    page.wait(lambda: waiting() != ["one", "three", "two"])
    page.click(".jobs .job:nth-child(2) .cancel")
    page.wait(lambda: len(waiting()) == 2)


def test_reloads_in_the_middle_and_a_second_tab_follows(page: Page) -> None:
    page.draw("a fox on a pink background", steps=LONG)
    page.wait(lambda: page.all(".live .preview[src^='data:image/jpeg']"))
    page.open()
    page.wait(lambda: f"of {LONG}" in page.text(".live .progress-text"))
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open()
    page.wait(lambda: f"of {LONG}" in page.text(".live .progress-text"))
    held = "return navigator.locks.query().then((found) => [found.held.length, found.pending.length])"
    assert page.script(held) == [1, 1]  # one connection for the two tabs
    page.finished("a fox on a pink background")
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait(lambda: page.script(held) == [1, 0])


def stroke(page: Page, *, x: int = -60, y: int = -40, by: tuple[int, int] = (90, 60)) -> None:
    """Draw a line on the canvas, from a place that is given from its centre."""
    canvas = page.one("#canvas")
    ActionChains(page.driver).move_to_element_with_offset(canvas, x, y).click_and_hold().move_by_offset(
        *by
    ).move_by_offset(10, 0).release().perform()


def test_inpaints_with_the_brush(page: Page) -> None:
    page.draw("a lemon on a green background", steps=5)
    page.finished("a lemon on a green background")
    page.click("#inpaint")
    size = page.wait(lambda: page.text(".tool-size"))
    page.one("#canvas").send_keys("]")
    page.wait(lambda: page.text(".tool-size") != size)
    stroke(page)
    for tool in ("undo", "invert", "clear", "eraser", "brush"):
        page.click(f"#tool-{tool}")
    stroke(page)
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
    stroke(page, x=reach, y=0, by=(80, 0))
    wide = page.wait(lambda: int(page.value("#side-right")))
    assert wide % 8 == 0
    page.click("#canvas-keep")
    page.wait(lambda: not page.all("dialog"))
    form = page.form()
    assert form["outpaint"] == [0, 0, wide, 0]
    assert (form["width"], form["height"]) == (128 + wide, 128)


def test_a_dropped_picture_gives_its_settings(page: Page, tmp_path: Path) -> None:
    page.draw("a penguin on a grey background", steps=7)
    picture = page.finished("a penguin on a grey background")
    with urllib.request.urlopen(f"{page.url}api/pictures/{picture['id']}/file") as reply:
        data = base64.b64encode(reply.read()).decode()
    page.write("#prompt", "something else")
    page.script(DROP, data)
    page.wait(lambda: page.text(".info-prompt") == "a penguin on a grey background")
    page.check_axe()
    page.click("#info-settings")
    page.wait(lambda: page.value("#prompt") == "a penguin on a grey background")
    assert page.value("#steps") == "7"
    assert page.value("#seed") == str(picture["seed"])
    page.click("#draw")  # the same settings give the same bits
    again = page.wait(lambda: next((one for one in page.pictures()[:1] if one["id"] != picture["id"]), None))
    assert again["sha256"] == picture["sha256"]


def test_deletes_with_undo_rates_and_searches(page: Page) -> None:
    page.draw("a tulip on a yellow background", steps=2)
    picture = page.finished("a tulip on a yellow background")
    tile = f".gallery [data-picture='{picture['id']}']"
    page.click(tile)
    page.press("4")
    page.wait(lambda: page.api("GET", f"/api/pictures/{picture['id']}")["rating"] == 4)
    page.click("#delete")
    page.wait(lambda: not page.all(tile))
    page.click(".toast .link")
    page.wait(lambda: page.all(tile))
    page.one("#search").send_keys("tulip yel")
    page.wait(lambda: len(page.all(".gallery .tile")) == 1)
    page.one("#search").send_keys("x")
    page.wait(lambda: not page.all(".gallery .tile"))


def test_verifies_and_shows_word_maps(page: Page) -> None:
    page.draw("a crab on a teal background", steps=3)
    picture = page.finished("a crab on a teal background")
    page.click("#badge")
    page.wait(lambda: page.text("#badge") == "Verified")
    assert page.api("GET", f"/api/pictures/{picture['id']}")["verified"]["identical"]
    page.click("#maps")
    page.wait(lambda: page.texts(".map-word")[:2] == ["a", "crab"])
    page.click(".map-word:nth-child(2)")
    shaded = "return document.querySelector('.map-canvas').getContext('2d').getImageData(0, 0, 384, 384).data[3]"
    page.wait(lambda: page.script(shaded))
    page.check_axe()


def test_tokens_lint_and_memory_stand_in_the_form(page: Page) -> None:
    page.write("#prompt", "a (red:1.3) apple")
    page.wait(lambda: page.texts(".word") == ["a", "red1.3", "apple"])
    page.write("#prompt", "a red++ apple")
    page.wait(lambda: "has no meaning in a1111" in page.text(".lint"))
    page.wait(lambda: re.search(r"\d (MB|MiB|GiB|GB)", page.text("#plan")))


def test_compares_two_and_walks_with_arrows(page: Page) -> None:
    for prompt in ("a bee on a white background", "an owl on a white background"):
        page.draw(prompt, steps=2)
        page.finished(prompt)
    first, second = page.all(".gallery .tile")[:2]
    first.click()
    ActionChains(page.driver).key_down(Keys.SHIFT).click(second).key_up(Keys.SHIFT).perform()
    page.wait(lambda: page.all("#compare"))
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


def test_draws_a_grid(page: Page) -> None:
    page.draw("a mushroom on grass", steps=2)
    page.finished("a mushroom on grass")
    page.click("#open-grid")
    page.write("#grid-x-values", "1, 4")
    page.write("#grid-y-values", "2, 3")
    page.check_axe()
    page.click("#grid-draw")
    page.wait(lambda: len(page.all(".grid-table .tile")) == 4)


def test_markup_in_a_prompt_stays_text(page: Page) -> None:
    prompt = "<img src=x onerror=document.title='hit'> <script>alert(1)</script>"
    page.api("POST", "/api/queue/pause")
    page.draw(prompt)
    page.wait(lambda: prompt in page.texts(".jobs .job-prompt"))
    assert not page.all("img[src=x], script:not([src])")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 1600])
def test_axe_finds_nothing(page: Page, scheme: str, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page.api("POST", "/api/queue/pause")
        page.draw("a (red:1.3) cat and a [blue:0.5] quokkaish dog")
        page.wait(lambda: page.all(".jobs .job") and page.all(".word"))
        assert page.script("return document.documentElement.scrollWidth") <= width
        page.check_axe()
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
