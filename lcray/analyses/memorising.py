"""Learning or memorising: LC on train compared with the other splits, and when they diverge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import tidy
from lcray.analyses.layer_totals import BOUND
from lcray.analyses.requirements import split_of
from lcray.analyses.series import Floats, Series, intervals, layer_series, with_network
from lcray.analyses.windows import RUN, Ranges, Windows
from lcray.errors import InapplicableError, UsageError
from lcray.statistics.bootstrap import RESAMPLED, Bootstrap, block_length
from lcray.tables.reading.results import Results

Flags = NDArray[np.bool_]

_PAIR = (
    tidy.text("train", "the split that the loss was trained on"),
    tidy.text("other", "the split that it is compared with"),
)
_OF = ("lc_train", "lc_other", "difference")
_ENDS = ("resampled_low", "resampled_high")
_BOUNDS = dict.fromkeys(_OF[:2], BOUND) | {"difference": "the sum of the bounds of both"}

_SIDE_BY_SIDE = tidy.schema(
    "memorising",
    "train other resolution window layer",
    (
        *_PAIR,
        tidy.text("resolution", "run, window or interval"),
        *tidy.WINDOW,
        tidy.LAYER,
        tidy.count("n_intervals", "intervals that are ok in both splits"),
        tidy.number("lc_train", tidy.LOSS, "LC on train"),
        tidy.number("lc_other", tidy.LOSS, "LC on the other split"),
        tidy.number("difference", tidy.LOSS, "lc_other - lc_train: > 0 memorises"),
        *(tidy.number(f"{name}_bound", tidy.LOSS, _BOUNDS[name]) for name in _OF),
        *(
            tidy.number(f"{name}_{column}", tidy.LOSS, RESAMPLED[column])
            for name in _OF
            for column in _ENDS
        ),
        tidy.number("cumulative_train", tidy.LOSS, "LC on train up to the end"),
        tidy.number("cumulative_other", tidy.LOSS, "LC on the other split up to the end"),
    ),
    "LC on train beside LC on another split",
)

_ONSETS = tidy.schema(
    "overfitting",
    "train other layer",
    (
        *_PAIR,
        tidy.LAYER,
        tidy.text("window", "the first window of overfitting; empty for none"),
        tidy.number("onset", "step", "its first step; null for none"),
        tidy.number("lc_train_after", tidy.LOSS, "LC on train from there to the end of the run"),
        tidy.number("lc_other_after", tidy.LOSS, "LC on the other split from there to the end"),
        tidy.count("n_windows", "windows that could be judged"),
    ),
    "when each layer starts to overfit",
)


def memorising(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    train: str | None = None,
    level: float = 0.95,
) -> pa.Table:
    """LC on train and on every other split, by layer and by interval, window and run.

    With several splits on one path, what a layer learns (LC < 0 on both) can be told from what it
    memorises (LC < 0 on train alone); the difference is LC_other − LC_train ([LCA], arXiv
    1909.01440, author response). Bounds and resampled intervals are as in `layer_totals`. The
    difference has the sum of both bounds, and the same blocks are drawn for both splits.

    Args:
        results: the output; needs `layers` and two splits.
        window: as in `Windows.of`.
        windows: as in `Windows.of`.
        seed: of the bootstrap.
        train: the split that was trained on; None for ``train``, else the plan's first.
        level: of the resampled intervals.

    Returns:
        One row for each other split, resolution, window (or interval) and layer. The network is
        first (layer "", with buffers). Resampled intervals need at least 8 intervals.

    Raises:
        InapplicableError: if there is only one split.
        UsageError: for an unknown split, or invalid windows.
    """
    series = layer_series(results, ["lc_error"], ("parameter", "buffer"))
    chosen = Windows.of(results, window, windows)
    draws = Bootstrap(seed, level=level)
    blocks: list[dict[str, Any]] = []
    errors = [error for _, error, _ in _pairs(results, series, train, "lc_error")]
    for (names, pair, ok), error in zip(_pairs(results, series, train), errors, strict=True):
        error[2] = error[0] + error[1]
        for item in chosen:
            here = ok & item.holds(series.starts)
            if here.any():
                found = _window(pair, error, here, series.starts < item.end, draws)
                head = {"resolution": "run" if item.name == RUN else "window", **item.columns}
                blocks.append(names | {"layer": [tidy.ALL_LAYERS, *series.layers]} | head | found)
        if ok.any():
            blocks.append(names | _intervals(series, pair, error, ok))
    parameters = {"seed": seed, "level": level}
    return tidy.from_columns(_SIDE_BY_SIDE, blocks, parameters=parameters)


def overfitting(
    results: Results,
    *,
    window: int | None = None,
    seed: int = 0,
    train: str | None = None,
    level: float = 0.95,
    patience: int = 3,
) -> pa.Table:
    """When each layer starts to overfit.

    The onset of a layer is the first of `patience` consecutive windows (of a fixed width), in each
    of which its cumulative LC on the other split rises (its LC there is above 0 by the whole
    resampled interval) while its cumulative LC on train falls (below 0 in the same way). This is a
    definition of this library: a chance rise in one window, or a rise on both splits, is not
    overfitting. The question is a tendency, not the sum of the window, so the resampled interval
    decides and not the bound.

    Args:
        results: the output; needs `layers` and two splits.
        window: width of the windows; None for the analysis's own. Windows with fewer than 8
            intervals cannot be judged, and they interrupt a sequence.
        seed: of the bootstrap.
        train: as in `memorising`.
        level: of the resampled intervals.
        patience: number of consecutive windows.

    Returns:
        One row for each other split and layer, the network first (layer "").

    Raises:
        InapplicableError: if there is only one split.
        UsageError: as in `memorising`, or for a patience below 1.
    """
    if patience < 1:
        raise UsageError(f"patience {patience}: give a number of windows, at least 1")
    series = layer_series(results, [], ("parameter", "buffer"))
    width = results.plan.window if window is None else window
    chosen = Windows.fixed(results.plan.steps, width)
    draws = Bootstrap(seed, level=level)
    rows: list[dict[str, Any]] = []
    judged, shared = 0, False
    for names, pair, ok in _pairs(results, series, train):
        shared = shared or bool(ok.any())
        verdicts = [_overfits(pair[:, ok & w.holds(series.starts)], draws) for w in chosen]
        judged = sum(verdict is not None for verdict in verdicts)
        for k, layer in enumerate([tidy.ALL_LAYERS, *series.layers]):
            states = [verdict is not None and bool(verdict[k]) for verdict in verdicts]
            first = _first_row(states, patience)
            row = {**names, "layer": layer, "n_windows": judged, "window": ""}
            if first is not None:
                after = pair[:2, ok & (series.starts >= chosen.items[first].first), k].sum(axis=1)
                row |= {"window": chosen.items[first].name, "onset": chosen.items[first].first}
                row |= {"lc_train_after": after[0], "lc_other_after": after[1]}
            rows.append(row)
    parameters = {"seed": seed, "level": level, "patience": patience, "width": width}
    few = f"windows of {width} steps hold fewer than 8 intervals: none was judged; widen --window"
    if not shared:
        few = "no interval has LC on two splits: nothing was judged"
    return tidy.table(_ONSETS, rows, parameters=parameters, notes=[] if judged else [few])


def _pairs(
    results: Results, series: Series, train: str | None, column: str = "lc"
) -> Iterator[tuple[dict[str, str], Floats, Flags]]:
    """For each other split: names, `column` of train, other and difference [3, T, 1 + L], ok [T].

    The network comes first; values that are not ok are 0.
    """
    if len(series.splits) < 2:
        raise InapplicableError(
            f"there is one split, {series.splits[0]!r}; analyze with a second one into a new output"
        )
    train = split_of(results, train)
    first = series.splits.index(train)
    for i, other in enumerate(series.splits):
        if i != first:
            ok = series.ok[first] & series.ok[i]
            both = with_network(np.where(ok[:, None], series[column][[first, i]], 0.0))
            pair = np.concatenate([both, both[1:] - both[:1]])
            yield {"train": train, "other": other}, pair, ok


def _window(
    pair: Floats, error: Floats, here: Flags, until: Flags, draws: Bootstrap
) -> dict[str, Any]:
    """The columns of one window, one row per layer: intervals `here`, and all `until` its end."""
    lc, bound = (values[:, here].sum(axis=1) for values in (pair, error))
    found = _columns(lc, bound, pair[:2, until].sum(axis=1))
    resampled = _resampled(pair[:, here], draws)
    for end, values in zip(_ENDS, resampled or (), strict=False):
        found |= {f"{name}_{end}": values[i] for i, name in enumerate(_OF)}
    return found | {"n_intervals": int(here.sum())}


def _intervals(series: Series, pair: Floats, error: Floats, ok: Flags) -> dict[str, Any]:
    """The columns of all intervals at once; within each interval, layer after layer."""
    sums = np.cumsum(pair[:2], axis=1)
    lc, bound, until = (v[:, ok].reshape(len(v), -1) for v in (pair, error, sums))
    return intervals(series, ok) | _columns(lc, bound, until)


def _columns(lc: Floats, bound: Floats, until: Floats) -> dict[str, Any]:
    """The columns of LC and its bounds, [3, rows], and of cumulative LC, [2, rows]."""
    return {
        **dict(zip(_OF, lc, strict=True)),
        **{f"{name}_bound": bound[i] for i, name in enumerate(_OF)},
        "cumulative_train": until[0],
        "cumulative_other": until[1],
    }


def _resampled(pair: Floats, draws: Bootstrap) -> tuple[Floats, Floats] | None:
    """Resampled intervals of the sums over iterations of pair [3, T, 1 + L], each [3, 1 + L]."""
    shape = (pair.shape[0], pair.shape[2])
    columns = pair.transpose(1, 0, 2).reshape(pair.shape[1], shape[0] * shape[1])
    sums = draws.sums(columns, block_length(columns)) if len(columns) else None
    if sums is None:
        return None
    _, low, high = draws.interval(sums)
    return low.reshape(shape), high.reshape(shape)


def _overfits(pair: Floats, draws: Bootstrap) -> Flags | None:
    """The layers [1 + L] whose LC falls on train and rises on the other split in one window."""
    ends = _resampled(pair, draws)
    return None if ends is None else np.asarray((ends[1][0] < 0) & (ends[0][1] > 0))


def _first_row(states: list[bool], patience: int) -> int | None:
    """The index at which the first `patience` consecutive True begin."""
    for first in range(len(states) - patience + 1):
        if all(states[first : first + patience]):
            return first
    return None
