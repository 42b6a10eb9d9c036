"""Synchrony: whether layers, and classes, learn most at the same iterations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import tidy
from lcray.analyses.learning import Bundle, bundles
from lcray.analyses.windows import Ranges, Windows
from lcray.errors import UsageError
from lcray.statistics.coincidence import (
    block_bounds,
    pairwise_coincidences,
    peaks,
    total_coincidences,
)
from lcray.tables.columns import COUNT, column
from lcray.tables.reading.results import Results

_KIND = tidy.text("kind", "what the series are: layer (parameters only), or group")
_GROUP = column(
    "group", COUNT, "1", "whose own mean loss LC is of; null for the split's", nullable=True
)
_PEAKS = 20
_FEWEST = 3  # intervals: fewer have no local minimum

_TOTAL = tidy.schema(
    "synchrony",
    "split first_step end_step window kind group",
    (
        tidy.SPLIT,
        *tidy.WINDOW,
        _KIND,
        _GROUP,
        tidy.count("n_series", "layers or groups"),
        tidy.count("n_peaks", "peaks of all series"),
        tidy.count("coincidences", "pairs of series that peak at the same interval, over all"),
        tidy.number("expected", "1", "the mean number by chance"),
        tidy.number("ratio", "1", "coincidences / expected"),
        tidy.number("p_value", "1", "of as many or more by chance"),
        tidy.number("block", "interval", "mean length of the blocks within which peaks permute"),
    ),
    "whether layers, and groups, have their peaks of learning at the same intervals",
)
_PAIRS = tidy.schema(
    "coincidences",
    "split kind group a b",
    (
        tidy.SPLIT,
        _KIND,
        _GROUP,
        tidy.text("a", "a layer or group"),
        tidy.text("b", "another, or the same: then the coincidences are its peaks"),
        tidy.count("coincidences", "intervals at which both have a peak"),
        tidy.number("expected", "1", "the mean number by chance"),
        tidy.number("p_value", "1", "of as many or more by chance"),
        tidy.number("p_adjusted", "1", "for all pairs of the matrix (Benjamini and Hochberg)"),
    ),
    "coincident peaks of learning over the run: matrices of layers, and of groups",
)
_LIST = tidy.schema(
    "peaks",
    "split kind group series start_step",
    (
        tidy.SPLIT,
        _KIND,
        _GROUP,
        tidy.text("series", "the layer or group"),
        tidy.count("start_step", "of the interval"),
        tidy.number("lc", tidy.LOSS, "LC of the series there"),
    ),
    "peaks of learning over the run",
)


def synchrony(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    count: int | None = None,
    prominence: float | None = None,
    distance: int = 1,
    block: int | None = None,
    permutations: int = 999,
) -> pa.Table:
    """Whether the peaks of −LC of layers, and of groups such as classes, coincide.

    A peak is a local minimum of LC below 0; the `count` deepest peaks of each series are taken, as
    in [LCA] (arXiv 1909.01440, section 4.4). The number of coincidences is Σ_t n_t(n_t − 1)/2, with
    n_t the number of series with a peak at interval t. The number by chance comes from
    permutations: each series' peaks are permuted separately, within blocks of consecutive
    intervals, so that a rate of peaks that all series share does not count as synchrony
    (`lcray.statistics.coincidence`). Intervals without LC are left out of the blocks. Tests are
    one-sided.

    All series share their mini-batches. Peaks at the same interval mean that the same samples
    taught them, or that they depend on each other; the test does not say which.

    Args:
        results: the output; needs `layers`, and uses `groups` if it has them.
        window: as in `Windows.of`.
        windows: as in `Windows.of`; peaks are chosen within each.
        seed: of the permutations.
        count: the most peaks of a series; None for 20, but at most a tenth of the intervals.
        prominence: the least height of a peak above its neighbouring saddles, in standard
            deviations of its series; None for no condition.
        distance: the least number of intervals between two peaks of a series.
        block: intervals per block; None for a twentieth of the window, but 10 to 50. Blocks must be
            short compared with the time over which the rate of peaks changes.
        permutations: the number of permutations for the p-values.

    Returns:
        One row for each split, window, kind of series, and group whose layers they are.

    Raises:
        UsageError: for invalid windows or parameters.
    """
    options = _options(count=count, distance=distance, block=block, prominence=prominence)
    if permutations < 1:
        raise UsageError(f"permutations {permutations}: must be at least 1")
    chosen = Windows.of(results, window, windows)
    rows: list[dict[str, Any]] = []
    for bundle in bundles(results):
        for item in chosen:
            part = bundle.part(item.holds(bundle.starts))
            flags = _peaks(part, options)[part.known]
            if len(flags) < _FEWEST:
                continue
            found = total_coincidences(flags, block=block, permutations=permutations, seed=seed)
            row = {
                "n_series": flags.shape[1],
                "n_peaks": int(flags.sum()),
                "coincidences": found.observed,
                "expected": found.expected,
                "ratio": found.observed / found.expected if found.expected else None,
                "p_value": found.p_value if found.expected else None,
                "block": len(flags) / (len(block_bounds(len(flags), block)) - 1),
            }
            rows.append(_head(bundle) | item.columns | row)
    more = {"seed": seed, "permutations": permutations}
    return tidy.table(_TOTAL, rows, parameters=options | more)


def coincidences(
    results: Results,
    *,
    count: int | None = None,
    prominence: float | None = None,
    distance: int = 1,
    block: int | None = None,
    groups: bool = True,
) -> pa.Table:
    """The matrices layer × layer, group × group, and layer × layer of each group, over the run.

    Peaks and chance are as in `synchrony`. P-values are exact: in each block, the number of
    coincidences of a pair is hypergeometric. They are adjusted for the pairs of a matrix.

    Args:
        results: the output; needs `layers`, and uses `groups` if it has them.
        count: as in `synchrony`.
        prominence: as in `synchrony`.
        distance: as in `synchrony`.
        block: as in `synchrony`.
        groups: whether to include groups, if the output has them.

    Returns:
        One row for each pair a, b, in both orders, and for a = b.

    Raises:
        UsageError: for invalid parameters.
    """
    options = _options(count=count, distance=distance, block=block, prominence=prominence)
    blocks: list[dict[str, Any]] = []
    for bundle in bundles(results, groups):
        flags = _peaks(bundle, options)[bundle.known]  # no chance peaks without LC
        if len(flags) >= _FEWEST:
            blocks.append(_head(bundle) | _matrix(bundle.names, flags, block))
    return tidy.from_columns(_PAIRS, blocks, parameters=options)


def peaks_of_learning(
    results: Results,
    *,
    count: int | None = None,
    prominence: float | None = None,
    distance: int = 1,
    groups: bool = True,
) -> pa.Table:
    """The peaks that `coincidences` counts: when each layer, and each group, learned most.

    Args:
        results: the output; needs `layers`, and uses `groups` if it has them.
        count: as in `synchrony`.
        prominence: as in `synchrony`.
        distance: as in `synchrony`.
        groups: whether to include groups, if the output has them.

    Returns:
        One row for each peak.

    Raises:
        UsageError: for invalid parameters.
    """
    options = _options(count=count, distance=distance, block=None, prominence=prominence)
    blocks: list[dict[str, Any]] = []
    for bundle in bundles(results, groups):
        series, t = np.nonzero(_peaks(bundle, options).T)
        place = {"series": (series, list(bundle.names)), "start_step": bundle.starts[t]}
        blocks.append(_head(bundle) | place | {"lc": bundle.lc[t, series]})
    return tidy.from_columns(_LIST, blocks, parameters=options)


def _options(*, prominence: float | None, **numbers: int | None) -> dict[str, Any]:
    """The choice of peaks, and of the blocks within which they permute, for the metadata."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
    if prominence is not None and not prominence > 0:
        raise UsageError(f"prominence {prominence:g}: must be above 0")
    return {**numbers, "prominence": prominence}


