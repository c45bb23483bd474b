"""kill -9 under load: what was accepted is drawn once, with the bits of an unbroken run."""

from __future__ import annotations

import hashlib
import io
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from mezzotint.request import Request
from stub_server import stub_picture

HERE = Path(__file__).parent


def start(data: Path, port_file: Path) -> tuple[subprocess.Popen[bytes], httpx.Client]:
    port_file.unlink(missing_ok=True)
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen([sys.executable, str(HERE / "killed_server.py"), str(data), str(port_file)], env=env)
    while not (port_file.exists() and port_file.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port_file.read_text()}", timeout=10)
    while True:
        try:
            client.get("/healthz")
            return process, client
        except httpx.TransportError:
            time.sleep(0.02)


@pytest.mark.parametrize("kills", [5, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_nothing_is_lost_or_drawn_twice(tmp_path: Path, kills: int) -> None:
    data, chance = tmp_path / "data", random.Random(0)
    accepted: dict[str, tuple[str, int]] = {}
    for round in range(kills):
        process, client = start(data, tmp_path / "port")
        end = time.monotonic() + chance.uniform(0.02, 0.4)
        while time.monotonic() < end:
            fields = {"prompt": f"p{round}", "seed": chance.randrange(10**6), "count": 2}
            job = client.post("/api/jobs", json={"request": fields}).json()["jobs"][0]
            accepted[job["id"]] = (fields["prompt"], fields["seed"])
        process.kill()
        process.wait()
        client.close()
    process, client = start(data, tmp_path / "port")
    while client.get("/api/queue").json()["order"] or client.get("/api/queue").json()["running"]:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) is not None
    client.close()
    with sqlite3.connect(data / "mezzotint.db") as db:
        states = dict(db.execute("SELECT id, state FROM jobs").fetchall())
        pictures = db.execute("SELECT id, job, place, sha256 FROM pictures").fetchall()
    assert {id: states.get(id) for id in accepted} == dict.fromkeys(accepted, "done")
    drawn = {(job, place) for _, job, place, _ in pictures}
    assert len(pictures) == len(drawn) == 2 * len(states)
    assert {path.stem for path in (data / "pictures").iterdir()} == {id for id, *_ in pictures}
    for id, job, place, sha256 in pictures:
        content = (data / "pictures" / f"{id}.png").read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        if job in accepted:
            prompt, seed = accepted[job]
            expected = stub_picture(Request(prompt=prompt, seed=seed, count=2), place)
            assert Image.open(io.BytesIO(content)).tobytes() == expected.tobytes()
    print(f"{kills} kills: {len(accepted)} accepted, {len(drawn)} pictures, 0 lost, 0 twice, 0 torn")
