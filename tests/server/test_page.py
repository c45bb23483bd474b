"""The page in a headless Chromium: the form, the queue, and what is drawn. Run by `make test-page`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ip_adapters import face, write_adapters
from safetensors.torch import save_file
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import mezzotint
from browser import GIVE, LONG, Page, serving
from controls import write_control
from mezzotint.memory.headers import ModelHeaders
from mezzotint.weights.ip_adapter_files import save_embeds

DROP_ON = f"""{GIVE}
document.querySelector(arguments[1]).dispatchEvent(
  new DragEvent("drop", {{bubbles: true, cancelable: true, dataTransfer: data}}));
"""
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with files of each kind."""
    bundled = Path(mezzotint.__file__).parent / "data" / "emoji"
    root = tmp_path_factory.mktemp("server")
    options: list[str] = []
    for kind in ("loras", "embeddings", "wildcards"):
        (root / kind).mkdir()
        options += [f"--{kind}", str(root / kind)]
    (root / "loras" / "fast.safetensors").symlink_to(bundled / "lcm_lora.safetensors")
    save_file({"emb_params": torch.zeros(2, 192)}, root / "embeddings" / "dotted.safetensors")
    (root / "wildcards" / "fruit.txt").write_text("lemon\ncherry\n")
    (root / "controls").mkdir()
    write_control(root / "controls" / "outline.safetensors", ModelHeaders.of().unet)
    write_adapters(root / "adapters", ModelHeaders.of().unet, "plain")
    embeds = mezzotint.embed_images(root / "adapters" / "models" / "plain.safetensors", [face()], device="cpu")
    save_embeds(root / "adapters" / "someone.safetensors", embeds)
    options += ["--controls", str(root / "controls"), "--ip-adapters", str(root / "adapters")]
    with serving(root / "data", *options) as found:
        yield found


def drop_on(page: Page, selector: str, picture: dict[str, Any]) -> None:
    """Drop a picture's file on an element as soon as it is there: the upload before may have to end first."""
    page.one(selector)
    page.script(DROP_ON, page.file(picture), selector)


def test_draws_with_a_preview_and_the_time_left(page: Page) -> None:
    page.draw("a lemon on a blue background", steps=30)
    page.wait(lambda: page.all(".live .preview[src^='data:image/jpeg']"))
    page.wait(lambda: re.search(r"\d+ of 30 · .* left", page.text(".live .progress-text")))
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
    before = page.wait(waiting)
    page.click(".jobs .job:nth-child(2) .cancel")
    page.wait(lambda: waiting() == [before[0], before[2]])
    page.click(".toast .link")
    page.wait(lambda: waiting() == before)  # where it was
    page.script("[...document.querySelectorAll('#queue .button')].at(-1).click()")
    page.wait(lambda: not waiting())
    page.script("[...document.querySelectorAll('.toast .link')].at(-1).click()")
    page.wait(lambda: waiting() == before)


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
    assert page.value("#prompt") == "a fox on a pink background"  # a new tab begins with the form of the last one,
    page.write("#prompt", "an owl")  # which keeps its own
    page.clear()
    page.wait(lambda: not page.all(".live"))  # it hears of it
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait(lambda: page.script(held) == [1, 0])
    page.open()
    assert page.value("#prompt") == "a fox on a pink background"


def test_tokens_lint_and_memory_stand_in_the_form(page: Page) -> None:
    page.write("#prompt", "a (red:1.3) apple")
    page.wait(lambda: page.texts(".word") == ["a", "red1.3", "apple"])
    page.write("#prompt", "a red++ apple")
    page.wait(lambda: "has no meaning in a1111" in page.text(".lint"))
    page.wait(lambda: re.search(r"\d (MB|MiB|GiB|GB)", page.text("#plan")))


def test_the_negative_prompt_shows_its_tokens_too(page: Page) -> None:
    page.click("#negative-part summary")
    page.write("#negative_prompt", "a (blurry:1.2) cat")
    page.wait(lambda: page.texts("#negative-words .word") == ["a", "blurry1.2", "cat"])
    assert page.texts("#words .word") == []
    page.write("#negative_prompt", "a (cat")
    page.wait(lambda: "never closed" in page.text("#negative-words .lint"))


def test_ctrl_arrows_change_the_weight_at_the_cursor(page: Page) -> None:
    page.write("#prompt", "a red cat <lora:fast:0.5>")

    def press(place: int, *keys: str) -> str:
        page.script("arguments[0].setSelectionRange(arguments[1], arguments[1])", page.one("#prompt"), place)
        chain = ActionChains(page.driver).key_down(Keys.CONTROL)
        chain.send_keys(*keys).key_up(Keys.CONTROL).perform()
        return page.value("#prompt")

    assert press(3, Keys.ARROW_UP) == "a (red:1.1) cat <lora:fast:0.5>"
    assert press(4, Keys.ARROW_UP, Keys.ARROW_UP) == "a (red:1.3) cat <lora:fast:0.5>"
    assert press(20, Keys.ARROW_DOWN) == "a (red:1.3) cat <lora:fast:0.45>"
    page.wait(lambda: "red1.3" in page.texts(".word"))
    assert press(4, *(3 * [Keys.ARROW_DOWN])) == "a red cat <lora:fast:0.45>"
    assert press(3, "z") == "a (red:1.1) cat <lora:fast:0.45>"  # Ctrl-Z


