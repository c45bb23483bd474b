"""Free memory and processors, memory of this process, and how freed memory is returned. Does not import torch.

The numbers are Linux's (/proc, cgroups); on other systems `resident` and `available` return 0 and None.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
THRESHOLD = 2**17  # bytes from which glibc gives an allocation pages of its own; where it begins, and then climbs
KEPT = 2**26  # bytes up to which `keep_freed` leaves an allocation in the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
TUNED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")  # the user's own settings, which glibc reads itself


def resident() -> int:
    """Return the resident size of this process (RSS), in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def mapped() -> int:
    """Bytes of files, the libraries' code, in this process's memory now; how many pages is the page cache's choice."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:")), 0)


def peak() -> int:
    """Return the largest resident size so far, in bytes, as `/usr/bin/time -v` shows it."""
    try:
        import resource
    except ImportError:
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def available() -> int | None:
    """Bytes that more could be taken without pushing anything out: what the system has free, or the cgroup's rest."""
    found = [number for number in (_free(), *_cgroups()) if number is not None]
    return max(min(found), 0) if found else None


def return_freed() -> None:
    """Make the allocator return freed memory to the system at once, so that the peak is the sum of what is in use.

    glibc gives a large allocation pages of its own, which it gives back; but each time that it does, it moves the bound
    between small and large up, to 32 MiB, and what is smaller stays in the heap. Here the bound stays where it begins.
    """
    _set_malloc({M_MMAP_THRESHOLD: THRESHOLD, M_TRIM_THRESHOLD: THRESHOLD})


def keep_freed() -> None:
    """Make the allocator keep freed memory for later allocations of this process.

    Otherwise glibc returns much of it after each step and maps it again in the next one; touching new pages costs time.
    All threads share one heap, because glibc unmaps the empty parts of a thread's own heap whatever the thresholds.
    Call it before threads are started, and in a program's own process only. `return_freed` overrules it.
    """
    if not any(name in os.environ for name in TUNED):
        _set_malloc({M_MMAP_THRESHOLD: KEPT, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1})


def trim_heap() -> None:
    """Return all freed pages to the system once, after something large was deleted."""
    trim = _glibc("malloc_trim")
    if trim:
        trim(ctypes.c_size_t(0))


def _set_malloc(options: dict[int, int]) -> None:
    mallopt = _glibc("mallopt")
    for name, value in options.items() if mallopt else ():
        mallopt(name, value)


def _glibc(name: str) -> Any:
    """Return a function of glibc, or None on other systems; musl has none of these, and returns memory by itself."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _free() -> int | None:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def usable_cpus(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Return how many CPUs this process may use, by its affinity mask and the quotas of its cgroups; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([cpus, *_cpu_quotas(root, own)]), 1)


def default_threads(torch_threads: int) -> int:
    """Return how many threads a command runs with by default.

    Args:
        torch_threads: What torch would take, `torch.get_num_threads()`; it follows OMP_NUM_THREADS and the affinity
            mask, but no cgroup's quota. A thread without a CPU of its own makes all others wait for it.
    """
    return min(torch_threads, usable_cpus())


def _cpu_quotas(root: Path, own: Path) -> list[int]:
    """Return the quota of each cgroup of this process in whole CPUs."""
    quotas = []
    for version, folder in _cgroup_folders("cpu", root, own):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:  # version 1 has -1 for no limit
                quotas.append(int(quota) // int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return quotas


def _cgroups(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Return what is left of the limit of each cgroup of this process; files in the page cache do not count."""
    left = []
    for version, folder in _cgroup_folders("memory", root, own):
        limit, used = (
            ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        except (OSError, ValueError):
            continue
        if most != "max" and int(most) < 2**60:
            left.append(int(most) - now + cached)
    return left


def _cgroup_folders(controller: str, root: Path, own: Path) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of each cgroup of this process with this controller, and of those above it."""
    try:
        rows = [row.split(":", 2) for row in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in rows:
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        folder = (top / path.lstrip("/")).resolve()
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            yield (1 if controllers else 2), place
