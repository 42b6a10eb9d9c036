"""Ready-made views on the tables, for `Results.sql` and ``OUT/views.sql``.

Sums leave out intervals without LC (their `status` is not ok).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lcray.planning.plan import Plan
from lcray.storage import Place, storage_of
from lcray.storage.files import writing
from lcray.tables.columns import UNIT
from lcray.tables.output import Output
from lcray.tables.schema import TABLES

#: The variable of a DuckDB session with the place of an output, if it has moved.
VARIABLE = "lcray_out"


@dataclass(frozen=True)
class View:
    """One view.

    Attributes:
        name: its name in SQL; no table has the same name.
        tables: the tables that it needs.
        columns: the meaning of each column, in order.
        description: one line.
        sql: a SELECT; ``{train}`` stands for the training split, as a literal.
    """

    name: str
    tables: tuple[str, ...]
    columns: Mapping[str, str]
    description: str
    sql: str

    def select(self, plan: Plan) -> str:
        """The SELECT for an output of this plan."""
        names = [split.name for split in plan.splits]
        train = "train" if "train" in names else names[0]
        return self.sql.replace("{train}", literal(train))


_LAYER_SUMS = """
SELECT split, layer, any_value(kind) AS kind, any_value(numel) AS numel,
    count(lc) AS n_intervals, sum(lc) AS lc, sum(lc_helping) AS lc_helping,
    sum(lc_hurting) AS lc_hurting, sum(lc) / nullif(any_value(numel), 0) AS lc_per_element,
    sum(n_helping) / nullif(sum(n_helping + n_hurting + n_zero), 0) AS helping,
    CASE WHEN count(lc_error) = count(lc) THEN sum(lc_error) END AS lc_bound,
    CASE WHEN count(lc_se) = count(lc) THEN sqrt(sum(lc_se ** 2)) END AS lc_se
FROM layers GROUP BY split, layer"""
_LAYER_COLUMNS = {
    "split": "named data set",
    "layer": "named tensor of the model",
    "kind": "parameter or buffer",
    "numel": "elements of the layer",
    "n_intervals": "intervals that have LC",
    "lc": "LC over the run (loss)",
    "lc_helping": "sum of its negative LC (loss)",
    "lc_hurting": "sum of its positive LC (loss)",
    "lc_per_element": "lc / numel (loss)",
    "helping": "share of elements x intervals with LC < 0; null for buffers",
    "lc_bound": "what the quadrature may be off lc: sum of lc_error, null without any (loss)",
    "lc_se": "standard error of lc from sampling batches; null without (loss)",
}

VIEWS: tuple[View, ...] = (
    View(
        "closure",
        ("intervals",),
        {
            "split": "named data set",
            "n_intervals": "intervals that have LC",
            "n_without_lc": "intervals that have none",
            "loss_change": "their measured change (loss)",
            "lc": "LC (loss)",
            "gap": "lc - loss_change (loss)",
            "gap_percent": "100 gap / |loss_change|",
            "abs_gap_percent": "100 sum |gap| / sum |loss_change|",
            "first_order_lc": "LC by the gradients at the starts; null without a node at 0 (loss)",
            "n_gradients": "full-batch gradients",
            "lc_se": "standard error of lc from sampling batches; null without (loss)",
            "gradient_cost": "n_gradients and those of samples of batches; null in old outputs",
        },
        "per split: what was allocated, and by how much it misses the loss change",
        """
SELECT split, count(lc) AS n_intervals, count(*) - count(lc) AS n_without_lc,
    sum(loss_change) FILTER (lc IS NOT NULL) AS loss_change, sum(lc) AS lc, sum(gap) AS gap,
    100 * sum(gap) / nullif(abs(sum(loss_change) FILTER (lc IS NOT NULL)), 0) AS gap_percent,
    100 * sum(abs(gap)) / nullif(sum(abs(loss_change)) FILTER (lc IS NOT NULL), 0)
        AS abs_gap_percent,
    sum(first_order_lc) AS first_order_lc, sum(n_gradients)::BIGINT AS n_gradients,
    CASE WHEN count(lc_se) = count(lc) THEN sqrt(sum(lc_se ** 2)) END AS lc_se,
    sum(gradient_cost) AS gradient_cost
