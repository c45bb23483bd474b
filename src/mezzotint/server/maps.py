"""Word maps as JSON: for each word of a prompt where the network attended to it, as a small grey picture."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mezzotint.server.files import encode

if TYPE_CHECKING:
    from mezzotint.explain.maps import Explanation

SIDE = 128  # pixels of the longer side of a map


def describe_maps(explanation: Explanation) -> dict[str, Any]:
    """Return the words of a prompt, each with its share of the attention and its map as a PNG file in base64."""
    words = []
    for word in explanation.words:
        heat = explanation.map(word)
        top = float(heat.max())
        levels = (heat / top * 255 if top > 0 else heat).round().numpy().astype(np.uint8)
        image = Image.fromarray(levels)
        image.thumbnail((SIDE, SIDE))
        words.append(
            {
                "text": word.text,
                "start": word.start,
                "end": word.end,
                "share": round(explanation.share(word), 5),
                "png": base64.b64encode(encode(image, "PNG")).decode(),
            }
        )
    return {"prompt": explanation.result.request.prompt, "words": words}
