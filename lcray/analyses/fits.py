"""The distribution of |LC|: four distributions fitted to every layer, sign and window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import tidy
from lcray.analyses.histogram_arrays import Histograms, aligned, held, read_histograms
from lcray.analyses.requirements import only
from lcray.analyses.series import Floats, positions
from lcray.analyses.windows import RUN, Ranges, Windows
from lcray.statistics.bootstrap import Bootstrap, block_length
from lcray.statistics.families import FAMILIES, Family
from lcray.statistics.likelihood import (
    Estimates,
    covariance,
    distance,
    fit_bins,
    fit_samples,
    simulated_distances,
    slopes,
)
from lcray.tables.columns import SIGN, column
from lcray.tables.reading.results import Results

#: The most values in `elements` that are read; if there are more, histograms are used.
EXACT = 500_000
_CELLS = 1 << 22  # of the histograms that are fitted together
_SIGNS = (-1, 1)

_FORM = tidy.schema(
    "fits",
    "split first_step end_step window layer sign distribution",
    (
        tidy.SPLIT,
        *tidy.WINDOW,
        tidy.LAYER,
        column("sign", SIGN, "1", "-1 helps, +1 hurts"),
        tidy.text("distribution", "fitted to |LC| of this sign"),
        tidy.text("source", "elements: exact values; histograms: values in bins"),
        tidy.count("n", "values: parameter elements x intervals"),
        tidy.number(
            "shape", "1", "k (weibull), sigma (lognormal), beta (generalized_gaussian); else null"
        ),
        tidy.number("shape_se", "1", "standard error if values were independent: too small"),
        tidy.number("shape_se_blocks", "1", "standard error by blocks of iterations"),
        tidy.number(
            "scale", tidy.LOSS, "lambda; exp(mu) (lognormal); alpha (generalized_gaussian)"
        ),
        tidy.number("scale_se", tidy.LOSS, "standard error if values were independent: too small"),
        tidy.number("scale_se_blocks", tidy.LOSS, "standard error by blocks of iterations"),
        tidy.number("log_likelihood", "1", "of bins or of values: not comparable across sources"),
        tidy.number("aic", "1", "2 (number of parameters) - 2 log_likelihood"),
        tidy.count("rank", "by aic among the distributions of this row's values; 1 is best"),
        tidy.number("ks", "1", "largest |F_empirical - F_fit| over bin edges, or over values"),
        tidy.number(
            "p_value", "1", "of ks, by parametric bootstrap of independent values in bins; run only"
        ),
    ),
    "distributions fitted to the absolute LC of the elements of a layer",
)


def fits(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    replicates: int = 199,
    exact: int = EXACT,
) -> pa.Table:
    """Weibull, exponential, lognormal and generalized Gaussian fits of |LC|, by sign.

    The fits are by maximum likelihood with location 0: of exact values if `elements` has at most
    `exact` of them, else of the bins, Π_b (F(u_b) − F(l_b))^c_b. [LCA] (arXiv 1909.01440, author
    response) finds that LC follows a Weibull distribution closely, F = 1 − exp(−(x/λ)^k). For
    windows and the network, histograms are merged, never parameters. Values are **dependent**:
    `shape_se_blocks` is by blocks of iterations (of base windows, with histograms; at least 8 of
    them are needed), while `shape_se` and `p_value` assume independent values and are too small.

    Args:
        results: the output; needs `histograms`.
        window: as in `Windows.of`; with histograms, a multiple of the analysis's own.
        windows: as in `Windows.of`; with histograms, unions of the analysis's own.
        seed: of the bootstraps.
        replicates: of the parametric bootstrap; 0 for no p-values.
        exact: the most values that are read one by one.

    Returns:
        One row for each split, window, layer (the network first, as ""), sign and distribution
        whose likelihood has a maximum.

    Raises:
        InapplicableError: if no window is a union of the histograms' base windows.
        UsageError: for invalid windows.
    """
    chosen = Windows.of(results, window, windows)
    rows: list[dict[str, Any]] = []
    names = [layer.name for layer in results.plan.layers if layer.kind == "parameter"]
    names = [name for name in names if name in results.plan.detail_layers]
    use_values = "elements" in results.tables and _n_values(results) <= exact
    chosen, notes = (chosen, []) if use_values else aligned(results, chosen)
    for number, split in enumerate(results.plan.splits):
        drawing = _Drawing(seed, number, replicates)
        found = read_histograms(results, split.name, names)
        if use_values:
            rows += _of_values(results, split.name, names, chosen, found, drawing)
        elif found is not None:
            rows += _of_bins(results, split.name, names, chosen, found, drawing)
    order: dict[str, list[Any]] = {
        "split": [split.name for split in results.plan.splits],
        "window": [item.name for item in chosen],
        "layer": [tidy.ALL_LAYERS, *names],
        "sign": [*_SIGNS],
        "distribution": [family.name for family in FAMILIES],
    }
    places = {column: {v: i for i, v in enumerate(values)} for column, values in order.items()}
    rows.sort(key=lambda row: [place[row[column]] for column, place in places.items()])
    _rank(rows)
    parameters = {"seed": seed, "replicates": replicates, "exact": exact}
    return tidy.table(_FORM, rows, parameters=parameters, notes=notes)


@dataclass(frozen=True)
class _Drawing:
    """The random draws for one split."""

    seed: int
    split: int
    replicates: int

    @property
    def blocks(self) -> Bootstrap:
        """The bootstrap over intervals."""
        return Bootstrap(self.seed)

    def p_value(
        self, family: Family, edges: Floats, row: dict[str, Any], place: int
    ) -> dict[str, float]:
        """The p-value of a fit's distance; `place` is the number of its row."""
        rng = np.random.default_rng((self.seed, self.split, place, FAMILIES.index(family)))
        simulated = simulated_distances(family, edges, row["theta"], row["n"], self.replicates, rng)
        if not np.isfinite(simulated).all():
            return {}
        beyond = int((simulated >= row.get("binned_ks", row["ks"])).sum())
        return {"p_value": (1 + beyond) / (1 + len(simulated))}


