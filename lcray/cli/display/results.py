"""The outcome of an analysis, as tables and lines. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, fields

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lcray.allocation.quadrature import MAX_PANELS
from lcray.analyses.closure import Closure, closures
from lcray.errors import visible
from lcray.tables.reading.results import Results


def layer_table(results: Results) -> Table:
    """LC by layer over the run, in the model's order, with the share of parameters that help."""
    frame = results.layers()
    frame = frame[frame["split"] == results.plan.splits[0].name]
    sums = frame.groupby("layer", observed=True).sum(numeric_only=True).reset_index()
    sizes = {layer.name: layer.numel for layer in results.plan.layers}
    split = visible(results.plan.splits[0].name)
    columns = ("layer", "parameters", "LC", "helping", "hurting", "share helping")
    table = _table(f"Loss change allocated to each layer, split {split}", *columns)
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
    """The closure of each split that has LC, as a script reads it: sums and counts over the run."""
    rows = [asdict(one) for one in closures(results) if math.isfinite(one.lc)]
    names = [field.name for field in fields(Closure)]
    return pd.DataFrame(rows, columns=names).drop(columns=["loss_start", "loss_end", "n_bad"])


def closure_table(results: Results) -> Table:
    """Per split: the loss change, its allocation, and the gap between them."""
    columns = ["split", "loss change", "Σ LC", "gap/|change|", "Σ|gap|/Σ|change|"]
    columns += ["first order", "share helping"]
    found = closures(results)
    sampled = any(one.lc_half > 0 for one in found)
    note = " (± 95 % confidence, from sampling batches)" if sampled else ""
    table = _table(f"Closure, rule {results.plan.settings.rule}{note}", *columns)
    for one in found:
        table.add_row(
            visible(one.split),
            _signed(one.loss_change),
            _signed(one.lc, one.lc_half if one.lc_half > 0 else math.nan),
            _share(one.gap, abs(one.loss_change)),
            _share(one.abs_gap, one.abs_change),
            _signed(one.first_order_lc),
            _share(one.helping, 1.0, 1),
        )
    return table


def confidence_table(results: Results) -> Table:
    """Per split: loss change and LC of all data, with the error that sampling adds."""
    level = 0.95
    found = results.confidence(level=level)
    found = found[found["layer"] == ""].assign(half=lambda rows: (rows["high"] - rows["low"]) / 2)
    title = f"All of the data, {level:.0%} confidence"
    table = _table(title, "split", "loss change", "Σ LC")
    for split in results.plan.splits:
        rows = found[found["split"] == split.name]
        cells = zip(rows["estimate"], rows["half"], strict=True)
        table.add_row(visible(split.name), *(_signed(value, half) for value, half in cells))
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(first, title=title, title_justify="left", box=None, pad_edge=False)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _signed(value: float, half: float = math.nan) -> str:
    error = f" ± {half:.4f}" if math.isfinite(half) else ""
    return f"{value:+.4f}{error}" if math.isfinite(value) else "–"


def _share(part: float, whole: float, digits: int = 3) -> str:
    return f"{part / whole:.{digits}%}" if whole and math.isfinite(part / whole) else "–"


def summary(results: Results) -> Group:
    """The outcome of an analysis, and where its tables are."""
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
