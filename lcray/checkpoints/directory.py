"""A locked directory that one recorder writes; every file appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from lcray.errors import RecorderError
from lcray.storage import sync_folder

_TEMPORARY = ".tmp"


class LockedDirectory:
    """Holds the lock of a directory until `close`, and writes its files atomically."""

    def __init__(self, path: Path):
        self.path = path
        self._pid = os.getpid()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise RecorderError(f"{path}: cannot record here: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise RecorderError(
                f"{path}: another recorder is writing here; close it, or record on one process "
                "only (rank 0)"
            ) from error
        except OSError:  # no locks on this file system; the file protocol works without
            pass
        for left in path.glob(f".*{_TEMPORARY}"):  # of a killed recorder: never a whole checkpoint
            with contextlib.suppress(OSError):
                left.unlink()

    @property
    def is_forked(self) -> bool:
        """Whether this is the copy in a forked process; the lock belongs to the original."""
        return os.getpid() != self._pid

    def write(self, name: str, chunks: Sequence[bytes | memoryview]) -> None:
        """Write `name` from `chunks`: temporary name, fsync, rename, fsync of the directory.

        Raises:
            OSError: it could not be written; no part of it remains.
        """
        target = self.path / name
        temporary = self.path / f".{name}{_TEMPORARY}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                for chunk in chunks:
                    _write_all(fd, memoryview(chunk).cast("B"))
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(self._fd)

    def remove(self, paths: Sequence[Path]) -> None:
        """Remove files, the last first, so that a crash leaves the first ones."""
        for path in reversed(paths):
            path.unlink()
        sync_folder(self._fd)

    def close(self) -> None:
        """Release the lock; further calls do nothing."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                # Explicitly: a forked data loader may still hold a copy of the descriptor.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
