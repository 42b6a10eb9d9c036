"""Files that are whole or absent: sealed JSON, and Parquet with a running checksum.

Existence is not completeness: everything is written under a temporary or private name, synced,
and only then given its name, and what names other files carries their checksums.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lcray.errors import CorruptionError, OutputError
from lcray.schema import TableSchema

LOCK = ".lock"  # the name of the file in an output
_JSON_LIMIT = 1 << 28  # bytes; analysis.json holds one checksum a checkpoint
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@dataclass(frozen=True)
class FileEntry:
    """What is known of a finished file.

    Attributes:
        name: without its folder.
        rows: of the table in it.
        bytes: its size.
        sha256: of its contents, in hexadecimal digits.
    """

    name: str
    rows: int
    bytes: int
    sha256: str


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into an `OutputError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{path}: cannot be written ({reason}); make room or give access, then run the same "
            "command again: what is committed is kept"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process that asks for it out of `folder`, while the block lasts.

    The operating system lets go when the process ends, however it ends.

    Raises:
        OutputError: if another process is at work there, or the lock cannot be written.
    """
    path = folder / LOCK
    with writing(path):
        file = open(path, "a", opener=_plainly)  # noqa: SIM115 - its errors are not the block's
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another lcray process is at work on it; wait until it has ended"
            ) from error
        yield


def _plainly(path: str, flags: int) -> int:
    """Opens neither what a link leads to nor a pipe, on which it would wait."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def confined(root: Path, path: Path) -> Path:
    """`path`, which is under `root` by its name, unless links lead it out of there.

    Raises:
        CorruptionError: if they do.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise CorruptionError(
            f"{path}: a link leads out of {root}, and nothing outside is touched; put the real "
            "file or folder in its place"
        )
    return path


def encode_json(data: Mapping[str, Any]) -> bytes:
    """The one way in which lcray writes JSON."""
    return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` preceded by a checksum of its own text."""
    return {"checksum": hashlib.sha256(encode_json(data)).hexdigest(), **data}


def write_json_atomic(path: Path, data: Mapping[str, Any], *, exclusive: bool = False) -> bool:
    """Writes a JSON object to `path`, whole or not at all.

    Args:
        path: where to; its folder is created.
        data: the object.
        exclusive: leave a file that exists as it is.

    Returns:
        whether it was written; False only if `exclusive` and the file exists.

    Raises:
        OutputError: if it cannot be written.
    """
    text = encode_json(data)
    temporary = path.with_name(f"{path.name}-{uuid.uuid4().hex}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(temporary, text)
            if exclusive:
                return _link(temporary, path, text)
            os.replace(temporary, path)
            sync_folder(path.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)


def _write_synced(path: Path, text: bytes) -> None:
    with open(path, "xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, path: Path, text: bytes) -> bool:
    """Gives `temporary` its final name unless that is taken: one step, decided by the kernel."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # Over NFS a repeated request can report the link that its first try made.
        return os.path.samefile(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:  # no links here: an exclusive create is as exclusive, but may be torn by a crash
            _write_synced(path, text)
        except FileExistsError:
            return False
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        OutputError: if there is no such file or it cannot be read.
        CorruptionError: if it is not a JSON object of a sensible size.
    """
    return _parse(path, _read(path))


def read_sealed(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, without the checksum that `seal` put first.

    Raises:
        OutputError: if there is no such file or it cannot be read.
        CorruptionError: if it is not the object that was written, byte for byte.
    """
    text = _read(path)
    data = _parse(path, text)
    checksum = data.pop("checksum", None)
    try:
        sealed = seal(data)
        same = checksum == sealed["checksum"] and text == encode_json(sealed)
    except (ValueError, RecursionError):  # NaN, half a surrogate pair, depth: never written so
        same = False
    if not same:
        raise CorruptionError(f"{path}: differs from its own checksum; {_REPAIR}")
    return data


_REPAIR = "restore it, or remove its folder and run the same command again"


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise OSError(errno.EINVAL, "not a regular file")
        with open(path, "rb") as file:
            text = file.read(_JSON_LIMIT + 1)
    except FileNotFoundError as error:
        raise OutputError(f"{path}: no such file; is this the output of an analysis?") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); check access") from error
    if len(text) > _JSON_LIMIT:
        raise CorruptionError(f"{path}: larger than {_JSON_LIMIT} bytes; {_REPAIR}")
    return text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path}: not valid JSON; {_REPAIR}") from error
    if not isinstance(data, dict):
        raise CorruptionError(f"{path}: not a JSON object; {_REPAIR}")
    return data


class _HashedFile(io.RawIOBase):
    """A new file that is written once from start to end, with size and checksum kept."""

    def __init__(self, path: Path) -> None:
        self._file: io.BufferedWriter | None = io.BufferedWriter(io.FileIO(path, "x"))
        self._hash = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._file is not None:  # else discarded: what Parquet still writes on closing is lost
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
    """A Parquet file of one table being written, row groups in the order they come.

    Args:
        path: a name that no file has.
        table: its schema and options.

    Raises:
        OutputError: if the file cannot be written.
    """

    def __init__(self, path: Path, table: TableSchema) -> None:
        self.path = path
        self.rows = 0
        self._table = table
        with writing(path):
            self._file = _HashedFile(path)
            self._parquet = pq.ParquetWriter(self._file, table.schema, **table.write_options)

    def write(self, data: pa.Table) -> int:
        """Appends `data` as row groups of their own, and returns how many.

        Raises:
            OutputError: if the disk refuses.
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
        """Writes the footer, syncs and closes.

        Args:
            metadata: further entries of the footer.

        Raises:
            OutputError: if the disk refuses.
        """
        with writing(self.path):
            if metadata:
                self._parquet.add_key_value_metadata(dict(metadata))
            self._parquet.close()
            size, digest = self._file.finish()
        return FileEntry(self.path.name, self.rows, size, digest)

    def discard(self) -> None:
        """Closes and removes the file."""
        self._file.discard()
        with suppress(OSError):
            self._parquet.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
