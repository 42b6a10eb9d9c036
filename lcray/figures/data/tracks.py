"""Weight, gradient and LC of a few elements, step by step, to show how they oscillate."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.requirements import layer_of, only, require, split_of
from lcray.errors import InapplicableError, UsageError
from lcray.tables.columns import column
from lcray.tables.reading.results import Results

_FORM = tidy.schema(
    "tracks",
    "split layer index step",
    (
        tidy.SPLIT,
        tidy.LAYER,
        tidy.count("index", "position in the layer's tensor, flattened row by row"),
        column("step", tidy.COUNT, "step", "of the checkpoint"),
        tidy.number("weight", "parameter", "value at the checkpoint"),
        tidy.number("gradient", "loss/parameter", "at the checkpoint"),
        tidy.number("lc", tidy.LOSS, "LC of the interval that starts here"),
    ),
    "weight, gradient and LC of a few elements, step by step",
)


def tracks(results: Results, layer: str, *, split: str | None = None, count: int = 6) -> pa.Table:
    """Weight, gradient and LC of the traced elements of a layer that move the loss most.

    Args:
        results: the output; needs `traces`.
        layer: its name.
        split: its name; None for ``train``, else the plan's first.
        count: number of elements; those with the largest Σ|LC| among the traced ones are taken.

    Returns:
        One row for each element and step.

    Raises:
        InapplicableError: if there is no table `traces`, or the layer is not in it.
        UsageError: for an unknown layer or split, or a count below 1.
    """
    require(results, "traces")
    if count < 1:
        raise UsageError(f"count {count}: must be at least 1")
    split = split_of(results, split)
    layer_of(results, layer, "traces", results.plan.detail_layers)
    columns = ["index", "step", "weight", "gradient", "lc"]
    table = results.arrow("traces", columns=columns, filters=only(split=split, layer=layer))
    if not table.num_rows:
        raise InapplicableError(f"table 'traces' has no element of layer {layer!r}")
    index = table["index"].to_numpy()
    elements, at = np.unique(index, return_inverse=True)
    traffic = np.bincount(at, np.abs(np.nan_to_num(table["lc"].to_numpy())))
    chosen = np.sort(elements[np.argsort(-traffic, kind="stable")[:count]])
    kept = table.filter(pa.array(np.isin(index, chosen)))
    found = {name: kept[name] for name in columns} | {"split": split, "layer": layer}
    note = f"the {len(chosen)} of {len(elements)} traced elements with the greatest sum of |LC|"
    return tidy.from_columns(_FORM, [found], parameters={"count": count}, notes=[note])
