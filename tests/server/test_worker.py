"""The worker on a full disk and at the end of the process, and the queue under load."""

from __future__ import annotations

import errno
import time

import pytest

from mezzotint.server import worker
from stub_server import submit, wait_for


def test_a_full_disk_pauses_the_queue(make_stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL", 0.02)
    client = make_stub()
    core = client.app.state.service
    write, full = core.folder.write, True

    def fail(*args, **options) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **options)

    monkeypatch.setattr(core.folder, "write", fail)
    id = submit(client, prompt="a", seed=1)
    while client.get("/readyz").status_code != 503:
        time.sleep(0.01)
    assert "disk" in client.get("/api/queue").json()["waits_for_disk"]
    assert core.models.pipe.drawn == 0
    full = False
    job = wait_for(client, id)
    assert (job["state"], len(job["pictures"]), core.models.pipe.drawn) == ("done", 1, 1)
    assert client.get("/readyz").status_code == 200


def test_a_stopped_server_goes_on_with_its_queue(make_stub, tmp_path) -> None:
    client = make_stub(delay=0.01)
    ids = [submit(client, prompt="a", seed=k, count=5) for k in range(3)]
    client.app.state.service.drain()
    assert client.post("/api/jobs", json={"request": {"prompt": "b"}}).status_code == 503
    client.app.state.service.stop()
    again = make_stub()
    jobs = [wait_for(again, id) for id in ids]
    assert [(job["state"], len(job["pictures"])) for job in jobs] == [("done", 5)] * 3
