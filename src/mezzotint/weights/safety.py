"""Find and read the safety checker of a model's folder, or one from elsewhere, without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from mezzotint.config import ImageProcessorConfig, SafetyCheckerConfig
from mezzotint.errors import CheckpointError
from mezzotint.model_options import ModelOptions
from mezzotint.weights.folder import read_json, read_part
from mezzotint.weights.hub import HUB_ID, network_files, snapshot
from mezzotint.weights.model_files import CheckerFiles, ModelFiles

NAME = "safety_checker"  # of its folder in a model
CLASS = "StableDiffusionSafetyChecker"
PROCESSOR = "preprocessor_config.json"


def add_checker(plan: ModelFiles) -> None:
    """Add the safety checker of the plan's options to the description of a model.

    If the model's own cannot be used, `plan.unchecked` says why.

    Raises:
        CheckpointError: If the options name a checker that cannot be used.
    """
    source = plan.options.safety_checker
    if source is None or source is False:
        return
    if source is not True:
        plan.checker = scan_checker(_locate(source, plan.options.variant), plan.options)
        return
    named = plan.model_index.get(NAME)
    if isinstance(named, list) and len(named) == 2 and named[1]:
        try:
            plan.checker = scan_checker(plan.path, plan.options, str(named[1]))
        except CheckpointError as error:
            plan.unchecked = str(error)


def scan_checker(folder: Path, options: ModelOptions, class_name: str | None = None) -> CheckerFiles:
    """Describe the files of a safety checker without reading weights.

    Args:
        folder: The checker's own folder, or that of a model that comes with one.
        options: Of which the variant is used.
        class_name: The checker's class; by default that of its config.json.

    Raises:
        CheckpointError: If the files are missing, damaged or not a safety checker.
    """
    own = folder if (folder / "config.json").exists() else folder / NAME
    if class_name is None:
        named = read_json(own / "config.json").get("architectures") or [CLASS]
        class_name = str(named[0]) if isinstance(named, list) else str(named)
    network = read_part(own, NAME, class_name, options)
    for problem in network.problems(network.network()):
        raise CheckpointError(problem)
    processor, described = find_processor(own, *([own.parent / "feature_extractor"] if own.name == NAME else []))
    assert isinstance(network.config, SafetyCheckerConfig)
    side = network.config.vision_config.image_size
    if processor.crop_size != (side, side):
        height, width = processor.crop_size
        raise CheckpointError(
            f"{own}: its pictures are cropped to {width}x{height} by {PROCESSOR}, but its config.json has image_size "
            f"{side}; both must be the same"
        )
    weights = sorted({file.path for file in network.files.values()})
    return CheckerFiles(network, processor, [own / "config.json", *weights, *described])


def find_processor(folder: Path, *before: Path) -> tuple[ImageProcessorConfig, list[Path]]:
    """Return how an encoder's pictures are prepared, and the file that says so; without one it is CLIP's.

    Args:
        folder: The encoder's own folder.
        before: Folders that are searched before it.

    Raises:
        CheckpointError: If the file is wrong.
    """
    path = next(filter(Path.exists, (place / PROCESSOR for place in (*before, folder))), None)
    if path is None:
        return ImageProcessorConfig(), []
    try:
        return ImageProcessorConfig.model_validate(read_json(path)), [path]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its fields"
        raise CheckpointError(f"{path} is wrong at {where}: {first['msg']}") from None


def _locate(source: str | Path, variant: str | None) -> Path:
    """Return the folder of a checker: an existing one, or a snapshot from the hub."""

    def choose(listing: Iterable[str]) -> list[str]:
        names = set(listing)
        folder = f"{NAME}/" if f"{NAME}/config.json" in names else ""
        files = network_files(names, folder, variant)
        if not files:
            raise CheckpointError(f"The hub's {source} has no safety checker: neither at its top nor in {NAME}/")
        return [*files, *({PROCESSOR, f"feature_extractor/{PROCESSOR}"} & names)]

    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError):  # too long, or a NUL byte
        exists = False
    if exists or isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"safety_checker is {str(source)[:200]!r}, which is {'a file' if exists else 'not here'}; it must be the "
            "folder of a safety checker, the folder of a model that comes with one, or a hub id (owner/name)"
        )
    return snapshot(source, choose)
