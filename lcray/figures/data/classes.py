"""Which layer taught which class: LC by group and layer over the run."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.requirements import require
from lcray.tables.reading.results import Results

_FORM = tidy.schema(
    "class_layers",
    "split group layer",
    (
        tidy.SPLIT,
        tidy.count("group", "label of the items, such as their class"),
        tidy.LAYER,
        tidy.number("lc", tidy.LOSS, "LC of the mean loss over the group's own items"),
        tidy.number("weight", "1", "the group's share of the total weight"),
        tidy.number("share_of_layer", tidy.LOSS, "sum of lc * weight: adds up to the layer's LC"),
    ),
    "LC of every group's loss by layer, over the run",
)


def class_layers(results: Results) -> pa.Table:
    """Σ_t LC of each group's own mean loss, layer by layer.

    Args:
        results: the output; needs `groups`.

    Returns:
        One row for each split, group and layer, in the model's order.

    Raises:
        InapplicableError: if there is no table `groups`.
    """
    require(results, "groups")
    rows: list[dict[str, Any]] = results.sql_arrow("SELECT * FROM class_layers").to_pylist()
    splits = [split.name for split in results.plan.splits]
    layers = [layer.name for layer in results.plan.layers]
    rows.sort(key=lambda r: (splits.index(r["split"]), r["group"], layers.index(r["layer"])))
    return tidy.table(_FORM, rows, parameters={})
