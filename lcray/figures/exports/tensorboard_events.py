"""TensorBoard events: scalars by interval, and the recorded histograms of LC by window."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lcray.errors import LcrayError
from lcray.tables.reading.results import Results

_SUFFIX = ".lcray"
_SCALARS = {
    "loss": "loss_end",
    "loss_change": "loss_change",
    "lc": "lc",
    "gap": "gap",
    "first_order_lc": "first_order_lc",
}


def write_events(results: Results, folder: Path) -> tuple[Path, ...]:
    """Write one file of events into `folder`; raises as `lcray.export`.

    Values of an interval are at its end step, values of a window at its last step. These are the
    steps of the run, so the values appear next to what training logged.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise LcrayError(
            'the export needs TensorBoard: pip install "lcray[tensorboard]"'
        ) from error
    before = set(folder.iterdir())
    writer = EventFileWriter(str(folder), filename_suffix=_SUFFIX)
    now = time.time()
    try:
        for step, values in (*_scalars(results), *_histograms(results)):
            summary = Summary(value=[Summary.Value(**value) for value in values])
            writer.add_event(Event(wall_time=now, step=step, summary=summary))
    finally:
        writer.close()
    return tuple(sorted(set(folder.iterdir()) - before))


def _scalars(results: Results) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The values of one split, by step."""
    if "intervals" in results.tables:
        for row in results.intervals().to_dict("records"):
            values = {name: row[column] for name, column in _SCALARS.items()}
            tag = f"lcray/{row['split']}"
            known = {name: value for name, value in values.items() if np.isfinite(value)}
            found = [{"tag": f"{tag}/{name}", "simple_value": v} for name, v in known.items()]
            yield row["end_step"], found
    if "layers" in results.tables:
        frame = results.layers()[["split", "layer", "end_step", "lc"]]
        for row in frame[frame["lc"].notna()].to_dict("records"):
            tag = f"lcray/{row['split']}/layers/{row['layer']}"
            yield row["end_step"], [{"tag": tag, "simple_value": row["lc"]}]


def _histograms(results: Results) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    if "histograms" not in results.tables:
        return
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    steps = np.array(results.plan.steps)
    keys = ["split", "window", "layer"]
    for key, rows in results.histograms().groupby(keys, observed=True):
        split, layer, window = key[0], key[2], int(str(key[1]))
        inside = (steps[:-1] >= window) & (steps[:-1] < window + results.plan.window)
        tag = f"lcray/{split}/histograms/{layer}"
        histogram = HistogramProto(**buckets(rows))
        yield int(steps[1:][inside][-1]), [{"tag": tag, "histo": histogram}]


def buckets(rows: pd.DataFrame) -> dict[str, Any]:
    """The signed LC of one layer and window in TensorBoard's form of histograms.

    Every recorded bin becomes a bucket; bins of helping elements are mirrored. Empty buckets fill
    the gaps. The sum of squares, which is not recorded, is computed from the bins' means, so it is
    a little below the true one.

    Args:
        rows: of `histograms`, for one layer and window.
    """
    top = np.finfo(np.float64).max
    sign, lower = rows["sign"].to_numpy(np.int64), rows["lower"].to_numpy(np.float64)
    upper = np.nan_to_num(rows["upper"].to_numpy(np.float64), nan=top)
    count, total = rows["count"].to_numpy(np.float64), rows["sum"].to_numpy(np.float64)
    left, right = np.where(sign < 0, -upper, lower), np.where(sign < 0, -lower, upper)
    order = np.lexsort((right, left))
    limits: list[float] = []
    counts: list[float] = []
    for i in order:
        if limits and limits[-1] == right[i]:  # zeros next to the smallest numbers of a sign
            counts[-1] += count[i]
            continue
        if not limits or limits[-1] < left[i]:
            limits.append(left[i])
            counts.append(0.0)
        limits.append(right[i])
        counts.append(count[i])
    mean = total / count
    return {
        "min": float(left.min()),
        "max": float(right.max()),
        "num": float(count.sum()),
        "sum": float((sign * total).sum()),
        "sum_squares": float((count * mean**2).sum()),
        "bucket_limit": limits,
        "bucket": counts,
    }
