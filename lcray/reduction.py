"""Shards → tables: one file a table, byte for byte the same whenever the shards are.

New tables are staged beside the old ones and renamed together once all are whole;
``tables/manifest.json`` with their checksums is written last, and without it there are no tables.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lcray import merging
from lcray.arrow import make_table
from lcray.errors import CorruptionError, IncompleteError
from lcray.files import FileEntry, TableFile, locked, seal, sync_folder, writing
from lcray.merging import Arrays, Source, merge_bins
from lcray.planning import Plan
from lcray.schema import FORMAT_VERSION, WHOLE_RUN, table_schema
from lcray.shards import Commit, check_files, committed, read_plan, write_json_atomic
from lcray.summary import bin_edges
from lcray.weibull import fit_weibull

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Reduction:
    """What `reduce` did.

    Attributes:
        rows: rows of each table that was written.
        missing: the intervals (start_step, end_step) that no committed span covers.
    """

    rows: Mapping[str, int]
    missing: tuple[tuple[int, int], ...]


def reduce(out: str | os.PathLike[str], *, allow_missing: bool = False) -> Reduction:
    """Merges the committed shards of an output into its tables.

    Args:
        out: the output directory, with ``analysis.json`` and ``shards/``.
        allow_missing: merge even if intervals are missing; the result names them.

    Raises:
        IncompleteError: if intervals are missing and `allow_missing` is false, or all are.
        CorruptionError: if a committed file is damaged.
        OutputError: if `out` is no output, or the tables cannot be written; tables that exist
            stay as they are then.
    """
    read_plan(Path(out))  # no lock file in what is no output
    with locked(Path(out)):
        return merge(out, allow_missing=allow_missing)


def merge(out: str | os.PathLike[str], *, allow_missing: bool = False) -> Reduction:
    """`reduce`, for a caller that holds the lock of `out` or whose driver does."""
    folder = Path(out) / "tables"
    plan = read_plan(Path(out))
    commits = tuple(committed(Path(out), plan.spans).values())
    missing = missing_intervals(plan, commits)
    if missing and (not allow_missing or not commits):
        raise IncompleteError(
            f"{out}: {len(missing)} of {plan.n_intervals} intervals are missing: steps "
            f"{name_intervals(missing)}; run the analysis again to finish them"
            + (", or merge what there is with --allow-missing" if commits else "")
        )
    for problem in disagreements(Path(out), commits):
        raise CorruptionError(problem)
    for commit in commits:
        problems = check_files(Path(out), commit)
        if problems:
            raise CorruptionError(problems[0])
    entries = _write_tables(folder, Source(Path(out), plan, commits))
    return Reduction({table: entry.rows for table, entry in entries.items()}, missing)


def missing_intervals(plan: Plan, commits: Iterable[Commit]) -> tuple[tuple[int, int], ...]:
    """The intervals of the plan that no commit covers, in order."""
    present = {commit.span for commit in commits}
    return tuple(i for span in plan.spans if span not in present for i in span.intervals)


def disagreements(out: Path, commits: Iterable[Commit]) -> Iterator[str]:
    """Neighbouring spans that read different checkpoints of the step they share, one line each."""
    for left, right in itertools.pairwise(commits):
        step = left.span.last
        digests = [c.checkpoints.get(step) for c in (left, right)]
        if step == right.span.first and None not in digests and digests[0] != digests[1]:
            yield (
                f"{out}: spans {left.span.name} and {right.span.name} read different checkpoints "
                f"of step {step}; analyze the run into a new output"
            )


def name_intervals(intervals: Iterable[tuple[int, int]]) -> str:
    """Intervals as ranges of steps, adjacent ones joined: ``0-8, 12-20``."""
    ranges: list[list[int]] = []
    for start, end in intervals:
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    shown = [f"{start}-{end}" for start, end in ranges]
    if len(shown) > 12:
        shown[12:] = [f"and {len(shown) - 12} more"]
    return ", ".join(shown)


def plan_digest(plan: Plan) -> str:
    """The checksum that ties tables to the plan they were made by, whatever time it expects."""
    data = plan.to_dict()
    del data["seconds"]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


_MERGED: dict[str, Callable[[Source], Iterator[pa.Table]]] = {
    "layers": merging.layers,
    "parameters": merging.parameters,
    "traces": merging.traces,
    "elements": merging.elements,
}


def tables_of(plan: Plan) -> tuple[str, ...]:
    """The tables that an output of this plan has once it is reduced."""
    tables = tuple(name for name in plan.tables if name not in ("borders", "fits"))
    return (*tables, "fits") if "histograms" in tables else tables


def _write_tables(folder: Path, source: Source) -> dict[str, FileEntry]:
    """Stages every table and the manifest, then renames all of them."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
    staged: dict[str, Path] = {}
    entries: dict[str, FileEntry] = {}
    fits = Fits(source)
    try:
        for table in tables_of(source.plan):
            name = f"{table}.parquet"
            staged[name], entry = _stage(folder, table, _pieces(source, table, fits))
            entries[table] = replace(entry, name=name)
        staged[MANIFEST] = folder / f"{MANIFEST}-{uuid.uuid4().hex}.tmp"
        write_json_atomic(staged[MANIFEST], _manifest(source, entries))
        with writing(folder):
            (folder / MANIFEST).unlink(missing_ok=True)  # no manifest may name files of two runs
            for name, path in staged.items():
                os.replace(path, folder / name)
            sync_folder(folder)
    finally:
        for path in staged.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return entries


