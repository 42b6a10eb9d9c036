"""`lcray.status`: what the driver says of itself, and what is counted when it says nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import scenes
from repository import TESTS

import lcray
from lcray.errors import IncompleteError, OutputError
from lcray.execution.driver.status import Gap, Silence, StatusFile
from lcray.execution.worker.reports import RunningSpan, SpanReport, View
from lcray.storage import storage_of
from lcray.storage.files import read_json
from lcray.storage.lock import LOCK, STALE, Holder, locked


@pytest.fixture
def out(out: Path) -> Path:
    """An output of which nobody can tell whether its driver lives."""
    shutil.rmtree(out / LOCK)
    return out


def edit(out: Path, **values: Any) -> None:
    path = out / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def test_a_finished_analysis(out: Path) -> None:
    found = lcray.status(out)
    assert (found.state, found.spans, found.spans_done) == ("finished", 4, 4)
    assert (found.intervals, found.intervals_done, found.workers) == (12, 12, 0)
    assert (found.running, found.failed, found.error, found.silent) == ((), (), "", False)
    frame = lcray.open(out).intervals()
    for split, rows in frame.groupby("split", observed=True):
        gap = found.gaps[str(split)]
        assert gap.loss_change == pytest.approx(rows["loss_change"].sum(), rel=1e-12)
        assert gap.lc == pytest.approx(rows["lc"].sum(), rel=1e-12)
        assert gap.gap == pytest.approx(rows["gap"].sum(), abs=1e-12)


def test_where_no_driver_said_anything_commits_are_counted(out: Path) -> None:
    whole = lcray.status(out)
    (out / "status.json").unlink()
    shutil.rmtree(out / "shards" / scenes.spans_of(out)[1])
    found = lcray.status(out)
    assert (found.state, found.spans_done, found.intervals_done) == ("unknown", 3, 9)
    assert found.gaps.keys() == whole.gaps.keys()
    assert found.gaps != whole.gaps


HELD = {"first": 3, "last": 6, "attempt": 1, "done": 1.5, "intervals": 3, "seconds": 9.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "idle"},
        {"state": 3},
        {"spans": "4"},
        {"intervals_done": -1},
        {"workers": 2.0},
        {"rate": float("inf")},
        {"seconds_left": "soon"},
        {"running": [HELD | {"first": None}]},
        {"running": [[]]},
        {"failed": [{"first": 0, "last": 3}]},
        {"failed": [{"first": 0, "last": 3, "reason": ["why"]}]},
        {"gaps": {"train": {"loss_change": "1", "lc": 2.0}}},
        {"gaps": []},
        {"error": None},
        {"written": ""},
        {"written": "2026-01-01T00:00:00"},
        {"silent": 0},
        {"more": 1},
    ],
    ids=str,
)
def test_every_field_is_what_a_driver_writes(wrong: dict[str, Any], out: Path) -> None:
    said: dict[str, Any] = {"state": "running", "running": [HELD], "spans_done": 1}
    edit(out, **said, written=ago(0))
    assert lcray.status(out).state == "running"
    edit(out, **wrong)
    assert (lcray.status(out).state, lcray.status(out).spans_done) == ("unknown", 4)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"state": "running"}'])
def test_a_file_that_says_nonsense_is_as_good_as_none(text: str, out: Path) -> None:
    (out / "status.json").write_text(text)
    assert (lcray.status(out).state, lcray.status(out).spans_done) == ("unknown", 4)


def test_a_driver_at_work_is_believed_until_it_has_been_silent(out: Path) -> None:
    said = {"state": "running", "spans_done": 1, "running": [HELD], "workers": 2, "rate": 0.5}
    edit(out, **said, written=ago(15))
    found = lcray.status(out)
    assert (found.state, found.spans_done, found.workers) == ("running", 1, 2)
    assert found.running == (RunningSpan(3, 6, 1, 1.5, 3, 9.0),)
    edit(out, written=ago(45))
    found = lcray.status(out)
    assert (found.state, found.silent, found.spans_done) == ("running", True, 4)
    assert (found.running, found.workers, found.rate) == ((), 0, None)


@pytest.mark.parametrize("age", [0, 45])
def test_a_driver_that_is_known_to_be_gone_is_not_at_work(out: Path, age: float) -> None:
    """Its disk was full, say: it said "running: 0 of 12" and nothing more."""
    said = {"state": "running", "spans_done": 0, "intervals_done": 0, "workers": 2}
    edit(out, **said, running=[HELD], written=ago(age))
    shutil.rmtree(out / "shards" / scenes.spans_of(out)[3])
    with locked(out):
        found = lcray.status(out)
        assert (found.state, found.silent) == ("running", age > 30)
    found = lcray.status(out)
    assert (found.state, found.spans_done, found.intervals_done) == ("interrupted", 3, 9)
    assert (found.running, found.workers, found.silent) == ((), 0, True)
    assert (
        found.error == "its driver ended without a final status: it was killed, or could not write"
    )
    lock = storage_of(out).find(out / LOCK)[0].name
    me = Holder.this()
    for holder, state in (
        (replace(me, ticks=me.ticks - 1), "interrupted"),  # dead: its number is another's now
        (replace(me, machine="another"), "running"),
        (me, "running"),
    ):
        (out / LOCK / lock).write_bytes(holder.encode())
        assert lcray.status(out).state == state


class TestWatching:
    """How long `lcray status --watch` waits for a driver that says nothing."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("lcray.execution.driver.status.time.monotonic", lambda: now[0])
        return now

    @pytest.mark.parametrize("state", ["running", "unknown"])
    def test_silence_is_borne_as_long_as_the_lock_bears_it(
        self, state: str, out: Path, clock: list[float]
    ) -> None:
        if state == "unknown":
            (out / "status.json").unlink()
        else:
            edit(out, state=state, written=ago(45))
        found, silence = lcray.status(out), Silence(out)
        assert found.state == state
        silence.check(found)
        clock[0] += STALE - 0.1
        silence.check(found)
        clock[0] += 0.1
        with pytest.raises(OutputError, match="no sign of its driver for 30 s: it was killed"):
            silence.check(found)

    def test_a_beat_of_the_lock_and_a_new_word_are_signs(
        self, out: Path, clock: list[float]
    ) -> None:
        edit(out, state="running", written=ago(3600))  # a driver whose clock is an hour off
        found, silence = lcray.status(out), Silence(out)
        with locked(out, every=3600) as lock:
            for _ in range(3):
                lock.beat()
                silence.check(found)
                clock[0] += STALE
            edit(out, written=ago(3599))
            silence.check(lcray.status(out))
            clock[0] += STALE
            with pytest.raises(OutputError, match="no sign of its driver"):
                silence.check(lcray.status(out))

    def test_a_lock_that_says_nonsense_is_no_sign(
        self, out: Path, tmp_path: Path, clock: list[float]
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        (out / LOCK).symlink_to(tmp_path / "elsewhere")
        edit(out, state="running", written=ago(45))
        found, silence = lcray.status(out), Silence(out)
        silence.check(found)
        (tmp_path / "elsewhere" / "00000009.json").write_text("{}")
        clock[0] += STALE
        with pytest.raises(OutputError, match="no sign of its driver"):
            silence.check(found)

    @pytest.mark.slow
    def test_watching_a_driver_that_was_killed_ends(self, plain_run: Path, tmp_path: Path) -> None:
        (tmp_path / "slow").touch()
        out, other = tmp_path / "out", tmp_path / "other"
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = scenes.python_environment() | {"PYTHONPATH": os.pathsep.join(paths)}
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(plain_run), str(out), str(tmp_path)],
            env=environment,
        )
        try:
            while not scenes.spans_of(out):
                assert driver.poll() is None
                time.sleep(0.05)
        finally:
            driver.kill()
            driver.wait()
        shutil.copytree(out, other)
        (other / "status.json").unlink()
        watching = [
            subprocess.Popen(
                [sys.executable, "-c", WATCHER, "status", str(folder), "--watch"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for folder in (out, other)
        ]
        try:
            said = [watch.communicate(timeout=180) for watch in watching]
        finally:
            for watch in watching:
                watch.kill()
                watch.wait()
        for folder, watch, (text, error), state in zip(
            (out, other), watching, said, ("interrupted", "unknown"), strict=True
        ):
            assert watch.returncode == 1
            assert text.startswith(state)
            why = "its driver ended without" if folder == out else "no sign of its driver for 5 s"
            assert error.startswith(f"lcray: {folder}: {why}")
            assert error.count("\n") == 1


WATCHER = """
import lcray.execution.driver.status
from lcray.cli.app import main

lcray.execution.driver.status.STALE = 5.0  # as the lock's, but for a test
main()
"""

DRIVER = """
import sys
import pytest
import scenes
import lcray

run, out, folder = sys.argv[1:]
scenes.work_inline(pytest.MonkeyPatch())
lcray.analyze(run, scenes.with_loss(scenes.paced_loss, folder), out, span_length=3)
"""


def test_no_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file; is this the output"):
        lcray.status(tmp_path)


@pytest.mark.usefixtures("inline")
def test_spans_that_failed_are_named_with_their_cause(plain_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain_run, tmp_path / "run"))
    scenes.checkpoint(run, 7).write_bytes(b"torn")
    with pytest.raises(IncompleteError) as caught:
        lcray.analyze(run, "scenes:plain", tmp_path / "out", **scenes.OPTIONS)
    found = lcray.status(tmp_path / "out")
    assert (found.state, found.error) == ("failed", str(caught.value))
    assert (found.spans_done, found.intervals_done) == (3, 9)
    assert [(span.first, span.last) for span in found.failed] == [(6, 9)]
    assert "step-00000007" in found.failed[0].reason


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (None, "finished", ""),
        (ValueError("why"), "failed", "why"),
        (KeyboardInterrupt(), "interrupted", ""),
    ],
)
def test_the_end_is_said(error: BaseException | None, state: str, text: str, out: Path) -> None:
    plan = lcray.open(out).plan
    try:
        with StatusFile(out, plan) as file:
            file.resume([])
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    data = read_json(out / "status.json")
    assert (data["state"], data["error"]) == (state, text)


