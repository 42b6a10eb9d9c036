"""Progress: lines where there is no terminal, a bar where there is one; never on stdout."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable

import pytest
import scenes

from lcray.cli import progress
from lcray.execution.driver.analyze import Progress

SCRIPT = """
from lcray.execution.driver.analyze import Progress
from lcray.cli.progress import reporting
import time
with reporting() as report:
    report(Progress("start"))
    report(Progress("probe"))
    for done in range(0, 9, 2):
        report(Progress("spans", done, 8, running=0.5, seconds_left=42.0))
        time.sleep(0.2)
    report(Progress("reduce", 8, 8))
print("done")
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def set_time(seconds: float) -> None:
        now[0] = 1000.0 + seconds

    return set_time


def test_a_line_a_phase_and_one_a_minute(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.reporting() as report:
        for seconds, state in (
            (0, Progress("start")),
            (1, Progress("probe")),
            (2, Progress("spans", 0, 100)),
            (3, Progress("spans", 1, 100)),
            (61.9, Progress("spans", 20, 100)),
            (62, Progress("spans", 21, 100)),
            (121, Progress("spans", 22, 100)),
            (183, Progress("spans", 99, 100)),
            (183.1, Progress("spans", 100, 100)),
            (183.2, Progress("reduce", 100, 100)),
        ):
            clock(seconds)
            report(state)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "lcray: starting workers",
        "lcray: measuring a gradient",
        "lcray: intervals 0/100",
        "lcray: intervals 21/100",
        "lcray: intervals 99/100",
        "lcray: intervals 100/100",
        "lcray: merging tables",
    ]


def test_what_takes_long_says_so_first_and_names_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.reporting() as report:
        report(Progress("spans", 0, 100, seconds_left=7200.0))
        report(Progress("spans", 99, 100, running=0.9, seconds_left=700.0))
        report(Progress("spans", 100, 100, seconds_left=0.0))
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("lcray: this will take about 2 h 0 min; lcray plan explains why")
    assert lines == ["lcray: intervals 0/100, 2 h 0 min left", "lcray: intervals 100/100"]
    with progress.reporting() as report:
        report(Progress("spans", 0, 100, seconds_left=599.0))
    assert capsys.readouterr().err == "lcray: intervals 0/100, 10 min left\n"


def test_a_bar_on_a_terminal_that_leaves_nothing_behind() -> None:
    master, slave = pty.openpty()
    environment = scenes.python_environment() | {"TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stderr=slave,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    os.close(slave)
    written = b""
    while True:
        try:
            block = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        written += block
    os.close(master)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "done\n")
    text = written.decode()
    assert "merging tables" in text
    assert "8/8" in text
    assert "42 s left" in text
    assert "\x1b[" in text
    assert "lcray: " not in text
    # The bar's line is erased at the end: nothing printable follows the last erasure.
    assert text.rpartition("\x1b[2K")[2].strip() == "" or text.endswith("\x1b[2K")
