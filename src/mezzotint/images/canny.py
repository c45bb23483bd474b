"""Canny's edge detector (Canny 1986), in the integers that OpenCV's has: Sobel of 3x3, |dx| + |dy|."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from scipy.ndimage import correlate1d, label  # type: ignore[import-untyped]

TAN_22 = 13573  # tan(22.5 degrees) in 1/2^15, as OpenCV rounds it
SHIFT = 15


def find_edges(picture: Image.Image, low: float, high: float) -> Image.Image:
    """Return the edges of an RGB picture, white on black; of the three channels the one with the largest gradient.

    Args:
        picture: The picture.
        low: Gradient above which a pixel that touches an edge belongs to it.
        high: Gradient above which a pixel is an edge.
    """
    levels = np.asarray(picture.convert("RGB")).astype(np.int32)  # (H, W, 3)
    smooth, slope = np.array([1, 2, 1]), np.array([-1, 0, 1])
    dx, dy = (
        correlate1d(correlate1d(levels, across, 0, mode="nearest"), along, 1, mode="nearest")
        for across, along in ((smooth, slope), (slope, smooth))
    )
    steepest = (abs(dx) + abs(dy)).argmax(2)[..., None]  # the first of equal ones
    dx, dy = (np.take_along_axis(each, steepest, 2)[..., 0] for each in (dx, dy))
    size = abs(dx) + abs(dy)
    ridge = _is_ridge(dx, dy, size) & (size > math.floor(low))
    labels, _ = label(ridge, np.ones((3, 3)))
    strong = np.unique(labels[ridge & (size > math.floor(high))])
    return Image.fromarray(np.where(ridge & np.isin(labels, strong), 255, 0).astype(np.uint8)).convert("RGB")


def _is_ridge(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return where the gradient is largest along its own direction, of four; beyond the sides it is 0."""
    around = np.pad(size, 1)

    def beside(down: int, right: int) -> np.ndarray:
        height, width = size.shape
        found: np.ndarray = around[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        return found

    x, y = abs(dx).astype(np.int64), abs(dy).astype(np.int64) << SHIFT
    flat, steep = x * TAN_22, x * TAN_22 + (x << (SHIFT + 1))
    horizontal = (size > beside(0, -1)) & (size >= beside(0, 1))
    vertical = (size > beside(-1, 0)) & (size >= beside(1, 0))
    falling = (size > beside(-1, -1)) & (size > beside(1, 1))
    rising = (size > beside(-1, 1)) & (size > beside(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    chosen: np.ndarray = np.where(y < flat, horizontal, np.where(y > steep, vertical, diagonal))
    return chosen
