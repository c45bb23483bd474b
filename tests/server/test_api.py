from __future__ import annotations

import io
from pathlib import Path

from fastapi.testclient import TestClient
from PIL import Image

import mezzotint
from mezzotint.request import Request
from stub_server import submit, wait_for


def test_a_picture_has_the_bits_of_generate(tiny: TestClient, sd1: mezzotint.Pipeline, tmp_path: Path) -> None:
    fields = {"prompt": "a lemon", "seed": 7, "count": 2, "sampler": "euler"}
    job = wait_for(tiny, submit(tiny, **fields))
    assert job["state"] == "done", job
    expected = sd1.generate(Request(**fields)).images
    for picture, image in zip(job["pictures"], expected, strict=True):
        data = (tmp_path / "data" / "pictures" / f"{picture['id']}.png").read_bytes()
        with Image.open(io.BytesIO(data)) as found:
            assert found.tobytes() == image.tobytes()
            assert found.info["mezzotint"] == image.info["mezzotint"]
