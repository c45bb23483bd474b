"""What every parity test needs: peers that keep quiet."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import diffusers
import pytest
from diffusers.configuration_utils import ConfigMixin

from pictures import Pair, build

# diffusers reads the signature of a class each time that a configuration is given to it; its callers change the set.
signature_names = functools.cache(ConfigMixin._get_init_keys)
ConfigMixin._get_init_keys = staticmethod(lambda cls: {*signature_names(cls)})


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
