"""Cumulative LC of every layer along the run."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.series import layer_series, with_network
from lcray.errors import UsageError
from lcray.tables.reading.results import Results

_FORM = tidy.schema(
    "trajectories",
    "split layer step",
    (
        tidy.SPLIT,
        tidy.LAYER,
        tidy.count("step", "of the checkpoint that the sum reaches"),
        tidy.number("lc", tidy.LOSS, "LC of the layer from the first checkpoint to this one"),
    ),
    "cumulative LC of every layer",
)


def trajectories(results: Results, *, points: int = 1000) -> pa.Table:
    """Σ_{t' ≤ t} LC of each layer: how the totals of `layer_totals` build up over the run.

    Intervals without LC count as 0.

    Args:
        results: the output; needs `layers`.
        points: the most steps, evenly spaced; the last step is always included.

    Returns:
        One row for each split, layer (empty for the network) and step.

    Raises:
        UsageError: for fewer points than 1.
    """
    if points < 1:
        raise UsageError(f"points {points}: must be at least 1")
    series = layer_series(results, ["lc"], ("parameter", "buffer"))
    total = np.cumsum(with_network(np.nan_to_num(series["lc"])), axis=1)
    n = len(series.ends)
    kept = np.unique(np.linspace(n - 1, 0, min(points, n)).round().astype(np.int64))
    kept = kept if points > 1 else kept[-1:]
    names = [tidy.ALL_LAYERS, *series.layers]
    lc = total[:, kept].transpose(0, 2, 1)
    split, layer, point = (i.ravel() for i in np.indices(lc.shape))
    columns = {
        "split": (split, list(series.splits)),
        "layer": (layer, names),
        "step": series.ends[kept][point],
        "lc": lc.ravel(),
    }
    return tidy.from_columns(_FORM, [columns], parameters={"points": points})
