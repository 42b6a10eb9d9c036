"""Local copies of a few objects, for a library that reads local files only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lcray.errors import OutputError
from lcray.storage.cache import DEFAULT_GIB, shared_cache
from lcray.storage.places import Place, Remote
from lcray.storage.streams import open_binary, reader_of


@contextmanager
def local_copies(folder: Place, names: Sequence[str]) -> Iterator[Path]:
    """A local folder with the files `names` of `folder`: itself, or copies for the block's time.

    Raises:
        OutputError: if the copies would take more than the cache may.
        OSError: if one cannot be read.
    """
    if not isinstance(folder, Remote):
        yield folder
        return
    files = [reader_of(folder / name) for name in names]
    limit = shared_cache().limit
    if sum(file.size for file in files) > limit:
        raise OutputError(
            f"{folder}: {', '.join(names)} take more than the local cache may "
            f"({limit / 2**30:.3g} GiB, by default {DEFAULT_GIB:g}); set LCRAY_CACHE_GIB higher, "
            "or ask for less"
        )
    with tempfile.TemporaryDirectory(prefix="lcray-") as local:
        for name in names:
            with (
                open_binary(folder / name, 1 << 20) as source,
                open(os.path.join(local, name), "xb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        yield Path(local)
