"""Everything that one worker does with one span, and its set-up, without Ray.

A span's result depends on the span and the plan alone. Inside a span the gradient at an endpoint
is computed once; while an interval computes, the next checkpoint is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lcray.allocation.allocator import Accuracy, Sampling, Scratch, SplitAllocator
from lcray.allocation.fisher.fisher import FisherMeter, check_task
from lcray.allocation.partial_sums import Seat
from lcray.allocation.path import Point, Segment
from lcray.allocation.quadrature import get_rule
from lcray.checkpoints import open_series
from lcray.errors import CheckpointError, TaskError
from lcray.execution.worker.agreement import check_agreement, digest, measure, with_reference
from lcray.execution.worker.data_parallel import Members
from lcray.execution.worker.descriptions import (
    Description,
    Probe,
    check_repeatable,
    split_plan,
)
from lcray.execution.worker.fresh import Unexplained, check_model
from lcray.execution.worker.independence import Independence, two_points
from lcray.execution.worker.prefetch import Walk
from lcray.execution.worker.reports import SpanReport, Tally
from lcray.execution.worker.tuning import Tuning, tune
from lcray.execution.worker.workbench import Share, Workbench
from lcray.planning.costs import shares_pass
from lcray.planning.plan import Plan, Reference, Span, SplitPlan
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.arrow import make_table
from lcray.tables.shards.writer import ShardWriter
from lcray.tables.writing.row_groups import ElementsWriter
from lcray.tables.writing.split_tables import SplitTables
from lcray.tasks.data.split import SplitData
from lcray.tasks.model.vectors import release
from lcray.tasks.task import Task, source_hash

_LOADED_LATER = 96 << 20  # bytes: libraries and kernels that a worker loads only as it needs them


class Workspace:
    """A task's model and data on a device, ready to work on spans of a run.

    Args:
        task: the task.
        run: the directory of checkpoints, or its URI.
        settings: settings of the analysis.
        steps: the range of steps to analyze, ``a:b``.
        share: the share of the machine to use.
        partial_sums: number of parts in which gradients are summed, before there is a plan.
        seat: which worker of a team this is; a workspace with colleagues is the lead.

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
        share: Share = Share(threads=1),  # noqa: B008 - frozen
        partial_sums: int = 1,
        seat: Seat | None = None,
    ) -> None:
        if settings.fisher is not None:
            check_task(task, settings)
        self.series = open_series(run, steps)
        self._whole = self.series.steps[-2]  # a checkpoint is complete once another follows it
        self._where = run, steps
        self.bench = Workbench(task, settings, share=share, partial_sums=partial_sums, seat=seat)
        self.settings, self.task, self.flat = settings, task, self.bench.flat
        start = time.perf_counter()
        self._first = replace(self.series.read(self.series.steps[0]), tensors={})
        self._read_seconds = time.perf_counter() - start
        self._dtypes = self._first.dtypes
        self._meters: dict[str, FisherMeter] = {}
        self._reference: dict[str, Reference] = {}
        self._members: Members | None = None
        self._agrees = False  # whether it agrees with the plan

    def describe(self) -> Description:
        """The inputs that decide the numbers besides the settings."""
        return Description(
            layers=self.flat.layers,
            split_hashes=self.bench.hashes,
            source_hash=source_hash(self.task, self.flat.model),
            base_hash=self.bench.base_hash(),
            first_hash=self._first.sha256,
            device_kind=self.bench.device.type,
            device=torch.cuda.get_device_name() if self.bench.device.type == "cuda" else "cpu",
            low_precision=self._stored_in(1, 2),
            double_precision=self._stored_in(8),
            fixed_batches=self.bench.fixed_batches,
            drawn=self.bench.drawn,
            batch_loss=self.task.batch_loss,
        )

    def _stored_in(self, *sizes: int) -> tuple[str, ...]:
        found = self._dtypes.items()
        return tuple(n for n, d in found if d.is_floating_point and d.itemsize in sizes)

    def check(self) -> Unexplained:
        """Compare the model at points of the run with models newly built there.

        Raises:
            TaskError: if they differ.
        """
        steps = self.series.steps
        first, *others = two_points(steps, self._read)
        later = others[0] if others else None
        known = later is not None and later.step == steps[1]
        second = later if known else self._try_to_read(steps[1])
        return check_model(self.bench, self.task, first, second, later)

    def _try_to_read(self, step: int) -> Point | None:
        """A checkpoint; None if its span will fail there, or skip it."""
        try:
            point = self._read(step)
        except CheckpointError:
            return None
        return point if Segment(point, point).is_finite else None

    def probe(self) -> Probe:
        """Choose what the settings leave open; evaluate every split twice at the first checkpoint.

        The first evaluation is without a gradient. Of the first batch with weight, the gradient is
        computed twice more.

        Raises:
            TaskError: if the loss is not a function of the weights, or breaks the contract.
        """
        self.go_to_first()
        reference = self._measured()
        tuning = tune(self.bench)
        partial_sums = self.bench.engine.partial_sums
        self.bench.adopt(tuning.batch_size, tuning.memory_format, partial_sums)
        independence = Independence(self.bench, self.task)
        point = self.go_to_first()
        plans, seconds = [], {}
        for split in self.bench.splits:
            self.bench.engine.check_statistics(split)
            first = independence.evaluate(split)
            self.flat.check_unwritten(point.vector)
            out = self.bench.engine.new_vector()
            start = time.perf_counter()
            second = self.bench.engine.evaluate(split, out)
            seconds[split.name] = time.perf_counter() - start
            same = self._gradient_repeats(split, first.first_weighted, out)
            check_repeatable(split, first, second, same, exact=self.settings.deterministic)
            plans.append(with_reference(split_plan(split, first), reference[split.name]))
        independence.check(two_points(self.series.steps, self._read))
        return Probe(
            splits=tuple(plans),
            seconds=seconds,
            tuning=tuning,
            resident={split.name: split.batches.resident for split in self.bench.splits},
            worker_bytes=self._worker_bytes(tuning),
            read_seconds=self._read_seconds,
            fisher_seconds=self._fisher_seconds(),
        )

    def _gradient_repeats(self, split: SplitData, number: int, out: Tensor) -> bool:
        """Whether a batch has the same gradient twice, or a gradient that is not finite."""
        engine, batch = self.bench.engine, range(number, number + 1)
        engine.sum_part(split, batch, out.zero_(), (), 1.0)
        before = out.clone()
        engine.sum_part(split, batch, out.zero_(), (), 1.0)
        return torch.equal(before, out) or not bool(torch.isfinite(out).all())

    def _fisher_seconds(self) -> float:
        """Seconds of Fisher information at a step, with reading the checkpoint; 0 without it."""
        if self.settings.fisher is None:
            return 0.0
        point, meter = self._read_first(), self._fisher_meter()
        splits = self.bench.fisher_splits
        first = [meter.measure(split, point) for split in splits]  # first calls are slow
        start = time.perf_counter()
        again = [meter.measure(split, point) for split in splits]
        seconds = time.perf_counter() - start
        for split, one, other in zip(splits, first, again, strict=True):
            if self.settings.deterministic and not one.same_as(other):
                raise TaskError(
                    f"task sample_targets on split {split.name!r}: targets differ the second "
                    "time; draw them with the given generator only"
                )
        return seconds + self._read_seconds

    def _fisher_meter(self) -> FisherMeter:
        """One meter per memory format: its choices may depend on the format, and nothing else."""
        bench = self.bench
        if bench.memory_format not in self._meters:
            self._meters[bench.memory_format] = FisherMeter(
                bench.flat,
                bench.engine,
                self.task,
                self.settings,
                bench.fisher_splits,
                self._read_first(),
            )
        return self._meters[bench.memory_format]

    def _worker_bytes(self, tuning: Tuning) -> int:
        data = sum(s.batches.nbytes for s in self.bench.splits if s.batches.resident)
        widest = max(max(split.batch_sizes) for split in self.bench.splits)
        own = self.bench.base_bytes + _LOADED_LATER
        return own + data + math.ceil(tuning.sample_bytes * widest)

    def lead(self, members: Members) -> None:
        """From now on, `members` compute parts of every evaluation."""
        self._members = self.bench.engine.colleagues = members

    def _agree(self, plan: Plan) -> None:
        """Compare this worker, and its team, with the plan, before its first span.

        Raises:
            DisagreementError: if they differ.
        """
        if self._agrees:
            return
        check_agreement(plan.splits, plan.layers, self._measured())
        if self._members is not None:
            for found in self._members.measure(self._read_first()):
                check_agreement(plan.splits, plan.layers, found)
        self._agrees = True

    def _measured(self) -> dict[str, Reference]:
        if not self._reference:
            self._reference = measure(self.bench, self._read_first())
        return self._reference

    def go_to_first(self) -> Point:
        """Move the model to the first checkpoint."""
        point = self._read_first()
        Segment(point, point).set_point(self.flat, 0.0)
        return point

    def _read_first(self) -> Point:
        return self._read(self._first.step)

    def _read(self, step: int) -> Point:
        known = {self._first.step: self._first.sha256}
        with Walk(self.series, self.flat, self._dtypes, known) as walk:
            return walk.read(step)

    def losses(self, plan: Plan) -> dict[str, float]:
        """The mean loss of each split at the first checkpoint, in the batches of `plan`.

        Without gradients.
        """
        self._measured()  # while the data are open
        self.bench.adopt(plan.batch_size, plan.memory_format, plan.partial_sums)
        independence = Independence(self.bench, self.task)
        self.go_to_first()
        losses = {split.name: independence.evaluate(split).loss for split in self.bench.splits}
        independence.check(two_points(self.series.steps, self._read))
        return losses

    def run(
        self,
        plan: Plan,
        span: Span,
        out: Place,
        attempt: str,
        tell: Callable[[float], None] = lambda done: None,
    ) -> SpanReport:
        """Compute a span, write its shards and commit them.

        Args:
            plan: the plan.
            span: one of its spans.
            out: the output directory.
            attempt: an id that no other attempt has.
            tell: called with the number of intervals done, whenever it grows.

        Raises:
            TaskError, CheckpointError, OutputError: from computing, reading and writing; nothing is
                committed then.
        """
        start = time.perf_counter()
        self._agree(plan)
        self.bench.adopt(plan.batch_size, plan.memory_format, plan.partial_sums, whole=False)
        if self._members is not None:
            self._members.start(plan)
        for split, planned in zip(self.bench.splits, plan.splits, strict=True):
            if (split.name, split.groups) != (planned.name, planned.groups):
                raise TaskError(f"task split {split.name!r}: groups differ from the plan")
            sample = split.drawn_from, split.n_replicates
            if sample != (planned.drawn_from, len(planned.replicate_weights)):
                raise TaskError(f"task split {split.name!r}: sample differs from the plan")
        if span.last > self._whole:  # the run has grown or ended since it was listed
            self.series = open_series(*self._where)
            self._whole = max(span.last, self.series.steps[-2])
        release()  # memory left by building, probing or the span before
        hashes: dict[int, str] = {}
        stamps: dict[int, str] = {}
        n_intervals = span.n_intervals
        tally = Tally(n_intervals * len(plan.splits), n_intervals, tell)
        with ShardWriter(out, span, attempt) as writer, ElementsWriter(writer) as elements:

            def tables_of(split: SplitPlan) -> SplitTables:
                return SplitTables(plan, split, writer, elements, self.bench.device)

            for names in self._passes(plan):
                self._pass(plan, span, names, (hashes, stamps), tables_of, tally)
            self._write_fisher(plan, span, hashes, writer, tally)
            seconds = time.perf_counter() - start
            info = {
                "seconds": seconds,
                "n_gradients": tally.n_gradients,
                "device": str(self.bench.device),
                "reference": digest(self._reference),
                "sums": {name: list(sums) for name, sums in tally.sums.items()},
            }
            committed = writer.commit(checkpoints=hashes, info=info, stamps=stamps)
        return SpanReport(committed, tally.n_gradients, seconds, tally.sums)

    def _write_fisher(
        self, plan: Plan, span: Span, hashes: dict[int, str], writer: ShardWriter, tally: Tally
    ) -> None:
        steps = plan.fisher_steps(span)
        if not steps:
            return
        meter = self._fisher_meter()
        with Walk(self.series, self.flat, self._dtypes, hashes) as walk:
            found = meter.rows(walk.read, steps, lambda: tally.tell(0.0))
        for split in plan.splits:
            writer.write("fisher", make_table("fisher", {**found[split.name], "split": split.name}))

    def _passes(self, plan: Plan) -> list[list[str]]:
        """The splits of each pass over the checkpoints: all in one, unless their state is large."""
        names = [split.name for split in plan.splits]
        shared = shares_pass(self.flat.layout.size, len(names))
        return [names] if shared else [[name] for name in names]

    def _pass(
        self,
        plan: Plan,
        span: Span,
        names: list[str],
        read: tuple[dict[int, str], dict[int, str]],
        tables_of: Callable[[SplitPlan], SplitTables],
        tally: Tally,
    ) -> None:
        """Walk along the span once, for some splits."""
        rule, scratch = get_rule(self.settings.rule), Scratch(self.bench.engine)
        sampling = Sampling.of(self.settings)
        with Walk(self.series, self.flat, self._dtypes, *read) as walk:
            allocators: list[SplitAllocator] = []
            tables: list[SplitTables] = []
            for split, planned in zip(self.bench.splits, plan.splits, strict=True):
                if split.name in names:
                    accuracy = Accuracy.of(self.settings, planned.first_loss)
                    expected = (planned.n_items, planned.total_weight)
                    allocators.append(
                        SplitAllocator(
                            self.bench.engine, split, rule, accuracy, expected, scratch, sampling
                        )
                    )
                    tables.append(tables_of(planned))
            for segment, following in walk.segments(span):
                for name, allocator, table in zip(names, allocators, tables, strict=True):
                    result = allocator.advance(segment, following)
                    table.add(result, segment)
                    tally.add(name, result)
                del segment, following, result  # the walk needs the memory
            del allocators, allocator, scratch  # and so does the writing
            for number, table in enumerate(tables, 1):
                table.write(walk.again)
                tally.tell(number / (len(tables) + 1) / len(plan.splits))
