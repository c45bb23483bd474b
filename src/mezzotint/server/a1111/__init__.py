"""AUTOMATIC1111's API, /sdapi/v1. Its clients' requests give that program's pictures, through the same queue.

    body.py       the bodies of txt2img and img2img, and their translation to requests
    controlnet.py the extension sd-webui-controlnet, /controlnet
    drawing.py    txt2img, img2img, progress, interrupt, skip
    options.py    the options: the default model, and defaults of later requests
    listings.py   lists of models, samplers, LoRAs, ...
    pictures.py   png-info and the extras, which use no model

Unknown keys are ignored, as in that program. Its fields that are not supported here are listed in the reply's `info`.
"""

from fastapi import APIRouter

from mezzotint.server.a1111 import controlnet, drawing, listings, options, pictures

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
for part in (drawing, options, listings, pictures):
    router.include_router(part.router)
routers = (router, controlnet.router)
