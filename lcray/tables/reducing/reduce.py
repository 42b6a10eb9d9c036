"""Reduces shards to tables: one file per table, with the same bytes for the same shards.

New tables are staged beside the old ones and renamed together once all are complete; those for an
object store are staged in local temporary files, and uploaded once all are complete.
``tables/manifest.json`` with their checksums is written last; without it the tables do not count.
``views.sql``, which holds no data, follows.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from lcray.errors import CorruptionError, IncompleteError, brief
from lcray.planning.plan import Plan
from lcray.storage import Place, PlaceLike, place, storage_of, sync_folder
from lcray.storage.files import FORMAT_VERSION, make_folder, seal, write_json_atomic, writing
from lcray.tables.output import MANIFEST, Output
from lcray.tables.parquet import FileEntry, TableFile
from lcray.tables.reading.views import write_views
from lcray.tables.reducing import merge as merging
from lcray.tables.reducing.fits import Fits
from lcray.tables.reducing.merge import Source
from lcray.tables.schema import table_schema
from lcray.tables.shards.commit import Commit, Outline, each_commit
from lcray.tables.shards.writer import check_files

# How far the losses of two workers at a step may differ, relative to the loss and the first loss.
_LOSS_RTOL, _LOSS_ATOL = 1e-5, 1e-6
#: Exceptions that Arrow, NumPy and Python raise for invalid numbers and names in a table.
MALFORMED = (pa.ArrowException, ArithmeticError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Reduction:
    """The result of `reduce`.

    Attributes:
        rows: number of rows of each table that was written.
        missing: the intervals (start_step, end_step) that no committed span covers.
    """

    rows: Mapping[str, int]
    missing: tuple[tuple[int, int], ...]


def reduce(out: PlaceLike, *, allow_missing: bool = False) -> Reduction:
    """Merge the committed shards of an output into its tables.

    Args:
        out: the output directory or its URI, with ``analysis.json`` and ``shards/``.
        allow_missing: merge even if intervals are missing; the result names them.

    Raises:
        IncompleteError: if intervals are missing and `allow_missing` is false, or all are.
        CorruptionError: if a committed file is damaged.
        OutputError: if `out` is not an output, or the tables cannot be written; existing tables
            then stay as they are.
    """
    output = Output(place(out))
    output.record()  # refuses other folders before a lock file is made
    with output.locked():
        return merge(output, allow_missing=allow_missing)


def merge(output: Output, *, allow_missing: bool = False) -> Reduction:
    """As `reduce`, for a caller that has locked the output, or whose driver has."""
    out, digest, plan = output.path, output.plan_digest(), output.record().plan
    output.check_links()
    commits, problems = _survey(out, plan)
    missing = missing_intervals(plan, commits)
    if missing and (not allow_missing or not commits):
        raise IncompleteError(
            f"{out}: {len(missing)} of {plan.n_intervals} intervals are missing: steps "
            f"{name_intervals(missing)}; run the analysis again to finish them"
            + (", or merge what there is with --allow-missing" if commits else "")
        )
    for problem in problems:
        raise CorruptionError(problem)
    for _, commit in each_commit(out, [outline.span for outline in commits]):
        for problem in check_files(out, commit):
            raise CorruptionError(problem)
    folder = output.manifest.parent
    for table in tables_of(plan):
        output.table(table)  # raises where a link in its place leads out
    entries = _write_tables(folder, Source(out, plan, commits), digest)
    write_views(out, plan, tuple(entries))
    return Reduction({table: entry.rows for table, entry in entries.items()}, missing)


def _survey(out: Place, plan: Plan) -> tuple[tuple[Outline, ...], list[str]]:
    """The outline of every commit, and disagreements; at most two whole commits are in memory."""
    outlines = []

    def commits() -> Iterator[Commit]:
        for span, commit in each_commit(out, plan.spans):
            tables = shared.setdefault(commit.tables, commit.tables)
            outlines.append(Outline(span, commit.attempt, tables))
            yield commit

    shared: dict[frozenset[str], frozenset[str]] = {}
    problems = list(disagreements(out, commits()))
    return tuple(outlines), problems


def missing_intervals(
    plan: Plan, commits: Iterable[Commit | Outline]
) -> tuple[tuple[int, int], ...]:
    """The intervals of the plan that no commit covers, in order."""
    present = {commit.span for commit in commits}
    return tuple(i for span in plan.spans if span not in present for i in span.intervals)


def disagreements(out: Place, commits: Iterable[Commit]) -> Iterator[str]:
    """Messages on neighbouring spans that read different checkpoints of their common step."""
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


def _write_tables(folder: Place, source: Source, digest: str) -> dict[str, FileEntry]:
    """Stages every table, then gives them their names and writes the manifest."""
    make_folder(folder)
    if isinstance(folder, Path):
        with writing(folder):
            for leftover in folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
    staged: dict[str, TableFile] = {}
    entries: dict[str, FileEntry] = {}
    fits = Fits(source)
    try:
        for table in tables_of(source.plan):
            name = f"{table}.parquet"
            pieces = _sound(source, table, _pieces(source, table, fits))
            staged[name], entry = _stage(folder, table, pieces)
            entries[table] = replace(entry, name=name)
        _publish(folder, staged, _manifest(source, digest, entries))
    finally:
        for name, file in staged.items():
            if file.path.name == name:  # published
                file.close()
            else:
                file.discard()
    return entries


def _publish(folder: Place, staged: Mapping[str, TableFile], manifest: Mapping[str, Any]) -> None:
    """Tables first, the manifest last, so that it never names files of two reductions."""
    ready = folder / f"{MANIFEST}-{uuid.uuid4().hex}.tmp"
    try:
        if isinstance(ready, Path):  # with renames, everything that can fail comes first
            write_json_atomic(ready, manifest)
        with writing(folder):
            storage_of(folder).delete([folder / MANIFEST])
        for name, file in staged.items():
            file.publish(folder / name)
        if isinstance(ready, Path):
            with writing(folder):
                os.replace(ready, ready.with_name(MANIFEST))
                sync_folder(ready.parent)
        else:
            write_json_atomic(folder / MANIFEST, manifest)
    finally:
        if isinstance(ready, Path):
            with suppress(OSError):
                ready.unlink(missing_ok=True)


def _pieces(source: Source, table: str, fits: Fits) -> Iterator[pa.Table]:
    if table == "histograms":
        return fits.watch(merging.histograms(source))
    if table == "fits":
        return fits.rows()
    if table in _MERGED:
        return _MERGED[table](source)
    pieces = merging.concatenated(source, table)
    return _continuous(source, pieces) if table == "intervals" else pieces


def _continuous(source: Source, pieces: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The pieces of `intervals`; both spans must have the same loss at the step where they meet."""
    first = {split.name: abs(split.first_loss or 0.0) for split in source.plan.splits}
    before: dict[str, Any] | None = None
    for rows in pieces:
        (start,) = rows.slice(0, 1).to_pylist()
        if before is not None and _adjoin(before, start):
            one, other = before["loss_end"], start["loss_start"]
            bound = _LOSS_RTOL * max(abs(one), abs(other)) + _LOSS_ATOL * first[start["split"]]
            if abs(one - other) > bound:
                raise CorruptionError(
                    f"{source.out}: split {start['split']!r} has a loss of {one:.8g} at step "
                    f"{start['start_step']} in the span before it, and of {other:.8g} in the one "
                    "after: their workers had other models or data; seed what is random in the "
                    "task, and analyze into a new output"
                )
        (before,) = rows.slice(rows.num_rows - 1).to_pylist()
        yield rows


