"""What the checks at the start of an analysis cost: in planned batches, and in an analysis.

Times are those of the processor, on one thread. A batch is the largest that the plan has of the
first split, passed forward and backward; an analysis is one of 20 intervals, reading and tables
included. The checks may cost one batch and 2 % of the analysis: `enough_intervals` says from how
many on they do.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from . import adapter
from .nets import FC, GPT, LENET, Net
from .player import Player
from .suite import Bench, Row

SHARE, INTERVALS = 0.02, 20  # of an analysis of so many intervals


class Checker:
    """A player that checks, and analyzes a few intervals, as one worker.

    Args:
        task: the reference of the task.
        run: the run.
        intervals: to analyze.
        rounds: of which the shortest times count.
    """

    def __init__(self, task: str, run: str, intervals: int, rounds: int) -> None:
        adapter.tune()
        self._workspace = adapter.open_workspace(task, run, {}, f"0:{intervals}", sharers=2)
        self._plan = adapter.draft(self._workspace, intervals)
        self._rounds = rounds

    def seconds(self) -> dict[str, float]:
        """Of each check, of a batch, and of an analysis of `INTERVALS` intervals."""
        analysis = self._analysis()
        parts = adapter.checks(self._workspace) | {
            "batch": adapter.planned_batch(self._workspace, self._plan)
        }
        return {name: self._shortest(part) for name, part in parts.items()} | {"analysis": analysis}

    def _shortest(self, call: Callable[[], object]) -> float:
        return min(_processor_seconds(call) for _ in range(self._rounds))

    def _analysis(self) -> float:
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as folder:
            begin = time.process_time()
            report = adapter.run_span(self._workspace, self._plan, 0, Path(folder))
            seconds = time.process_time() - begin
        share = adapter.count_gradients(self._plan, report)
        return seconds / share * adapter.planned_gradients(self._plan, INTERVALS)


def _processor_seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def rows(case: str, seconds: dict[str, float]) -> Iterator[Row]:
    """The figures of one network."""
    batch, analysis = seconds["batch"], seconds["analysis"]
    checks = {name: found for name, found in seconds.items() if name not in ("batch", "analysis")}
    total = sum(checks.values())
    for name, found in checks.items():
        yield Row(case, name, 1e3 * found, "ms")
    yield Row(case, "batch", 1e3 * batch, "ms")
    yield Row(case, "over_batch", total / batch, "ratio")
    yield Row(case, f"over_{INTERVALS}_intervals", total / analysis, "ratio")
    needed = max(0.0, total - batch) / (SHARE * analysis / INTERVALS)
    yield Row(case, "enough_intervals", max(1, math.ceil(needed)), "1")


def measure(net: Net, intervals: int, bench: Bench) -> Iterator[Row]:
    """The checks of one network."""
    player = Player(
        "tests.benchmarks.checks:Checker",
        adapter.worker_environment() | net.environment(bench.pick(net.samples, 64)),
        task=net.task,
        run=net.run(bench),
        intervals=bench.pick(intervals, 1),
        rounds=bench.pick(9, 2),
    )
    with player:
        yield from rows(f"checks/{net.name}", player.ask("seconds"))


CASES = {
    f"checks/{net.name}": partial(measure, net, intervals)
    for net, intervals in ((FC, 20), (LENET, 2), (GPT, 20))
}
