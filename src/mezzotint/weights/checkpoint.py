"""Open a model from a diffusers folder, a single file in the original layout, or a hub id.

Networks are first built on the meta device and compared with the files' tables of contents. Then their weights are read
one tensor at a time, each converted and placed before the next. Code in a file is never executed, and only a hub id
leads to a download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from mezzotint.config import CLIPConfig
from mezzotint.errors import CheckpointError
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.placement import Placement
from mezzotint.reading import hash_file
from mezzotint.weights.files import TensorFile
from mezzotint.weights.folder import plan_folder
from mezzotint.weights.hub import local, locate
from mezzotint.weights.keys import Family
from mezzotint.weights.model_files import ENCODERS, NETWORKS, FewStep, ModelFiles, Overrides, dtype_name
from mezzotint.weights.single import describe_kind, plan_file

FAMILIES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}


@dataclass
class Parts:
    """The networks of a model and what belongs to them.

    Attributes:
        family: "sd1", "sd2" or "sdxl".
        unet: The UNet.
        vae: The VAE.
        text_encoders: The text encoders, two for SDXL.
        tokenizers: The tokenizer of each text encoder.
        scheduler_config: The content of scheduler_config.json.
        model_index: The content of model_index.json.
        settings: The content of mezzotint.json, or empty.
        source: The model's folder or file.
        files: All files that were read.
        few_step: The field `few_step` of mezzotint.json.
        notices: Remarks on the files, for example on tensors that no layer uses.
    """

    family: Family
    unet: UNet
    vae: VAE
    text_encoders: list[CLIPTextModel]
    tokenizers: list[Tokenizer]
    scheduler_config: dict[str, Any]
    model_index: dict[str, Any]
    settings: dict[str, Any]
    source: Path
    files: list[Path]
    few_step: FewStep | None = None
    notices: list[str] = field(default_factory=list)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The SHA-256 of each file by its name relative to the model's folder, computed on first use."""
        root = self.source if self.source.is_dir() else self.source.parent
        return {path.relative_to(root).as_posix(): hash_file(path) for path in self.files}


def open_model(
    path_or_id: str | Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    prediction: str | None = None,
    config: Overrides | None = None,
    placement: Placement | Mapping[str, Placement] = Placement(),  # noqa: B008  # frozen
) -> Parts:
    """Load a model.

    Args:
        path_or_id: A folder in the diffusers layout, a .safetensors, .ckpt, .pt or .bin file in the original layout, or
            the id of a hub repository (owner/name).
        variant: Variant of a folder's weights, such as "fp16". By default the plain files, or fp16 if there are only
            those.
        dtype: Dtype of all weights. By default that of most weights of each network.
        device: Where the networks compute.
        family: "sd1", "sd2" or "sdxl"; by default detected.
        prediction: "epsilon", "v_prediction" or "sample"; by default detected.
        config: Config fields that shapes cannot show, by network, such as {"unet": {"attention_head_dim": 4}}.
        placement: Where large weights are stored and in which dtype, for all networks or by network name.

    Raises:
        CheckpointError: If the model cannot be loaded. Almost all causes are found before weights are read.
    """
    found = scan_model(path_or_id, variant=variant, family=family, prediction=prediction, config=config)
    networks: dict[str, Any] = {}
    for part in found.parts:
        networks[part.name] = part.network()
        for problem in part.problems(networks[part.name]):
            raise CheckpointError(problem)
        found.notices += part.notices(networks[part.name])
    tokenizers = [make() for make in found.tokenizers]
    for part in found.parts:
        own = placement if isinstance(placement, Placement) else placement.get(part.name, Placement())
        part.load(networks[part.name], dtype, torch.device(device), own)
    return Parts(
        family=found.family,
        unet=networks["unet"],
        vae=networks["vae"],
        text_encoders=[networks[name] for name in ENCODERS if name in networks],
        tokenizers=tokenizers,
        scheduler_config=found.scheduler_config,
        model_index=found.model_index,
        settings=found.settings,
        source=found.path,
        files=found.files,
        few_step=found.few_step,
        notices=found.notices,
    )


def scan_model(
    path_or_id: str | Path,
    *,
    variant: str | None = None,
    family: str | None = None,
    prediction: str | None = None,
    config: Overrides | None = None,
) -> ModelFiles:
    """Describe what `open_model` would open without reading weights. Raises CheckpointError if it has problems."""
    found = _scan(locate(path_or_id, variant), variant, family, prediction, config or {})
    if found.problems:
        raise CheckpointError(found.problems[0])
    return found


