"""What an attacker would have lcray read: pickles, and queries that leave an output."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


#: Queries that would reach what is no table of an output.

ATTACKS = [
    "COPY layers TO '{out}/tables/x.csv'",
    "COPY (SELECT 1) TO '{out}/x.csv'",
    "ATTACH '{out}/tables/x.db'",
    "EXPORT DATABASE '{out}/tables/x'",
    "IMPORT DATABASE '{out}/tables'",
    "EXPLAIN ANALYZE COPY layers TO '{out}/tables/x.csv'",
    "EXPLAIN SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY layers TO '{out}/tables/x.csv'",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access=true",
    "RESET lock_configuration",
    "SET VARIABLE x = 1",
    "CALL enable_logging(storage_path='{out}/tables')",
    "CREATE TABLE x (i INT)",
    "CREATE SECRET (TYPE s3)",
    "DROP VIEW layers",
    "DELETE FROM layers",
    "INSERT INTO layers SELECT * FROM layers",
    "WITH x AS (INSERT INTO layers SELECT * FROM layers RETURNING *) SELECT * FROM x",
    "SELECT * FROM enable_logging(storage_path='{out}/tables')",
    "SELECT * FROM query('COPY layers TO ''{out}/tables/x.csv''')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_text('{out}/tables/../analysis.json')",
    "SELECT * FROM read_text('{out}/tables/link')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_parquet('{out}/shards/*/*.parquet')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM read_text('http://localhost:1/')",
    "SELECT getenv('HOME')",
    "SELECT * FROM secret",
    "SELECT * FROM nowhere",
    "SELEC 1",
    "",
    ";",
]