def _adjoin(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    same = (before["split"], before["end_step"]) == (after["split"], after["start_step"])
    return same and None not in (before["loss_end"], after["loss_start"])


def _sound(source: Source, table: str, pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same pieces; if they cannot be merged, the shards are damaged despite their checksums."""
    try:
        yield from pieces
    except MALFORMED as error:
        raise CorruptionError(
            f"{source.out}: the shards of table {table!r} hold what lcray does not write "
            f"({brief(error)}); remove the folders of their spans and run the analysis again"
        ) from error


def _stage(folder: Place, table: str, pieces: Iterator[pa.Table]) -> tuple[TableFile, FileEntry]:
    schema = table_schema(table)
    file = TableFile(folder / f"{table}-{uuid.uuid4().hex}.tmp", schema)
    try:
        for rows in repack(pieces, schema.row_group_size):
            file.write(rows)
        return file, file.finish()
    except BaseException:
        file.discard()
        raise


def repack(pieces: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows; the last one may be smaller."""
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


def _manifest(source: Source, digest: str, entries: Mapping[str, FileEntry]) -> dict[str, Any]:
    return seal(
        {
            "format_version": FORMAT_VERSION,
            "plan": digest,
            "spans": [commit.span.name for commit in source.commits],
            "tables": {table: asdict(entry) for table, entry in entries.items()},
        }
    )
