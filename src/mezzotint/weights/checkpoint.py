"""Open a model from a diffusers folder, a single file in the original layout, or a hub id.

Networks are first built on the meta device and compared with the files' tables of contents. Then their weights are read
one tensor at a time, each converted and placed before the next. Code in a file is never executed, and only a hub id
leads to a download.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from mezzotint.config import CLIPConfig, SafetyCheckerConfig, TinyVAEConfig, UNetConfig
from mezzotint.errors import CheckpointError
from mezzotint.files import hash_file
from mezzotint.model_options import FAMILIES, ModelOptions
from mezzotint.models.clip import CLIPTextModel
from mezzotint.models.tokenizer import Tokenizer
from mezzotint.models.unet import UNet
from mezzotint.models.vae import VAE
from mezzotint.placement import Placement
from mezzotint.weights.adapter_files import describe_adapter
from mezzotint.weights.control_files import describe_control, is_control_folder, read_control
from mezzotint.weights.embeddings import IMAGE, read_embeddings
from mezzotint.weights.files import TensorFile
from mezzotint.weights.folder import plan_folder
from mezzotint.weights.hub import local, locate
from mezzotint.weights.ip_adapter_files import describe_ip_adapter
from mezzotint.weights.keys import Family
from mezzotint.weights.kinds import CONTROLNET, IP_ADAPTER, T2I_ADAPTER, describe_kind
from mezzotint.weights.model_files import (
    AESTHETIC,
    ENCODERS,
    TINY_VAE,
    CheckerFiles,
    FewStep,
    ModelFiles,
    dtype_name,
    encoder_names,
)
from mezzotint.weights.safety import add_checker
from mezzotint.weights.single import plan_file
from mezzotint.weights.t2i_files import is_t2i_folder, read_t2i
from mezzotint.weights.vae_files import replace_vae

MAX_LINES = 40  # of each kind in the text of a Report


@dataclass
class Parts:
    """The networks of a model and what belongs to them.

    Attributes:
        family: "sd1", "sd2" or "sdxl".
        unet: The UNet.
        vae: The VAE.
        text_encoders: The text encoders, two for SDXL; its refiner has the second alone.
        tokenizers: The tokenizer of each text encoder.
        scheduler_config: The content of scheduler_config.json.
        model_index: The content of model_index.json.
        settings: The content of mezzotint.json, or empty.
        source: The model's folder or file.
        files: All files that were read.
        few_step: The field `few_step` of mezzotint.json.
        options: What overruled the files.
        given_files: By option, the files that it gave in place of the model's own.
        notices: Guesses and the like, which a user should know of.
        checker: The safety checker, whose weights are not read yet.
        unchecked: Why the safety checker that model_index.json names cannot be used.
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
    options: ModelOptions = field(default_factory=ModelOptions)
    given_files: dict[str, list[Path]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    checker: CheckerFiles | None = None
    unchecked: str = ""

    @property
    def encoder_names(self) -> list[str]:
        """The names of the text encoders."""
        return encoder_names(self.model_index)[: len(self.text_encoders)]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each of the model's files by its name relative to its folder, computed on first use."""
        root = self.source if self.source.is_dir() else self.source.parent
        return {path.relative_to(root).as_posix(): hash_file(path) for path in self.files}

    @cached_property
    def given_hashes(self) -> dict[str, dict[str, str]]:
        """By option, the SHA-256 of each file that it gave in place of the model's own, by its name."""
        return {option: {path.name: hash_file(path) for path in paths} for option, paths in self.given_files.items()}

    @cached_property
    def checker_hashes(self) -> dict[str, str]:
        """The SHA-256 of each file of the safety checker, by its name."""
        return {path.name: hash_file(path) for path in (self.checker.paths if self.checker else ())}

    @property
    def identity(self) -> dict[str, str]:
        """What the pictures depend on: `hashes`, `given_hashes` and the options, by name."""
        given = {f"{option} {n}": digest for option, found in self.given_hashes.items() for n, digest in found.items()}
        return {**self.hashes, **given, **{name: json.dumps(value) for name, value in self.options.values().items()}}


def open_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    placement: Placement | Mapping[str, Placement] = Placement(),  # noqa: B008  # frozen
    **options: Any,
) -> Parts:
    """Load a model.

    Args:
        path_or_id: A folder in the diffusers layout, a .safetensors, .ckpt, .pt or .bin file in the original layout, or
            the id of a hub repository (owner/name).
        dtype: Dtype of all weights. By default that of most weights of each network.
        device: Where the networks compute.
        placement: Where large weights are stored and in which dtype, for all networks or by network name.
        options: The fields of `ModelOptions`, which overrule what is found in the files.

    Raises:
        CheckpointError: If the model cannot be loaded. Almost all causes are found before weights are read.
    """
    found = scan_model(path_or_id, **options)
    tokenizers = [make() for make in found.tokenizers]
    networks = load_networks(found, dtype, torch.device(device), placement, tokenizers)
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
        options=found.options,
        given_files=found.given_files,
        notices=found.notices,
        checker=found.checker,
        unchecked=found.unchecked,
    )


