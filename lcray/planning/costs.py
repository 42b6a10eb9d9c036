"""Costs of a plan: gradients, time, memory and disk. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lcray.allocation.quadrature import QuadratureRule, fewest_batches, get_rule
from lcray.planning.plan import Plan, SplitPlan

#: Seconds that Ray and its workers take to start.
START_SECONDS = 10.0
#: Bytes per row of a shard, and of the merged table, without the constant bytes per file or group
#: of rows. Measured on LeNet, a vision transformer and a GPT:
#: tests/planning/test_disk_estimate.py.
ROW_BYTES = {
    "intervals": (65, 65),
    "layers": (59, 54),
    "units": (7.0, 6.9),
    "groups": (7.7, 7.5),
    "replicates": (45, 45),
    "replicate_layers": (11, 11),
    "histograms": (9.3, 8.8),
    "parameters": (17.5, 17.0),
    "traces": (14.2, 12.3),
    "elements": (4, 4),
    "fisher": (23, 22),
    "borders": (1.4, 0),
    "fits": (0, 13),
}
#: Additional bytes per row for every doubling of the intervals: counts and flips get wider.
_WIDER = {"parameters": (1.4, 1.2)}
#: Bytes of a group of rows in a shard, besides its rows.
_GROUP_BYTES = {"parameters": 2200, "traces": 1400, "borders": 900}
_FILE_BYTES = 9000  # schema, units, descriptions
_PLAN_BYTES, _PLAN_LAYER_BYTES, _SPAN_BYTES = 20_000, 250, 3000  # plan, manifests and commits
_FIT_ROWS = 6  # per layer, sign and window
# Nonempty bins of a layer, sign and window, by the decimal logarithm of its number of values.
_BINS_SLOPE, _BINS_FROM, _BINS_OF_FEW, _FEW = 68.0, 88.0, 0.55, 50
# Bytes that a worker needs per element of the model, in float32, with the gradient of a backward
# pass: for one split, and for each further split that shares a pass over the checkpoints.
_VECTOR_BYTES, _STATE_BYTES = 63, 27
_SAMPLED_BYTES = 16  # more for each split if midpoints take samples of batches: two corrections
_PART_BYTES = 8  # more if gradients are summed in parts: the sum of the current part
_SHARED_BYTES = 1 << 26  # above this, reading the checkpoints again costs less


@dataclass(frozen=True)
class Estimate:
    """The expected costs of an analysis.

    Attributes:
        n_intervals: number of intervals to integrate.
        n_gradients: full-batch gradients, over all splits; a lower bound if `is_least`.
        seconds: wall time of the gradients over all workers; a lower bound if `is_least`; None
            without a probe.
        disk_bytes: size of shards and tables together.
        rows: number of rows of each table.
        memory_bytes: memory of one worker; None without a probe.
        is_least: whether intervals may take more gradients, by refinement or the rule's choice.
    """

    n_intervals: int
    n_gradients: int
    seconds: float | None
    disk_bytes: int
    rows: dict[str, int]
    memory_bytes: int | None
    is_least: bool = False


def estimate(
    plan: Plan,
    workers: int,
    *,
    team: int = 1,
    seconds: Mapping[str, float] | None = None,
    worker_bytes: int | None = None,
    fisher_seconds: float = 0.0,
) -> Estimate:
    """Estimate time, memory and disk of `plan`.

    Args:
        plan: the plan.
        workers: number of workers, or teams, that share the spans.
        team: number of workers that share a gradient.
        seconds: duration of one gradient, by split, as a probe measured it.
        worker_bytes: memory of a worker without vectors of the model's size, from a probe.
        fisher_seconds: duration of the Fisher information of all splits at a step.
    """
    rule = get_rule(plan.settings.rule)
    passes = {split.name: _passes(plan, rule, split) for split in plan.splits}
    time = None
    if seconds is not None:
        # Workers may idle at the end: the longest share counts.
        share = math.ceil(len(plan.spans) / workers) / len(plan.spans)
        gradients = sum(passes[name] * each for name, each in _seconds(plan, team, seconds).items())
        time = share * (gradients + n_fisher(plan) * fisher_seconds)
    rows = _rows(plan)
    size = sum(layer.numel for layer in plan.layers)
    longest = max(span.n_intervals for span in plan.spans) / plan.n_intervals
    kept = ("units", "groups", "replicate_layers", "traces")  # until the span ends
    held = sum(rows.get(name, 0) for name in kept)
    vectors = vector_bytes(
        size,
        len(plan.splits),
        plan.settings.dtype,
        plan.partial_sums,
        sampled=rule.block > 0,
    )
    extra = vectors + int(held * longest * 24)
    return Estimate(
        n_intervals=plan.n_intervals,
        n_gradients=math.ceil(sum(passes.values())),
        seconds=time,
        disk_bytes=_disk_bytes(plan, rows),
        rows=rows,
        memory_bytes=None if worker_bytes is None else worker_bytes + extra,
        is_least=plan.settings.refine or rule.block > 0,
    )


def pass_seconds(plan: Plan, team: int, seconds: Mapping[str, float]) -> float:
    """Seconds of a team for one gradient of every split, from the seconds of a single worker.

    The time to send points and gradients is left out.
    """
    return sum(_seconds(plan, team, seconds).values())


def _seconds(plan: Plan, team: int, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a team for one gradient, by split."""
    return {
        split.name: passes_by_group(split)
        * seconds[split.name]
        * largest_share(min(plan.partial_sums, split.n_batches), team)
        for split in plan.splits
    }


