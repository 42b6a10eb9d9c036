"""Tables of findings: their schemas, and building them from rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from lcray.storage.files import FORMAT_VERSION
from lcray.tables.arrow import fill
from lcray.tables.columns import COUNT as COUNT
from lcray.tables.columns import FLOAT as FLOAT
from lcray.tables.columns import STRING, column

LOSS = "loss"  # the unit; nats for cross-entropy
#: The `layer` of rows about the whole network. No tensor can have this name.
ALL_LAYERS = ""

SPLIT = column("split", STRING, "", "named data set that the loss is taken over")
LAYER = column("layer", STRING, "", "named tensor of the model; empty for the whole network")
WINDOW = (
    column("window", STRING, "", "name of the window: run, first:end, or the user's"),
    column("first_step", COUNT, "step", "first start_step that the window takes"),
    column("end_step", COUNT, "step", "the start_step that the window ends before"),
)


def text(name: str, description: str) -> pa.Field:
    """A text column."""
    return column(name, STRING, "", description)


def count(name: str, description: str) -> pa.Field:
    """A column of integers."""
    return column(name, COUNT, "1", description)


def number(name: str, unit: str, description: str) -> pa.Field:
    """A column of numbers; null if there is none."""
    return column(name, FLOAT, unit, description, nullable=True)


def schema(name: str, key: str, columns: Iterable[pa.Field], description: str) -> pa.Schema:
    """The schema of a finding's table; `key` names the columns that identify a row."""
    metadata = {
        "lcray.format_version": str(FORMAT_VERSION),
        "lcray.finding": name,
        "lcray.description": description,
        "lcray.key": ",".join(key.split()),
    }
    return pa.schema(list(columns), metadata=metadata)


def table(
    form: pa.Schema,
    rows: Sequence[Mapping[str, Any]],
    *,
    parameters: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> pa.Table:
    """A finding's table.

    Args:
        form: from `schema`.
        rows: values by column; a value that is left out, NaN or infinite becomes null.
        parameters: the parameters of the computation, for the metadata.
        notes: for readers of the table, one line each.

    Raises:
        ValueError: as in `lcray.tables.arrow.fill`.
    """
    columns = {name: [row.get(name) for row in rows] for name in form.names}
    for field in form:
        if pa.types.is_floating(field.type):
            columns[field.name] = [float("nan") if v is None else v for v in columns[field.name]]
    return from_columns(form, [columns] if rows else [], parameters=parameters, notes=notes)


def from_columns(
    form: pa.Schema,
    blocks: Iterable[Mapping[str, Any]],
    *,
    parameters: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> pa.Table:
    """Like `table`, from blocks of rows: columns, or scalars that the rows of a block share.

    Columns are as in `lcray.tables.arrow.make_table`.
    """
    name = form.metadata[b"lcray.finding"].decode()
    found = pa.concat_tables([form.empty_table(), *(fill(name, form, block) for block in blocks)])
    more = {"lcray.parameters": json.dumps(dict(parameters)), "lcray.notes": json.dumps([*notes])}
    found = found.unify_dictionaries().combine_chunks()
    return found.replace_schema_metadata({**form.metadata, **more})


def notes_of(found: pa.Table) -> list[str]:
    """The notes for readers of the table."""
    return list(json.loads(found.schema.metadata.get(b"lcray.notes", b"[]")))
