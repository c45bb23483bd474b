"""Measure what the server adds to `Pipeline.generate`, and how often a job waits for the disk.

    python benchmarks/server_overhead.py [--repeats 30] [--sampler lcm] [--steps 4] [--data FOLDER]

A server of the bundled model, in a process of its own, answers on loopback. Its worker thread also calls `generate`
with the same requests, outside of the queue, with the same weights and threads: two processes that draw the same differ
by up to 5 ms in each run, as long as they live. The two ways take turns, and what the server adds is the median of the
differences of neighbours, with its standard error. A request by our own API is submitted, the event of its end awaited,
and the file fetched. Nothing is subtracted: `generate` returns pixels, and what the server adds includes the PNG file,
whose encoding is told too, and the flushes. The processor's time is told too, and page faults. Then strace counts the
flushes of further jobs, if it is installed. The time of one flush is the median of writing 64 KiB to a file of that
disk and syncing it.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import json
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

import mezzotint
from mezzotint.images.io import encode_file
from mezzotint.server.app import serve
from mezzotint.server.settings import Settings
from mezzotint.server.worker import Worker

Fields = dict[str, Any]
WARMUPS = 3  # runs of each way that are not counted


def serve_and_generate(data: Path, preview_every: int) -> None:
    """Run a server whose worker also answers each line of standard input, the fields of a request, by `generate`."""
    asked: queue.SimpleQueue[Fields] = queue.SimpleQueue()
    claim, workers = Worker._claim, set[Worker]()

    def claim_after_generating(worker: Worker) -> Any:
        workers.add(worker)
        while not asked.empty():
            request = mezzotint.Request(**asked.get())
            pipe = worker.models.load(worker.models.default, None, request).pipe
            begin = time.perf_counter()
            image = pipe.generate(request).images[0]
            answer = {"ms": 1000 * (time.perf_counter() - begin), "sha256": sha256(image)}
            print(json.dumps(answer), flush=True)
        return claim(worker)

    def listen() -> None:
        for line in sys.stdin:
            asked.put(json.loads(line))
            for worker in workers:
                worker.wake()

    Worker._claim = claim_after_generating  # type: ignore[method-assign]
    threading.Thread(target=listen, daemon=True).start()
    settings = Settings(data=data, port=0, devices=("cpu",), preview_every=preview_every)
    serve(settings, lambda url: print(url, flush=True))


def sha256(image: Image.Image) -> str:
    """Return the SHA-256 of a picture's pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()


