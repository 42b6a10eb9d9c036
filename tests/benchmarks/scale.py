"""A million intervals, without the gradients: what driver, commits, listings and reducer take.

Spans hold 8 to 255 intervals, so both ends are taken: 125,000 spans and 3,922. See
`simulation` for what is real, and docs/scale.md for what came out.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lcray.execution.cluster.scheduler import Assign, Decision, GiveUp, Policy, Replace, Scheduler
from lcray.storage import storage_of
from lcray.tables.output import Output

from . import simulation
from .player import Player
from .simulation import Driver
from .suite import Bench, Row

INTERVALS, QUICK_INTERVALS = 1_000_000, 2_000
LENGTHS = (255, 8)
WORKERS, NODES = 200, 2
DRIVER = "tests.benchmarks.simulation:Driver"
FAULTS = {"error": 0.01, "death": 1e-3, "straggle": 5e-3, "hang": 5e-3}
QUICK_FAULTS = {"error": 0.05, "death": 0.01, "straggle": 0.01, "slow": 0.5}
LAYERS = 100  # of the outputs that are reduced
REDUCED = (10_000_000, 30_000_000, 100_000_000)  # rows of `layers`


def schedule(spans: int, workers: int, seed: int = 0) -> dict[str, int]:
    """Have the scheduler see all spans done by workers that fail, die and hang, in no time.

    Returns:
        how often each thing happened.
    """
    rng = random.Random(seed)
    scheduler = Scheduler([8] * spans, policy=Policy(backoff=0.0, slack=0.0), seconds=1.0)
    counts = {"spans": spans, "events": 0, "failed": 0, "lost": 0, "given_up": 0}
    busy: list[int] = []
    fresh, now = workers, 0.0

    def carry_out(decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Assign(worker=int(number)):
                    busy.append(number)
                case GiveUp():
                    counts["given_up"] += 1
                case Replace():
                    raise AssertionError("nobody was silent for so long")

    for number in range(workers):
        carry_out(scheduler.worker_ready(number, now))
    while not scheduler.finished:
        now += 0.01
        counts["events"] += 1
        if not busy:
            carry_out(scheduler.tick(now))
            continue
        at = rng.randrange(len(busy))
        busy[at], busy[-1] = busy[-1], busy[at]
        number, draw = busy.pop(), rng.random()
        if draw < 0.01:
            counts["failed"] += 1
            carry_out(scheduler.span_failed(number, "simulated", now))
        elif draw < 0.015:
            counts["lost"] += 1
            carry_out(scheduler.worker_lost(number, "simulated", now))
            carry_out(scheduler.worker_ready(fresh, now))
            fresh += 1
        else:
            carry_out(scheduler.span_done(number, now))
    return counts


def measure_scheduler(bench: Bench) -> Iterator[Row]:
    """The state machine by itself."""
    spans = bench.pick(INTERVALS // 8, 1000)
    begin = time.perf_counter()
    counts = schedule(spans, WORKERS)
    yield Row("scale scheduler", "spans_per_second", spans / _since(begin), "1/s")
    yield Row("scale scheduler", "failures", counts["failed"] + counts["lost"], "1")


def measure_drive(bench: Bench) -> Iterator[Row]:
    """Long spans with shards and faults; short ones for the rate of dispatch alone."""
    intervals = bench.pick(INTERVALS, QUICK_INTERVALS)
    workers = bench.pick(WORKERS, 20)
    for length, write in zip(LENGTHS, (True, False), strict=True):
        case = f"scale {'run' if write else 'dispatch'} {length}"
        out = bench.folder / case.replace(" ", "-")
        begin = time.perf_counter()
        simulation.make(out, intervals, length, 10, ("intervals",))
        yield Row(case, "plan_seconds", _since(begin), "s")
        yield Row(case, "plan_bytes", (out / "analysis.json").stat().st_size, "bytes")
        faults = bench.pick(FAULTS, QUICK_FAULTS) if write else {}
        with Player(DRIVER) as driver:
            found = driver.ask(
                "drive", out=str(out), workers=workers, nodes=NODES, faults=faults, write=write
            )
        yield from _driven(case, found)
        if write:
            with Player(DRIVER) as driver:
                found = driver.ask("resume", out=str(out))
            yield Row(case, "intervals_lost", intervals - found["intervals"], "1")
        shutil.rmtree(out)


def _driven(case: str, found: dict[str, float]) -> Iterator[Row]:
    yield Row(case, "spans_per_second", found["spans"] / found["seconds"], "1/s")
    yield Row(case, "driver_seconds_per_span", found["cpu_seconds"] / found["spans"], "s")
    yield Row(case, "driver_memory", found["peak_bytes"] / 2**20, "MiB")
    for name in ("spans", "workers_lost", "given_up", "rounds", "strays"):
        yield Row(case, name, found[name], "1")


def measure_resume(bench: Bench) -> Iterator[Row]:
    """Resuming, `status` and listing where every span is done."""
    for length in LENGTHS:
        case, out = f"scale resume {length}", bench.folder / f"resume-{length}"
        plan = simulation.make(
            out, bench.pick(INTERVALS, QUICK_INTERVALS), length, 10, ("intervals",)
        )
        simulation.plant(plan, out)
        with Player(DRIVER) as driver:
            found = driver.ask("resume", out=str(out))
        yield Row(case, "resume_seconds", found["seconds"], "s")
        yield Row(case, "strays_seconds", found["strays_seconds"], "s")
        yield Row(case, "status_seconds", found["status_seconds"], "s")
        yield Row(case, "driver_memory", found["peak_bytes"] / 2**20, "MiB")
        begin = time.perf_counter()
        yield Row(case, "files", len(storage_of(out).find(out / "shards")), "1")
        yield Row(case, "listing_seconds", _since(begin), "s")
        shutil.rmtree(out)


def measure_objects(bench: Bench) -> Iterator[Row]:
    """The same on an S3 server of this machine, at a size that it bears."""
    from lcray.storage import place

    from ..object_server import client, s3_server, using

    spans = bench.pick(2000, 20)
    local = bench.folder / "objects"
    plan = simulation.make(local, spans * 8, 8, 10, ("intervals",))
    simulation.plant(plan, local)
    with s3_server() as endpoint, using(endpoint):
        s3 = client(endpoint)
        s3.create_bucket(Bucket="scale")
        for path in sorted(local.rglob("*")):
            if path.is_file():
                key = f"out/{path.relative_to(local).as_posix()}"
                s3.put_object(Bucket="scale", Key=key, Body=path.read_bytes())
        out = place("s3://scale/out")
        begin = time.perf_counter()
        yield Row("scale s3", "files", len(storage_of(out).find(out / "shards")), "1")
        yield Row("scale s3", "listing_seconds", _since(begin), "s")
        found = Driver().resume(str(out))
        yield Row("scale s3", "spans", spans, "1")
        yield Row("scale s3", "resume_seconds", found["seconds"], "s")
    shutil.rmtree(local)


def measure_reduce(bench: Bench) -> Iterator[Row]:
    """Outputs of 10, 30 and 100 million rows of `layers`."""
    for rows in bench.pick(REDUCED, (20_000, 40_000)):
        case, out = f"scale reduce {rows}", bench.folder / f"reduce-{rows}"
        plan = simulation.make(out, rows // LAYERS, 255, LAYERS, ("intervals", "layers"))
        for span in plan.spans:
            simulation.write_span(plan, span, out, "1-bench")
        with Player("tests.benchmarks.storage:Reducer") as reducer:
            found = reducer.ask("reduce", out=str(out))
        yield Row(case, "reduce_rows_per_second", rows / found["seconds"], "1/s")
        yield Row(case, "reduce_memory", found["peak_bytes"] / 2**20, "MiB")
        yield Row(case, "shard_bytes_per_row", _bytes(out / "shards") / rows, "bytes")
        yield Row(case, "table_bytes_per_row", _bytes(out / "tables") / rows, "bytes")
        shutil.rmtree(out)


def _bytes(folder: Path) -> int:
    return sum(item.size for item in storage_of(folder).find(folder))


def _since(begin: float) -> float:
    return time.perf_counter() - begin


def measure_plan(bench: Bench) -> Iterator[Row]:
    """Reading the record again, as every command does."""
    for length in LENGTHS:
        out = bench.folder / f"plan-{length}"
        simulation.make(out, bench.pick(INTERVALS, QUICK_INTERVALS), length, 10, ("intervals",))
        begin = time.perf_counter()
        Output(out).existing()
        yield Row(f"scale plan {length}", "read_seconds", _since(begin), "s")


CASES = {
    "scale plan": measure_plan,
    "scale scheduler": measure_scheduler,
    "scale drive": measure_drive,
    "scale resume": measure_resume,
    "scale s3": measure_objects,
    "scale reduce": measure_reduce,
}
