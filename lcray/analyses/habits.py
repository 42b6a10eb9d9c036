"""How often each parameter helps, as a distribution over parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import tidy
from lcray.tables.reading.results import Results

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_NEAR_HALF = 0.05


def _name(quantile: float) -> str:
    """``q05`` for 0.05."""
    return f"q{100 * quantile:02.0f}"


_FORM = tidy.schema(
    "habits",
    "split layer denominator",
    (
        tidy.SPLIT,
        tidy.LAYER,
        tidy.text("denominator", "all: every interval; nonzero: those in which LC is not 0"),
        tidy.count("n", "parameter elements with such intervals"),
        tidy.number("mean", "1", "of the share of intervals in which an element helps"),
        tidy.number("sd", "1", "its standard deviation over elements"),
        tidy.number(
            "sd_if_independent",
            "1",
            "the sd if every element helped at each interval by chance, with probability mean",
        ),
        tidy.number("near_half", "1", "share of elements whose share is from 0.45 to 0.55"),
        *(tidy.number(_name(q), "1", f"quantile {q}") for q in QUANTILES),
    ),
    "share of intervals in which a parameter element helps, over elements",
)

_SQL = """
    SELECT split, layer, n_helping, n_helping + n_hurting AS nonzero, n_zero, count(*) AS n
    FROM parameters GROUP BY ALL ORDER BY ALL
"""


def habits(results: Results) -> pa.Table:
    """The distribution, over parameters, of the share of iterations at which each helps.

    Element i helps in a share p_i = n₋/(n₋ + n₊ + n₀) of the iterations, or n₋/(n₋ + n₊) without
    zeros. [LCA] (arXiv 1909.01440) finds that each parameter helps about half of the time. If every
    element helped by chance with the same probability p, the p_i would have variance
    p(1 − p)·E[1/m], with m the number of iterations of an element.

    Args:
        results: the output; needs `parameters`.

    Returns:
        One row for each split, layer (the network first, as "") and denominator. A quantile q is
        the least share that is not exceeded by at least a part q of the elements.

    Raises:
        UsageError: if there is no table `parameters`.
    """
    frame = results.sql(_SQL)
    layers = [tidy.ALL_LAYERS, *(layer.name for layer in results.plan.layers)]
    rows: list[dict[str, Any]] = []
    for split in results.plan.splits:
        of_split = frame[frame["split"] == split.name]
        for layer in layers:
            here = of_split if layer == tidy.ALL_LAYERS else of_split[of_split["layer"] == layer]
            rows += [{"split": split.name, "layer": layer, **row} for row in _rows(here)]
    return tidy.table(_FORM, rows, parameters={})


def _rows(here: pd.DataFrame) -> Iterator[dict[str, Any]]:
    counts = {name: here[name].to_numpy(np.float64) for name in ("n_helping", "nonzero", "n_zero")}
    number = here["n"].to_numpy(np.int64)
    ways = {"all": counts["nonzero"] + counts["n_zero"], "nonzero": counts["nonzero"]}
    for denominator, times in ways.items():
        some = times > 0
        if some.any():
            found = _distribution(counts["n_helping"][some], times[some], number[some])
            yield {"denominator": denominator, **found}


def _distribution(
    helping: NDArray[np.float64], times: NDArray[np.float64], number: NDArray[np.int64]
) -> dict[str, Any]:
    """The distribution of helping/times, each weighted by `number`."""
    order = np.argsort(helping / times, kind="stable")
    share, weight = (helping / times)[order], number[order]
    n = int(weight.sum())
    mean = float(share @ weight) / n
    below = np.cumsum(weight)
    ranks = [min(int(np.searchsorted(below, q * n)), len(share) - 1) for q in QUANTILES]
    near = np.abs(share - 0.5) <= _NEAR_HALF + 1e-12
    return {
        "n": n,
        "mean": mean,
        "sd": float(np.sqrt((share - mean) ** 2 @ weight / n)),
        "sd_if_independent": float(np.sqrt(mean * (1 - mean) * ((1 / times) @ number) / n)),
        "near_half": float(weight[near].sum()) / n,
        **{_name(q): share[r] for q, r in zip(QUANTILES, ranks, strict=True)},
    }
