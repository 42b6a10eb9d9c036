"""The `histograms` table as arrays, and the windows that can be merged from its base windows.

Legend: W base windows, L layers, B bins, E = B + 1 edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from lcray.analyses.requirements import only
from lcray.analyses.series import Floats, positions
from lcray.analyses.windows import Window, Windows
from lcray.errors import InapplicableError
from lcray.statistics.histograms import LOWEST, UNDERFLOW, bin_edges
from lcray.tables.reading.results import Results


@dataclass(frozen=True)
class Histograms:
    """The histograms of one split: C[window, layer, sign, bin], base windows in order.

    Attributes:
        lowest: number of the first bin that is not the underflow bin.
        edges: logarithms of the bins' edges, [E]; the first is -inf.
        windows: first steps of the base windows, [W].
        counts: [W, L, 2, B].
    """

    lowest: int
    edges: Floats
    windows: NDArray[np.int64]
    counts: Floats


def aligned(results: Results, chosen: Windows) -> tuple[Windows, list[str]]:
    """The windows that are unions of base windows, and a note about the other windows.

    Raises:
        InapplicableError: if there is no such window.
    """
    starts = np.array(results.plan.steps[:-1])
    base = starts // results.plan.window
    whole: list[Window] = []
    cut: list[Window] = []
    for item in chosen:
        inside = item.holds(starts)
        mixed = np.intersect1d(base[inside], base[~inside]).size
        (cut if mixed else whole).append(item)
    width = results.plan.window
    cure = f"choose multiples of {width}, or analyze with another --window into a new output"
    if not whole:
        raise InapplicableError(f"the windows cut histogram windows of {width} steps; {cure}")
    left_out = ", ".join(item.name for item in cut[:4]) + (", …" if len(cut) > 4 else "")
    note = f"no fits of {left_out}: histograms have windows of {width} steps; {cure}"
    return Windows(tuple(whole)), [note] if cut else []


def read_histograms(results: Results, split: str, names: Sequence[str]) -> Histograms | None:
    """The histograms of a split by sign, without exact zeros; None if there are none."""
    rows = results.arrow(
        "histograms",
        columns=["window", "layer", "sign", "bin", "count"],
        filters=only(split=split) & (pc.field("sign") != 0),
    )
    if not rows.num_rows:
        return None
    bins, counts = rows["bin"].to_numpy(), rows["count"].to_numpy()
    normal = bins != UNDERFLOW
    lo, hi = (int(bins[normal].min()), int(bins[normal].max())) if normal.any() else (LOWEST,) * 2
    lower, upper = bin_edges(np.arange(lo, hi + 1))
    edges = np.log(np.concatenate([lower, np.minimum(upper[-1:], np.finfo(float).max)]))
    # in the underflow bin, hence below the lowest edge: that is all that is used of them
    column = np.where(normal, bins - lo + 1, 0)
    windows, at = np.unique(rows["window"].to_numpy(), return_inverse=True)
    dense = np.zeros((len(windows), len(names), 2, hi - lo + 2))
    layer = positions(rows, "layer", names)
    sign = (rows["sign"].to_numpy() > 0).astype(int)
    known = layer >= 0
    dense[at[known], layer[known], sign[known], column[known]] = counts[known]
    return Histograms(lo, np.concatenate([[-np.inf], edges]), windows, dense)


def held(results: Results, item: Window, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which base windows, given by their first steps [W], are part of an aligned window."""
    starts = np.array(results.plan.steps[:-1])
    inside = {results.plan.window_of(int(start)) for start in starts[item.holds(starts)]}
    return np.isin(windows, sorted(inside))
