"""The entries of a run's folders: listed folder by folder locally, all at once on object stores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lcray.checkpoints import naming
from lcray.checkpoints.reading import stamp_of
from lcray.errors import CheckpointError
from lcray.storage import Item, Place, Remote, storage_of


class Folders:
    """The folders of a run.

    Args:
        root: the run.

    Raises:
        CheckpointError: no such run, or it cannot be listed.
    """

    def __init__(self, root: Place) -> None:
        self.root = root
        self._items = _listed(root) if isinstance(root, Remote) else {}

    def entries(self, folder: Place) -> list[tuple[str, bool]]:
        """The names in a folder that may be checkpoints, and whether each is a folder.

        Raises:
            CheckpointError: no such folder, or it cannot be listed.
        """
        if isinstance(folder, Remote):
            found = [(name, item is None) for name, item in self._of(folder).items()]
        else:
            found = _scanned(folder)
        return sorted(each for each in found if not naming.is_ignored(each[0]))

    def file(self, folder: Place, name: str) -> Place:
        """A file, with the size and stamp that the listing gave."""
        file = folder / name
        if not isinstance(file, Remote) or (item := self._of(folder).get(name)) is None:
            return file
        return Remote(file.protocol, file.path, item.size, item.stamp)

    def described(self, file: Place) -> tuple[int, str]:
        """Bytes and stamp of a file; 0 and empty if unknown: reading the file then says why."""
        if isinstance(file, Remote):
            return file.size or 0, stamp_of(file)
        try:
            status = file.stat()
        except OSError:  # a dangling link
            return 0, ""
        return status.st_size, stamp_of(file, status)

    def _of(self, folder: Place) -> Mapping[str, Item | None]:
        return self._items.get("" if folder == self.root else folder.name, {})


def _scanned(folder: Path) -> list[tuple[str, bool]]:
    try:
        with os.scandir(folder) as scan:
            return [(entry.name, entry.is_dir()) for entry in scan]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: no such run; give the directory of checkpoints"
        ) from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{folder}: a run is a directory, and this is a file") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error


def _listed(root: Remote) -> dict[str, dict[str, Item | None]]:
    """The objects in each folder, None for a folder in it; the root's own name is empty."""
    try:
        items = storage_of(root).find(root)
    except NotADirectoryError as error:
        raise CheckpointError(f"{root}: a run is a directory, and this is a file") from error
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be listed: {error.strerror}") from error
    if not items:
        raise CheckpointError(f"{root}: no such run; give the directory of checkpoints")
    top: dict[str, Item | None] = {}
    found = {"": top}
    for item in items:
        first, slash, rest = item.name.partition("/")
        if not slash:
            top[first] = item
            continue
        top.setdefault(first, None)
        name, deeper, _ = rest.partition("/")
        found.setdefault(first, {})[name] = None if deeper else item
    return found
