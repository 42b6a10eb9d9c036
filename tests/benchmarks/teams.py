"""Wall time of an interval where workers share its gradients: teams of one and of two, in turns.

Both follow one plan with two partial sums, on one Ray. What is counted is the time that a span
says it took: reading, gradients, the way of points and partial sums, and tables. LeNet has few
parameters for its arithmetic; the wide network has many, for which its few samples are no match.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lcray
from lcray.tasks.task import Task

from .nets import LENET
from .player import Player
from .suite import Bench, Row
from .tasks import mlp, record

WIDE, WIDE_SAMPLES = (4096, 1024), 4096


class Captain:
    """A player that has a Ray of its own and analyzes one run with teams of any size.

    Args:
        run: the run.
        intervals: to analyze, as one span.
        task: the reference of the task; None for the wide network's.
    """

    def __init__(self, run: str, intervals: int, task: str | None = None) -> None:
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        self._run, self._intervals = run, intervals
        self._task: str | Task = task or mlp(WIDE, WIDE_SAMPLES)
        found = lcray.plan(
            run,
            self._task,
            resources=lcray.Resources(workers=1),
            steps=f"0:{intervals}",
            span_length=intervals,
            splits=("train" if task else "split0",),
            partial_sums=2,
        )
        self._plan = found.plan

    def seconds(self, team: int) -> dict[str, Any]:
        """Of an interval, for a team of so many workers."""
        resources = lcray.Resources(workers=team, data_parallel=team)
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as folder:
            out = Path(folder, "out")
            lcray.analyze(self._run, self._task, out, plan=self._plan, resources=resources)
            (commit,) = out.glob("shards/*/commit.json")
            found = json.loads(commit.read_text())["info"]["seconds"]
            tables = [path.read_bytes() for path in sorted((out / "tables").glob("*.parquet"))]
        return {"seconds": found / self._intervals, "tables": hash(tuple(tables))}


def measure(bench: Bench) -> Iterator[Row]:
    """Rounds of both teams, for both networks."""
    samples, intervals = bench.pick(LENET.samples, 200), bench.pick(4, 2)
    lenet = {"run": LENET.run(bench), "intervals": intervals, "task": LENET.task}
    yield from compare(bench, LENET.name, LENET.environment(samples), lenet)
    run = record(mlp(WIDE, 1000), bench.folder / "teams-wide", intervals)
    yield from compare(bench, "wide", {}, {"run": str(run), "intervals": intervals})


def compare(
    bench: Bench, name: str, environment: dict[str, str], arguments: dict[str, Any]
) -> Iterator[Row]:
    """Medians over rounds in which the teams take turns."""
    found: dict[int, list[float]] = {1: [], 2: []}
    with Player("tests.benchmarks.teams:Captain", environment, **arguments) as captain:
        answers = []
        for _ in range(bench.pick(3, 1)):
            for team, seconds in found.items():
                answers.append(captain.ask("seconds", team=team))
                seconds.append(answers[-1]["seconds"])
    assert len({answer["tables"] for answer in answers}) == 1, "the tables are the same"
    case = f"teams {name}"
    for team, seconds in found.items():
        yield Row(case, f"seconds_an_interval_team_of_{team}", median(seconds), "s")
    ratios = [one / two for one, two in zip(found[1], found[2], strict=True)]
    yield Row(case, "team_of_two_over_one", median(ratios), "ratio")


CASES = {"teams": measure}