def test_a_prompt_that_changes_shows_the_tokens_of_each_variant(page: Page) -> None:
    page.write("#prompt", "a [red:blue:0.5] cat AND a tree :0.5")
    page.wait(lambda: page.texts(".word") == ["a", "red", "cat", "a", "tree"])
    assert page.texts(".part-name") == ["First part", "AND, weight 0.5"]
    assert page.texts(".variant option") == ["steps 1–11: a red cat", "steps 12–20: a blue cat"]
    Select(page.one(".variant")).select_by_index(1)
    page.wait(lambda: page.texts(".word") == ["a", "blue", "cat", "a", "tree"])
    page.write("#steps", "4")  # the ranges follow the steps
    page.wait(lambda: page.texts(".variant option")[0] == "steps 1–3: a red cat")


def test_a_choice_shows_what_a_seed_draws(page: Page) -> None:
    Select(page.one("#add-field")).select_by_value("prompt_syntax")
    Select(page.one("#field-prompt_syntax")).select_by_value("comfy")
    page.write("#prompt", "a {red|blue|green|yellow} cat")
    page.wait(lambda: len(page.texts(".word")) == 3)
    first = page.texts(".word")[1]
    assert first in ("red", "blue", "green", "yellow")
    assert "each seed draws anew" in page.text(".choice")

    def another() -> bool:
        page.click("#other-choice")
        return bool(WebDriverWait(page.driver, 2).until(lambda _: page.texts(".word")[1:2])[0] != first)

    page.wait(another)
    page.write("#seed", "3")
    page.wait(lambda: "What this seed chooses" in page.text(".choice"))
    told = page.texts(".word")
    page.write("#steps", "1")
    page.click("#draw")
    picture = page.wait(lambda: next((one for one in page.pictures() if one["seed"] == 3), None))
    record = page.api("GET", f"/api/pictures/{picture['id']}/record")
    assert record["request"]["prompt"].split() == told


def test_the_empty_form_shows_the_models_own_settings(page: Page) -> None:
    own = page.api("GET", "/api/models")["models"][0]["settings"]
    names = ("width", "height", "steps", "guidance_scale")
    shown = [float(page.script("return document.getElementById(arguments[0]).placeholder", name)) for name in names]
    assert shown == [own[name] for name in names]
    assert page.texts("#sampler option")[0] == f"Auto: {own['sampler']}"
    assert page.texts("#spacing option")[0] == f"Auto: {own['spacing']}"
    page.click("[data-shape='16:9']")  # as many pixels as the model's own size, in whole steps of 8
    assert (page.value("#width"), page.value("#height")) == ("168", "96")
    page.write("#prompt", "an apple on a white background")
    page.write("#steps", "1")
    page.click("#draw")
    picture = page.finished("an apple on a white background")
    assert (picture["width"], picture["height"]) == (168, 96)


def test_pickers_write_into_the_prompt(page: Page) -> None:
    page.write("#prompt", "a whale")
    page.click("#pick-loras")
    page.write("#picker-scale", "0.5")
    page.one("#picker-search").send_keys("fa")
    page.click(".picker-item")
    assert page.value("#prompt") == "a whale <lora:fast:0.5>"
    page.click("#pick-embeddings")
    page.click(".picker-item")
    assert page.value("#prompt") == "a whale <lora:fast:0.5> dotted"
    page.wait(lambda: page.texts(".word") == ["a", "whale", "dotted2"])  # two vectors, one word
    page.write("#steps", "2")
    page.click("#draw")
    picture = page.finished("a whale <lora:fast:0.5> dotted")
    job = page.job(picture)
    assert job["request"]["embeddings"] == ["dotted"]
    record = page.api("GET", f"/api/pictures/{picture['id']}/record")
    assert "fast" in json.dumps(record["facts"])  # the file that the prompt names
    page.click("#negative-part summary")
    page.click("#negative_prompt")
    page.click("#pick-embeddings")
    page.click(".picker-item")
    assert page.value("#negative_prompt") == "dotted"  # into the prompt that was written in


