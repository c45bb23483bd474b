"""The service: the operations of the queue, which all APIs share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from mezzotint.devices import all_devices
from mezzotint.errors import MezzotintError, WriteError
from mezzotint.server.errors import ConflictError, InvalidError, NotFoundError, ServerError, UnavailableError
from mezzotint.server.events import Event, Events
from mezzotint.server.files import SPARE_DISK, DataFolder
from mezzotint.server.history import History
from mezzotint.server.models import Models
from mezzotint.server.schema import Translator
from mezzotint.server.settings import Settings
from mezzotint.server.store import BULK, INTERACTIVE, QUEUED, RUNNING, Job, NewJob, Store
from mezzotint.server.worker import Progress, Worker

log = logging.getLogger("mezzotint.server")
PRIORITIES = {"interactive": INTERACTIVE, "bulk": BULK}
DRAIN = 15.0  # seconds for the running picture when the server stops
STEP = 3.0  # further seconds for the end of a step; uvicorn adds 2: 10 of the promised 30 are left for a busy machine
FORGET = 3600.0  # seconds after which a stateless server deletes uploads, and calls whose clients went away
RECHECK = 5.0  # seconds after which a waiter looks into the store itself


class Service:
    """The queue with its store, workers, models and events.

    Args:
        settings: The settings of the server.
        models: The models, or None for those of the settings.
    """

    def __init__(self, settings: Settings, models: Models | None = None) -> None:
        self.settings = settings
        self.models = models or Models(settings)
        self.events = Events()
        self.stopping = False
        self._stop_by = 0.0
        self.started = time.time()
        self._cleanup = ExitStack()
        try:
            self.folder = DataFolder(settings.data)
            self._cleanup.enter_context(self.folder.lock())
            path = None if settings.stateless else settings.data / "mezzotint.db"
            self.store = Store(path, settings.limits.queue)
            self._cleanup.callback(self.store.close)
        except BaseException:
            self._cleanup.close()
            raise
        self.history = History(self.store, self.folder, settings.keep)
        self.translator = Translator(settings, self.models, self.folder, self.history)
        devices = settings.devices or all_devices()
        self.models.device = devices[0]
        self.workers = [self._make_worker(device) for device in devices]

    def _make_worker(self, device: str) -> Worker:
        models = self.models if device == self.models.device else self.models.on(device)
        worker = Worker(
            self.store,
            self.folder,
            models,
            self.translator,
            self.events,
            self.history,
            preview_every=self.settings.preview_every,
            share_batches=self.settings.share_batches and device.startswith("cuda"),
        )
        worker.tell_queue = self._publish_queue
        return worker

    def start(self) -> None:
        """Queue again what was running when the last process ended, and start the workers."""
        if self.settings.share_batches and not any(worker.share_batches for worker in self.workers):
            log.warning("--share-batches changes nothing: jobs never share a batch on %s", self.models.device)
        self.store.requeue()
        for worker in self.workers:
            worker.start()

    def drain(self) -> bool:
        """Refuse new work, let the running pictures finish, or queue their jobs again, and end the streams of events.

        Returns:
            Whether the workers have ended.
        """
        self.stopping = True
        self._stop_by = self._stop_by or time.monotonic() + DRAIN
        self._publish_queue()
        for worker in self.workers:
            worker.stop()
        if not self._join(self._stop_by):
            self.hurry()
            self._join(self._stop_by + STEP)  # of a longer step the process ends in the middle
        self.events.close()
        return not self.working

    def hurry(self) -> None:
        """End the running jobs after their current step; for good, and from a signal's handler too."""
        for worker in self.workers:
            worker.hurry()

    def _join(self, until: float) -> bool:
        """Wait for the workers to end, until a time.monotonic(); return whether they have."""
        return all([worker.join(until - time.monotonic()) for worker in self.workers])

    def stop(self) -> None:
        """Drain, and close the data folder."""
        if self.drain():
            self._cleanup.close()

    @property
    def default_model(self) -> str:
        """The listed name of the model that a request without one gets: the chosen one, as long as it is listed."""
        chosen = self.store.option("model")
        return chosen if chosen in self.models.paths else self.models.default

    def find_model(self, name: str | None) -> str:
        """Return the listed name of a model; None is the default one. Raises InvalidError if it is not listed."""
        return self.default_model if name is None else self.models.find_model(name)

    @property
    def notice(self) -> str | None:
        """A remark for the user on the options."""
        chosen = self.store.option("model")
        if chosen is None or chosen in self.models.paths:
            return None
        return f"the chosen model {chosen[:100]!r} is not listed any more; {self.models.default} is used in its place"

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        requests: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        vae: str | None = None,
        priority: str = "interactive",
        dialect: str = "api",
    ) -> list[Job]:
        """Check requests and queue a job for each, all or none. They are on the disk when this returns.

        Args:
            requests: Fields of a JobBody; pictures may also be bytes.
            model: A listed name; None is the default model, which an option may set.
            vae: A listed name; None is the model's own.
            priority: "interactive" or "bulk".
            dialect: The API that they came by.

        Raises:
            ServerError: If one of them is wrong, the queue is full, or the server is stopping.
        """
        self.check_accepting()
        name = self.find_model(model)
        if vae is not None:
            self.models.find("vaes", vae, "vae")
        jobs = []
        for request in requests:
            stored = self.translator.store(request, name)
            self._check_fits(name, vae, stored)
            jobs.append(NewJob(stored, name, vae, PRIORITIES[priority], dialect))
        return self._enqueue(jobs)

    def draw_again(self, picture: str, kind: str) -> Job:
        """Queue a job that draws a picture again: "verify" its bits, or record its word "maps".

        Raises:
            NotFoundError: If there is no such picture.
            ConflictError: If its job is not known any more.
        """
        self.check_accepting()
        found = self.history.get(picture)
        try:
            job = self.store.get(found.job)
        except NotFoundError:
            raise ConflictError("the request of this picture is no longer stored") from None
        stored = dict(job.request)
        if kind == "maps":
            stored |= {"seed": found.seed, "count": 1}
            stored.pop("batch", None)
        self.translator.request(stored)  # its files are still there
        return self._enqueue([NewJob(stored, job.model, job.vae, BULK, "api", kind, picture)])[0]

    def _enqueue(self, jobs: Sequence[NewJob]) -> list[Job]:
        try:
            added = self.store.submit(jobs)
        except WriteError as error:
            raise UnavailableError(f"nothing can be accepted: {error}", retry_after=30) from None
        for job in added:
            self.events.publish("job", job.to_dict(), job.id)
        self._publish_queue()
        for worker in self.workers:
            worker.wake()
        return added

    def cancel(self, id: str) -> Job:
        """Cancel a job: one that waits at once, a running one after its current step. Raises NotFoundError."""
        job = self.store.cancel(id, running=True)
        for worker in self.workers:
            worker.stop_job(id)
        self.events.publish("job", job.to_dict(), job.id)
        self._publish_queue()
        return job

    def move(self, id: str, before: str) -> None:
        """Move a queued job before another one, or to "first" or "last"."""
        self.store.move(id, None if before in ("first", "last") else before, last=before == "last")
        self._publish_queue()

    def pause(self, paused: bool) -> None:
        """Pause the queue after the running jobs, or resume it."""
        for worker in self.workers:
            worker.pause(paused)
        self._publish_queue()

    def queue(self) -> dict[str, Any]:
        """Return the state of the queue."""
        running = [(worker.models.device, worker.progress) for worker in self.workers]
        shown = [{"device": device, "running": each.to_dict() if each else None} for device, each in running]
        return {
            "paused": self.paused,
            "waits_for_disk": self.waits_for_disk or None,
            "stopping": self.stopping,
            "order": self.store.order(),
            "running": next((each["running"] for each in shown if each["running"]), None),
            "devices": shown,
        }

    @property
    def running(self) -> list[Progress]:
        """The progress of each running job, in the order of the devices."""
        return [found for worker in self.workers if (found := worker.progress)]

    @property
    def progress(self) -> Progress | None:
        """The first of them, if any."""
        return next(iter(self.running), None)

    @property
    def paused(self) -> bool:
        """Whether the queue is paused."""
        return self.workers[0].paused

    @property
    def waits_for_disk(self) -> str:
        """The sentence of a worker that waits for room on the disk, or ""."""
        return next((worker.waits_for_disk for worker in self.workers if worker.waits_for_disk), "")

    @property
    def alive(self) -> bool:
        """Whether each worker runs."""
        return all(worker.alive for worker in self.workers)

    @property
    def working(self) -> bool:
        """Whether any worker is still running, such as one whose step outlasts the drain."""
        return any(worker.alive for worker in self.workers)

    @property
    def steps_done(self) -> int:
        """Denoising steps since the start."""
        return sum(worker.steps_done for worker in self.workers)

    async def wait(self, ids: Sequence[str]) -> list[Job]:
        """Wait until these jobs have ended, and return them. Raises UnavailableError when the server stops first."""
        left = set(ids)

        def ends(event: Event) -> bool:
            return event.name == "job" and event.job in left and event.read()["state"] not in (QUEUED, RUNNING)

        async with aclosing(self.events.subscribe(wanted=ends, beat=RECHECK)) as events:
            while True:
                jobs = await asyncio.to_thread(self._get_all, ids)
                left.intersection_update(job.id for job in jobs if not job.ended)
                if not left:
                    return jobs
                async for event in events:
                    if event is not None:
                        left.discard(event.job)
                    if event is None or not left:
                        break
                else:
                    raise UnavailableError("the server is stopping; the job is drawn after the next start")

    def _get_all(self, ids: Sequence[str]) -> list[Job]:
        return [self.store.get(id) for id in ids]

    def forget(self, ids: Sequence[str]) -> None:
        """Delete the jobs of a stateless server's call that was answered or whose client disconnected."""
        if not self.settings.stateless:
            return
        for job in self._get_all(ids):
            if not job.ended:
                self.cancel(job.id)
            for picture in job.pictures:
                self.folder.remove("pictures", picture.id)
        self.store.forget(ids, time.time() - FORGET)
        self.history.forget_uploads(time.time() - FORGET)

    def check_accepting(self) -> None:
        """Check that the server accepts new jobs. Raises UnavailableError."""
        if self.stopping:
            raise UnavailableError("the server is stopping", retry_after=10)
        if self.folder.free() < SPARE_DISK:
            raise UnavailableError("the disk of the data folder is full", retry_after=30)

    def _check_fits(self, model: str, vae: str | None, stored: Mapping[str, Any]) -> None:
        """Check that a request fits the memory that the server was given, and what controls it the model."""
        if self.settings.memory is None and not (stored.get("control") or stored.get("ip_adapter")):
            return
        try:
            request = self.translator.request(stored)
            if self.settings.memory is None:
                self.models.check_controls(model, request)
            else:
                self.models.plan(model, vae, request)
        except ServerError:
            raise
        except MezzotintError as error:
            raise InvalidError(self.translator.message(error)) from None

    def _publish_queue(self) -> None:
        self.events.publish("queue", self.queue)
