"""Objects opened as files: whole and in order through the cache, or piece by piece."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from io import BufferedReader, FileIO
from typing import BinaryIO

from lcray.storage.cache import shared_cache
from lcray.storage.objects import ObjectStorage, object_storage
from lcray.storage.places import Place, Remote
from lcray.storage.retries import Changed

PIECE = 16 << 20  # bytes of an object that one request asks for


class ObjectReader(io.RawIOBase):
    """An object as a raw file that keeps one piece of it in memory.

    Args:
        storage: the storage that holds the object.
        file: the object, with size and stamp.
        piece: bytes per request; `PIECE` if None.
    """

    def __init__(self, storage: ObjectStorage, file: Remote, piece: int | None = None) -> None:
        assert file.size is not None
        self.size = file.size
        self._storage, self._file, self._piece = storage, file, piece or PIECE
        self._at = self._start = 0
        self._held = b""

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, as in any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, memory: object) -> int:
        """Fill `memory` with some of the bytes that follow; returns how many."""
        view = memoryview(memory).cast("B")  # type: ignore[arg-type]
        offset = self._at - self._start
        if not 0 <= offset < len(self._held):
            stop = min(self.size, self._at + self._piece)
            if self._at >= stop or not len(view):
                return 0
            self._held = self._storage.read(self._file, self._at, stop)
            self._start, offset = self._at, 0
        taken = min(len(view), len(self._held) - offset)
        view[:taken] = self._held[offset : offset + taken]
        self._at += taken
        return taken


def reader_of(file: Remote, piece: int | None = None) -> ObjectReader:
    """The object as a raw file, straight from its storage.

    Raises:
        OSError: if there is no such object.
    """
    storage = object_storage(file)
    return ObjectReader(storage, file if file.size is not None else storage.stamped(file), piece)


def open_binary(where: Place, buffer: int) -> BufferedReader:
    """A file to be read once from front to back; an object comes through the cache.

    Args:
        where: the file.
        buffer: bytes to read ahead, for a local file.

    Raises:
        OSError: if it cannot be read, or has changed since it was listed.
    """
    if not isinstance(where, Remote):
        return BufferedReader(FileIO(where), buffer)
    storage = object_storage(where)
    known = where if where.size is not None else storage.stamped(where)
    cached = shared_cache().open(known, lambda target: _fetch(storage, known, target))
    return BufferedReader(cached or ObjectReader(storage, known), buffer)


def current(file: Remote) -> Remote:
    """`file` with its current size and stamp: one request.

    Raises:
        OSError: if there is no such object.
    """
    return object_storage(file).stamped(file)


def open_seekable(where: Place) -> BinaryIO:
    """A file for random access; an object comes through the cache."""
    return open_binary(where, 1 << 16)


def open_uncached(where: Place) -> BinaryIO:
    """A file for a few small reads at random positions, straight from its storage."""
    if isinstance(where, Remote):
        return BufferedReader(reader_of(where, 1 << 20), 1 << 16)
    return open(where, "rb")


def sha256_of(where: Place) -> str:
    """The SHA-256 checksum of a file as its storage has it, in hexadecimal digits.

    Raises:
        OSError: if it cannot be read.
    """
    with reader_of(where) if isinstance(where, Remote) else open(where, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(storage: ObjectStorage, file: Remote, target: FileIO) -> None:
    """Copies a whole object into a file; raises `Changed` if it differs from its listing."""
    reader, piece = ObjectReader(storage, file), memoryview(bytearray(1 << 20))
    while taken := reader.readinto(piece):
        rest = piece[:taken]
        while rest:
            rest = rest[target.write(rest) :]
    now = storage.stamped(file)
    if (now.size, now.stamp) != (file.size, file.stamp):
        raise Changed(errno.ESTALE, "it changed while it was read")
