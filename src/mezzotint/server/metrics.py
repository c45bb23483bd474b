"""Metrics for Prometheus, read from the service when they are scraped."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mezzotint.memory.system import resident
from mezzotint.server.service import Service


class _Collector:
    """Collects the metrics of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the numbers."""
        core = self._service
        jobs = GaugeMetricFamily("mezzotint_jobs", "Jobs of the data folder, by state.", labels=["state"])
        for state, count in core.store.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        yield CounterMetricFamily("mezzotint_steps", "Denoising steps done since the start.", core.steps_done)
        gauges = {
            "paused": ("Whether the queue is paused.", int(core.paused)),
            "waits_for_disk": ("Whether drawing waits for room on the disk.", int(bool(core.waits_for_disk))),
            "disk_free_bytes": ("Free bytes of the data folder's disk.", core.folder.free()),
            "event_streams": ("Open streams of events.", len(core.events)),
            "resident_bytes": ("Resident size of the process.", resident()),
            "uptime_seconds": ("Seconds since the start.", time.time() - core.started),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(f"mezzotint_{name}", help, value)


def render(service: Service) -> tuple[bytes, str]:
    """Return the metrics as text, and its media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service))
    return generate_latest(registry), CONTENT_TYPE_LATEST
