"""The denoiser: a UNet, a schedule and a prediction become `denoise(x, sigma) -> denoised`.

Solvers work on x = x0 + sigma * noise, whereas the UNet was trained on x / sqrt(sigma^2 + 1) and a timestep. Input
scaling, timesteps and dtypes are handled here and nowhere else. A Denoiser belongs to one run, whose conditions it
holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from mezzotint.diffusion.guidance import step_index
from mezzotint.diffusion.prediction import Prediction
from mezzotint.diffusion.schedule import Schedule
from mezzotint.models.attention import perturbing
from mezzotint.models.blocks import ImageAttention, KeysValues
from mezzotint.models.controlnet import ControlRun, add_residuals
from mezzotint.models.freeu import FreeU
from mezzotint.models.ip_adapter import ImagePrompt, is_active
from mezzotint.models.t2i_adapter import T2IRun, add_features
from mezzotint.models.unet import Condition, UNet
from mezzotint.samplers.sampler import TimestepKind

Timeline = Sequence[tuple[int, Condition]]  # (last step, counted from 0, that the condition holds for; condition)


class Denoiser:
    """A UNet as the denoiser of one run.

    Args:
        unet: The network.
        schedule: The training schedule.
        prediction: What the network's output is.
        conditions: Each of batch B or 1; with guidance (conditional, unconditional). One that changes in the course of
            the run is a timeline, whose steps are counted by `levels`.
        timestep: How the timestep of a noise level is found. "interpolated" in log sigma, "log_alpha" (in the logarithm
            of alpha_bar), "nearest" and "lcm" (the nearest of those that LCM was distilled on) apply to any level;
            "edm" is log sigma / 4 (Karras et al. 2022, table 1).
            "linear" in sigma, "rounded" and "truncated" apply to the run's own `levels`, as in diffusers, or to all if
            none are given; other levels, which a solver asks for in between, are interpolated.
        levels: The noise levels of the run.
        inpaint_channels: What an inpainting network is given in addition to x, (B, C', h, w): the mask, and the
            latents of the masked picture.
        split: Whether the network is given one condition at a time.
        guidance_scale: Returns the guidance scale at a noise level, for a network that takes it as an input.
        controls: The ControlNets and T2I-Adapters.
        prompts: How many of the conditions, the first ones, are parts of the prompt.
        perturbed_layers: Parts of the names of the self-attentions that are the identity in perturbed outputs.
        freeu: b1, b2, s1 and s2 of FreeU.
        image_prompts: The pictures that the run is prompted with, by IP-Adapters; conditions that are no part of the
            prompt are given what the adapters make of no picture.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: Schedule,
        prediction: Prediction,
        conditions: Sequence[Condition | Timeline],
        timestep: TimestepKind = "interpolated",
        levels: Sequence[float] | None = None,
        inpaint_channels: Tensor | None = None,
        split: bool = False,
        guidance_scale: Callable[[float], float] | None = None,
        controls: Sequence[ControlRun | T2IRun] = (),
        prompts: int = 1,
        perturbed_layers: Sequence[str] = (),
        freeu: FreeU | None = None,
        image_prompts: Sequence[ImagePrompt] = (),
    ) -> None:
        parameter = next(unet.parameters())
        self.unet, self.schedule, self.prediction, self.kind = unet, schedule, prediction, timestep
        self.levels, self.split, self.guidance_scale = levels, split, guidance_scale
        self.controls, self.prompts, self.image_prompts = controls, prompts, image_prompts
        self.inpaint_channels = (
            None if inpaint_channels is None else inpaint_channels.to(parameter.device, parameter.dtype)
        )
        self.dtype = parameter.dtype
        own = getattr(unet, "_orig_mod", unet)
        self.shares = isinstance(own, UNet)
        self.perturbed_layers = own.self_attentions(perturbed_layers) if perturbed_layers else ()
        self._options = {"freeu_factors": freeu} if freeu else {}  # networks of a user's own need not take any
        self.timelines = [[(0, c)] if isinstance(c, Condition) else list(c) for c in conditions]
        self._projected: dict[Condition, tuple[Condition, list[KeysValues]]] = {}  # on the device
        self._batched: dict[tuple[object, ...], tuple[Condition, list[KeysValues]]] = {}
        self._images: dict[Hashable, list[list[ImageAttention]]] = {}  # of the IP-Adapters, by layer
        self._weights: Hashable = None  # the state of the weights that both were computed with

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return denoised x (B, C, h, w) under the first condition."""
        return self.prediction.denoised(self.outputs(x, sigma, 1)[0], x, sigma)

    def outputs(self, x: Tensor, sigma: float, count: int | None = None, perturbed: int = 0) -> tuple[Tensor, ...]:
        """Return the network's outputs for x (B, C, h, w), in x's dtype, one per condition (or the first `count`).

        The first `perturbed` conditions follow once more, with identity in place of attention in `perturbed_layers`.
        The UNet is called once, on a batch of count * B, for all conditions of the same length; once for each
        condition if they are split.
        """
        every = self.conditions(sigma)
        plain = every[:count]
        conditions = [*plain, *every[:perturbed]]
        sample = (x / math.sqrt(sigma * sigma + self.prediction.sigma_data**2)).to(self.dtype)
        whole = sample if self.inpaint_channels is None else torch.cat([sample, self.inpaint_channels], dim=1)
        embedding = None if self.guidance_scale is None else self.unet.guidance_embedding(self.guidance_scale(sigma))
        state = _keys_values_state(self.unet)
        if state != self._weights:
            self._projected, self._batched, self._weights = {}, {}, state
        outputs: dict[int, Tensor] = {}
        calls = [k if self.split else c.context.shape[1] for k, c in enumerate(conditions)]
        for call in dict.fromkeys(calls):
            same = [k for k, needed in enumerate(calls) if needed == call]
            condition, keys_values = self._batch(len(x), [conditions[k] for k in same])
            negatives = tuple(self.prompts <= k < len(plain) for k in same)
            keys_values = self._with_images(sigma, len(x), condition, keys_values, negatives)
            rows = len(x) * sum(k >= len(plain) for k in same)  # perturbed conditions are the last of their batch
            # our UNet computes what precedes the first cross-attention once for all conditions
            samples = whole if self.shares and not rows else torch.cat([whole] * len(same))
            with perturbing(self.perturbed_layers, rows) if rows else nullcontext():
                output: Tensor = self.unet(
                    samples,
                    self.timestep(sigma),
                    condition,
                    keys_values=keys_values or None,
                    timestep_cond=embedding,
                    **self._options,
                    **self._residuals(sigma, sample, conditions, same, len(plain)),
                )
            outputs |= zip(same, output.to(x.dtype).chunk(len(same)), strict=True)
        return tuple(outputs[k] for k in range(len(conditions)))

    def _residuals(
        self, sigma: float, sample: Tensor, conditions: Sequence[Condition], same: Sequence[int], plain: int
    ) -> dict[str, list[Tensor] | Tensor]:
        """Return what the controls add for the conditions `same`, as arguments of the UNet; none if none acts.

        From the number `plain` on, conditions are perturbed ones, which are parts of the prompt too.
        """
        if not self.controls:
            return {}
        total, step = None, step_index(sigma, self.levels or ())
        features: list[Tensor] = []
        own, acts = [conditions[k] for k in same], [k < self.prompts or k >= plain for k in same]
        for control in self.controls:
            if isinstance(control, T2IRun):
                features = add_features(features, control.features(step, len(sample), acts) or ())
            else:
                total = add_residuals(total, control.residuals(step, sample, self.timestep(sigma), own, acts))
        added: dict[str, list[Tensor] | Tensor] = {}
        if features:
            added["features"] = [feature.to(self.dtype) for feature in features]
        if total is not None:
            down, mid = total
            added["down_residuals"] = [residual.to(self.dtype) for residual in down]
            added["mid_residual"] = mid.to(self.dtype)
        return added

    def conditions(self, sigma: float) -> list[Condition]:
        """Return the conditions of the step that a call at this noise level belongs to."""
        step = step_index(sigma, self.levels or ()) if any(len(timeline) > 1 for timeline in self.timelines) else 0
        return [next((c for until, c in timeline if step <= until), timeline[-1][1]) for timeline in self.timelines]

    def _active_images(self, sigma: float) -> tuple[ImagePrompt, ...]:
        """Return the pictures that prompt the step which a call at this noise level belongs to."""
        if not self.image_prompts:
            return ()
        levels = self.levels or ()
        step, steps = step_index(sigma, levels), len(levels) - 1
        return tuple(image for image in self.image_prompts if is_active(step, steps, image.start, image.end))

    def timestep(self, sigma: float) -> float:
        """Return the timestep that the UNet is given."""
        return timestep_at(sigma, self.schedule, self.kind, self.levels)

    def _batch(self, batch: int, conditions: Sequence[Condition]) -> tuple[Condition, list[KeysValues]]:
        """Concatenate the conditions, each `batch` times, with their keys and values; computed once."""
        key = (batch, *conditions)
        if key not in self._batched:
            placed = [self._placed(condition) for condition in conditions]
            used = [c if len(c.context) == batch else c.repeat(batch) for c, _ in placed]
            # for each layer its (keys, values) of each condition
            layers = zip(*(keys_values for _, keys_values in placed), strict=True)
            joined: list[KeysValues] = [
                (_stack([k for k, *_ in layer], batch), _stack([v for _, v, *_ in layer], batch)) for layer in layers
            ]
            self._batched[key] = Condition.cat(used), joined
        return self._batched[key]

    def _with_images(
        self, sigma: float, batch: int, condition: Condition, keys_values: list[KeysValues], negatives: tuple[bool, ...]
    ) -> list[KeysValues]:
        """Add what the IP-Adapters add in a step to the keys and values of conditions that share a batch.

        Args:
            sigma: The noise level.
            batch: The number of pictures that are drawn.
            condition: The conditions, after one another.
            keys_values: Their keys and values; empty where the network must compute them at each call.
            negatives: For each condition whether it takes no picture.
        """
        images = self._active_images(sigma)
        if not images:
            return keys_values
        key = (batch, images, negatives)
        if key not in self._images:
            layers = range(len(images[0].scales))
            self._images[key] = [
                [_image_term(image, layer, negatives, batch) for image in images if image.scales[layer]]
                for layer in layers
            ]
        own = keys_values or self.unet.keys_values(condition)
        return [(k, v, terms) for (k, v, *_), terms in zip(own, self._images[key], strict=True)]

    def _placed(self, condition: Condition) -> tuple[Condition, list[KeysValues]]:
        """Return the condition on the network's device, and its keys and values; computed once.

        There are none where the network must compute them at each call.
        """
        if condition not in self._projected:
            placed = condition.to(next(self.unet.parameters()).device, self.dtype)
            self._projected[condition] = placed, [] if self._weights is None else self.unet.keys_values(placed)
        return self._projected[condition]


def timestep_at(sigma: float, schedule: Schedule, kind: TimestepKind, levels: Sequence[float] | None) -> float:
    """Return the timestep of a noise level; the arguments are those of `Denoiser`."""
    if kind == "edm":
        return math.log(sigma) / 4
    if kind == "log_alpha":
        return schedule.timestep(sigma, "log_alpha")
    if kind == "lcm":
        return schedule.lcm_timestep(sigma)
    own = levels is None or sigma in levels
    timestep = schedule.timestep(sigma, "sigma" if kind == "linear" and own else "log_sigma")
    if kind == "nearest" or (kind == "rounded" and own):
        return float(round(timestep))
    if kind == "truncated" and own:
        # as in diffusers, where float32 rounds the level of a whole timestep down: 999 becomes 998
        return float(max(math.floor(timestep - 1e-4), 0))
    return timestep


def _keys_values_state(unet: nn.Module) -> Hashable:
    """Return `UNet.keys_values_state`, also of a compiled UNet; of another network what says that nothing changes."""
    own = getattr(unet, "_orig_mod", unet)
    return own.keys_values_state() if isinstance(own, UNet) else ()


def _image_term(image: ImagePrompt, layer: int, negatives: Sequence[bool], batch: int) -> ImageAttention:
    """Return a picture's term in a cross-attention, for conditions that take it or none, each `batch` times."""
    parts = [(image.negative if negative else image.positive)[layer] for negative in negatives]
    keys, values = (_stack(each, batch) for each in zip(*parts, strict=True))
    return ImageAttention(keys, values, image.scales[layer], image.mask)


def _stack(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Tensors of batch 1 or `batch` after one another, (len(parts) * batch, ...)."""
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts])
