"""What every parity test needs: peers that keep quiet."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """diffusers logs every key that a scheduler does not know, transformers draws bars."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.set_verbosity(level)
    diffusers.utils.logging.enable_progress_bar()
