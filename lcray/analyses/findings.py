"""The verb `findings`: computes every finding that an output's tables allow, and stores it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from lcray.analyses.registry import FINDINGS, Finding
from lcray.analyses.requirements import require
from lcray.analyses.windows import Ranges
from lcray.errors import InapplicableError, UsageError, suggest
from lcray.storage import Place, PlaceLike, storage_of
from lcray.storage.files import writing
from lcray.tables.manifest import read_manifest
from lcray.tables.reading.results import open_output


@dataclass(frozen=True)
class Findings(Mapping[str, pa.Table]):
    """The tables by the findings' names, in the registry's order.

    Attributes:
        path: the folder that holds their files.
        tables: by name.
        titles: by name, one line each.
        impossible: by name, why a finding could not be computed, and what would help.
    """

    path: Place
    tables: Mapping[str, pa.Table]
    titles: Mapping[str, str]
    impossible: Mapping[str, str]

    def __getitem__(self, name: str) -> pa.Table:
        return self.tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)


def findings(
    out: PlaceLike,
    *,
    window: int | None = None,
    windows: Ranges | None = None,
    only: Iterable[str] | None = None,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Findings:
    """Compute every finding that an output's tables allow, into ``OUT/findings/<name>.parquet``.

    Each file is written whole or not at all. Its metadata holds the seed, the parameters and the
    checksums of the tables that it was made from. The same call on the same tables gives the same
    bytes. `lcray.analyses.registry` lists the findings, docs/findings.md explains them.

    Args:
        out: the output directory or its URI, with its tables.
        window: width of the windows in steps; None for the output's own windows, or for none if
            `windows` are given.
        windows: ranges of steps by name, as in ``{"early": "0:100"}``. The whole run is always
            included.
        only: names of the findings to compute; None for all.
        seed: of every random draw.
        on_progress: called before a finding is computed, with its name, the number of findings done
            and the number of all.

    Returns:
        The tables by name, and the reasons why others could not be computed.

    Raises:
        UsageError: for an unknown finding, invalid windows, or a seed below 0.
        InapplicableError: if one of `only` cannot be computed.
        OutputError: if there are no tables, or a file cannot be written.
        CorruptionError: if a table is damaged.
    """
    if seed < 0:
        raise UsageError(f"seed {seed}: give an integer from 0 on")
    wanted = _chosen(only)
    results = open_output(out)
    folder = results.output.findings
    digests = {name: entry.sha256 for name, entry in read_manifest(results.path).tables.items()}
    tables: dict[str, pa.Table] = {}
    impossible: dict[str, str] = {}
    for n_done, finding in enumerate(wanted):
        if on_progress is not None:
            on_progress(finding.name, n_done, len(wanted))
        try:
            require(results, *finding.needs)
            found = finding.of(results, window=window, windows=windows, seed=seed)
        except InapplicableError as error:
            if only is not None:
                raise InapplicableError(f"{finding.name}: {error}") from error
            impossible[finding.name] = str(error)
            continue
        used = {table: digests[table] for table in finding.needs}
        tables[finding.name] = _store(results.output.finding(finding.name), found, seed, used)
    titles = {finding.name: finding.title for finding in wanted}
    return Findings(folder, tables, titles, impossible)


def _chosen(only: Iterable[str] | None) -> tuple[Finding, ...]:
    if only is None:
        return FINDINGS
    names, known = list(only), [finding.name for finding in FINDINGS]
    for name in names:
        if name not in known:
            raise UsageError(suggest(name, known, "finding", most=len(known)))
    return tuple(finding for finding in FINDINGS if finding.name in names)


def _store(path: Place, found: pa.Table, seed: int, used: Mapping[str, str]) -> pa.Table:
    """Writes a table, and returns it as it is in the file."""
    more = {"lcray.seed": str(seed), "lcray.tables": json.dumps(used)}
    found = found.replace_schema_metadata({**found.schema.metadata, **more})
    buffer = io.BytesIO()
    pq.write_table(found, buffer, compression="zstd")
    with writing(path):
        storage_of(path).write(path, buffer.getvalue())
    return found
