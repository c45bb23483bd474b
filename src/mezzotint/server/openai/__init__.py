"""OpenAI's images API, /v1. Its clients' requests are drawn by our models, through the same queue.

    body.py     the bodies of generations and edits, and their translation to requests
    images.py   generations, edits, streams of partial images, links to pictures
    models.py   the list of models

Unknown keys are ignored. Errors have that API's form.
"""

from fastapi import APIRouter

from mezzotint.server.openai import images, models

router = APIRouter(prefix="/v1", tags=["OpenAI"])
for part in (images, models):
    router.include_router(part.router)