def load_networks(
    found: ModelFiles,
    dtype: torch.dtype | None,
    device: torch.device,
    placement: Placement | Mapping[str, Placement],
    tokenizers: Sequence[Tokenizer],
) -> dict[str, Any]:
    """Read the networks of a model; its notices receive what was passed over.

    Args:
        found: The model.
        dtype: Dtype of all weights; None: that of most weights of each network.
        device: Where the networks compute.
        placement: Where large weights are stored, for all networks or by network name.
        tokenizers: The tokenizer of each text encoder, which are compared with it.

    Returns:
        The networks by name.

    Raises:
        CheckpointError: If a weight is missing or has another shape, or a tokenizer does not fit.
    """
    networks: dict[str, Any] = {}
    for part in found.parts:
        networks[part.name] = part.network()
        for problem in part.problems(networks[part.name]):
            raise CheckpointError(problem)
        found.notices += part.notices(networks[part.name])
    _check_tokenizers(found, tokenizers)
    for part in found.parts:
        own = placement if isinstance(placement, Placement) else placement.get(part.name, Placement())
        part.load(networks[part.name], dtype, device, own)
    return networks


def _check_tokenizers(found: ModelFiles, tokenizers: Sequence[Tokenizer]) -> None:
    """Compare each tokenizer with its text encoder. Raises CheckpointError if that lacks a row for a token or place."""
    encoders = [part for part in found.parts if isinstance(part.config, CLIPConfig)]
    for part, tokenizer in zip(encoders, tokenizers, strict=True):
        assert isinstance(part.config, CLIPConfig)
        if tokenizer.max_length > (positions := part.config.max_position_embeddings):
            raise CheckpointError(
                f"the tokenizer of {part.name} in {found.path} has model_max_length {tokenizer.max_length}; it must be "
                f"at most {positions}, the text encoder's max_position_embeddings"
            )
        token, last = max(tokenizer.vocab.items(), key=lambda item: item[1])
        if last >= part.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {part.name} in {found.path} gives {token[:60]!r} the id {last}, but the table of "
                f"{part.name} has {part.config.vocab_size} rows; add rows for the new tokens, or remove the tokens"
            )


def scan_model(path_or_id: str | Path, **options: Any) -> ModelFiles:
    """Describe what `open_model` would open without reading weights. Raises CheckpointError if it has problems."""
    given = ModelOptions.of(options)
    found = _scan(locate(path_or_id, given), given)
    if found.problems:
        raise CheckpointError(found.problems[0])
    with _report_read_errors(found.path):
        add_checker(found)
    return found


