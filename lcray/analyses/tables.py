"""Whether an output has what is asked of it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from lcray.errors import InapplicableError, UsageError, suggest
from lcray.tables.reading.recipes import recipe_for
from lcray.tables.reading.results import Results


def require(results: Results, *tables: str) -> None:
    """Raises InapplicableError, which says what would give them, where one of `tables` is missing.

    Args:
        results: of the output.
        tables: their names.
    """
    for table in tables:
        if table not in results.tables:
            raise InapplicableError(f"there is no table {table!r}; {recipe_for(table)}")


def split_of(results: Results, split: str | None) -> str:
    """The split asked for; None for ``train``, or the plan's first where there is none.

    Raises:
        UsageError: for an unknown split.
    """
    names = [item.name for item in results.plan.splits]
    if split is None:
        return "train" if "train" in names else names[0]
    if split not in names:
        raise UsageError(suggest(split, names, "split"))
    return split


def layer_of(results: Results, layer: str, table: str, known: tuple[str, ...]) -> str:
    """`layer`, of which `table` has rows.

    Args:
        results: of the output.
        layer: its name.
        table: a table of the output.
        known: the layers that the table has.

    Raises:
        InapplicableError: if the table lacks it.
        UsageError: if the model does.
    """
    if layer not in {item.name for item in results.plan.layers}:
        raise UsageError(suggest(layer, [item.name for item in results.plan.layers], "layer"))
    if layer not in known:
        raise InapplicableError(f"table {table!r} has no layer {layer!r}; {recipe_for(table)}")
    return layer


def only(**values: str) -> pc.Expression:
    """The rows in which dictionary columns have these values."""
    condition = None
    for name, value in values.items():
        here = pc.field(name).cast(pa.string()) == value
        condition = here if condition is None else condition & here
    return condition
