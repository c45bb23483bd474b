"""The UNets of a model's few-step form: its own UNet with a LoRA merged into a copy of the weights."""

from __future__ import annotations

from pathlib import Path

from mezzotint.errors import CheckpointError
from mezzotint.models.adapters import merge_copy
from mezzotint.models.unet import UNet
from mezzotint.run.plan import RunPlan
from mezzotint.weights.lora import read_unet_lora


class FewStepUNets:
    """Makes the few-step form of a UNet when a plan first needs it, and keeps it.

    Attributes:
        unet: The model's own UNet.
        source: The model's folder, which holds the LoRA.
    """

    def __init__(self, unet: UNet, source: Path) -> None:
        self.unet, self.source = unet, source
        self._made: dict[str, UNet] = {}  # by LoRA file

    def unet_for(self, plan: RunPlan) -> UNet:
        """Return the UNet that a plan runs: the model's own, or its few-step form.

        Raises:
            CheckpointError: If the LoRA is missing, or is another UNet's.
        """
        few_step = plan.few_step
        if few_step is None:
            return self.unet
        if few_step.lora not in self._made:  # two threads at once make the same one twice
            path = self.source / few_step.lora
            if not path.exists():
                raise CheckpointError(f"{path} is missing: mezzotint.json names it for the sampler {few_step.sampler}")
            unet = merge_copy(self.unet, read_unet_lora(path, self.unet))
            unet.fuse_projections()
            self._made[few_step.lora] = unet
        return self._made[few_step.lora]

    def clear(self) -> None:
        """Discard what was made, because the UNet's own weights have changed."""
        self._made.clear()
