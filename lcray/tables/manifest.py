"""The manifest of an output's tables: their files, and the spans that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lcray.errors import CorruptionError, OutputError
from lcray.storage import Place
from lcray.storage.files import exists, read_sealed
from lcray.storage.json_types import build, value_of
from lcray.tables.output import Output, check_version
from lcray.tables.parquet import FileEntry
from lcray.tables.schema import TABLES


@dataclass(frozen=True)
class Manifest:
    """The content of ``tables/manifest.json``.

    Attributes:
        plan: checksum of the plan of the tables.
        spans: names of the spans in the tables.
        tables: the file of each table.
    """

    plan: str
    spans: tuple[str, ...]
    tables: Mapping[str, FileEntry]


def read_manifest(out: Place) -> Manifest:
    """The manifest of the tables in `out`.

    Raises:
        OutputError: if there is none, or another version wrote it.
        CorruptionError: if it is damaged.
    """
    path = Output(out).manifest
    if not exists(path):
        raise OutputError(
            f"{out}: has no tables yet; run the analysis again to finish it, or lcray reduce {out}"
        )
    data = read_sealed(path)
    check_version(path, data, f"run lcray reduce {out}")
    try:
        tables = {table: build(FileEntry, entry) for table, entry in data["tables"].items()}
        known = all(t in TABLES and e.name == f"{t}.parquet" for t, e in tables.items())
        spans = value_of(tuple[str, ...], data["spans"], "spans")
        manifest = Manifest(value_of(str, data["plan"], "plan"), spans, tables)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"{path}: not a manifest; run lcray reduce {out}") from error
    if not known:
        raise CorruptionError(f"{path}: names unknown tables; run lcray reduce {out}")
    return manifest
