"""Workers that share gradients, on a real Ray."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import scenes

import lcray
from lcray.errors import IncompleteError, TaskError, UsageError
from lcray.execution.cluster.resources import Resources, place_workers
from lcray.planning.plan import Plan
from lcray.tasks.task import Task

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

OPTIONS: dict[str, Any] = {"span_length": 3, "elements": True, "batch_size": 3}


@pytest.fixture(scope="module")
def shared_out(plain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The analysis of the plain run in three partial sums by one worker, without Ray."""
    out = tmp_path_factory.mktemp("shared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        scenes.work_inline(patch)
        lcray.analyze(plain_run, "scenes:plain", out, partial_sums=3, **OPTIONS)
    return out


def plan_of(out: Path) -> Plan:
    return lcray.open(out).plan


def analyze(
    run: Path, task: Task | str, out: Path, workers: int, team: int, **options: Any
) -> lcray.Results:
    resources = Resources(workers=workers, data_parallel=team)
    return lcray.analyze(run, task, out, resources=resources, **options)


@pytest.mark.slow
def test_teams_of_three_and_two_teams(plain_run: Path, shared_out: Path, tmp_path: Path) -> None:
    plan = plan_of(shared_out)
    analyze(plain_run, "scenes:plain", tmp_path / "three", 3, 3, plan=plan)
    assert scenes.tables(tmp_path / "three") == scenes.tables(shared_out)
    # Five workers are two teams of two; it goes slowly until all of them are at work.
    task = scenes.with_loss(scenes.paced_loss, str(tmp_path))
    (tmp_path / "slow").touch()

    def wait() -> None:
        deadline = time.monotonic() + 60
        while len(set(tmp_path.glob("at-*"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        (tmp_path / "slow").unlink()

    thread = threading.Thread(target=wait)
    thread.start()
    analyze(plain_run, task, tmp_path / "two", 5, 2, plan=plan)
    thread.join()
    assert len(set(tmp_path.glob("at-*"))) == 4
    assert scenes.tables(tmp_path / "two") == scenes.tables(shared_out)


@pytest.mark.slow
def test_an_analysis_goes_on_with_teams_of_another_size(plain_run: Path, tmp_path: Path) -> None:
    """The number of partial sums is the first team's; losses are recorded, not the team."""
    run, out = plain_run, tmp_path / "out"
    done = threading.Event()

    class Stop(Exception):
        pass

    def stop() -> None:
        done.set()
        raise Stop

    with pytest.raises(Stop):
        analyze(
            run, "scenes:plain", out, 2, 2, on_progress=scenes.Told(done=3, then=stop), **OPTIONS
        )
    assert plan_of_record(out) == 2
    kept = scenes.commits(out)
    assert 0 < len(scenes.spans_of(out)) < 4
    one = analyze(run, "scenes:plain", out, 1, 1, **OPTIONS)
    assert kept.items() <= scenes.commits(out).items()
    assert one.plan.partial_sums == 2
    with pytest.MonkeyPatch.context() as patch:
        scenes.work_inline(patch)
        lcray.analyze(run, "scenes:plain", tmp_path / "again", plan=one.plan)
    assert scenes.tables(out) == scenes.tables(tmp_path / "again")
    assert lcray.verify(out).ok


def plan_of_record(out: Path) -> int:
    from lcray.tables.output import Output

    record = Output(out).existing()
    assert record is not None
    return record.plan.partial_sums


def in_member() -> bool:
    return b"ray::Member" in Path("/proc/self/cmdline").read_bytes()


def held_in_members(folder: str, model: Any, batch: Any) -> Any:
    """As `scenes.held_loss`, but leads are not held."""
    return (scenes.held_loss if in_member() else partial(ignore, scenes.cross_entropy))(
        folder, model, batch
    )


def ignore(loss: Any, folder: str, model: Any, batch: Any) -> Any:
    return loss(model, batch)


def held(folder: Path) -> int:
    """The process that took hold, once it has."""
    deadline = time.monotonic() + 90
    while not (found := list(folder.glob("held-*"))):
        assert time.monotonic() < deadline, "nobody took hold"
        time.sleep(0.05)
    return int(found[0].name.removeprefix("held-"))


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_member_that_is_killed_costs_its_team_an_attempt(
    plain_run: Path, shared_out: Path, tmp_path: Path
) -> None:
    """The lead cannot go on without it: both are replaced, and the span is tried again."""
    task = scenes.with_loss(held_in_members, str(tmp_path))
    killed: list[int] = []

    def kill() -> None:
        killed.append(held(tmp_path))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    told = scenes.Told(done=3, then=(tmp_path / "hold").touch)
    thread.start()
    out = tmp_path / "out"
    analyze(plain_run, task, out, 2, 2, plan=plan_of(shared_out), on_progress=told)
    thread.join()
    assert gone(killed[0])
    attempts = [path.name.split("-")[1] for path in out.rglob("layers-*.parquet")]
    assert sorted(attempts) == ["1", "1", "1", "2"]
    assert scenes.tables(out) == scenes.tables(shared_out)
    assert lcray.verify(out).ok


@pytest.mark.slow
def test_a_team_whose_member_hangs_is_replaced(
    plain_run: Path, shared_out: Path, tmp_path: Path
) -> None:
    task = scenes.with_loss(held_in_members, str(tmp_path))
    told = scenes.Told(done=3, then=(tmp_path / "hold").touch)
    resources = Resources(workers=2, data_parallel=2, patience=8)
    out, plan = tmp_path / "out", plan_of(shared_out)
    lcray.analyze(plain_run, task, out, plan=plan, resources=resources, on_progress=told)
    assert gone(held(tmp_path)), "it slept for a minute otherwise"
    assert scenes.tables(out) == scenes.tables(shared_out)


@pytest.mark.slow
def test_a_span_that_kills_members_is_given_up_with_its_cause(
    plain_run: Path, shared_out: Path, tmp_path: Path
) -> None:
    task = scenes.with_loss(deadly_in_members, str(tmp_path))
    told = scenes.Told(done=9, then=(tmp_path / "kill").touch)
    with pytest.raises(IncompleteError, match=r"9-12: a worker of its team died \(") as caught:
        analyze(plain_run, task, tmp_path / "out", 2, 2, plan=plan_of(shared_out), on_progress=told)
    assert "\n" not in str(caught.value)
    assert len((tmp_path / "deaths").read_text().splitlines()) == 3


def deadly_in_members(folder: str, model: Any, batch: Any) -> Any:
    if in_member():
        return scenes.deadly_loss(folder, model, batch)
    return scenes.cross_entropy(model, batch)


@pytest.mark.slow
def test_members_that_differ_are_refused(plain_run: Path, shared_out: Path, tmp_path: Path) -> None:
    task = replace(scenes.plain, splits=other_points_in_members)
    with pytest.raises(TaskError, match="workers of a team differ in model, data or device"):
        analyze(plain_run, task, tmp_path / "out", 2, 2, plan=plan_of(shared_out))


def other_points_in_members() -> Any:
    points = scenes.points()
    if in_member():
        points["train"][0][0] += 1
    return points


NODE = {"CPU": 4.0}


@pytest.mark.parametrize(
    ("asked", "nodes", "teams", "sharers"),
    [
        ({"workers": 4}, [NODE], 2, 4),
        ({"workers": 5}, [NODE, NODE], 2, 4),
        ({}, [NODE, {"CPU": 3.0}], 3, 4),
        ({"cpus_per_worker": 2.0}, [NODE], 1, 2),
        ({"gpus_per_worker": 0.5}, [{"CPU": 8.0, "GPU": 2.0}], 2, 2),
    ],
)
def test_workers_are_counted_in_teams(
    asked: dict[str, Any], nodes: list[Any], teams: int, sharers: int
) -> None:
    placed = place_workers(Resources(data_parallel=2, **asked), nodes, 99)
    assert (placed.workers, placed.team, placed.sharers) == (teams, 2, sharers)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data_parallel": 0}, "data-parallel 0: must be at least 1"),
        ({"data_parallel": 5}, "data-parallel 5: only 4 workers fit"),
        ({"data_parallel": 3, "workers": 2}, "workers 2: fewer than the 3 of a team"),
        ({"data_parallel": 2, "cpus_per_worker": 0.0}, "cannot be placed as teams"),
    ],
)
def test_teams_that_cannot_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        place_workers(Resources(**asked), [NODE], 99)
