"""Result: the pictures and latents of a request, and facts about the run. Importing this does not import torch."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.request import Request

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a request gave.

    Attributes:
        images: `count` PIL pictures in order. Each carries its record in `image.info`, and `image.save` keeps it.
        latents: Final latents (count, C, h, w), float32, as diffusers returns them for `output_type="latent"`.
        seeds: The seed of each picture.
        request: The request as it ran, with the model's defaults filled in.
        timings: Seconds by stage.
        notices: Remarks for the user, for example that a mask was resized.
        flagged: Whether the model's safety checker flagged each picture; None if they were not checked.
    """

    images: list[Image.Image]
    latents: torch.Tensor
    seeds: list[int]
    request: Request
    timings: dict[str, float]
    notices: tuple[str, ...] = ()
    flagged: list[bool] | None = None

    def save(self, path: str | PathLike[str]) -> list[Path]:
        """Save the pictures with their records; an existing file is replaced.

        Args:
            path: A file name ending in .png, .jpg, .jpeg or .webp. One picture is saved under this name. Several are
                numbered: "lemon.png" gives lemon-0001.png, lemon-0002.png and so on.

        Returns:
            The paths of the files, in the order of `images`.

        Raises:
            RequestError: If a file cannot be written under its name, or the name has another ending.
            WriteError: If the disk is full or broken.
        """
        from mezzotint.images.io import save

        path = Path(path)
        numbers = range(1, len(self.images) + 1)
        paths = [path] if len(self.images) == 1 else [path.with_stem(f"{path.stem}-{n:04}") for n in numbers]
        for image, file in zip(self.images, paths, strict=True):
            save(image, file)
        return paths

    def __repr__(self) -> str:
        count, seeds = len(self.images), sorted({self.seeds[0], self.seeds[-1]}) if self.seeds else []
        sizes = " of {}x{}".format(*self.images[0].size) if self.images else ""
        facts = [f"{count} {'picture' if count == 1 else 'pictures'}{sizes}"]
        if seeds:
            facts.append(f"seed{'s' if len(seeds) > 1 else ''} {' to '.join(map(str, seeds))}")
        if "total" in self.timings:
            facts.append(f"{self.timings['total']:.1f} s")
        if self.flagged and any(self.flagged):
            facts.append(f"{sum(self.flagged)} flagged")
        if self.notices:
            facts.append(f"notices: {'; '.join(self.notices)}")
        return f"<Result: {', '.join(facts)}>"

    def _repr_png_(self) -> bytes | None:
        """Show a single picture in a notebook."""
        return _png(self.images[0]) if len(self.images) == 1 else None

    def _repr_html_(self) -> str:
        """Show every picture with its seed in a notebook."""
        figures = []
        for image, seed in zip(self.images, self.seeds, strict=True):
            data = base64.b64encode(_png(image)).decode()
            title = html.escape(self.request.prompt[:300])
            figures.append(
                f'<figure style="display:inline-block;margin:0 8px 8px 0"><img src="data:image/png;base64,{data}" '
                f'width="{image.width}" height="{image.height}" alt="{title}" title="{title}">'
                f"<figcaption>seed {seed}</figcaption></figure>"
            )
        return f"<div>{''.join(figures)}</div>"


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
