"""What the command line shows: tables and lines of rich text, made from results. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lcray.allocation.quadrature import MAX_PANELS
from lcray.analyses.findings import Findings
from lcray.analyses.registry import FINDINGS
from lcray.analyses.tidy import notes_of
from lcray.analyses.titles import EMPTY, READING, WHAT_HAPPENED
from lcray.checkpoints import Audit
from lcray.cli import terminal
from lcray.cli.units import duration as duration
from lcray.cli.units import size as size
from lcray.errors import one_line, visible
from lcray.execution.driver.status import Status
from lcray.planning.costs import n_fisher
from lcray.planning.plan import Plan, SplitPlan
from lcray.planning.saved import PlanReport
from lcray.tables.reading.results import Results

_BRIEF = 24  # rows of a finding that its summary shows
_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


def frame_table(frame: pd.DataFrame, *, title: str | None = None, rows: int = 50) -> Table:
    """A frame as a table; numbers to six digits, at most `rows` rows."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        table.add_column(
            visible(str(name)), justify="right" if numeric else "left", overflow="fold"
        )
    for row in frame.head(rows).itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    if len(frame) > rows:
        table.caption = f"{rows} of {len(frame)} rows"
    return table


def fitted(frame: pd.DataFrame, width: int, *, rows: int = 50) -> RenderableType:
    """`frame_table`; where that is wider than `width`, a line for each value, row by row."""
    table = frame_table(frame, rows=rows)
    if _width(table) <= width:
        return table
    names = [visible(str(name)) for name in frame.columns]
    longest = max(map(len, names))
    parts = [
        "\n".join(
            f"{name:{longest}}  {_cell(value)}" for name, value in zip(names, row, strict=True)
        )
        for row in frame.head(rows).itertuples(index=False)
    ]
    if len(frame) > rows:
        parts.append(f"{rows} of {len(frame)} rows")
    return Text("\n\n".join(parts))


def _width(table: Table) -> int:
    # Both, or TERM may decide.
    return Console(width=terminal.WIDE, height=100).measure(table).maximum


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value))


