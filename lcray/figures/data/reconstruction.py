"""The measured loss along the run, and its reconstruction from LC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import tidy
from lcray.analyses.tables import require
from lcray.errors import UsageError
from lcray.tables.reading.results import Results

_FORM = tidy.schema(
    "reconstruction",
    "split step",
    (
        tidy.SPLIT,
        tidy.count("step", "of the checkpoint"),
        tidy.number("loss", tidy.LOSS, "mean loss, as it was measured"),
        tidy.number("reconstructed", tidy.LOSS, "loss at the start, and LC up to here"),
        tidy.number("gap", tidy.LOSS, "reconstructed - loss"),
        tidy.number("first_order", tidy.LOSS, "loss at the start, and first-order LC up to here"),
    ),
    "the loss, and its reconstruction from LC",
)


def reconstruction(results: Results, *, points: int = 1000) -> pa.Table:
    """The loss, the loss at the start plus cumulative LC, and their difference.

    If an interval is missing or has no LC, the sums start again from the measured loss after it.

    Args:
        results: the output; needs `intervals`.
        points: the most steps per split, evenly spaced; the first and the last are included.

    Returns:
        One row for each split and step.

    Raises:
        InapplicableError: if there is no table `intervals`.
        UsageError: for fewer points than 2.
    """
    require(results, "intervals")
    if points < 2:
        raise UsageError(f"points {points}: must be at least 2")
    frame = results.intervals()
    rows = [
        row
        for split in results.plan.splits
        for row in _rows(split.name, frame[frame["split"] == split.name], points)
    ]
    return tidy.table(_FORM, rows, parameters={"points": points})


def _rows(split: str, frame: pd.DataFrame, points: int) -> Iterator[dict[str, Any]]:
    if frame.empty:
        return
    columns = ("loss_start", "loss_end", "lc", "first_order_lc")
    start, end, lc, first = (frame[name].to_numpy(np.float64) for name in columns)
    begins, ends = (frame[name].to_numpy(np.int64) for name in ("start_step", "end_step"))
    anchors = _anchors(np.isfinite(lc), begins, ends)
    sums = {"reconstructed": _from(start, lc, anchors), "first_order": _from(start, first, anchors)}
    steps = np.append(begins[:1], ends)
    loss = np.append(start[:1], end)
    whole = {name: np.append(start[:1], values) for name, values in sums.items()}
    if not np.isfinite(first).any():
        whole["first_order"][:] = np.nan
    for i in np.unique(np.linspace(0, len(steps) - 1, points).round().astype(np.int64)):
        row = {name: values[i] for name, values in whole.items()}
        gap = row["reconstructed"] - loss[i]
        yield {"split": split, "step": int(steps[i]), "loss": loss[i], "gap": gap, **row}


def _anchors(
    known: NDArray[np.bool_], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each interval [T], the first interval of the unbroken sequence of known ones it ends."""
    joined = known[1:] & known[:-1] & (begins[1:] == ends[:-1])
    fresh = np.append(True, ~joined)
    return np.maximum.accumulate(np.where(fresh, np.arange(len(known)), 0))


def _from(
    loss: NDArray[np.float64], change: NDArray[np.float64], anchors: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The loss at each anchor plus the changes since; NaN if one of these is unknown."""
    before = np.append(0.0, np.cumsum(np.nan_to_num(change)))
    found = loss[anchors] + before[1:] - before[anchors]
    return np.where(np.isfinite(change), found, np.nan)
