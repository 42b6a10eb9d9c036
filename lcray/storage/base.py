"""The contract that every storage keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """One file of a listing.

    Attributes:
        name: its path relative to the folder that was listed, with ``/`` between parts.
        size: bytes.
        stamp: changes with the contents; empty where the storage has no such value.
    """

    name: str
    size: int
    stamp: str


class Storage(Protocol):
    """The contract. Every method raises an `OSError` with one line as its `strerror`.

    It is `FileNotFoundError` where there is no such file, `PermissionError` where access is
    denied, and a plain `OSError` otherwise.
    """

    def find(self, folder: Any) -> list[Item]:
        """Every file below `folder`, sorted by name; empty if there is none or no such folder."""

    def size(self, file: Any) -> int:
        """Bytes of a file."""

    def exists(self, file: Any) -> bool:
        """Whether there is such a file."""

    def read(self, file: Any, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, all of them or an error; `stop` None means its end."""

    def write(self, file: Any, data: bytes) -> None:
        """Writes a file, whole or not at all; replaces a file of that name."""

    def create(self, file: Any, data: bytes) -> bool:
        """Writes a file, whole or not at all, if there is none; returns whether it did.

        `data` must contain an id of its own: a repeated request then recognises its own file.
        """

    def upload(self, source: int, file: Any) -> None:
        """Like `write`, from the start of an open local file, given by its descriptor."""

    def delete(self, files: Sequence[Any]) -> None:
        """Removes files; a file that is already gone is not an error."""
