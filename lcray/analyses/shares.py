"""Shares of parameters that help and that hurt, by interval, window and run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import tidy
from lcray.analyses.series import Series, layer_series
from lcray.analyses.windows import RUN, Ranges, Windows
from lcray.statistics.bootstrap import Bootstrap, block_length
from lcray.tables.reading.results import Results

Floats = NDArray[np.float64]

_COUNTS = ("n_helping", "n_hurting", "n_zero")
_ERRORS = (
    ("se", "standard error, by blocks of iterations"),
    ("low", "lower end of the confidence interval"),
    ("high", "upper end of the confidence interval"),
)

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
        *(tidy.number(f"helping_{e}", "1", f"{text} of helping") for e, text in _ERRORS),
        tidy.number("helping_of_nonzero", "1", "n_helping / (n_helping + n_hurting)"),
        *(
            tidy.number(f"helping_of_nonzero_{e}", "1", f"{text} of helping_of_nonzero")
            for e, text in _ERRORS
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
    pieces = [
        piece
        for split in range(len(series.splits))
        for piece in (*_windows(series, split, chosen, draws), *_intervals(series, split))
    ]
    columns = {name: np.concatenate([p[name] for p in pieces]) for name in _FORM.names if pieces}
    return tidy.stamped(
        tidy.from_columns(_FORM, columns), parameters={"seed": seed, "level": level}
    )


def _counts(series: Series, split: int) -> Floats:
    """Numbers of helping, hurting and zero, for the network and each layer, [T, 1 + L, 3]."""
    each = np.stack([series[name][split] for name in _COUNTS], axis=-1)
    return np.concatenate([each.sum(axis=1, keepdims=True), each], axis=1)


def _windows(
    series: Series, split: int, chosen: Windows, draws: Bootstrap
) -> Iterator[dict[str, Any]]:
    counts = _counts(series, split)
    for item in chosen:
        here = counts[item.holds(series.starts) & series.ok[split]]
        if not len(here):
            continue
        resolution = "run" if item.name == RUN else "window"
        total = here.sum(axis=0)
        yield (
            _columns(series, split, resolution, len(here), total)
            | {
                "window": _repeated(item.name, len(total)),
                "first_step": np.full(len(total), item.first),
                "end_step": np.full(len(total), item.end),
            }
            | _errors(here, draws)
        )


def _intervals(series: Series, split: int) -> Iterator[dict[str, Any]]:
    """The columns of all intervals at once."""
    ok = series.ok[split]
    if not ok.any():
        return
    counts = _counts(series, split)[ok]
    n_layers = counts.shape[1]
    starts, ends = series.starts[ok], series.ends[ok]
    names = np.array([f"{a}:{b}" for a, b in zip(starts, ends, strict=True)], object)
    flat = counts.reshape(-1, 3)
    empty = dict.fromkeys(_error_names(), np.full(len(flat), np.nan))
    yield (
        _columns(series, split, "interval", 1, flat)
        | {
            "window": np.repeat(names, n_layers),
            "first_step": np.repeat(starts, n_layers),
            "end_step": np.repeat(ends, n_layers),
        }
        | empty
    )


def _columns(
    series: Series, split: int, resolution: str, n_intervals: int, counts: Floats
) -> dict[str, Any]:
    """The columns that rows with these counts [rows, 3] have, for all layers in turn."""
    layers = np.array([tidy.ALL_LAYERS, *series.layers], object)
    helping, hurting, zero = counts.T
    return {
        "split": _repeated(series.splits[split], len(counts)),
        "resolution": _repeated(resolution, len(counts)),
        "layer": np.tile(layers, len(counts) // len(layers)),
        "n_intervals": np.full(len(counts), n_intervals),
        **{name: counts[:, i].astype(np.int64) for i, name in enumerate(_COUNTS)},
        "helping": ratio(helping, counts.sum(axis=1)),
        "hurting": ratio(hurting, counts.sum(axis=1)),
        "zero": ratio(zero, counts.sum(axis=1)),
        "helping_of_nonzero": ratio(helping, helping + hurting),
    }


def _error_names() -> list[str]:
    return [f"{name}_{e}" for name in ("helping", "helping_of_nonzero") for e, _ in _ERRORS]


def _errors(counts: Floats, draws: Bootstrap) -> dict[str, Any]:
    """Errors of the shares from the counts [T, 1 + L, 3] of their intervals."""
    n, rows = counts.shape[:2]
    each = np.nan_to_num(ratio(counts[:, :, 0], counts[:, :, :2].sum(axis=2)))
    sums = draws.sums(counts.reshape(n, -1), block_length(each))
    if sums is None:
        return dict.fromkeys(_error_names(), np.full(rows, np.nan))
    drawn = sums.reshape(-1, rows, 3)
    helping = drawn[:, :, 0]
    found: list[Floats] = []
    for whole in (drawn.sum(axis=2), drawn[:, :, :2].sum(axis=2)):
        found += draws.interval(ratio(helping, whole))
    return dict(zip(_error_names(), found, strict=True))


def ratio(part: Floats, whole: Floats) -> Floats:
    """Part / whole; NaN where whole is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def _repeated(value: str, times: int) -> NDArray[Any]:
    return np.full(times, value, object)