def records(frame: pd.DataFrame) -> list[dict[str, object]]:
    """The rows for JSON, every digit kept; what is missing or not finite is None."""
    rows = frame.astype(object).to_dict("records")
    return [{str(name): _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: object) -> object:
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def layer_table(results: Results) -> Table:
    """LC by layer over the run, in the model's order, with the share of parameters that help."""
    frame = results.layers()
    frame = frame[frame["split"] == results.plan.splits[0].name]
    sums = frame.groupby("layer", observed=True).sum(numeric_only=True).reset_index()
    sizes = {layer.name: layer.numel for layer in results.plan.layers}
    table = Table(box=None, pad_edge=False, title_justify="left")
    split = visible(results.plan.splits[0].name)
    table.title = f"Loss change allocated to each layer, split {split}"
    for column in ("layer", "parameters", "LC", "helping", "hurting", "share helping"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for _, row in sums.iterrows():
        colour = "red" if row["lc"] > 0 else "green"
        table.add_row(
            visible(str(row["layer"])),
            f"{sizes[row['layer']]:,}",
            Text(_signed(row["lc"]), colour),
            _signed(row["lc_helping"]),
            _signed(row["lc_hurting"]),
            _share(row["n_helping"], row["n_helping"] + row["n_hurting"] + row["n_zero"], 1),
        )
    return table


def totals(results: Results) -> pd.DataFrame:
    """Per split over the run: changes, LC, gaps and counts of the intervals that are ok."""
    frame = results.intervals()
    frame = frame[frame["status"] == "ok"].assign(
        abs_gap=lambda rows: rows["gap"].abs(), abs_change=lambda rows: rows["loss_change"].abs()
    )
    columns = ["loss_change", "lc", "gap", "abs_gap", "abs_change", "first_order_lc"]
    columns += ["n_helping", "n_hurting", "n_zero", "n_gradients"]
    return frame.groupby("split", observed=True)[columns].sum(min_count=1).reset_index()


def closure_table(results: Results) -> Table:
    """Per split: the loss change, what was allocated, and by how much they differ."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = f"Closure, rule {results.plan.settings.rule}"
    columns = (
        "loss change",
        "Σ LC",
        "gap/|change|",
        "Σ|gap|/Σ|change|",
        "first order",
        "share helping",
    )
    table.add_column("split")
    for column in columns:
        table.add_column(column, justify="right")
    for _, row in totals(results).iterrows():
        table.add_row(
            visible(str(row["split"])),
            _signed(row["loss_change"]),
            _signed(row["lc"]),
            _share(row["gap"], abs(row["loss_change"])),
            _share(row["abs_gap"], row["abs_change"]),
            _signed(row["first_order_lc"]),
            _share(row["n_helping"], row["n_helping"] + row["n_hurting"] + row["n_zero"], 1),
        )
    return table


def confidence_table(results: Results, level: float = 0.95) -> Table:
    """Per split: how far a sample may be off the loss change and the LC of all its data."""
    found = results.confidence(level=level)
    found = found[found["layer"] == ""].assign(half=lambda rows: (rows["high"] - rows["low"]) / 2)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = f"All of the data, {level:.0%} confidence"
    table.add_column("split")
    for column in ("loss change", "Σ LC"):
        table.add_column(column, justify="right")
    for split in results.plan.splits:
        rows = found[found["split"] == split.name]
        cells = zip(rows["estimate"], rows["half"], strict=True)
        table.add_row(visible(split.name), *(_signed(value, half) for value, half in cells))
    return table


def _signed(value: float, half: float = math.nan) -> str:
    error = f" ± {half:.4f}" if math.isfinite(half) else ""
    return f"{value:+.4f}{error}" if math.isfinite(value) else "–"


def _share(part: float, whole: float, digits: int = 3) -> str:
    return f"{part / whole:.{digits}%}" if whole and math.isfinite(part / whole) else "–"


def summary(results: Results) -> Group:
    """What an analysis found, and where to go on."""
    frame = results.intervals()
    lines: list[RenderableType] = [closure_table(results), ""]
    if any(split.drawn_from for split in results.plan.splits):
        lines += [confidence_table(results), ""]
    bad = frame[frame["status"] != "ok"]
    if len(bad):
        lines.append(Text(f"{len(bad)} intervals have no LC: {_statuses(bad)}", "yellow"))
    missed = int((frame["converged"] == False).sum())  # noqa: E712 - null where not ok
    if missed:
        settings = results.plan.settings
        more = min(2 * settings.max_panels, MAX_PANELS)
        cure = f"--max-panels {more}" if settings.refine else "--refine"
        lines.append(
            f"{missed} of {len(frame)} intervals exceed the tolerance (rtol {settings.rtol:g}); "
            f"{cure} and another --out would integrate those more finely"
        )
    lines += [Text(visible(note), "yellow") for note in results.notes]
    lines.append(f"tables: {results.path / 'tables'}/*.parquet")
    return Group(*lines)


def _statuses(rows: pd.DataFrame) -> str:
    counts = rows["status"].value_counts()
    return ", ".join(f"{status} {count}" for status, count in counts.items() if count)


def plan_table(report: PlanReport) -> Group:
    """What `report` plans, and what it will take."""
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
        "time": f"{least}{duration(cost.seconds)} of gradients on {_workers(report)}, and about "
        "10 s to start them",
        "memory": f"{size(cost.memory_bytes)} a worker",
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
        "device": f"{plan.device_kind}, {_count(plan.threads, 'thread')} a worker"
        + ("" if plan.settings.deterministic else ", deterministic algorithms off"),
        "windows": f"{plan.window} steps wide",
    }
    if plan.settings.fisher is not None:
        kinds = {"both": "true and empirical", "empirical": "empirical"}
        rows["Fisher"] = (
            f"{kinds[plan.settings.fisher_kind]}, {_count(n_fisher(plan), 'step')}, at most "
            f"{plan.settings.fisher_samples:,} samples a split; its time is in the above"
        )
    for name, value in rows.items():
        table.add_row(name, visible(value))
    sizes = Table("table", "rows", box=None, pad_edge=False)
    for name, count in cost.rows.items():
        sizes.add_row(name, f"{count:,}")
    return Group(table, "", sizes, *map(visible, _plan_notes(report)))


def _workers(report: PlanReport) -> str:
    if report.team == 1:
        return f"{report.workers} workers"
    return f"{_count(report.workers // report.team, 'team')} of {report.team} workers"


def _sums_rows(report: PlanReport) -> dict[str, str]:
    """What there is to say of gradients in parts."""
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


def _count(number: int, what: str, several: str = "") -> str:
    return f"{number} {what}" if number == 1 else f"{number} {several or what + 's'}"


def _plan_notes(report: PlanReport) -> Iterable[str]:
    plan = report.plan
    yield from report.notes
    for split in plan.splits:
        if split.groups and not split.sorted_by_group:
            yield (
                f"groups of split {split.name!r} mix within samples or batches: "
                f"{len(split.groups)} backward passes a gradient instead of one"
            )
    few = [split for split in plan.splits if split.n_batches < report.team]
    for split in few:
        yield (
            f"split {split.name!r} has {_count(split.n_batches, 'batch', 'batches')} for the "
            f"{report.team} workers of a team, so some idle; a smaller --batch-size makes more"
        )
    left_out = [la.name for la in plan.layers if la.name not in plan.unit_layers]
    if left_out and plan.settings.layers is None:
        yield f"no units for {', '.join(left_out)}: more than 10,000 units (--units for all)"
    if "parameters" not in plan.tables:
        yield "no parameters and traces tables: too many rows (--parameters forces them)"


def audit_table(audit: Audit) -> Group:
    """What an audit of a run saw."""
    dtypes = ", ".join(f"{count} {name}" for name, count in audit.dtypes.items())
    head = (
        f"{audit.root}: {_count(len(audit.steps), 'checkpoint')}, steps {audit.steps[0]} to "
        f"{audit.steps[-1]}; {audit.n_tensors} tensors ({dtypes}), {audit.n_elements:,} float "
        f"elements, {size(audit.nbytes)}"
    )
    lines: list[RenderableType] = [Text(visible(head))]
    for finding in audit.findings:
        text = Text(f"{finding.severity:8}", _COLOURS.get(finding.severity, ""))
        lines.append(text.append(visible(finding.message), "default"))
    if not audit.findings:
        lines.append(Text("nothing stands out", "green"))
    return Group(*lines)


def status_text(found: Status) -> str:
    """How far an analysis is, a few lines of text."""
    is_quiet = found.silent and found.state != "interrupted"
    lines = [
        f"{found.state}{' (no word from the driver lately)' if is_quiet else ''}: "
        f"{found.intervals_done:,}/{found.intervals:,} intervals, "
        f"{found.spans_done:,}/{found.spans:,} spans, {found.workers} workers"
    ]
    if found.rate:
        lines.append(f"{found.rate:.3g} intervals/s, {duration(found.seconds_left or 0.0)} left")
    for split, gap in found.gaps.items():
        share = f" ({gap.gap / abs(gap.loss_change):.3%})" if gap.loss_change else ""
        lines.append(
            f"{split}: change {gap.loss_change:+.4f}, LC {gap.lc:+.4f}, gap {gap.gap:+.2g}{share}"
        )
    lines += [
        f"running: {held.first}-{held.last}, {held.done:.0f}/{held.intervals} intervals in "
        f"{duration(held.seconds)}{f', try {held.attempt}' if held.attempt > 1 else ''}"
        for held in found.running
    ]
    lines += [f"failed: {span.first}-{span.last}: {span.reason}" for span in found.failed]
    lines += [f"error: {found.error}"] if found.error else []
    lines += [f"as of {found.written}"] if found.written else []
    return "\n".join(map(one_line, lines))


def findings_summary(found: Findings, width: int = terminal.WIDE) -> Group:
    """Of every finding the rows about the whole run, and why others could not be had.

    Where there are several splits, those of the first; and of columns as many as fit into `width`.
    """
    parts: list[RenderableType] = []
    left_out: dict[str, None] = {}
    for finding in FINDINGS:
        if finding.name not in found or not finding.brief:
            continue
        table = found[finding.name]
        frame = table.to_pandas()
        for column, value in finding.rows:
            frame = frame[frame[column] == value]
        frame = frame[[*finding.shown]] if finding.shown else frame
        if "split" in frame and len(frame):
            first, *others = map(str, frame["split"].unique())
            frame = frame[frame["split"] == first]
            left_out |= dict.fromkeys(others)
        if "layer" in frame:
            frame = frame.assign(layer=frame["layer"].astype(object).replace("", "all"))
        narrow = _narrowed(frame.head(_BRIEF), width)
        parts += [Text(f"{finding.title} ({finding.name})", "italic"), frame_table(narrow)]
        if len(narrow.columns) < len(frame.columns):
            parts.append(Text(f"and {', '.join(map(str, frame.columns[len(narrow.columns) :]))}"))
        if len(frame) > _BRIEF:
            file = f"{found.path}/{finding.name}.parquet"
            parts.append(Text(f"{_BRIEF} of {len(frame)} rows; all: {file}"))
        parts += [Text(line, "dim") for line in _explained(finding.name, narrow)]
        parts += [Text(visible(note), "yellow") for note in notes_of(table)] + [""]
    parts += [Text(f"no {n}: {visible(why)}", "yellow") for n, why in found.impossible.items()]
    parts += [WHAT_HAPPENED] if parts else []
    more = visible(f"; also of split {', '.join(left_out)}" if left_out else "")
    parts.append(f"findings, all rows and columns{more}: {found.path}/*.parquet")
    return Group(*parts)


def _explained(name: str, shown: pd.DataFrame) -> Iterable[str]:
    """How to read a finding's table, and what its empty cells mean; a line each, or none."""
    if name in READING:
        yield READING[name]
    known = [(c, meaning) for c, meaning in EMPTY.get(name, {}).items() if c in shown]
    empty = [f"no {column}: {meaning}" for column, meaning in known if shown[column].isna().any()]
    if empty:
        yield "; ".join(empty)


def _narrowed(frame: pd.DataFrame, width: int) -> pd.DataFrame:
    """The first columns, as many as fit."""
    for n_columns in range(len(frame.columns), 1, -1):
        narrow = frame[frame.columns[:n_columns]]
        if _width(frame_table(narrow)) <= width:
            return narrow
    return frame[frame.columns[:1]]