def _peaks(bundle: Bundle, options: dict[str, Any]) -> NDArray[np.bool_]:
    how = {name: options[name] for name in ("count", "prominence", "distance")}
    how["count"] = how["count"] or min(_PEAKS, max(1, int(bundle.known.sum()) // 10))
    return peaks(bundle.lc, **how)


def _head(bundle: Bundle) -> dict[str, Any]:
    return {"split": bundle.split, "kind": bundle.kind, "group": bundle.group}


def _matrix(names: tuple[str, ...], flags: NDArray[np.bool_], block: int | None) -> dict[str, Any]:
    """The columns of all pairs, in both orders; a series coincides with itself at its peaks."""
    found = pairwise_coincidences(flags, block=block)
    from scipy.stats import false_discovery_control  # slow to import

    p_value = found.p_value
    adjusted = false_discovery_control(p_value) if len(p_value) else p_value
    a, b = (i.ravel() for i in np.indices((len(names),) * 2))
    columns: dict[str, Any] = {"a": (a, list(names)), "b": (b, list(names))}
    own, nothing = flags.sum(axis=0), np.full(len(names), np.nan)
    values = {
        "coincidences": (own, found.observed),
        "expected": (nothing, found.expected),
        "p_value": (nothing, found.p_value),
        "p_adjusted": (nothing, adjusted),
    }
    for name, (diagonal, value) in values.items():
        matrix = np.diag(diagonal)
        matrix[found.first, found.second] = matrix[found.second, found.first] = value
        columns[name] = matrix.ravel()
    return columns
