"""schemathesis over the OpenAPI document, against a stub: 500 examples an operation, none of them a 5xx.

Its packages are not among the pinned ones: `make test-slow` installs it by itself and names it in SCHEMATHESIS.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from live import listening
from mezzotint.server import Limits, Settings, create_app
from mezzotint.server.service import Service
from mezzotint.server.settings import FOLDERS
from stub_server import StubModels

PROGRAM = os.environ.get("SCHEMATHESIS", "")
CHECKS = "not_a_server_error,status_code_conformance,unsupported_method"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not PROGRAM, reason="SCHEMATHESIS names no program; make test-slow installs it")
def test_no_example_is_a_server_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: tmp_path / name for name in FOLDERS}
    for folder in folders.values():
        folder.mkdir()
        (folder / "lemon.safetensors").write_bytes(b"")
    settings = Settings(data=tmp_path / "data", limits=Limits(queue=1_000_000), **folders)
    core = Service(settings, StubModels(settings))
    monkeypatch.setattr(core.workers[0], "pause", lambda paused: None)  # else txt2img waits for a queue that is paused
    with listening(create_app(settings, core)) as port:
        command = [PROGRAM, "run", f"http://127.0.0.1:{port}/openapi.json", "--max-examples", "500"]
        command += ["--phases", "fuzzing", "--checks", CHECKS, "--continue-on-failure", "--no-shrink"]
        command += ["--exclude-path", "/api/events", "--request-timeout", "60"]  # the events never end
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    tested = re.search(r"Tested: (\d+)", done.stdout)
    assert done.returncode == 0 and tested and int(tested[1]) >= 70, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout[-600:])
