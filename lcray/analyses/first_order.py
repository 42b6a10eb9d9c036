"""LC to first order, and LC by the rule that was used, compared with the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.windows import Ranges, Window, Windows
from lcray.statistics.bootstrap import RESAMPLED, Bootstrap
from lcray.tables.columns import SIGN, column
from lcray.tables.reading.results import Results

#: The `rule` of rows that use the gradient at the start of each interval alone.
FIRST_ORDER = "first order"

_FORM = tidy.schema(
    "first_order",
    "split first_step end_step window rule",
    (
        tidy.SPLIT,
        *tidy.WINDOW,
        tidy.text("rule", f"the analysis's quadrature rule, or {FIRST_ORDER!r}"),
        tidy.count("n_intervals", "intervals that are ok"),
        tidy.number("gradients", "1", "full-batch gradients per interval (shared ones once)"),
        tidy.number("loss_change", tidy.LOSS, "measured"),
        tidy.number("lc", tidy.LOSS, "allocated"),
        tidy.number("gap", tidy.LOSS, "lc - loss_change"),
        *(tidy.number(f"gap_{name}", tidy.LOSS, text) for name, text in RESAMPLED.items()),
        tidy.number("gap_percent", "%", "100 gap / |loss_change|"),
        tidy.number("abs_gap_percent", "%", "100 sum of |gap| / sum of |loss_change|"),
        tidy.number("worst_gap", tidy.LOSS, "of the interval whose gap is largest"),
        tidy.count("worst_step", "start_step of that interval"),
        column(
            "bias",
            SIGN,
            "1",
            "-1: LC is systematically below the loss change (it overstates a decrease), +1 above "
            "it, 0: the resampled interval of the gap contains 0, or there is none",
        ),
    ),
    "LC by the analysis's rule and by the gradient at the start, against the loss",
)


def first_order(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pa.Table:
    """How far each rule's LC is from the measured change of the loss.

    gap = Σ_i LC_i − ΔL for every interval. [LCA] (arXiv 1909.01440) finds that the first order,
    Σ_i g_i(θ_t)·Δ_i, is far below ΔL, and that Runge–Kutta is within 0.3 % of it on all its
    networks. Both are in `intervals`, so no gradient is computed again. The gap of a window is
    measured, hence exact. Whether it tends to one sign (`bias`) is judged by its resampled
    interval: the spread that it would have in other stretches of the same process. Rows for the
    first order are left out if the rule has no node at 0.

    Args:
        results: the output; needs `intervals`.
        window: as in `Windows.of`.
        windows: as in `Windows.of`.
        seed: of the bootstrap.
        level: of the resampled intervals.

    Returns:
        One row for each split, window and rule; losses in the units of the loss.

    Raises:
        UsageError: for invalid windows.
    """
    chosen = Windows.of(results, window, windows)
    frame = results.intervals()
    frame = frame[frame["status"] == "ok"]
    draws = Bootstrap(seed, level=level)
    rows: list[dict[str, Any]] = []
    for split in results.plan.splits:
        of_split = frame[frame["split"] == split.name]
        for item in chosen:
            here = of_split[item.holds(of_split["start_step"].to_numpy())]
            rows += _rows(split.name, item, here, draws)
    return tidy.table(_FORM, rows, parameters={"seed": seed, "level": level})


def _rows(
    split: str, item: Window, here: pd.DataFrame, draws: Bootstrap
) -> Iterator[dict[str, Any]]:
    if not len(here):
        return
    rules = "+".join(map(str, here["rule"].unique()))
    ways = {rules: ("lc", here["n_gradients"].mean()), FIRST_ORDER: ("first_order_lc", 1.0)}
    for rule, (name, gradients) in ways.items():
        lc, change = here[name].to_numpy(), here["loss_change"].to_numpy()
        if np.isnan(lc).any():
            continue
        gap = lc - change
        worst = int(np.abs(gap).argmax())
        row = {
            "split": split,
            **item.columns,
            "rule": rule,
            "n_intervals": len(here),
            "gradients": gradients,
            "loss_change": change.sum(),
            "lc": lc.sum(),
            "gap": gap.sum(),
            "gap_percent": _percent(gap.sum(), abs(change.sum())),
            "abs_gap_percent": _percent(np.abs(gap).sum(), np.abs(change).sum()),
            "worst_gap": gap[worst],
            "worst_step": int(here["start_step"].iloc[worst]),
        }
        yield row | _errors(gap, draws)


def _errors(gap: Any, draws: Bootstrap) -> dict[str, Any]:
    ends = {f"gap_{name}": float(ends[0]) for name, ends in draws.spread(gap[:, None]).items()}
    if not ends:
        return {"bias": 0}
    return ends | {"bias": int(ends["gap_resampled_low"] > 0) - int(ends["gap_resampled_high"] < 0)}


def _percent(part: float, whole: float) -> float:
    return 100 * float(part) / float(whole) if whole else float("nan")