def scan_refiner(path_or_id: str | Path) -> ModelFiles:
    """Describe a model that takes the last steps of another one's run, whose VAE and safety checker are used.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    given = ModelOptions(vae="", safety_checker=None)  # its own VAE is neither needed nor downloaded
    path = locate(path_or_id, given)
    with _report_read_errors(path):
        found = _scan_own(path, given)
    if found.problems:
        raise CheckpointError(found.problems[0])
    return found


def read_tokenizers(path_or_id: str | Path, **options: Any) -> tuple[list[Tokenizer], list[int], dict[str, Any]]:
    """Return a model's tokenizers, the width of the text encoder of each, and its settings (mezzotint.json).

    Raises:
        CheckpointError: As `open_model` does.
    """
    given = ModelOptions.of({"safety_checker": None, **options})
    found = _scan(locate(path_or_id, given), given)
    configs = [part.config for part in found.parts if isinstance(part.config, CLIPConfig)]
    return [make() for make in found.tokenizers], [config.hidden_size for config in configs], found.settings


def _scan(path: Path, options: ModelOptions) -> ModelFiles:
    """Describe the files of a model and of what is given in place of them, without reading weights."""
    with _report_read_errors(path):
        found = _scan_own(path, options)
        if options.vae is not None:
            replace_vae(found)
        return found


@contextmanager
def _report_read_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into sentences, such as those of a folder that may not be entered."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from None


def _scan_own(path: Path, options: ModelOptions, file: TensorFile | None = None) -> ModelFiles:
    """Describe the model's own files; `file` is the single file, if it is already open."""
    if path.is_dir():
        return plan_folder(path, options)
    if options.variant:
        raise CheckpointError(f"{path} is one file and has no variant {options.variant!r}; leave variant out")
    return plan_file(path, options, file)


@dataclass
class PartReport:
    """One network in a Report: the numbers of parameters and of tensors, and of parameters by dtype.

    `kind` names a network that is of another class than the one that the family usually has.
    """

    name: str
    parameters: int
    keys: int
    dtypes: dict[str, int]
    kind: str | None = None


@dataclass
class Report:
    """What a file or folder contains, and what is wrong with it."""

    path: str
    kind: str
    family: str | None = None
    prediction: str | None = None
    prediction_source: str | None = None
    sampler: str | None = None
    keys: int = 0
    bytes: int = 0
    parts: list[PartReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    safety_checker: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**vars(self), "parts": [vars(part) for part in self.parts]}

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [f"{self.path}: {self.kind}, {self.bytes / 1e6:,.1f} MB, {self.keys} tensors"]
        if self.family:
            prediction = f"prediction {self.prediction} ({self.prediction_source})"
            lines.append(f"  family {self.family}, {prediction}, sampler {self.sampler}")
        for part in self.parts:
            dtypes = ", ".join(part.dtypes)
            kind = f"  {part.kind}" if part.kind else ""
            lines.append(f"  {part.name:<16}{part.parameters:>15,} parameters  {dtypes}  {part.keys} tensors{kind}")
        if self.safety_checker:
            lines.append(f"  safety checker  {self.safety_checker}")
        for what, found in (("passed over", self.passed_over), ("notice", self.notices), ("problem", self.problems)):
            lines += [f"  {what:<16}{line}" for line in found[:MAX_LINES]]
            lines += [f"  {what:<16}... and {len(found) - MAX_LINES:,} more"] if len(found) > MAX_LINES else []
        return lines

    def text(self) -> str:
        """Return the report as text."""
        return "\n".join(self.lines())


