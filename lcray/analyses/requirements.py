"""Checks that an output has the tables, splits and layers that are asked for."""

from __future__ import annotations

from functools import reduce
from operator import and_

import pyarrow as pa
import pyarrow.compute as pc

from lcray.errors import InapplicableError, UsageError, suggest
from lcray.tables.reading.recipes import recipe_for
from lcray.tables.reading.results import Results


def require(results: Results, *tables: str) -> None:
    """Raise InapplicableError if one of `tables` is missing; the message says how to obtain it.

    Args:
        results: the output.
        tables: their names.
    """
    for table in tables:
        if table not in results.tables:
            raise InapplicableError(f"there is no table {table!r}; {recipe_for(table)}")


def split_of(results: Results, split: str | None, *tables: str) -> str:
    """The split asked for; None for ``train``, or the plan's first if there is no ``train``.

    Raises:
        InapplicableError: as `require`, for `tables`.
        UsageError: for an unknown split.
    """
    require(results, *tables)
    names = [item.name for item in results.plan.splits]
    if split is None:
        return "train" if "train" in names else names[0]
    if split not in names:
        raise UsageError(suggest(split, names, "split"))
    return split


def layer_of(results: Results, layer: str, table: str, known: tuple[str, ...]) -> str:
    """`layer`, after checking that `table` has rows for it.

    Args:
        results: the output.
        layer: its name.
        table: a table of the output.
        known: the layers in the table.

    Raises:
        InapplicableError: if the table does not have the layer.
        UsageError: if the model does not have it.
    """
    if layer not in {item.name for item in results.plan.layers}:
        raise UsageError(suggest(layer, [item.name for item in results.plan.layers], "layer"))
    if layer not in known:
        raise InapplicableError(f"table {table!r} has no layer {layer!r}; {recipe_for(table)}")
    return layer


def only(**values: str) -> pc.Expression:
    """The rows in which dictionary columns have these values."""
    return reduce(and_, (pc.field(name).cast(pa.string()) == v for name, v in values.items()))
