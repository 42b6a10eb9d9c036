"""Series of LC over intervals: of layers, of groups, and of the layers for a group's loss.

Legend: T intervals, L layers, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lcray.analyses.series import Floats, layer_series, positions, scattered
from lcray.planning.plan import SplitPlan
from lcray.tables.reading.results import Results

#: The possible kinds of series in a bundle.
LAYERS, GROUPS = "layer", "group"


@dataclass(frozen=True)
class Bundle:
    """Series of LC that are tested for learning at the same time.

    Attributes:
        split: the split.
        kind: what the series are: ``layer`` or ``group``.
        group: the group whose loss the layers' LC is for; None for the whole split's loss.
        names: of the series, which are layers or groups as text, [S].
        starts: start steps, [T].
        lc: [T, S]; NaN if there is none.
    """

    split: str
    kind: str
    group: int | None
    names: tuple[str, ...]
    starts: NDArray[np.int64]
    lc: Floats

    @property
    def known(self) -> NDArray[np.bool_]:
        """The intervals at which any series has LC, [T]."""
        return np.asarray(np.isfinite(self.lc).any(axis=1))

    def part(self, here: NDArray[np.bool_]) -> Bundle:
        """The intervals `here`, [T]."""
        return replace(self, starts=self.starts[here], lc=self.lc[here])


def bundles(results: Results, groups: bool = True) -> Iterator[Bundle]:
    """For each split: its layers; then, if it has `groups`, the groups, and the layers of each.

    A group's series is LC of its own mean loss, summed over the layers. Buffers are left out.
    """
    series = layer_series(results, ["lc"])
    for s, split in enumerate(series.splits):
        yield Bundle(split, LAYERS, None, series.layers, series.starts, series["lc"][s])
        planned = results.plan.splits[s]
        if not (groups and planned.groups and "groups" in results.tables):
            continue
        lc = _by_group(results, planned, series.layers, series.starts)
        names = tuple(map(str, planned.groups))
        yield Bundle(split, GROUPS, None, names, series.starts, lc.sum(axis=2))
        for g, group in enumerate(planned.groups):
            yield Bundle(split, LAYERS, group, series.layers, series.starts, lc[:, g])


def _by_group(
    results: Results, split: SplitPlan, layers: tuple[str, ...], starts: NDArray[np.int64]
) -> Floats:
    """LC of each group's own mean loss, [T, G, L]."""
    columns = ["split", "layer", "start_step", "group", "lc"]
    table = results.arrow("groups", columns=columns)
    layer, mine = positions(table, "layer", layers), positions(table, "split", [split.name])
    g = pd.Index(split.groups).get_indexer(table["group"].to_numpy())
    t = pd.Index(starts).get_indexer(table["start_step"].to_numpy())
    here = (mine == 0) & (layer >= 0) & (g >= 0) & (t >= 0)
    shape, place = (len(starts), len(split.groups), len(layers)), (t[here], g[here], layer[here])
    return scattered(shape, place, table["lc"].to_numpy()[here])
