"""The number of intervals by which one signal follows another, from many noisy pairs of signals.

Legend: T intervals, N elements, M the largest lag, R resamplings.

Let x̃ and ỹ be the signals of an element without their trend, divided by their standard deviation.
The cross-correlation at lag τ is the mean over elements n and intervals t

    c(τ) = ⟨ x̃_n(t + τ) · ỹ_n(t) ⟩,        −M ≤ τ ≤ M,

where t runs over the T − 2M intervals for which every lag exists, so that all lags are compared on
the same intervals. x follows y by the lag at which c is largest.

Source: Box, Jenkins & Reinsel, *Time Series Analysis*, chapter 11 (cross-correlation); Politis &
Romano 1992 for resampling blocks of the terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcray.errors import UsageError
from lcray.statistics.bootstrap import FEWEST, Bootstrap, Floats

TRENDS = ("none", "constant", "linear")


@dataclass(frozen=True)
class Lag:
    """The cross-correlation of two signals, and the lag at which it is largest.

    Attributes:
        lags: in intervals, ascending, [2M + 1].
        correlation: at each lag, between −1 and 1, [2M + 1].
        lower: lower end of its confidence interval, [2M + 1].
        upper: upper end.
        lag: at the largest correlation, in intervals; positive if x follows y.
        lag_lower: lower end of its confidence interval.
        lag_upper: upper end.
        p_value: of a correlation as large at any lag, if there were none: by the largest difference
            over all lags in resamplings centred at c.
        n_elements: N, the elements that vary in both signals.
        n_intervals: T − 2M.
    """

    lags: NDArray[np.int64]
    correlation: Floats
    lower: Floats
    upper: Floats
    lag: int
    lag_lower: float
    lag_upper: float
    p_value: float
    n_elements: int
    n_intervals: int


def default_max_lag(n_intervals: int) -> int:
    """50 intervals, but at most a fifth of them."""
    return min(50, n_intervals // 5)


def lag_of_peak(
    follower: Floats,
    leader: Floats,
    *,
    max_lag: int | None = None,
    trend: str = "constant",
    bootstrap: Bootstrap | None = None,
) -> Lag | None:
    """The number of intervals by which `follower` follows `leader`.

    The confidence intervals resample blocks of consecutive intervals t, with all elements and lags
    of an interval together: elements share their mini-batches, and the terms are autocorrelated.

    Args:
        follower: x, [T, N]; NaN if unknown.
        leader: y, [T, N]; NaN if unknown.
        max_lag: M; None for `default_max_lag`.
        trend: the trend to remove from each element's signals: ``constant`` (their mean),
            ``linear`` (a straight line, by least squares) or ``none``.
        bootstrap: estimates the errors.

    Returns:
        The lag; None if no element varies in both signals, or if fewer than
        `lcray.statistics.bootstrap.FEWEST` intervals are left.

    Raises:
        UsageError: for an invalid lag or trend.
    """
    if trend not in TRENDS:
        raise UsageError(f"trend {trend!r}: must be one of {', '.join(TRENDS)}")
    most = default_max_lag(len(follower)) if max_lag is None else max_lag
    if most < 0:
        raise UsageError(f"max_lag {most}: must be at least 0")
    bootstrap = bootstrap or Bootstrap()
    if len(follower) - 2 * most < FEWEST:
        return None
    x, y = (_standardised(signal, trend) for signal in (follower, leader))
    vary = (x != 0).any(axis=0) & (y != 0).any(axis=0)
    if not vary.any():
        return None
    terms = _terms(x[:, vary], y[:, vary], most)
    return _lag(terms, most, int(vary.sum()), bootstrap)


def _standardised(signal: Floats, trend: str) -> Floats:
    """Each column without its trend, by its standard deviation; 0 if it is constant or unknown."""
    known = np.isfinite(signal)
    n = np.maximum(1, known.sum(axis=0))
    filled = np.where(known, signal, 0.0)
    if trend != "none":
        from scipy.signal import detrend as remove_trend  # slow to import

        filled = np.where(known, signal, filled.sum(axis=0) / n)
        filled = remove_trend(filled, axis=0, type="linear" if trend == "linear" else "constant")
    filled = np.where(known, filled, 0.0)
    scale = np.sqrt((filled**2).sum(axis=0) / n)
    size = np.sqrt((np.where(known, signal, 0.0) ** 2).sum(axis=0) / n)
    varies = scale > 1e-12 * size
    return np.asarray(np.divide(filled, scale, out=np.zeros_like(filled), where=varies))


def _terms(x: Floats, y: Floats, most: int) -> Floats:
    """⟨x̃(t + τ) ỹ(t)⟩ over the elements, [T − 2M, 2M + 1]."""
    middle = slice(most, len(y) - most)
    shifts = range(2 * most + 1)
    inner = len(y) - 2 * most
    columns = [np.einsum("tn,tn->t", x[k : k + inner], y[middle]) for k in shifts]
    return np.asarray(np.stack(columns, axis=1) / y.shape[1])


def _lag(terms: Floats, most: int, n_elements: int, bootstrap: Bootstrap) -> Lag:
    lags = np.arange(-most, most + 1)
    correlation = terms.mean(axis=0)
    sums = bootstrap.sums(terms)
    assert sums is not None, "there are enough intervals"
    drawn = sums / len(terms)
    peak = int(correlation.argmax())
    _, lower, upper = bootstrap.interval(drawn)
    _, low, high = bootstrap.interval(lags[drawn.argmax(axis=1)].astype(np.float64))
    by_chance = (drawn - correlation).max(axis=1)
    greater = np.count_nonzero(by_chance >= correlation[peak])
    return Lag(
        lags=lags,
        correlation=correlation,
        lower=lower,
        upper=upper,
        lag=int(lags[peak]),
        lag_lower=float(low),
        lag_upper=float(high),
        p_value=(1 + greater) / (1 + len(drawn)),
        n_elements=n_elements,
        n_intervals=len(terms),
    )