FROM intervals GROUP BY split""",
    ),
    View(
        "worst_intervals",
        ("intervals",),
        {
            "split": "named data set",
            "rank": "by |gap| in the split; 1 is worst",
            "start_step": "step that the interval starts at",
            "end_step": "step that it ends at",
            "loss_change": "measured change (loss)",
            "lc": "LC (loss)",
            "gap": "lc - loss_change (loss)",
            "gap_percent": "100 gap / |loss_change|",
            "converged": "whether the gap is within its bound",
        },
        "every interval, those that close worst first",
        """
SELECT split, row_number() OVER (PARTITION BY split ORDER BY abs(gap) DESC, start_step) AS rank,
    start_step, end_step, loss_change, lc, gap,
    100 * gap / nullif(abs(loss_change), 0) AS gap_percent, converged
FROM intervals WHERE gap IS NOT NULL ORDER BY split, rank""",
    ),
    View("layer_totals", ("layers",), _LAYER_COLUMNS, "every layer over the run", _LAYER_SUMS),
    View(
        "hurting_layers",
        ("layers",),
        _LAYER_COLUMNS,
        "the layers whose LC over the run is above 0, worst first",
        f"SELECT * FROM ({_LAYER_SUMS}) WHERE lc > 0 ORDER BY lc DESC",
    ),
    View(
        "shares",
        ("intervals",),
        {
            "split": "named data set",
            "start_step": "step that the interval starts at",
            "end_step": "step that it ends at",
            "helping": "share of the parameters with LC < 0",
            "hurting": "share with LC > 0",
            "zero": "share with LC = 0",
            "helping_of_nonzero": "n_helping / (n_helping + n_hurting)",
        },
        "shares of the parameters that help and hurt at every interval",
        """
SELECT split, start_step, end_step, n_helping / nullif(n, 0) AS helping,
    n_hurting / nullif(n, 0) AS hurting, n_zero / nullif(n, 0) AS zero,
    n_helping / nullif(n_helping + n_hurting, 0) AS helping_of_nonzero
FROM (SELECT *, n_helping + n_hurting + n_zero AS n FROM intervals)
WHERE lc IS NOT NULL ORDER BY split, start_step""",
    ),
    View(
        "train_vs_rest",
        ("layers",),
        {
            "other": "a split beside the one that was trained on",
            "layer": "named tensor of the model",
            "n_intervals": "intervals that have LC in both",
            "lc_train": "LC over them on train (loss)",
            "lc_other": "LC over them on the other split (loss)",
            "difference": "lc_other - lc_train: > 0 memorises (loss)",
        },
        "LC of every layer on train beside that on each other split",
        """
SELECT b.split AS other, layer, count(*) AS n_intervals, sum(a.lc) AS lc_train,
    sum(b.lc) AS lc_other, sum(b.lc) - sum(a.lc) AS difference
FROM layers a JOIN layers b USING (start_step, layer)
WHERE a.split = {train} AND b.split <> {train} AND a.lc IS NOT NULL AND b.lc IS NOT NULL
GROUP BY b.split, layer""",
    ),
    View(
        "unit_totals",
        ("units",),
        {
            "split": "named data set",
            "layer": "named tensor of the model",
            "unit": UNIT,
            "lc": "LC over the run (loss)",
        },
        "every output channel or neuron over the run",
        "SELECT split, layer, unit, sum(lc) AS lc FROM units GROUP BY split, layer, unit",
    ),
    View(
        "class_layers",
        ("groups",),
        {
            "split": "named data set",
            "group": "label of the items, such as their class",
            "layer": "named tensor of the model",
            "lc": "LC of the mean loss over the group's own items (loss)",
            "weight": "the group's share of the total weight",
            "share_of_layer": "sum of lc * weight: adds up to the layer's LC (loss)",
        },
        "every class and layer over the run",
        """
