"""Removing the commits of damaged spans, so that these are computed again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lcray.errors import CorruptionError, OutputError
from lcray.planning.plan import Span
from lcray.storage import Place, storage_of, sync_folder
from lcray.storage.files import writing
from lcray.tables.output import COMMIT, Output
from lcray.tables.shards.commit import read_commit
from lcray.tables.shards.writer import check_files


def take_back(out: Place, spans: Iterable[Span]) -> tuple[Span, ...]:
    """Remove the commits of those `spans` whose files differ from what was written.

    Every committed file is read. Files of sound spans stay unchanged.

    Args:
        out: the output directory, which the caller has locked.
        spans: spans of its plan.

    Returns:
        the spans to compute again.

    Raises:
        OutputError: if a commit belongs to another version or plan, or cannot be removed.
    """
    return tuple(span for span in spans if _is_damaged(out, span) and remove(out, span))


def _is_damaged(out: Place, span: Span) -> bool:
    output = Output(out)
    output.commit(span)  # raises if a link leads elsewhere
    try:
        commit = read_commit(out, span)
    except CorruptionError:
        return True
    if commit is None:
        return False
    for entry in commit.files.values():
        path = output.shard(span, entry.name)
        try:
            if storage_of(path).size(path) != entry.bytes:
                return True
            if entry.bytes:
                storage_of(path).read(path, 0, 1)
        except FileNotFoundError:
            return True
        except OSError as error:  # an unreadable file may still be sound
            raise OutputError(f"{path}: cannot be read ({error.strerror}); check access") from error
    return bool(check_files(out, commit))


def remove(out: Place, span: Span) -> bool:
    """Remove the commit of a span and its files.

    The commit is removed first: without it no file counts, even if removing the rest is
    interrupted.

    Raises:
        OutputError: if it cannot be removed, or a link leads out of `out`.
    """
    folder = Output(out).span(span)
    with writing(folder):
        storage = storage_of(folder)
        storage.delete([folder / COMMIT])
        if isinstance(folder, Path):
            sync_folder(folder)
        with suppress(OSError):
            names = [item.name for item in storage.find(folder) if "/" not in item.name]
            storage.delete([folder / name for name in names if name.endswith(".parquet")])
    return True
