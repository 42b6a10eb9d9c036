"""The report of a large output: seconds to make it, megabytes, seconds to its first picture.

The aims are 15 MB and 3 s to the first picture, for 1,000 intervals and 60 layers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .suite import ROOT, Bench, Row

_MAKE = "import sys; sys.path.insert(0, sys.argv[1]); import planting_large, pathlib; "
_MAKE += "planting_large.wide(pathlib.Path(sys.argv[2]), int(sys.argv[3]))"
_REPORT = "import sys, lcray; lcray.report(sys.argv[1])"
_LOOK = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import browsing
with browsing.chromium() as browser:
    sight = browsing.look(browser, pathlib.Path(sys.argv[2]))
    print(sight.page.evaluate("document.documentElement.dataset.first"))
"""


def measure(bench: Bench) -> Iterator[Row]:
    """Making the page in a process of its own, its size, and its first picture in Chromium."""
    intervals = bench.pick(1000, 40)
    case = f"report intervals={intervals} layers=60"
    tests = str(ROOT / "tests")
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        out = Path(folder, "out")
        _python(_MAKE, tests, str(out), str(intervals))
        start = time.perf_counter()
        _python(_REPORT, str(out))
        yield Row(case, "making", time.perf_counter() - start, "s")
        page = out / "report.html"
        yield Row(case, "size", page.stat().st_size / 1e6, "MB")
        yield Row(case, "first_picture", float(_python(_LOOK, tests, str(page))) / 1e3, "s")


def _python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


CASES = {"report": measure}
