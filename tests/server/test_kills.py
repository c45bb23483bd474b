"""kill -9 under load, and SIGTERM: what was accepted is drawn once, with the bits of an unbroken run."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from killed import HERE, Servers, start_parent
from mezzotint.request import Request
from stub_server import stub_picture

FEW = (("submitting", 9), ("step", 50), ("synced", 5), ("filed", 6), ("added", 7))
STEPS_WITHOUT_END = """
import sys, torch
from pathlib import Path
from mezzotint.server import Settings, app, service
from stub_server import StubModels

def generate(request, **hooks):
    print("begun", flush=True)
    while True:
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)

service.DRAIN = service.STEP = 0.1
settings = Settings(data=Path(sys.argv[1]), port=0)
models = StubModels(settings)
models.pipe.generate = generate
app.Service = lambda settings: service.Service(settings, models)
app.serve(settings, lambda url: print(url, flush=True))
"""
MOMENTS = ("submitting", "submitted", "claimed", "step", "written", "synced", "named", "filed", "adding", "added")


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[str]]:
    with start_parent() as process:
        yield process
        process.kill()


@pytest.fixture
def running(parent: subprocess.Popen[str], tmp_path: Path) -> Iterator[Servers]:
    found = Servers(parent, tmp_path)
    yield found
    found.close()


class Load:
    """Clients that submit jobs until their server is gone."""

    def __init__(self, clients: int) -> None:
        self.clients, self.counts = clients, Counter[str]()
        self.accepted: dict[str, tuple[str, int]] = {}
        self.lock = threading.Lock()

    def run(self, running: Servers, round: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._submit, args=(running, round, k)) for k in range(self.clients)]
        for thread in threads:
            thread.start()
        return threads

    def _submit(self, running: Servers, round: int, number: int) -> None:
        chance = random.Random(1000 * round + number)
        with running.client() as client:
            while True:
                fields = {"prompt": f"{round}.{number}", "seed": chance.randrange(10**6), "count": 2}
                try:
                    reply = client.post("/api/jobs", json={"request": fields})
                except httpx.TransportError:
                    self.counts["unanswered"] += 1
                    return
                with self.lock:
                    self.counts[str(reply.status_code)] += 1
                if reply.status_code == 202:
                    self.accepted[reply.json()["jobs"][0]["id"]] = (fields["prompt"], fields["seed"])
                else:
                    assert reply.status_code == 429, reply.text
                    time.sleep(0.05)


@pytest.mark.parametrize(
    "kills,clients", [(5, 2), pytest.param(300, 8, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_nothing_is_lost_or_drawn_twice(running: Servers, kills: int, clients: int) -> None:
    """Each kill is at a moment that is hit with certainty; of 300, every second one is at any moment."""
    chance, load, began = random.Random(0), Load(clients), Counter[str]()
    for round in range(kills):
        few = kills == len(FEW)
        moment, count = FEW[round] if few else (MOMENTS[round // 2 % len(MOMENTS)], chance.randint(1, 20))
        if not few and round % 2:
            moment = "never"
        running.start(moment, count)
        threads = load.run(running, round)
        if moment == "never":
            time.sleep(chance.uniform(0.0, 0.5))
            running.send(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        for thread in threads:
            thread.join()
        began[moment] += 1
    running.start()
    with running.client() as client:
        while (queue := client.get("/api/queue").json())["order"] or queue["running"]:
            time.sleep(0.02)
    running.send(signal.SIGTERM)
    assert running.wait() == 0
    data, accepted = running.data, load.accepted
    with sqlite3.connect(data / "mezzotint.db") as db:
        states = dict(db.execute("SELECT id, state FROM jobs").fetchall())
        pictures = db.execute("SELECT id, job, place, sha256 FROM pictures").fetchall()
        requests = dict(db.execute("SELECT id, json_extract(request, '$.seed') FROM jobs").fetchall())
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    lost = [id for id in accepted if states.get(id) != "done"]
    drawn = Counter((job, place) for _, job, place, _ in pictures)
    twice = [each for each, times in drawn.items() if times > 1]
    torn, other = [], []
    for id, job, place, sha256 in pictures:
        content = (data / "pictures" / f"{id}.png").read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            torn.append(id)
        elif job in accepted:
            prompt, seed = accepted[job]
            assert requests[job] == seed
            expected = stub_picture(Request(prompt=prompt, seed=seed, count=2), place)
            with Image.open(io.BytesIO(content)) as image:
                if image.tobytes() != expected.tobytes() or image.info["mezzotint"] != expected.info["mezzotint"]:
                    other.append(id)
    assert (lost, twice, torn, other) == ([], [], [], [])
    assert set(states.values()) == {"done"}  # those too whose client heard nothing
    assert len(pictures) == 2 * len(states)
    assert {path.name for path in (data / "pictures").iterdir()} == {f"{id}.png" for id, *_ in pictures}
    print(
        f"{kills} kills {dict(began)}: {len(accepted)} accepted, {load.counts['429']} refused, "
        f"{load.counts['unanswered']} unanswered; {len(states)} done, {len(pictures)} pictures, "
        "0 lost, 0 twice, 0 torn, 0 of other bits"
    )


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_finishes_the_picture(running: Servers, signals: int) -> None:
    """At a second signal the run ends after its current step."""
    running.start("step", 3, "hold")  # the first is before the first step
    with running.client() as client:
        reply = client.post("/api/jobs", json={"request": {"prompt": "a", "seed": 1, "count": 3}})
        id = reply.json()["jobs"][0]["id"]
        later = client.post("/api/jobs", json={"request": {"prompt": "b", "seed": 2}}).json()["jobs"][0]["id"]
        calls: list[int] = []
        body = {"prompt": "c", "steps": 4}
        call = threading.Thread(
            target=lambda: calls.append(httpx.post(f"{client.base_url}sdapi/v1/txt2img", json=body).status_code)
        )
        call.start()
        while not (running.data / "held").exists() or len(client.get("/api/queue").json()["order"]) < 2:
            time.sleep(0.005)
        running.send(signal.SIGTERM)
        while client.get("/readyz").status_code != 503:
            time.sleep(0.005)
        for path in ("/api/jobs", "/sdapi/v1/txt2img", "/v1/images/generations"):
            body = {"request": {"prompt": "d"}} if path == "/api/jobs" else {"prompt": "d"}
            refused = httpx.post(f"{client.base_url}{path[1:]}", json=body)  # over a new connection
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert client.get(f"/api/jobs/{id}").json()["state"] == "running"
        if signals == 2:
            running.send(signal.SIGTERM)
            time.sleep(0.2)
    (running.data / "go").touch()
    status = running.wait()
    call.join()
    assert (status, calls) == (0 if signals == 1 else -signal.SIGTERM, [503])
    with sqlite3.connect(running.data / "mezzotint.db") as db:
        states = dict(db.execute("SELECT id, state FROM jobs").fetchall())
        pictures = db.execute("SELECT job, place FROM pictures").fetchall()
    db.close()
    assert (states[id], states[later], len(states)) == ("queued", "queued", 3)
    assert pictures == ([(id, 0)] if signals == 1 else [])
    running.start()
    with running.client() as client:
        while client.get(f"/api/jobs/{later}").json()["state"] != "done":
            time.sleep(0.005)
        job = client.get(f"/api/jobs/{id}").json()
        assert [picture["place"] for picture in job["pictures"]] == [0, 1, 2]


def test_sigterm_ends_the_process_in_a_step_without_end(tmp_path: Path) -> None:
    """It says so by its exit status; torch's threads would abort the interpreter."""
    command, env = (
        [sys.executable, "-c", STEPS_WITHOUT_END, str(tmp_path / "data")],
        {**os.environ, "PYTHONPATH": str(HERE)},
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        id = httpx.post(f"{url}api/jobs", json={"request": {"prompt": "a"}}).json()["jobs"][0]["id"]
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with sqlite3.connect(tmp_path / "data" / "mezzotint.db") as db:
        assert db.execute("SELECT state FROM jobs WHERE id = ?", (id,)).fetchone() == (
            "running",
        )  # drawn at the next start
    db.close()
