"""Time against intervals, parameters, samples and splits; and groups that can be sorted.

Seconds are those of one span on one thread, the fastest of a few, all spans taking turns.
`line_residual` is the largest distance from the least-squares line, relative to the longest time:
near 0, growth is linear.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcray.tasks.task import Task, load_task

from . import adapter
from .nets import FC, LENET, Net
from .player import Player
from .suite import Bench, Row
from .tasks import in_groups, mlp, record

BASE = {"intervals": 8, "width": 100, "samples": 2000, "splits": 1}
AXES = {
    "intervals": (4, 8, 16, 24, 32),
    "width": (100, 200, 400, 800, 1600),
    "samples": (500, 1000, 2000, 4000, 8000),
    "splits": (1, 2, 3, 4, 5),
}
GROUPS = ("1", "10")


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope and intercept by least squares, and the largest residual relative to the largest y."""
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.abs(np.asarray(y) - (slope * np.asarray(x) + intercept))
    return float(slope), float(intercept), float(residuals.max() / max(y))


class Laboratory:
    """A player that prepares spans, and times them."""

    def __init__(self) -> None:
        adapter.tune()
        self._prepared: dict[str, Any] = {}

    def prepare(
        self, name: str, run: str, intervals: int, width: int, samples: int, splits: int
    ) -> None:
        """A span of a network 784-width-10."""
        self._prepare(name, mlp((width,), samples, splits), run, intervals, {})

    def prepare_groups(self, name: str, task: str, run: str, intervals: int) -> None:
        """A span of an example whose classes are put into as many groups as `name` says."""
        grouped = in_groups(load_task(task), int(name))
        self._prepare(name, grouped, run, intervals, {"splits": ["train"]})

    def _prepare(
        self, name: str, task: Task, run: str, intervals: int, options: Mapping[str, Any]
    ) -> None:
        workspace = adapter.open_workspace(task, run, options, f"0:{intervals}")
        self._prepared[name] = workspace, adapter.draft(workspace, intervals)

    def seconds(self, name: str) -> float:
        """The time of the span of that name."""
        workspace, plan = self._prepared[name]
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as out:
            begin = time.perf_counter()
            adapter.run_span(workspace, plan, 0, Path(out))
            return time.perf_counter() - begin


def fastest(laboratory: Player, names: Sequence[str], repeats: int) -> list[float]:
    """The shortest time of each span over `repeats` rounds."""
    rounds = [[laboratory.ask("seconds", name=name) for name in names] for _ in range(repeats)]
    return [min(times) for times in zip(*rounds, strict=True)]


def measure(bench: Bench) -> Iterator[Row]:
    """One thing varies, the others stay at `BASE`."""
    axes = {axis: bench.pick(values, values[:2]) for axis, values in AXES.items()}
    steps = max(*axes["intervals"], BASE["intervals"])
    runs = {
        width: str(record(mlp((width,)), bench.folder / f"width-{width}", steps))
        for width in axes["width"]
    }
    with Player("tests.benchmarks.growth:Laboratory", adapter.worker_environment()) as laboratory:
        for axis, values in axes.items():
            names = [f"{axis} {value}" for value in values]
            for name, value in zip(names, values, strict=True):
                point = {**BASE, axis: value}
                laboratory.ask("prepare", name=name, run=runs[point["width"]], **point)
            times = fastest(laboratory, names, bench.pick(4, 1))
            if axis == "width":
                yield from lines("parameters", [(784 + 1 + 10) * v + 10 for v in values], times)
            else:
                yield from lines(axis, values, times)


def lines(axis: str, x: Sequence[int], seconds: Sequence[float]) -> Iterator[Row]:
    """The points, and the line through them."""
    case = f"growth {axis}"
    for value, time_ in zip(x, seconds, strict=True):
        yield Row(case, f"seconds at {value}", time_, "s")
    slope, intercept, residual = fit_line(x, seconds)
    yield Row(case, "line_slope", slope, "s")
    yield Row(case, "line_intercept", intercept, "s")
    yield Row(case, "line_residual", residual, "ratio")


def measure_groups(bench: Bench) -> Iterator[Row]:
    """Ten classes against all samples in one group."""
    nets: list[Net] = [FC, LENET]
    for net in nets:
        environment = {**adapter.worker_environment(), **net.environment(bench.pick(8000, 500))}
        with Player("tests.benchmarks.growth:Laboratory", environment) as laboratory:
            for name in GROUPS:
                laboratory.ask(
                    "prepare_groups", name=name, task=net.task, run=net.run(bench), intervals=2
                )
            one, ten = fastest(laboratory, GROUPS, bench.pick(5, 1))
        yield Row(f"groups {net.name}", "groups_cost", ten / one, "ratio")


CASES = {"growth": measure, "groups": measure_groups}
