"""The lock of an output: one driver at a time, on one machine or several, and none that is dead."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import object_server
import planting
import psutil
import pytest
import scenes

import lcray
from lcray.errors import OutputError
from lcray.storage import Place, lock, place, storage_of
from lcray.storage.lock import locked, newest
from lcray.tables.schema import TABLES
from lcray.tables.shards.writer import ShardWriter, read_commit

HOLD = """
import errno, fcntl, sys, time
from lcray.storage import lock
from lcray.errors import OutputError
from lcray.storage import place

def unsupported(*_):
    raise OSError(errno.EOPNOTSUPP, "no such locks here")

if sys.argv[2] == "elsewhere":  # as on another machine, over a file system whose locks end there
    lock._machine = lambda: "another boot"
if sys.argv[2] != "here":
    fcntl.flock = unsupported
try:
    with lock.locked(place(sys.argv[1]), every=0.1, stale=float(sys.argv[3])):
        print("held", flush=True)
        sys.stdin.read()
except OutputError as error:
    print(error, flush=True)
"""


@contextmanager
def holder(
    folder: Place | str, where: str = "here", stale: float = 30
) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), where, str(stale)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=scenes.python_environment() | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    try:
        assert said_by(process) == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def said_by(process: subprocess.Popen[str]) -> str:
    """The next line, or nothing where none comes."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 30)
    return process.stdout.readline() if ready else ""


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty output."""
    if request.param == "local":
        (tmp_path / "out").mkdir()
        return tmp_path / "out"
    return place(f"{request.getfixturevalue('bucket')}/out")


def busy(error: pytest.ExceptionInfo[OutputError], folder: Place) -> bool:
    return str(error.value).startswith(f"{folder}: another lcray process (on ")


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
        assert [path.name for path in out.iterdir()] == [".locks"]
        kill(process)
        # A folder with nothing in it but the lock of the dead is as good as a new one.
        results = lcray.analyze(plain_run, "scenes:plain", out, span_length=6)
    assert results.plan.n_intervals == 12


def test_reducing_what_another_process_writes_is_refused(tmp_path: Path) -> None:
    out = planting.write_output(tmp_path / "out", planting.make_world())
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


def test_the_refusal_says_who_and_what_to_do(out: Place) -> None:
    with holder(out) as process, pytest.raises(OutputError) as caught, locked(out):
        pass
    message = str(caught.value)
    host = os.uname().nodename
    assert f"on {host}, pid {process.pid}, since 20" in message
    assert message.endswith("is at work on it; wait until it has ended, or stop it")
    assert "\n" not in message


def test_a_killed_driver_of_this_machine_is_known_to_be_dead_at_once(out: Place) -> None:
    with holder(out) as process:
        kill(process)
        start = time.monotonic()
        with locked(out):
            assert time.monotonic() - start < lock.STALE / 2
            assert newest(out) == 2


def step_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is set an hour ahead: the boot's time moves, and psutil's times with it."""
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)


