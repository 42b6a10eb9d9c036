"""Shards: the files that attempts at a span write, and the commit of one attempt.

``OUT/shards/<first>-<last>/`` holds ``<table>-<attempt>.parquet`` of any number of attempts and at
most one ``commit.json``, which names the files of one attempt with rows, sizes and checksums. It is
created only if absent. Files without a commit do not count; an attempt that comes too late removes
its own files. So it does no harm to retry, kill, resume, or finish twice.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lcray.errors import LcrayError, OutputError, UsageError
from lcray.planning.plan import Span
from lcray.storage import Place, Remote, open_uncached, place, sha256_of, storage_of
from lcray.storage.files import FORMAT_VERSION, exists, make_folder, seal, write_json_atomic
from lcray.storage.lock import newest
from lcray.tables.arrow import largest_group
from lcray.tables.output import COMMIT, Output, shard_name
from lcray.tables.parquet import FileEntry, TableFile
from lcray.tables.schema import TABLES, table_schema
from lcray.tables.shards.commit import ATTEMPT, Commit, listed, read_commit

PARTITIONS = "lcray.partitions"


class ShardWriter:
    """Writes the tables of one attempt at one span; a context manager that aborts on errors.

    Args:
        out: the output directory.
        span: the span.
        attempt: an id that no other attempt has: letters, digits, ``.``, ``_`` and ``-``.

    Raises:
        OutputError: if the folder cannot be made, or a link leads out of `out`.
        UsageError: if `attempt` has other characters.
    """

    def __init__(self, out: Place, span: Span, attempt: str) -> None:
        if not ATTEMPT.fullmatch(attempt):
            raise UsageError(f"attempt {attempt!r}: use letters, digits, '.', '_' and '-' only")
        out = place(out)
        self.span = span
        self.attempt = attempt
        self.folder = Output(out).span(span)
        self._open: dict[str, TableFile] = {}
        self._partitions: dict[str, list[list[Any]]] = {}
        self._out, self._lock = out, newest(out)
        make_folder(self.folder)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, table: str, data: pa.Table) -> None:
        """Appends rows to a table of this attempt, as row groups of their own.

        Row groups are cut where a partition column of the table changes (such as its split) and at
        the table's row group size. A table without rows only creates the file.

        Args:
            table: its name.
            data: rows with the table's schema, sorted by key within a partition.

        Raises:
            OutputError: if it cannot be written; committed files stay as they are.
            UsageError: if there is no such table.
            ValueError: if the columns are not those of the table.
        """
        schema = table_schema(table)
        if table not in self._open:
            path = self.folder / shard_name(table, self.attempt)
            self._open[table] = TableFile(path, schema)
            self._partitions[table] = []
        for start, stop in _runs(data, schema.partition):
            piece = data.slice(start, stop - start)
            groups = self._open[table].write(piece)
            key = [piece.column(name)[0].as_py() for name in schema.partition]
            self._partitions[table] += [key] * groups

    def commit(
        self,
        *,
        checkpoints: Mapping[int, str],
        info: Mapping[str, Any],
        stamps: Mapping[int, str] | None = None,
    ) -> bool:
        """Commits this attempt, unless another one was first.

        Args:
            checkpoints: the sha256 of each checkpoint that was read, by step.
            info: further values to keep, such as timings; JSON values.
            stamps: a value that changes when a checkpoint does (size, and time or etag), by step.

        Returns:
            whether this attempt is committed; if not, its files are removed.

        Raises:
            OutputError: if it cannot be written; the attempt's files are removed.
        """
        try:
            files = {}
            for table, file in self._open.items():
                index = json.dumps(self._partitions[table], separators=(",", ":"))
                files[table] = asdict(file.finish({PARTITIONS: index}))
                file.publish()
            data = {
                "format_version": FORMAT_VERSION,
                "span": list(self.span.steps),
                "attempt": self.attempt,
                "files": files,
                "checkpoints": {str(step): digest for step, digest in checkpoints.items()},
                "stamps": {str(step): stamp for step, stamp in (stamps or {}).items() if stamp},
                "info": dict(info),
            }
            self._check_lock()
            path = Output(self._out).commit(self.span)
        except BaseException:
            self.abort()
            raise
        try:
            won = write_json_atomic(path, seal(data), exclusive=True)
        except BaseException:
            if self._may_count():
                self._let_go()
            self.abort()
            raise
        if won:
            self._let_go()
        self.abort()
        return won

    def _may_count(self) -> bool:
        """Whether a commit may exist although writing it failed: the answer may have been lost."""
        try:
            return exists(self.folder / COMMIT)
        except LcrayError:
            return True

    def _let_go(self) -> None:
        """Leaves the files where they are; `remove_strays` removes those that no commit names."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _check_lock(self) -> None:
        """Refuse to commit an attempt that began under another driver than the present one."""
        if newest(self._out) != self._lock:
            raise OutputError(
                f"{self._out}: another lcray process has taken over since span {self.span.name} "
                "was begun; nothing of it is committed"
            )

    def abort(self) -> None:
        """Removes this attempt's files; without effect after a commit."""
        for file in self._open.values():
            file.discard()
        self._open.clear()


