"""How exactly totals of LC are known: their bounds, and the verdicts that hang on them.

The error of an interval's LC is estimated by the embedded rule on the same nodes (the column
`lc_error` of `layers`); the *bound* of a total is Σ lc_error over what is added up, by the triangle
inequality. As lc_error is the error of the lower of two rules, it is an upper indication.

Legend: T intervals, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcray.tables.reading.results import Results

Floats = NDArray[np.float64]

#: What a column of bounds holds.
BOUND = "its bound: lc_error added up over the intervals; null where the rule has none"


def bounds(errors: Floats) -> Floats:
    """Bounds of the totals of the network, and of each layer.

    Args:
        errors: lc_error of each interval and layer, [T, L]; NaN where there is none.

    Returns:
        [1 + L], the network first; NaN where an interval lacks one.
    """
    each = errors.sum(axis=0)
    return np.concatenate([[each.sum()], each])


def verdicts(totals: Floats, within: Floats) -> NDArray[np.int64]:
    """+1 where a total is above its bound, -1 where it is below minus that; else 0, [K].

    Args:
        totals: [K].
        within: their bounds, [K]; NaN where there is none.
    """
    return (totals > within).astype(np.int64) - (totals < -within).astype(np.int64)


def notes(results: Results, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader of verdicts must know: no bounds, or a sample instead of all data.

    Args:
        results: of the output.
        rows: of a finding, with `split` and `lc_bound`.
    """
    rule = results.plan.settings.rule
    if any(np.isnan(row["lc_bound"]) for row in rows):
        yield (
            f"there is no lc_error (rule {rule}): totals have no bound, and hurts is 0; analyze "
            "with a rule that has one, such as simpson, into a new output"
        )
    for split in results.plan.splits:
        if split.drawn_from is not None:
            yield (
                f"{split.name}: {split.n_samples:,} of {split.drawn_from:,} samples: bounds and "
                "hurts are about these samples; confidence() of lcray.open says how far they may "
                "be off all of the data"
            )
