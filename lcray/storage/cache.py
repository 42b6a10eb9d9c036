"""A bounded local cache of whole objects, shared by the processes of a machine.

Where room is needed, the least recently used objects go first.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path

from lcray.storage.places import Remote
from lcray.storage.retries import positive_setting

DEFAULT_GIB = 10.0
_STRIPES = 64  # locks, so that two workers do not fetch one object twice
_PART = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Cache:
    """Objects found by address, size and stamp; one file of the folder per object.

    Args:
        folder: created if absent, for this user alone.
        limit: bytes that all files of the folder may take, including those being fetched.

    Raises:
        OSError: if the folder cannot be created, or belongs to another user.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PermissionError(
                errno.EACCES, f"the cache {folder} is not yours; set LCRAY_CACHE to a folder"
            )

    def open(self, file: Remote, fetch: Callable[[FileIO], None]) -> FileIO | None:
        """The object as an open local file; None if there is no room.

        The file stays readable while it is open, even if it is evicted.

        Args:
            file: the object, with size and stamp.
            fetch: writes the object into a new file, if the cache does not have it.

        Raises:
            OSError: if it cannot be fetched, or has changed since it was listed.
        """
        assert file.size is not None
        if not file.stamp or file.size > self.limit:
            return None
        text = f"{file}|{file.size}|{file.stamp}"
        path = self.folder / hashlib.sha256(text.encode()).hexdigest()
        found = self._hit(path, file.size)
        if found is None:
            with self._locked(f"lock-{int(path.name[:8], 16) % _STRIPES}"):
                found = self._hit(path, file.size)  # another worker may have been first
                return found or self._fetch(path, file, fetch)
        return found

    def _hit(self, path: Path, size: int) -> FileIO | None:
        try:
            found = FileIO(path)
        except FileNotFoundError:
            return None
        if os.fstat(found.fileno()).st_size != size:
            found.close()
            return None
        os.utime(found.fileno())
        return found

    def _fetch(self, path: Path, file: Remote, fetch: Callable[[FileIO], None]) -> FileIO | None:
        part = path.with_name(f"{path.name}-{uuid.uuid4().hex}{_PART}")
        assert file.size is not None
        opened = self._reserve(part, file.size)
        if opened is None:
            return None
        try:
            fetch(opened)
            os.fsync(opened.fileno())
            os.replace(part, path)
            opened.seek(0)
            fcntl.flock(opened, fcntl.LOCK_UN)
        except BaseException as error:
            opened.close()
            with suppress(OSError):
                part.unlink()
            if isinstance(error, OSError) and error.errno in _FULL:
                return None  # a full disk must not prevent reading
            raise
        return opened

    def _reserve(self, part: Path, size: int) -> FileIO | None:
        """A new file of `size` bytes, once the least recently used ones have made room for it."""
        with self._locked("lock"):
            if not self._make_room(size):
                return None
            opened = FileIO(part, "x+")
            fcntl.flock(opened, fcntl.LOCK_EX)  # the system releases it if this process dies
            os.truncate(opened.fileno(), size)
            return opened

    def _make_room(self, size: int) -> bool:
        files = []
        with os.scandir(self.folder) as scan:
            for entry in scan:
                if not entry.name.startswith("lock"):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
        taken = sum(held for _, held, _ in files)
        for _, held, path in sorted(files):
            if taken + size <= self.limit:
                break
            if not path.endswith(_PART) or _is_orphan(path):
                with suppress(FileNotFoundError):
                    os.unlink(path)
                taken -= held
        return taken + size <= self.limit

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / name, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_orphan(path: str) -> bool:
    """Whether the process that was fetching this file has died."""
    with suppress(OSError), open(path, "rb") as part:
        fcntl.flock(part, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


def shared_cache() -> Cache:
    """The cache that ``LCRAY_CACHE`` and ``LCRAY_CACHE_GIB`` name.

    Raises:
        UsageError: if the size is not a number.
        OSError: if its folder cannot be used.
    """
    default = Path(tempfile.gettempdir()) / f"lcray-cache-{os.getuid()}"
    folder = Path(os.environ.get("LCRAY_CACHE") or default)
    return _cache(folder, int(positive_setting("LCRAY_CACHE_GIB", DEFAULT_GIB) * 2**30))


@lru_cache(maxsize=4)
def _cache(folder: Path, limit: int) -> Cache:
    return Cache(folder, limit)
