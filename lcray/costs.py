"""What a plan will take: gradients, time, memory and disk. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lcray.planning import Plan, SplitPlan, largest_share, vector_bytes
from lcray.quadrature import QuadratureRule, get_rule

#: Bytes a row of shards and tables together, measured on the MNIST-LeNet example.
ROW_BYTES = {
    "intervals": 250,
    "layers": 180,
    "units": 20,
    "groups": 22,
    "replicates": 90,
    "replicate_layers": 22,
    "histograms": 22,
    "parameters": 42,
    "traces": 44,
    "elements": 8,
    "fisher": 45,
    "borders": 2,
}
_HISTOGRAM_BINS = 250  # non-empty bins of a layer, sign and window


@dataclass(frozen=True)
class Estimate:
    """What an analysis will take.

    Attributes:
        n_intervals: to integrate.
        n_gradients: full-batch gradients, over all splits; a lower bound where `is_least`.
        seconds: wall time of the gradients over all workers, likewise; None without a probe.
        disk_bytes: shards and tables together.
        rows: of each table.
        memory_bytes: of one worker; None without a probe.
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
        workers: workers, or teams of them, that share the spans.
        team: workers that share a gradient.
        seconds: of one gradient, by split, as a probe measured them.
        worker_bytes: of a worker without vectors of the model's size, as a probe found them.
        fisher_seconds: of the Fisher information of all splits at a step.
    """
    rule = get_rule(plan.settings.rule)
    shared = len(plan.spans) if rule.has_left and rule.has_right else 0
    passes = _passes(plan, rule) + shared
    time = None
    if seconds is not None:
        # Idle workers at the end: the longest share counts.
        share = math.ceil(len(plan.spans) / workers) / len(plan.spans)
        gradients = passes * pass_seconds(plan, team, seconds)
        time = share * (gradients + n_fisher(plan) * fisher_seconds)
    rows = _rows(plan)
    disk = sum(count * ROW_BYTES[name] for name, count in rows.items())
    size = sum(layer.numel for layer in plan.layers)
    longest = max(span.n_intervals for span in plan.spans) / plan.n_intervals
    kept = ("units", "groups", "replicate_layers", "traces")  # until the span ends
    held = sum(rows.get(name, 0) for name in kept)
    vectors = vector_bytes(size, len(plan.splits), plan.settings.dtype, plan.partial_sums)
    extra = vectors + int(held * longest * 24)
    return Estimate(
        n_intervals=plan.n_intervals,
        n_gradients=passes * len(plan.splits),
        seconds=time,
        disk_bytes=disk,
        rows={name: count for name, count in rows.items() if name != "borders"},
        memory_bytes=None if worker_bytes is None else worker_bytes + extra,
        is_least=plan.settings.refine or rule.probe_every > 0,
    )


def pass_seconds(plan: Plan, team: int, seconds: Mapping[str, float]) -> float:
    """What one gradient of every split takes a team, by what it takes a single worker.

    Moving points and gradients is left out.
    """
    return sum(
        passes_by_group(split)
        * seconds[split.name]
        * largest_share(min(plan.partial_sums, split.n_batches), team)
        for split in plan.splits
    )


def seconds_an_interval(plan: Plan, team: int = 1) -> float | None:
    """What an interval takes a worker or a team; None if the plan does not know."""
    return None if plan.seconds is None else plan.seconds * largest_share(plan.partial_sums, team)


def n_fisher(plan: Plan) -> int:
    """Steps that get rows in `fisher`."""
    return sum(len(plan.fisher_steps(span)) for span in plan.spans)


def passes_by_group(split: SplitPlan) -> int:
    """Backward passes that one evaluation of a split takes for its groups."""
    return 1 if split.sorted_by_group else max(1, len(split.groups))


def _passes(plan: Plan, rule: QuadratureRule) -> int:
    """Gradients of all intervals; what a rule may leave out is left out."""
    if not rule.probe_every:
        return plan.n_intervals * rule.n_gradients
    probes = sum(-(-span.n_intervals // rule.probe_every) for span in plan.spans)
    return plan.n_intervals + probes * (rule.n_gradients - 1)


def _rows(plan: Plan) -> dict[str, int]:
    splits, intervals = len(plan.splits), plan.n_intervals
    layers = {layer.name: layer for layer in plan.layers}
    detail = [layers[name] for name in plan.detail_layers]
    size = sum(layer.numel for layer in detail)
    ends = plan.window_of(plan.steps[0]), plan.window_of(plan.steps[-2])
    windows = (ends[1] - ends[0]) // plan.window + 1
    groups = sum(len(split.groups) for split in plan.splits)
    replicates = sum(len(split.replicate_weights) for split in plan.splits)
    samples = sum(min(plan.trace_sample, layer.numel) for layer in detail)
    bins = sum(2 * min(_HISTOGRAM_BINS, layer.numel) for layer in detail)
    rows = {
        "intervals": splits * intervals,
        "layers": splits * intervals * len(plan.layers),
        "units": splits * intervals * sum(layers[name].n_units for name in plan.unit_layers),
        "groups": groups * intervals * len(plan.layers),
        "replicates": replicates * intervals,
        "replicate_layers": replicates * intervals * len(plan.layers),
        "histograms": splits * windows * bins,
        "parameters": splits * size,
        "traces": splits * intervals * samples,
        "elements": splits * intervals * size,
        "fisher": splits * n_fisher(plan) * sum(layer.trainable for layer in plan.layers),
    }
    chosen = {name: rows[name] for name in plan.tables}
    chosen["borders"] = splits * size * len(plan.spans)
    return chosen
