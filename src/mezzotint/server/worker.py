"""The worker of a device: a thread that claims jobs, draws them, and writes each picture and then its row.

A picture is in the store only when its file is on the disk. The name of a file follows from the job and the place, so
that a job which starts again after a kill writes the same files. A full disk pauses the worker, which keeps the picture
and writes it when there is room.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from mezzotint.errors import MezzotintError, WriteError
from mezzotint.files import DISK_ERRORS
from mezzotint.server.batches import find_alike
from mezzotint.server.entries import KINDS
from mezzotint.server.events import Events
from mezzotint.server.files import SPARE_DISK, DataFolder, encode, thumbnail
from mezzotint.server.history import History
from mezzotint.server.models import LoadedModel, Models
from mezzotint.server.schema import Translator
from mezzotint.server.store import Job, Picture, Store

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mezzotint.request import Request

log = logging.getLogger("mezzotint.server")
POLL = 1.0  # seconds between two looks at the disk while it is full
PREVIEW_SIDE = 512  # pixels of the longer side


class StopJob(BaseException):
    """Raised in a step to end a run: the job is cancelled, skipped or queued again."""


class Preview:
    """Latents, converted to a picture when a client reads it; the worker does not wait for that."""

    def __init__(self, job: str, picture: Callable[[Tensor], Image], latents: Tensor) -> None:
        self._job, self._picture, self._latents = job, picture, latents

    @cached_property
    def jpeg(self) -> bytes:
        """A JPEG file."""
        image = self._picture(self._latents)
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return encode(image, "JPEG", quality=80)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"job": self._job, "jpeg": base64.b64encode(self.jpeg).decode()}


@dataclass
class Progress:
    """The progress of a running job or batch.

    Attributes:
        job: The id of the job, of several in a batch the first that is not cancelled.
        jobs: The ids of all of them.
        step: Steps done.
        steps: Steps in all.
        picture: The index of the picture that is drawn, in the job or in the batch.
        loading: Whether the model is still being loaded.
        started: When the first step began, by time.monotonic.
        estimates: The last preview of each job.
    """

    job: str
    jobs: tuple[str, ...]
    step: int = 0
    steps: int = 0
    picture: int = 0
    loading: bool = True
    started: float = 0.0
    estimates: dict[str, Preview] = field(default_factory=dict)

    def preview(self, job: str) -> bytes:
        """Return the last preview of a job, a JPEG file; b"" before the first."""
        found = self.estimates.get(job)
        return found.jpeg if found else b""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step, as long as the steps so far took; None before the first."""
        if not self.step:
            return None
        return (time.monotonic() - self.started) / self.step * max(self.steps - self.step, 0)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, without the preview."""
        left = self.seconds_left
        return {name: getattr(self, name) for name in ("job", "step", "steps", "picture", "loading")} | {
            "seconds_left": None if left is None else round(left, 2)
        }


class Worker:
    """Draws jobs of a store on one device, one after the other.

    Args:
        store: The jobs.
        folder: Where the files are written.
        models: Loads the models on the device.
        translator: Makes Requests of stored ones.
        events: Receives what happens, for streams of events.
        history: Records verdicts, and deletes what is above the bound.
        preview_every: Steps between two previews; 0 is none.
        share_batches: Whether jobs that differ only in prompt and seed share a batch.
    """

    def __init__(
        self,
        store: Store,
        folder: DataFolder,
        models: Models,
        translator: Translator,
        events: Events,
        history: History,
        *,
        preview_every: int = 1,
        share_batches: bool = False,
    ) -> None:
        self.store, self.folder, self.models, self.translator = store, folder, models, translator
        self.events, self.history = events, history
        self.preview_every, self.share_batches = preview_every, share_batches
        self.progress: Progress | None = None
        self.waits_for_disk = ""  # the sentence, while it does
        self.paused = bool(store.option("paused", False))
        self.tell_queue: Callable[[], None] = lambda: None
        self.steps_done = 0
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._dropped: set[str] = set()  # jobs of the run whose pictures nobody waits for
        self._hurried = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="mezzotint-worker", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for a job immediately."""
        self._wake.set()

    def pause(self, paused: bool) -> None:
        """Pause before the next job, or resume."""
        self.store.set_option("paused", paused)
        self.paused = paused
        self.wake()

    def stop_job(self, id: str) -> None:
        """End the run of a job after its current step, if it runs; a batch goes on for the others."""
        progress = self.progress
        if progress is not None and id in progress.jobs:
            self._dropped.add(id)

    def hurry(self) -> None:
        """End after the current step. It takes no lock, so that a signal's handler may call it."""
        self._hurried = True

    def stop(self) -> None:
        """End after the current picture; a job that has more is queued again."""
        self._stopping.set()
        self.wake()

    def join(self, timeout: float) -> bool:
        """Wait some seconds for the end of the thread; return whether it has ended."""
        if self._thread is not None:
            self._thread.join(max(timeout, 0))
        return not self.alive

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self._stopping.is_set() or self._hurried):
            self._wake.clear()
            try:
                jobs = [] if self.paused or not self._has_room() else self._claim()
            except MezzotintError as error:
                self._say_disk(str(error))
                jobs = []
            if not jobs:
                self._wake.wait(POLL if self.waits_for_disk else None)
                continue
            try:
                self.perform(jobs)
            except Exception:
                log.exception("job %s", jobs[0].id)
                time.sleep(POLL)

    def _claim(self) -> list[Job]:
        """Claim the next job, or a batch of jobs that fits the memory."""
        together = find_alike(self.store) if self.share_batches else []
        if len(together) > 1:
            try:
                job = self.store.get(together[0])
                request = self.translator.request(job.request)
                together = together[: self.models.batch_for(job.model, job.vae, request, len(together))]
            except MezzotintError:  # which is said when the job is drawn
                together = []
        return self.store.claim(together)

    def perform(self, jobs: Sequence[Job]) -> None:
        """Run a claimed job, or the jobs of a batch, to the end."""
        ids = tuple(job.id for job in jobs)
        self._dropped = set()
        self.progress = Progress(ids[0], ids, started=time.monotonic())
        alone: Sequence[Job] = ()
        try:
            stored = [self.store.get(id) for id in ids]
            left = [job.id for job in stored if job.state == "running"]
            self._dropped.update({*ids} - {*left})  # cancelled meanwhile; of a batch perhaps long ago, or drawn
            self.progress.job = left[0] if left else ids[0]
            self.tell_queue()
            self._publish_jobs(stored)
            if left and len(jobs) > 1:
                self._draw(jobs)
            elif left:
                {"draw": self._draw, "verify": self._verify, "maps": self._explain}[jobs[0].kind](jobs)
        except StopJob:
            if self._stopping.is_set() or self._hurried:
                self._requeue(ids)
        except WriteError as error:
            log.warning("job %s: %s", ids[0], error)
            self._requeue(ids)
        except MezzotintError as error:
            alone = self._fail(jobs, type(error).__name__, self.translator.message(error))
        except Exception as error:
            log.exception("job %s", ids[0])
            alone = self._fail(jobs, "InternalError", f"this is a bug in mezzotint ({type(error).__name__})")
        finally:
            if self.progress is not None:
                self._tell_end(ids)
        for job in alone:
            if self._stopping.is_set() or self._hurried:
                self._requeue([job.id])
            else:
                self.perform([job])
        if not self._stopping.is_set():
            self.history.clean()

    def _requeue(self, ids: Sequence[str]) -> None:
        with suppress(StopJob):  # the disk is full: the next start queues them again
            for id in ids:
                self._patiently(partial(self.store.requeue, id))

    def _fail(self, jobs: Sequence[Job], type: str, message: str) -> Sequence[Job]:
        """Mark a job as failed; return the jobs of a batch instead, each to be drawn alone for its own error."""
        if len(jobs) > 1:
            return jobs
        codes = {"BudgetError": "out_of_memory", "CheckpointError": "bad_file", "InternalError": "internal"}
        error = {"type": type, "message": message, "code": codes.get(type, "invalid_request")}
        self._patiently(lambda: self.store.fail(jobs[0].id, error))
        return ()

    def _load(self, job: Job, request: Request) -> LoadedModel:
        """Load the model of a job, and tell that its first step begins."""
        model = self.models.load(job.model, job.vae, request)
        assert self.progress
        self.progress.loading, self.progress.started = False, time.monotonic()
        self.tell_queue()
        return model

    def _draw(self, jobs: Sequence[Job]) -> None:
        first, shared = jobs[0], len(jobs) > 1
        requests = [self.translator.request(job.request) for job in jobs]
        if shared:
            requests = [request.replace(batch=len(jobs)) for request in requests]
        largest = requests[0].replace(count=len(jobs)) if shared else requests[0]
        model = self._load(first, largest)
        self._check_stop()
        done = {picture.place for picture in first.pictures}

        def on_image(place: int, image: Image) -> None:
            if shared:
                if jobs[place].id not in self._dropped:
                    self._keep(jobs[place], requests[place], 0, image)
            elif place not in done:
                self._keep(first, requests[0], place, image)
            if self.progress:
                self.progress.picture = place + 1
            if shared:
                return
            if place + 1 == requests[0].count:
                self._tell_end([first.id])  # before the rest of the run, for which no client need wait
            elif self._stopping.is_set():
                raise StopJob  # the others are drawn after the next start

        hooks: Any = {"on_step": self._on_step(jobs), "on_estimate": self._on_estimate(jobs, model)}
        model.pipe.generate(requests if shared else requests[0], on_image=on_image, **hooks)

    def _keep(self, job: Job, request: Request, place: int, image: Image) -> None:
        """Write a picture, and then its row."""
        from mezzotint.images.io import encode_file

        data = encode_file(image, "PNG")
        id = picture_id(job.id, place)
        record = json.loads(image.info.get("mezzotint", "{}"))  # our own text, which needs no check
        picture = Picture(
            id=id,
            job=job.id,
            place=place,
            seed=record.get("seed", (request.seed or 0) + place),
            width=image.width,
            height=image.height,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            flagged=record.get("flagged"),
            prompt=request.prompt,
            model=job.model,
            created=time.time(),
        )
        last = place + 1 == request.count

        def write() -> None:
            self.folder.write("pictures", id, data)
            self.store.add_picture(picture, last=last)

        self._patiently(write, len(data))
        self.events.publish("picture", picture.to_dict(), job.id)

    def _on_step(self, jobs: Sequence[Job]) -> Callable[[int, int], None]:
        def on_step(done: int, total: int) -> None:
            self._check_stop()
            self.steps_done += 1
            if self.progress:
                self.progress.step, self.progress.steps = done, total
                for job in jobs:
                    self.events.publish("step", self.progress.to_dict() | {"job": job.id}, job.id)

        return on_step

    def _on_estimate(self, jobs: Sequence[Job], model: LoadedModel) -> Callable[[Tensor], None] | None:
        preview = model.preview
        if preview is None or not self.preview_every:
            return None

        def on_estimate(latents: Tensor) -> None:
            if not self.progress or self.progress.step % self.preview_every:
                return
            parts = [latents[k : k + 1] for k in range(len(latents))] if len(jobs) > 1 else [latents]
            for job, part in zip(jobs[self.progress.picture if len(jobs) > 1 else 0 :], parts, strict=False):
                estimate = self.progress.estimates[job.id] = Preview(job.id, preview.picture, part)
                self.events.publish("preview", estimate.to_dict, job.id)

        return on_estimate

    def _check_stop(self) -> None:
        progress = self.progress
        if self._hurried or (progress and all(id in self._dropped for id in progress.jobs)):
            raise StopJob

    # ---- a picture again ---------------------------------------------------------------------------------------------

    def _verify(self, jobs: Sequence[Job]) -> None:
        """Generate a picture again and compare the pixels."""
        from mezzotint.again import judge, read_source, threads

        (job,) = jobs
        source = read_source(self.folder.file("pictures", str(job.target)))
        record = source.record
        assert record  # each of our files has one
        request = self.translator.request(job.request)
        model = self._load(job, request)
        names = ("image", "mask", *KINDS, "embeddings", "loras", "lora_folder", "wildcards", "refiner")
        with threads(record):
            files = {name: getattr(request, name) for name in names}
            images = model.pipe.draw(record.jobs(files), on_step=self._on_step(jobs))
        verdict = judge(source, images[record.place])
        result = {"identical": verdict.identical, "sentences": verdict.sentences, "at": time.time()}
        self._patiently(lambda: self.history.set_verified(str(job.target), result))
        self._patiently(lambda: self.store.finish(job.id, result))
        found = self.history.get(str(job.target), deleted=True)
        self.events.publish("picture", found.to_dict(), found.job)

    def _explain(self, jobs: Sequence[Job]) -> None:
        """Draw a picture again and record where the network attended to each word."""
        from mezzotint.explain.maps import explain
        from mezzotint.server.maps import describe_maps

        (job,) = jobs
        request = self.translator.request(job.request)
        model = self._load(job, request)
        explanation = explain(model.pipe, request, on_step=self._on_step(jobs))
        data = json.dumps(describe_maps(explanation)).encode()
        self._patiently(lambda: self.folder.write("maps", str(job.target), data), len(data))
        self._patiently(lambda: self.store.finish(job.id, {"maps": f"/api/pictures/{job.target}/maps"}))

    # ---- the disk ----------------------------------------------------------------------------------------------------

    def _has_room(self) -> bool:
        """Return whether the disk has room for a picture; publish it if not."""
        free = self.folder.free()
        if free >= SPARE_DISK:
            self._say_disk("")
            return True
        self._say_disk(
            f"the disk of the data folder is full: {free // 2**20} MiB are free, and {SPARE_DISK // 2**20} MiB are "
            "needed; drawing goes on when there is room"
        )
        return False

    def _patiently(self, write: Callable[[], Any], size: int = 0) -> None:
        """Write, and retry while the disk is full."""
        while True:
            try:
                write()
            except (OSError, WriteError) as error:
                cause = error.__cause__ if isinstance(error, WriteError) else error
                if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
                    raise
                self._say_disk(
                    f"the disk of the data folder is full ({cause}): {max(size, 2**20) / 2**20:.0f} MiB are needed; "
                    "the picture is kept and written when there is room"
                )
                if self._stopping.wait(POLL):
                    raise StopJob from None
            else:
                self._say_disk("")
                return

    def _say_disk(self, sentence: str) -> None:
        if sentence != self.waits_for_disk:
            self.waits_for_disk = sentence
            (log.warning if sentence else log.info)(sentence or "the disk has room again")
            self.tell_queue()

    def _publish_jobs(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.events.publish("job", job.to_dict(), job.id)

    def _tell_end(self, ids: Sequence[str]) -> None:
        """Publish that jobs are no longer running."""
        self.progress = None
        self._publish_jobs([self.store.get(id) for id in ids])
        self.tell_queue()


def picture_id(job: str, place: int) -> str:
    """Return the id of a picture, which follows from its job and its place."""
    return hashlib.sha256(f"{job}:{place}".encode()).hexdigest()[:32]


def make_thumbnail(folder: DataFolder, id: str) -> bytes:
    """Return the thumbnail of a picture, made when it is first asked for."""
    from mezzotint.images.io import read_picture

    path = folder.file("thumbnails", id)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        data = thumbnail(read_picture(folder.file("pictures", id)))
        try:
            folder.write("thumbnails", id, data, durable=False)
        except OSError:
            log.warning("the thumbnail of %s cannot be kept", id)
        return data
