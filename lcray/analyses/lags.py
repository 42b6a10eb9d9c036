"""Phase delay: the number of intervals by which a layer's motion follows its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.trace_arrays import Sampled, sampled_layers
from lcray.analyses.windows import Ranges, Window, Windows
from lcray.errors import InapplicableError
from lcray.statistics.bootstrap import Bootstrap
from lcray.statistics.cross_correlation import Lag, lag_of_peak
from lcray.tables.reading.results import Results

_FORM = tidy.schema(
    "lags",
    "split layer first_step end_step window",
    (
        tidy.SPLIT,
        tidy.LAYER,
        *tidy.WINDOW,
        tidy.count("n_elements", "traced elements that move and have a gradient"),
        tidy.count("n_intervals", "intervals whose terms are averaged"),
        tidy.count("lag", "intervals by which the motion follows -gradient"),
        tidy.number("lag_low", "interval", "lower end of its confidence interval"),
        tidy.number("lag_high", "interval", "upper end of its confidence interval"),
        tidy.number("correlation", "1", "at that lag, the greatest there is"),
        tidy.number("correlation_low", "1", "lower end of its confidence interval"),
        tidy.number("correlation_high", "1", "upper end of its confidence interval"),
        tidy.number("p_value", "1", "of a correlation as large at any lag, if there were none"),
        tidy.number("correlation_0", "1", "without a lag"),
    ),
    "lag of a layer's displacement behind -gradient",
)
_PROFILE = tidy.schema(
    "lag_profiles",
    "split layer lag",
    (
        tidy.SPLIT,
        tidy.LAYER,
        tidy.count("lag", "intervals by which the motion is later"),
        tidy.number("correlation", "1", "of displacement and -gradient"),
        tidy.number("correlation_low", "1", "lower end of its confidence interval"),
        tidy.number("correlation_high", "1", "upper end of its confidence interval"),
    ),
    "cross-correlation of displacement and -gradient over the run, by layer and lag",
)


def lags(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    level: float = 0.95,
    max_lag: int | None = None,
    trend: str = "constant",
) -> pa.Table:
    """The lag at which displacement and −gradient of a layer's parameters agree most.

    c(τ) = ⟨Δ̃_n(t + τ) · −g̃_n(t)⟩ over the traced elements n and intervals t. Δ is the movement
    in an interval and g the full-batch gradient at its start; both are centred and divided by
    their standard deviation (`lcray.statistics.cross_correlation`). The lag is where c is largest.
    Under momentum β, a movement is −η Σ_j β^j g(t − j): it lags behind gradients that are
    correlated over time, and the larger β is, the longer the lag. [LCA] and its author response
    (arXiv 1909.01440) explain last layers that hurt by such a delay.

    Args:
        results: the output; needs `traces`, and a rule with a node at 0.
        window: as in `Windows.of`.
        windows: as in `Windows.of`; windows with too few intervals have no row.
        seed: of the bootstrap.
        level: of the confidence intervals, by blocks of intervals.
        max_lag: the largest lag to try; None for 50, but at most a fifth of the window.
        trend: the trend to remove from each signal first: ``constant``, ``linear`` or ``none``.

    Returns:
        One row for each split, layer and window.

    Raises:
        InapplicableError: if nothing was traced for long enough.
        UsageError: for invalid windows, or an invalid lag or trend.
    """
    chosen, draws = Windows.of(results, window, windows), Bootstrap(seed, level=level)
    rows: list[dict[str, Any]] = []
    for sample in sampled_layers(results):
        for item in chosen:
            found = _lag(sample, item, draws, max_lag, trend)
            if found is not None:
                head = {"split": sample.split, "layer": sample.layer, **item.columns}
                rows.append(head | _summary(found))
    _check(rows)
    parameters = {"seed": seed, "level": level, "max_lag": max_lag, "trend": trend}
    return tidy.table(_FORM, rows, parameters=parameters)


def lag_profiles(
    results: Results,
    *,
    seed: int = 0,
    level: float = 0.95,
    max_lag: int | None = None,
    trend: str = "constant",
) -> pa.Table:
    """The correlation c(τ) of `lags` at every lag, over the whole run.

    Returns:
        One row for each split, layer and lag.

    Raises:
        InapplicableError: if nothing was traced for long enough.
        UsageError: for an invalid lag or trend.
    """
    run, draws = Windows.whole(results.plan.steps).items[0], Bootstrap(seed, level=level)
    blocks: list[dict[str, Any]] = []
    for sample in sampled_layers(results):
        found = _lag(sample, run, draws, max_lag, trend)
        if found is not None:
            head = {"split": sample.split, "layer": sample.layer, "lag": found.lags}
            ends = {"correlation_low": found.lower, "correlation_high": found.upper}
            blocks.append(head | {"correlation": found.correlation} | ends)
    _check(blocks)
    parameters = {"seed": seed, "level": level, "max_lag": max_lag, "trend": trend}
    return tidy.from_columns(_PROFILE, blocks, parameters=parameters)


def _lag(
    sample: Sampled, item: Window, draws: Bootstrap, max_lag: int | None, trend: str
) -> Lag | None:
    here = item.holds(sample.starts)
    motion, force = sample.displacement[here], -sample.gradient[here]
    return lag_of_peak(motion, force, max_lag=max_lag, trend=trend, bootstrap=draws)


def _summary(found: Lag) -> dict[str, Any]:
    peak = int(np.searchsorted(found.lags, found.lag))
    return {
        "n_elements": found.n_elements,
        "n_intervals": found.n_intervals,
        "lag": found.lag,
        "lag_low": found.lag_lower,
        "lag_high": found.lag_upper,
        "correlation": found.correlation[peak],
        "correlation_low": found.lower[peak],
        "correlation_high": found.upper[peak],
        "p_value": found.p_value,
        "correlation_0": found.correlation[len(found.lags) // 2],
    }


def _check(rows: list[dict[str, Any]]) -> None:
    if not rows:
        raise InapplicableError(
            "no traced element has movements and gradients for long enough; analyze more "
            "intervals, by a rule with a node at 0, into a new output"
        )