def _runs(data: pa.Table, columns: Iterable[str]) -> list[tuple[int, int]]:
    """[start, stop) of the runs of rows in which no value of `columns` changes."""
    if not data.num_rows:
        return []
    change = np.zeros(data.num_rows - 1, bool)
    for name in columns:
        column = data.column(name).combine_chunks()
        codes = column.indices if pa.types.is_dictionary(column.type) else column
        change |= np.diff(codes.to_numpy(zero_copy_only=False)) != 0
    edges = [0, *(np.flatnonzero(change) + 1).tolist(), data.num_rows]
    return list(itertools.pairwise(edges))


def check_files(out: Place, commit: Commit) -> list[str]:
    """The problems of the files of a commit, one line each.

    Compares sizes, checksums, rows, columns and the format version.
    """
    paths = {t: Output(out).shard(commit.span, entry.name) for t, entry in commit.files.items()}
    return [
        f"{paths[table]}: {problem}; remove the folder and run the analysis again"
        for table, entry in commit.files.items()
        for problem in file_problems(paths[table], entry, table)
    ]


def file_problems(path: Place, entry: FileEntry, table: str) -> list[str]:
    """The problems of one Parquet file, compared with its entry."""
    try:
        size = storage_of(path).size(path)
        if size != entry.bytes:
            return [f"{size} bytes, should be {entry.bytes}"]
        if sha256_of(path) != entry.sha256:
            return ["differs from its checksum"]
        with open_uncached(path) as raw, pq.ParquetFile(raw) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
            largest = largest_group(file.metadata)
    except FileNotFoundError:
        return ["missing"]
    except (OSError, pa.ArrowException) as error:
        return [f"cannot be read ({str(error).splitlines()[0]})"]
    problems = []
    if rows != entry.rows:
        problems.append(f"{rows} rows, should be {entry.rows}")
    if largest > TABLES[table].row_group_size:
        problems.append(f"a row group of {largest} rows, more than are ever written")
    try:
        TABLES[table].absent(schema)
    except ValueError:
        problems.append(f"other columns than table {table!r} has")
    version = (schema.metadata or {}).get(b"lcray.format_version", b"").decode()
    if version != str(FORMAT_VERSION):
        problems.append(f"format version {version!r}, should be {FORMAT_VERSION}")
    return problems


def remove_strays(out: Place, spans: Iterable[Span]) -> list[Place]:
    """Removes files that late or killed attempts left beside a commit, and returns their paths.

    Folders without a commit are left alone, since an attempt may still write there. Of the others,
    only folders that hold more than a commit and the files of one attempt are read.
    """
    known = {span.name: span for span in spans}
    strays = []
    for folder, names in _folders(out):
        span = known.get(folder)
        if span is None or not _may_hold_strays(names):
            continue
        commit = read_commit(out, span)
        kept = {entry.name for entry in commit.files.values()} if commit is not None else set(names)
        found = (name for name in names if name.endswith((".parquet", ".tmp")))
        strays += [Output(out).span(span) / name for name in found if name not in kept]
    removed = []
    for path in strays:
        with suppress(OSError):
            storage_of(path).delete([path])
            removed.append(path)
    return removed


def _folders(out: Place) -> Iterator[tuple[str, list[str]]]:
    """The name of each folder of shards, with the names of the files in it."""
    if isinstance(out, Remote):
        pairs = (item.name.rpartition("/")[::2] for item in listed(out))
        for folder, group in itertools.groupby(pairs, key=itemgetter(0)):
            yield folder, [name for _, name in group]
        return
    top = str(Output(out).shards)
    try:
        with os.scandir(top) as scan:
            folders = sorted(entry.name for entry in scan if entry.is_dir(follow_symlinks=False))
        for folder in folders:
            yield folder, sorted(os.listdir(os.path.join(top, folder)))
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{out}: cannot be listed ({error.strerror}); check access") from error


def _may_hold_strays(names: Sequence[str]) -> bool:
    """Whether there are more files than those of one attempt and its commit."""
    attempts = {name.partition("-")[2] for name in names if name.endswith(".parquet")}
    return COMMIT in names and (len(attempts) > 1 or any(name.endswith(".tmp") for name in names))
