"""The lock of an output: one process at a time, and none that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import output_factory as factory
import pytest
import scenes

import lcray
from lcray.errors import OutputError
from lcray.files import locked

HOLD = """
import sys
from pathlib import Path
from lcray.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=scenes.python_environment() | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def busy(error: pytest.ExceptionInfo[OutputError], folder: Path) -> bool:
    return str(error.value).startswith(f"{folder}: another lcray process is at work on it; wait")


@pytest.mark.usefixtures("inline")
def test_who_comes_second_is_refused_until_the_first_is_dead(
    plain_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with holder(out) as process:
        with pytest.raises(OutputError) as caught:
            lcray.analyze(plain_run, "scenes:plain", out, span_length=6)
        assert busy(caught, out)
        assert [path.name for path in out.iterdir()] == [".lock"]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # A folder with nothing in it but the lock of the dead is as good as a new one.
        results = lcray.analyze(plain_run, "scenes:plain", out, span_length=6)
    assert results.plan.n_intervals == 12


def test_reducing_what_another_process_writes_is_refused(tmp_path: Path) -> None:
    out = factory.write_output(tmp_path / "out", factory.make_world())
    with holder(out) as process:
        with pytest.raises(OutputError) as caught:
            lcray.reduce(out)
        assert busy(caught, out)
        assert not (out / "tables").exists()
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        lcray.reduce(out)
    assert lcray.verify(out).ok


def test_no_lock_is_left_in_what_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        lcray.reduce(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), locked(tmp_path):
        raise ValueError("inside")
    with (
        locked(tmp_path),
        pytest.raises(OutputError, match="another lcray process"),
        locked(tmp_path),
    ):
        pass
