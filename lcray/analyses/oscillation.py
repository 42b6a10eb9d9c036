"""Sign flips of LC, movements and gradients, and the share of net progress."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import tidy
from lcray.analyses.series import Series, layer_series, with_network
from lcray.analyses.trace_arrays import sampled_layers
from lcray.analyses.windows import Ranges, Windows
from lcray.statistics.bootstrap import Bootstrap
from lcray.statistics.sign_runs import flips, net_share
from lcray.tables.reading.results import Results

Rows = Iterator[dict[str, Any]]

_FORM = tidy.schema(
    "oscillation",
    "split layer first_step end_step window quantity source",
    (
        tidy.SPLIT,
        tidy.LAYER,
        *tidy.WINDOW,
        tidy.text("quantity", "lc, displacement or gradient (at the start of the interval)"),
        tidy.text("source", "layers and parameters: all elements; traces: the seeded sample"),
        tidy.count("n_elements", "elements that were looked at"),
        tidy.count("n_flips", "neighbouring intervals with opposite signs, over all elements"),
        tidy.count("n_pairs", "neighbouring intervals that could flip: where neither sign is 0"),
        tidy.number("flip_rate", "1", "n_flips / n_pairs; 0.5 for independent signs"),
        tidy.number("flip_rate_low", "1", "lower end of its confidence interval"),
        tidy.number("flip_rate_high", "1", "upper end of its confidence interval"),
        tidy.number("half_period", "interval", "mean time between flips: n_pairs / n_flips"),
        tidy.number("net", "1", "net progress: sum over elements of |sum x| / sum of |x|"),
    ),
    "sign flips, half-periods and net progress, by layer",
)
_PARAMETERS = """
    SELECT split, layer, count(*) AS n, count(*) FILTER (path_length > 0) AS moving,
        sum(n_flips) AS lc_flips, sum(greatest(n_helping + n_hurting - 1, 0)) AS lc_pairs,
        sum(displacement_flips) AS displacement_flips, sum(gradient_flips) AS gradient_flips,
        sum(abs(lc)) AS lc_net, sum(abs_lc) AS lc_gross,
        sum(abs(displacement)) AS displacement_net, sum(path_length) AS displacement_gross
    FROM parameters GROUP BY split, layer