def test_a_driver_that_has_lost_its_lock_says_nothing_more(out: Path) -> None:
    plan = lcray.open(out).plan
    with (
        pytest.raises(OutputError, match="lost to another"),
        locked(out, every=60) as lock,
        StatusFile(out, plan, lock.holds) as file,
    ):
        file.state("following")
        while read_json(out / "status.json")["state"] != "following":
            time.sleep(0.01)
        time.sleep(0.2)
        # Another machine finds no beat, takes over, and has it finished before this one wakes.
        following = out / LOCK / f"{lock.number + 1:08d}.json"
        taken = storage_of(out).create(following, Holder.this().encode())
        edit(out, state="finished", written=ago(0))
        file.state("reducing")
        lock.beat()
        raise KeyboardInterrupt
    assert taken
    assert read_json(out / "status.json")["state"] == "finished"


class TestWhileItRuns:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
        now = [0.0]
        monkeypatch.setattr("lcray.execution.driver.status.time.monotonic", lambda: now[0])
        return lambda seconds: now.__setitem__(0, seconds)

    def test_rate_and_time_left_count_what_is_done_within_spans(
        self, out: Path, clock: Callable[[float], None]
    ) -> None:
        spans = lcray.open(out).plan.spans
        report = SpanReport(True, 6, 1.0, {"train": (-1.0, -1.25)})
        with StatusFile(out, lcray.open(out).plan) as file:
            assert file.resume([(spans[0], report)]) == 3
            clock(10)
            assert file.done(spans[1], report) == 6
            clock(20)
            held = RunningSpan(6, 9, 2, 1.0, 3, 10.0)
            file.view(View(2, (held,), {spans[3]: "why"}))
            found = file.latest
        # 3 + 1 intervals in 20 s; 5 of 12 are left.
        assert (found.rate, found.seconds_left) == (0.2, 25.0)
        assert found.gaps == {"train": Gap(-2.0, -2.5)}
        assert found.running == (held,)
        assert [(span.first, span.reason) for span in found.failed] == [(9, "why")]

    def test_a_disk_that_refuses_is_no_obstacle(self, out: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with StatusFile(tmp_path / "file" / "below", lcray.open(out).plan) as file:
            file.resume([])
            file.state("reducing")
        assert not (tmp_path / "file" / "below").exists()


def test_a_span_that_is_committed_runs_no_more(out: Path) -> None:
    """Its intervals would count twice until the next view."""
    report = SpanReport(True, 6, 1.0, {"train": (-1.0, -1.25)})
    spans = lcray.open(out).plan.spans
    with StatusFile(out, lcray.open(out).plan) as file:
        file.resume([])
        held = tuple(RunningSpan(s.first, s.last, 1, 3.0, 3, 10.0) for s in spans[:2])
        file.view(View(2, held, {}))
        file.done(spans[0], report)
        assert file.latest.intervals_done + sum(r.done for r in file.latest.running) == 6
        file.done(spans[1], report)
        assert (file.latest.intervals_done, file.latest.running) == (6, ())
