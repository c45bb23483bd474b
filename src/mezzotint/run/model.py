"""A loaded model: its networks, everything that is computed from them once, and what happens when they change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from mezzotint import kernels, samplers
from mezzotint.errors import RequestError
from mezzotint.models.adapters import Changes
from mezzotint.models.edits import Snapshot, is_customized
from mezzotint.models.unet import UNet
from mezzotint.placement import Placement
from mezzotint.request import Request
from mezzotint.run.controls import ControlNets
from mezzotint.run.execute import Executor
from mezzotint.run.few_step import FewStepUNets
from mezzotint.run.image_prompts import ImagePrompts
from mezzotint.run.loras import named_loras
from mezzotint.run.model_info import ModelInfo
from mezzotint.run.networks import check_together, fuse_projections, unwrap
from mezzotint.run.plan import RunFiles, RunPlan, plan_run
from mezzotint.run.prompts import PromptEncoder
from mezzotint.run.refiners import Refiners
from mezzotint.run.safety import PictureChecker
from mezzotint.weights.checkpoint import Parts
from mezzotint.weights.lora import Adapters


class LoadedModel:
    """A model, ready to run. Between runs it keeps only caches, whose content does not depend on who fills them.

    Attributes:
        parts: The networks and what belongs to them.
        executor: Runs them as the placement says.
        info: The facts that plans depend on.
        schedule: The training schedule as the model's own sampler reads it.
        adapters: The LoRA files that were read.
        prompts: Encodes prompts.
        controls: The ControlNets that runs use.
        refiners: The refiners that runs use.
        image_prompts: The pictures that runs are prompted with.
        files: Reads the files that requests name.
        checker: The safety checker, or None.
    """

    info: ModelInfo
    adapters: Adapters
    prompts: PromptEncoder
    controls: ControlNets
    refiners: Refiners
    image_prompts: ImagePrompts
    files: RunFiles

    def __init__(self, parts: Parts, placement: Placement, exclusive: bool) -> None:
        """Wrap opened parts.

        Args:
            parts: The networks and what belongs to them.
            placement: The placement that they were opened with.
            exclusive: Whether runs exclude each other, because a memory budget is kept.
        """
        self.parts = copy(parts)  # whose networks may be replaced
        self.executor, self._has_budget = Executor(placement, exclusive=exclusive), exclusive
        for network in self.networks().values():
            network.eval().requires_grad_(False)
        self.checker: PictureChecker | None = None
        self._edited: set[str] = set()
        self._derive()
        self._settle()

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        encoders = zip(self.parts.encoder_names, self.parts.text_encoders, strict=True)
        return {"unet": self.parts.unet, "vae": self.parts.vae, **dict(encoders)}

    @property
    def name(self) -> str:
        """Name of the model's file or folder."""
        source = self.parts.source
        return source.stem if source.is_file() else source.name

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        return self.parts.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's weights."""
        return self.parts.unet.conv_in.weight.dtype

    def unet_for(self, plan: RunPlan) -> tuple[UNet, Changes]:
        """Return the UNet that a plan runs, and the changes of the few-step form if they are not merged into it."""
        return self._few_step.form_for(plan) if plan.few_step else (self.parts.unet, {})

    def set_scheduler_config(self, config: dict[str, Any]) -> None:
        """Replace the model's scheduler_config.json."""
        self.parts.scheduler_config = config
        self.info = replace(self.info, scheduler_config=config)
        self.schedule = plan_run(self.info, Request(prompt="")).schedule

    def record(self, plan: RunPlan) -> dict[str, Any]:
        """Return what the record of a picture says of the model and the machine."""
        parts = self.parts
        optional = {
            "placement": self.executor.effective_placement.changes(),
            "lora": plan.few_step and plan.few_step.lora,
            "embeddings": plan.embedding_digests,
            "loras": plan.lora_digests,
            "controls": plan.control_digests,
            "ip_adapters": plan.ip_adapter_digests,
            "image_encoders": plan.image_encoder_digests,
            "upscaler": dict([plan.upscaler.file]) if plan.upscaler else {},
            "refiner": plan.refiner.digests if plan.refiner else {},
            "merged": self.adapters.merged_digests(),
            "edited": self.edited(),
            "kernels": kernels.instructions(self.dtype) if self.device.type == "cpu" else "",
            "solver": samplers.origin(plan.sampler.solver),
            "options": parts.options.values(),
            **parts.given_hashes,
            "safety_checker": parts.checker_hashes if plan.safety in ("blur", "black") else {},
        }
        return {
            "name": self.name,
            "family": parts.family,
            "files": parts.hashes,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **{name: value for name, value in optional.items() if value},
        }

    # ---- changes -----------------------------------------------------------------------------------------------------

    def edited(self) -> list[str]:
        """Return the names of the networks that are not as in the files: replaced, edited, or with hooks."""
        return [
            name
            for name, network in self.networks().items()
            if name in self._edited or not self._snapshots[name].matches(network) or is_customized(unwrap(network))
        ]

    def replace(self, **networks: Any) -> None:
        """Replace networks, fields of `parts`, and move them to the model's device.

        Raises:
            RequestError: If they do not fit together, or the placement would not be kept.
        """
        self._check_resident(f"{' and '.join(networks)} cannot be replaced")
        check_together(replace(self.parts, **networks))
        device, before = self.device, self.networks()
        with self._editing():
            vars(self.parts).update(networks)
            after = self.networks()
            replaced = {name for name, network in after.items() if network is not before.get(name)}
            for name in replaced:
                after[name].to(device)
            self._edited = (self._edited & after.keys()) | replaced
            self._derive()

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and cast the networks.

        Raises:
            RequestError: If the placement would not be kept.
        """
        self._check_resident("the model cannot be moved")
        with self._editing():
            if self.dtype not in (dtype, torch.float32):
                self._edited.update(self.networks())  # a wider dtype does not bring back what the files have
            for network in self.networks().values():
                network.to(device, dtype)
            self._derive()

    def merge(self, loras: Any) -> None:
        """Merge LoRA files into the weights in place of those that are merged now."""
        with self._editing():
            self.adapters.merge(named_loras(Request(prompt="", loras=loras)))

    def unmerge(self) -> None:
        """Restore the weights that were there before `merge`."""
        with self._editing():
            self.adapters.unmerge()

    def refresh(self) -> None:
        """Discard what was computed from weights, and count every network as edited."""
        with self._editing():
            self._edited.update(self.networks())

    def copy(self, memo: dict[int, Any]) -> LoadedModel:
        """Return a copy with networks of its own.

        Raises:
            RequestError: If LoRA files are merged, whose originals the copy would lack.
        """
        if self.adapters.merged:
            raise RequestError("a pipeline with merged LoRA files cannot be copied; call unmerge() before")
        names = ("unet", "vae", "text_encoders", "scheduler_config", "settings")
        parts = replace(self.parts, **{name: deepcopy(getattr(self.parts, name), memo) for name in names})
        other = LoadedModel(parts, self.executor.placement, self._has_budget)
        other._edited = {name for name in self.networks() if name in self.edited()}
        return other

    def plain_parts(self) -> Parts:
        """Return the parts without `torch.compile`, to be saved.

        Raises:
            RequestError: If the weights are stored in fewer bits.
        """
        if storage := self.executor.placement.storage:
            raise RequestError(
                f"the model cannot be saved: its weights are stored as {storage}, rounded; load it without storage "
                "(and without memory)"
            )
        parts: Any = self.parts
        encoders = [unwrap(encoder) for encoder in parts.text_encoders]
        return replace(parts, unet=unwrap(parts.unet), vae=unwrap(parts.vae), text_encoders=encoders)  # type: ignore[no-any-return]

    def _derive(self) -> None:
        """Prepare everything that is computed from the networks."""
        parts, encoders = self.parts, self.parts.text_encoders
        self.info = ModelInfo.of(parts, parts.unet.config, parts.vae.config, self.device.type)
        self.schedule = plan_run(self.info, Request(prompt="")).schedule
        self.adapters = Adapters(unwrap(parts.unet), encoders)
        self.prompts = PromptEncoder(parts.tokenizers, encoders, self.adapters)
        unet = cast(UNet, unwrap(parts.unet))
        self.controls = ControlNets(unet, self.device, self.dtype, self.executor.placement)
        self.refiners = Refiners(parts.vae.config, self.device, self.dtype, self.executor.placement)
        self.image_prompts = ImagePrompts(unet.config, self.device, self.dtype, self.executor.placement)
        self.files = RunFiles(
            self.adapters,
            [encoder.config.hidden_size for encoder in encoders],
            self.controls,
            self.device,
            self.refiners,
            self.image_prompts,
        )
        self._few_step = FewStepUNets(unet, parts.source)
        if self.info.vae_dtype(self.dtype) != self.dtype:
            parts.vae.float()
        if parts.checker:
            self.checker = PictureChecker(parts.checker, self.device, self.dtype, self.executor.placement)

    @contextmanager
    def _editing(self) -> Iterator[None]:
        """Change networks inside the block without counting it as an edit of the user's."""
        self._edited |= {name for name, net in self.networks().items() if not self._snapshots[name].matches(net)}
        try:
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Discard what was computed from weights, and remember them as they are."""
        self._few_step.clear()
        self.prompts.clear()
        fuse_projections(self.parts.unet)
        self._snapshots = {name: Snapshot(network) for name, network in self.networks().items()}

    def _check_resident(self, sentence: str) -> None:
        """Raise RequestError, with this sentence, unless all weights are on the device as they are in the files."""
        placement = self.executor.placement
        if self._has_budget or placement.weights != "resident" or placement.storage:
            raise RequestError(
                f"{sentence}: it was loaded with a placement or a memory budget, which would not be kept; load the "
                "model with the device and dtype that you want, without memory and placement"
            )
        if self.adapters.merged:
            raise RequestError(f"{sentence} while LoRA files are merged; call unmerge() before, and merge again after")
