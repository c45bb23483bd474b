"""The few-step form of a model: its own UNet with a LoRA merged into a copy of the weights, or applied as it runs."""

from __future__ import annotations

from pathlib import Path

from mezzotint.errors import CheckpointError
from mezzotint.models.adapters import Changes, merge_copy
from mezzotint.models.edits import Snapshot, is_customized
from mezzotint.models.unet import UNet
from mezzotint.run.plan import RunPlan
from mezzotint.weights.lora import read_unet_lora


class FewStepUNets:
    """Makes the few-step form of a UNet when a plan first needs it, and keeps it while the UNet's weights stay.

    Attributes:
        unet: The model's own UNet.
        source: The model's folder, which holds the LoRA.
    """

    def __init__(self, unet: UNet, source: Path) -> None:
        self.unet, self.source = unet, source
        self._made: dict[str, tuple[Snapshot, UNet]] = {}  # by LoRA file, with the weights it was made of

    def form_for(self, plan: RunPlan) -> tuple[UNet, Changes]:
        """Return the UNet that a plan runs, and the changes to apply to it.

        A UNet with hooks or modules of a user's own runs itself, with the LoRA applied; a copy would lack them.

        Raises:
            CheckpointError: If the LoRA is missing, or is another UNet's.
        """
        few_step = plan.few_step
        if few_step is None:
            return self.unet, {}
        if is_customized(self.unet):
            place = next(self.unet.parameters())
            found = self._read(few_step.lora, few_step.sampler)
            return self.unet, {
                layer: [(change.to(place.device, place.dtype), scale) for change, scale in changes]
                for layer, changes in found.items()
            }
        made = self._made.get(few_step.lora)
        if made is None or not made[0].matches(self.unet):  # two threads at once make the same one twice
            unet = merge_copy(self.unet, self._read(few_step.lora, few_step.sampler))
            unet.fuse_projections()
            made = self._made[few_step.lora] = Snapshot(self.unet), unet
        return made[1], {}

    def _read(self, name: str, sampler: str) -> Changes:
        """Read the LoRA."""
        path = self.source / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: mezzotint.json names it for the sampler {sampler}")
        return read_unet_lora(path, self.unet)

    def clear(self) -> None:
        """Discard what was made."""
        self._made.clear()
