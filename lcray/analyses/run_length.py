"""The distribution of the lengths of runs of equal sign."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.trace_arrays import sampled_layers
from lcray.statistics.sign_runs import run_lengths as lengths_of
from lcray.tables.reading.results import Results

_FORM = tidy.schema(
    "run_lengths",
    "split layer quantity length",
    (
        tidy.SPLIT,
        tidy.LAYER,
        tidy.text("quantity", "lc, displacement or gradient (at the start of the interval)"),
        tidy.count("length", "of a run of one sign, in intervals"),
        tidy.count("n_complete", "runs of this length between two flips"),
        tidy.count(
            "n_cut",
            "runs of this length that touch an end of the run, a sign of 0 or an interval without "
            "LC, and may be longer",
        ),
    ),
    "runs of equal sign of the traced sample, by layer and length",
)


def run_lengths(results: Results) -> pa.Table:
    """Lengths of runs of equal sign of LC, movements and gradients, over the whole run.

    A run is a maximal sequence of intervals in which an element's value has the same sign, not 0. A
    run between two flips is complete: its length is a half-period. With independent signs, a share
    of 2^−n of them has length n.

    Args:
        results: the output; needs `traces`.

    Returns:
        One row for each split, layer, quantity and length that occurs.
    """
    blocks: list[dict[str, Any]] = []
    for sample in sampled_layers(results):
        for quantity, values in sample.quantities().items():
            found = lengths_of(values)
            head = {"split": sample.split, "layer": sample.layer, "quantity": quantity}
            counts = {"n_complete": found.complete, "n_cut": found.cut}
            blocks.append(head | {"length": found.length} | counts)
    return tidy.from_columns(_FORM, blocks, parameters={})
