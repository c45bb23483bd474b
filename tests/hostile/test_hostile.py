"""Files that would hurt: none is executed, and each is refused in a sentence or read as data, at a bounded cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hostile import corpus

MEMORY = 1_200_000_000  # bytes
SECONDS = 5
TIMEOUT = 280


@dataclass
class Table:
    """The figures of docs/security.md, and what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")

    def add(self, case: corpus.Case, found: dict[str, Any], *, measured: bool) -> None:
        name = f"{case.group} / {case.name} ({case.door})"
        self.groups[case.group] += 1
        self.counts["files"] += 1
        self.counts["read as data" if found["read"] else "refused with a sentence"] += 1
        for problem in ("internal", "executed"):
            if found[problem]:
                self.counts[problem] += 1
                self.findings.append(f"{problem}: {name}: {found[problem]}")
        if measured:
            self.slowest = max(self.slowest, (found["seconds"], name))
            self.largest = max(self.largest, (found["peak"], name))
            for problem, over in (("slow", found["seconds"] > SECONDS), ("large", found["peak"] > MEMORY)):
                if over:
                    self.counts[problem] += 1
                    self.findings.append(f"{problem}: {name}: {found['seconds']:.1f} s, {found['peak'] / 1e6:.0f} MB")
        self.findings += [
            f"not a sentence: {name}: {text!r}" for text in found["sentences"] if "\n" in text or len(text) < 10
        ]


def run(cases: list[corpus.Case], model: Path, folder: Path, *, measured: bool, timeout: float = TIMEOUT) -> Table:
    """Put the cases through a child process, and through another one after a crash."""
    table = Table()
    left = list(cases)
    warm = [str(case.path) for case in cases if " plain" in case.name]
    while left:
        listing = folder / "cases.json"
        rows = [{**asdict(case), "path": str(case.path)} for case in left]
        listing.write_text(json.dumps({"warm": warm, "cases": rows}))
        command = [sys.executable, "-W", "ignore", str(Path(corpus.__file__).with_name("child.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [*command, str(listing), str(model), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        ) as child:
            try:
                output, errors = child.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                output, errors = child.communicate()
        ended = [json.loads(line) for line in output.splitlines()]
        assert ended, errors.decode()[-2000:]
        probe = ended.pop(0)["probe"]
        assert "os.mkdir" in str(probe["executed"]) and "MemoryError" in str(probe["internal"]), probe
        assert ended, errors.decode()[-2000:]
        for line in ended:
            if "end" in line:
                table.add(left.pop(0), line, measured=measured)
        if left and "begin" in ended[-1]:
            case = left.pop(0)
            reason = signal.Signals(-child.returncode).name if child.returncode < 0 else child.returncode
            table.counts["files"] += 1
            table.counts["crashes"] += 1
            table.findings.append(f"crash: {case.group} / {case.name} ({case.door}): {reason} {errors.decode()[-300:]}")
        elif left:
            raise AssertionError(errors.decode()[-2000:])
    return table


def check(table: Table, canaries: Path) -> None:
    table.findings += [f"canary: {path.name}" for path in canaries.iterdir()]
    assert not table.findings, "\n".join(table.findings)


def test_a_sample_of_the_corpus(tmp_path: Path, sd1_folder: Path) -> None:
    """Every eighth file of each group; the child is started once."""
    cases = list(corpus.write(tmp_path / "c", sd1_folder, long=False, every=8))
    table = run(cases, sd1_folder, tmp_path, measured=False)
    assert table.counts["files"] == len(cases) > 100
    assert table.counts["read as data"] and table.counts["refused with a sentence"]
    check(table, tmp_path / "c" / "canaries")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_corpus(tmp_path: Path, sd1_folder: Path) -> None:
    cases = list(corpus.write(tmp_path / "c", sd1_folder, long=True))
    table = run(cases, sd1_folder, tmp_path, measured=True, timeout=3000)
    for name, value in (("slowest", table.slowest), ("largest", table.largest), *table.counts.items()):
        print(f"{name}: {value}")
    print("\n".join(table.findings[:200]))
    assert table.counts["files"] == len(cases) >= 530
    check(table, tmp_path / "c" / "canaries")
