"""The rows that the tables must have by the plan: one SQL query per invariant.

A query gives the rows that violate its invariant, so none for a sound output. Besides the tables,
it can use the plan as relations: `plan_splits`, `plan_intervals`, `plan_layers`, `plan_fisher`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa

from lcray.planning.plan import Plan
from lcray.tables.schema import TABLES

# Splits and intervals that must have rows: all that are ok.
_DUE = """due AS (SELECT split, start_step FROM intervals WHERE status = 'ok')"""


@dataclass(frozen=True)
class Invariant:
    """A statement about the rows of some tables.

    Attributes:
        name: the statement.
        tables: the tables that it is about.
        query: SQL that gives the rows that violate it.
    """

    name: str
    tables: tuple[str, ...]
    query: str


def relations(plan: Plan, spans: Collection[str]) -> dict[str, pa.Table]:
    """The plan as relations; `spans` are the names of the spans in the tables."""
    held = [span for span in plan.spans if span.name in spans]
    intervals = [i for span in held for i in span.intervals]
    layers, names = plan.layers, [layer.name for layer in plan.layers]
    return {
        "plan_splits": pa.table(
            {
                "split": [split.name for split in plan.splits],
                "n_groups": [len(split.groups) for split in plan.splits],
                "n_replicates": [len(split.replicate_weights) for split in plan.splits],
                "one_pass": [split.sorted_by_group for split in plan.splits],
            }
        ),
        "plan_intervals": pa.table(
            {
                "start_step": pa.array([start for start, _ in intervals], pa.int64()),
                "end_step": pa.array([end for _, end in intervals], pa.int64()),
            }
        ),
        "plan_fisher": pa.table(
            {"step": pa.array([s for span in held for s in plan.fisher_steps(span)], pa.int64())}
        ),
        "plan_layers": pa.table(
            {
                "layer": names,
                "kind": [layer.kind for layer in layers],
                "numel": [layer.numel for layer in layers],
                "n_units": [layer.n_units for layer in layers],
                "trained": [layer.trainable for layer in layers],
                "has_units": [name in plan.unit_layers for name in names],
                "detail": [
                    layer.kind == "parameter" and layer.name in plan.detail_layers
                    for layer in layers
                ],
            }
        ),
    }


def disorder(table: str) -> str:
    """SQL for the number of the first row whose key is not above that of the row before it, if any.

    Splits and layers have the order of the plan, by types that the database must have; a name
    that it lacks is above no other. Nothing is sorted: the rows pass once, in the file's order.
    """
    above, columns = "false", ["row_number() OVER () - 1 AS row"]
    for name in reversed(TABLES[table].key):
        value = f"TRY_CAST({name} AS {name}_rank)" if name in ("split", "layer") else f'"{name}"'
        columns += [f'{value} AS "{name}"', f'lag({value}) OVER () AS "{name}_before"']
        above = f'("{name}" > "{name}_before" OR "{name}" = "{name}_before" AND {above})'
    return f"""SELECT row FROM (SELECT {", ".join(columns)} FROM {table})
        WHERE row > 0 AND NOT coalesce({above}, false) ORDER BY row LIMIT 1"""


def coverage(plan: Plan) -> Iterator[Invariant]:
    """Rows that must be there, and no others."""
    yield Invariant(
        "intervals has every split and interval once, and no other",
        ("intervals",),
        """WITH due AS (SELECT * FROM plan_splits CROSS JOIN plan_intervals)
        SELECT split, start_step, count(t.status) AS rows
        FROM due FULL JOIN intervals t USING (split, start_step, end_step)
        GROUP BY split, start_step, end_step
        HAVING count(t.status) != 1 OR count(due.n_groups) != 1 ORDER BY ALL""",
    )
    yield Invariant(
        "layers has every split, interval and layer once, and no other",
        ("layers",),
        """WITH due AS (SELECT * FROM plan_splits CROSS JOIN plan_intervals CROSS JOIN plan_layers)
        SELECT split, start_step, layer, count(t.module) AS rows
        FROM due FULL JOIN layers t USING (split, start_step, end_step, layer, kind, numel)
        GROUP BY split, start_step, end_step, layer, kind, numel
        HAVING count(t.module) != 1 OR count(due.n_groups) != 1 ORDER BY ALL""",
    )
    yield _complete("units", "unit", "n_units", "has_units")
    yield _complete("elements", "index", "numel", "detail")
    yield Invariant(
        "groups has every group of a layer or none",
        ("groups", "intervals"),
        f"""WITH {_DUE}, found AS (
            SELECT split, start_step, layer, count(DISTINCT "group") AS n
            FROM groups GROUP BY ALL),
        expected AS (
            SELECT split, start_step, layer, n_groups FROM due JOIN plan_splits USING (split)
            CROSS JOIN plan_layers
            WHERE n_groups > 0 AND (detail OR layer IN (SELECT layer FROM groups)))
        SELECT split, start_step, layer, n AS rows, n_groups AS expected
        FROM expected LEFT JOIN found USING (split, start_step, layer)
        WHERE coalesce(n, 0) != n_groups ORDER BY ALL""",
    )
    yield from _extents(plan)


def _extents(plan: Plan) -> Iterator[Invariant]:
    """Elements that must be there."""
    yield Invariant(
        "replicates has every replicate once",
        ("replicates", "intervals"),
        f"""WITH {_DUE}, found AS (
            SELECT split, start_step, count(*) AS n, min(replicate) AS low, max(replicate) AS high
            FROM replicates GROUP BY ALL)
        SELECT split, start_step, n AS rows, n_replicates AS expected
        FROM (SELECT * FROM due JOIN plan_splits USING (split))
        FULL JOIN found USING (split, start_step)
        WHERE NOT coalesce(n = n_replicates AND low = 0 AND high = n_replicates - 1,
            n_replicates = 0, false) ORDER BY ALL""",
    )
    yield _complete("replicate_layers", "replicate", "n_replicates", "n_replicates > 0")
    yield Invariant(
        "parameters has every element of a layer once",
        ("parameters",),
        """WITH found AS (
            SELECT split, layer, count(*) AS n, min(index) AS low, max(index) AS high
            FROM parameters GROUP BY ALL)
        SELECT split, layer, n AS rows, numel AS expected
        FROM (SELECT * FROM plan_splits CROSS JOIN plan_layers)
        LEFT JOIN found USING (split, layer)
        WHERE CASE WHEN detail OR n IS NOT NULL
            THEN NOT coalesce(n = numel AND low = 0 AND high = numel - 1, numel = 0) END
        ORDER BY ALL""",
    )
    yield Invariant(
        "traces has a sample of every layer, at every step",
        ("traces", "intervals"),
        f"""WITH {_DUE}, found AS (
            SELECT t.split, t.layer, t.index, count(d.split) AS n
            FROM traces t LEFT JOIN due d ON t.split = d.split AND t.step = d.start_step
            GROUP BY ALL),
        steps AS (SELECT split, count(*) AS expected FROM due GROUP BY ALL)
        SELECT split, layer, index, n AS rows, expected
        FROM found LEFT JOIN steps USING (split) WHERE n != coalesce(expected, 0)
        UNION ALL
        SELECT split, layer, NULL, count(index) AS n, least({plan.trace_sample}, numel)
        FROM (SELECT * FROM plan_splits CROSS JOIN plan_layers WHERE detail)
        LEFT JOIN found USING (split, layer)
        GROUP BY split, layer, numel HAVING count(index) < least({plan.trace_sample}, numel)
        ORDER BY ALL""",
    )
    yield Invariant(
        "fisher has every split, chosen step and trained layer once, and no other",
        ("fisher",),
        """WITH due AS (
            SELECT split, step, layer
            FROM plan_splits CROSS JOIN plan_fisher CROSS JOIN plan_layers WHERE trained)
        SELECT split, step, layer, count(n_items) AS rows
        FROM due d FULL JOIN fisher t USING (split, step, layer)
        GROUP BY split, step, layer HAVING count(n_items) != 1 OR count(d.split) != 1
        ORDER BY ALL""",
    )


def _complete(table: str, column: str, size: str, which: str) -> Invariant:
    return Invariant(
        f"{table} has every {column} of a layer once",
        (table, "intervals"),
        f"""WITH {_DUE}, found AS (
            SELECT split, start_step, layer, count(*) AS n, min({column}) AS low,
                max({column}) AS high FROM {table} GROUP BY ALL)
        SELECT split, start_step, layer, n AS rows, {size} AS expected
        FROM (SELECT * FROM due JOIN plan_splits USING (split) CROSS JOIN plan_layers
            WHERE {which})
        LEFT JOIN found USING (split, start_step, layer)
        WHERE NOT coalesce(n = {size} AND low = 0 AND high = {size} - 1, {size} = 0)
        ORDER BY ALL""",
    )