def read_tokenizers(path_or_id: str | Path) -> tuple[list[Tokenizer], list[int], dict[str, Any]]:
    """Return a model's tokenizers, the width of the text encoder of each, and its settings (mezzotint.json).

    Raises:
        CheckpointError: As `open_model` does.
    """
    found = _scan(locate(path_or_id), None, None, None, {})
    configs = [part.config for part in found.parts if isinstance(part.config, CLIPConfig)]
    return [make() for make in found.tokenizers], [config.hidden_size for config in configs], found.settings


def _scan(path: Path, variant: str | None, family: str | None, prediction: str | None, config: Overrides) -> ModelFiles:
    for field_name, value, known in (
        ("family", family, FAMILIES),
        ("prediction", prediction, ("epsilon", "v_prediction", "sample")),
        *(("config", name, NETWORKS) for name in config),
    ):
        if value is not None and value not in known:
            raise CheckpointError(f"{field_name} is {value!r}; it must be one of {', '.join(known)}")
    if path.is_dir():
        return plan_folder(path, variant, cast("Family | None", family), prediction, config)
    if variant:
        raise CheckpointError(f"{path} is one file and has no variant {variant!r}; leave variant out")
    return plan_file(path, cast("Family | None", family), prediction, config)


@dataclass
class PartReport:
    """One network in a Report: the numbers of parameters and of tensors, and of parameters by dtype."""

    name: str
    parameters: int
    keys: int
    dtypes: dict[str, int]


@dataclass
class Report:
    """What a file or folder contains, and what is wrong with it."""

    path: str
    kind: str
    family: str | None = None
    prediction: str | None = None
    sampler: str | None = None
    keys: int = 0
    bytes: int = 0
    parts: list[PartReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**vars(self), "parts": [vars(part) for part in self.parts]}

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [f"{self.path}: {self.kind}, {self.bytes / 1e6:,.1f} MB, {self.keys} tensors"]
        if self.family:
            lines.append(f"  family {self.family}, prediction {self.prediction}, sampler {self.sampler}")
        for part in self.parts:
            dtypes = ", ".join(part.dtypes)
            lines.append(f"  {part.name:<16}{part.parameters:>15,} parameters  {dtypes}  {part.keys} tensors")
        lines += [f"  passed over     {line}" for line in self.passed_over]
        lines += [f"  notice          {line}" for line in self.notices]
        lines += [f"  problem         {line}" for line in self.problems]
        return lines

    def text(self) -> str:
        """Return the report as text."""
        return "\n".join(self.lines())


def inspect_model(path: str | Path, *, variant: str | None = None, config: Overrides | None = None) -> Report:
    """Describe a model folder, any tensor file or the bundled model without reading weights.

    Args:
        path: A folder, a file, or "emoji".
        variant: As for `open_model`.
        config: As for `open_model`.

    Raises:
        CheckpointError: If the path does not exist, or is neither a model folder nor a tensor file.
    """
    path = local(path) or Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        found = _scan(path, variant, None, None, config or {})
    except CheckpointError:
        if path.is_dir():
            raise
        file = TensorFile(path)  # raises the same error if the file itself cannot be read
        dtypes: Counter[str] = Counter()
        for entry in file.entries.values():
            dtypes[dtype_name(entry.dtype)] += entry.count
        part = PartReport("tensors", dtypes.total(), len(file.entries), dict(dtypes.most_common()))
        return Report(
            str(path), describe_kind(file.shapes), keys=part.keys, bytes=file.size, parts=[part], metadata=file.metadata
        )
    return _report(found)


def _report(found: ModelFiles) -> Report:
    files = {file.path: file for part in found.parts for file in part.files.values()}
    report = Report(
        str(found.path),
        f"{FAMILIES[found.family]} ({found.layout})",
        found.family,
        found.scheduler_config.get("prediction_type", "epsilon"),
        found.scheduler_config.get("_class_name"),
        keys=sum(len(file.entries) for file in files.values()),
        bytes=sum(file.size for file in files.values()),
        problems=list(found.problems),
        notices=list(found.notices),
        passed_over=found.passed_over,
        metadata={key: value for file in files.values() for key, value in file.metadata.items()},
    )
    for part in found.parts:
        dtypes = {dtype_name(dtype): count for dtype, count in part.dtypes().most_common()}
        keys = len({source.key for source in part.sources.values()})
        report.parts.append(PartReport(part.name, sum(dtypes.values()), keys, dtypes))
        try:
            network = part.network()
            report.problems += part.problems(network)
            report.notices += part.notices(network)
        except CheckpointError as error:
            report.problems.append(str(error))
    return report
