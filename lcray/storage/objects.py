"""Object stores and every other file system that fsspec knows, with retries around every call."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from lcray.errors import OutputError
from lcray.storage.base import Item
from lcray.storage.places import Remote
from lcray.storage.retries import Changed, code_of, persistently

_BUFFER = 64 << 20  # bytes; larger files are uploaded in parts, straight from disk
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
_STAMPS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "checksum")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
_TAKEN = ("PreconditionFailed", "412")


class ObjectStorage:
    """The contract on an fsspec file system.

    Args:
        system: the file system, without a cache of listings and without retries of its own.
    """

    def __init__(self, system: Any) -> None:
        self._system = system

    def find(self, folder: Remote) -> list[Item]:
        """Every object below `folder`, by name."""
        top = self._path(folder).strip("/") + "/"
        try:
            found = persistently(lambda: self._system.find(self._path(folder), detail=True))
        except FileNotFoundError:
            return []
        items = []
        for path, info in found.items():
            name = path.strip("/").removeprefix(top)
            if name == top[:-1]:
                raise NotADirectoryError(errno.ENOTDIR, "is an object, not a folder")
            if info.get("type") != "directory" and not path.endswith("/"):
                items.append(Item(name, int(info.get("size") or 0), _stamp(info)))
        return sorted(items, key=lambda item: item.name)

    def size(self, file: Remote) -> int:
        """Bytes of an object."""
        return int(self._info(file)["size"])

    def _info(self, file: Remote) -> dict[str, Any]:
        info: dict[str, Any] = persistently(lambda: self._system.info(self._path(file)))
        if info.get("type") == "directory":
            raise FileNotFoundError(errno.ENOENT, "no such object")
        return info

    def stamped(self, file: Remote) -> Remote:
        """`file` with its size and stamp."""
        info = self._info(file)
        return Remote(file.protocol, file.path, int(info["size"]), _stamp(info))

    def exists(self, file: Remote) -> bool:
        """Whether there is such an object."""
        try:
            self._info(file)
        except FileNotFoundError:
            return False
        return True

    def read(self, file: Remote, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object; an answer that was cut off is requested again."""
        if stop is None:
            stop = self.size(file)
        if start == stop:
            return b""
        data: bytes = persistently(lambda: self._read(file, start, stop))
        return data

    def _read(self, file: Remote, start: int, stop: int) -> bytes:
        data: bytes = self._system.cat_file(self._path(file), start=start, end=stop)
        if len(data) != stop - start:
            if self.size(file) < stop:
                raise Changed(errno.ESTALE, "it changed while it was read")
            raise OSError(errno.EIO, f"{len(data)} bytes arrived, of {stop - start}")
        return data

    def write(self, file: Remote, data: bytes) -> None:
        """Writes an object."""
        persistently(lambda: self._system.pipe_file(self._path(file), data))

    def create(self, file: Remote, data: bytes) -> bool:
        """Writes an object if there is none; the store decides, in one request.

        If an answer is lost, the HTTP client may repeat the request unseen, and so does lcray: an
        object that turns out to hold `data` is the one that was just written.
        """

        def put() -> bool:
            try:
                self._system.pipe_file(self._path(file), data, mode="create")
            except OSError as error:
                if not isinstance(error, FileExistsError) and code_of(error) not in _TAKEN:
                    raise
                return bool(self._system.cat_file(self._path(file)) == data)
            return True

        return persistently(put)

    def upload(self, source: int, file: Remote) -> None:
        """Writes the contents of an open file; in parts if it is large."""
        size = os.fstat(source).st_size
        if size <= _BUFFER:
            self.write(file, os.pread(source, size, 0))
            return

        def put() -> None:
            os.lseek(source, 0, os.SEEK_SET)
            self._system.put_file(f"/dev/fd/{source}", self._path(file))
            there = self._system.info(self._path(file))["size"]
            if there != size:
                raise OSError(errno.EIO, f"{there} bytes arrived, of {size}")

        persistently(put)

    def delete(self, files: Sequence[Remote]) -> None:
        """Removes objects."""
        for file in files:
            with suppress(FileNotFoundError):
                persistently(partial(self._system.rm_file, self._path(file)))

    def _path(self, file: Remote) -> str:
        path: str = self._system._strip_protocol(str(file))
        return path


def object_storage(file: Remote) -> ObjectStorage:
    """The storage that holds `file`.

    Raises:
        OutputError: if a package that it needs is missing, or no file system knows such URIs.
    """
    top = file.path.partition("/")[0]
    return _storage(file.protocol, top, os.getpid())


@lru_cache(maxsize=32)
def _storage(protocol: str, top: str, pid: int) -> ObjectStorage:
    """One per process: after a fork, the connections and threads of the parent do not work."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _EXTRAS:
        timeouts = {"connect_timeout": 10, "read_timeout": 60}
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **timeouts}
    try:
        system, _ = fsspec.core.url_to_fs(f"{protocol}://{top}", **options)
    except ImportError as error:
        raise OutputError(f"{protocol}://{top}: {_missing(protocol)}") from error
    except ValueError as error:
        raise OutputError(
            f"{protocol}://{top}: unknown kind of storage; use a local path, s3://, "
            "gs://, az:// or another protocol of fsspec"
        ) from error
    if protocol in _EXTRAS:
        system.retries = 1
    return ObjectStorage(system)


def _missing(protocol: str) -> str:
    if protocol in _EXTRAS:
        return f"needs the extra {_EXTRAS[protocol]!r}; pip install 'lcray[{_EXTRAS[protocol]}]'"
    package = _PACKAGES.get(protocol)
    if package:
        return f"needs the package {package}; pip install {package}"
    return "needs a package that is not installed; see fsspec's list of implementations"


def _stamp(info: dict[str, Any]) -> str:
    """A value that changes when the object does; listings and single answers both have it."""
    for key in (*_STAMPS, *_TIMES):
        value = info.get(key)
        if value is not None:
            return str(value.timestamp() if isinstance(value, datetime) else value)
    return ""
