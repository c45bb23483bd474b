"""The page of a server in a headless Chromium: what a person can do there, in a few words."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

AXE = Path(__file__).parents[2] / "build" / "axe" / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
PATIENCE = 40  # seconds until a condition counts as never met
THROTTLE = float(os.environ.get("MEZZOTINT_PAGE_THROTTLE", "1"))  # how many times slower the page is made
LONG = 150  # steps of a picture that is still drawn when the test has looked at it
WORKING = (StaleElementReferenceException, ElementNotInteractableException)  # while the page changes
GIVE = """
const bytes = Uint8Array.from(atob(arguments[0]), (one) => one.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], "a.png", {type: "image/png"}));
"""
DROP = f"""{GIVE}
for (const name of ["dragover", "drop"])
  document.body.dispatchEvent(new DragEvent(name, {{bubbles: true, cancelable: true, dataTransfer: data}}));
"""
PASTE = f"""{GIVE}
document.body.dispatchEvent(new ClipboardEvent("paste", {{bubbles: true, cancelable: true, clipboardData: data}}));
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
        text = self.script("dispatchEvent(new Event('pagehide')); return sessionStorage.getItem('mezzotint.form')")
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

    def file(self, picture: dict[str, Any]) -> str:
        """Return a picture's file in base64."""
        with urllib.request.urlopen(f"{self.url}api/pictures/{picture['id']}/file") as reply:
            return base64.b64encode(reply.read()).decode()

    def job(self, picture: dict[str, Any]) -> dict[str, Any]:
        """Return the job of a picture."""
        found: dict[str, Any] = self.api("GET", f"/api/jobs/{picture['job']}")
        return found

    def stroke(self, *, x: int = -60, y: int = -40, by: tuple[int, int] = (90, 60)) -> None:
        """Draw a line on the canvas, from a place that is given from its centre."""
        chain = ActionChains(self.driver).move_to_element_with_offset(self.one("#canvas"), x, y)
        chain.click_and_hold().move_by_offset(*by).move_by_offset(10, 0).release().perform()

    def emulate(self, width: int = 0, height: int = 900, scheme: str = "") -> None:
        """Give the window another width, and the system another scheme; without arguments, the browser's own."""
        if width:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        else:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if scheme else ""},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@contextmanager
def serving(data: Path, *options: str) -> Iterator[str]:
    """Serve the bundled model while the block runs; yield the URL."""
    command = [sys.executable, "-m", "mezzotint", "serve", "--data", str(data), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, line
            yield found[0]
        finally:
            process.terminate()


def start_browser() -> webdriver.Chrome:
    """Start a Chromium that reaches nothing but this machine."""
    chromedriver = shutil.which("chromedriver")
    if chromedriver is None:
        pytest.skip("chromedriver is not installed (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument("--window-size=1400,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": THROTTLE})
    return driver


def watch_network(driver: webdriver.Chrome) -> Callable[[], set[str]]:
    """Forget what the browser has logged; return a function that returns the URLs that it has asked for since."""
    for kind in ("browser", "performance"):
        driver.get_log(kind)

    def asked() -> set[str]:
        sent = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
        return {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}

    return asked