def _pieces(source: Source, table: str, fits: Fits) -> Iterator[pa.Table]:
    if table == "histograms":
        return fits.watch(merging.histograms(source))
    if table == "fits":
        return fits.rows()
    if table in _MERGED:
        return _MERGED[table](source)
    return merging.concatenated(source, table)


def _stage(folder: Path, table: str, pieces: Iterator[pa.Table]) -> tuple[Path, FileEntry]:
    schema = table_schema(table)
    file = TableFile(folder / f"{table}-{uuid.uuid4().hex}.tmp", schema)
    try:
        for rows in repack(pieces, schema.row_group_size):
            file.write(rows)
        return file.path, file.finish()
    except BaseException:
        file.discard()
        raise


def repack(pieces: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows, the last one smaller."""
    held: list[pa.Table] = []
    rows = 0
    for piece in pieces:
        held.append(piece)
        rows += piece.num_rows
        while rows >= size:
            whole = _joined(held)
            yield whole.slice(0, size)
            held, rows = [whole.slice(size)], rows - size
    if rows:
        yield _joined(held)


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _manifest(source: Source, entries: Mapping[str, FileEntry]) -> dict[str, Any]:
    return seal(
        {
            "format_version": FORMAT_VERSION,
            "plan": plan_digest(source.plan),
            "spans": [commit.span.name for commit in source.commits],
            "tables": {table: asdict(entry) for table, entry in entries.items()},
        }
    )


class Fits:
    """Collects `fits` while the merged histograms pass by: each window, and the whole run."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._windows: dict[int, list[pa.Table]] = {}
        self._totals: dict[int, Arrays] = {}

    def watch(self, windows: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Passes on the tables of `merging.histograms` and fits each."""
        for table in windows:
            split = int(self._source.codes(table, "split")[0])
            bins = _bins(self._source, table)
            self._windows.setdefault(split, []).append(self._fit(split, bins))
            run = bins | {"window": np.full(table.num_rows, WHOLE_RUN)}
            total = self._totals.get(split)
            self._totals[split] = merge_bins([run] if total is None else [total, run])
            yield table

    def rows(self) -> Iterator[pa.Table]:
        """The rows of `fits`; those of the whole run come first in each split."""
        for split in sorted(self._totals):
            yield self._fit(split, self._totals[split])
            yield from self._windows[split]

    def _fit(self, split: int, bins: Arrays) -> pa.Table:
        rows: list[tuple[int, int, str, str, float, float]] = []
        for layer in np.unique(bins["layer"]):
            for sign in (-1, 1):
                here = (bins["layer"] == layer) & (bins["sign"] == sign)
                rows += [(int(layer), sign, *row) for row in _fit_rows(bins, here)]
        columns = list(zip(*rows, strict=True)) or [()] * 6
        return make_table(
            "fits",
            {
                "split": (split, self._source.splits),
                "window": int(bins["window"][0]),
                "layer": (np.array(columns[0], np.int32), self._source.layers),
                "sign": np.array(columns[1], np.int8),
                "distribution": list(columns[2]),
                "parameter": list(columns[3]),
                "value": np.array(columns[4], np.float64),
                "se": np.array(columns[5], np.float64),
            },
        )


def _bins(source: Source, table: pa.Table) -> Arrays:
    names = ("window", "sign", "bin", "count", "sum")
    columns = {name: table.column(name).to_numpy() for name in names}
    return columns | {"layer": source.codes(table, "layer")}


def _fit_rows(bins: Arrays, here: Any) -> list[tuple[str, str, float, float]]:
    """(distribution, parameter, value, se) of the fit to one histogram, by parameter."""
    fit = fit_weibull(*bin_edges(bins["bin"][here]), bins["count"][here])
    if fit is None:
        return []
    values = {name: (v, fit.standard_errors[name]) for name, v in fit.parameters.items()}
    for name in ("n", "log_likelihood", "aic", "ks"):
        values[name] = (float(getattr(fit, name)), float("nan"))
    return [(fit.distribution, name, *values[name]) for name in sorted(values)]
