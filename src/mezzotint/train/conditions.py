"""Conditioning pictures of training data, for a ControlNet: one for each picture, of the same aspect ratio.

The data names them, in the field or column `conditioning_image` of metadata and Parquet, or they are in a folder of
their own, each under its picture's name: conditions/cat.png for pictures/cat.jpg.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.errors import RequestError
from mezzotint.images import init_image

if TYPE_CHECKING:
    from mezzotint.train.data import BrokenPolicy, Dataset, Example

FIELDS = ("conditioning_image", "condition")  # names of the column or field
KIND = "the conditioning picture"
SLACK = 0.02  # relative difference of aspect ratios that rounding to pixels may cause


@dataclass(frozen=True)
class ConditioningPicture:
    """A conditioning picture, not yet decoded.

    Attributes:
        place: where it is, for error messages.
        read: returns the bytes of its file.
    """

    place: str
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """Return the picture in RGB. Raises RequestError if it does not decode."""
        return init_image.open_picture(self.place, KIND, self.read())

    def size(self) -> tuple[int, int]:
        """Return (width, height), upright, from the file's header. Raises RequestError if it is not a picture."""
        return init_image.picture_size(self.place, KIND, self.read())


def pair_conditions(dataset: Dataset, folder: str | None, suffixes: tuple[str, ...], broken: BrokenPolicy) -> Dataset:
    """Give each picture of a dataset its conditioning picture.

    Args:
        dataset: the pictures.
        folder: where the conditioning pictures are, under their pictures' names; None: where the data says.
        suffixes: those of pictures.
        broken: whether a picture without a usable one raises an error or is skipped.

    Returns:
        The dataset; each of its examples has a condition of its own aspect ratio.

    Raises:
        RequestError: for a picture without a conditioning picture that can be used, or if none is left.
    """
    own = _files(Path(folder), suffixes) if folder else {}
    examples, skipped = [], list(dataset.skipped)
    for example in dataset:
        if folder:
            path = own.get(_stem(example.id))
            example = replace(example, condition=_picture(path) if path else None)
        if fault := _fault(example, folder):
            if broken == "stop":
                raise RequestError(fault)
            skipped.append(fault)
        else:
            examples.append(example)
    if not examples:
        raise RequestError(f"{str(dataset.path)!r} has no usable conditioning pictures; the first: {skipped[0]}")
    return replace(dataset, examples=tuple(examples), skipped=tuple(skipped))


def to_hint(image: Image.Image) -> Tensor:
    """Convert an RGB picture to what a ControlNet reads: (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _picture(path: Path) -> ConditioningPicture:
    return ConditioningPicture(str(path), lambda: init_image.read(str(path), KIND))


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the pictures below a folder by their paths without suffix. Raises RequestError if it is not a folder."""
    if not folder.is_dir():
        raise RequestError(f"conditions is {str(folder)[:200]!r}; it must be a folder of conditioning pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return {_stem(path.relative_to(folder).as_posix()): path for path in found}


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _fault(example: Example, folder: str | None) -> str | None:
    """Return what is wrong with an example's conditioning picture, as a sentence."""
    if example.condition is None:
        where = f"there must be one of the same name below {folder!r}" if folder else (
            f"the data must name it as {FIELDS[0]}, or the recipe's conditions must be a folder of them"
        )  # fmt: skip
        return f"the picture {example.place!r} has no conditioning picture; {where}"
    try:
        size = example.condition.size()
    except RequestError as error:
        return str(error)
    if abs(size[0] * example.size[1] - size[1] * example.size[0]) > SLACK * size[1] * example.size[0]:
        return (
            f"{KIND} {example.condition.place!r} is {size[0]}x{size[1]} and its picture {example.size[0]}x"
            f"{example.size[1]}; both must have the same aspect ratio"
        )
    return None
