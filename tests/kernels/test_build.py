"""The kernels are compiled where they can be."""

from __future__ import annotations

import os
import platform
import shutil
import sys

import pytest
import torch

from mezzotint import kernels


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="kernels are for x86-64 Linux")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler")
@pytest.mark.skipif(kernels.VARIABLE in os.environ, reason=f"{kernels.VARIABLE} is set")
def test_the_libraries_are_there() -> None:
    """An error of the compiler ends no installation, so that it is seen here."""
    assert kernels.LIBRARY.exists()
    assert kernels.LIBRARY_BFLOAT16.exists()
    assert "cannot be loaded" not in kernels.describe()
    assert "other sources" not in kernels.describe()


@pytest.mark.parametrize(
    "capabilities, reason",
    [
        ({}, "the processor has no AVX-512 BF16"),
        ({"avx512_bf16": True}, None),
        ({"avx512_bf16": True, "amx_bf16": True}, "the processor has AMX, which torch's attention uses"),
    ],
)
def test_the_library_for_bfloat16_must_be_enabled(
    capabilities: dict[str, bool], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened on a processor with its instructions alone, where the variable says so."""
    load = kernels._load_bfloat16.__wrapped__
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(kernels, "_open", lambda path: path)
    monkeypatch.setattr(kernels, "LIBRARY_BFLOAT16", kernels.LIBRARY.with_name("attention.c"))  # any file
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert load() == "MEZZOTINT_KERNELS is not bfloat16"
    monkeypatch.setenv(kernels.VARIABLE, "bfloat16")
    assert load() == (reason or kernels.LIBRARY_BFLOAT16)
    monkeypatch.setattr(kernels, "LIBRARY_BFLOAT16", kernels.LIBRARY.with_name("missing.so"))
    assert load() == "not compiled"
