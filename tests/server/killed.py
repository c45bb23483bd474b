"""Starts the servers of killed_server.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

HERE = Path(__file__).parent


def start_parent() -> subprocess.Popen[str]:
    """Start the process whose children the servers are."""
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    command, pipe = [sys.executable, str(HERE / "killed_server.py")], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)


class Servers:
    """Servers on one data folder, one after the other."""

    def __init__(self, parent: subprocess.Popen[str], folder: Path) -> None:
        self.data, self.port_file = folder / "data", folder / "port"
        self.parent = parent
        self.child = 0

    def start(self, moment: str = "never", count: int = 1, action: str = "kill") -> None:
        """Start a server; it may be killed before it answers."""
        self.port_file.unlink(missing_ok=True)
        assert self.parent.stdin and self.parent.stdout
        self.parent.stdin.write(json.dumps([str(self.data), str(self.port_file), moment, count, action]) + "\n")
        self.parent.stdin.flush()
        self.child = int(self.parent.stdout.readline())
        while not self.port_file.exists():
            time.sleep(0.005)

    def client(self) -> httpx.Client:
        """Return a client of the server."""
        return httpx.Client(base_url=self.port_file.read_text(), timeout=30)

    def send(self, number: int) -> None:
        """Send a signal to the server."""
        os.kill(self.child, number)

    def wait(self) -> int:
        """Wait until the server has ended, and return its exit status."""
        assert self.parent.stdout
        status, self.child = int(self.parent.stdout.readline()), 0
        return status

    def close(self) -> None:
        """Kill what still runs."""
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            self.wait()
