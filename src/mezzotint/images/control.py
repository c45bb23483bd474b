"""Conditioning pictures for ControlNets: `mezzotint.control`. One kind of them is arithmetic.

edges = mezzotint.control.canny("photo.png")
mezzotint.Request("a house", control=[{"file": "control_v11p_sd15_canny.pth", "image": edges, "end": 0.6}])
"""

from __future__ import annotations

from typing import Any, NoReturn

from PIL import Image

from mezzotint.errors import MissingExtraError, RequestError
from mezzotint.images.canny import find_edges
from mezzotint.images.init_image import open_picture, to_source

# conditioning pictures that need a network of their own, and the class of the package controlnet_aux that makes them
PREPROCESSORS = {
    "depth": "MidasDetector",
    "hed": "HEDdetector",
    "lineart": "LineartDetector",
    "lineart_anime": "LineartAnimeDetector",
    "mlsd": "MLSDdetector",
    "normal": "NormalBaeDetector",
    "openpose": "OpenposeDetector",
    "scribble": "HEDdetector",
    "softedge": "PidiNetDetector",
    "segmentation": "SamDetector",
}


def canny(image: Any, low: float = 100.0, high: float = 200.0) -> Image.Image:
    """Return the edges of a picture, white on black, as OpenCV's Canny finds them (aperture 3, |dx| + |dy|).

    Args:
        image: A picture: the path of a file, its bytes, or a PIL image.
        low: Gradient from which a pixel beside an edge belongs to it.
        high: Gradient from which a pixel is an edge.

    Raises:
        RequestError: If the picture cannot be read, or `low` is above `high`.
    """
    if not 0.0 <= low <= high:
        raise RequestError(f"low is {low} and high {high}; they must be gradients with 0 <= low <= high")
    return find_edges(open_picture(to_source(image)), low, high)


def __getattr__(name: str) -> NoReturn:
    """Say what makes the conditioning pictures that need a network of their own."""
    if name in PREPROCESSORS:
        raise MissingExtraError(
            f"mezzotint makes no {name} pictures, which need a network of their own: pip install controlnet_aux, then "
            f"controlnet_aux.{PREPROCESSORS[name]}.from_pretrained('lllyasviel/Annotators')(picture) makes one to give "
            "as image"
        )
    raise AttributeError(f"module 'mezzotint.control' has no attribute {name!r}")