SELECT split, "group", layer, sum(lc) AS lc, avg(weight) AS weight,
    sum(lc * weight) AS share_of_layer
FROM groups GROUP BY split, "group", layer""",
    ),
)


def views_of(tables: Sequence[str]) -> tuple[View, ...]:
    """The views that need no other tables than these."""
    return tuple(view for view in VIEWS if set(view.tables) <= set(tables))


def named_in(query: str, names: Sequence[str]) -> list[str]:
    """The `names` that may occur in a query."""
    return [name for name in names if re.search(rf"\b{name}\b", query, re.IGNORECASE)]


def needed_by(query: str, tables: Sequence[str]) -> set[str]:
    """The tables, of these, that a query may name, itself or by a view on them."""
    views = [view for view in views_of(tables) if named_in(query, [view.name])]
    return {table for view in views for table in view.tables}.union(named_in(query, tables))


def literal(text: str) -> str:
    """A string as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def scan(source: str) -> str:
    """The rows of Parquet files as a table function of DuckDB; `source` is SQL for their path.

    Folders in the path are not partitions: a folder ``split=train`` would replace the column
    `split`.
    """
    return f"read_parquet({source}, hive_partitioning = false)"


def rows_of(table: str, source: str, absent: Sequence[str] = ()) -> str:
    """A query for the rows of a table; columns that its files lack are null."""
    if not absent:
        return f"FROM {scan(source)}"
    columns = [
        f'NULL::{_TYPES[str(_plain(field.type))]} AS "{field.name}"'
        if field.name in absent
        else f'"{field.name}"'
        for field in TABLES[table].schema
    ]
    return f"SELECT {', '.join(columns)} FROM {scan(source)}"


#: DuckDB's type for each type of a column.
_TYPES = {
    "bool": "BOOLEAN",
    "int8": "TINYINT",
    "int64": "BIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
}


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def write_views(out: Place, plan: Plan, tables: Sequence[str]) -> None:
    """Writes ``OUT/views.sql``: every table and view, for a DuckDB session in any folder.

    Paths begin with the session's variable `lcray_out`, or else with the present place of the
    output.

    Raises:
        OutputError: if it cannot be written.
        CorruptionError: if a link in its place leads out of the output.
    """
    path = Output(out).views
    text = _text(out, plan, tables)
    with writing(path):
        storage_of(path).write(path, text.encode())


def _text(out: Place, plan: Plan, tables: Sequence[str]) -> str:
    # In a local path, signs of a pattern must be escaped; in an address they cannot be.
    where = glob.escape(str(out.resolve())) if isinstance(out, Path) else str(out)
    said = rf"regexp_replace(getvariable('{VARIABLE}'), '[*?[]', '[\0]', 'g')"  # escaped, too
    root = f"coalesce({said}, {literal(where)})"
    parts = [
        "-- The tables and views of an lcray output, for DuckDB: .read views.sql",
        "-- Where the output has moved, or is to be read through another path, say so first:",
        f"--   SET VARIABLE {VARIABLE} = '/path/to/the/output';",
        "-- `lcray reduce` writes this file anew.",
    ]
    for table in tables:
        source = f"{root} || '/tables/{table}.parquet'"
        parts.append(f"CREATE OR REPLACE VIEW {table} AS FROM {scan(source)};")
    for view in views_of(tables):
        columns = "\n".join(f"--   {name}: {text}" for name, text in view.columns.items())
        select = view.select(plan).strip()
        head = f"\n-- {view.name}: {view.description}\n{columns}\n"
        parts.append(f"{head}CREATE OR REPLACE VIEW {view.name} AS\n{select};")
    return "\n".join(parts) + "\n"
