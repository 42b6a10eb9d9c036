"""The entries of a run's folders: listed folder by folder locally, all at once on object stores."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from lcray.checkpoints import naming
from lcray.checkpoints.reading import stamp_of
from lcray.errors import CheckpointError
from lcray.storage import Item, Place, Remote, storage_of


class Folders(ABC):
    """The folders of a run.

    Attributes:
        root: the run.
    """

    root: Place

    @abstractmethod
    def entries(self, folder: Place) -> list[tuple[str, bool]]:
        """The names in a folder that may be checkpoints, and whether each is a folder.

        Raises:
            CheckpointError: no such folder, or it cannot be listed.
        """

    @abstractmethod
    def file(self, folder: Place, name: str) -> Place:
        """A file, with the size and stamp that the listing gave."""

    @abstractmethod
    def described(self, file: Place) -> tuple[int, str]:
        """Bytes and stamp of a file; 0 and empty if unknown: reading the file then says why."""


def open_folders(root: Place) -> Folders:
    """The folders of the run at `root`.

    Raises:
        CheckpointError: no such run, or it cannot be listed.
    """
    return _Listed(root) if isinstance(root, Remote) else _Scanned(root)


class _Scanned(Folders):
    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, folder: Place) -> list[tuple[str, bool]]:
        assert isinstance(folder, Path)
        try:
            with os.scandir(folder) as scan:
                found = [(e.name, e.is_dir()) for e in scan if not naming.is_ignored(e.name)]
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder}: no such run; give the directory of checkpoints"
            ) from error
        except NotADirectoryError as error:
            raise CheckpointError(f"{folder}: a run is a directory, and this is a file") from error
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error
        return sorted(found)

    def file(self, folder: Place, name: str) -> Place:
        return folder / name

    def described(self, file: Place) -> tuple[int, str]:
        try:
            status = os.stat(str(file))
        except OSError:  # a dangling link
            return 0, ""
        return status.st_size, stamp_of(file, status)


class _Listed(Folders):
    def __init__(self, root: Remote) -> None:
        self.root: Remote = root
        self._items: dict[str, dict[str, Item | None]] = {}
        try:
            items = storage_of(root).find(root)
        except NotADirectoryError as error:
            raise CheckpointError(f"{root}: a run is a directory, and this is a file") from error
        except OSError as error:
            raise CheckpointError(f"{root}: cannot be listed: {error.strerror}") from error
        if not items:
            raise CheckpointError(f"{root}: no such run; give the directory of checkpoints")
        for item in items:
            first, slash, rest = item.name.partition("/")
            top = self._items.setdefault("", {})
            if not slash:
                top[first] = item
                continue
            top.setdefault(first, None)
            name, deeper, _ = rest.partition("/")
            self._items.setdefault(first, {})[name] = None if deeper else item

    def _of(self, folder: Place) -> Mapping[str, Item | None]:
        return self._items.get("" if folder == self.root else folder.name, {})

    def entries(self, folder: Place) -> list[tuple[str, bool]]:
        found = self._of(folder).items()
        return sorted((name, item is None) for name, item in found if not naming.is_ignored(name))

    def file(self, folder: Place, name: str) -> Place:
        item, file = self._of(folder).get(name), folder / name
        if item is None or not isinstance(file, Remote):
            return file
        return Remote(file.protocol, file.path, item.size, item.stamp)

    def described(self, file: Place) -> tuple[int, str]:
        return (file.size or 0) if isinstance(file, Remote) else 0, stamp_of(file)
