"""Loading a single file needs hardly more memory than the model: peak RSS of a fresh process, by benchmarks/."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mezzotint.weights.files import TensorFile

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_2_gb_file_loads_within_1_15_of_its_tensors(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "sd15.safetensors"
    subprocess.run([sys.executable, str(BENCHMARKS / "sd15_file.py"), str(file)], check=True)
    child = [sys.executable, str(BENCHMARKS / "load_memory.py"), str(file), dtype]
    measured = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    assert measured["peak_over_held"] < 1.15


def test_no_tensor_that_was_read_is_kept(tmp_path: Path) -> None:
    save_file({str(i): torch.full((1000,), float(i)) for i in range(25)}, tmp_path / "many.safetensors")
    file, read = TensorFile(tmp_path / "many.safetensors"), list[weakref.ref[torch.Tensor]]()
    for name in file.entries:
        tensor = file.read(name)
        assert tensor[0].item() == float(name) and not any(one() is not None for one in read[:-1])
        read.append(weakref.ref(tensor))


@pytest.mark.slow
def test_tensors_are_read_and_let_go(tmp_path: Path) -> None:
    """The short form: 200 MB read tensor by tensor, of which none is kept, cost the memory of a few."""
    child = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from mezzotint.weights.files import TensorFile

sys.path.insert(0, sys.argv[2])
from load_memory import peak

path = Path(sys.argv[1]) / "large.safetensors"
if len(sys.argv) > 3:
    save_file({str(i): torch.full((4_000_000,), float(i), dtype=torch.float16) for i in range(25)}, path)
else:
    before, file = peak(), TensorFile(path)
    assert [file.read(name).float()[0].item() for name in file.entries] == [float(name) for name in file.entries]
    print((peak() - before) / 1e6)
"""
    command = [sys.executable, "-c", child, str(tmp_path), str(BENCHMARKS)]
    subprocess.run([*command, "write"], check=True)
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 60.0  # a tensor is 8 MB, in float32 16 MB
