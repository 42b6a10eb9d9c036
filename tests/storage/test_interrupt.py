"""Ctrl-C and SIGTERM end what DuckDB would go on with for ever, in a process as a user has it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import planting
import psutil
import pytest
import scenes

import lcray
from lcray.cli.app import app, main
from lcray.errors import UsageError
from lcray.storage.interrupt import interruptible, left_behind

ENDLESS = {
    "recursive": "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t) "
    "SELECT count(*) FROM t",
    "rows": "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT 1 FROM t) SELECT count(*) FROM t",
    "join": "SELECT count(*) FROM range(100000000) a, range(100000000) b "
    "WHERE a.range * b.range % 7 = 3",
    # one call of one function, which DuckDB does not interrupt; some minutes
    "call": "SELECT levenshtein(repeat('ab', 500000), repeat('bc', 500000))",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.picture(tmp_path_factory.mktemp("interrupting") / "out")


def default_signals() -> None:
    """As in a terminal, whatever runs the tests."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=scenes.python_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )


def wait_until_at_work(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any("duckdb" in part.path for part in psutil.Process(process.pid).memory_maps()):
            time.sleep(1.5)
            return
        time.sleep(0.1)
    raise AssertionError("the query never began")


@pytest.mark.alone  # on a busy machine a query has not begun when the signal comes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("query", ENDLESS)
def test_a_signal_ends_a_query(out: Path, query: str, number: signal.Signals) -> None:
    process = start("-m", "lcray", "query", str(out), ENDLESS[query])
    try:
        wait_until_at_work(process)
        began = time.monotonic()
        process.send_signal(number)
        said, errors = process.communicate(timeout=20)
        assert time.monotonic() - began < 6  # two seconds where nothing else runs
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (130, "")
    assert errors.strip() == "lcray: interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_an_early_signal_ends_a_query_as_well(
    out: Path, moment: float, number: signal.Signals
) -> None:
    """While modules load, or the output is opened: from when Python runs the command's file on."""
    code = "import os, runpy; os.write(1, b'.'); runpy.run_module('lcray', run_name='__main__')"
    process = start("-c", code, "query", str(out), ENDLESS["recursive"])
    try:
        assert process.stdout is not None and process.stdout.read(1) == "."
        time.sleep(moment)
        process.send_signal(number)
        said, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (130, "")
    assert errors.strip() == "lcray: interrupted"


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """SIGINT reaches this process, as by Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("query", ["recursive", "rows", "join"])
def test_ctrl_c_ends_a_query_of_the_library(out: Path, query: str) -> None:
    results = lcray.open(out)
    began = time.monotonic()
    with interrupted_after(0.3), pytest.raises(KeyboardInterrupt):
        results.sql(ENDLESS[query])
    assert time.monotonic() - began < 2
    assert not left_behind()
    assert results.sql("SELECT 1 AS a")["a"].tolist() == [1]  # and the next one is answered


def test_ctrl_c_ends_a_check_of_verify(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcray.tables.verifying.coverage import Invariant

    endless = Invariant("endless", (), ENDLESS["recursive"])
    monkeypatch.setattr("lcray.tables.verifying.verify.invariants", lambda plan: [endless])
    with interrupted_after(1.0), pytest.raises(KeyboardInterrupt):
        lcray.verify(out)
    assert not left_behind()


def test_what_cannot_be_stopped_is_left_behind() -> None:
    go_on = threading.Event()
    began = time.monotonic()
    with interrupted_after(0.1), pytest.raises(KeyboardInterrupt):
        interruptible(go_on.wait, lambda: None)
    assert time.monotonic() - began < 2
    assert left_behind()
    go_on.set()
    deadline = time.monotonic() + 10
    while left_behind():
        assert time.monotonic() < deadline


def test_errors_and_answers_come_through(out: Path) -> None:
    assert interruptible(lambda: 7, lambda: None) == 7
    with pytest.raises(UsageError, match=r"^SQL: Parser Error"):
        lcray.open(out).sql("SELEC 1")


@pytest.mark.parametrize(
    ("command", "goes_on"), [("query", False), ("findings", False), ("trace", True)]
)
def test_only_what_goes_on_says_that_it_does(
    command: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(app.commands[command], "callback", stop)
    arguments = {"trace": ["RUN", "--task", "m:t", "--out", "OUT"]}.get(command, ["OUT"])
    monkeypatch.setattr("sys.argv", ["lcray", command, *arguments])
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 130
    more = "; run the same command again to resume" if goes_on else ""
    assert capfd.readouterr().err.strip() == f"lcray: interrupted{more}"
