"""`--preview` and `--open`: a picture while it is drawn, and in the viewer when it is finished."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.cli.terminal import say
from mezzotint.errors import MezzotintError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mezzotint.pipeline import Pipeline


class Preview:
    """A file that shows what is being drawn, whole at any time.

    Args:
        pipe: The pipeline that draws.
        path: The file, which is replaced.
        vae: A TAESD that decodes what is shown: a file, a folder or a hub id; None estimates the colours.
    """

    def __init__(self, pipe: Pipeline, path: Path, vae: str | None = None) -> None:
        self._path: Path | None = path
        self._latents = pipe.preview() if vae is None else pipe.preview(vae)

    def show_latents(self, latents: Tensor) -> None:
        """Write an estimate of the final latents, (B, C, h, w), as one picture, side by side."""
        self.show(self._latents.picture(latents))

    def show(self, image: Image.Image) -> None:
        """Write a picture; if that fails, say so and write no more, since the drawing goes on."""
        from mezzotint.images.io import save

        if self._path is None:
            return
        try:
            save(image, self._path)
        except MezzotintError as error:
            say(f"no more previews: {error}")
            self._path = None


def open_picture(path: Path) -> None:
    """Open a file with the system's viewer; print a sentence if there is none."""
    absolute = str(path.absolute())
    try:
        if sys.platform == "win32":
            os.startfile(absolute)
            return
        name = "open" if sys.platform == "darwin" else "xdg-open"
        viewer = shutil.which(name)
        if viewer is None or (name == "xdg-open" and not {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}):
            say(f"{path} is not opened: this system has no {name}, or no display")
            return
        quiet = subprocess.DEVNULL
        subprocess.Popen([viewer, absolute], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError as error:
        say(f"{path} is not opened: {error.strerror or error}")
