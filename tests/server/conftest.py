"""Two applications: one over the tiny model of tests/conftest.py, one over a stub that draws in no time; the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient

from mezzotint.server import Settings, create_app
from mezzotint.server.service import Service
from stub_server import HOST, StubModels

if TYPE_CHECKING:
    from selenium import webdriver

    from browser import Page

MakeStub = Callable[..., TestClient]


@pytest.fixture
def make_stub(tmp_path: Path) -> Iterator[MakeStub]:
    """Return a function that starts an application over the stub; it takes fields of Settings, and `delay`."""
    clients: list[TestClient] = []

    def make(*, delay: float = 0.0, **fields: Any) -> TestClient:
        settings = Settings(data=fields.pop("data", tmp_path / "data"), **fields)
        service = Service(settings, StubModels(settings, delay))
        client = TestClient(create_app(settings, service), base_url=HOST, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An application that would draw with a stub what it does not refuse."""
    settings = Settings(data=tmp_path_factory.mktemp("refusing") / "data")
    app = create_app(settings, Service(settings, StubModels(settings)))
    with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def stub(make_stub: MakeStub) -> TestClient:
    """An application over the stub."""
    return make_stub()


@pytest.fixture
def tiny(tmp_path: Path, sd1_folder: Path) -> Iterator[TestClient]:
    """An application over the tiny SD1-shaped model, whose name is "tiny"."""
    settings = Settings(data=tmp_path / "data", models=(str(sd1_folder),), devices=("cpu",))
    with TestClient(create_app(settings), base_url=HOST, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with the bundled model."""
    from browser import serving

    with serving(tmp_path_factory.mktemp("server") / "data") as found:
        yield found


@pytest.fixture(scope="session")
def driver() -> Iterator[webdriver.Chrome]:
    """A headless Chromium."""
    from browser import start_browser

    driver = start_browser()
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, url: str) -> Iterator[Page]:
    """The page with an empty form. Afterwards: no errors in the console, no request to another host."""
    from browser import Page, watch_network

    page = Page(driver, url)
    page.clear()
    driver.get(f"{url}healthz")  # the page of the test before has kept its form when this is there
    page.script("localStorage.clear(); sessionStorage.clear()")
    asked_since = watch_network(driver)
    page.open()
    yield page
    logged = (entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING"))
    errors = [message for message in logged if "/favicon.ico" not in message]  # of /healthz, which names no icon
    assert not errors, "\n".join(errors)
    asked = asked_since()
    assert asked
    assert not [each for each in asked if not each.startswith((url, "data:", f"blob:{url}"))]
