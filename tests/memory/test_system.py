"""What is free, and freed memory that goes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mezzotint.memory import system

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_what_is_free_is_within_what_is_there() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    free = system.available()
    assert free is not None and 0 < free < total
    assert 10**7 < system.resident() <= system.peak() * 1.05 < total


def test_the_tightest_cgroup_counts(tmp_path: Path) -> None:
    """Version 2 and version 1; a parent's limit holds for its children; files that are cached are free."""
    own = tmp_path / "own"
    own.write_text("0::/a/b\n5:cpu,cpuacct:/z\n4:memory:/c\n")
    for folder, limit, used in (("a/b", "max", 5), ("a", "1000", 600), ("memory/c", "5000", 1000)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        one = folder.startswith("memory")
        (tmp_path / folder / ("memory.limit_in_bytes" if one else "memory.max")).write_text(f"{limit}\n")
        (tmp_path / folder / ("memory.usage_in_bytes" if one else "memory.current")).write_text(f"{used}\n")
        (tmp_path / folder / "memory.stat").write_text("inactive_file 100\nactive_file 20\nanon 3\n")
    assert sorted(system._cgroups(tmp_path, own)) == [1000 - 600 + 120, 5000 - 1000 + 120]
    assert system._cgroups(tmp_path, tmp_path / "none") == []


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),  # a third thread would stand still half of the time
        ({"a/cpu.max": "max 100000", "cpu.max": "300000 100000", "a/b/cpu.max": "1600000 100000"}, 3),
        ({"a/b/cpu.max": "50000 100000"}, 1),
        ({"a/b/cpu.max": "nonsense"}, 8),
        ({"cpu/z/cpu.cfs_quota_us": "-1", "cpu/z/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/z/cpu.cfs_quota_us": "400000", "cpu/z/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "500000", "cpu/cpu.cfs_period_us": "100000"}, 5),
        ({"memory/c/cpu.max": "100000 100000"}, 8),
    ],
    ids=str,
)
def test_threads_follow_the_quota_of_cpus(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 and version 1, of this process and of the groups above it; the affinity mask is of 8 CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (own := tmp_path / "own").write_text("0::/a/b\n5:cpu,cpuacct:/z\n4:memory:/c\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert system.usable_cpus(tmp_path, own) == cpus
    assert system.usable_cpus(tmp_path, tmp_path / "none") == 8
    monkeypatch.setattr(system, "usable_cpus", lambda: cpus)
    assert [system.default_threads(n) for n in (1, 4, 64)] == [1, min(4, cpus), cpus]


def test_a_cgroup_without_room_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_free", lambda: 10**9)
    monkeypatch.setattr(system, "_cgroups", lambda: [0, 10**8])
    assert system.available() == 0


@linux
def test_freed_memory_goes_back() -> None:
    """glibc keeps what is below its bound, which an allocation of 30 MB that is freed raises to 30 MB."""
    child = """
import sys
from mezzotint.memory import system
if sys.argv[1] == "back":
    system.return_freed()
import torch
del (large := [torch.ones(30_000_000, dtype=torch.uint8)])[:]
before = system.resident()
small = [torch.ones(3_000_000, dtype=torch.uint8) for _ in range(20)]
keep = torch.ones(200_000, dtype=torch.uint8)
del small
print((system.resident() - before) / 1e6)
"""
    left = {
        how: float(
            subprocess.run([sys.executable, "-c", child, how], check=True, capture_output=True, text=True).stdout
        )
        for how in ("back", "kept")
    }
    assert left["back"] < 5.0 < left["kept"]


@linux
def test_freed_memory_is_kept_until_the_heap_is_trimmed() -> None:
    """glibc gives 40 MB pages of their own each time, and unmaps the heap of a thread as soon as it is empty."""
    child = """
import resource, sys, threading
from mezzotint.memory import system
if sys.argv[1] == "keep":
    system.keep_freed()
faults = []
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(40_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
def work():
    touch()
    touch()
    system.trim_heap()
    touch()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*faults)
"""
    for how, again in (("keep", False), ("default", True)):
        done = subprocess.run([sys.executable, "-c", child, how], check=True, capture_output=True, text=True)
        first, second, trimmed = (int(part) for part in done.stdout.split())
        assert (second > first / 2) == again and trimmed > first / 2
