"""The measured loss along the run, and its reconstruction from LC."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.requirements import require
from lcray.errors import UsageError
from lcray.figures.data.grouping import cumulative
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

    If an interval is missing or has no LC, its measured change stands in for it: the sums after it
    are known wherever the loss is, and the gap is that of the intervals that have LC.

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
    blocks: list[dict[str, Any]] = []
    for split in results.plan.splits:
        here = frame[frame["split"] == split.name]
        if len(here):
            blocks.append({"split": split.name} | _columns(here, points))
    return tidy.from_columns(_FORM, blocks, parameters={"points": points})


def _columns(frame: pd.DataFrame, points: int) -> dict[str, Any]:
    start, end = (frame[name].to_numpy(np.float64) for name in ("loss_start", "loss_end"))
    steps = np.append(frame["start_step"].iloc[:1], frame["end_step"])
    loss = np.append(start[:1], end)
    gap = cumulative(frame["gap"].to_numpy(np.float64))
    claimed = (frame["first_order_lc"] - frame["loss_change"]).to_numpy(np.float64)
    claims = np.isfinite(claimed).any()
    first_order = loss + cumulative(claimed) if claims else np.full(len(loss), np.nan)
    kept = np.unique(np.linspace(0, len(steps) - 1, points).round().astype(np.int64))
    return {
        "step": steps[kept],
        "loss": loss[kept],
        "reconstructed": (loss + gap)[kept],
        "gap": gap[kept],
        "first_order": first_order[kept],
    }
