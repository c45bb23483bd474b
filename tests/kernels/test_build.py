"""The kernels are compiled where they can be."""

from __future__ import annotations

import os
import platform
import shutil
import sys

import pytest

from mezzotint import kernels


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="kernels are for x86-64 Linux")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler")
@pytest.mark.skipif(kernels.VARIABLE in os.environ, reason=f"{kernels.VARIABLE} is set")
def test_the_library_is_there() -> None:
    """An error of the compiler ends no installation, so that it is seen here."""
    assert kernels.LIBRARY.exists()
    assert "cannot be loaded" not in kernels.describe()
    assert "other sources" not in kernels.describe()
