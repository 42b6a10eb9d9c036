"""Everything that one worker does with one span, and with its set-up. No Ray.

A span's result depends on the span and the plan alone. Inside a span the gradient at an endpoint
is computed once; while an interval computes, the next checkpoint is read.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lcray.allocation import Accuracy, SplitAllocator
from lcray.checkpoints import State, open_series
from lcray.data import SplitData
from lcray.errors import CheckpointError, TaskError
from lcray.gradient import Evaluation
from lcray.layers import Layer
from lcray.path import Point, Segment
from lcray.planning import Plan, Settings, Span, SplitPlan
from lcray.quadrature import get_rule
from lcray.shards import ShardWriter
from lcray.tabulation import SplitTables
from lcray.task import Task, source_hash
from lcray.workbench import Workbench


@dataclass(frozen=True)
class Description:
    """What decides the numbers beside the settings, found without a gradient.

    Attributes:
        layers: of the model.
        split_hashes: SHA-256 of each split's data, in the order of its batches.
        source_hash: of the task's and the model's source.
        base_hash: of the model's own values where checkpoints are partial, else empty.
        first_hash: of the first checkpoint's bytes.
        device_kind: ``cpu`` or ``cuda``.
        device: the device in words.
        low_precision: layers that the first checkpoint stores in 16 bits or fewer.
        double_precision: layers that it stores in 64 bits.
    """

    layers: tuple[Layer, ...]
    split_hashes: dict[str, str]
    source_hash: str
    base_hash: str
    first_hash: str
    device_kind: str
    device: str
    low_precision: tuple[str, ...] = ()
    double_precision: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """The splits as they were found at the first checkpoint, and what a gradient costs.

    Attributes:
        splits: with sizes, weights and first losses.
        seconds: of one full-batch gradient, by split.
        peak_bytes: the largest memory the worker has had.
        checkpoint_bytes: of the first checkpoint.
        read_seconds: to read it.
    """

    splits: tuple[SplitPlan, ...]
    seconds: dict[str, float]
    peak_bytes: int
    checkpoint_bytes: int
    read_seconds: float


@dataclass(frozen=True)
class SpanReport:
    """What came of one attempt at a span.

    Attributes:
        committed: whether this attempt counts; another may have been first.
        n_gradients: full-batch gradients evaluated for the intervals' rules.
        seconds: wall time.
    """

    committed: bool
    n_gradients: int
    seconds: float


@dataclass
class Outcome:
    """What became of the spans of one call.

    Attributes:
        reports: of the spans that are committed.
        failures: the reason by span, for those that are not.
    """

    reports: dict[Span, SpanReport] = field(default_factory=dict)
    failures: dict[Span, str] = field(default_factory=dict)


class Workspace:
    """A task's model and data on a device, ready to work on spans of a run.

    Args:
        task: the task.
        run: the directory of checkpoints.
        settings: of the analysis.
        steps: the range of steps to analyze, ``a:b``.
        device: where to compute.
        threads: intra-op threads; None leaves torch as it is.

    Raises:
        TaskError: if model or data break the contract.
        CheckpointError: if the run or its first checkpoint cannot be read, or does not fit.
    """

    def __init__(
        self,
        task: Task,
        run: str,
        settings: Settings,
        *,
        steps: str | None = None,
        device: str = "cpu",
        threads: int | None = 1,
    ) -> None:
        self.series = open_series(run, steps)
        self.bench = Workbench(task, settings, device=device, threads=threads)
        self.settings, self.task, self.flat = settings, task, self.bench.flat
        start = time.perf_counter()
        self._first = self.series.read(self.series.steps[0])
        self._read_seconds = time.perf_counter() - start
        self._dtypes = {name: tensor.dtype for name, tensor in self._first.tensors.items()}

    def describe(self) -> Description:
        """What decides the numbers beside the settings."""
        base = self.flat.base
        return Description(
            layers=self.flat.layers,
            split_hashes={split.name: split.sha256 for split in self.bench.splits},
            source_hash=source_hash(self.task, self.flat.model),
            base_hash="" if base is None else hashlib.sha256(base.numpy().data).hexdigest(),
            first_hash=self._first.sha256,
            device_kind=self.bench.device.type,
            device=torch.cuda.get_device_name() if self.bench.device.type == "cuda" else "cpu",
            low_precision=self._stored_in(1, 2),
            double_precision=self._stored_in(8),
        )

    def _stored_in(self, *sizes: int) -> tuple[str, ...]:
        found = self._dtypes.items()
        return tuple(n for n, d in found if d.is_floating_point and d.itemsize in sizes)

    def probe(self) -> Probe:
        """Evaluate every split twice at the first checkpoint.

        Raises:
            TaskError: if the loss is not a function of the weights, or breaks the contract.
        """
        point = self._point(self._first)
        segment = Segment(point, point)
        segment.set_point(self.flat, 0.0)
        out = self.bench.engine.new_vector()
        plans, seconds = [], {}
        for split in self.bench.splits:
            first = self.bench.engine.evaluate(split, out)
            gradient = out.clone()
            start = time.perf_counter()
            second = self.bench.engine.evaluate(split, out)
            seconds[split.name] = time.perf_counter() - start
            same = torch.equal(gradient, out) or not bool(torch.isfinite(out).all())
            _check_repeatable(split, first, second, same, exact=self.settings.deterministic)
            plans.append(_split_plan(split, first))
        return Probe(tuple(plans), seconds, _peak_bytes(), self._first.nbytes, self._read_seconds)

    def losses(self) -> dict[str, float]:
        """The mean loss of each split at the first checkpoint, without gradients."""
        point = self._point(self._first)
        Segment(point, point).set_point(self.flat, 0.0)
        engine = self.bench.engine
        return {split.name: engine.evaluate(split, None).loss for split in self.bench.splits}

    def run(self, plan: Plan, span: Span, out: Path, attempt: str) -> SpanReport:
        """Compute a span, write its shards and commit them.

        Raises:
            TaskError, CheckpointError, OutputError: as computing, reading and writing raise them;
                nothing is committed then.
        """
        start = time.perf_counter()
        rule = get_rule(self.settings.rule)
        allocators, hashes, n_gradients = {}, {}, 0
        for split, planned in zip(self.bench.splits, plan.splits, strict=True):
            accuracy = Accuracy.of(self.settings, planned.first_loss)
            expected = (planned.n_items, planned.total_weight)
            if (split.name, split.groups) != (planned.name, planned.groups):
                raise TaskError(f"task split {split.name!r}: other groups than in the plan")
            allocators[split.name] = SplitAllocator(
                self.bench.engine, split, rule, accuracy, expected
            )
        with ShardWriter(out, span, attempt) as writer:
            tables = {s.name: SplitTables(plan, s, writer) for s in plan.splits}
            for segment, following, read in self._segments(span):
                hashes.update(read)
                for name, allocator in allocators.items():
                    result = allocator.advance(segment, following)
                    tables[name].add(result, segment)
                    n_gradients += result.n_gradients
            for table in tables.values():
                table.write()
            seconds = time.perf_counter() - start
            info = {
                "seconds": seconds,
                "n_gradients": n_gradients,
                "device": str(self.bench.device),
            }
            committed = writer.commit(checkpoints=hashes, info=info)
        return SpanReport(committed, n_gradients, seconds)

    def _segments(self, span: Span) -> Iterator[tuple[Segment, Segment | None, dict[int, str]]]:
        """Each segment with the one after it and the hashes read so far, one read ahead."""
        hashes: dict[int, str] = {}

        def take(future: Future[State]) -> Point:
            state = future.result()
            hashes[state.step] = state.sha256
            return self._point(state)

        with ThreadPoolExecutor(1, "lcray-reader") as reader:
            futures = [reader.submit(self.series.read, step) for step in span.steps[:3]]
            waiting = iter(span.steps[3:])
            segment = Segment(take(futures.pop(0)), take(futures.pop(0)))
            while True:
                following = None
                if futures:
                    following = Segment(segment.end, take(futures.pop(0)))
                    ahead = next(waiting, None)
                    if ahead is not None:
                        futures.append(reader.submit(self.series.read, ahead))
                yield segment, following, dict(hashes)
                if following is None:
                    return
                segment = following

    def _point(self, state: State) -> Point:
        for name, tensor in state.tensors.items():
            expected = self._dtypes.get(name, tensor.dtype)
            if tensor.dtype != expected:
                raise CheckpointError(
                    f"checkpoint at step {state.step}: tensor {name!r} is {tensor.dtype}, but "
                    f"{expected} at step {self.series.steps[0]}; narrow the run with --steps"
                )
        vector, constants = self.flat.flatten(state.tensors, state.step)
        return Point(state.step, vector.to(self.bench.device), constants)


def _split_plan(split: SplitData, found: Evaluation) -> SplitPlan:
    return SplitPlan(
        name=split.name,
        n_samples=split.n_samples,
        n_items=found.n_items,
        total_weight=found.total_weight,
        first_loss=found.loss if math.isfinite(found.loss) else None,
        n_batches=len(split.batches),
        groups=split.groups,
        group_weights=found.group_weights,
        sorted_by_group=split.sorted_by_group,
    )


def _check_repeatable(
    split: SplitData, first: Evaluation, second: Evaluation, same: bool, *, exact: bool
) -> None:
    """Refuse a loss that is not a function of the weights."""
    if first.n_items != second.n_items or first.total_weight != second.total_weight:
        raise TaskError(
            f"task loss on split {split.name!r}: {first.n_items} items at first, then "
            f"{second.n_items}; their number and weights must not change"
        )
    close = abs(first.loss - second.loss) <= 1e-5 * abs(first.loss)
    finite = first.loss == first.loss
    if finite and not (same and first.loss == second.loss if exact else close):
        raise TaskError(
            f"task loss on split {split.name!r}: {first.loss!r} at first, then {second.loss!r} at "
            "the same weights; switch sampling, dropout by hand and augmentation off"
        )


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(peak, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