def inspect_model(path: str | Path, **options: Any) -> Report:
    """Describe a model folder, any tensor file or the bundled model without reading weights.

    Args:
        path: A folder, a file, or "emoji".
        options: As for `open_model`.

    Raises:
        CheckpointError: If the path does not exist, or is neither a model folder nor a tensor file.
    """
    given = ModelOptions.of(options)
    if (found_at := local(path)) is None:
        raise CheckpointError(f"{str(path)[:200]!r} does not exist; give a model folder or a file")
    path = found_at
    if path.suffix == IMAGE and path.is_file():
        read_embeddings(path)  # raises what is wrong with it
        return Report(str(path), str(describe_adapter(path, None)), bytes=path.stat().st_size)
    file = None if path.is_dir() else TensorFile(path)
    with _report_read_errors(path):
        if file is None and is_control_folder(path):
            network = (read_t2i(path) if is_t2i_folder(path) else read_control(path, UNetConfig())).network
            return _report_control(path, {file.path: file for file in network.files.values()})
    try:
        with _report_read_errors(path):
            found = _scan_own(path, given, file)
    except CheckpointError:
        if file is None:
            raise
        if describe_kind(file.shapes) in (CONTROLNET, T2I_ADAPTER):
            return _report_control(path, {path: file})
        problems: list[str] = []
        kind = describe_adapter(path, file) or describe_kind(file.shapes)
        if kind == IP_ADAPTER:
            kind, problems = describe_ip_adapter(path, file)
        dtypes: Counter[str] = Counter()
        for entry in file.entries.values():
            dtypes[dtype_name(entry.dtype)] += entry.count
        part = PartReport("tensors", dtypes.total(), len(file.entries), dict(dtypes.most_common()))
        texts = file.metadata
        return Report(str(path), kind, keys=part.keys, bytes=file.size, parts=[part], problems=problems, metadata=texts)
    with _report_read_errors(path):
        if given.vae is not None:
            replace_vae(found)
        add_checker(found)
    return _report(found)


def _report_control(path: Path, files: Mapping[Path, TensorFile]) -> Report:
    """Describe a ControlNet or a T2I-Adapter, whose files are open."""
    dtypes: Counter[str] = Counter()
    for entry in (entry for file in files.values() for entry in file.entries.values()):
        dtypes[dtype_name(entry.dtype)] += entry.count
    kind, problems = describe_control(path, {key: s for file in files.values() for key, s in file.shapes.items()})
    name = "t2i_adapter" if T2I_ADAPTER in kind else "controlnet"
    part = PartReport(name, dtypes.total(), sum(len(f.entries) for f in files.values()), dict(dtypes))
    size, texts = sum(file.size for file in files.values()), next(iter(files.values())).metadata
    return Report(str(path), kind, keys=part.keys, bytes=size, parts=[part], problems=problems, metadata=texts)


def _report(found: ModelFiles) -> Report:
    parts = [*found.parts, *([found.checker.network] if found.checker else [])]
    files = {file.path: file for part in parts for file in part.files.values()}
    report = Report(
        str(found.path),
        f"{FAMILIES[found.family]}{' refiner' if found.model_index.get(AESTHETIC) else ''} ({found.layout})",
        found.family,
        found.scheduler_config.get("prediction_type", "epsilon"),
        found.prediction_source,
        found.scheduler_config.get("_class_name"),
        keys=sum(len(file.entries) for file in files.values()),
        bytes=sum(file.size for file in files.values()),
        problems=list(found.problems),
        notices=list(found.notices),
        passed_over=found.passed_over,
        safety_checker=_describe_checker(found),
        metadata={key: value for file in files.values() for key, value in file.metadata.items()},
    )
    for part in parts:
        dtypes = {dtype_name(dtype): count for dtype, count in part.dtypes().most_common()}
        keys = len({source.key for source in part.sources.values()})
        kind = f"TAESD ({TINY_VAE})" if isinstance(part.config, TinyVAEConfig) else None
        report.parts.append(PartReport(part.name, sum(dtypes.values()), keys, dtypes, kind))
        try:
            network = part.network()
            report.problems += part.problems(network)
            report.notices += part.notices(network)
        except CheckpointError as error:
            report.problems.append(str(error))
    return report


def _describe_checker(found: ModelFiles) -> str:
    """Say whether pictures are checked, and against what."""
    if found.checker is None:
        return f"none, pictures are not checked{f': {found.unchecked}' if found.unchecked else ''}"
    config = cast(SafetyCheckerConfig, found.checker.network.config)
    return f"{config.concepts} concepts, {config.special_care} with special care"
