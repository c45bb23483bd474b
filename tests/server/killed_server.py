"""Servers over the stub, each in a child of this process, so that the imports are made once.

    killed_server.py, then a line [DATA, PORT_FILE, MOMENT, COUNT, ACTION] in JSON for each server on standard input

At the COUNTth time of MOMENT a server kills itself, or holds: it writes DATA/held and waits for DATA/go. The id of the
child is printed when it starts, and its exit status when it has ended. The moment "never" does not come.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

import mezzotint.files
import mezzotint.server.files
from mezzotint.server import Settings, app, store
from mezzotint.server.files import DataFolder
from mezzotint.server.history import History
from mezzotint.server.service import Service
from mezzotint.server.store import Store
from mezzotint.server.worker import Worker
from stub_server import StubModels

# the owner and name of a function, and whether the moment is after it
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "submitting": (Store, "_insert", True),  # in the transaction
    "submitted": (Store, "submit", True),  # and not yet answered
    "claimed": (Worker, "perform", False),
    "step": (Worker, "_check_stop", False),
    "written": (mezzotint.files, "_sync", False),  # under a temporary name, not yet on the disk
    "synced": (pathlib.Path, "replace", False),
    "named": (mezzotint.server.files, "_sync_folder", False),
    "filed": (DataFolder, "write", True),  # the file is there, its row is not
    "adding": (store, "_end", True),  # the last picture and the end of its job, in the transaction
    "added": (Store, "add_picture", True),
    "ended": (History, "clean", False),
}


def act_at(moment: str, count: int, action: str, data: Path) -> None:
    owner, name, after = MOMENTS[moment]
    function, times = getattr(owner, name), itertools.count(1)

    def act() -> None:
        if next(times) != count:
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        (data / "held").touch()
        while not (data / "go").exists():
            time.sleep(0.005)

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        if not after:
            act()
        result = function(*args, **options)
        if after:
            act()
        return result

    setattr(owner, name, wrapped)


def run(data: Path, port_file: Path, moment: str, count: int, action: str) -> None:
    if moment != "never":
        act_at(moment, count, action, data)
    app.Service = lambda settings: Service(settings, StubModels(settings, delay=0.0005))

    def write_port(url: str) -> None:
        Path(f"{port_file}.new").write_text(url)
        os.replace(f"{port_file}.new", port_file)

    app.serve(Settings(data=data, port=0), write_port)


if __name__ == "__main__":
    for line in iter(sys.stdin.readline, ""):
        data, port_file, moment, count, action = json.loads(line)
        if (child := os.fork()) == 0:
            try:
                run(Path(data), Path(port_file), moment, count, action)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
