"""Following a run: when it has grown, and when it has ended."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenes

import lcray
from lcray.errors import CheckpointError, UsageError
from lcray.execution.driver import analyze, follow
from lcray.execution.driver.follow import Growth
from lcray.storage import place, storage_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def say(run: Path, *, ended: bool) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": ended}))


@pytest.fixture
def run(plain_run: Path, tmp_path: Path) -> Path:
    """Seven checkpoints of a run that a recorder still writes."""
    run = Path(shutil.copytree(plain_run, tmp_path / "run"))
    for step in range(7, 13):
        scenes.checkpoint(run, step).unlink()
    say(run, ended=False)
    return run


class TestLooking:
    def test_a_recorders_run_ends_when_it_says_so(
        self, run: Path, clock: Callable[[float], None]
    ) -> None:
        growth = Growth(str(run), None, None)
        clock(1e6)
        series = growth.look()
        assert series is not None and series.steps == tuple(range(7))
        assert not growth.ended
        say(run, ended=True)
        growth.look()
        assert growth.ended

    def test_or_when_it_has_been_idle_for_as_long_as_was_said(
        self, run: Path, clock: Callable[[float], None]
    ) -> None:
        growth = Growth(str(run), None, 50)
        growth.look()
        clock(49)
        growth.look()
        assert not growth.ended
        clock(50)
        growth.look()
        assert growth.ended

    def test_another_run_ends_after_ten_minutes_without_a_checkpoint(
        self, run: Path, plain_run: Path, clock: Callable[[float], None]
    ) -> None:
        (run / "run.json").unlink()
        growth = Growth(str(run), None, None)
        series = growth.look()
        assert series is not None and series.steps == tuple(range(6)), "the newest may be torn"
        clock(599)
        shutil.copy(scenes.checkpoint(plain_run, 7), scenes.checkpoint(run, 7))
        growth.look()
        clock(1198)
        growth.look()
        assert not growth.ended
        clock(1199)
        series = growth.look()
        assert growth.ended
        assert series is not None and series.steps == tuple(range(8))

    def test_what_is_no_run(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such run"):
            Growth(str(tmp_path / "none"), None, None).look()
        (run / "run.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"run\.json: cannot be read"):
            Growth(str(run), None, None).look()
        with pytest.raises(UsageError, match="idle 0: must be positive"):
            Growth(str(run), None, 0)

    def test_an_address_without_a_run(self) -> None:
        base = f"memory://{uuid.uuid4().hex}"
        growth = Growth(f"{base}/run", None, None)
        with pytest.raises(CheckpointError, match=f"{base}/run: no such run"):
            growth.first()
        folder = place(f"{base}/run")
        storage_of(folder).write(folder / "run.json", b'{"ended": false}')
        assert growth.look() is None  # it has not begun
        assert not growth.ended

    def test_an_address_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "0")
        run = place(f"memory://{uuid.uuid4().hex}/run")
        storage_of(run).write(run / "step-1.safetensors", b"")

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "not yours")

        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.find", refuse)
        monkeypatch.setattr(follow, "exists", lambda path: False)
        with pytest.raises(CheckpointError, match="run: cannot be listed: not yours"):
            Growth(run, None, None).first()

    def test_a_run_that_has_not_begun_is_waited_for(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = {path: path.read_bytes() for path in run.glob("*.safetensors")}
        for path in kept:
            path.unlink()

        def sleep(seconds: float) -> None:
            for path in sorted(kept)[: 1 + len(list(run.glob("*.safetensors")))]:
                path.write_bytes(kept[path])

        monkeypatch.setattr(follow.time, "sleep", sleep)
        assert Growth(str(run), None, None).first().steps == (0, 1)

    def test_a_run_that_ends_without_an_interval(self, run: Path) -> None:
        for path in sorted(run.glob("*.safetensors"))[1:]:
            path.unlink()
        say(run, ended=True)
        with pytest.raises(CheckpointError, match="at least 2 are needed"):
            Growth(str(run), None, None).first()


@pytest.mark.usefixtures("inline")
class TestFollowing:
    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(analyze, "SECONDS_A_LOOK", 0.05)

    @pytest.mark.parametrize("length", [3, None])
    @pytest.mark.slow
    def test_training_goes_on_meanwhile(
        self, length: int | None, run: Path, plain_run: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"

        def train() -> None:
            for step in range(7, 13):
                shutil.copy(scenes.checkpoint(plain_run, step), scenes.checkpoint(run, step))
                time.sleep(0.15)
            say(run, ended=True)

        thread = threading.Thread(target=train)
        told = scenes.Told(done=1, then=thread.start)
        options: dict[str, Any] = {"elements": True, "window": 2}
        results = lcray.analyze(
            run, "scenes:plain", out, follow=True, span_length=length, on_progress=told, **options
        )
        thread.join()
        assert results.plan.steps == tuple(range(13))
        assert lcray.verify(out).ok
        lcray.analyze(plain_run, "scenes:plain", tmp_path / "later", plan=results.plan)
        assert scenes.tables(tmp_path / "later") == scenes.tables(out)
        if length is not None:
            assert [len(span.intervals) for span in results.plan.spans] == [3, 3, 3, 3]

    def test_only_whole_spans_are_added_before_the_end(
        self, run: Path, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: list[int] = []

        def sleep(seconds: float) -> None:
            looks.append(len(scenes.spans_of(tmp_path / "out")))
            step = 6 + len(looks)
            if step <= 11:
                shutil.copy(scenes.checkpoint(plain_run, step), scenes.checkpoint(run, step))
            else:
                say(run, ended=True)

        monkeypatch.setattr(analyze.time, "sleep", sleep)
        found = lcray.analyze(run, "scenes:plain", tmp_path / "out", follow=True, span_length=3)
        # Steps 7 and 8 wait for 9; 10 and 11 for the end.
        assert looks == [2, 2, 2, 3, 3, 3][: len(looks)] and len(looks) == 6
        assert [span.last for span in found.plan.spans] == [3, 6, 9, 11]

    def test_a_plan_has_its_steps(self, run: Path, plain_out: Path, tmp_path: Path) -> None:
        plan = lcray.open(plain_out).plan
        with pytest.raises(UsageError, match="--follow is for analyses without --plan"):
            lcray.analyze(run, "scenes:plain", tmp_path / "out", plan=plan, follow=True)
