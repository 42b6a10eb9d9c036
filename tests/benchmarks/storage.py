"""Reducing: rows a second, and memory against the number of intervals; the `elements` table.

The fully connected network with all tables on, `elements` among them: real LC, 84,060 values an
interval and 51 million in the longest output.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

import lcray

from .adapter import Plan, worker_environment, write_plan
from .nets import FC
from .peaks import peak_bytes
from .player import Player
from .suite import Bench, Row

INTERVALS = 38  # of the shortest output
QUICK_INTERVALS = 4
SPAN = 19
SAMPLES = 500
GROUP_BY = "select layer, count(*), sum(lc), sum(abs(lc)) from elements group by layer"


class Reducer:
    """A player that reduces one output: a fresh process, so that its peak is the reducer's."""

    def reduce(self, out: str) -> dict[str, float]:
        begin = time.perf_counter()
        lcray.reduce(out)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "peak_bytes": peak_bytes()}


def write_output(bench: Bench, out: Path, intervals: int) -> None:
    """Spans of `intervals` intervals, by two workers."""
    run = bench.example_run(FC.script, bench.pick(16 * INTERVALS, QUICK_INTERVALS))
    arguments = {
        "task": FC.task,
        "run": str(run),
        "steps": f"0:{intervals}",
        "span_length": min(SPAN, intervals // 2),
        "options": {"elements": True, "window": 100},
    }
    environment = {**worker_environment(), **FC.environment(SAMPLES)}
    with (
        Player("tests.benchmarks.worker:Worker", environment, **arguments) as one,
        Player("tests.benchmarks.worker:Worker", environment, **arguments) as two,
    ):
        plan = one.ask("draft")
        write_plan(Plan.from_dict(plan), out)
        workers = (one, two)
        for worker in workers:
            worker.ask("use", plan=plan)
        spans = len(plan["spans"])
        for index in range(spans + 2):
            if index >= 2:
                workers[index % 2].receive()
            if index < spans:
                workers[index % 2].send("round", index=index, out=str(out))


def measure(bench: Bench) -> Iterator[Row]:
    """Outputs of 1, 4 and 16 times as many intervals, reduced; the longest one queried."""
    for factor in bench.pick((1, 4, 16), (1,)):
        out = bench.folder / f"output-{factor}"
        write_output(bench, out, factor * bench.pick(INTERVALS, QUICK_INTERVALS))
        with Player("tests.benchmarks.storage:Reducer") as reducer:
            found = reducer.ask("reduce", out=str(out))
        rows = sum(pq.read_metadata(path).num_rows for path in out.glob("tables/**/*.parquet"))
        case = f"reduce {factor}x"
        yield Row(case, "reduce_rows_per_second", rows / found["seconds"], "1/s")
        yield Row(case, "reduce_memory", found["peak_bytes"] / 2**20, "MiB")
    yield from query_elements(out)


def query_elements(out: Path) -> Iterator[Row]:
    """Size and speed of the `elements` table of `out`."""
    files = [*out.glob("tables/elements*.parquet"), *out.glob("tables/elements/**/*.parquet")]
    count = sum(pq.read_metadata(path).num_rows for path in files)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        found = lcray.query(out, GROUP_BY)
        seconds.append(time.perf_counter() - begin)
    if int(found.iloc[:, 1].sum()) != count:
        raise RuntimeError(f"elements: the query saw other rows than the {count} in the files")
    size = sum(path.stat().st_size for path in files)
    yield Row("elements", "elements_rows", count, "1")
    yield Row("elements", "elements_bytes_per_value", size / count, "bytes")
    yield Row("elements", "elements_group_by_seconds", median(seconds), "s")


CASES = {"storage": measure}
