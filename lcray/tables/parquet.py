"""Parquet files that are written once, from start to end, with a running checksum."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lcray.storage import Place, Remote, storage_of
from lcray.storage.files import writing
from lcray.tables.schema import TableSchema


@dataclass(frozen=True)
class FileEntry:
    """The entry of a finished file in a commit or a manifest.

    Attributes:
        name: its name, without the folder.
        rows: number of rows.
        bytes: its size.
        sha256: checksum of its contents, in hexadecimal digits.
    """

    name: str
    rows: int
    bytes: int
    sha256: str


class _HashedFile(io.RawIOBase):
    """A new file that is written once, from start to end, and records its size and checksum."""

    def __init__(self, file: io.FileIO) -> None:
        self._file: io.BufferedWriter | None = io.BufferedWriter(file)
        self._hash = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._file is not None:  # else discarded: Parquet still writes when it is closed
            self._file.write(data)
            self._hash.update(data)
        size: int = memoryview(data).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def finish(self) -> tuple[int, str]:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self.discard()
        return self._size, self._hash.hexdigest()

    def discard(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # a full disk shows again when buffers are flushed
                file.close()


class TableFile:
    """A Parquet file of one table that is being written, one row group after another.

    A file for an object store is an unnamed temporary file until it is complete and uploaded.

    Args:
        path: the path; no such file may exist.
        table: the schema and the options of the table.

    Raises:
        OutputError: if the file cannot be written.
    """

    def __init__(self, path: Place, table: TableSchema) -> None:
        self.path = path
        self.rows = 0
        self._table = table
        self._spool: io.FileIO | None = None
        with writing(path):
            if isinstance(path, Remote):
                self._spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                file = io.FileIO(os.dup(self._spool.fileno()), "w")
            else:
                file = io.FileIO(path, "x")
            self._file = _HashedFile(file)
            self._parquet = pq.ParquetWriter(self._file, table.schema, **table.write_options)

    def write(self, data: pa.Table) -> int:
        """Appends `data` as new row groups, and returns their number.

        Raises:
            OutputError: if it cannot be written.
            ValueError: if the columns are not those of the table.
        """
        if not data.schema.equals(self._table.schema):
            raise ValueError(f"table {self._table.name!r}: other columns than its schema's")
        if not data.num_rows:
            return 0
        size = self._table.row_group_size
        with writing(self.path):
            self._parquet.write_table(data, row_group_size=size)
        self.rows += data.num_rows
        groups: int = -(-data.num_rows // size)
        return groups

    def finish(self, metadata: Mapping[str, str] | None = None) -> FileEntry:
        """Writes the footer, syncs and closes the file; `publish` uploads it to an object store.

        Args:
            metadata: further entries of the footer.

        Raises:
            OutputError: if it cannot be written.
        """
        with writing(self.path):
            if metadata:
                self._parquet.add_key_value_metadata(dict(metadata))
            self._parquet.close()
            size, digest = self._file.finish()
        return FileEntry(self.path.name, self.rows, size, digest)

    def publish(self, path: Place | None = None) -> None:
        """Gives the finished file its name: `path`, or the path that it was made with.

        Raises:
            OutputError: if it cannot be renamed or uploaded.
        """
        path = path or self.path
        with writing(path):
            if self._spool is not None:
                storage_of(path).upload(self._spool.fileno(), path)
            elif path != self.path:
                os.replace(str(self.path), str(path))
        self.path = path

    def close(self) -> None:
        """Closes the temporary file; a published file stays."""
        if self._spool is not None:
            self._spool.close()

    def discard(self) -> None:
        """Closes and removes the file."""
        self._file.discard()
        with suppress(OSError):
            self._parquet.close()
        self.close()
        with suppress(OSError):
            storage_of(self.path).delete([self.path])
