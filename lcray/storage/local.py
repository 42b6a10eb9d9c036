"""The local file system: write a temporary file, fsync, then name it by link or rename."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lcray.storage.base import Item

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
#: PostgreSQL ignores the first four, too.
_NO_SYNC = (
    *(errno.EINVAL, errno.EBADF, errno.EISDIR, errno.EACCES),
    *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ENOTTY),
)


class LocalStorage:
    """The contract on a file system."""

    def find(self, folder: Path) -> list[Item]:
        """Every file below `folder`, by name."""
        found = []
        for top, _, names in os.walk(folder, onerror=_unless_absent):
            for name in names:
                path = Path(top, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    stamp = f"{status.st_mtime_ns}-{status.st_ino}"
                    found.append(Item(path.relative_to(folder).as_posix(), status.st_size, stamp))
        return sorted(found, key=lambda item: item.name)

    def size(self, file: Path) -> int:
        """Bytes of a file."""
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise OSError(errno.EINVAL, "not a regular file")
        return status.st_size

    def exists(self, file: Path) -> bool:
        """Whether there is such a file."""
        return file.is_file()

    def read(self, file: Path, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file."""
        self.size(file)
        with open(file, "rb") as opened:
            opened.seek(start)
            data = opened.read(-1 if stop is None else stop - start)
        if stop is not None and len(data) != stop - start:
            raise OSError(errno.EIO, f"ends at byte {start + len(data)}, should reach {stop}")
        return data

    def write(self, file: Path, data: bytes) -> None:
        """Puts a file, whole or not at all."""
        with _temporary(file, io.BytesIO(data)) as whole:
            _replace(whole, file)

    def create(self, file: Path, data: bytes) -> bool:
        """Puts a file, whole or not at all, if there is none."""
        with _temporary(file, io.BytesIO(data)) as whole:
            return _link(whole, file, data)

    def upload(self, source: int, file: Path) -> None:
        """Puts the contents of an open file."""
        os.lseek(source, 0, os.SEEK_SET)
        with os.fdopen(os.dup(source), "rb") as opened, _temporary(file, opened) as whole:
            _replace(whole, file)

    def delete(self, files: Sequence[Path]) -> None:
        """Removes files."""
        for file in files:
            file.unlink(missing_ok=True)


LOCAL = LocalStorage()


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # else what cannot be listed would look empty
        raise error


@contextmanager
def _temporary(path: Path, content: BinaryIO) -> Iterator[Path]:
    """A synced file beside `path` with this content; what is left of it goes with the block."""
    temporary = path.with_name(f"{path.name}-{uuid.uuid4().hex}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_synced(temporary, content)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, content: BinaryIO) -> None:
    with open(path, "xb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_folder(path.parent)


def _link(temporary: Path, path: Path, text: bytes) -> bool:
    """Gives `temporary` its final name unless that is taken: one step, decided by the kernel."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        if os.path.islink(path) and not os.path.exists(path):
            raise OSError(errno.EEXIST, "a link that leads nowhere is in its place") from None
        # Over NFS a repeated request can report the link that its first try made.
        return os.path.samefile(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:  # no links here: an exclusive create is as exclusive, but may be torn by a crash
            _write_synced(path, io.BytesIO(text))
        except FileExistsError:
            return False
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path | int) -> None:
    """Makes the names in a folder durable, where its file system can.

    Args:
        folder: its path, or an open descriptor of it, which stays open.

    Raises:
        OSError: if that failed; a file system that syncs no folders (some of CIFS, of Ceph and of
            FUSE), and a folder that one may write to but not read, are no failure.
    """
    descriptor = folder if isinstance(folder, int) else -1
    try:
        if isinstance(folder, Path):
            descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        if isinstance(folder, Path) and descriptor >= 0:
            os.close(descriptor)
