"""The LC of each layer, and how exactly it is known: layers that help, or hurt.

Two intervals go with a total, and they answer different questions. Its *bound* is how far the
quadrature may be off, so it says how exactly the total of this run is known. The *resampled*
interval says how much the total would vary if the run's intervals were other stretches of the same
process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.series import Series, layer_series, with_network
from lcray.analyses.windows import RUN, Ranges, Windows
from lcray.statistics.bootstrap import RESAMPLED, Bootstrap
from lcray.tables.columns import SIGN, column
from lcray.tables.reading.results import Results

_LAYERS_FOR_RANKS = 5  # a rank correlation with fewer says nothing
#: The description of a column of bounds.
BOUND = "its bound: lc_error added up over the intervals; null where the rule has none"
_VERDICT = "+1: hurts, lc > lc_bound; -1: helps, lc < -lc_bound; 0: neither, or without a bound"

_FORM = tidy.schema(
    "layer_totals",
    "split first_step end_step window layer",
    (
        tidy.SPLIT,
        *tidy.WINDOW,
        tidy.LAYER,
        tidy.text("kind", "parameter or buffer; empty for the whole network"),
        tidy.count("numel", "elements of the layer"),
        tidy.count("n_intervals", "intervals that have LC"),
        tidy.number("lc", tidy.LOSS, "loss change allocated to the layer"),
        tidy.number("lc_bound", tidy.LOSS, BOUND),
        column("hurts", SIGN, "1", _VERDICT),
        tidy.number("share", "1", "of the network's LC; negative if the signs differ"),
        tidy.number("lc_per_element", tidy.LOSS, "lc / numel"),
        tidy.number("share_hurting", "1", "intervals at which the layer's LC is above 0"),
        *(tidy.number(name, tidy.LOSS, text) for name, text in RESAMPLED.items()),
    ),
    "LC of every layer with its bound, over windows and the run",
)


def layer_totals(
    results: Results,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pa.Table:
    """Σ_t LC of each layer, whether it is above or below 0, and how it depends on the layer's size.

    A layer hurts in total if LC summed over its elements and over time is above 0 ([LCA], arXiv
    1909.01440, section 4.2: the first and last layer of ResNets, the last layer of other networks).
    This is what happened in this run: it does not say what would have happened without the layer.

    `lc_bound` is Σ_t lc_error, |rule − embedded rule| summed over the intervals (for the whole
    network over the layers as well). It tends to overestimate the error of the total, and is 0 only
    if both rules agree. `hurts` is ±1 if |LC| exceeds it. If the rule has no embedded rule, there
    is no bound: it is null, `hurts` is 0, and a note says so. `resampled_*` answer another
    question: how much the total would vary if the run's intervals were other stretches of the same
    process (blocks of the window's intervals, drawn anew). Neither is about other seeds, which are
    the subject of `lcray.compare`. A note gives Spearman's rank correlation of LC with the layers'
    size over the run.

    Args:
        results: the output; needs `layers`.
        window: as in `Windows.of`.
        windows: as in `Windows.of`.
        seed: of the bootstrap.
        level: of the resampled intervals.

    Returns:
        One row for each split, window and layer (empty for the network).

    Raises:
        UsageError: for invalid windows.
    """
    chosen, draws = Windows.of(results, window, windows), Bootstrap(seed, level=level)
    series = layer_series(results, ["lc_error"], ("parameter", "buffer"))
    blocks = [*_blocks(results, series, chosen, draws)]
    parameters = {"seed": seed, "level": level}
    said = [*_notes(results, blocks), *_with_size(blocks)]
    return tidy.from_columns(_FORM, blocks, parameters=parameters, notes=said)


def _blocks(
    results: Results, series: Series, chosen: Windows, draws: Bootstrap
) -> Iterator[dict[str, Any]]:
    """The rows of each split and window: the network, and each layer."""
    known = {layer.name: (layer.kind, layer.numel) for layer in results.plan.layers}
    kinds, sizes = zip(*(known[name] for name in series.layers), strict=True)
    numel = np.array([sum(n for _, n in known.values()), *sizes])
    for s, split in enumerate(series.splits):
        for item in chosen:
            here = item.holds(series.starts) & series.ok[s]
            lc = with_network(series["lc"][s][here])
            if not len(lc):
                continue
            total = lc.sum(axis=0)
            within = with_network(series["lc_error"][s][here].sum(axis=0))
            yield {
                "split": split,
                **item.columns,
                "layer": [tidy.ALL_LAYERS, *series.layers],
                "kind": ["", *kinds],
                "numel": numel,
                "n_intervals": len(lc),
                "lc": total,
                "lc_bound": within,
                "hurts": (total > within).astype(np.int64) - (total < -within),
                "share": total / total[0] if total[0] else None,
                "lc_per_element": total / np.where(numel, numel, np.nan),
                "share_hurting": np.mean(lc > 0, axis=0),
                **draws.spread(lc),
            }


def _notes(results: Results, blocks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Notes for readers of `hurts`: bounds are missing, or only a sample was used."""
    rule = results.plan.settings.rule
    if any(np.isnan(block["lc_bound"]).any() for block in blocks):
        yield (
            f"there is no lc_error (rule {rule}): totals have no bound, and hurts is 0; analyze "
            "with a rule that has one, such as simpson, into a new output"
        )
    for split in results.plan.splits:
        if split.drawn_from is not None:
            yield (
                f"{split.name}: {split.n_samples:,} of {split.drawn_from:,} samples: bounds and "
                "hurts are about these samples; confidence() of lcray.open says how much the "
                "result for all data may differ"
            )


def _with_size(blocks: Sequence[dict[str, Any]]) -> Iterator[str]:
    for block in blocks:
        parameters = np.array(block["kind"]) == "parameter"
        lc, numel = block["lc"][parameters], block["numel"][parameters]
        if block["window"] != RUN or len(lc) < _LAYERS_FOR_RANKS:
            continue
        if min(len(set(lc)), len(set(numel))) > 1:
            from scipy.stats import spearmanr  # slow to import

            found = spearmanr(numel, lc)
            yield (
                f"{block['split']}: rank correlation of LC with a layer's size "
                f"{found.statistic:+.2f} (p = {found.pvalue:.2g}, {len(lc)} layers)"
            )
