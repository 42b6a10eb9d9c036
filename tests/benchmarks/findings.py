"""All findings of a planted output of the size of MNIST-LeNet's: time and memory.

The aim is 30 s and 1 GB for 1,000 intervals; each runs in a process of its own that has nothing
else to do, and seconds count what importing takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .suite import ROOT, Bench, Row

_CHILD = """
import json, sys, time
begin = time.perf_counter()
import lcray
from lcray.analyses.registry import FINDINGS
from tests.benchmarks.peaks import peak_bytes
seconds = {}
for finding in FINDINGS:
    start = time.perf_counter()
    try:
        lcray.findings(sys.argv[1], only=[finding.name])
    except lcray.LcrayError as error:
        print(error, file=sys.stderr)
        continue
    seconds[finding.name] = time.perf_counter() - start
seconds["all findings"] = time.perf_counter() - begin
print(json.dumps([seconds, peak_bytes()]))
"""


def measure(bench: Bench) -> Iterator[Row]:
    """Seconds of each finding and of all of them, and the peak of the process's memory."""
    intervals = bench.pick(1000, 100)
    case = f"findings lenet intervals={intervals}"
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        out = Path(folder, "out")
        make = [sys.executable, ROOT / "tests" / "planting_large.py", out, str(intervals)]
        subprocess.run(make, check=True)
        command = [sys.executable, "-c", _CHILD, str(out)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = json.loads(done.stdout)
    for name, value in seconds.items():
        yield Row(case, f"{name}_seconds".replace(" ", "_"), value, "s")
    yield Row(case, "peak_memory", peak / 1e6, "MB")


CASES = {"findings": measure}
