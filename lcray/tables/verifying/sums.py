"""Relations between the numbers of the tables: one SQL query per invariant.

A query gives the rows that violate its invariant, so none for a sound output. Besides the tables,
it can use the plan as relations; see `lcray.tables.verifying.coverage`. A comparison with a missing
number counts as a violation. For tolerances see `lcray.tables.verifying.verify`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lcray.planning.plan import Plan
from lcray.tables.verifying.coverage import Invariant

_EPS = 2.0**-52
_SUM = 1e-12
_FORWARD = {"float32": 2.0**-23, "float64": _EPS}
_MIXED_GROUPS = {"float32": 1e-4, "float64": 1e-9}
# Gradients at the nodes are rounded to the compute dtype, those of the groups are not. Relative to
# Σ |Δ g|, which is at most |Δ|·|g|; sixteen times 2^-24, since the tables have g at the start only.
_ROUNDED = {"float32": 2.0**-20, "float64": 0.0}

# Layers of intervals that are ok; `scale` is the sum of |LC| over the layer's elements.
_OK = """ok AS (
    SELECT l.*, greatest(abs(l.lc), coalesce(l.lc_hurting - l.lc_helping, 0)) AS scale
    FROM layers l JOIN intervals i USING (split, start_step) WHERE i.status = 'ok')"""


def invariants(plan: Plan) -> Iterator[Invariant]:
    """Sums that must agree."""
    yield from _losses(plan)
    yield from _layers()
    yield from _parts(plan)
    yield from _replicates()
    yield from _over_time(plan)
    yield from _fisher()


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
    yield Invariant(
        "standard errors from sampling batches are possible",
        ("intervals", "layers"),
        f"""WITH sums AS (
            SELECT split, start_step, sum(lc_se) AS most, bool_and(lc_se >= 0) AS fine,
                count(lc_se) = count(*) AS known FROM layers GROUP BY ALL)
        SELECT split, start_step, lc_se, most, gradient_cost, n_gradients
        FROM intervals LEFT JOIN sums USING (split, start_step)
        WHERE lc_se < 0 OR NOT fine OR (known AND lc_se > most * (1 + {_SUM!r}))
            OR gradient_cost < n_gradients ORDER BY ALL""",
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


def _fisher() -> Iterator[Invariant]:
    yield Invariant(
        "traces of Fisher information are sums of squares",
        ("fisher",),
        """SELECT split, step, layer, trace_true, trace_empirical FROM fisher
        WHERE least(trace_true, trace_empirical, trace_true_se, trace_empirical_se) < 0
            OR n_items < 0 ORDER BY ALL""",
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
    mixed, rounded = _MIXED_GROUPS[plan.settings.dtype], _ROUNDED[plan.settings.dtype]
    near, lost = max(_SUM, rounded), f"{rounded!r} * coalesce(update_norm * gradient_norm, 0)"
    passes = f"CASE WHEN one_pass THEN {near!r} ELSE {mixed!r} END"
    yield _adding_up("LC", "units", "lc", f"{_SUM!r} * scale")
    yield _adding_up("weighted LC", "groups", "lc * weight", f"{passes} * (scale + parts) + {lost}")
    yield _adding_up(
        "LC", "elements", "lc::DOUBLE", "1e-7 * scale + 1.5e-45 * numel", " of kind parameter"
    )
    yield _adding_up(
        "weighted LC", "replicate_layers", "lc * weight", f"{near!r} * (scale + parts) + {lost}"
    )


def _adding_up(what: str, table: str, part: str, tolerance: str, of_kind: str = "") -> Invariant:
    """That parts of layers have their sum; with `of_kind`, that only parameters have parts."""
    found = "(SELECT * FROM ok WHERE kind = 'parameter') RIGHT JOIN sums" if of_kind else ""
    return Invariant(
        f"{what} of {table} adds up to that of layers{of_kind}",
        ("intervals", "layers", table),
        f"""WITH {_OK}, sums AS (
            SELECT split, start_step, layer, fsum({part}) AS total, sum(abs({part})) AS parts
            FROM {table} GROUP BY ALL)
        SELECT split, start_step, layer, total AS sum, lc
        FROM {found or "ok JOIN sums"} USING (split, start_step, layer)
            LEFT JOIN plan_splits USING (split)
        WHERE NOT coalesce(abs(total - lc) <= {tolerance}, false) ORDER BY ALL""",
    )


def _replicates() -> Iterator[Invariant]:
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
        "parameters add up to layers of kind parameter over the run",
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
