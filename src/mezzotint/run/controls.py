"""The ControlNets and T2I-Adapters of a run: their files, networks, pictures and scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.config import UNetConfig
from mezzotint.entries.control import REPAINT, TYPES, Control
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.images.init_image import HALF, digests, fit, open_picture
from mezzotint.models.controlnet import ControlNet, ControlRun
from mezzotint.models.controlnet_union import ControlNetUnion, UnionRun
from mezzotint.models.t2i_adapter import T2IAdapter, T2IRun
from mezzotint.models.unet import UNet
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.run.kept import Descriptions, LastRun
from mezzotint.weights.control_files import ControlFiles, scan_control
from mezzotint.weights.t2i_files import T2IFiles, feature_places

if TYPE_CHECKING:
    from mezzotint.run.plan import RunPlan

SOFT = 0.825  # A1111's factor from one residual to the next, for "prompt" and "control"
SOFT_FEATURES = (0.25, 0.62, 0.825, 1.0)  # A1111's factors of a T2I-Adapter's features, likewise
LEVELS = 13  # the residuals of Stable Diffusion 1 and 2, from which A1111 counts; SDXL has the first ten
GUESS = (-1.0, 0.0)  # powers of ten between which diffusers' guess mode spreads the factors


Files = ControlFiles | T2IFiles
Network = ControlNet | T2IAdapter


@dataclass(frozen=True, eq=False)
class ControlInput:
    """A ControlNet or T2I-Adapter of a planned run.

    Attributes:
        entry: The request's entry.
        files: Its files.
        digest: SHA-256 of its weights.
    """

    entry: Control
    files: Files
    digest: str


class ControlNets:
    """The ControlNets and T2I-Adapters of one model: files are described once, and the last run's networks are kept."""

    def __init__(self, unet: UNet, device: torch.device, dtype: torch.dtype, placement: Placement) -> None:
        """Keep what networks are loaded for.

        Args:
            unet: The model's UNet.
            device: Where they compute.
            dtype: What they compute in.
            placement: The model's placement.
        """
        self._unet, self._device, self._dtype, self._placement = unet, device, dtype, placement
        self._described = Descriptions[tuple[Files, str]](lambda found: found[0].paths)
        self._networks = LastRun[Network]()

    def read(self, entries: Sequence[Control]) -> tuple[ControlInput, ...]:
        """Describe the files of a request's entries.

        Raises:
            CheckpointError: If one is missing, damaged, or for another model; the sentence names the entry.
        """
        found = []
        for k, entry in enumerate(entries):
            try:
                files, digest = self._described.get(entry.file, partial(self._describe, entry.file))
            except CheckpointError as error:
                raise CheckpointError(f"control[{k}].file: {error}") from None
            found.append(ControlInput(entry, files, digest))
        return tuple(found)

    def load(self, inputs: Sequence[ControlInput]) -> list[Network]:
        """Return the networks, and forget those that are not among them."""
        to = self._unet, self._dtype, self._device, self._placement
        networks = self._networks.get({one.digest: partial(one.files.load, *to) for one in inputs})
        return [networks[one.digest] for one in inputs]

    def check(self, plan: RunPlan) -> None:
        """Check the entries of a plan, with hires those of both passes; see `check_files`."""
        for each in (plan, *([plan.second_pass] if plan.second_pass else [])):
            check_files(each, [one.files for one in plan.controls], self._unet.config)

    def _describe(self, name: str) -> tuple[Files, str]:
        files = scan_control(name, self._unet.config)
        return files, files.digest


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
        for field, picture in entry.pictures.items():
            if picture is None and field != "image":
                raise RequestError(f"control[{k}].{field} is missing; it must be a conditioning picture")


def check_files(plan: RunPlan, found: Sequence[Files], unet: UNetConfig) -> None:
    """Check that the entries of a pass fit their files, and the files the size.

    Args:
        plan: The plan of the pass.
        found: The files of each entry.
        unet: The UNet's configuration.

    Raises:
        RequestError: If one does not fit.
    """
    width, height = plan.request.width or 0, plan.request.height or 0
    for k, (entry, files) in enumerate(zip(plan.request.control or (), found, strict=True)):
        _check_types(f"control[{k}]", entry, files)
        if not isinstance(files, T2IFiles):
            continue
        if entry.mode == "guess":
            raise RequestError(
                f"control[{k}].mode is guess, which a T2I-Adapter does not have; it must be balanced, prompt or control"
            )
        pixels = files.config.features[0][1]
        if width % pixels or height % pixels:
            raise RequestError(
                f"control[{k}] is a T2I-Adapter for {files.families}, which needs a width and height that {pixels} "
                f"divides; they are {width} and {height}"
            )
        own = plan.model.downscale * feature_places(unet)[0][1]
        if pixels != own:
            raise RequestError(
                f"control[{k}] is a T2I-Adapter with a feature for each {pixels} pixels; the model has one for {own}"
            )


