"""The distribution of |LC|, bin by bin, with the densities of fitted distributions.

Legend: L layers, B bins, E = B + 1 edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.histogram_arrays import Histograms, read_histograms
from lcray.analyses.requirements import require
from lcray.analyses.series import Floats
from lcray.errors import UsageError
from lcray.statistics.families import FAMILIES, Family
from lcray.statistics.likelihood import fit_bins
from lcray.tables.columns import SIGN, column
from lcray.tables.reading.results import Results

_FINEST = 8  # bins per octave
_SIGNS = (-1, 1)

_FORM = tidy.schema(
    "densities",
    "split layer sign lower",
    (
        tidy.SPLIT,
        tidy.LAYER,
        column("sign", SIGN, "1", "-1 helps, +1 hurts"),
        tidy.number("lower", tidy.LOSS, "lower edge of the bin of |LC|, inclusive"),
        tidy.number("upper", tidy.LOSS, "upper edge, exclusive"),
        tidy.count("count", "parameter elements x intervals in the bin"),
        tidy.number("density", "1", "of ln |LC|: share of the sign's elements / ln(upper/lower)"),
        *(
            tidy.number(family.name, "1", f"the same of the {family.name} that fits, by its mass")
            for family in FAMILIES
        ),
    ),
    "distribution of |LC| over the run, and the distributions that fit it",
)


def densities(results: Results, *, per_octave: int = 4) -> pa.Table:
    """The density of ln |LC| over the run by sign, and the densities of fitted distributions.

    The fits are those of the finding `fits` to bins: maximum likelihood over the recorded bins,
    eight per octave, whatever `per_octave` is.

    Args:
        results: the output; needs `histograms`.
        per_octave: bins per octave: 1, 2, 4 or 8.

    Returns:
        One row for each split, layer (the network first, as ""), sign and bin that is not empty.
        Exact zeros and subnormal numbers are left out. A density is null if there is no fit.

    Raises:
        InapplicableError: if there is no table `histograms`.
        UsageError: for another number of bins.
    """
    require(results, "histograms")
    if per_octave not in (1, 2, 4, _FINEST):
        raise UsageError(f"per_octave {per_octave}: give 1, 2, 4 or {_FINEST}")
    names = list(results.plan.detail_layers)
    blocks: list[dict[str, Any]] = []
    for split in results.plan.splits:
        found = read_histograms(results, split.name, names)
        if found is not None:
            blocks += _of_split(split.name, names, found, _FINEST // per_octave)
    return tidy.from_columns(_FORM, blocks, parameters={"per_octave": per_octave})


def _of_split(
    split: str, names: list[str], found: Histograms, factor: int
) -> Iterator[dict[str, Any]]:
    counts = found.counts.sum(axis=0)
    counts = np.concatenate([counts.sum(axis=0, keepdims=True), counts])
    rows = counts.reshape(-1, counts.shape[-1])
    edges, wide = _widened(found.lowest, rows, factor)
    fitted = [_mass(family, found.edges, rows, edges) for family in FAMILIES]
    keys = itertools.product([tidy.ALL_LAYERS, *names], _SIGNS)
    n = rows.sum(axis=1)
    for row, (layer, sign) in enumerate(keys):
        some = wide[row] > 0
        width = np.diff(edges)[some]
        yield {
            "split": split,
            "layer": layer,
            "sign": sign,
            "lower": np.exp(edges[:-1][some]),
            "upper": np.exp(edges[1:][some]),
            "count": wide[row][some].astype(np.int64),
            "density": wide[row][some] / n[row] / width if n[row] else width,
            **{f.name: fitted[i][row][some] / width for i, f in enumerate(FAMILIES)},
        }


def _mass(family: Family, edges: Floats, counts: Floats, wide: Floats) -> Floats:
    """Probabilities of the bins between the edges `wide` [E], by the fit to each row [rows, E − 1].

    NaN if there is no fit.
    """
    theta = fit_bins(family, edges, counts).theta
    with np.errstate(under="ignore", invalid="ignore"):
        return np.asarray(np.exp(family.log_mass(theta, wide)))


def _widened(first: int, counts: Floats, factor: int) -> tuple[Floats, Floats]:
    """Bins that are `factor` times as wide, aligned to octaves, without the underflow bin."""
    counts, lead = counts[:, 1:], first % factor
    around = (lead, -(lead + counts.shape[1]) % factor)
    wide = np.pad(counts, ((0, 0), around))
    numbers = np.arange(first - lead, first - lead + wide.shape[1] + 1, factor)
    # edges are (1 + m/8)·2^e, and their numbers m + 8e
    edges = np.log1p(numbers % _FINEST / _FINEST) + numbers // _FINEST * np.log(2.0)
    return edges, wide.reshape(len(wide), -1, factor).sum(axis=-1)
