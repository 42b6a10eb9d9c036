"""Commits: the attempt at a span that counts. They are read one by one: there may be 100,000."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcray.errors import CorruptionError, OutputError
from lcray.planning.plan import Span
from lcray.storage import Item, Place, Remote, storage_of
from lcray.storage.files import exists, read_sealed
from lcray.tables.output import COMMIT, Output, check_version, shard_name
from lcray.tables.parquet import FileEntry
from lcray.tables.schema import TABLES

ATTEMPT = re.compile(r"[A-Za-z0-9_.-]{1,80}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READERS = 16
_LINKED = -1  # a link or not a regular file, so that `Output` must check it
_AHEAD = 512  # commits that are requested at a time


@dataclass(frozen=True)
class Commit:
    """The commit of a span: the one attempt that counts.

    Attributes:
        span: the span.
        attempt: the attempt's id.
        files: the files of the attempt, by table.
        checkpoints: the sha256 of the checkpoints that were read, by step.
        info: further values.
        stamps: a value that changes when a checkpoint does, by step, if known.
    """

    span: Span
    attempt: str
    files: Mapping[str, FileEntry]
    checkpoints: Mapping[int, str]
    info: Mapping[str, Any]
    stamps: Mapping[int, str] = field(default_factory=dict)

    @property
    def tables(self) -> frozenset[str]:
        """The tables that it has files for."""
        return frozenset(self.files)


@dataclass(frozen=True, slots=True)
class Outline:
    """The part of a commit that locates its files; small, so that all of them fit into memory.

    Attributes:
        span: the span.
        attempt: the attempt's id.
        tables: the tables that it has files for.
    """

    span: Span
    attempt: str
    tables: frozenset[str]


def read_commit(out: Place, span: Span) -> Commit | None:
    """The commit of `span`, or None if it has none.

    Raises:
        CorruptionError: if ``commit.json`` is damaged.
        OutputError: if it cannot be read, or belongs to another version or plan.
    """
    path = Output(out).commit(span)
    return _read(path, span) if exists(path) else None


def _read(path: Place, span: Span, size: int | None = None) -> Commit:
    data = read_sealed(path, size)
    check_version(path, data, "analyze into a new output")
    if data.get("span") != list(span.steps):
        raise OutputError(
            f"{path}: its checkpoints are not those of the plan; analyze into a new output"
        )
    try:
        return _commit(data, span)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(
            f"{path}: not a valid commit ({error}); remove its folder and run the analysis again"
        ) from error


def _commit(data: dict[str, Any], span: Span) -> Commit:
    attempt = _typed(data, "attempt", str)
    if not ATTEMPT.fullmatch(attempt):
        raise ValueError("attempt")
    files = {}
    for table, entry in _typed(data, "files", dict).items():
        files[table] = FileEntry(
            _typed(entry, "name", str),
            _typed(entry, "rows", int),
            _typed(entry, "bytes", int),
            _typed(entry, "sha256", str),
        )
        # The one name that the writer gives: no path can lead out of the folder.
        if table not in TABLES or files[table].name != shard_name(table, attempt):
            raise ValueError(f"file {files[table].name!r} of table {table!r}")
        if not _SHA256.fullmatch(files[table].sha256) or files[table].rows < 0:
            raise ValueError(f"entry of table {table!r}")
    checkpoints = {int(k): v for k, v in _typed(data, "checkpoints", dict).items()}
    if not all(isinstance(v, str) and k in span.steps for k, v in checkpoints.items()):
        raise ValueError("checkpoints")
    known = _typed(data, "stamps", dict) if "stamps" in data else {}
    stamps = {int(k): v for k, v in known.items()}
    if not all(isinstance(v, str) and k in checkpoints for k, v in stamps.items()):
        raise ValueError("stamps")
    return Commit(span, attempt, files, checkpoints, _typed(data, "info", dict), stamps)


def _typed(data: Any, name: str, kind: type) -> Any:
    value = data[name]
    if type(value) is not kind:  # a bool is no row count
        raise TypeError(f"{name!r} is no {kind.__name__}")
    return value


def each_commit(out: Place, spans: Iterable[Span]) -> Iterator[tuple[Span, Commit]]:
    """The commits of those of `spans` that have one, in the order of `spans`.

    If they are taken one by one, one is in memory at a time, and over a network the next 512.

    Raises:
        CorruptionError, OutputError: as `read_commit`.
    """
    if isinstance(out, Remote):
        yield from _fetched(out, list(spans))
        return
    output = Output(out)
    shards = os.path.realpath(str(output.shards))
    for span in spans:
        found = _look(os.path.join(shards, span.name))
        path: Place = Path(shards, span.name, COMMIT)
        if found == _LINKED:
            path = output.commit(span)
            if exists(path):
                yield span, _read(path, span)
        elif found is not None:
            yield span, _read(path, span, found)


def _look(folder: str) -> int | None:
    """The size of the commit in a folder; None if there is none, or `_LINKED`.

    A folder without a commit may still be a link, and would be written to. Since there are many,
    this takes two system calls instead of the dozens for a path of `Output`.
    """
    try:
        status = os.lstat(os.path.join(folder, COMMIT))
    except (FileNotFoundError, NotADirectoryError):
        return _LINKED if os.path.islink(folder) else None
    except OSError:
        return _LINKED  # `exists` says what is wrong
    plain = stat.S_ISREG(status.st_mode) and not os.path.islink(folder)
    return status.st_size if plain else _LINKED


def _fetched(out: Remote, spans: list[Span]) -> Iterator[tuple[Span, Commit]]:
    """One listing gives the commits and their sizes; then each takes one request."""
    output = Output(out)
    there = {item.name: item.size for item in listed(out) if item.name.endswith("/" + COMMIT)}
    sizes = [there.get(f"{span.name}/{COMMIT}") for span in spans]
    wanted = [(span, size) for span, size in zip(spans, sizes, strict=True) if size is not None]

    def read(pair: tuple[Span, int]) -> tuple[Span, Commit]:
        return pair[0], _read(output.commit(pair[0]), *pair)

    with ThreadPoolExecutor(_READERS, "lcray-commits") as readers:  # each waits for the network
        for start in range(0, len(wanted), _AHEAD):
            yield from readers.map(read, wanted[start : start + _AHEAD])


def listed(out: Place) -> list[Item]:
    """Every file of every attempt, in one listing.

    Raises:
        OutputError: if they cannot be listed.
    """
    try:
        return storage_of(out).find(Output(out).shards)
    except OSError as error:
        raise OutputError(f"{out}: cannot be listed ({error.strerror}); check access") from error
