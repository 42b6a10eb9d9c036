"""The storage that holds a place."""

from __future__ import annotations

from lcray.storage.base import Storage
from lcray.storage.local import LOCAL
from lcray.storage.objects import object_storage
from lcray.storage.places import Place, Remote


def storage_of(where: Place) -> Storage:
    """The storage that holds `where`.

    Raises:
        OutputError: if a package that it needs is missing; the message names the extra.
    """
    return object_storage(where) if isinstance(where, Remote) else LOCAL
