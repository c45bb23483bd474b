"""The dtype of a model, by name, by device and by what the processor multiplies natively."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mezzotint import devices
from mezzotint.devices import bfloat16_hint, dtype_on
from mezzotint.errors import RequestError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", None])
def test_auto(capability: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False} | {capability: True})
    assert dtype_on(CPU, "auto") == (torch.bfloat16 if capability else torch.float32)
    assert dtype_on(CPU, None) == torch.float32
    assert dtype_on(GPU, "auto") == dtype_on(GPU, None) == torch.bfloat16
    assert dtype_on(GPU, "auto", torch.float16) == torch.float16
    assert dtype_on(CPU, "float16") == dtype_on(GPU, torch.float16) == torch.float16
    with pytest.raises(RequestError, match="dtype is 'int8'"):
        dtype_on(CPU, "int8")


def test_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_native_bfloat16", lambda: True)
    (line,) = bfloat16_hint(None, CPU, 859_520_964)  # SD 1.5's UNet
    assert "--dtype auto" in line and " 1.7 GB less memory" in line
    nothing: list[tuple[Any, ...]] = [
        (None, GPU, 859_520_964),
        (None, CPU, 20_000_000),
        ("float32", CPU, 859_520_964),
        ("auto", CPU, 859_520_964),
    ]
    assert not any(bfloat16_hint(*arguments) for arguments in nothing)
    monkeypatch.setattr(devices, "has_native_bfloat16", lambda: False)
    assert not bfloat16_hint(None, CPU, 859_520_964)
