"""An analysis whose workers do all but compute: they write small real shards, and misbehave.

Driver, scheduler, dispatch over Ray, heartbeats, locks, status and commits are lcray's own. A few
processes stand for the nodes, each holds many seats, and a seat is what the driver takes for a
worker. What goes wrong is decided by a seed.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from lcray.errors import CheckpointError
from lcray.execution.cluster.actor import Worker
from lcray.execution.cluster.connect import connection
from lcray.execution.cluster.dispatch import Dispatch, OnTick
from lcray.execution.cluster.metrics import Metrics
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.progress import Computation
from lcray.execution.driver.status import StatusFile, status
from lcray.execution.worker.reports import Outcome, SpanReport
from lcray.planning.make import make_plan, make_settings
from lcray.planning.plan import Plan, Span, SplitPlan
from lcray.storage import place
from lcray.storage.files import FORMAT_VERSION, encode_json, seal
from lcray.storage.lock import locked
from lcray.tables.arrow import make_table
from lcray.tables.output import Output
from lcray.tables.record import Record
from lcray.tables.shards.commit import each_commit
from lcray.tables.shards.writer import ShardWriter, remove_strays
from lcray.tasks.layer import Layer

from .peaks import peak_bytes

_PLANTED = "1-0123456789ab"
SPLIT = SplitPlan("train", 1000, 1000, 1000.0, 2.3, 4)


@dataclass(frozen=True)
class Faults:
    """How often a try at a span goes wrong: chances of each kind.

    Attributes:
        error: the span fails, and the worker lives.
        death: its process dies, with every other worker in it.
        straggle: it takes `slow` seconds.
        hang: it makes no progress for `stuck` seconds, and then writes its shards after all.
    """

    error: float = 0.0
    death: float = 0.0
    straggle: float = 0.0
    hang: float = 0.0
    slow: float = 5.0
    stuck: float = 60.0
    seed: int = 0

    def fate(self, span: str, attempt: str) -> str:
        """What becomes of a try; the third and later ones of a span are left alone."""
        number = int(attempt.partition("-")[0])
        draw = random.Random(f"{self.seed} {span} {number}").random()
        for kind in ("error", "death", "straggle", "hang") if number < 3 else ():
            chance = getattr(self, kind)
            if draw < chance:
                return kind
            draw -= chance
        return "none"


def make(out: Path, intervals: int, span_length: int, layers: int, tables: Sequence[str]) -> Plan:
    """An output that is planned, and nothing more: layers of one element each.

    Args:
        out: the output.
        intervals: T.
        span_length: intervals a span.
        layers: of the model.
        tables: those that shards get.
    """
    names = [f"block{n // 2}.{('weight', 'bias')[n % 2]}" for n in range(layers)]
    drafted = make_plan(
        range(intervals + 1),
        make_settings({"parameters": False}),
        [Layer(name, name.partition(".")[0], "parameter", (1,), 0, True) for name in names],
        [SPLIT],
        span_length=span_length,
    )
    plan = Plan(**{**vars_of(drafted), "tables": tuple(tables)})
    out.mkdir(parents=True)
    Output(out).write(Record("simulated", "simulated", plan, {}, {}))
    return plan


def vars_of(plan: Plan) -> dict[str, Any]:
    """The fields of a plan."""
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def write_span(plan: Plan, span: Span, out: Any, attempt: str) -> bool:
    """Commit shards with random numbers, seeded by the span, that close exactly."""
    rng = np.random.default_rng([span.first, span.last])
    starts, ends = np.array(span.steps[:-1]), np.array(span.steps[1:])
    lc = rng.normal(scale=1e-3, size=(len(starts), len(plan.layers)))
    digests = {step: f"{step:064x}" for step in span.steps}
    with ShardWriter(out, span, attempt) as writer:
        writer.write("intervals", make_table("intervals", _intervals(starts, ends, lc)))
        if "layers" in plan.tables:
            writer.write("layers", make_table("layers", _layers(plan, starts, ends, lc, rng)))
        sums = {SPLIT.name: [float(lc.sum()), float(lc.sum())]}
        info = {"seconds": 1.0, "n_gradients": 2 * len(starts), "device": "none", "sums": sums}
        return writer.commit(checkpoints=digests, info=info)


def plant(plan: Plan, out: Path) -> None:
    """Commit every span with a copy of the first one's shards, without syncing.

    For whatever reads commits and listings: they are as real ones, and made 20 times as fast.
    """
    first = plan.spans[0]
    write_span(plan, first, out, _PLANTED)
    entries = {t: asdict(e) for t, e in dict(each_commit(out, [first]))[first].files.items()}
    folder = Output(out).span(first)
    contents = {e["name"]: (folder / e["name"]).read_bytes() for e in entries.values()}
    for span in plan.spans[1:]:
        folder = Output(out).span(span)
        folder.mkdir()
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        commit = {
            "format_version": FORMAT_VERSION,
            "span": list(span.steps),
            "attempt": _PLANTED,
            "files": entries,
            "checkpoints": {str(step): f"{step:064x}" for step in span.steps},
            "info": {"seconds": 1.0, "n_gradients": 2, "sums": {SPLIT.name: [-1e-6, -1e-6]}},
        }
        (folder / "commit.json").write_bytes(encode_json(seal(commit)))


def _intervals(starts: Any, ends: Any, lc: Any) -> dict[str, Any]:
    total = lc.sum(axis=1)
    return {
        "split": SPLIT.name,
        "start_step": starts,
        "end_step": ends,
        "loss_start": 2.0,  # the same everywhere, so that spans agree where they meet
        "loss_end": 2.0,
        "loss_change": 0.0,
        "lc": total,
        "gap": total,
        "first_order_lc": total * 1.1,
        "rule": "simpson",
        "panels": 1,
        "n_gradients": 2,
        "converged": True,
        "status": "ok",
        "n_helping": (lc < 0).sum(axis=1),
        "n_hurting": (lc > 0).sum(axis=1),
        "n_zero": 0,
    }


def _layers(plan: Plan, starts: Any, ends: Any, lc: Any, rng: Any) -> dict[str, Any]:
    n, m = lc.shape
    names = [layer.name for layer in plan.layers]
    modules = list(dict.fromkeys(layer.module for layer in plan.layers))
    owners = np.array([modules.index(layer.module) for layer in plan.layers], np.int32)
    flat = lc.ravel()
    noise = rng.normal(size=(3, n * m))
    return {
        "split": SPLIT.name,
        "start_step": np.repeat(starts, m),
        "layer": (np.tile(np.arange(m, dtype=np.int32), n), names),
        "end_step": np.repeat(ends, m),
        "module": (np.tile(owners, n), modules),
        "kind": "parameter",
        "numel": 1,
        "lc": flat,
        "lc_error": np.abs(noise[0]) * 1e-9,
        "lc_helping": np.minimum(flat, 0.0),
        "lc_hurting": np.maximum(flat, 0.0),
        "n_helping": (flat < 0).astype(np.int64),
        "n_hurting": (flat > 0).astype(np.int64),
        "n_zero": 0,
        "first_order_lc": flat * (1 + 0.1 * noise[0]),
        "update_norm": np.abs(noise[1]),
        "gradient_norm": np.abs(noise[2]),
        "n_flips": 0,
    }


class _Workspace:
    """In place of `lcray.execution.worker.workspace.Workspace`."""

    def __init__(self, faults: Faults, write: bool) -> None:
        self._faults, self._write = faults, write

    def run(
        self, plan: Plan, span: Span, out: Any, attempt: str, tell: Callable[[float], None]
    ) -> SpanReport:
        fate = self._faults.fate(span.name, attempt)
        if fate == "error":
            raise CheckpointError(f"simulated: step {span.first} cannot be read")
        if fate == "death":
            os._exit(1)
        if fate == "straggle":
            time.sleep(self._faults.slow)
        elif fate == "hang":
            time.sleep(self._faults.stuck)
        won = write_span(plan, span, out, attempt) if self._write else True
        tell(len(span.intervals))
        return SpanReport(won, 2 * len(span.intervals), 1.0, {SPLIT.name: (-1e-6, -1e-6)})


class Node(Worker):
    """A process with room for many workers, which are its threads."""

    def __init__(self, faults: Faults, write: bool) -> None:
        self._workspace: Any = _Workspace(faults, write)

    def run_span(
        self, plan: Plan, span: Span, out: str, attempt: str, beats: Any = None
    ) -> SpanReport:
        """As a worker; where no shards are written, none are looked for."""
        if not self._workspace._write:
            return self._workspace.run(plan, span, out, attempt, lambda done: None)
        return super().run_span(plan, span, out, attempt, beats)

    def sit(self) -> None:
        """A worker has set up."""


class Seats:
    """Stands in for `lcray.execution.cluster.workers.Crew`.

    Args:
        workers: seats in all.
        nodes: processes that hold them.
        faults: what goes wrong.
        write: whether shards are written.
        patience: seconds without progress after which a worker is replaced.
    """

    def __init__(
        self, workers: int, nodes: int, faults: Faults, write: bool, patience: float
    ) -> None:
        self.wanted, self.patience, self.team = workers, patience, 1
        self.ready: dict[int, Any] = {}
        self.lost = 0
        self._numbers = itertools.count()
        self._starting: dict[Any, tuple[int, Any]] = {}
        room = -(-2 * workers // nodes) + 8  # those that hang keep their thread for a while
        kind: Any = ray.remote(Node)
        options = {"num_cpus": 0, "max_concurrency": room, "max_restarts": -1}
        self._nodes = [kind.options(**options).remote(faults, write) for _ in range(nodes)]

    def wait(self) -> None:
        """Until every process is up."""
        ray.get([node.sit.remote() for node in self._nodes])

    @property
    def setting_up(self) -> list[Any]:
        return list(self._starting)

    def follow(self) -> None:
        """The nodes stay the same."""

    def fill(self, most: int) -> None:
        while len(self.ready) + len(self._starting) < min(self.wanted, most):
            number = next(self._numbers)
            node = self._nodes[number % len(self._nodes)]
            self._starting[node.sit.remote()] = number, node

    def welcome(self, reference: Any) -> int | None:
        number, node = self._starting.pop(reference)
        with suppress(RayError):
            ray.get(reference)
            self.ready[number] = SimpleNamespace(run_span=node.run_span)
            return number
        return None

    def end(self, number: int) -> None:
        self.ready.pop(number)
        self.lost += 1


class Pool:
    """Stands in for `lcray.execution.cluster.pool.Pool`, as far as `Computation` asks it."""

    def __init__(self, seats: Seats) -> None:
        self._seats, self._metrics = seats, Metrics()

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Any,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: OnTick,
    ) -> Outcome:
        crew: Any = self._seats
        return Dispatch(crew, plan, spans, out, on_done, on_tick, self._metrics).run()


class Driver:
    """A player that drives an output to its end, as `lcray.analyze` does after its probe."""

    def drive(
        self,
        out: str,
        workers: int,
        nodes: int,
        faults: dict[str, float],
        write: bool = True,
        patience: float = 30.0,
    ) -> dict[str, float]:
        """Have all spans done; a second round takes those that were given up."""
        with connection(Resources()):
            seats = Seats(workers, nodes, Faults(**faults), write, patience)
            seats.wait()
            pool, where = Pool(seats), place(out)
            given_up, rounds, begin = 0, 0, time.perf_counter()
            used = time.process_time()
            while True:
                found = _analyze(pool, where)
                given_up, rounds = given_up + found["given_up"], rounds + 1
                if not found["given_up"] or rounds == 4:
                    break
            return {
                "seconds": time.perf_counter() - begin,
                "cpu_seconds": time.process_time() - used,
                "peak_bytes": peak_bytes(),
                "rounds": rounds,
                "given_up": given_up,
                "workers_lost": seats.lost,
                "spans": found["spans"],
                "strays": found["strays"],
            }

    def resume(self, out: str) -> dict[str, float]:
        """The same where every span is done: nothing may be computed."""
        begin = time.perf_counter()
        found = _analyze(None, place(out))
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        where = place(out)
        record = Output(where).existing()
        assert record is not None
        remove_strays(where, record.plan.spans)
        strays = time.perf_counter() - begin
        begin = time.perf_counter()
        status(where)
        return {
            **found,
            "seconds": seconds,
            "strays_seconds": strays,
            "status_seconds": time.perf_counter() - begin,
            "peak_bytes": peak_bytes(),
        }


def _analyze(pool: Any, out: Any) -> dict[str, float]:
    record = Output(out).existing()
    assert record is not None
    done = [0]

    def tell(progress: Any) -> None:
        done[0] = progress.done

    with locked(out) as lock, StatusFile(out, record.plan) as file:
        computation = Computation(pool, out, record.plan, file, lock.check, tell)
        computation.run()
        strays = [] if pool is None else remove_strays(out, record.plan.spans)
    return {
        "spans": len(record.plan.spans),
        "intervals": done[0],
        "given_up": len(computation.failures),
        "strays": len(strays),
    }
