"""Canny's edges against OpenCV's, of which the digests of its results stand here (5.0.0; it is a download of 60 MB)."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from mezzotint.images.control import canny

THRESHOLDS = ((100, 200), (50, 150), (0, 0), (20.5, 300), (300, 900), (10, 10))


def picture(name: str) -> Image.Image:
    """Noise, grey noise, slopes with sharp borders, and pictures of one line."""
    draw = np.random.default_rng(7)
    if name == "noise":
        levels = draw.integers(0, 256, (33, 97, 3))
    elif name == "grey":
        levels = np.repeat(draw.integers(0, 256, (48, 64, 1)), 3, 2)
    elif name == "line":
        levels = draw.integers(0, 256, (1, 40, 3))
    else:
        y, x = np.mgrid[:90, :120]
        inside = (y - 40) ** 2 + (x - 50) ** 2 < 900
        levels = np.stack([np.where(inside, 250, x + y), np.where(x > 2 * y, 30, y), (x * y) % 256], 2)
    return Image.fromarray(levels.astype(np.uint8))


def digest(edges: np.ndarray) -> str:  # type: ignore[type-arg]
    return hashlib.sha256(np.ascontiguousarray(edges, dtype=np.uint8).tobytes()).hexdigest()[:16]


# cv2.Canny(picture, low, high), by picture, for each of THRESHOLDS
OPENCV: dict[str, list[str]] = {
    "noise": [
        "39b643b3eebc30b8",
        "39b643b3eebc30b8",
        "39b643b3eebc30b8",
        "39b643b3eebc30b8",
        "f8693eb1d0eb49c9",
        "39b643b3eebc30b8",
    ],
    "grey": [
        "bba82ca001b68102",
        "bba82ca001b68102",
        "bba82ca001b68102",
        "8947651820aee09c",
        "8838b91edcdc3d77",
        "bba82ca001b68102",
    ],
    "line": [
        "66949d46490400f9",
        "66949d46490400f9",
        "66949d46490400f9",
        "66949d46490400f9",
        "2c34ce1df23b838c",
        "66949d46490400f9",
    ],
    "shapes": [
        "cd24b595cb5583aa",
        "57439d6930c8c610",
        "57439d6930c8c610",
        "c087835cd5cf8a7b",
        "668a04c406f56bfb",
        "57439d6930c8c610",
    ],
}


@pytest.mark.parametrize("name", OPENCV)
def test_edges_are_those_of_opencv(name: str) -> None:
    for (low, high), expected in zip(THRESHOLDS, OPENCV[name], strict=True):
        edges = np.asarray(canny(picture(name), low, high))
        assert (edges == edges[..., :1]).all()
        assert digest(edges[..., 0]) == expected, (low, high)
