"""The ControlNets of a run: their files, networks, pictures and scales."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.entries.control import Control
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.images.init_image import HALF, digests, fit, open_picture
from mezzotint.models.controlnet import ControlNet, ControlRun
from mezzotint.models.unet import UNet
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.weights.control_files import ControlFiles, scan_control

if TYPE_CHECKING:
    from mezzotint.run.plan import RunPlan

SOFT = 0.825  # A1111's factor from one residual to the next, for "prompt" and "control"
LEVELS = 13  # the residuals of Stable Diffusion 1 and 2, from which A1111 counts; SDXL has the first ten
GUESS = (-1.0, 0.0)  # powers of ten between which diffusers' guess mode spreads the factors


@dataclass(frozen=True, eq=False)
class ControlInput:
    """A ControlNet of a planned run.

    Attributes:
        entry: The request's entry.
        files: Its files.
        digest: SHA-256 of its weights.
    """

    entry: Control
    files: ControlFiles
    digest: str


class ControlNets:
    """The ControlNets of one model. Files are described once; the networks of the last run are kept."""

    def __init__(self, unet: UNet, device: torch.device, dtype: torch.dtype, placement: Placement) -> None:
        """Keep what networks are loaded for.

        Args:
            unet: The model's UNet.
            device: Where they compute.
            dtype: What they compute in.
            placement: The model's placement.
        """
        self._unet, self._device, self._dtype, self._placement = unet, device, dtype, placement
        self._scanned: dict[str, tuple[object, ControlFiles, str]] = {}
        self._networks: dict[str, ControlNet] = {}
        self._lock = threading.Lock()

    def read(self, entries: Sequence[Control]) -> tuple[ControlInput, ...]:
        """Describe the files of a request's entries.

        Raises:
            CheckpointError: If one is missing, damaged, or for another model; the sentence names the entry.
        """
        found = []
        for k, entry in enumerate(entries):
            try:
                found.append(self._scan(entry))
            except CheckpointError as error:
                raise CheckpointError(f"control[{k}].file: {error}") from None
        return tuple(found)

    def load(self, inputs: Sequence[ControlInput]) -> list[ControlNet]:
        """Return the networks, and forget those that are not among them."""
        with self._lock:
            kept: dict[str, ControlNet] = {}
            for one in inputs:
                network = kept.get(one.digest) or self._networks.get(one.digest)
                kept[one.digest] = network or one.files.load(self._unet, self._dtype, self._device, self._placement)
            self._networks = kept
            return [kept[one.digest] for one in inputs]

    def _scan(self, entry: Control) -> ControlInput:
        with self._lock:
            known = self._scanned.get(entry.file)
            if known is None or known[0] != _state(known[1]):
                files = scan_control(entry.file, self._unet.config)
                known = self._scanned[entry.file] = _state(files), files, files.digest
            return ControlInput(entry, known[1], known[2])


def _state(files: ControlFiles) -> object:
    """Return what changes when a ControlNet's files are written."""
    try:
        found = [path.stat() for path in files.paths]
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found]
    except OSError:
        return None


def check_controls(request: Request) -> None:
    """Check that every ControlNet of a request has a picture.

    Raises:
        RequestError: If one has not, and there is no image to start from.
    """
    for k, entry in enumerate(request.control or ()):
        if entry.image is None and request.image is None:
            raise RequestError(
                f"control[{k}].image is missing; it must be the conditioning picture, or the request must have an image"
            )


def control_scales(entry: Control, residuals: int, steps: int, second_pass: bool) -> list[tuple[float, ...] | None]:
    """Return the factor of each residual at each step; None where the ControlNet does not act.

    As in diffusers, step i of n acts if it lies wholly between the shares `start` and `end` of the steps.

    Args:
        entry: The request's entry.
        residuals: Number of residuals.
        steps: Number of steps.
        second_pass: Whether it is hires-fix's second pass, which has A1111's soft factors in every mode.
    """
    if entry.mode == "guess":
        factors = torch.logspace(*GUESS, residuals).tolist()
    elif entry.mode in ("prompt", "control") or second_pass:
        factors = [SOFT ** (LEVELS - 1 - k) for k in range(residuals)]
    else:
        factors = [1.0] * residuals
    scales = tuple(entry.scale * factor for factor in factors)
    return [
        None if k / steps < entry.start or (k + 1) / steps > entry.end or not entry.scale else scales
        for k in range(steps)
    ]


def prepare_controls(plan: RunPlan, networks: Sequence[ControlNet]) -> list[ControlRun]:
    """Return the ControlNets of one pass, with their pictures opened.

    Args:
        plan: The plan of the pass.
        networks: The network of each entry.

    Raises:
        RequestError: If a picture cannot be opened.
    """
    runs, steps = [], len(plan.sigmas) - 1
    for k, (one, network) in enumerate(zip(plan.controls, networks, strict=True)):
        config = network.config
        pooled = config.global_pool_conditions  # such a network has guess mode's conditional half, not its factors
        entry = one.entry
        scales = control_scales(
            entry.replace(mode="balanced") if pooled and entry.mode == "guess" else entry,
            network.residual_count,
            steps,
            second_pass=plan.base_steps is not None,
        )
        hint = _hint(plan, entry, f"control[{k}].image")
        runs.append(ControlRun(network, hint, scales, pooled or entry.mode in ("control", "guess")))
    return runs


def control_digests(plan: RunPlan) -> dict[str, dict[str, str | None]]:
    """Return the path (None if bytes were given) and SHA-256 of each conditioning picture, by its field."""
    sources = {f"control[{k}].image": one.entry.image for k, one in enumerate(plan.controls)}
    return digests({name: source for name, source in sources.items() if source is not None})


def _hint(plan: RunPlan, entry: Control, name: str) -> Tensor:
    """Return a conditioning picture at the size of the run, (1, 3, H, W) in [0, 1], or -1 where it is masked."""
    size = plan.request.width or 0, plan.request.height or 0
    start = plan.init_image
    if entry.image is None:
        assert start is not None
        hint = _to_tensor(start.image)
        return hint if start.mask is None else torch.where(_to_tensor(start.mask)[:, :1] >= HALF / 255, -1.0, hint)
    picture = open_picture(entry.image, name)
    if start is not None and start.box is not None and start.canvas is not None:
        whole = fit(picture, start.canvas.size, entry.resize_mode)  # type: ignore[arg-type]  # checked by Control
        return _to_tensor(fit(whole.crop(start.box), size, "fill"))
    return _to_tensor(fit(picture, size, entry.resize_mode))  # type: ignore[arg-type]


def _to_tensor(picture: Image.Image) -> Tensor:
    """Return a picture or mask as (1, 3, H, W) float32 in [0, 1]."""
    levels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(levels).permute(2, 0, 1)[None]
