"""Many clients at once: what was accepted and refused is what was sent, and every accepted job is drawn once."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from live import listening
from mezzotint.server import Limits, Settings, create_app
from mezzotint.server.service import Service
from stub_server import StubModels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_accepted_and_refused_are_what_was_sent(tmp_path: Path) -> None:
    """The queue is paused for the first half, so that it fills up."""
    clients, each, room = 16, 40, 80
    settings = Settings(data=tmp_path / "data", limits=Limits(queue=room))
    core = Service(settings, StubModels(settings))
    core.pause(True)
    replies, accepted = Counter[tuple[int, str | None]](), list[str]()
    half = threading.Barrier(clients, action=lambda: core.pause(False))

    def send(port: int, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for k in range(each):
            if k == each // 2:
                half.wait()
            body = json.dumps({"request": {"prompt": "a", "seed": number * each + k}})
            connection.request("POST", "/api/jobs", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            data = json.loads(reply.read())
            with lock:
                replies[reply.status, reply.getheader("Retry-After")] += 1
                accepted.extend(job["id"] for job in data.get("jobs", ()))
        connection.close()

    lock = threading.Lock()
    with listening(create_app(settings, core)) as port:
        threads = [threading.Thread(target=send, args=(port, k)) for k in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while core.store.counts()["queued"] or core.store.counts()["running"]:
            time.sleep(0.02)
        assert set(replies) == {(202, None), (429, "5")}
        assert replies.total() == clients * each
        assert replies[202, None] == len(set(accepted)) >= room
        assert replies[429, "5"] >= clients * each // 2 - room
        assert core.store.counts() == dict.fromkeys(core.store.counts(), 0) | {"done": len(accepted)}
        assert core.models.pipe.drawn == len(accepted)  # type: ignore[attr-defined]
        assert {row["job"] for row in core.store.rows("SELECT job FROM pictures")} == set(accepted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_2000_jobs_of_64_clients(sd1_folder: Path) -> None:
    """The figures of the seconds and the memory are printed, with -s."""
    command = [sys.executable, str(BENCHMARKS / "server_load.py"), "--model", str(sd1_folder)]
    reply = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=3500)
    found = json.loads(reply.stdout)
    print(json.dumps(found))
    assert (found["other"], found["refused_without_retry_after"]) == (0, 0)
    assert found["sent"] == found["accepted"] + found["refused"]
    assert found["states"] == {"queued": 0, "running": 0, "done": 2000, "failed": 0, "cancelled": 0}
    assert found["accepted"] == 2000