class Server:
    """A server in a process of its own."""

    def __init__(self, data: Path, preview_every: int) -> None:
        command = [sys.executable, __file__, "--serve", str(data), "--preview-every", str(preview_every)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        url = re.search(r"http://[^:]+:(\d+)/", self._line())
        assert url
        self.port = int(url[1])

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def generate(self, fields: Fields) -> Fields:
        """Draw without the queue; return the milliseconds, and the SHA-256 of the pixels."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        answer: Fields = json.loads(self._line())
        return answer

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(60)


@contextmanager
def running(data: Path, preview_every: int) -> Iterator[Server]:
    """Run a server while the block runs."""
    server = Server(data, preview_every)
    try:
        yield server
    finally:
        server.stop()


class Client:
    """Calls the server over connections that stay open, as clients do."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._events = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._events.request("GET", "/api/events")
        self._stream = self._events.getresponse()

    def call(self, method: str, path: str, body: Fields | None = None) -> bytes:
        """Return the body of a reply."""
        self._connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        reply = self._connection.getresponse()
        data = reply.read()
        assert reply.status in (200, 202), data
        return data

    def api(self, fields: Fields) -> bytes:
        """Draw by our own API."""
        id = json.loads(self.call("POST", "/api/jobs", {"request": fields}))["jobs"][0]["id"]
        while True:
            line = self._stream.readline()
            if line.startswith(b"data: ") and id.encode() in line:
                job = json.loads(line[6:])
                if job.get("id") == id and job["state"] == "done":
                    return self.call("GET", f"/api/pictures/{job['pictures'][0]['id']}/file")


def cpu_ms(pid: int) -> float:
    """Return the processor's milliseconds of a process's threads so far."""
    found = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += int((task / "schedstat").read_text().split()[0]) / 1e6
        except OSError:  # it has just ended
            continue
    return found


def page_faults(pid: int) -> float:
    """Return the page faults of a process so far for which nothing was read from a disk."""
    return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def time_flush(folder: Path, repeats: int) -> float:
    """Return the median milliseconds of one flush."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(repeats):
            file.write(os.urandom(65536))
            file.flush()
            begin = time.perf_counter()
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def time_encoding(image: Image.Image, repeats: int) -> float:
    """Return the median milliseconds of encoding a picture as a PNG file with its record."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        encode_file(image, "PNG")
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def count_flushes(pid: int, jobs: int, draw: Callable[[int], object], folder: Path) -> dict[str, float] | None:
    """Return the flushes a job, and the median milliseconds of one; None without strace."""
    if shutil.which("strace") is None:
        return None
    log = folder / "strace"
    command = [
        "strace",
        "-f",
        "-T",
        "-p",
        str(pid),
        "-e",
        "trace=fsync,fdatasync,sync_file_range,msync",
        "-o",
        str(log),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    process.stderr.readline()  # it is attached
    for k in range(jobs):
        draw(k)
    process.terminate()
    process.wait(30)
    times = [1000 * float(found) for found in re.findall(r"= 0 <([\d.]+)>", log.read_text())]
    return {"jobs": jobs, "flushes_a_job": len(times) / jobs, "flush_ms": round(statistics.median(times or [0]), 2)}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="runs of each way [default: 30]")
    parser.add_argument("--sampler", default="lcm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--data", type=Path, help="where the data folder is made [default: the temporary folder]")
    parser.add_argument("--preview-every", type=int, default=1, help="as of mezzotint serve [default: 1]")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_and_generate(options.serve, options.preview_every)
        return

    def fields(seed: int) -> Fields:
        prompt = "a lemon on a blue background"
        return {"prompt": prompt, "seed": seed, "steps": options.steps, "sampler": options.sampler}

    with tempfile.TemporaryDirectory(dir=options.data) as name:
        folder = Path(name)
        with running(folder / "data", options.preview_every) as server:
            client = Client(server.port)

            def draw(way: str, seed: int) -> float:
                """Draw a picture and return the milliseconds."""
                if way == "generate":
                    return float(server.generate(fields(seed))["ms"])
                begin = time.perf_counter()
                client.api(fields(seed))
                return 1000 * (time.perf_counter() - begin)

            with Image.open(io.BytesIO(client.api(fields(0)))) as drawn:
                identical = sha256(drawn) == server.generate(fields(0))["sha256"]
                encoding = time_encoding(drawn, options.repeats)
            times, cpu, faults = ({way: list[float]() for way in ("generate", "api")} for _ in range(3))
            for seed in range(options.repeats + WARMUPS):
                for way in list(times)[:: -1 if seed % 2 else 1]:
                    before = cpu_ms(server.pid), page_faults(server.pid)
                    taken = draw(way, seed)
                    if seed >= WARMUPS:
                        times[way].append(taken)
                        cpu[way].append(cpu_ms(server.pid) - before[0])
                        faults[way].append(page_faults(server.pid) - before[1])
            flush = time_flush(folder, options.repeats)
            flushes = count_flushes(server.pid, 20, lambda seed: client.api(fields(seed)), folder)
    report: dict[str, Any] = {"runs": options.repeats}
    for name, found in (("wall_ms", times), ("cpu_ms", cpu), ("page_faults", faults)):
        medians = {way: round(statistics.median(each), 1) for way, each in found.items()}
        pairs = [server - direct for server, direct in zip(found["api"], found["generate"], strict=True)]
        error = 1.25 * statistics.stdev(pairs) / len(pairs) ** 0.5  # of the median of normal numbers
        report[name] = medians | {"beyond": round(statistics.median(pairs), 1), "error": round(error, 1)}
    report["least_wall_ms"] = {way: round(min(each), 1) for way, each in times.items()}
    report["png_ms"] = round(encoding, 2)
    more = {"flush_ms": round(flush, 2), "strace": flushes, "identical": identical, "load": os.getloadavg()[0]}
    print(json.dumps(report | more, indent=1))


if __name__ == "__main__":
    main()
