"""An output: its paths, its lock, and its record.

Every path of an output comes from here; a path that a link leads out of the output is refused. All
verbs read ``analysis.json`` here, so they open the same outputs and refuse the others with the same
message.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcray.errors import CorruptionError, OutputError, UsageError
from lcray.planning.plan import Span
from lcray.storage import Place, Remote, storage_of
from lcray.storage.files import (
    ANALYSIS,
    FORMAT_VERSION,
    confined,
    exists,
    parse_json,
    read_whole,
    write_json_atomic,
)
from lcray.storage.lock import LOCK, Lock, locked
from lcray.tables.record import Record, plan_digest

MANIFEST, COMMIT = "manifest.json", "commit.json"
_STATUS, _VIEWS = "status.json", "views.sql"
_SHARDS, _TABLES, _FINDINGS, _TRACED = "shards", "tables", "findings", "traced"

#: Names of the files and folders that lcray keeps in an output.
OWN = (ANALYSIS, _STATUS, _VIEWS, LOCK, _SHARDS, _TABLES, _FINDINGS, _TRACED)


class _Path:
    """A property of an `Output`: the path of one of its files or folders."""

    def __init__(self, doc: str, *names: str) -> None:
        self.__doc__, self._names = doc, names

    def __get__(self, output: Output, kind: type[Output]) -> Place:
        return output.inside(*self._names)


@dataclass(frozen=True)
class Output:
    """The output at a place, whether it exists yet or not.

    Every path from here raises a `CorruptionError` if a link leads out of the output.

    Attributes:
        path: its folder, or its address.
    """

    path: Place
    _parsed: dict[bytes, tuple[Record, str]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def inside(self, *names: str) -> Place:
        """The path of a file or folder in the output."""
        path = self.path
        for name in names:
            path = path / name
        return confined(self.path, path)

    analysis = _Path("The file of the record.", ANALYSIS)
    status = _Path("The file to which the driver writes its progress.", _STATUS)
    views = _Path("The file of the views, for DuckDB.", _VIEWS)
    shards = _Path("The folder of the spans.", _SHARDS)
    tables = _Path("The folder of the tables.", _TABLES)
    manifest = _Path("The file that lists the tables.", _TABLES, MANIFEST)
    traced = _Path("The folder of the output of a second pass.", _TRACED)
    findings = _Path("The folder of the findings.", _FINDINGS)

    def finding(self, name: str) -> Place:
        """The file of a finding."""
        return self.inside(_FINDINGS, f"{name}.parquet")

    def table(self, name: str) -> Place:
        """The file of a table."""
        return self.inside(_TABLES, f"{name}.parquet")

    def span(self, span: Span) -> Place:
        """The folder of a span."""
        return self.inside(_SHARDS, span.name)

    def commit(self, span: Span) -> Place:
        """The file that commits an attempt at a span."""
        return self.inside(_SHARDS, span.name, COMMIT)

    def shard(self, span: Span, name: str) -> Place:
        """A file of an attempt at a span, see `shard_name`."""
        return self.inside(_SHARDS, span.name, name)

    def check_links(self) -> None:
        """Refuse an output if a link leads out of it at a name that lcray writes to.

        Deeper paths are checked when they are written.

        Raises:
            CorruptionError: naming the link.
        """
        for name in OWN:
            self.inside(name)

    def locked(self) -> AbstractContextManager[Lock]:
        """Keep every other lcray process out of the output; see `lcray.storage.lock.locked`.

        Raises:
            OutputError: if another process works on it, or the lock cannot be written.
            CorruptionError: if a link in it leads out of it.
        """
        self.check_links()
        return locked(self.path)

    def beside(self, path: Place) -> Place:
        """`path`, which a user wants to write to, unless lcray keeps a file of its own there.

        Raises:
            UsageError: if it does.
            CorruptionError: if by its name it is in the output, but a link leads out.
        """
        self.check_way(path)
        asked = _plain(path)
        for name in OWN:
            own = _plain(self.path / name)
            if asked == own or asked.startswith(own + "/"):
                raise UsageError(f"{path}: is part of the output {self.path}; name another file")
        return path

    def check_way(self, path: Place) -> None:
        """Refuse a `path` that by any of its names is in the output, but not by its links.

        Raises:
            CorruptionError: naming the link.
        """
        if isinstance(path, Remote) or isinstance(self.path, Remote):
            return
        asked, real = Path(os.path.abspath(path)), os.path.realpath(self.path)
        for above in asked.parents:
            if os.path.realpath(above) == real:
                confined(above, asked)

    def record(self) -> Record:
        """The record of the analysis; read each time, but parsed only if it has changed.

        Raises:
            OutputError: if there is no output, or another version wrote it.
            CorruptionError: if ``analysis.json`` is damaged.
        """
        return self._read()[0]

    def plan_digest(self) -> str:
        """The checksum of the plan as written; see `lcray.tables.record.plan_digest`.

        Raises:
            OutputError, CorruptionError: as `record`.
        """
        return self._read()[1]

    def _read(self) -> tuple[Record, str]:
        path = self.analysis
        text = read_whole(path)
        digest = hashlib.sha256(text).digest()
        if digest not in self._parsed:
            found = _parsed(path, text)
            self._parsed.clear()
            self._parsed[digest] = found
        return self._parsed[digest]

    def existing(self) -> Record | None:
        """As `record`; None if the place is empty or missing.

        Raises:
            OutputError: also if the place holds something other than an output.
        """
        if exists(self.analysis):
            return self.record()
        try:
            self._check_vacant()
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be read ({error.strerror}); check access"
            ) from error
        return None

    def write(self, record: Record) -> None:
        """Write the record; the file is written whole or not at all.

        Raises:
            OutputError: if it cannot be written.
            CorruptionError: if a link leads out of the output.
        """
        write_json_atomic(self.analysis, {"format_version": FORMAT_VERSION, **record.to_dict()})

    def _check_vacant(self) -> None:
        path = self.path
        if isinstance(path, Remote):
            try:
                names = {item.name.partition("/")[0] for item in storage_of(path).find(path)}
            except NotADirectoryError as error:
                raise OutputError(f"{path}: is a file; choose another --out") from error
        elif path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a file; choose another --out")
        else:
            names = {entry.name for entry in path.iterdir()} if path.exists() else set()
        if names - {LOCK}:
            raise OutputError(f"{path}: not empty, and no output of lcray; choose another --out")


def shard_name(table: str, attempt: str) -> str:
    """The name of an attempt's file of a table, in the folder of its span."""
    return f"{table}-{attempt}.parquet"


def check_version(path: Place, data: Mapping[str, Any], cure: str) -> None:
    """Refuse the content of a file that another version wrote.

    Raises:
        OutputError: naming the version, and `cure`, which says what to do.
    """
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise OutputError(
            f"{path}: format version {version!r}, this lcray reads {FORMAT_VERSION}; {cure}"
        )


def _parsed(path: Place, text: bytes) -> tuple[Record, str]:
    data = parse_json(path, text)
    if "format_version" in data:
        check_version(path, data, "analyze into a new output")
    try:
        data["format_version"]
        return Record.from_dict(data), plan_digest(data["plan"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CorruptionError(
            f"{path}: not valid: it holds no valid plan and record ({reason}); restore it, or "
            "analyze into a new output"
        ) from error


def _plain(path: Place) -> str:
    return str(path) if isinstance(path, Remote) else os.path.realpath(path)
