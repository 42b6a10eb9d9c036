"""Files and objects behind one contract: a local path or a URI of any fsspec file system.

A `Place` is a `pathlib.Path` or a `Remote`; both take ``/``, ``name``, ``parent`` and ``str``. The
functions here read, write, create and delete at a place. They raise an `OSError` of the fitting
kind, whose `strerror` is one line without secrets. Nothing is renamed on an object store: an object
is written whole, or created if absent.
"""

from lcray.storage.base import Item
from lcray.storage.copies import local_copies
from lcray.storage.local import sync_folder
from lcray.storage.places import Place, PlaceLike, Remote, place
from lcray.storage.resolve import storage_of
from lcray.storage.streams import (
    ObjectReader,
    current,
    open_binary,
    open_seekable,
    open_uncached,
    sha256_of,
)
from lcray.storage.write_errors import cure

__all__ = [
    "Item",
    "ObjectReader",
    "Place",
    "PlaceLike",
    "Remote",
    "cure",
    "current",
    "local_copies",
    "open_binary",
    "open_seekable",
    "open_uncached",
    "place",
    "sha256_of",
    "storage_of",
    "sync_folder",
]
