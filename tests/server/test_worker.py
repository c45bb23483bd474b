"""The worker on a full disk and at the end of the process, one on each of several devices, and jobs in one batch."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from mezzotint.errors import RequestError
from mezzotint.server import Settings, service, worker
from mezzotint.server.batches import find_alike
from mezzotint.server.models import Models
from mezzotint.server.service import Service
from mezzotint.server.store import NewJob
from stub_server import STEPS, StubModels, StubPipe, stub_picture, submit, wait_for


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


# ---- several devices -------------------------------------------------------------------------------------------------


class GatedPipe(StubPipe):
    """Waits before each step until the gate is open; `calls` has the prompts of each call of generate."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self.gate, self.calls = gate, []

    def generate(self, request, *, on_step, on_image, on_estimate=None) -> None:
        requests = request if isinstance(request, list) else [request]
        self.calls.append([each.prompt for each in requests])
        assert all(each.batch == len(requests) for each in requests if len(requests) > 1)
        for step in range(STEPS):
            on_step(step + 1, STEPS)
            assert self.gate.wait(30)
        on_step(STEPS, STEPS)
        if any(each.prompt == "wrong" for each in requests):
            raise RequestError("the prompt is wrong")
        pictures = [stub_picture(each, k) for each in requests for k in range(each.count)]
        for place, picture in enumerate(pictures):
            on_image(place, picture)


class GatedModels(StubModels):
    """Models of a pipeline on each device, all of which wait for one gate."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.gate, self.most = threading.Event(), 16
        self.pipe, self.others = GatedPipe(self.gate), []

    def on(self, device: str) -> Models:
        found = super().on(device)
        found.pipe = GatedPipe(self.gate)
        self.others.append(found.pipe)
        return found

    def own_size(self, model) -> tuple[int, int]:
        return 64, 64

    def batch_for(self, model, vae, request, count) -> int:
        return min(count, self.most)


@pytest.fixture
def make_gated(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a service over GatedModels on some devices."""
    made = []
    monkeypatch.setattr(service, "DRAIN", 0.0)

    def make(*devices: str, **fields) -> Service:
        settings = Settings(data=tmp_path / "data", devices=devices, **fields)
        core = Service(settings, GatedModels(settings))
        made.append(core)
        return core

    yield make
    for core in made:
        core.models.gate.set()
        core.stop()


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def states(core: Service, ids: list[str]) -> list[str]:
    return [core.store.get(id).state for id in ids]


def until_idle(core: Service) -> None:
    """Wait until no job waits or runs: between its claim and its first step a job has no progress yet."""

    def is_idle() -> bool:
        counts = core.store.counts()
        return not core.progress and not counts["queued"] and not counts["running"]

    until(is_idle)


def kill(core: Service) -> None:
    """Leave the store as a process that is killed while it draws leaves it."""
    core.store.requeue = lambda id=None: 0
    core.hurry()
    threading.Thread(target=core.models.gate.set).start()
    core.stop()


TWO = ("cuda:0", "cuda:1")


def test_two_cancelled_jobs_both_stop(make_gated) -> None:
    """The second one waits, or has ended; the first one hears of its own all the same."""
    core = make_gated("cpu")
    ids = [job.id for job in core.submit([{"prompt": name, "seed": 1} for name in "ab"])]
    core.start()
    until(lambda: core.progress and core.progress.step)
    for id in ids:
        core.cancel(id)
    core.models.gate.set()
    until_idle(core)
    assert core.steps_done == 1
    assert states(core, ids) == ["cancelled"] * 2


def test_each_device_draws_a_job(make_gated) -> None:
    core = make_gated(*TWO)
    ids = [job.id for job in core.submit([{"prompt": name, "seed": 1} for name in "abcd"])]
    core.start()
    until(lambda: all(each["running"] and each["running"]["step"] for each in core.queue()["devices"]))
    queue = core.queue()
    assert [each["device"] for each in queue["devices"]] == list(TWO)
    assert {each["running"]["job"] for each in queue["devices"]} == {*ids[:2]}
    assert (queue["running"], queue["order"]) == (queue["devices"][0]["running"], ids[2:])
    assert states(core, ids) == ["running", "running", "queued", "queued"]
    core.cancel(ids[0])
    core.models.gate.set()
    until_idle(core)
    assert states(core, ids) == ["cancelled", "done", "done", "done"]
    calls = [*core.models.pipe.calls, *core.models.others[0].calls]
    assert sorted(calls) == [["a"], ["b"], ["c"], ["d"]]
    assert [len(core.store.get(id).pictures) for id in ids] == [0, 1, 1, 1]


def test_a_restart_queues_the_jobs_of_all_devices(make_gated) -> None:
    core = make_gated(*TWO)
    ids = [job.id for job in core.submit([{"prompt": name, "seed": 1} for name in "abc"])]
    core.start()
    until(lambda: len(core.running) == 2 and all(each.step for each in core.running))
    kill(core)
    again = make_gated(*TWO)
    assert states(again, ids) == ["running", "running", "queued"]
    again.models.gate.set()
    again.start()
    until(lambda: states(again, ids) == ["done"] * 3)
    assert [len(again.store.get(id).pictures) for id in ids] == [1] * 3


