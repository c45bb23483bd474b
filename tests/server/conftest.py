"""Two applications: one over the tiny model of tests/conftest.py, one over a stub that draws in no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mezzotint.server import Settings, create_app
from mezzotint.server.service import Service
from stub_server import HOST, StubModels

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


@pytest.fixture
def stub(make_stub: MakeStub) -> TestClient:
    """An application over the stub."""
    return make_stub()


@pytest.fixture
def tiny(tmp_path: Path, sd1_folder: Path) -> Iterator[TestClient]:
    """An application over the tiny SD1-shaped model, whose name is "tiny"."""
    settings = Settings(data=tmp_path / "data", models=(str(sd1_folder),), device="cpu")
    with TestClient(create_app(settings), base_url=HOST, raise_server_exceptions=False) as client:
        yield client
