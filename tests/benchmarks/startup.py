"""How long a person waits for nothing: the import, and the first answers of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from .suite import ROOT, Bench, Row

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


CASES = {"startup": startup}
