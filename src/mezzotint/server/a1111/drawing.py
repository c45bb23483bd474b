"""txt2img, img2img, and their progress.

A call is answered when its pictures are finished. Each of its iterations (n_iter) is a job, so that one can be skipped
while the others continue. `interrupt` cancels the call whose job is running; its reply has the finished pictures.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from mezzotint.errors import RequestError
from mezzotint.request import Request as Drawing
from mezzotint.server.a1111 import options
from mezzotint.server.a1111.body import IDLE, Image2Image, Task, Text2Image, rename, translate, unknown
from mezzotint.server.a1111.route import Route
from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse, body_schema
from mezzotint.server.dialects import failure, read_body
from mezzotint.server.errors import InvalidError
from mezzotint.server.service import Service
from mezzotint.server.store import FAILED, QUEUED, Job
from mezzotint.server.worker import Progress

router = APIRouter(route_class=Route)


@dataclass(eq=False)
class Call:
    """A call that is waiting for its pictures."""

    jobs: list[str]
    timestamp: str = field(default_factory=lambda: time.strftime("%Y%m%d%H%M%S"))
    interrupted: bool = False
    skipped: bool = False


def calls(request: Request) -> list[Call]:
    """Return the waiting calls of this application."""
    state = request.app.state
    if not hasattr(state, "a1111_calls"):
        state.a1111_calls = []
    found: list[Call] = state.a1111_calls
    return found


@router.post("/txt2img", openapi_extra=body_schema(Text2Image))
async def text_to_image(request: Request, core: Core) -> JSONResponse:
    """Generate pictures from a prompt."""
    return await _draw(request, core, await read_body(request, Text2Image))


@router.post("/img2img", openapi_extra=body_schema(Image2Image))
async def image_to_image(request: Request, core: Core) -> JSONResponse:
    """Generate pictures from a prompt and init images, or repaint a masked part of them."""
    return await _draw(request, core, await read_body(request, Image2Image))


async def _draw(request: Request, core: Service, body: Text2Image) -> JSONResponse:
    task, jobs = await run_in_threadpool(_submit, core, body)
    call = Call([job.id for job in jobs])
    waiting = calls(request)
    waiting.append(call)
    try:
        jobs = await core.wait(call.jobs)
        failed = next((job for job in jobs if job.state == FAILED), None)
        if failed is not None:
            raise failure(failed)
        images, texts = await run_in_threadpool(_read, core, jobs)
    finally:
        waiting.remove(call)
        core.forget(call.jobs)
    known = {*type(body).model_fields, *IDLE}
    parameters = {name: value for name, value in body.model_dump().items() if name in known}
    if isinstance(body, Image2Image) and not body.include_init_images:
        parameters |= {"init_images": None, "mask": None}
    info = json.dumps(_info(body, task, jobs, texts, call), ensure_ascii=False)
    return JSONResponse({"images": images if body.send_images else [], "parameters": parameters, "info": info})


def _submit(core: Service, body: Text2Image) -> tuple[Task, list[Job]]:
    """Queue the iterations of a body."""
    total, limit = body.pictures * body.n_iter, core.settings.limits.count
    if total > limit:
        raise InvalidError(f"batch_size times n_iter is {total:,} pictures; at most {limit:,} are allowed", "n_iter")
    in_force = options.in_force(core, body.override_settings)
    try:
        model, vae = in_force["sd_model_checkpoint"], in_force["sd_vae"]
        refiner = options.find_refiner(core.models, body.refiner_checkpoint, model)
        task = translate(body, in_force, loads_networks=core.settings.loras is not None, refiner=refiner)
        task.notes += options.ignored(body.override_settings)
        return task, core.submit(task.requests, model=model, vae=vae, dialect="a1111")
    except InvalidError as error:
        raise rename(error) from None
    except RequestError as error:
        word = str(error).split(" ", 1)[0]
        raise rename(InvalidError(str(error), word if word in Drawing.model_fields else None)) from None


def _read(core: Service, jobs: list[Job]) -> tuple[list[str], list[str]]:
    """Return the pictures of jobs in base64, and the text that each carries."""
    from mezzotint.images.io import read_metadata

    images, texts = [], []
    for picture in (picture for job in jobs for picture in job.pictures):
        path = core.folder.file("pictures", picture.id)
        images.append(base64.b64encode(path.read_bytes()).decode())
        texts.append(read_metadata(path, ["parameters"]).get("parameters", ""))
    return images, texts


def _info(body: Text2Image, task: Task, jobs: list[Job], texts: list[str], call: Call) -> dict[str, Any]:
    """Return the facts about a call's pictures, by that program's names."""
    pictures = [(job, picture) for job in jobs for picture in job.pictures]
    varies = body.subseed_strength != 0.0
    clip_skip = task.settings["CLIP_stop_at_last_layers"]
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(pictures),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(pictures),
        "seed": task.seed,
        "all_seeds": [picture.seed for _, picture in pictures],
        "subseed": task.subseed,
        "all_subseeds": [
            job.request["variation_seed"] if varies else task.subseed + k for k, (job, _) in enumerate(pictures)
        ],
        "subseed_strength": body.subseed_strength,
        "width": body.width,
        "height": body.height,
        "sampler_name": task.sampler[0],
        "scheduler": task.sampler[1],
        "cfg_scale": body.cfg_scale,
        "steps": body.steps,
        "batch_size": body.pictures,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": jobs[0].model,
        "sd_model_hash": None,
        "sd_vae_name": jobs[0].vae,
        "sd_vae_hash": None,
        "seed_resize_from_w": body.seed_resize_from_w,
        "seed_resize_from_h": body.seed_resize_from_h,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": call.timestamp,
        "clip_skip": clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": _version(),
        "unsupported": task.notes,
        "unknown": unknown(body),
    }


def _version() -> str:
    from mezzotint import __version__

    return f"mezzotint {__version__}"


# ---- how far it is ---------------------------------------------------------------------------------------------------


@router.get("/progress")
def progress(request: Request, core: Core, skip_current_image: bool = False) -> JSONResponse:
    """Return the progress of the running call; 0 with a job count of 0 means that the queue is empty."""
    found = _running_call(request, core)
    running, job = found[1:] if found else (core.progress, "")
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    share, left, image = 0.0, 0.0, None
    if running is None:
        state["job_count"] = core.store.counts()[QUEUED]
    else:
        job = job or running.job
        call = found[0] if found else Call([job])
        place, count = call.jobs.index(job), len(call.jobs)
        done = running.step / running.steps if running.steps else 0.0
        share = min(0.01 + (place + done) / count, 1.0)  # never 0 while it runs
        seconds = running.seconds_left or 0.0
        left = seconds + (count - 1 - place) * (seconds / (1 - done) if done < 1 else 0.0)
        state |= {
            "skipped": call.skipped,
            "interrupted": call.interrupted,
            "job": f"Batch {place + 1} out of {count}" if count > 1 else "",
            "job_count": count,
            "job_timestamp": call.timestamp,
            "job_no": place,
            "sampling_step": running.step,
            "sampling_steps": running.steps,
        }
        if not skip_current_image and (preview := running.preview(job)):
            image = base64.b64encode(preview).decode()
    return JSONResponse(
        {"progress": share, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}
    )


@router.post("/interrupt")
def interrupt(request: Request, core: Core) -> JSONResponse:
    """Cancel the running call. Jobs of other APIs continue."""
    found = _running_call(request, core)
    if found is not None:
        call, *_ = found
        call.interrupted = True
        for job in reversed(call.jobs):  # the running one last, so that none of the others starts
            core.cancel(job)
    return JSONResponse({})


@router.post("/skip")
def skip(request: Request, core: Core) -> JSONResponse:
    """Cancel the running iteration of a call and continue with the next one."""
    found = _running_call(request, core)
    if found is not None:
        call, _, job = found
        call.skipped = True
        core.cancel(job)
    return JSONResponse(None)


def _running_call(request: Request, core: Service) -> tuple[Call, Progress, str] | None:
    """Return the first call whose job is running, its progress, and the job."""
    running = ((each, job) for each in core.running for job in each.jobs)
    waiting = calls(request)
    return next(((call, each, job) for each, job in running for call in waiting if job in call.jobs), None)
