"""How long a person waits for nothing: the import, and the first answers of the command line."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .suite import ROOT, Bench, Case, Row

COMMANDS = {
    "import lcray": ["-c", "import lcray"],
    "lcray --version": ["-m", "lcray", "--version"],
    "lcray --help": ["-m", "lcray", "--help"],
    "lcray analyze --help": ["-m", "lcray", "analyze", "--help"],
}


def startup(bench: Bench) -> list[Row]:
    """The best of several starts, over that of Python alone."""
    rounds = bench.pick(10, 2)
    times: dict[str, list[float]] = {name: [] for name in ("python", *COMMANDS)}
    for _ in range(rounds):
        for name, arguments in {"python": ["-c", "pass"], **COMMANDS}.items():
            times[name].append(_seconds(arguments))
    alone = min(times["python"])
    return [Row(f"startup: {name}", "seconds", min(times[name]) - alone, "s") for name in COMMANDS]


def _seconds(arguments: list[str]) -> float:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - begin


def commands(bench: Bench) -> Iterator[Row]:
    """CPU seconds of commands on a planted output of MNIST-LeNet's size: medians."""
    intervals = bench.pick(1000, 100)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        out = Path(folder, "out")
        make = [sys.executable, ROOT / "tests" / "planting_large.py", out, str(intervals)]
        subprocess.run(make, check=True)
        sql = "SELECT layer, sum(lc) AS lc FROM layers GROUP BY layer"
        asked: dict[str, list[str]] = {
            "query": [str(out), sql],
            "status": [str(out)],
            "export": [str(out), "--to", "csv", "--out", f"{folder}/csv", "--table", "layers"],
            "report": [str(out)],
            "findings": [str(out)],
        }
        for name, arguments in asked.items():
            command = ["-m", "lcray", name, *arguments]
            used = [_cpu_seconds(command) for _ in range(bench.pick(5, 1))]
            case = f"command: lcray {name} intervals={intervals}"
            yield Row(case, "cpu_seconds", statistics.median(used), "s")


def _cpu_seconds(arguments: list[str]) -> float:
    before = os.times()
    _seconds(arguments)
    after = os.times()
    return after.children_user + after.children_system - sum(before[2:4])


CASES: dict[str, Case] = {"startup": startup, "commands": commands}
