"""What must hold between the rows of the tables, as one SQL query an invariant.

A query gives the rows where its invariant does not hold, hence none for a sound output. Beside
the tables it sees the plan as relations: `plan_splits`, `plan_intervals`, `plan_layers`. A
comparison with a missing number counts as a violation. Tolerances: see `lcray.verification`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa

from lcray.planning import Plan

_EPS = 2.0**-52
_SUM = 1e-12
_FORWARD = {"float32": 2.0**-23, "float64": _EPS}
_MIXED_GROUPS = {"float32": 1e-4, "float64": 1e-9}
# Gradients at the nodes are rounded to the compute dtype, those of the groups are not. Relative to
# Σ |Δ g|, which is at most |Δ|·|g|; sixteen times 2^-24, as only g at the start is in the tables.
_ROUNDED = {"float32": 2.0**-20, "float64": 0.0}


@dataclass(frozen=True)
class Invariant:
    """A statement about the rows of some tables.

    Attributes:
        name: the statement.
        tables: the tables it is about.
        query: SQL that gives the rows it does not hold for.
    """

    name: str
    tables: tuple[str, ...]
    query: str


def relations(plan: Plan, spans: Collection[str]) -> dict[str, pa.Table]:
    """The plan as relations; `spans` are the names of those that the tables hold."""
    intervals = [i for span in plan.spans if span.name in spans for i in span.intervals]
    parameter = [layer.kind == "parameter" for layer in plan.layers]
    names = [layer.name for layer in plan.layers]
    return {
        "plan_splits": pa.table(
            {
                "split": pa.array([s.name for s in plan.splits], pa.string()),
                "n_groups": pa.array([len(s.groups) for s in plan.splits], pa.int64()),
                "n_replicates": pa.array(
                    [len(s.replicate_weights) for s in plan.splits], pa.int64()
                ),
                "one_pass": pa.array([s.sorted_by_group for s in plan.splits], pa.bool_()),
            }
        ),
        "plan_intervals": pa.table(
            {
                "start_step": pa.array([start for start, _ in intervals], pa.int64()),
                "end_step": pa.array([end for _, end in intervals], pa.int64()),
            }
        ),
        "plan_layers": pa.table(
            {
                "layer": pa.array(names, pa.string()),
                "kind": pa.array([layer.kind for layer in plan.layers], pa.string()),
                "numel": pa.array([layer.numel for layer in plan.layers], pa.int64()),
                "n_units": pa.array([layer.n_units for layer in plan.layers], pa.int64()),
                "has_units": pa.array([n in plan.unit_layers for n in names], pa.bool_()),
                "detail": pa.array(
                    [p and n in plan.detail_layers for p, n in zip(parameter, names, strict=True)],
                    pa.bool_(),
                ),
            }
        ),
    }


# Layers of intervals that are ok, with `scale`: the sum of |LC| over the layer's elements.
_OK = """ok AS (
    SELECT l.*, greatest(abs(l.lc), coalesce(l.lc_hurting - l.lc_helping, 0)) AS scale
    FROM layers l JOIN intervals i USING (split, start_step) WHERE i.status = 'ok')"""
# Where rows of an interval are due: all splits and intervals of the plan that are ok.
_DUE = """due AS (SELECT split, start_step FROM intervals WHERE status = 'ok')"""


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


def invariants(plan: Plan) -> Iterator[Invariant]:
    """Sums that must agree."""
    yield from _losses(plan)
    yield from _layers()
    yield from _parts(plan)
    yield from _replicates(plan)
    yield from _over_time(plan)


def _losses(plan: Plan) -> Iterator[Invariant]:
    ulp = f"4 * {_EPS!r} * (abs(loss_start) + abs(loss_end))"
    yield Invariant(
        "loss_change = loss_end - loss_start",
        ("intervals",),
        f"""SELECT split, start_step, loss_change, loss_end - loss_start AS expected
        FROM intervals WHERE status = 'ok'
        AND NOT coalesce(abs(loss_change - (loss_end - loss_start)) <= {ulp}, false)
        ORDER BY ALL""",
    )
    yield Invariant(
        "gap = lc - loss_change",
        ("intervals", "layers"),
        f"""WITH {_OK}, scales AS (
            SELECT split, start_step, sum(scale) AS scale FROM ok GROUP BY ALL)
        SELECT split, start_step, gap, lc - loss_change AS expected
        FROM intervals LEFT JOIN scales USING (split, start_step) WHERE status = 'ok'
        AND NOT coalesce(abs(gap - (lc - loss_change)) <= {_SUM!r} * scale + {ulp}, false)
        ORDER BY ALL""",
    )
    tolerance = 16 * _FORWARD[plan.settings.dtype]
    yield Invariant(
        "loss_start = the previous interval's loss_end",
        ("intervals",),
        f"""SELECT b.split, b.start_step, b.loss_start, a.loss_end AS expected
        FROM intervals a JOIN intervals b ON a.split = b.split AND a.end_step = b.start_step
        WHERE a.status = 'ok' AND b.status = 'ok' AND NOT coalesce(
            abs(b.loss_start - a.loss_end) <= {tolerance!r} * abs(a.loss_end), false)
        ORDER BY ALL""",
    )


def _layers() -> Iterator[Invariant]:
    yield Invariant(
        "lc_helping + lc_hurting = lc",
        ("intervals", "layers"),
        f"""WITH {_OK}
        SELECT split, start_step, layer, lc_helping + lc_hurting AS sum, lc FROM ok
        WHERE NOT (kind = 'buffer' AND lc_helping IS NULL AND lc_hurting IS NULL) AND NOT coalesce(
            lc_helping <= 0 AND lc_hurting >= 0
            AND abs(lc_helping + lc_hurting - lc) <= {_SUM!r} * scale, false)
        ORDER BY ALL""",
    )
    yield Invariant(
        "n_helping + n_hurting + n_zero = numel",
        ("intervals", "layers"),
        """SELECT split, start_step, layer, l.n_helping + l.n_hurting + l.n_zero AS sum, numel
        FROM layers l JOIN intervals i USING (split, start_step)
        WHERE l.n_helping + l.n_hurting + l.n_zero
            != CASE WHEN i.status = 'ok' AND kind = 'parameter' THEN numel ELSE 0 END
            OR least(l.n_helping, l.n_hurting, l.n_zero, l.n_flips, numel - l.n_flips) < 0
        ORDER BY ALL""",
    )
    yield Invariant(
        "counts of layers add up to those of intervals",
        ("intervals", "layers"),
        """SELECT split, start_step, sum(l.n_helping) AS helping, sum(l.n_hurting) AS hurting,
            sum(l.n_zero) AS zero
        FROM intervals i JOIN layers l USING (split, start_step)
        GROUP BY split, start_step, i.n_helping, i.n_hurting, i.n_zero
        HAVING (helping, hurting, zero) != (i.n_helping, i.n_hurting, i.n_zero) ORDER BY ALL""",
    )
    yield Invariant(
        "LC of layers adds up to that of intervals",
        ("intervals", "layers"),
        f"""WITH {_OK}, sums AS (
            SELECT split, start_step, fsum(lc) AS total, sum(scale) AS scale, count(lc) AS n,
                count(*) AS rows FROM ok GROUP BY ALL)
        SELECT split, start_step, total AS sum, lc
        FROM intervals LEFT JOIN sums USING (split, start_step)
        WHERE status = 'ok'
        AND NOT coalesce(n = rows AND abs(total - lc) <= {_SUM!r} * scale, false)
        ORDER BY ALL""",
    )


def _parts(plan: Plan) -> Iterator[Invariant]:
    yield Invariant(
        "LC of units adds up to that of layers",
        ("intervals", "layers", "units"),
        f"""WITH {_OK}, sums AS (
            SELECT split, start_step, layer, fsum(lc) AS total FROM units GROUP BY ALL)
        SELECT split, start_step, layer, total AS sum, lc
        FROM ok JOIN sums USING (split, start_step, layer)
        WHERE NOT coalesce(abs(total - lc) <= {_SUM!r} * scale, false) ORDER BY ALL""",
    )
    mixed, rounded = _MIXED_GROUPS[plan.settings.dtype], _ROUNDED[plan.settings.dtype]
    yield Invariant(
        "weighted LC of groups adds up to that of layers",
        ("intervals", "layers", "groups"),
        f"""WITH {_OK}, sums AS (
            SELECT split, start_step, layer, fsum(lc * weight) AS total,
                sum(abs(lc * weight)) AS parts FROM groups GROUP BY ALL)
        SELECT split, start_step, layer, total AS sum, lc
        FROM ok JOIN sums USING (split, start_step, layer) JOIN plan_splits USING (split)
        WHERE NOT coalesce(abs(total - lc)
            <= CASE WHEN one_pass THEN {max(_SUM, rounded)!r} ELSE {mixed!r} END * (scale + parts)
            + {rounded!r} * coalesce(update_norm * gradient_norm, 0), false)
        ORDER BY ALL""",
    )
    yield Invariant(
        "LC of elements adds up to that of layers",
        ("intervals", "layers", "elements"),
        f"""WITH {_OK}, sums AS (
            SELECT split, start_step, layer, fsum(lc::DOUBLE) AS total FROM elements GROUP BY ALL)
        SELECT split, start_step, layer, total AS sum, lc
        FROM ok JOIN sums USING (split, start_step, layer)
        WHERE NOT coalesce(abs(total - lc) <= 1e-7 * scale + 1.5e-45 * numel, false)
        ORDER BY ALL""",
    )


def _replicates(plan: Plan) -> Iterator[Invariant]:
    rounded = _ROUNDED[plan.settings.dtype]
    yield Invariant(
        "weighted LC of replicate_layers adds up to that of layers",
        ("intervals", "layers", "replicate_layers"),
        f"""WITH {_OK}, sums AS (
            SELECT split, start_step, layer, fsum(lc * weight) AS total,
                sum(abs(lc * weight)) AS parts FROM replicate_layers GROUP BY ALL)
        SELECT split, start_step, layer, total AS sum, lc
        FROM ok JOIN sums USING (split, start_step, layer)
        WHERE NOT coalesce(abs(total - lc) <= {max(_SUM, rounded)!r} * (scale + parts)
            + {rounded!r} * coalesce(update_norm * gradient_norm, 0), false)
        ORDER BY ALL""",
    )
    yield Invariant(
        "LC and weight of replicates are those of replicate_layers",
        ("replicates", "replicate_layers"),
        f"""WITH sums AS (
            SELECT split, start_step, replicate, fsum(lc) AS total, sum(abs(lc)) AS scale,
                min(weight) AS low, max(weight) AS high FROM replicate_layers GROUP BY ALL)
        SELECT split, start_step, replicate, total AS sum, lc, weight
        FROM replicates LEFT JOIN sums USING (split, start_step, replicate)
        WHERE NOT coalesce(abs(total - lc) <= {_SUM!r} * scale AND low = weight AND high = weight,
            false) ORDER BY ALL""",
    )
    yield Invariant(
        "weighted losses of replicates add up to those of intervals",
        ("intervals", "replicates"),
        f"""WITH sums AS (
            SELECT split, start_step, any_value(end_step) AS last, count(DISTINCT end_step) AS ends,
                fsum(loss_start * weight) AS before, fsum(loss_end * weight) AS after,
                fsum(loss_change * weight) AS change, fsum(weight) AS share,
                sum((abs(loss_start) + abs(loss_end)) * weight) AS scale
            FROM replicates GROUP BY ALL)
        SELECT split, start_step, before, loss_start, after, loss_end, change, loss_change, share
        FROM intervals JOIN sums USING (split, start_step)
        WHERE NOT coalesce(last = end_step AND ends = 1 AND abs(share - 1) <= {_SUM!r}
            AND greatest(abs(before - loss_start), abs(after - loss_end),
                abs(change - loss_change)) <= {_SUM!r} * scale, false)
        ORDER BY ALL""",
    )


def _over_time(plan: Plan) -> Iterator[Invariant]:
    yield Invariant(
        "parameters add up to layers over the run",
        ("intervals", "layers", "parameters"),
        f"""WITH {_OK}, run AS (
            SELECT split, layer, fsum(lc) AS lc, sum(scale) AS scale, sum(n_helping) AS helping,
                sum(n_hurting) AS hurting, sum(n_zero) AS zero, sum(n_flips) AS flips
            FROM ok WHERE kind = 'parameter' GROUP BY ALL),
        sums AS (
            SELECT split, layer, fsum(lc) AS total, fsum(abs_lc) AS absolute,
                sum(n_helping) AS n_helping, sum(n_hurting) AS n_hurting, sum(n_zero) AS n_zero,
                sum(n_flips) AS n_flips
            FROM parameters GROUP BY ALL)
        SELECT split, layer, total AS sum, lc, absolute, scale AS absolute_of_layers,
            n_flips, flips AS flips_of_layers
        FROM run JOIN sums USING (split, layer)
        WHERE NOT coalesce(abs(total - lc) <= {_SUM!r} * scale
            AND abs(absolute - scale) <= {_SUM!r} * scale, false)
        OR (helping, hurting, zero, flips) != (n_helping, n_hurting, n_zero, n_flips)
        ORDER BY ALL""",
    )
    yield Invariant(
        "histograms add up to layers, window by window",
        ("intervals", "layers", "histograms"),
        f"""WITH {_OK}, signed AS (
            SELECT split, start_step // {plan.window} * {plan.window} AS w, layer,
                unnest([-1, 0, 1]) AS sign, unnest([n_helping, n_zero, n_hurting]) AS n,
                unnest([-lc_helping, 0, lc_hurting]) AS lc
            FROM ok JOIN plan_layers USING (layer) WHERE detail),
        expected AS (
            SELECT split, w AS "window", layer, sign::TINYINT AS sign, sum(n) AS n, fsum(lc) AS lc
            FROM signed GROUP BY ALL HAVING sum(n) > 0),
        found AS (
            SELECT split, "window", layer, sign, sum("count") AS counted, fsum("sum") AS total
            FROM histograms GROUP BY ALL)
        SELECT split, "window", layer, sign, counted, n AS expected, total AS sum,
            lc AS expected_sum
        FROM expected FULL JOIN found USING (split, "window", layer, sign)
        WHERE NOT coalesce(counted = n AND abs(total - lc) <= {_SUM!r} * lc, false)
        ORDER BY ALL""",
    )
    yield Invariant(
        "fits are of the histograms",
        ("histograms", "fits"),
        """WITH counted AS (
            SELECT split, "window", layer, sign, sum("count") AS n FROM histograms GROUP BY ALL
            UNION ALL
            SELECT split, -1, layer, sign, sum("count") FROM histograms GROUP BY ALL)
        SELECT split, "window", layer, sign, value AS n, n AS expected
        FROM fits LEFT JOIN counted USING (split, "window", layer, sign)
        WHERE parameter = 'n' AND NOT coalesce(value = n, false) ORDER BY ALL""",
    )
