"""Signs of life on a real Ray: who makes progress is not blamed, whatever becomes of `Beats`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import scenes
from ray._private.state import actors
from torch import Tensor, nn

import lcray
from lcray.errors import ClusterError
from lcray.execution.cluster.dispatch import _DEAF, Dispatch
from lcray.execution.cluster.metrics import Metrics
from lcray.execution.cluster.resources import Resources
from lcray.execution.worker.reports import SpanReport
from lcray.planning.plan import Plan, Span

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
# Workers do not find this module where a class of it is an actor: they get the class itself.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PATIENCE = 6.0  # seconds


def beats() -> int:
    """The process of the `Beats` at work, once there is one."""
    deadline = time.monotonic() + 60
    while True:
        known = [actor for actor in actors().values() if actor["ActorClassName"] == "Beats"]
        found = [int(actor["Pid"]) for actor in known if actor["State"] == "ALIVE"]
        if len(found) == 1:
            return found[0]
        assert time.monotonic() < deadline, known
        time.sleep(0.1)


def slow_and_held(folder: str, seconds: float, model: nn.Module, batch: scenes.Pair) -> Tensor:
    time.sleep(seconds)
    return scenes.held_loss(folder, model, batch)


def attempts(out: Path) -> list[str]:
    """Which try at each span was the one that counts, or left files."""
    return sorted(path.name.split("-")[1] for path in out.rglob("layers-*.parquet"))


def test_a_span_may_take_longer_than_patience_as_long_as_it_makes_progress(
    plain_run: Path, tmp_path: Path
) -> None:
    """Twelve intervals of half a second and more each, in one span."""
    task = scenes.with_loss(scenes.slow_loss, 0.15)
    out, began = tmp_path / "out", []

    def tell(progress: Any) -> None:
        if progress.phase == "spans":
            began.append(time.monotonic())

    resources = Resources(workers=1, patience=PATIENCE)
    lcray.analyze(plain_run, task, out, span_length=12, resources=resources, on_progress=tell)
    assert began[-1] - began[0] > 1.5 * PATIENCE, "too fast to see anything"
    assert attempts(out) == ["1"]


def test_beats_that_die_start_anew_and_hear_of_workers_that_hang(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    task = scenes.with_loss(slow_and_held, str(tmp_path), 0.1)
    killed: list[int] = []

    def kill() -> None:
        killed.append(beats())
        os.kill(killed[0], signal.SIGKILL)
        (tmp_path / "hold").touch()

    out, told = tmp_path / "out", scenes.Told(done=3, then=kill)
    plan = lcray.open(plain_out).plan
    resources = Resources(workers=1, patience=PATIENCE)
    lcray.analyze(plain_run, task, out, plan=plan, resources=resources, on_progress=told)
    assert len(killed) == len(list(tmp_path.glob("held-*"))) == 1
    assert attempts(out) == ["1", "1", "1", "2"]
    assert scenes.tables(out) == scenes.tables(plain_out)


class Silent:
    """Takes its time, says nothing of how far it is, and is done once there is ``go``."""

    def run_span(self, plan: Plan, span: Span, out: str, attempt: str, beats: Any) -> SpanReport:
        with open(f"{out}/attempts", "a") as file:
            file.write(f"{attempt.split('-')[0]}\n")
        deadline = time.monotonic() + 120
        while not os.path.exists(f"{out}/go"):
            if time.monotonic() > deadline:
                raise ClusterError("waited too long")
            time.sleep(0.05)
        return SpanReport(True, 1, 0.0, {})


class One:
    """As `lcray.execution.cluster.workers.Crew`, of one worker, without which there is none."""

    team, patience, setting_up = 1, PATIENCE, ()

    def __init__(self) -> None:
        self.ready: dict[int, Any] = {}
        self.started = 0
        self.fill(1)

    def fill(self, most: int) -> None:
        if not self.started:
            self.ready[0] = ray.remote(Silent).options(num_cpus=0, max_restarts=0).remote()
            self.started = 1
        assert self.ready, "the worker was ended"

    def follow(self) -> None: ...

    def end(self, number: int) -> None:
        ray.kill(self.ready.pop(number))


@pytest.mark.parametrize("deaf", [True, False])
def test_nobody_is_blamed_for_what_could_not_be_heard(
    deaf: bool, plain_out: Path, tmp_path: Path
) -> None:
    """A worker says nothing for longer than patience lasts, and `Beats` is stopped meanwhile."""
    plan = lcray.open(plain_out).plan

    def stop() -> None:
        there = beats()
        if deaf:
            os.kill(there, signal.SIGSTOP)
        time.sleep(_DEAF + 4)
        if deaf:
            os.kill(there, signal.SIGCONT)
        time.sleep(PATIENCE / 2)
        (tmp_path / "go").touch()

    def ignore(*_: object) -> None: ...

    crew: Any = One()
    dispatch = Dispatch(crew, plan, plan.spans[:1], tmp_path, ignore, ignore, Metrics())
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        if deaf:
            assert list(dispatch.run().reports) == [plan.spans[0]]
        else:
            with pytest.raises(AssertionError, match="the worker was ended"):
                dispatch.run()
    finally:
        thread.join()
    assert (tmp_path / "attempts").read_text() == "1\n"
