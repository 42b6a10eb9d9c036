"""A plan, and its cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table

from lcray.cli.units import count, duration, size
from lcray.errors import visible
from lcray.planning.costs import START_SECONDS, n_fisher
from lcray.planning.plan import Plan, SplitPlan
from lcray.planning.saved import PlanReport


def plan_table(report: PlanReport) -> Group:
    """The plan in `report`, with its cost."""
    plan, cost = report.plan, report.estimate
    least = "at least " if cost.is_least else ""
    asked = report.fixed_batches or plan.settings.batch_size
    part = ", part of the loss" if report.fixed_batches else ""
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "intervals": f"{cost.n_intervals:,} in {len(plan.spans)} spans of up to "
        f"{max(span.n_intervals for span in plan.spans)}",
        "splits": ", ".join(f"{split.name} ({_samples(plan, split)})" for split in plan.splits),
        "rule": plan.settings.rule + (" with refinement" if plan.settings.refine else ""),
        "gradients": f"{least}{cost.n_gradients:,} full-batch gradients",
        "time": f"{least}{duration(cost.seconds)} of gradients {_workers(report)}",
        "memory": f"{size(cost.memory_bytes)} per worker",
        "disk": size(cost.disk_bytes),
        **_sums_rows(report),
        "BatchNorm": plan.settings.batch_norm,
        "dtype": plan.settings.dtype,
        "batches": f"up to {_chosen(plan.batch_size, asked)} samples{part}, "
        f"{_chosen(plan.memory_format, plan.settings.memory_format)}",
        "data": ", ".join(
            f"{name} {'resident' if stays else 'streamed'}"
            for name, stays in report.resident.items()
        ),
        "device": f"{plan.device_kind}, {count(plan.threads, 'thread')} per worker"
        + ("" if plan.settings.deterministic else ", deterministic algorithms off"),
        "windows": f"{plan.window} steps wide",
    }
    if plan.settings.fisher is not None:
        kinds = {"both": "true and empirical", "empirical": "empirical"}
        rows["Fisher"] = (
            f"{kinds[plan.settings.fisher_kind]}, {count(n_fisher(plan), 'step')}, at most "
            f"{plan.settings.fisher_samples:,} samples per split; its time is part of the above"
        )
    for name, value in rows.items():
        table.add_row(name, visible(value))
    sizes = Table("table", "rows", box=None, pad_edge=False)
    for name, n_rows in cost.rows.items():
        sizes.add_row(name, f"{n_rows:,}")
    return Group(table, "", sizes, *map(visible, _plan_notes(report)))


def _workers(report: PlanReport) -> str:
    if report.local:
        return "in one process, without starting workers"
    start = f"and about {START_SECONDS:.0f} s to start them"
    if report.team == 1:
        return f"on {report.workers} workers, {start}"
    teams = count(report.workers // report.team, "team")
    return f"on {teams} of {report.team} workers, {start}"


def _sums_rows(report: PlanReport) -> dict[str, str]:
    """Rows about partial sums and teams."""
    plan, seconds = report.plan, report.interval_seconds
    rows = {}
    if plan.partial_sums > 1:
        rows["sums"] = f"{plan.partial_sums} partial sums, added in their order"
    if report.team > 1 and seconds is not None:
        rows["interval"] = f"{seconds:.3g} s of gradients for a team of {report.team}"
    return rows


def _samples(plan: Plan, split: SplitPlan) -> str:
    if split.drawn_from is None:
        return f"{split.n_samples:,} samples"
    return (
        f"{split.n_samples:,} of {split.drawn_from:,} samples, seed {plan.settings.sample_seed}, "
        f"in {len(split.replicate_weights)} replicates"
    )


def _chosen(value: object, asked: object) -> str:
    return f"{value} (automatic)" if asked in (None, "auto") else str(value)


def _plan_notes(report: PlanReport) -> Iterable[str]:
    plan = report.plan
    yield from report.notes
    for split in plan.splits:
        if split.groups and not split.sorted_by_group:
            yield (
                f"groups of split {split.name!r} mix within samples or batches: "
                f"{len(split.groups)} backward passes per gradient instead of one"
            )
    few = [split for split in plan.splits if split.n_batches < report.team]
    for split in few:
        yield (
            f"split {split.name!r} has {count(split.n_batches, 'batch', 'batches')} for the "
            f"{report.team} workers of a team, so some idle; a smaller --batch-size makes more"
        )
    left_out = [la.name for la in plan.layers if la.name not in plan.unit_layers]
    if left_out and plan.settings.layers is None:
        yield f"no units for {', '.join(left_out)}: more than 10,000 units (--units for all)"
    if "parameters" not in plan.tables:
        yield "no parameters and traces tables: too many rows (--parameters forces them)"
