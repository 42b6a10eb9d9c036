"""What the loop makes of results that come together, of real Ray actors that compute nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

import lcray
from lcray.errors import ClusterError, TaskError
from lcray.execution.cluster.dispatch import Dispatch
from lcray.execution.cluster.metrics import Metrics
from lcray.execution.cluster.scheduler import Policy
from lcray.execution.worker.reports import Outcome, SpanReport, View
from lcray.planning.plan import Plan, Span

POLICY = "lcray.execution.cluster.dispatch.Policy"
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
# Workers do not find this module: they get the class itself.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Idler:
    """Reports spans at once; dies at one while ``kill`` is there, waits for ``go`` at another."""

    def run_span(self, plan: Plan, span: Span, out: str, attempt: str, beats: Any) -> SpanReport:
        with open(f"{out}/attempts", "a") as file:
            file.write(f"{attempt}\n")
        if span.first == 3 and os.path.exists(f"{out}/kill"):
            os.unlink(f"{out}/kill")
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while span.first == 6 and os.path.exists(f"{out}/wait"):
            if time.monotonic() > deadline:
                raise ClusterError("waited too long")
            time.sleep(0.01)
        return SpanReport(True, 1, 0.0, {"train": (float(span.first), 0.0)})


class Straggler:
    """Waits for a file ``go-…`` at each span, but for copies of the first one."""

    def run_span(self, plan: Plan, span: Span, out: str, attempt: str, beats: Any) -> SpanReport:
        with open(f"{out}/attempts", "a") as file:
            file.write(f"{span.first}-{attempt[0]}\n")
        deadline = time.monotonic() + 60
        while not os.path.exists(f"{out}/go-{span.first}") and (span.first or attempt[0] == "1"):
            if time.monotonic() > deadline:
                raise ClusterError("waited too long")
            time.sleep(0.01)
        if not span.first and attempt[0] != "1" and os.path.exists(f"{out}/fail"):
            raise TaskError("the copy failed")
        return SpanReport(True, 1, 0.0)


class Few:
    """As `lcray.execution.cluster.workers.Crew`, of workers that are ready."""

    team, patience, setting_up = 1, None, ()

    def __init__(self, workers: int, kind: type = Idler) -> None:
        start = ray.remote(kind).options(num_cpus=0, max_restarts=0).remote
        self.ready = {number: start() for number in range(workers)}
        self.before_a_look: Callable[[], None] = lambda: None
        self.ended: list[int] = []
        self.deadline = time.monotonic() + 100

    def fill(self, most: int) -> None:
        assert self.ready and time.monotonic() < self.deadline, "this would go on for ever"
        self.before_a_look()

    def follow(self) -> None: ...

    def end(self, number: int) -> None:
        ray.kill(self.ready.pop(number))
        self.ended.append(number)


def make(crew: Any, plan: Plan, out: Path, on_done: Callable[[Span, SpanReport], None]) -> Dispatch:
    return Dispatch(crew, plan, plan.spans, out, on_done, lambda view: None, Metrics())


def test_reports_that_come_with_a_death_are_kept_and_count_once(
    plain_out: Path, tmp_path: Path
) -> None:
    plan, crew, told = lcray.open(plain_out).plan, Few(3), []
    (tmp_path / "kill").touch()
    dispatch = make(crew, plan, tmp_path, lambda span, report: told.append((span, report)))
    seen: set[Any] = set()

    def all_of_them() -> None:
        assert not seen & {*dispatch._busy}, "was there at the last look, and was not taken"
        seen.update(dispatch._busy)
        if dispatch._busy:
            ray.wait([*dispatch._busy], num_returns=len(dispatch._busy), timeout=60)

    crew.before_a_look = all_of_them
    outcome: Outcome = dispatch.run()
    assert sorted(span.first for span, _ in told) == [0, 3, 6, 9]  # each once
    assert {span: report.sums["train"] for span, report in told} == {
        span: (float(span.first), 0.0) for span in plan.spans
    }
    assert (outcome.reports, outcome.failures, len(crew.ended)) == (dict(told), {}, 1)
    names = (tmp_path / "attempts").read_text().split()
    assert len(names) == len({*names}) == 5  # no two attempts share a name


def test_a_result_is_not_kept_back_until_others_come(plain_out: Path, tmp_path: Path) -> None:
    """The span at 6 is done only once the driver has heard of the one behind it."""
    plan = lcray.open(plain_out).plan
    (tmp_path / "wait").touch()

    def hear(span: Span, report: SpanReport) -> None:
        if span.first == 9:
            (tmp_path / "wait").unlink()

    outcome = make(Few(2), plan, tmp_path, hear).run()
    assert {span.first for span in outcome.reports} == {0, 3, 6, 9}
    assert len((tmp_path / "attempts").read_text().split()) == 4


def test_the_second_to_finish_a_span_counts_for_nothing(
    plain_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first span is done by a copy, and by the straggler while the others are not done yet."""
    monkeypatch.setattr(
        "lcray.execution.cluster.dispatch.Policy", partial(Policy, straggling_seconds=1.0)
    )
    plan, crew, told = lcray.open(plain_out).plan, Few(5, Straggler), []
    counted: list[Span] = []

    def hear(span: Span, report: SpanReport) -> None:
        told.append(span)
        (tmp_path / "go-0").touch()  # the copy was first

    dispatch = make(crew, plan, tmp_path, hear)
    original = dispatch._finish

    def finish(span: Span, report: SpanReport) -> None:
        counted.append(span)
        original(span, report)
        if counted.count(plan.spans[0]) == 2:
            for other in plan.spans:
                (tmp_path / f"go-{other.first}").touch()

    monkeypatch.setattr(dispatch, "_finish", finish)
    outcome = dispatch.run()
    assert counted.count(plan.spans[0]) == 2
    assert sorted(span.first for span in told) == [0, 3, 6, 9]  # each once
    assert {"0-1", "0-2"} <= {*(tmp_path / "attempts").read_text().split()}
    assert (len(outcome.reports), outcome.failures) == (4, {})


def test_a_span_that_was_given_up_counts_if_another_one_at_it_finishes(
    plain_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the first span fails for good; its straggler is done before the others are."""
    monkeypatch.setattr(
        "lcray.execution.cluster.dispatch.Policy", partial(Policy, straggling_seconds=1.0)
    )
    plan, seen = lcray.open(plain_out).plan, []
    crew: Any = Few(5, Straggler)
    (tmp_path / "fail").touch()

    def look(view: View) -> None:
        if view.failures:
            seen.append(dict(view.failures))
            (tmp_path / "go-0").touch()

    def hear(span: Span, report: SpanReport) -> None:
        for other in plan.spans:
            (tmp_path / f"go-{other.first}").touch()

    outcome = Dispatch(crew, plan, plan.spans, tmp_path, hear, look, Metrics()).run()
    assert seen[0] == {plan.spans[0]: "the copy failed"}
    assert outcome.failures == {}
    assert {*outcome.reports} == {*plan.spans}
