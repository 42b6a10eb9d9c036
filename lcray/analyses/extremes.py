"""The parameters that help and hurt most over the run."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from lcray.analyses import tidy
from lcray.errors import UsageError
from lcray.storage.json_types import LIMIT
from lcray.tables.reading.results import Results
from lcray.tables.reading.views import literal

_FORM = tidy.schema(
    "extremes",
    "split direction rank",
    (
        tidy.SPLIT,
        tidy.text("direction", "helps or hurts"),
        tidy.count("rank", "1 for the parameter with the largest effect"),
        tidy.LAYER,
        tidy.count("index", "position in the layer's tensor, flattened row by row"),
        tidy.number("lc", tidy.LOSS, "LC over the run"),
        tidy.number("abs_lc", tidy.LOSS, "sum of |LC| over the intervals"),
        tidy.count("n_helping", "intervals with LC < 0"),
        tidy.count("n_hurting", "intervals with LC > 0"),
        tidy.count("n_flips", "neighbouring intervals with LC of opposite sign"),
        tidy.number("displacement", "parameter", "sum of the movements"),
        tidy.number("path_length", "parameter", "sum of the absolute movements"),
    ),
    "the parameters with the lowest and the highest LC over the run",
)
_COLUMNS = tuple(_FORM.names[_FORM.names.index("index") :])


def extremes(results: Results, *, top: int = 10) -> pa.Table:
    """The `top` parameters that helped most (LC < 0), and the `top` that hurt most (LC > 0).

    They are ranked by LC over the run, then by layer and index. ``lcray trace`` records their
    weights, gradients and LC step by step.

    Args:
        results: the output; needs `parameters`.
        top: number of parameters per direction, in the whole network.

    Returns:
        One row for each of them, by split and direction.

    Raises:
        UsageError: for a `top` below 1.
    """
    if top < 1:
        raise UsageError(f"top {top}: must be at least 1")
    names = ", ".join(literal(layer.name) for layer in results.plan.layers)
    position = f"list_position([{names}], CAST(layer AS VARCHAR))"
    rows: list[dict[str, Any]] = []
    for split in results.plan.splits:
        for direction, sign in (("helps", 1), ("hurts", -1)):
            query = f"""
                SELECT layer, {", ".join(_COLUMNS)} FROM parameters
                WHERE split = {literal(split.name)} AND lc * {sign} < 0
                ORDER BY lc * {sign}, {position}, index LIMIT {min(top, LIMIT - 1)}"""
            found = results.sql_arrow(query).to_pylist()
            head = {"split": split.name, "direction": direction}
            rows += [head | {"rank": n} | row for n, row in enumerate(found, 1)]
    return tidy.table(_FORM, rows, parameters={"top": top})