def test_a_controlnet_follows_a_picture(page: Page) -> None:
    page.draw("a lemon on a blue background", steps=1)
    first = page.finished("a lemon on a blue background")
    page.click("#control summary")
    page.wait(lambda: "once it has a picture" in page.text(".control-card .note"))
    assert page.value("#control-file-0") == "outline"
    drop_on(page, "#control-picture-0", first)
    page.wait(lambda: page.all(".control-image"))
    page.click("#control-canny-0")
    page.wait(lambda: page.all(".control-image[src*='canny']"))
    page.write("#control-low-0", "50\t")
    page.wait(lambda: page.all(".control-image[src*='low=50']"))
    Select(page.one("#control-mode-0")).select_by_value("control")
    page.script(
        "const range = document.getElementById('control-scale-0'); range.value = 0.5; "
        "range.dispatchEvent(new Event('input'))"
    )
    page.open()  # it is kept over a reload
    page.wait(lambda: page.all(".control-image[src*='low=50']"))
    page.check_axe()
    page.draw("a lemon", steps=1)
    picture = page.finished("a lemon")
    (unit,) = page.job(picture)["request"]["control"]
    assert {**unit, "image": ""} == {"file": "outline", "image": "", "mode": "control", "scale": 0.5}
    page.click("#badge")
    page.wait(lambda: page.text("#badge").startswith("Verified"))
    page.click("#control-remove-0")
    page.wait(lambda: not page.all(".control-card"))
    page.click("#use-settings")
    page.wait(lambda: page.all(f".control-image[src$='{unit['image']}']"))
    page.click(".menu summary")
    page.click("#use-control")
    page.wait(lambda: not page.all(f".control-image[src$='{unit['image']}']") and page.all(".control-image"))


def test_an_ip_adapter_takes_pictures(page: Page) -> None:
    """Dropped ones, one that is shown, or saved embeddings; its steps and weight; and from the history again."""
    page.draw("a lemon on a blue background", steps=1)
    first = page.finished("a lemon on a blue background")
    page.click("#ip-adapter summary")
    page.wait(lambda: "once it has a picture" in page.text("#ip-adapter .control-card .note"))
    assert page.value("#ip-adapter-file-0") == "models/plain"
    drop_on(page, "#ip-adapter-picture-0", first)
    drop_on(page, "#ip-adapter-picture-0-1", first)
    drop_on(page, "#ip-adapter-picture-0-2", first)
    page.wait(lambda: len(page.all("#ip-adapter .control-image")) == 3)
    page.click("#ip-adapter .control-small:nth-child(2) .icon-button")
    page.wait(lambda: len(page.all("#ip-adapter .control-image")) == 2)
    page.script(
        "const range = document.getElementById('ip-adapter-end-0'); range.value = 0.5; "
        "range.dispatchEvent(new Event('input'))"
    )
    page.open()  # it is kept over a reload
    page.wait(lambda: len(page.all("#ip-adapter .control-image")) == 2)
    page.check_axe()
    page.draw("a lemon", steps=2)
    picture = page.finished("a lemon")
    (unit,) = page.job(picture)["request"]["ip_adapter"]
    assert unit == {"file": "models/plain", "image": [unit["image"][0]] * 2, "end": 0.5}
    Select(page.one("#ip-adapter-embeds-0")).select_by_value("someone")
    page.wait(lambda: not page.all("#ip-adapter .control-image"))
    page.draw("a lime", steps=2)
    assert page.job(page.finished("a lime"))["request"]["ip_adapter"] == [
        {"file": "models/plain", "embeds": "someone", "end": 0.5}
    ]
    page.click("#ip-adapter-remove-0")
    page.wait(lambda: not page.all("#ip-adapter .control-card"))
    page.click("#use-settings")
    page.wait(lambda: page.all("#ip-adapter-embeds-0") and page.value("#ip-adapter-embeds-0") == "someone")
    page.click(".menu summary")
    page.click("#use-ip-adapter")
    page.wait(lambda: len(page.all("#ip-adapter .control-image")) == 1)
    assert page.value("#ip-adapter-embeds-0") == ""


def test_a_wildcard_is_offered_and_chosen(page: Page) -> None:
    Select(page.one("#add-field")).select_by_value("prompt_syntax")
    Select(page.one("#field-prompt_syntax")).select_by_value("comfy")
    page.write("#prompt", "a")
    page.click("#pick-wildcards")
    page.click(".picker-item")
    assert page.value("#prompt") == "a __fruit__"
    page.wait(lambda: page.texts(".word") in (["a", "lemon"], ["a", "cherry"]))


def test_a_grid_of_any_two_fields_is_drawn(page: Page) -> None:
    page.draw("a mushroom on grass", steps=2)
    page.finished("a mushroom on grass")
    page.click("#open-grid")
    assert "a mushroom on grass" in page.one(".grid-base").text  # after the grid's code has come
    Select(page.one("#grid-x")).select_by_value("prompt")
    page.write("#grid-x-values", "mushroom => lemon, owl")
    Select(page.one("#grid-y")).select_by_value("clip_skip")
    page.write("#grid-y-values", "0-1")
    page.click("#grid-draw")
    page.wait(lambda: len(page.all(".grid-table .tile")) == 6)
    assert page.texts(".grid-table th") == ["mushroom", "lemon", "owl", "0", "1"]
    requests = [page.job(picture)["request"] for picture in page.pictures()[:7]]
    drawn = {(one["prompt"], one.get("clip_skip")) for one in requests}
    assert {(f"a {word} on grass", skip) for word in ("lemon", "owl") for skip in (0, 1)} <= drawn
