"""LC of layers over repeated runs: whether they help or hurt, and whether two conditions differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy.stats import (
    false_discovery_control,
    permutation_test,
    t,
    ttest_1samp,
    ttest_ind,
)

from lcray.analyses import tidy
from lcray.analyses.series import Floats, layer_series, with_network
from lcray.analyses.windows import Ranges, Windows
from lcray.errors import UsageError
from lcray.storage import PlaceLike
from lcray.tables.reading.results import Results, open_output

#: The least number of runs per condition that gives a p-value.
FEWEST_RUNS = 6
#: Values of `condition`: the first outputs, the outputs they are compared with, first minus second.
FIRST, SECOND, DIFFERENCE = "first", "second", "difference"
_RESAMPLES = 9999
_SAME = 1e-4  # relative: analyses of the same run are this close, of two seeds never
_SPREAD = ("se", "low", "high")  # of LC, as their columns say
_ADJUSTMENTS = ("bh", "by")

_FORM = tidy.schema(
    "compare",
    "split first_step end_step window layer condition",
    (
        tidy.SPLIT,
        *tidy.WINDOW,
        tidy.LAYER,
        tidy.text("condition", f"{FIRST}, {SECOND}, or {DIFFERENCE}: first - second"),
        tidy.count("n", "outputs of the condition; for the difference those of the smaller one"),
        tidy.number("lc", tidy.LOSS, "mean over the outputs of the layer's LC, or the difference"),
        tidy.number("lc_se", tidy.LOSS, "its standard error over the outputs"),
        tidy.number("lc_low", tidy.LOSS, "lower end of its confidence interval, by Student's t"),
        tidy.number("lc_high", tidy.LOSS, "upper end of its confidence interval"),
        tidy.number("p_t", "1", f"two-sided t-test against 0; null below {FEWEST_RUNS} outputs"),
        tidy.number("p_permutation", "1", "two-sided permutation test; null likewise"),
        tidy.number("p_t_adjusted", "1", "p_t, for all layers (false discovery rate)"),
        tidy.number("p_permutation_adjusted", "1", "p_permutation, likewise"),
    ),
    "LC of every layer over repeated runs, and the difference between two conditions",
)


@dataclass(frozen=True)
class Test:
    """Mean, standard error and tests of a layer over runs.

    Attributes:
        lc: the mean, or the difference of two.
        se: its standard error; NaN below two runs.
        low: lower end of its confidence interval; NaN below two runs.
        high: upper end; NaN below two runs.
        p_t: two-sided; NaN below `FEWEST_RUNS` runs, and if all runs are equal.
        p_permutation: two-sided; NaN below `FEWEST_RUNS` runs.
    """

    lc: float
    se: float
    low: float
    high: float
    p_t: float
    p_permutation: float


def compare(
    *outs: PlaceLike,
    against: Sequence[PlaceLike] = (),
    paired: bool = False,
    window: int | None = None,
    windows: Ranges | None = None,
    level: float = 0.95,
    adjust: str = "bh",
    seed: int = 0,
) -> pa.Table:
    """LC of every layer over the outputs of repeated runs (other seeds), and between conditions.

    With one condition, this is the mean of the layer's LC over the runs, its standard error, and
    whether it differs from 0, by Student's t and by flipping signs. With two conditions (e.g. with
    and without a frozen layer, or two values of momentum), this is also the difference of the
    means, by Welch's t and by exchanging runs between the conditions. If runs are paired, the
    t-test of the differences and flipping their signs are used. All permutations are used if there
    are at most 9,999, else 9,999 of them. P-values are adjusted for the layers of a split, window
    and condition (Benjamini & Hochberg 1995, or Yekutieli 2001). [LCA] (arXiv 1909.01440, section
    4.2) repeats runs in this way.

    Fewer than six runs give no p-value: flipping the signs of five cannot go below 1/16. Intervals
    without LC count as 0, and a note names the outputs that have any.

    Args:
        *outs: outputs of one condition.
        against: outputs of the other condition; empty for none.
        paired: whether the outputs of both conditions share seeds, in their order.
        window: as in `Windows.of`, for the first output; None for the whole run alone.
        windows: as in `Windows.of`.
        level: of the confidence intervals.
        adjust: ``bh``, or ``by`` for any dependence between layers.
        seed: of the permutations that are drawn.

    Returns:
        One row for each split, window, layer (empty for the network) and condition.

    Raises:
        UsageError: if the outputs differ in splits, layers or steps, if two are of the same run, or
            if parameters or pairs are not valid.
        OutputError: if a path is not an output, or has no tables.
    """
    if adjust not in _ADJUSTMENTS:
        raise UsageError(f"adjust {adjust!r}: must be one of {', '.join(_ADJUSTMENTS)}")
    if not 0 < level < 1:
        raise UsageError(f"level {level:g}: must be between 0 and 1")
    first, second = ([open_output(out) for out in group] for group in (outs, against))
    _check(first, second, paired)
    chosen = Windows.whole(first[0].plan.steps)
    if window is not None or windows:
        chosen = Windows.of(first[0], window, windows)
    layers = (tidy.ALL_LAYERS, *(layer.name for layer in first[0].plan.layers))
    notes: list[str] = []
    totals = [_totals(group, chosen, notes) for group in (first, second) if group]
    _check_distinct([*first, *second], np.concatenate(totals))
    blocks: list[dict[str, Any]] = []
    for s, split in enumerate(first[0].plan.splits):
        for w, item in enumerate(chosen):
            head = {"split": split.name, **item.columns}
            samples = [total[:, s, w] for total in totals]
            for condition, tests, n in _conditions(samples, paired, level, seed):
                of_layers = {"condition": condition, "n": n, "layer": [*layers]}
                blocks.append(head | of_layers | _columns(tests, adjust))
    if min(len(group) for group in (first, second) if group) < FEWEST_RUNS:
        notes.append(f"no p-values where a condition has fewer than {FEWEST_RUNS} runs")
    parameters = {"paired": paired, "level": level, "adjust": adjust, "seed": seed}
    names = {FIRST: [str(r.path) for r in first], SECOND: [str(r.path) for r in second]}
    return tidy.from_columns(_FORM, blocks, parameters=parameters | names, notes=notes)


def _check(first: Sequence[Results], second: Sequence[Results], paired: bool) -> None:
    if not first:
        raise UsageError("compare: give the outputs of repeated runs")
    every = [*first, *second]
    places = [str(results.path) for results in every]
    twice = [place for place in places if places.count(place) > 1]
    if twice:
        raise UsageError(f"{twice[0]}: is given twice; every output counts as a separate run")
    if paired and len(first) != len(second):
        raise UsageError(
            f"paired: {len(first)} outputs against {len(second)}; give pairs, in the same order"
        )
    check_alike(every)


def _check_distinct(every: Sequence[Results], totals: Floats) -> None:
    """Refuse two outputs of the same run: their LC is alike in every layer, unlike two seeds."""
    for j, second in enumerate(totals):
        for i, first in enumerate(totals[:j]):
            scale = _SAME * np.abs(first).max()
            if scale > 0 and np.allclose(first, second, rtol=_SAME, atol=scale):
                raise UsageError(
                    f"{every[j].path}: analyzes the same run as {every[i].path}, by the LC of its "
                    "layers; every output counts as a separate run"
                )


def check_alike(every: Sequence[Results]) -> None:
    """Refuse outputs whose layers cannot be compared one by one.

    Raises:
        UsageError: if splits, layers or steps differ.
    """
    for results in every[1:]:
        for what, of in _SHARED.items():
            if of(results) != of(every[0]):
                raise UsageError(
                    f"{results.path}: has other {what} than {every[0].path}; compare outputs of "
                    "one task and length"
                )


_SHARED: Mapping[str, Callable[[Results], Any]] = {
    "splits": lambda results: [split.name for split in results.plan.splits],
    "layers": lambda results: [(la.name, la.shape) for la in results.plan.layers],
    "steps": lambda results: results.plan.steps,
}


def _totals(group: Sequence[Results], chosen: Windows, notes: list[str]) -> Floats:
    """LC by run, split, window and layer, [R, S, W, 1 + L]; layer 0 is the whole network.

    Intervals without LC count as 0; `notes` gets one line for each run and split that has any.
    """
    found = []
    for results in group:
        series = layer_series(results, ["lc"], ("parameter", "buffer"))
        for split, ok in zip(series.splits, series.ok, strict=True):
            without = results.plan.n_intervals - int(ok.sum())
            if without:
                notes.append(
                    f"{results.path}: {split}: {without} intervals have no LC and count as 0"
                )
        lc = with_network(np.where(series.ok[..., None], series["lc"], 0.0))
        found.append(np.stack([lc[:, w.holds(series.starts)].sum(axis=1) for w in chosen], axis=1))
    return np.stack(found)


def _conditions(
    samples: Sequence[Floats], paired: bool, level: float, seed: int
) -> Iterator[tuple[str, list[Test], int]]:
    """The tests of each layer, condition by condition; samples are [R, L]."""
    for condition, sample in zip((FIRST, SECOND), samples, strict=False):
        yield condition, [one_condition(x, level, seed) for x in sample.T], len(sample)
    if len(samples) == 2:
        columns = zip(samples[0].T, samples[1].T, strict=True)
        tests = [two_conditions(x, y, paired=paired, level=level, seed=seed) for x, y in columns]
        yield DIFFERENCE, tests, min(map(len, samples))


def one_condition(x: Floats, level: float = 0.95, seed: int = 0) -> Test:
    """Whether the mean of `x` [R] differs from 0."""
    n = len(x)
    se = float(x.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    p_t = p_permutation = np.nan
    if n >= FEWEST_RUNS:
        p_t = float(ttest_1samp(x, 0.0).pvalue) if se > 0 else np.nan
        found = permutation_test(
            (x,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, rng=seed
        )
        p_permutation = float(found.pvalue)
    return _test(float(x.mean()), se, n - 1, level, p_t, p_permutation)


def two_conditions(
    x: Floats, y: Floats, *, paired: bool = False, level: float = 0.95, seed: int = 0
) -> Test:
    """Whether the means of `x` [R] and `y` [R'] differ."""
    if paired:
        return one_condition(x - y, level, seed)
    difference, fewest = float(x.mean() - y.mean()), min(len(x), len(y))
    if fewest < 2:
        return _test(difference, np.nan, 0, level, np.nan, np.nan)
    parts = [z.var(ddof=1) / len(z) for z in (x, y)]
    se = float(np.sqrt(sum(parts)))
    freedom = (
        sum(parts) ** 2 / sum(part**2 / (len(z) - 1) for part, z in zip(parts, (x, y), strict=True))
        if se > 0
        else 0.0
    )
    p_t = p_permutation = np.nan
    if fewest >= FEWEST_RUNS:
        p_t = float(ttest_ind(x, y, equal_var=False).pvalue) if se > 0 else np.nan
        found = permutation_test(
            (x, y), _difference, vectorized=True, n_resamples=_RESAMPLES, rng=seed
        )
        p_permutation = float(found.pvalue)
    return _test(difference, se, float(freedom), level, p_t, p_permutation)


def _difference(x: Floats, y: Floats, axis: int = -1) -> Floats:
    return np.asarray(np.mean(x, axis=axis) - np.mean(y, axis=axis))


def _test(
    lc: float, se: float, freedom: float, level: float, p_t: float, p_permutation: float
) -> Test:
    if not se >= 0:
        return Test(lc, np.nan, np.nan, np.nan, p_t, p_permutation)
    reach = se * float(t.ppf((1 + level) / 2, freedom)) if se > 0 else 0.0
    return Test(lc, se, lc - reach, lc + reach, p_t, p_permutation)


def _columns(tests: Sequence[Test], adjust: str) -> dict[str, Floats]:
    """The columns of one condition: tests of the network and of each layer."""
    columns = {
        f"lc_{name}" if name in _SPREAD else name: np.array([vars(test)[name] for test in tests])
        for name in vars(tests[0])
    }
    for name in ("p_t", "p_permutation"):
        adjusted, known = np.full(len(tests), np.nan), np.isfinite(columns[name])
        known[0] = False  # the whole network is not one more layer to adjust for
        if known.any():
            method: Literal["bh", "by"] = "by" if adjust == "by" else "bh"
            adjusted[known] = false_discovery_control(columns[name][known], method=method)
        columns[f"{name}_adjusted"] = adjusted
    return columns
