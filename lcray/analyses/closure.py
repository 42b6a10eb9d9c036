"""Closure: the loss change of each split over the run, its LC, and the gap between them."""

from __future__ import annotations

from dataclasses import dataclass

from lcray.tables.reading.results import Results

#: The table `intervals`, with a loss change only where there is LC, so that both sums compare.
ALLOCATED = (
    "(SELECT * REPLACE (CASE WHEN lc IS NOT NULL THEN loss_change END AS loss_change) "
    "FROM intervals)"
)


@dataclass(frozen=True)
class Closure:
    """The sums of one split over the run; NaN where there is no value.

    Attributes:
        split: its name.
        loss_start: the loss at the first checkpoint.
        loss_end: the loss at the last checkpoint.
        loss_change: the measured change of the loss, over the intervals that have LC.
        lc: the sum of all LC.
        gap: LC minus the change.
        abs_gap: Σ|gap| over intervals.
        abs_change: Σ|change| over intervals.
        first_order_lc: LC by the gradients at the starts of the intervals.
        n_helping: number of (parameter, interval) pairs with LC < 0.
        n_hurting: those with LC > 0.
        n_zero: those with LC = 0.
        n_gradients: number of full-batch gradients.
        lc_se: standard error of `lc` from sampling batches; NaN where the rule takes all of them,
            and where it is not known.
        gradient_cost: all gradients, in full-batch gradients.
        n_bad: number of intervals without LC.
    """

    split: str
    loss_start: float
    loss_end: float
    loss_change: float
    lc: float
    gap: float
    abs_gap: float
    abs_change: float
    first_order_lc: float
    n_helping: int
    n_hurting: int
    n_zero: int
    n_gradients: int
    n_bad: int
    lc_se: float
    gradient_cost: float

    @property
    def lc_half(self) -> float:
        """Half the width of the 95 % confidence interval of `lc` from sampling batches."""
        return 1.96 * self.lc_se

    @property
    def helping(self) -> float:
        """The share of (parameter, interval) pairs that help."""
        whole = self.n_helping + self.n_hurting + self.n_zero
        return self.n_helping / whole if whole else float("nan")


def closures(results: Results) -> list[Closure]:
    """The closure of each split that has intervals, in the plan's order.

    Raises:
        CorruptionError: if the table cannot be read.
    """
    sums = ("loss_change", "lc", "gap", "abs_gap", "abs_change", "first_order_lc")
    counts = ("n_helping", "n_hurting", "n_zero", "n_gradients")
    what = (
        "first(loss_start ORDER BY start_step) AS loss_start",
        "last(loss_end ORDER BY start_step) AS loss_end",
        *(f"sum({name}::DOUBLE ORDER BY start_step) AS {name}" for name in sums),
        *(f"coalesce(sum({name}), 0)::BIGINT AS {name}" for name in counts),
        "count(*) FILTER (status <> 'ok') AS n_bad",
        "CASE WHEN count(lc_se) = count(lc) THEN sqrt(sum(lc_se ** 2 ORDER BY start_step)) END "
        "AS lc_se",
        "sum(coalesce(gradient_cost, n_gradients) ORDER BY start_step) AS gradient_cost",
    )
    found = results.sql_arrow(
        f"SELECT split, {', '.join(what)} FROM (SELECT *, abs(gap) AS abs_gap, abs(loss_change) AS "
        f"abs_change FROM {ALLOCATED}) GROUP BY split"
    )
    rows = {row["split"]: row for row in found.to_pandas().to_dict("records")}
    names = [split.name for split in results.plan.splits]
    return [Closure(**rows[name]) for name in names if name in rows]