def seconds_an_interval(plan: Plan, team: int = 1) -> float | None:
    """Seconds of a worker or a team per interval; None if the plan has no measurement."""
    return None if plan.seconds is None else plan.seconds * largest_share(plan.partial_sums, team)


def n_fisher(plan: Plan) -> int:
    """Number of steps with rows in `fisher`."""
    return sum(len(plan.fisher_steps(span)) for span in plan.spans)


def passes_by_group(split: SplitPlan) -> int:
    """Number of backward passes in one evaluation of a split, due to its groups."""
    return 1 if split.sorted_by_group else max(1, len(split.groups))


def _passes(plan: Plan, rule: QuadratureRule, split: SplitPlan) -> float:
    """Gradients of a split over all intervals; those of samples of batches are the least share."""
    shared = len(plan.spans) if rule.has_left and rule.has_right else 0
    if not rule.block:
        return plan.n_intervals * rule.n_gradients + shared
    whole = sum(-(-span.n_intervals // rule.block) for span in plan.spans)
    share = fewest_batches(split.n_batches, len(split.groups) if split.sorted_by_group else 1)
    sampled = (plan.n_intervals - whole) * share / split.n_batches
    return shared + plan.n_intervals + whole + sampled


def _rows(plan: Plan) -> dict[str, int]:
    splits, intervals = len(plan.splits), plan.n_intervals
    layers = {layer.name: layer for layer in plan.layers}
    detail = [layers[name] for name in plan.detail_layers]
    size = sum(layer.numel for layer in detail)
    groups = sum(len(split.groups) for split in plan.splits)
    replicates = sum(len(split.replicate_weights) for split in plan.splits)
    samples = sum(min(plan.trace_sample, layer.numel) for layer in detail)
    rows = {
        "intervals": splits * intervals,
        "layers": splits * intervals * len(plan.layers),
        "units": splits * intervals * sum(layers[name].n_units for name in plan.unit_layers),
        "groups": groups * intervals * len(plan.layers),
        "replicates": replicates * intervals,
        "replicate_layers": replicates * intervals * len(plan.layers),
        "histograms": splits * _bins(plan, [plan.steps]),
        "parameters": splits * size,
        "traces": splits * intervals * samples,
        "elements": splits * intervals * size,
        "fisher": splits * n_fisher(plan) * sum(layer.trainable for layer in plan.layers),
    }
    return {name: rows[name] for name in plan.tables}


def _bins(plan: Plan, parts: Iterable[Sequence[int]]) -> int:
    """Rows of `histograms` for one split; windows are cut between `parts`, runs of steps."""
    layers = {layer.name: layer for layer in plan.layers}
    sizes = [layers[name].numel for name in plan.detail_layers]
    lengths: Counter[int] = Counter()  # windows by their number of intervals
    for steps in parts:
        windows = np.asarray(steps[:-1], np.int64) // plan.window
        lengths.update(np.unique(windows, return_counts=True)[1].tolist())
    return sum(
        number * round(2 * _filled(size * intervals / 2))
        for intervals, number in lengths.items()
        for size in sizes
    )


def _filled(values: float) -> float:
    """Number of nonempty bins for so many values of one sign."""
    if values <= _FEW:
        return _BINS_OF_FEW * values
    return _BINS_SLOPE * math.log10(values) - _BINS_FROM


def _disk_bytes(plan: Plan, rows: Mapping[str, int]) -> int:
    """Bytes of shards and tables: rows, groups of rows, files, and their descriptions.

    Shards have `parameters` and `borders` for every span, and bins for each part of a window.
    """
    splits, n_spans, n_detail = len(plan.splits), len(plan.spans), len(plan.detail_layers)
    elements = splits * sum(la.numel for la in plan.layers if la.name in set(plan.detail_layers))
    in_shards = dict(rows)
    if "parameters" in rows:
        in_shards["parameters"] = n_spans * elements
    if "histograms" in rows:
        in_shards["histograms"] = splits * _bins(plan, (span.steps for span in plan.spans))
    in_shards["borders"] = n_spans * splits * sum(layer.numel for layer in plan.layers)
    in_tables = dict(rows)
    if "histograms" in rows:
        windows = len(np.unique(np.asarray(plan.steps[:-1], np.int64) // plan.window))
        in_tables["fits"] = splits * (windows + 1) * n_detail * 2 * _FIT_ROWS
    each = plan.n_intervals / n_spans
    total = sum(n * _row_bytes(name, 0, each) for name, n in in_shards.items())
    total += sum(n * _row_bytes(name, 1, plan.n_intervals) for name, n in in_tables.items())
    groups = sum(_GROUP_BYTES.get(name, 0) for name in in_shards) * splits * n_detail * n_spans
    files = _FILE_BYTES * (len(in_shards) * n_spans + len(in_tables))
    about = _PLAN_BYTES + _PLAN_LAYER_BYTES * len(plan.layers) + _SPAN_BYTES * n_spans
    return round(total + groups + files + about)


def _row_bytes(table: str, place: int, intervals: float) -> float:
    """Bytes of a row in a shard (place 0) or in the merged table (1), over so many intervals."""
    wider = _WIDER.get(table, (0, 0))[place]
    return ROW_BYTES[table][place] + wider * math.log2(max(1.0, intervals))


def shares_pass(size: int, n_splits: int) -> bool:
    """Whether the splits of a model of `size` elements share a pass over the checkpoints."""
    return _STATE_BYTES * size * (n_splits - 1) <= _SHARED_BYTES


def largest_share(partial_sums: int, team: int) -> float:
    """The largest share of a gradient that one worker of a team computes, if summed in parts."""
    return -(-partial_sums // team) / max(1, partial_sums)


def vector_bytes(
    size: int, n_splits: int, dtype: str, partial_sums: int = 1, *, sampled: bool = False
) -> int:
    """Memory that a worker needs for vectors of the model's size.

    Args:
        size: number of elements of all layers.
        n_splits: number of analyzed splits.
        dtype: ``float32`` or ``float64``.
        partial_sums: number of partial sums of the plan.
        sampled: whether the rule takes samples of the batches; all others need the same memory.
    """
    shared = n_splits - 1 if shares_pass(size, n_splits) else 0
    part = _PART_BYTES if partial_sums > 1 else 0
    wide = 2 if dtype == "float64" else 1
    more = _SAMPLED_BYTES * (1 + shared) if sampled else 0
    return size * ((_VECTOR_BYTES + _STATE_BYTES * shared) * wide + part + more)
