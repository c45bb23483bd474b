"""The queue: what waits for a job, what is kept, which models are, and what a full disk or a second server does."""

from __future__ import annotations

import asyncio
import io
import sqlite3
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import mezzotint
from mezzotint.config import TinyVAEConfig
from mezzotint.errors import BudgetError
from mezzotint.models.tiny_vae import TinyVAE
from mezzotint.request import Request
from mezzotint.server import Limits, Settings, api, create_app, events, history, models, service, worker
from mezzotint.server.errors import UnavailableError
from mezzotint.server.events import Event, Subscription
from mezzotint.server.files import DataFolder
from mezzotint.server.service import Service
from mezzotint.server.store import Store
from stub_server import HOST, StubModels, submit, wait_for

# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def paused(tmp_path: Path) -> Service:
    """A service whose worker is not started."""
    settings = Settings(data=tmp_path / "data", limits=Limits(streams=2))
    return Service(settings, StubModels(settings))


def add(core: Service, **fields: Any) -> str:
    return core.submit([{"prompt": "a", "seed": 1, **fields}])[0].id


def test_a_call_that_waits_is_woken_by_its_own_job_alone(paused: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """More events than a slow reader may lag behind, of other jobs, do not make it look into the store."""
    looks = []
    look = paused._get_all
    monkeypatch.setattr(paused, "_get_all", lambda ids: [looks.append(1), look(ids)][1])
    id, other = add(paused), add(paused)

    async def run() -> list[str]:
        waiting = asyncio.ensure_future(paused.wait([id]))
        while not looks:
            await asyncio.sleep(0)
        for _ in range(3 * events.QUEUE_SIZE):
            paused.events.publish("job", paused.store.get(other).to_dict(), other)
            paused.events.publish("step", {"job": id}, id)
        await asyncio.sleep(0.05)
        assert (len(looks), waiting.done()) == (1, False)
        paused.cancel(id)
        return [job.state for job in await waiting]

    assert asyncio.run(run()) == ["cancelled"]
    assert len(looks) == 2
    assert asyncio.run(paused.wait([id]))[0].state == "cancelled"  # it has ended before


def test_a_call_that_waits_hears_that_the_server_stops(paused: Service) -> None:
    id = add(paused)

    async def run() -> None:
        waiting = asyncio.ensure_future(paused.wait([id]))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(paused.drain)
        with pytest.raises(UnavailableError):
            await waiting

    asyncio.run(run())


def test_calls_that_wait_are_no_streams_of_events(paused: Service) -> None:
    ids = [add(paused) for _ in range(3)]

    async def run() -> None:
        waiting = [asyncio.ensure_future(paused.wait([id])) for id in ids]
        await asyncio.sleep(0.01)
        assert len(paused.events) == 0
        readers = [paused.events.subscribe() for _ in range(2)]
        with pytest.raises(UnavailableError):
            await api.events(paused)
        await readers[0].aclose()
        stream = await api.events(paused)
        assert await anext(aiter(stream.body_iterator))
        for id in ids:
            paused.cancel(id)
        await asyncio.gather(*waiting)

    asyncio.run(run())
    assert len(paused.events) == 1


def test_a_slow_reader_gets_the_newest_state_and_is_cut_off() -> None:
    source = events.Events()

    async def run() -> list[Event | None]:
        reader = source.subscribe(beat=0.01)
        for number in range(events.QUEUE_SIZE):
            source.publish("step", {"step": number})
            source.publish("job", {"number": number}, "a")
        source.publish("job", {}, "a")  # too many
        return [event async for event in reader]

    found = [event for event in asyncio.run(run()) if event is not None]
    assert [event.read() for event in found if event.name == "step"] == [{"step": events.QUEUE_SIZE - 1}]
    assert [event.read()["number"] for event in found if event.name == "job"] == list(range(events.QUEUE_SIZE - 1))


def test_passing_events_are_gathered_until_their_pause_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event of another kind comes at once, and makes those of its own job that wait void."""
    source, now = events.Events(), 0.0

    async def take(reader: Subscription) -> list[tuple[str, str]]:
        first = await anext(reader)
        return [] if first is None else [(event.name, event.job) for event in (first, *reader.take())]

    async def run() -> None:
        nonlocal now
        reader = source.subscribe(pause=3600, beat=0.001)
        monkeypatch.setattr(events, "monotonic", lambda: now)
        source.publish("step", {"step": 1}, "a")
        source.publish("step", {"step": 1}, "b")
        source.publish("queue", {})
        assert await take(reader) == []
        source.publish("job", {}, "a")
        assert await take(reader) == [("job", "a")]
        now = 3000.0
        source.publish("step", {"step": 1}, "c")
        source.publish("step", {"step": 2}, "b")
        reader._end_pauses()
        assert await take(reader) == []
        now = 3600.0
        reader._end_pauses()
        assert await take(reader) == [("queue", ""), ("step", "b")]  # b has waited since its first step
        now = 6600.0
        reader._end_pauses()
        assert await take(reader) == [("step", "c")]
        monkeypatch.undo()
        reader = source.subscribe(pause=0.001)
        for step in (3, 4):
            source.publish("step", {"step": step}, "a")
            source.publish("preview", {}, "a")
            source.publish("step", {"step": step}, "a")
            assert await take(reader) == [("preview", "a"), ("step", "a")]  # the newest of each

    asyncio.run(asyncio.wait_for(run(), 60))


def test_interrupt_cancels_the_running_call_alone(make_stub) -> None:
    client = make_stub(delay=0.02)
    core, replies = client.app.state.service, {}

    def draw(name: str, steps: int) -> threading.Thread:
        def call() -> None:
            replies[name] = client.post("/sdapi/v1/txt2img", json={"prompt": name, "steps": steps, "seed": 1}).json()

        thread = threading.Thread(target=call)
        thread.start()
        return thread

    threads = [draw("a", 100)]
    while not (core.progress and core.progress.step):
        time.sleep(0.002)
    threads.append(draw("b", 1))
    queued = submit(client, prompt="c", steps=1)
    while len(core.store.order()) < 2:
        time.sleep(0.002)
    assert client.post("/sdapi/v1/interrupt").status_code == 200
    for thread in threads:
        thread.join()
    assert (len(replies["a"]["images"]), len(replies["b"]["images"])) == (0, 1)
    assert wait_for(client, queued)["state"] == "done"
    assert core.store.counts() == {"queued": 0, "running": 0, "done": 2, "failed": 0, "cancelled": 1}


# ---- stopping --------------------------------------------------------------------------------------------------------


def test_a_stop_does_not_wait_for_a_step_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DRAIN", 0.01)
    monkeypatch.setattr(service, "STEP", 0.01)
    settings = Settings(data=tmp_path / "data")
    core, begun, end = Service(settings, StubModels(settings)), threading.Event(), threading.Event()

    def generate(request: Request, **_: Any) -> None:
        begun.set()
        end.wait()

    monkeypatch.setattr(core.models.pipe, "generate", generate)
    core.start()
    id = add(core)
    begun.wait()
    assert core.drain() is False
    assert core.store.get(id).state == "running"  # the next start queues it again
    end.set()
    core.stop()


def test_a_second_drain_waits_no_longer(paused: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process drains at the signal, and the application once more when it ends."""
    now = 100.0

    def join(timeout: float) -> bool:
        nonlocal now
        now += max(timeout, 0)
        return False

    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(paused.workers[0], "join", join)
    paused.drain()
    paused.drain()
    assert now == 100 + service.DRAIN + service.STEP
    assert service.DRAIN + service.STEP <= 20  # of the 30 s that are promised


def test_a_job_that_ran_has_the_same_bits_after_a_restart(
    tmp_path: Path, sd1_folder: Path, sd1: mezzotint.Pipeline
) -> None:
    settings = Settings(data=tmp_path / "data", models=(str(sd1_folder),), devices=("cpu",))
    fields = {"prompt": "a lemon", "seed": 7, "count": 3, "steps": 3, "sampler": "euler_a"}
    first = Service(settings)
    id = first.submit([fields])[0].id
    assert first.store.claim()  # as a process that was killed while it drew leaves it
    first.store.close()
    first._cleanup.pop_all()
    with sqlite3.connect(tmp_path / "data" / "mezzotint.db") as db:
        assert db.execute("SELECT state FROM jobs").fetchall() == [("running",)]
    db.close()
    first_lock = settings.data / "lock"
    first_lock.unlink()  # its process would have ended
    with TestClient(create_app(settings), base_url=HOST) as client:
        job = wait_for(client, id)
        found = [client.get(f"/api/pictures/{picture['id']}/file").content for picture in job["pictures"]]
    expected = sd1.generate(Request(**fields)).images
    for data, image in zip(found, expected, strict=True):
        with Image.open(io.BytesIO(data)) as drawn:
            assert drawn.tobytes() == image.tobytes()
            assert drawn.info["mezzotint"] == image.info["mezzotint"]


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_the_history_is_bounded(make_stub, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_stub(keep=10**9)
    core = client.app.state.service
    upload = client.post("/api/uploads", content=png(), headers={"Content-Type": "image/png"}).json()
    used = client.post("/api/uploads", content=png("blue"), headers={"Content-Type": "image/png"}).json()
    pictures = [wait_for(client, submit(client, prompt="a", seed=k))["pictures"][0] for k in range(6)]
    client.patch(f"/api/pictures/{pictures[0]['id']}", json={"rating": 5})
    client.get(f"/api/pictures/{pictures[1]['id']}/thumbnail")
    core.pause(True)
    submit(client, prompt="a", image=used["id"])
    keep = used["bytes"] + sum(pictures[k]["bytes"] for k in (0, 4, 5))
    bounded = history.History(core.store, core.folder, keep)
    bounded.clean()
    assert len(core.history.search()) == 6  # they are new: a call may still read them
    monkeypatch.setattr(history, "FRESH", -1.0)
    bounded.clean()
    left = [picture["id"] for picture in client.get("/api/pictures").json()["pictures"]]
    assert left == [pictures[k]["id"] for k in (5, 4, 0)]
    for folder, names in (("pictures", left), ("thumbnails", []), ("uploads", [used["id"]])):
        assert {path.stem for path in (core.folder.path / folder).iterdir()} == set(names)
    assert client.get(f"/api/uploads/{upload['id']}").status_code == 404
    assert client.get(f"/api/pictures/{pictures[1]['id']}/file").status_code == 404


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    return file.getvalue()


def test_the_least_recently_used_model_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three models fit. One that does not fit alone is refused with the planner's sentence."""
    names = ("a", "b", "c", "large")
    for name in names:
        (tmp_path / name).mkdir()
    found = models.Models(Settings(data=tmp_path, models=tuple(str(tmp_path / name) for name in names), memory="8GiB"))
    loaded: list[str] = []

    def plan(key: tuple[str, str | None], *_: Any) -> Any:
        if key[0] == "large" or len(found._loaded) >= 2:
            raise BudgetError("needs 9 GiB; 8 GiB are allowed")
        return type("Plan", (), {"costs": ()})()

    class Pipe:
        vae = decode = None

        def plan(self, request: Request) -> None:
            return None

        def spare_memory(self, plan: None) -> int:
            return 0

    def load(path: str, **_: Any) -> Any:
        loaded.append(Path(path).name)
        return Pipe()

    monkeypatch.setattr(found, "_plan", plan)
    monkeypatch.setattr(found, "_preview", lambda pipe, model: None)
    monkeypatch.setattr(mezzotint, "load", load)
    request = Request(prompt="a")
    for name in ("a", "b", "a", "c", "a", "b"):
        found.load(name, None, request)
    assert loaded == ["a", "b", "c", "b"]  # b was used before a when c came, and c before a when b came
    assert [row["name"] for row in found.describe() if row["loaded"]] == ["a", "b"]
    with pytest.raises(BudgetError, match="needs 9 GiB"):
        found.load("large", None, request)


def test_preview_vaes_are_given_in_the_order_of_the_models(
    sd1: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first is a TAESD, the second no file, and the third model has none: a matrix shows these."""
    from mezzotint.cli.commands import run

    taesd = tmp_path / "taesd_decoder.pth"
    torch.save(TinyVAE(TinyVAEConfig()).state_dict(), taesd)
    models_given = [part for name in "abc" for part in ("--model", name)]
    vaes = ["--preview-vae", str(taesd), "--preview-vae", str(tmp_path / "missing.pth")]
    monkeypatch.setattr(sys, "argv", ["mezzotint", "serve", "--data", str(tmp_path), *models_given, *vaes])
    given: list[Settings] = []
    monkeypatch.setattr("mezzotint.server.serve", lambda settings, on_ready: given.append(settings))
    assert not run()
    found = models.Models(given[0])
    first, second, third = (found._preview(sd1, name) for name in "abc")
    assert [type(each).__name__ for each in (first, second, third)] == ["TinyPreview", "LatentPreview", "LatentPreview"]
    assert "previews of b are shown without its TAESD" in caplog.text and "missing.pth" in caplog.text
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert first.picture(latents).tobytes() == sd1.preview(str(taesd)).picture(latents).tobytes()
    assert first.picture(latents).tobytes() != second.picture(latents).tobytes()
    assert models.Models(replace(given[0], preview_every=0))._preview(sd1, "a") is None


# ---- the data folder -------------------------------------------------------------------------------------------------


def test_a_second_server_on_a_data_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mezzotint.cli.commands import run

    monkeypatch.setattr(sys, "argv", ["mezzotint", "serve", "--data", str(tmp_path / "data"), "--port", "0"])
    with DataFolder(tmp_path / "data").lock():
        assert run() == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "another server uses the data folder" in written.err
    assert "--data" in written.err
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_a_full_database_pauses_the_queue(make_stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself says that the disk is full: it may not grow."""
    monkeypatch.setattr(worker, "POLL", 0.02)
    client = make_stub()
    core: Any = client.app.state.service
    core.pause(True)
    ids = [submit(client, prompt="x" * 1000, seed=k) for k in range(3)]
    store: Store = core.store

    def limit(pages: int) -> None:
        with store._lock:
            store._write.execute(f"PRAGMA max_page_count = {pages}")

    limit(1)  # the size that it has
    refused = None
    for k in range(100):
        refused = client.post("/api/jobs", json={"request": {"prompt": "y" * 30_000, "seed": k}})
        if refused.status_code != 202:
            break
        ids.append(refused.json()["jobs"][0]["id"])
    assert refused is not None
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
    assert "disk is full" in refused.json()["error"]["message"]
    limit(2**30)
    core.pause(False)
    assert [wait_for(client, id)["state"] for id in ids] == ["done"] * len(ids)
