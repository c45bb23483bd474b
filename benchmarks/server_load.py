"""Load a server with many clients, and measure its answers and its memory.

    python benchmarks/server_load.py --model FOLDER [--clients 64] [--jobs 2000] [--queue-wait 0.2]

Clients submit jobs of 2 steps until so many were accepted; who is refused (429, with Retry-After) waits and sends
again. Meanwhile one more client asks /healthz all the time. The server is a process of its own. Printed, as JSON: what
was sent, accepted, refused and done; milliseconds of /healthz and of submissions while jobs are drawn; the server's
resident MiB when 200 jobs were done, halfway, and at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def server(data: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Run a server; yield its port and its process id."""
    command = [sys.executable, "-m", "mezzotint", "serve", "--port", "0", "--data", str(data), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = re.search(r"http://[^:]+:(\d+)/", process.stdout.readline())
        assert url
        yield int(url[1]), process.pid
    finally:
        process.terminate()
        process.wait(60)


def call(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[Any, float]:
    """Return a reply, read, and its milliseconds."""
    begin = time.perf_counter()
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    reply.data = reply.read()  # type: ignore[attr-defined]
    return reply, 1000 * (time.perf_counter() - begin)


class Load:
    """Clients that share a number of jobs.

    Args:
        port: The port of the server.
        jobs: How many are to be accepted.
        wait: Seconds that a refused client waits.
    """

    def __init__(self, port: int, jobs: int, wait: float) -> None:
        self.port, self.jobs, self.wait = port, jobs, wait
        self.counts, self.times = Counter[int](), list[float]()
        self.accepted, self.without_retry_after = 0, 0
        self.lock = threading.Lock()

    def client(self, number: int) -> None:
        """Submit jobs until there are enough."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        while True:
            with self.lock:
                if self.accepted >= self.jobs:
                    return
                self.accepted += 1  # taken; given back if it is refused
                seed = self.accepted
            body = {"request": {"prompt": f"client {number}", "seed": seed, "steps": 2}}
            reply, milliseconds = call(connection, "POST", "/api/jobs", body)
            with self.lock:
                self.counts[reply.status] += 1
                self.times.append(milliseconds)
                if reply.status != 202:
                    self.accepted -= 1
                    self.without_retry_after += not reply.getheader("Retry-After")
            if reply.status != 202:
                time.sleep(self.wait)

    def run(self, clients: int) -> list[threading.Thread]:
        """Start clients."""
        threads = [threading.Thread(target=self.client, args=(k,)) for k in range(clients)]
        for thread in threads:
            thread.start()
        return threads


def resident_mib(pid: int) -> float:
    """Return the resident size of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def describe(times: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the largest of some times."""
    ordered = sorted(times)
    quantiles = {"median": statistics.median(ordered), "p99": ordered[int(0.99 * len(ordered))], "max": ordered[-1]}
    return {"n": len(ordered)} | {name: round(value, 1) for name, value in quantiles.items()}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--queue-wait", type=float, default=0.2, help="seconds that a refused client waits")
    options = parser.parse_args()
    marks = sorted({min(200, options.jobs), options.jobs // 2, options.jobs})
    arguments = ("--model", options.model, "--device", "cpu")
    with tempfile.TemporaryDirectory() as name, server(Path(name) / "data", *arguments) as (port, pid):
        load, health, sizes = Load(port, options.jobs, options.queue_wait), list[float](), dict[int, float]()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        threads, begin, looked = load.run(options.clients), time.monotonic(), 0.0
        states: dict[str, int] = {}
        while not states or any(thread.is_alive() for thread in threads) or states["queued"] or states["running"]:
            health.append(call(connection, "GET", "/healthz")[1])
            if time.monotonic() - looked > 0.25:
                looked = time.monotonic()
                lines = call(connection, "GET", "/metrics")[0].data.decode().splitlines()
                found = [line.split() for line in lines if line.startswith("mezzotint_jobs{")]
                states = {name.split('"')[1]: int(float(count)) for name, count in found}
                for mark in marks:
                    if states["done"] >= mark and mark not in sizes:
                        sizes[mark] = round(resident_mib(pid), 1)
            time.sleep(0.02)
        seconds = time.monotonic() - begin
    sent, accepted, refused = load.counts.total(), load.counts[202], load.counts[429]
    report = {
        "clients": options.clients,
        "sent": sent,
        "accepted": accepted,
        "refused": refused,
        "other": sent - accepted - refused,
        "refused_without_retry_after": load.without_retry_after,
        "states": states,
        "seconds": round(seconds, 1),
        "healthz_ms": describe(health),
        "submit_ms": describe(load.times),
        "resident_mib": sizes,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
