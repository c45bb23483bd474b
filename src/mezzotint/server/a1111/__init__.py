"""AUTOMATIC1111's API, /sdapi/v1: what its clients send is drawn as that program draws it, through the one queue.

    body.py       the bodies of txt2img and img2img, and the requests that they mean
    controlnet.py the extension sd-webui-controlnet, /controlnet
    drawing.py    txt2img, img2img, progress, interrupt, skip
    options.py    the options: the default model, and defaults of later requests
    listings.py   what there is: models, samplers, LoRAs, ...
    pictures.py   png-info and the extras, which draw nothing

Unknown keys are ignored, as that program does. What it knows and we do not is named in the reply's `info`.
"""

from fastapi import APIRouter

from mezzotint.server.a1111 import controlnet, drawing, listings, options, pictures

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
for part in (drawing, options, listings, pictures):
    router.include_router(part.router)
routers = (router, controlnet.router)
