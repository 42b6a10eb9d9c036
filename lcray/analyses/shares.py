"""Shares of parameters that help and that hurt, by interval, window and run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.series import Floats, Series, intervals, layer_series, with_network
from lcray.analyses.windows import RUN, Ranges, Windows
from lcray.statistics.bootstrap import Bootstrap, block_length
from lcray.tables.reading.results import Results

_COUNTS = ("n_helping", "n_hurting", "n_zero")
_ERRORS = {
    "se": "standard error, by blocks of iterations",
    "low": "lower end of the confidence interval",
    "high": "upper end of the confidence interval",
}

_FORM = tidy.schema(
    "shares",
    "split resolution window layer",
    (
        tidy.SPLIT,
        tidy.text("resolution", "run, window or interval"),
        *tidy.WINDOW,
        tidy.LAYER,
        tidy.count("n_intervals", "intervals that are ok"),
        tidy.count("n_helping", "parameter elements x intervals with LC < 0"),
        tidy.count("n_hurting", "parameter elements x intervals with LC > 0"),
        tidy.count("n_zero", "parameter elements x intervals with LC = 0"),
        tidy.number("helping", "1", "n_helping over all three"),
        tidy.number("hurting", "1", "n_hurting over all three"),
        tidy.number("zero", "1", "n_zero over all three"),
        *(tidy.number(f"helping_{e}", "1", f"{text} of helping") for e, text in _ERRORS.items()),
        tidy.number("helping_of_nonzero", "1", "n_helping / (n_helping + n_hurting)"),
        *(
            tidy.number(f"helping_of_nonzero_{e}", "1", f"{text} of helping_of_nonzero")
            for e, text in _ERRORS.items()
        ),
    ),
    "share of the parameters that help, hurt, or do neither",
)


def shares(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pa.Table:
    """The shares of parameters that help, that hurt, and that have an LC of exactly zero.

    With n₋, n₊, n₀ the numbers of LC < 0, > 0 and = 0 in one iteration, or in all iterations of a
    window, the shares of helping are n₋/(n₋ + n₊ + n₀), and n₋/(n₋ + n₊), which leaves out dead and
    frozen elements. [LCA] (arXiv 1909.01440) finds that 50.7 % of parameters help at an iteration.
    The error of a ratio follows from its sums over blocks of iterations, since neighbouring
    iterations are dependent.

    Args:
        results: the output; needs `layers`.
        window: as in `Windows.of`.
        windows: as in `Windows.of`.
        seed: of the bootstrap.
        level: of the confidence intervals.

    Returns:
        One row for each split, resolution, window (or interval) and layer, the whole network
        first (layer ""). Errors are only at `run` and `window`, for at least 8 intervals.

    Raises:
        UsageError: for invalid windows.
    """
    series = layer_series(results, _COUNTS)
    chosen = Windows.of(results, window, windows)
    draws = Bootstrap(seed, level=level)
    blocks: list[dict[str, Any]] = []
    for s, split in enumerate(series.splits):
        counts, ok = _counts(series, s), series.ok[s]
        for item in chosen:
            here = counts[item.holds(series.starts) & ok]
            if len(here):
                head = {
                    "split": split,
                    "resolution": "run" if item.name == RUN else "window",
                    **item.columns,
                    "layer": [tidy.ALL_LAYERS, *series.layers],
                    "n_intervals": len(here),
                }
                blocks.append(head | _columns(here.sum(axis=0)) | _errors(here, draws))
        if ok.any():
            found = _columns(counts[ok].reshape(-1, 3))
            blocks.append({"split": split} | intervals(series, ok) | found)
    return tidy.from_columns(_FORM, blocks, parameters={"seed": seed, "level": level})


def _counts(series: Series, split: int) -> Floats:
    """Numbers of helping, hurting and zero, for the network and each layer, [T, 1 + L, 3]."""
    return np.stack([with_network(series[name][split]) for name in _COUNTS], axis=-1)


def _columns(counts: Floats) -> dict[str, Any]:
    """The columns of rows with these counts, [rows, 3]."""
    helping, hurting, zero = counts.T
    return {
        **{name: counts[:, i].astype(np.int64) for i, name in enumerate(_COUNTS)},
        "helping": ratio(helping, counts.sum(axis=1)),
        "hurting": ratio(hurting, counts.sum(axis=1)),
        "zero": ratio(zero, counts.sum(axis=1)),
        "helping_of_nonzero": ratio(helping, helping + hurting),
    }


def _errors(counts: Floats, draws: Bootstrap) -> dict[str, Any]:
    """Errors of the shares from the counts [T, 1 + L, 3] of their intervals."""
    n, rows = counts.shape[:2]
    each = np.nan_to_num(ratio(counts[:, :, 0], counts[:, :, :2].sum(axis=2)))
    sums = draws.sums(counts.reshape(n, -1), block_length(each))
    if sums is None:
        return {}
    drawn = sums.reshape(-1, rows, 3)
    helping = drawn[:, :, 0]
    found: dict[str, Any] = {}
    wholes = {"helping": drawn.sum(axis=2), "helping_of_nonzero": drawn[:, :, :2].sum(axis=2)}
    for name, whole in wholes.items():
        ends = zip(_ERRORS, draws.interval(ratio(helping, whole)), strict=True)
        found |= {f"{name}_{error}": end for error, end in ends}
    return found


def ratio(part: Floats, whole: Floats) -> Floats:
    """Part / whole; NaN where whole is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