def test_several_devices_must_be_cuda_devices(tmp_path) -> None:
    for devices in (("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0")):
        with pytest.raises(RequestError, match="several must be CUDA devices"):
            Settings(data=tmp_path, devices=devices)


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_of(core: Service, *requests, **options) -> list[str]:
    return [job.id for job in core.submit([{"seed": k, **each} for k, each in enumerate(requests)], **options)]


def test_jobs_that_differ_in_prompt_and_seed_share_a_batch(make_gated) -> None:
    core = make_gated("cuda", share_batches=True)
    core.models.gate.set()
    batch_of(
        core, {"prompt": "a"}, {"prompt": "b", "steps": 9}, {"prompt": "c", "negative_prompt": ""}, {"prompt": "d"}
    )
    batch_of(core, {"prompt": "e", "count": 2}, {"prompt": "f", "batch": 2}, {"prompt": "g", "negative_prompt": "x"})
    batch_of(core, {"prompt": "h"}, priority="bulk")
    core.start()
    until_idle(core)
    assert core.models.pipe.calls == [["a", "c", "d", "f"], ["b"], ["e"], ["g"], ["h"]]


def test_a_batch_is_as_large_as_fits(make_gated) -> None:
    core = make_gated("cuda", share_batches=True)
    core.models.gate.set()
    core.models.most = 2
    batch_of(core, *({"prompt": name} for name in "abcde"))
    core.start()
    until_idle(core)
    assert core.models.pipe.calls == [["a", "b"], ["c", "d"], ["e"]]


def test_pictures_that_are_drawn_again_share_no_batch(make_gated) -> None:
    core = make_gated("cpu", share_batches=True)
    for k in range(2):
        core.store.submit([NewJob({"prompt": "a", "seed": k}, "emoji", kind=kind) for kind in ("verify", "maps")])
    assert find_alike(core.store) == []


def test_a_batch_is_drawn_again_as_it_was(make_gated) -> None:
    """After a restart, though one of its jobs is cancelled, one more waits, and batches are not shared any more."""
    core = make_gated("cuda", share_batches=True)
    ids = batch_of(core, *({"prompt": name} for name in "abc"))
    core.start()
    until(lambda: core.progress and core.progress.step)
    kill(core)
    again = make_gated("cuda")
    again.cancel(ids[0])
    later = batch_of(again, {"prompt": "d"})
    again.models.gate.set()
    again.start()
    until(lambda: states(again, later) == ["done"])
    assert again.models.pipe.calls == [["a", "b", "c"], ["d"]]
    assert states(again, ids) == ["cancelled", "done", "done"]
    assert [len(again.store.get(id).pictures) for id in ids] == [0, 1, 1]


def test_a_batch_goes_on_for_the_others(make_gated) -> None:
    core = make_gated("cuda", share_batches=True)
    ids = batch_of(core, *({"prompt": name} for name in "abc"))
    core.start()
    until(lambda: core.progress and core.progress.step)
    core.cancel(ids[1])
    core.models.gate.set()
    until_idle(core)
    assert states(core, ids) == ["done", "cancelled", "done"]
    assert [[each.seed for each in core.store.get(id).pictures] for id in ids] == [[0], [], [2]]
    assert core.models.pipe.calls == [["a", "b", "c"]]


def test_an_error_in_a_batch_is_that_of_one_job(make_gated) -> None:
    core = make_gated("cuda", share_batches=True)
    core.models.gate.set()
    ids = batch_of(core, {"prompt": "a"}, {"prompt": "wrong"}, {"prompt": "c"})
    core.start()
    until_idle(core)
    assert states(core, ids) == ["done", "failed", "done"]


def test_no_batch_is_shared_on_the_cpu(make_gated, caplog: pytest.LogCaptureFixture) -> None:
    core = make_gated("cpu", share_batches=True)
    core.models.gate.set()
    ids = batch_of(core, {"prompt": "a"}, {"prompt": "b"})
    core.start()
    until(lambda: states(core, ids) == ["done"] * 2)
    assert core.models.pipe.calls == [["a"], ["b"]]
    assert "never share a batch on cpu" in caplog.text


def test_the_end_is_told_before_the_rest_of_the_run(make_stub, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_stub()
    core = client.app.state.service
    generate, told, ended = core.models.pipe.generate, threading.Event(), threading.Event()

    def lasting(request, **hooks) -> None:
        generate(request, **hooks)
        told.wait(10)
        ended.set()

    monkeypatch.setattr(core.models.pipe, "generate", lasting)
    id = submit(client, prompt="a", seed=1)

    def states() -> list[str]:
        return [event.read()["state"] for event in core.events._kept if event.name == "job" and event.job == id]

    while states() != ["queued", "running", "done"]:
        time.sleep(0.01)
    assert not ended.is_set()
    assert client.get("/api/queue").json()["running"] is None
    told.set()
