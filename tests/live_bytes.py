"""Count the bytes of tensors that exist at once: the same on every machine, unlike the resident size of a process."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def live_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes of tensors that `run` leaves behind, and the most that exist at once while it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        total += change.nbytes()
        most = max(most, total)
    del result
    return total, most
