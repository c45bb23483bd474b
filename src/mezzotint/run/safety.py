"""Check finished pictures with the model's safety checker.

The checker's weights are read when the first picture is checked, and are on the device only while pictures are checked,
whatever the placement of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import torch
from PIL import Image, ImageFilter

from mezzotint.errors import RequestError
from mezzotint.models.clip_vision import preprocess
from mezzotint.models.offload import onload
from mezzotint.models.safety_checker import SafetyChecker
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.run.model_info import ModelInfo
from mezzotint.weights.model_files import CheckerFiles, dtype_name

BLUR_SHARE = 1 / 16  # of the longer side: the standard deviation of the blur
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def check_mode(model: ModelInfo, request: Request) -> None:
    """Check that flagged pictures can be blurred or blackened if the request asks for it.

    Raises:
        RequestError: If the model has no safety checker.
    """
    if request.safety in ("blur", "black") and not model.has_checker:
        why = f" that can be used ({model.unchecked})" if model.unchecked else ""
        raise RequestError(
            f"safety is {request.safety!r}, but the model has no safety checker{why}; load one with safety_checker "
            "(--safety-checker), or leave safety out"
        )


def unchecked_notices(model: ModelInfo, request: Request) -> tuple[str, ...]:
    """Return a sentence that pictures are not checked, where the request or the model leads to expect that they are."""
    if model.has_checker or request.safety == "off":
        return ()
    if model.unchecked:
        return (f"pictures are not checked: {model.unchecked}",)
    return ("pictures are not checked: the model has no safety checker",) if request.safety == "flag" else ()


class PictureChecker:
    """A safety checker whose weights are read at first use. Threads may share it; one of them checks at a time."""

    def __init__(self, files: CheckerFiles, device: torch.device, dtype: torch.dtype, placement: Placement) -> None:
        """Refer to the files of a checker.

        Args:
            files: The files.
            device: Where the model computes.
            dtype: What the model computes in.
            placement: The model's placement.
        """
        self._files, self._device = files, device
        self._dtype, self._placement = checker_dtype(device, dtype), checker_placement(files, device, placement)
        self._network: SafetyChecker | None = None
        self._lock = threading.Lock()

    def check(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Return whether each picture is flagged. They are checked one by one, so it does not depend on the others."""
        with self._lock:
            network = self._network = self._network or self._open()
            with onload(network):
                pixels = (preprocess(self._files.processor, [picture]) for picture in pictures)
                return [flag for one in pixels for flag in network.flags(one.to(self._device))]

    def _open(self) -> SafetyChecker:
        """Build the network, with its large weights offloaded."""
        files = self._files.network
        network = cast(SafetyChecker, files.network())
        files.load(network, self._dtype, self._device, self._placement)
        return network.requires_grad_(False)


def checker_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return what the checker computes in: float32 on the CPU, and float16 for a model in 16 bits.

    bfloat16 has two decimals in the range of the similarities, which are compared to three.
    """
    return torch.float16 if device.type != "cpu" and dtype in SIXTEEN_BITS else torch.float32


def checker_placement(files: CheckerFiles, device: torch.device, placement: Placement) -> Placement:
    """Return where the checker's weights are: streamed if the model's are, and otherwise offloaded.

    On the CPU weights of 16 bits stay as they are in the files, which is exact and takes half the memory.
    """
    if placement.weights == "stream":
        return Placement(weights="stream")
    own = files.network.natural_dtype()
    exact = device.type == "cpu" and own in SIXTEEN_BITS
    return Placement.of(weights="offload", storage=dtype_name(own) if exact else None)


def conceal(picture: Image.Image, mode: str) -> Image.Image:
    """Return a flagged picture as it is delivered: blurred with "blur", black with "black", otherwise unchanged."""
    if mode == "black":
        return Image.new("RGB", picture.size)
    if mode == "blur":
        return picture.filter(ImageFilter.GaussianBlur(BLUR_SHARE * max(picture.size)))
    return picture
