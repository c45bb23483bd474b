"""Lists of models, samplers, schedules, LoRAs and so on. File names are listed names, never paths."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from mezzotint.memory import system
from mezzotint.samplers.presets import A1111_SAMPLERS, A1111_SCHEDULES, A1111_WITHOUT_SCHEDULE
from mezzotint.server.a1111.body import ALIASES, AUTOMATIC
from mezzotint.server.a1111.controlnet import NAME
from mezzotint.server.a1111.pictures import UPSCALERS
from mezzotint.server.a1111.route import Route
from mezzotint.server.api import Core
from mezzotint.server.bodies import JSONResponse

router = APIRouter(route_class=Route)
# lists of which there is nothing here: clients ask for them all the same
EMPTY = ("prompt-styles", "script-info", "hypernetworks", "face-restorers", "realesrgan-models", "extensions")


@router.get("/sd-models")
def sd_models(core: Core) -> JSONResponse:
    """List the models."""
    facts: dict[str, Any] = {"hash": None, "sha256": None, "config": None}
    return JSONResponse([{"title": name, "model_name": name, "filename": name, **facts} for name in core.models.paths])


@router.get("/sd-vae")
@router.get("/sd-modules")
def sd_vae(core: Core) -> JSONResponse:
    """List the VAEs that can be used in place of a model's own."""
    return JSONResponse([{"model_name": name, "filename": name} for name in core.models.names("vaes")])


@router.get("/loras")
def loras(core: Core) -> JSONResponse:
    """List the LoRAs that a prompt may name, as <lora:name:0.8>."""
    names = [(name, name.rpartition("/")[2]) for name in core.models.names("loras")]
    return JSONResponse([{"name": last, "alias": last, "path": name, "metadata": {}} for name, last in names])


@router.get("/embeddings")
def embeddings(core: Core) -> JSONResponse:
    """List the textual inversions; a prompt uses one by its name. Their files are not opened: no sizes are known."""
    facts = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
    names = core.models.names("embeddings")
    return JSONResponse({"loaded": {name.rpartition("/")[2]: facts for name in names}, "skipped": {}})


@router.get("/samplers")
def samplers() -> JSONResponse:
    """List the samplers."""
    found = [
        {"name": name, "aliases": [ALIASES[name]], "options": {"scheduler": _internal(preset.schedule)}}
        for name, preset in A1111_SAMPLERS.items()
    ]
    found += [{"name": name, "aliases": [ALIASES[name]], "options": {}} for name in A1111_WITHOUT_SCHEDULE]
    return JSONResponse(found)


@router.get("/schedulers")
def schedulers() -> JSONResponse:
    """List the schedules."""
    facts = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
    return JSONResponse(
        [{"name": _internal(label), "label": label, **facts} for label in (AUTOMATIC, *A1111_SCHEDULES)]
    )


def _internal(label: str) -> str:
    """Return that program's internal name of a schedule."""
    return label.lower().replace(" ", "_")


@router.get("/upscalers")
def upscalers() -> JSONResponse:
    """List the upscalers of hires fix and of the extras."""
    facts = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return JSONResponse([{"name": name, **facts} for name in UPSCALERS])


@router.get("/latent-upscale-modes")
def latent_upscale_modes() -> JSONResponse:
    """List the ways in which hires fix enlarges latents."""
    return JSONResponse([{"name": "Latent"}])


@router.get("/scripts")
def scripts(core: Core) -> JSONResponse:
    """List the scripts: controlnet, if there is a folder of ControlNets or IP-Adapters."""
    found = [NAME] if core.settings.controls or core.settings.ip_adapters else []
    return JSONResponse({"txt2img": found, "img2img": found})


@router.get("/cmd-flags")
def cmd_flags(core: Core) -> JSONResponse:
    """Return flags of the command line."""
    return JSONResponse({"api": True, "port": core.settings.port, "listen": False, "api_auth": None})


@router.get("/memory")
def memory() -> JSONResponse:
    """Return the memory of this process and of the GPU, in bytes."""
    free, used = system.available() or 0, system.resident()
    return JSONResponse({"ram": {"free": free, "used": used, "total": free + used}, "cuda": _cuda()})


def _cuda() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"error": "unavailable"}
    free, total = torch.cuda.mem_get_info()
    return {"system": {"free": free, "used": total - free, "total": total}}


@router.post("/refresh-checkpoints")
@router.post("/refresh-vae")
@router.post("/refresh-loras")
@router.post("/refresh-embeddings")
def refresh() -> JSONResponse:
    """Do nothing: folders are listed anew at each request."""
    return JSONResponse(None)


def _add_empty_list(name: str) -> None:
    def empty() -> JSONResponse:
        return JSONResponse([])

    router.add_api_route(f"/{name}", empty, methods=["GET"], summary="List nothing: there are none.")


for _name in EMPTY:
    _add_empty_list(_name)
