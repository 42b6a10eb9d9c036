"""Reading committed shards, one row group at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lcray.errors import CorruptionError
from lcray.storage import Place, Remote, open_seekable
from lcray.tables.output import Output, shard_name
from lcray.tables.schema import TABLES, TableSchema
from lcray.tables.shards.commit import Commit, Outline
from lcray.tables.shards.writer import PARTITIONS


class ShardFile:
    """A committed Parquet file, read by row group; a context manager.

    Columns that an earlier lcray did not write are null.

    Args:
        path: of the file.
        table: the table that its rows belong to.

    Raises:
        CorruptionError: if it cannot be read.
    """

    def __init__(self, path: Place, table: TableSchema) -> None:
        self.path = path
        self._table = table
        with self._reading():
            source = open_seekable(path) if isinstance(path, Remote) else path
            self._file = pq.ParquetFile(source)
            self._source = source

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not isinstance(self._source, Path):
            self._source.close()

    @cached_property
    def partitions(self) -> list[tuple[Any, ...]]:
        """The values of the table's partition columns, for each row group.

        Raises:
            CorruptionError: if the file has no such list.
        """
        metadata = self._file.metadata
        try:
            groups = [tuple(key) for key in json.loads(metadata.metadata[PARTITIONS.encode()])]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("no list of partitions") from error
        if len(groups) != metadata.num_row_groups:
            raise self._damaged("its list of partitions does not fit")
        return groups

    @cached_property
    def rows(self) -> list[int]:
        """The number of rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read(self, groups: list[int], columns: list[str] | None = None) -> pa.Table:
        """The rows of some row groups, in their order.

        Raises:
            CorruptionError: if they cannot be read.
        """
        wanted = self._table.schema.names if columns is None else columns
        there = [name for name in wanted if name in self._file.schema_arrow.names]
        with self._reading():
            rows = self._file.read_row_groups(groups, columns=there, use_threads=False)
        return self._table.completed(rows, wanted)

    def read_ranges(
        self, ranges: Iterable[tuple[tuple[Any, ...], int, int]], columns: list[str] | None = None
    ) -> pa.Table:
        """Rows of several partitions, in the order of `ranges`.

        Args:
            ranges: (partition, start, stop) each: rows [start, stop) of the partition.
            columns: their names; None for all.

        Raises:
            CorruptionError: if they cannot be read, or a partition has fewer rows.
        """
        groups: list[int] = []
        cuts: list[tuple[int, int]] = []  # (offset, length) within the rows that are read
        read = 0
        for partition, start, stop in ranges:
            seen = found = 0
            for group in self._groups.get(partition, ()):
                rows = self.rows[group]
                low, high = max(start - seen, 0), min(stop - seen, rows)
                if low < high:
                    groups.append(group)
                    cuts.append((read + low, high - low))
                    read += rows
                    found += high - low
                seen += rows
            if found != stop - start:
                raise self._damaged(f"partition {partition} lacks rows {start}:{stop}")
        table = self.read(groups, columns)
        if sum(length for _, length in cuts) == read:
            return table
        return pa.concat_tables([table.slice(*cut) for cut in cuts])

    @cached_property
    def extents(self) -> dict[tuple[Any, ...], int]:
        """The number of rows of each partition."""
        return {key: sum(self.rows[g] for g in groups) for key, groups in self._groups.items()}

    @cached_property
    def _groups(self) -> dict[tuple[Any, ...], list[int]]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for group, partition in enumerate(self.partitions):
            groups.setdefault(partition, []).append(group)
        return groups

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise self._damaged(reason) from error

    def _damaged(self, reason: str) -> CorruptionError:
        return CorruptionError(
            f"{self.path}: cannot be read ({reason}); run lcray verify, which says what to repair"
        )


def open_shard(out: Place, commit: Commit | Outline, table: str) -> ShardFile | None:
    """The file of `table` in a commit, or None if the attempt wrote no rows of it.

    Raises:
        CorruptionError: if it cannot be read.
    """
    if table not in commit.tables:
        return None
    path = Output(out).shard(commit.span, shard_name(table, commit.attempt))
    return ShardFile(path, TABLES[table])