@pytest.mark.parametrize("older", [False, True])
def test_a_living_driver_is_not_taken_for_dead_where_the_clock_was_set(
    bucket: str, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """On an object store there is no lock of the operating system; nor on some file systems."""
    out = place(f"{bucket}/out")
    with holder(out) as process:
        step_clock(monkeypatch)
        found = lock._read(out, 1)
        assert found is not None and not found.is_dead
        if older:  # as written before start ticks were: nobody can tell, so the counter does
            found = replace(found, ticks=-1)
            assert not found.is_dead
            assert not lock._is_free(out, 1, found, 30, alone=False)
        else:
            with pytest.raises(OutputError) as caught, locked(out):
                pass
            assert busy(caught, out)
        kill(process)
        assert found.is_dead


def test_where_the_file_system_has_no_locks_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such locks here")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with holder(tmp_path, "unlocked"):
        step_clock(monkeypatch)
        with pytest.raises(OutputError) as caught, locked(tmp_path):
            pass
        assert busy(caught, tmp_path)


def test_a_number_that_another_process_has_by_now_is_that_of_a_dead_driver() -> None:
    me = lock.Holder.this()
    assert not me.is_dead
    assert me.ticks == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert replace(me, ticks=me.ticks - 1).is_dead
    assert not replace(me, ticks=me.ticks - 1, machine="another").is_dead
    for pid in (-1, 0, 2**22 + 1, 2**40):  # no process, a group of them, beyond what pids can be
        assert replace(me, pid=pid).is_dead


def test_files_of_older_and_of_later_versions_are_read(tmp_path: Path) -> None:
    me = vars(lock.Holder.this())
    older = {name: value for name, value in me.items() if name != "ticks"}
    for data, ticks in ((older, -1), (me | {"more": [1]}, me["ticks"])):
        path = tmp_path / lock.LOCK / "00000001.json"
        storage_of(tmp_path).write(path, json.dumps(data).encode())
        found = lock._read(tmp_path, 1)
        assert found is not None
        assert (found.pid, found.machine, found.ticks) == (os.getpid(), me["machine"], ticks)


def test_without_proc_the_start_is_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(pid: int) -> int:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self")

    monkeypatch.setattr(lock, "start_ticks", absent)
    me = lock.Holder.this()
    assert me.ticks == -1
    assert not replace(me, started=me.started - 60).is_dead  # there is one here, so that is hidden
    monkeypatch.setattr(lock.os.path, "exists", lambda path: False)
    assert not me.is_dead
    assert replace(me, started=me.started - 60).is_dead


def test_the_next_driver_need_not_wait_for_one_that_has_ended(out: Place) -> None:
    for number in (1, 2, 3):
        with locked(out) as mine:
            assert mine.number == newest(out) == number
    assert len(storage_of(out).find(out / lock.LOCK)) <= 3  # the old ones are cleared away


@pytest.mark.slow
def test_a_driver_on_another_machine_is_known_by_its_counter(
    out: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(out, "elsewhere") as process:
        start = time.monotonic()
        with pytest.raises(OutputError) as caught, locked(out, stale=60):
            pass
        assert busy(caught, out)
        assert time.monotonic() - start < 50  # the first beat that is seen is enough
        kill(process)
        start = time.monotonic()
        with locked(out, stale=1):
            assert time.monotonic() - start >= 1
    # No clock of another machine was looked at.
    monkeypatch.setattr(lock.Holder, "this", _from_the_future)
    with locked(out):
        pass


def _from_the_future() -> lock.Holder:
    me = lock.Holder("t", "far", 1, 0.0, "another boot", "2999-01-01T00:00:00+00:00")
    return lock.Holder(**{**vars(me), "token": os.urandom(8).hex()})


@pytest.mark.slow
def test_a_driver_that_slept_loses_the_lock_and_stops_without_touching_the_new_one(
    out: Place,
) -> None:
    with holder(out, "elsewhere") as process:
        os.kill(process.pid, signal.SIGSTOP)
        with locked(out, every=0.1, stale=1) as mine:
            os.kill(process.pid, signal.SIGCONT)
            line = said_by(process)
            assert line.startswith(f"{out}: the lock was lost to another lcray process")
            assert process.wait() == 0
            time.sleep(0.3)
            mine.check()
            assert newest(out) == mine.number


def test_a_driver_that_cannot_reach_its_lock_stops(
    s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "0.1")
    out = place(f"{bucket}/out")
    with object_server.Proxy(s3_endpoint).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        with (
            pytest.raises(OutputError, match="the lock could not be kept"),
            locked(out, every=0.1, stale=0.5),
        ):
            proxy.fail("throttle")
            time.sleep(10)


@pytest.mark.slow
def test_of_two_who_find_a_dead_driver_one_gets_the_lock(bucket: str) -> None:
    out = place(f"{bucket}/out")
    dead = lock.Holder("t", "far", 1, 0.0, "another boot", "then")
    storage_of(out).create(out / lock.LOCK / "00000007.json", dead.encode())
    start, ended = threading.Barrier(3), threading.Barrier(3, timeout=60)
    numbers: list[int] = []
    refused: list[str] = []

    def take() -> None:
        start.wait()
        try:
            with locked(out, every=0.1, stale=2) as mine:
                numbers.append(mine.number)
                ended.wait()
        except OutputError as error:
            refused.append(str(error))
            ended.wait()

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers == [8]
    assert len(refused) == 2


def test_a_storage_that_cannot_keep_two_apart_is_refused(
    s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place(f"{bucket}/out")
    with object_server.Proxy(s3_endpoint, ignored=("if-none-match",)).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        with pytest.raises(OutputError, match="overwrites files"), locked(out):
            pass
    assert object_server.objects(s3_endpoint, bucket.removeprefix("s3://")) == {}


def said(**changes: object) -> bytes:
    return json.dumps(vars(lock.Holder.this()) | changes).encode()


DAMAGED = [b"", b"{}", b"[" * 100_000, b'{"token": 1}', b"\xff", said(pid=float("inf"))]
STRANGE = [said(pid=-1), said(pid=2**40), said(pid="1"), said(beat=None), said(released="")]


@pytest.mark.parametrize("text", DAMAGED + STRANGE)
def test_a_damaged_lock_is_that_of_the_dead(tmp_path: Path, text: bytes) -> None:
    storage_of(tmp_path).create(tmp_path / lock.LOCK / "00000001.json", text)
    with locked(tmp_path, stale=0.2) as mine:
        assert mine.number == 2


def test_a_lock_file_cannot_break_the_line_of_the_message(tmp_path: Path) -> None:
    evil = vars(lock.Holder.this()) | {"host": "a\nb\x1b[31m" + "c" * 500, "machine": "elsewhere"}
    storage_of(tmp_path).create(tmp_path / lock.LOCK / "00000001.json", json.dumps(evil).encode())
    refusal = str(lock._refusal(tmp_path, lock._read(tmp_path, 1)))
    assert "\n" not in refusal and "\x1b" not in refusal and len(refusal) < 400


def test_no_span_is_committed_that_was_begun_before_a_takeover(out: Place) -> None:
    span = planting.make_world().plan.spans[0]
    with locked(out):
        old = ShardWriter(out, span, "old")
        old.write("layers", TABLES["layers"].schema.empty_table())
    with locked(out):
        with pytest.raises(OutputError, match=f"has taken over since span {span.name} was"):
            old.commit(checkpoints={}, info={})
        assert read_commit(out, span) is None
        with ShardWriter(out, span, "new") as new:
            new.write("layers", TABLES["layers"].schema.empty_table())
            assert new.commit(checkpoints={}, info={})
    commit = read_commit(out, span)
    assert commit is not None and commit.attempt == "new"
    assert not [item for item in storage_of(out).find(out) if "old" in item.name]


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_an_analysis_in_a_thread_stops_as_well_once_its_lock_is_lost(
    plain_run: Path, tmp_path: Path
) -> None:
    """There is no main thread to interrupt: the next span that is done ends it."""
    out, errors = tmp_path / "out", []

    def take_over() -> None:
        other = lock.Holder("t", "far", 1, 0.0, "another boot", "then")
        storage_of(out).create(out / lock.LOCK / "00000002.json", other.encode())
        time.sleep(lock.BEAT + 2)  # until the next beat

    def work() -> None:
        told = scenes.Told(done=3, then=take_over)
        try:
            lcray.analyze(plain_run, "scenes:plain", out, span_length=3, on_progress=told)
        except OutputError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [error.startswith(f"{out}: the lock was lost to another") for error in errors] == [True]
    assert scenes.spans_of(out) == ["00000000-00000003", "00000003-00000006"]
    assert not (out / "tables").exists()
