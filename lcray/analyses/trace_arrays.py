"""The seeded sample of elements in `traces` as arrays, layer by layer.

Legend: T intervals, N elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lcray.analyses.series import Floats, scattered
from lcray.tables.reading.results import Results
from lcray.tables.reading.views import literal
from lcray.tables.writing.traced_elements import trace_indices


@dataclass(frozen=True)
class Sampled:
    """The traced elements of a layer, on all intervals of the plan; NaN if a value is unknown.

    Attributes:
        split: the split.
        layer: the layer.
        starts: start steps, [T].
        lc: of each element, in units of the loss, [T, N].
        displacement: its movement, [T, N]; NaN where the interval has no LC.
        gradient: at the start of the interval, [T, N].
    """

    split: str
    layer: str
    starts: NDArray[np.int64]
    lc: Floats
    displacement: Floats
    gradient: Floats

    def quantities(self) -> dict[str, Floats]:
        """LC, displacement and gradient by name."""
        return {"lc": self.lc, "displacement": self.displacement, "gradient": self.gradient}


def sampled_layers(results: Results) -> Iterator[Sampled]:
    """Each split's layers in the plan's order, read one by one.

    Elements that ``--trace`` names are left out, unless they are also in the sample.

    Raises:
        UsageError: if the output has no `traces`.
        CorruptionError: if it cannot be read.
    """
    plan = results.plan
    chosen = trace_indices(plan, sample_only=True)
    for split in plan.splits:
        for number, index in chosen.items():
            found = _read(results, split.name, plan.layers[number].name, index)
            if found is not None:
                yield found


def _read(results: Results, split: str, layer: str, index: NDArray[np.int64]) -> Sampled | None:
    # DuckDB reads the row groups of this layer alone.
    table = results.sql_arrow(
        f"""SELECT index, step, weight, gradient, lc FROM traces
        WHERE split = {literal(split)} AND layer = {literal(layer)}"""
    )
    steps = np.array(results.plan.steps)
    n = pd.Index(index).get_indexer(table["index"].to_numpy())
    t = pd.Index(steps).get_indexer(table["step"].to_numpy())
    here = (n >= 0) & (t >= 0)
    if not here.any():
        return None
    shape, place = (len(steps), len(index)), (t[here], n[here])
    weight, gradient, lc = (
        scattered(shape, place, table[name].to_numpy()[here])
        for name in ("weight", "gradient", "lc")
    )
    displacement = np.where(np.isnan(lc[:-1]), np.nan, np.diff(weight, axis=0))
    return Sampled(split, layer, steps[:-1], lc[:-1], displacement, gradient[:-1])
