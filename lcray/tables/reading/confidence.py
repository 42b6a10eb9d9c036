"""Standard errors and confidence intervals of estimates from a sample of the data.

Legend: N samples in the data set, n of them drawn at random, R replicates, Q quantities.

A quantity is linear in the loss: a loss change, LC of a layer, or their sum over any intervals.
Let r_k be its value on replicate k alone, and p_k the replicate's share of Σ w. The estimate is the
value on the whole sample, Σ p_k r_k, and its variance is estimated by

    (1 − n/N) · Σ p_k² (r_k − Σ p r)² / (1 − Σ (n_k/n)²),        n_k samples in replicate k

and (estimate − truth) / SE is assumed to follow Student's t with R − 1 degrees of freedom. If all
samples have the same weight, estimate and variance are unbiased. Otherwise the estimate is a ratio,
whose bias is of order 1/n, and below its standard error by a factor of order √n.

Standard errors of different intervals do not add up, since they come from the same sample: sum r_k
over the intervals first.

Source: Wolter, *Introduction to Variance Estimation* (2007), chapter 2 (random groups); Cochran,
*Sampling Techniques* (1977), chapters 2 (finite populations) and 6 (ratios).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lcray.errors import UsageError
from lcray.planning.plan import SplitPlan

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

_SUMS = """
    SELECT split, 'loss_change' AS quantity, '' AS layer, -1 AS replicate,
        fsum(loss_change) AS value FROM intervals WHERE status = 'ok' AND {when} GROUP BY ALL
    UNION ALL SELECT split, 'lc', '', -1, fsum(lc)
        FROM intervals WHERE status = 'ok' AND {when} GROUP BY ALL
    UNION ALL SELECT split, 'lc of layer', layer, -1, fsum(lc)
        FROM layers WHERE lc IS NOT NULL AND {when} GROUP BY ALL"""
_REPLICATE_SUMS = """
    UNION ALL SELECT split, 'loss_change', '', replicate, fsum(loss_change)
        FROM replicates WHERE replicate >= 0 AND {when} GROUP BY ALL
    UNION ALL SELECT split, 'lc', '', replicate, fsum(lc)
        FROM replicates WHERE replicate >= 0 AND {when} GROUP BY ALL
    UNION ALL SELECT split, 'lc of layer', layer, replicate, fsum(lc)
        FROM replicate_layers WHERE replicate >= 0 AND {when} GROUP BY ALL"""


@dataclass(frozen=True)
class Replication:
    """A sample and its replicates.

    Attributes:
        n_samples: n.
        drawn_from: N.
        weights: Σ w of each replicate, [R].
    """

    n_samples: int
    drawn_from: int
    weights: tuple[float, ...]

    @property
    def shares(self) -> Floats:
        """The share of each replicate in Σ w, [R]."""
        weights = np.asarray(self.weights, np.float64)
        return np.asarray(weights / weights.sum(), np.float64)

    def estimates(self, values: ArrayLike) -> tuple[Floats, Floats]:
        """Estimates and their standard errors, [Q] each; NaN if one replicate has all weight.

        Args:
            values: each quantity on each replicate, [Q, R].
        """
        found, shares = np.asarray(values, np.float64), self.shares
        estimate = found @ shares
        spread = ((shares * (found - estimate[:, None])) ** 2).sum(axis=1)
        variance = (1 - self.n_samples / self.drawn_from) * spread / (1 - self._same_pairs)
        known = np.count_nonzero(shares) > 1
        return estimate, np.sqrt(variance) if known else np.full_like(estimate, math.nan)

    @property
    def _same_pairs(self) -> float:
        """Σ (n_k/n)²: the probability that two samples, drawn independently, share a replicate."""
        small, larger = divmod(self.n_samples, len(self.weights))
        pairs = larger * (small + 1) ** 2 + (len(self.weights) - larger) * small**2
        return pairs / self.n_samples**2


def quantile(level: float, degrees: int) -> float:
    """Student's t that |t| exceeds with probability 1 - `level`.

    Raises:
        UsageError: for a level that is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise UsageError(f"level {level}: must be between 0 and 1, as in 0.95")
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(degrees, (1 + level) / 2))


def columns(
    replication: Replication | None, whole: ArrayLike, values: ArrayLike | None, level: float
) -> dict[str, Floats]:
    """Columns estimate, se, low and high, [Q] each; if all data were taken, without error.

    Args:
        replication: the sample; None if all data were taken.
        whole: each quantity on all samples that were taken, [Q].
        values: each quantity on each replicate, [Q, R]; None if all data were taken.
        level: level of confidence.

    Raises:
        UsageError: for a level that is not between 0 and 1.
    """
    estimate = np.asarray(whole, np.float64)
    if replication is None or values is None:
        quantile(level, 1)  # refuses an invalid level
        half = errors = np.zeros(len(estimate))
    else:
        errors = replication.estimates(values)[1]
        half = errors * quantile(level, len(replication.weights) - 1)
    return {"estimate": estimate, "se": errors, "low": estimate - half, "high": estimate + half}


def sums(first: int, last: int | None, *, replicated: bool) -> str:
    """SQL for the rows that `frame` takes.

    Args:
        first: intervals before this start_step are left out.
        last: intervals from this start_step on are left out; None leaves none out.
        replicated: whether there are tables of replicates.
    """
    when = f"start_step >= {first}" + ("" if last is None else f" AND start_step < {last}")
    return (_SUMS + (_REPLICATE_SUMS if replicated else "")).format(when=when)


def frame(
    splits: Sequence[SplitPlan], layers: Sequence[str], rows: pd.DataFrame, level: float
) -> pd.DataFrame:
    """Estimates, errors and bounds of sums over some intervals.

    Args:
        splits: the splits of the plan.
        layers: the layers that get rows, in order.
        rows: the result of `sums`: split, quantity, layer, replicate (-1 for the whole sample),
            value.
        level: level of confidence.

    Returns:
        split, quantity (``loss_change`` or ``lc``), layer (empty for all layers together), and
        `columns`.

    Raises:
        UsageError: for a level that is not between 0 and 1.
    """
    import pandas as pd

    keys = [("loss_change", ""), ("lc", ""), *(("lc of layer", name) for name in layers)]
    parts = []
    for split in splits:
        mine = rows[rows["split"] == split.name].astype({"quantity": str, "layer": str})
        wide = mine.pivot(index=["quantity", "layer"], columns="replicate", values="value")
        numbers = range(-1, len(split.replicate_weights))
        wide = wide.reindex(index=pd.MultiIndex.from_tuples(keys), columns=numbers)
        values = wide.to_numpy(np.float64)
        found = columns(replication(split), values[:, 0], values[:, 1:], level)
        names = pd.DataFrame(keys, columns=["quantity", "layer"])
        names["quantity"] = names["quantity"].replace("lc of layer", "lc")
        parts.append(names.assign(**found).assign(split=split.name))
    joined = pd.concat(parts, ignore_index=True)
    return joined[["split", *(name for name in joined.columns if name != "split")]]


def replication(split: SplitPlan) -> Replication | None:
    """The sample of a split; None if all its data are taken."""
    if split.drawn_from is None:
        return None
    return Replication(split.n_samples, split.drawn_from, split.replicate_weights)
