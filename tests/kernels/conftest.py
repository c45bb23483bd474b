"""Kernels are tested on every processor that can run them, also where torch is faster."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def no_wider_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch say that it has AVX2 at most."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
