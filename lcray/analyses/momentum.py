"""LC of layers against their momentum, over several outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.comparison import FEWEST_RUNS, check_alike, one_condition
from lcray.analyses.lags import lags
from lcray.analyses.series import layer_series
from lcray.analyses.windows import RUN
from lcray.checkpoints.naming import matches
from lcray.errors import InapplicableError, UsageError, suggest
from lcray.storage import PlaceLike
from lcray.tables.reading.results import Results, open_output

_FORM = tidy.schema(
    "momentum",
    "split layer momentum",
    (
        tidy.SPLIT,
        tidy.LAYER,
        tidy.number("momentum", "1", "as given for the outputs"),
        tidy.count("n", "outputs with this momentum"),
        tidy.number("lc", tidy.LOSS, "mean over them of the layer's LC over the run"),
        tidy.number("lc_se", tidy.LOSS, "its standard error over the outputs; null of one"),
        tidy.number("lc_low", tidy.LOSS, "lower end of what `errors` names"),
        tidy.number("lc_high", tidy.LOSS, "upper end of it"),
        tidy.text(
            "errors",
            "runs: confidence interval over the outputs, by Student's t; bound: lc and its bound, "
            "of one run",
        ),
        tidy.number("lag", "interval", "mean lag of the motion behind -gradient; see lags"),
        tidy.number("lag_low", "interval", "the lowest end of an output's confidence interval"),
        tidy.number("lag_high", "interval", "the highest end"),
    ),
    "LC and lag of layers against a momentum that differs between runs",
)


def against_momentum(
    outputs: Iterable[tuple[float, PlaceLike]],
    *,
    layers: str | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> pa.Table:
    """How the LC of a layer, and its lag, change with the momentum of its training.

    Momentum delays a layer's motion behind its gradient. The author response to [LCA]
    (arXiv 1909.01440) changes the momentum of the last layer alone, and finds that its LC changes
    with it. If a momentum has one output, its LC has only the bound of its quadrature (see
    `layer_totals`): the variation between seeds needs several outputs. A note gives Spearman's rank
    correlation of LC with momentum over the outputs, with a p-value for six outputs or more.

    Args:
        outputs: pairs of a momentum and an output; several outputs may have the same momentum.
        layers: a pattern such as ``fc2.*``; None for the layers of the last module.
        level: of the confidence intervals.
        seed: of the bootstrap of lags.

    Returns:
        One row for each split, layer and momentum, in order.

    Raises:
        UsageError: without outputs, if they differ in splits, layers or steps, or no layer matches.
        OutputError: if a path is not an output, or has no tables.
    """
    pairs = sorted(((float(m), open_output(o)) for m, o in outputs), key=lambda pair: pair[0])
    if not pairs:
        raise UsageError("momentum: give outputs, each with its momentum")
    check_alike([results for _, results in pairs])
    chosen = _layers(pairs[0][1], layers)
    momenta = np.array([momentum for momentum, _ in pairs])
    found = [_measured(results, seed, level) for _, results in pairs]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for split in pairs[0][1].plan.splits:
        for layer in chosen:
            mine = [each[split.name, layer] for each in found]
            notes += _trend(f"{split.name}, {layer}", momenta, [lc for lc, _, _ in mine])
            for momentum in np.unique(momenta):
                same = [mine[i] for i in np.flatnonzero(momenta == momentum)]
                head = {"split": split.name, "layer": layer, "momentum": momentum, "n": len(same)}
                rows.append(head | _of_lc(same, level) | _of_lags(same))
    parameters = {
        "outputs": [[momentum, str(results.path)] for momentum, results in pairs],
        "layers": layers,
        "level": level,
        "seed": seed,
    }
    return tidy.table(_FORM, rows, parameters=parameters, notes=notes)


def _layers(results: Results, pattern: str | None) -> list[str]:
    known = [layer for layer in results.plan.layers if layer.kind == "parameter"]
    if pattern is None:
        return [layer.name for layer in known if layer.module == known[-1].module]
    names = [layer.name for layer in known]
    chosen = [name for name in names if matches(name, pattern)]
    if not chosen:
        raise UsageError(suggest(pattern, names, "layer"))
    return chosen


def _measured(results: Results, seed: int, level: float) -> dict[tuple[str, str], Any]:
    """LC over the run, its bound, and the row of `lags` if there is one, by split and layer."""
    rows: dict[tuple[str, str], Any] = {}
    if "traces" in results.tables:
        steps = results.plan.steps
        whole = {"all": f"{steps[0]}:"}  # no other windows
        try:
            table = lags(results, windows=whole, seed=seed, level=level)
            rows = {(r["split"], r["layer"]): r for r in table.to_pylist() if r["window"] == RUN}
        except InapplicableError:
            pass  # a run that is too short for lags still has LC
    series = layer_series(results, ["lc_error"])
    found = {}
    for s, split in enumerate(series.splits):
        within = series["lc_error"][s, series.ok[s]].sum(axis=0)
        total = np.nan_to_num(series["lc"][s]).sum(axis=0)
        for k, layer in enumerate(series.layers):
            found[split, layer] = (total[k], within[k], rows.get((split, layer)))
    return found


def _of_lc(same: Sequence[Any], level: float) -> dict[str, Any]:
    if len(same) > 1:
        test = one_condition(np.array([lc for lc, _, _ in same]), level)
        ends = {"lc_se": test.se, "lc_low": test.low, "lc_high": test.high}
        return {"lc": test.lc, **ends, "errors": "runs"}
    ((lc, within, _),) = same
    return {"lc": lc, "lc_low": lc - within, "lc_high": lc + within, "errors": "bound"}


def _of_lags(same: Sequence[Any]) -> dict[str, Any]:
    rows = [row for _, _, row in same if row is not None]
    if not rows:
        return {}
    return {
        "lag": float(np.mean([row["lag"] for row in rows])),
        "lag_low": min(row["lag_low"] for row in rows),
        "lag_high": max(row["lag_high"] for row in rows),
    }


def _trend(what: str, momenta: Any, lc: Sequence[float]) -> Iterator[str]:
    if min(len(set(momenta.tolist())), len(set(lc))) < 3:
        return
    from scipy.stats import spearmanr  # slow to import

    found = spearmanr(momenta, lc)
    tested = f"p = {found.pvalue:.2g}, " if len(lc) >= FEWEST_RUNS else ""
    rank = f"{found.statistic:+.2f} ({tested}n = {len(lc)})"
    yield f"{what}: rank correlation of LC with momentum {rank}"