def _check_types(name: str, entry: Control, files: Files) -> None:
    """Raise RequestError if the types of an entry's pictures are not ones that its network has."""
    count = 0 if isinstance(files, T2IFiles) else files.types
    given = [field for field in ("type", "more") if getattr(entry, field) is not None]
    if given and not count:
        raise RequestError(f"{name}.{given[0]} is given, and the file is not a ControlNet Union; leave it out")
    if not count:
        return
    fields = ["type", *(f"more[{j}].type" for j in range(len(entry.more or ())))]
    words = [entry.type, *(one.type for one in entry.more or ())]
    first = {number: word for word, number in reversed(TYPES.items())}
    names = ", ".join(f"{first[k]} ({k})" for k in range(count) if k in first)
    for field, asked, kind in zip(fields, words, entry.types, strict=True):
        if kind is None or kind >= count:
            state = "is missing" if kind is None else f"is {asked}"
            raise RequestError(f"{name}.{field} {state}; this ControlNet Union has {count} types: {names}")
    if len({*entry.types}) < len(entry.types):
        raise RequestError(f"{name} has two pictures of one type; give the second one as an entry of its own")


def control_scales(entry: Control, residuals: int, steps: int, second_pass: bool) -> list[tuple[float, ...] | None]:
    """Return the factor of each residual at each step; None where the ControlNet does not act.

    As in diffusers, step i of n acts if it lies wholly between the shares `start` and `end` of the steps. With several
    pictures in one pass, the scales multiply the features of each picture, and the residuals are not scaled.

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
    scales = tuple(factors if entry.more else (entry.scale * factor for factor in factors))
    return [
        None if k / steps < entry.start or (k + 1) / steps > entry.end or not any(entry.scales) else scales
        for k in range(steps)
    ]


def feature_scales(entry: Control, features: int, steps: int, second_pass: bool) -> list[tuple[float, ...] | None]:
    """Return the factor of each feature of a T2I-Adapter at each step; see `control_scales`.

    As diffusers' `adapter_conditioning_factor`, `end` is rounded down to whole steps.
    """
    soft = entry.mode != "balanced" or second_pass
    factors = [SOFT_FEATURES[min(k, 3)] if soft else 1.0 for k in range(features)]
    scales = tuple(entry.scale * factor for factor in factors)
    end = int(steps * entry.end)
    return [scales if k / steps >= entry.start and k < end and entry.scale else None for k in range(steps)]


def prepare_controls(plan: RunPlan, networks: Sequence[Network]) -> list[ControlRun | T2IRun]:
    """Return the ControlNets and T2I-Adapters of one pass, with their pictures opened.

    Args:
        plan: The plan of the pass.
        networks: The network of each entry.

    Raises:
        RequestError: If a picture cannot be opened.
    """
    runs: list[ControlRun | T2IRun] = []
    steps, second = len(plan.sigmas) - 1, plan.base_steps is not None
    for k, (one, network) in enumerate(zip(plan.controls, networks, strict=True)):
        if isinstance(network, T2IAdapter):
            hint = _hint(plan, one.entry, f"control[{k}].image", "L" if network.config.in_channels == 1 else "RGB")
            factors = feature_scales(one.entry, len(network.config.features), steps, second)
            runs.append(T2IRun(network, hint, factors, one.entry.mode == "control"))
            continue
        config = network.config
        pooled = config.global_pool_conditions  # such a network has guess mode's conditional half, not its factors
        entry = one.entry
        scales = control_scales(
            entry.replace(mode="balanced") if pooled and entry.mode == "guess" else entry,
            network.residual_count,
            steps,
            second,
        )
        only = pooled or entry.mode in ("control", "guess")
        pictures = [
            _hint(plan, entry.replace(image=picture), f"control[{k}].{field}", masked=0.0 if kind == REPAINT else -1.0)
            for (field, picture), kind in zip(entry.pictures.items(), entry.types, strict=True)
        ]
        if isinstance(network, ControlNetUnion):
            types = [kind or 0 for kind in entry.types]
            runs.append(UnionRun(network, pictures, types, entry.scales, scales, only))
        else:
            runs.append(ControlRun(network, pictures[0], scales, only))
    return runs


def control_digests(plan: RunPlan) -> dict[str, dict[str, str | None]]:
    """Return the path (None if bytes were given) and SHA-256 of each conditioning picture, by its field."""
    sources = {
        f"control[{k}].{field}": picture
        for k, one in enumerate(plan.controls)
        for field, picture in one.entry.pictures.items()
    }
    return digests({name: source for name, source in sources.items() if source is not None})


def _hint(plan: RunPlan, entry: Control, name: str, mode: str = "RGB", *, masked: float | None = None) -> Tensor:
    """Return a conditioning picture at the size of the run, (1, 3, H, W) in [0, 1], of mode "L" (1, 1, H, W).

    With `masked` the picture that the run starts from has this value where the request masks it.
    """
    size = plan.request.width or 0, plan.request.height or 0
    start = plan.init_image
    if entry.image is None:
        assert start is not None
        hint = _to_tensor(start.image, mode)
        if masked is None or start.mask is None:
            return hint
        return torch.where(_to_tensor(start.mask, "L") >= HALF / 255, masked, hint)
    picture = open_picture(entry.image, name)
    if start is not None and start.box is not None and start.canvas is not None:
        whole = fit(picture, start.canvas.size, entry.resize_mode)  # type: ignore[arg-type]  # checked by Control
        return _to_tensor(fit(whole.crop(start.box), size, "fill"), mode)
    return _to_tensor(fit(picture, size, entry.resize_mode), mode)  # type: ignore[arg-type]


def _to_tensor(picture: Image.Image, mode: str) -> Tensor:
    """Return a picture or mask as (1, 3, H, W) float32 in [0, 1]; of mode "L" (1, 1, H, W)."""
    levels = np.asarray(picture.convert("RGB").convert(mode), dtype=np.float32) / 255.0
    return torch.from_numpy(np.atleast_3d(levels)).permute(2, 0, 1)[None]