def _n_values(results: Results) -> int:
    sizes = {layer.name: layer.numel for layer in results.plan.layers}
    each = sum(sizes[name] for name in results.plan.detail_layers if name in sizes)
    return each * results.plan.n_intervals * len(results.plan.splits)


def _of_bins(
    results: Results,
    split: str,
    names: Sequence[str],
    chosen: Windows,
    found: Histograms,
    drawing: _Drawing,
) -> Iterator[dict[str, Any]]:
    n_windows, n_layers, _, n_bins = found.counts.shape
    step = max(1, _CELLS // (2 * n_windows * n_bins))
    groups = [([tidy.ALL_LAYERS], found.counts.sum(axis=1, keepdims=True))]
    for first in range(0, n_layers, step):
        part = slice(first, first + step)
        groups.append((list(names[part]), found.counts[:, part]))
    for number, (layers, counts) in enumerate(groups):
        keys = [(layer, sign) for layer in layers for sign in _SIGNS]
        units = counts.reshape(n_windows, len(keys), n_bins)
        parts = [units[held(results, item, found.windows)] for item in chosen]
        for family in FAMILIES:
            fits_of = _fit_rows(family, found.edges, parts, drawing.blocks)
            for item, (row, key) in product(chosen, enumerate(keys)):
                one = next(fits_of)
                if not math.isfinite(one.get("shape_or_scale", math.nan)):
                    continue
                if item.name == RUN and drawing.replicates:
                    place = number * step * 2 + row
                    one |= drawing.p_value(family, found.edges, one, place)
                head = {"split": split, **item.columns, "source": "histograms"}
                yield head | _key(*key, family) | one


def _fit_rows(
    family: Family, edges: Floats, parts: Sequence[Floats], draws: Bootstrap
) -> Iterator[dict[str, Any]]:
    """Fits of the sums of units [W, rows, B] each, with errors by units; of all parts at once."""
    counts = np.concatenate([units.sum(axis=0) for units in parts])
    found = fit_bins(family, edges, counts)
    ks, n = distance(family, edges, found.theta, counts), counts.sum(axis=1)
    for number, units in enumerate(parts):
        rows = range(number * units.shape[1], (number + 1) * units.shape[1])
        slope = slopes(lambda t: family.log_mass(t, edges), found.theta[rows])
        scores = np.einsum("hpb,whb->whp", slope, units)
        spread = _spread(scores.reshape(len(units), -1), draws)
        for at, h in enumerate(rows):
            part = None if spread is None else spread[:, at * family.p : (at + 1) * family.p]
            yield _estimate(found, h, part) | {"n": int(n[h]), "ks": float(ks[h])}


def _spread(scores: Floats, draws: Bootstrap) -> Floats | None:
    """Centred sums of scores [W, K] in every resample; None if there are too few of them."""
    finite = np.nan_to_num(scores)
    sums = draws.sums(finite, block_length(finite))
    return None if sums is None else sums - sums.mean(axis=0)


def _estimate(found: Estimates, h: int, spread: Floats | None) -> dict[str, Any]:
    """θ, errors and likelihood of one fit; θ = (log shape, log scale) or (log scale,)."""
    theta = found.theta[h]
    inverse = covariance(found.information[h])
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.exp(theta)
        errors = size * np.sqrt(np.diag(inverse))
        blocks = np.full(len(theta), np.nan)
        if spread is not None:
            blocks = size * np.std(spread @ inverse, axis=0, ddof=1)
    value = float(found.value[h])
    row: dict[str, Any] = {
        "theta": theta,
        "shape_or_scale": float(size[-1]) if size[-1] > 0 else math.nan,
        "log_likelihood": value,
        "aic": 2.0 * len(theta) - 2.0 * value,
    }
    for i, name in enumerate(("shape", "scale")[-len(theta) :]):
        row |= {name: size[i], f"{name}_se": errors[i], f"{name}_se_blocks": blocks[i]}
    return row


def _key(layer: str, sign: int, family: Family) -> dict[str, Any]:
    return {"layer": layer, "sign": sign, "distribution": family.name}


def _of_values(
    results: Results,
    split: str,
    names: Sequence[str],
    chosen: Windows,
    binned: Histograms | None,
    drawing: _Drawing,
) -> Iterator[dict[str, Any]]:
    columns = ["layer", "start_step", "lc"]
    rows = results.arrow("elements", columns=columns, filters=only(split=split))
    lc = rows["lc"].to_numpy().astype(np.float64)
    layer, start = positions(rows, "layer", names), rows["start_step"].to_numpy()
    some = np.isfinite(lc) & (lc != 0) & (layer >= 0)
    lc, layer, start = lc[some], layer[some], start[some]
    for item in chosen:
        inside = item.holds(start)
        head = {"split": split, **item.columns, "source": "elements"}
        for number, name in enumerate([tidy.ALL_LAYERS, *names]):
            of_layer = inside if not number else inside & (layer == number - 1)
            for sign in _SIGNS:
                here = of_layer & (np.sign(lc) == sign)
                y, when = np.log(np.abs(lc[here])), start[here]
                for family in FAMILIES:
                    fitted = _fit_values(family, y, when, drawing.blocks)
                    if not math.isfinite(fitted.get("shape_or_scale", math.nan)):
                        continue
                    if item.name == RUN and drawing.replicates and binned is not None:
                        place = 2 * number + (sign > 0)
                        counts = np.histogram(y, binned.edges[1:])[0]
                        counts = np.concatenate([[len(y) - counts.sum()], counts])[None]
                        ks = distance(family, binned.edges, fitted["theta"][None], counts)
                        fitted["binned_ks"] = float(ks[0])
                        fitted |= drawing.p_value(family, binned.edges, fitted, place)
                    yield head | _key(name, sign, family) | fitted


def _fit_values(
    family: Family, y: Floats, when: NDArray[np.int64], draws: Bootstrap
) -> dict[str, Any]:
    """The fit to values with logarithms y [n]; errors are by their iterations [n]."""
    if len(y) < 3:
        return {}
    found = fit_samples(family, y)
    if not found.found[0]:
        return {}
    slope = slopes(lambda t: family.log_density(t, y), found.theta)[0]
    _, at = np.unique(when, return_inverse=True)
    scores = np.stack([np.bincount(at, part) for part in slope], axis=1).astype(np.float64)
    ordered = np.sort(y)
    fitted = np.exp(family.log_tails(found.theta, ordered)[0])[0]
    rank = np.arange(len(y)) / len(y)
    ks = max(float((fitted - rank).max()), float((rank + 1 / len(y) - fitted).max()))
    return _estimate(found, 0, _spread(scores, draws)) | {"n": len(y), "ks": ks}


def _rank(rows: list[dict[str, Any]]) -> None:
    """Numbers the distributions of the same values, which are neighbours, by AIC."""
    values = itemgetter("split", "window", "layer", "sign")
    for _, group in groupby(rows, key=values):
        for rank, row in enumerate(sorted(group, key=itemgetter("aic"))):
            row["rank"] = rank + 1