"""


def oscillation(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pa.Table:
    """Sign flips and net progress of LC, movements and gradients.

    A flip of an element is x_{t−1}·x_t < 0, where x is its LC, its movement Δ or its gradient at
    the start of the interval. The mean half-period is the number of pairs of neighbouring intervals
    divided by the number of flips. Net progress is Σ_i |Σ_t x_{i,t}| / Σ_i Σ_t |x_{i,t}|: 1 if
    every element goes one way, and of the order of 1/√T for T independent steps. [LCA] (arXiv
    1909.01440, section 4.1) finds that most parameters oscillate between helping and hurting.

    There are three sources, and none is complete. `layers` has LC of all elements in any window; a
    pair counts min(n_{t−1}, n_t), where n is the number of elements with LC ≠ 0, so rates are a
    little low if elements become zero and nonzero. `parameters` has all elements and quantities
    over the run; for movements and gradients, a pair counts the elements that ever moved. `traces`
    has a sample of elements, with every quantity in any window and exactly counted pairs. Errors
    resample blocks of intervals.

    Args:
        results: the output; needs `layers`, and uses `parameters` and `traces` if it has them.
        window: as in `Windows.of`.
        windows: as in `Windows.of`.
        seed: of the bootstrap.
        level: of the confidence intervals.

    Returns:
        One row for each split, layer (empty for the network), window, quantity and source.

    Raises:
        UsageError: for invalid windows.
    """
    chosen, draws = Windows.of(results, window, windows), Bootstrap(seed, level=level)
    series = layer_series(results, ["n_flips", "n_helping", "n_hurting"])
    rows = [*_of_layers(results, series, chosen, draws)]
    if "parameters" in results.tables:
        rows += _of_parameters(results, series)
    if "traces" in results.tables:
        rows += _of_traces(results, chosen, draws)
    return tidy.table(_FORM, rows, parameters={"seed": seed, "level": level})


def _of_layers(results: Results, series: Series, chosen: Windows, draws: Bootstrap) -> Rows:
    sizes = {layer.name: layer.numel for layer in results.plan.layers}
    numel = [sizes[name] for name in series.layers]
    names, numbers = (tidy.ALL_LAYERS, *series.layers), [sum(numel), *numel]
    possible = _pairs(series)
    for s, split in enumerate(series.splits):
        seen = np.where(possible[s] > 0, np.nan_to_num(series["n_flips"][s]), 0.0)
        both = [with_network(x) for x in (seen, possible[s])]
        for item in chosen:
            part = [x[item.holds(series.starts)] for x in both]
            errors = _rate_errors(part[0], part[1], draws)
            head = {"split": split, **item.columns, "quantity": "lc", "source": "layers"}
            for k, name in enumerate(names):
                row = head | {"layer": name, "n_elements": numbers[k]}
                ends = {key: ends[k] for key, ends in errors.items()}
                yield row | _rates(*(float(x[:, k].sum()) for x in part)) | ends


def _pairs(series: Series) -> NDArray[np.float64]:
    """Number of elements of each layer that could flip at each interval, [S, T, L]."""
    live = np.nan_to_num(series["n_helping"] + series["n_hurting"])
    found = np.zeros_like(live)
    adjacent = series.starts[1:] == series.ends[:-1]
    found[:, 1:] = np.minimum(live[:, 1:], live[:, :-1]) * adjacent[:, None]
    return found


def _of_parameters(results: Results, series: Series) -> Rows:
    adjacent = series.starts[1:] == series.ends[:-1]
    together = series.ok[:, 1:] & series.ok[:, :-1] & adjacent
    pairs = dict(zip(series.splits, together.sum(axis=1).tolist(), strict=True))
    run = Windows.whole(results.plan.steps).items[0]
    found = {
        (row["split"], row["layer"]): row
        for row in results.sql_arrow(_PARAMETERS, threads=1).to_pylist()
    }
    for split in results.plan.splits:
        for layer in results.plan.layers:
            row = found.get((split.name, layer.name))
            if row is None:
                continue
            possible = int(row["moving"]) * pairs[split.name]
            head = {"split": split.name, "layer": layer.name, **run.columns}
            head |= {"source": "parameters", "n_elements": row["n"]}
            counts = {
                "lc": (row["lc_flips"], row["lc_pairs"]),
                "displacement": (row["displacement_flips"], possible),
                "gradient": (row["gradient_flips"], possible),
            }
            for quantity, (seen, of) in counts.items():
                if seen is None:
                    continue
                whole = row.get(f"{quantity}_gross")
                net = {"net": row[f"{quantity}_net"] / whole} if whole else {}
                yield head | {"quantity": quantity} | _rates(int(seen), int(of)) | net


def _of_traces(results: Results, chosen: Windows, draws: Bootstrap) -> Rows:
    for sample in sampled_layers(results):
        quantities = sample.quantities()
        counted = [flips(values) for values in quantities.values()]
        seen, possible = (np.stack([c[i] for c in counted], axis=1).astype(float) for i in (0, 1))
        for item in chosen:
            here = item.holds(sample.starts)
            head = {"split": sample.split, "layer": sample.layer, **item.columns}
            head |= {"source": "traces"}
            errors = _rate_errors(seen[here], possible[here], draws)
            for k, (quantity, values) in enumerate(quantities.items()):
                if not np.isfinite(values[here]).any():
                    continue
                counts = seen[here, k].sum(), possible[here, k].sum()
                row = head | {"quantity": quantity, "n_elements": values.shape[1]}
                ends = {key: ends[k] for key, ends in errors.items()}
                yield row | _rates(*counts) | {"net": net_share(values[here])} | ends


def _rate_errors(
    seen: NDArray[np.float64], possible: NDArray[np.float64], draws: Bootstrap
) -> dict[str, NDArray[np.float64]]:
    """Ends of the confidence interval of each column's Σ seen / Σ possible; [T, K] each."""
    sums = draws.sums(np.column_stack([seen, possible]))
    if sums is None:
        return {}
    over, under = np.split(sums, 2, axis=1)
    live = (under > 0).all(axis=0)
    rate = np.divide(over, under, out=np.zeros_like(over), where=live)
    _, low, high = draws.interval(rate)
    ends = {"flip_rate_low": low, "flip_rate_high": high}
    return {key: np.where(live, end, np.nan) for key, end in ends.items()}


def _rates(seen: float, possible: float) -> dict[str, Any]:
    """The columns that follow from the number of flips, and of pairs that could flip."""
    return {
        "n_flips": int(seen),
        "n_pairs": int(possible),
        "flip_rate": seen / possible if possible else None,
        "half_period": possible / seen if seen else None,
    }
