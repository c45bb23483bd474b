"""What every parity test needs: peers that keep quiet."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest

from pictures import Pair, build


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """diffusers logs every key that a scheduler does not know, transformers draws bars."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.set_verbosity(level)
    diffusers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """A small random model of each family, in diffusers and here."""
    return build(tmp_path_factory.mktemp("families"))
