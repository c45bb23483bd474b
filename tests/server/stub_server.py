"""A pipeline that draws in no time, and what the tests of the server do again and again."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from fastapi.testclient import TestClient
from PIL import Image

from mezzotint.images.io import Picture
from mezzotint.records.record import describe
from mezzotint.request import Request
from mezzotint.server import Settings
from mezzotint.server.models import LoadedModel, Models

HOST = "http://127.0.0.1:7860"
STEPS = 4


class StubPipe:
    """Draws a square of one colour, which follows from the request; `delay` seconds a step."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.drawn = 0

    def generate(self, request: Request, *, on_step: Any, on_image: Any, on_estimate: Any = None) -> None:
        steps = request.steps or STEPS
        for place in range(request.count):
            for step in range(steps):
                if self.delay:
                    time.sleep(self.delay)
                on_step(place * steps + step + 1, request.count * steps)
            on_image(place, stub_picture(request, place))
            self.drawn += 1

    def draw(self, jobs: Any, on_step: Any = None) -> list[Image.Image]:
        return [stub_picture(request, place) for place, (request, _) in enumerate(jobs)]


def stub_picture(request: Request, place: int) -> Image.Image:
    seed = (request.seed or 0) + place
    colour = hashlib.sha256(f"{request.prompt}:{seed}".encode("utf-8", "replace")).digest()
    image = Picture.from_image(Image.new("RGB", (request.width or 64, request.height or 64), tuple(colour[:3])))
    resolved = request.replace(width=image.width, height=image.height, steps=request.steps or STEPS)
    image.info.update(describe(resolved, seed, {"name": "stub", "files": {}}, image=image))
    return image


class StubModels(Models):
    """Models whose every name loads the stub."""

    def __init__(self, settings: Settings, delay: float = 0.0) -> None:
        super().__init__(settings)
        self.pipe = StubPipe(delay)

    def load(self, model: str, vae: str | None, request: Request) -> LoadedModel:
        return LoadedModel(self.pipe)  # type: ignore[arg-type]


def wait_for(client: TestClient, id: str, seconds: float = 30.0) -> dict[str, Any]:
    """Return a job when it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job: dict[str, Any] = client.get(f"/api/jobs/{id}").json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.01)
    raise AssertionError(f"the job is {job['state']} after {seconds} s")


def submit(client: TestClient, **fields: Any) -> str:
    """Queue a request and return the id of its job."""
    reply = client.post("/api/jobs", json={"request": fields})
    assert reply.status_code == 202, reply.text
    id: str = reply.json()["jobs"][0]["id"]
    return id
