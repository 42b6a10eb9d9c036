"""`lcray.analyze` from start to end on LeNet: a Ray of its own, two workers, all tables.

`wall_over_gradients` is the time after start-up over that of the gradients alone: their number
times the time of one, as two workers measure it at once, over the number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import lcray
from lcray.execution.driver.analyze import Progress

from .nets import LENET
from .player import Player, ask_all
from .speed import worker
from .suite import Bench, Row

WORKERS = 2


class Analyst:
    """A player that analyzes one run."""

    def analyze(self, task: str, run: str, out: str, steps: str) -> dict[str, float]:
        """Seconds in all and before the first span, and gradients: 2 an interval, 1 a border."""
        begin = time.perf_counter()
        reached: dict[str, float] = {}

        def note(progress: Progress) -> None:
            reached.setdefault(progress.phase, time.perf_counter() - begin)

        results = lcray.analyze(
            run,
            task,
            out,
            resources=lcray.Resources(workers=WORKERS),
            steps=steps,
            splits=("train",),
            on_progress=note,
        )
        wall = time.perf_counter() - begin
        gradients = 1 + int(results.intervals()["n_gradients"].sum())
        return {"wall": wall, "start_up": reached["spans"], "gradients": gradients}


def measure(bench: Bench) -> Iterator[Row]:
    """The analysis between two measurements of a gradient."""
    samples, intervals = bench.pick(LENET.samples, 200), bench.pick(32, 4)
    before = time_of_one(bench, samples)
    with Player("tests.benchmarks.wall:Analyst", LENET.environment(samples)) as analyst:
        found = analyst.ask(
            "analyze",
            task=LENET.task,
            run=LENET.run(bench),
            out=str(bench.folder / "wall"),
            steps=f"0:{intervals}",
        )
    one = (before + time_of_one(bench, samples)) / 2
    needed = found["gradients"] * one / WORKERS
    after = found["wall"] - found["start_up"]
    case = f"analyze {LENET.name}"
    yield Row(case, "wall", found["wall"], "s")
    yield Row(case, "start_up", found["start_up"], "s")
    yield Row(case, "wall_over_gradients", after / needed, "ratio")
    yield Row(case, "wall_beyond_gradients", found["wall"] - 1.1 * needed, "s")


def time_of_one(bench: Bench, samples: int) -> float:
    """Seconds of a gradient while two workers are at it."""
    with worker(LENET, bench, samples, 1) as one, worker(LENET, bench, samples, 1) as two:
        players = (one, two)
        ask_all(players, "use", plan=one.ask("draft"))
        ask_all(players, "round")
        answers = ask_all(players, "round")
    return sum(a["inside"] for a in answers) / sum(a["gradients"] for a in answers)


CASES = {"wall": measure}
