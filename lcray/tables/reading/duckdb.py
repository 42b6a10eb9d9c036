"""A DuckDB that can read some files and nothing else, for SQL that users write.

Settings alone would still allow statements that write into these files. So such SQL must also be a
single SELECT with a plan that writes nothing (a statement that begins with a COPY in a WITH clause
counts as a SELECT).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lcray.errors import OutputError, UsageError
from lcray.storage import Place
from lcray.storage.interrupt import interruptible, left_behind
from lcray.tables.reading.views import literal
from lcray.tasks.model.memory import available_bytes

if TYPE_CHECKING:
    import duckdb

#: A step of a plan that writes; quotes in a name or a literal would be escaped.
_WRITING = re.compile(r'"name":\s*"[A-Z_]*(?:COPY|INSERT|UPDATE|DELETE|CREATE|ATTACH)')
_LEAST_ROOM = 1 << 28  # bytes that a query may always take
_SETTINGS: dict[str, str | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
    "python_scan_all_frames": False,
    "temp_directory": "",
}


def query_room() -> int:
    """Bytes that a query may take: half of the available memory; its answer may take a quarter."""
    return max(_LEAST_ROOM, available_bytes(None) // 2)


def check_name(path: Place) -> None:
    """Raises an `OutputError` for a path that DuckDB and Arrow cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"{path}: the path is not UTF-8, as DuckDB and Arrow need it; rename the folder"
        ) from error


def sql_path(path: Path) -> str:
    """The path as a literal of DuckDB, quotes included, so that it is not read as a pattern.

    Raises:
        OutputError: if it is not UTF-8.
    """
    check_name(path)
    return literal(glob.escape(str(path.resolve())))


@contextmanager
def connect(room: int, threads: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A new database in memory, of at most `room` bytes, that loads nothing by itself."""
    import duckdb

    config: dict[str, Any] = {**_SETTINGS, "memory_limit": f"{room}B"}
    if threads is not None:
        config["threads"] = threads
    connection = duckdb.connect(":memory:", config=config)
    try:
        yield connection
    finally:
        if not left_behind():  # closing a database at work would wait for it
            connection.close()


def shut(connection: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> None:
    """Restricts a database to these files: no other file, no network, no setting."""
    # DuckDB checks the pattern of a view as well as its file.
    plain = [literal(str(file.resolve())) for file in files]
    listed = ", ".join([*plain, *map(sql_path, files)])
    connection.execute(f"SET allowed_paths=[{listed}]")
    connection.execute("SET enable_external_access=false")
    connection.execute("SET lock_configuration=true")


def select(connection: duckdb.DuckDBPyConnection, query: str, room: int) -> pa.Table:
    """The result of one SELECT; signals such as Ctrl-C end it.

    Raises:
        UsageError: if it is another statement, or its answer takes more than `room` bytes.
        duckdb.Error: if it cannot be run.
    """
    return interruptible(lambda: _selected(connection, query, room), connection.interrupt)


def _selected(connection: duckdb.DuckDBPyConnection, query: str, room: int) -> pa.Table:
    statements = connection.extract_statements(query)
    if len(statements) != 1 or not _reads(connection, statements[0]):
        raise UsageError("SQL: give exactly one SELECT; the tables are read-only")
    held, size = [], 0
    with connection.sql(statements[0]).to_arrow_reader() as reader:
        for batch in reader:
            held.append(batch)
            size += batch.nbytes
            if size > room:
                raise UsageError(
                    f"SQL: the answer is larger than {room >> 20} MiB, a quarter of the memory "
                    "that is left; aggregate, or add a LIMIT"
                )
        return pa.Table.from_batches(held, reader.schema)


def _reads(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> bool:
    import duckdb

    try:
        if statement.type != duckdb.StatementType.SELECT:
            return False
    except ValueError:  # a kind without a name in the Python package
        return False
    plan = connection.execute(f"EXPLAIN (FORMAT json) {statement.query}").fetchall()
    return not _WRITING.search(str(plan[-1][1]))
