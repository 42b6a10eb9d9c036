"""What a storage can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """One file of a listing.

    Attributes:
        name: its path from the place that was listed, with ``/`` between parts.
        size: bytes.
        stamp: changes with the contents; empty where the storage has nothing of the kind.
    """

    name: str
    size: int
    stamp: str


class Storage(Protocol):
    """The contract. Every method raises an `OSError` with one line as its `strerror`.

    `FileNotFoundError` where there is nothing, `PermissionError` where one may not; else plain.
    """

    def find(self, folder: Any) -> list[Item]:
        """Every file below `folder`, by name; empty if there is none or no such folder."""
        ...

    def size(self, file: Any) -> int:
        """Bytes of a file."""
        ...

    def exists(self, file: Any) -> bool:
        """Whether there is such a file."""
        ...

    def read(self, file: Any, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, all of them or an error; None for its end."""
        ...

    def write(self, file: Any, data: bytes) -> None:
        """Puts a file, whole or not at all, in place of one that there may be."""
        ...

    def create(self, file: Any, data: bytes) -> bool:
        """Puts a file, whole or not at all, if there is none; whether it did.

        `data` must be no one else's, by an id in it: a request that was repeated finds its own.
        """
        ...

    def upload(self, source: int, file: Any) -> None:
        """As `write`, from the start of an open local file, given by its descriptor."""
        ...

    def delete(self, files: Sequence[Any]) -> None:
        """Removes files; those that are gone already are no error."""
        ...
