"""The bounds of totals of LC, and the verdicts that depend on them.

The embedded rule on the same nodes gives an estimate of the error of an interval's LC (the column
`lc_error` of `layers`). The *bound* of a total is Σ lc_error over its terms, by the triangle
inequality. Since lc_error is the error of the lower of two rules, it tends to be too large.

Legend: T intervals, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcray.analyses.series import Floats, with_network
from lcray.tables.reading.results import Results

#: The description of a column of bounds.
BOUND = "its bound: lc_error added up over the intervals; null where the rule has none"


def bounds(errors: Floats) -> Floats:
    """Bounds of the totals of the network and of each layer.

    Args:
        errors: lc_error of each interval and layer, [T, L]; NaN if there is none.

    Returns:
        [1 + L], the network first; NaN if an interval has no lc_error.
    """
    return with_network(errors.sum(axis=0))


def verdicts(totals: Floats, within: Floats) -> NDArray[np.int64]:
    """+1 if a total is above its bound, -1 if it is below the negative bound; else 0, [K].

    Args:
        totals: [K].
        within: their bounds, [K]; NaN if there is none.
    """
    return (totals > within).astype(np.int64) - (totals < -within).astype(np.int64)


def notes(results: Results, blocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Notes for readers of verdicts: bounds are missing, or only a sample was used.

    Args:
        results: the output.
        blocks: of rows of a finding, with `lc_bound`.
    """
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
