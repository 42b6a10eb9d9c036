"""Checks of a whole output: every checksum, and every invariant of coverage and additivity.

Tolerances. Sums of LC agree to 1e-12 of the sum of |LC| in their scope (float64 sums in another
order). Losses agree to 4 float64 ulp if one is computed from the other, and to 16 ulp of the
forward pass's dtype if the same loss was measured twice. Groups with passes of their own (since
batches mix groups) agree to 1e-4 (float32) or 1e-9 (float64) of the scope.
`elements` are float32: 1e-7 of the scope. Counts agree exactly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from lcray.checkpoints import open_series
from lcray.errors import CheckpointError, LcrayError, brief, one_line
from lcray.planning.plan import Plan
from lcray.storage import Place, PlaceLike, local_copies, open_uncached, place
from lcray.storage.interrupt import interruptible
from lcray.tables.manifest import Manifest, read_manifest
from lcray.tables.output import Output
from lcray.tables.reading.duckdb import connect, shut, sql_path
from lcray.tables.reading.soundness import Soundness
from lcray.tables.reading.views import rows_of
from lcray.tables.record import plan_digest
from lcray.tables.reducing.reduce import (
    MALFORMED,
    disagreements,
    missing_intervals,
    name_intervals,
    tables_of,
)
from lcray.tables.schema import TABLES
from lcray.tables.shards.commit import Commit, read_commit
from lcray.tables.shards.writer import check_files, file_problems
from lcray.tables.verifying.coverage import Invariant, coverage, disorder, relations
from lcray.tables.verifying.sums import invariants

_SHOWN = 3  # rows that a problem names, at most
_MEMORY = 10**9  # bytes


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        problems: the problems, where they are and what to do, one line each.
        checks: the names of all checks, in order.
    """

    problems: tuple[str, ...]
    checks: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def verify(out: PlaceLike, *, run: PlaceLike | None = None) -> Verification:
    """Check an output: files, coverage, keys and invariants; all problems are collected.

    No error is raised for a damaged output, and nothing is written to it. Shards are checked even
    if the output is not reduced yet.

    Args:
        out: the output directory, or its URI.
        run: the directory of checkpoints, or its URI; if given, all checkpoints are read again, and
            must be those that the output was computed from.
    """
    report = _Report()
    with report.check("analysis.json"):
        where = place(out)
        output = Output(where)
        plan = output.record().plan
        commits = _verify_shards(where, plan, report, run)
        if run is not None:
            with report.check("checkpoints of the run"):
                report.problems += _changed(place(run), commits)
        _verify_tables(output, plan, commits, report)
    return Verification(tuple(map(one_line, report.problems)), tuple(report.checks))


class _Report:
    """Collects checks and problems; as a context, it turns errors of a check into problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.checks: list[str] = []

    @contextmanager
    def reading(self, where: Place) -> Iterator[None]:
        """A block of checks that read `where`; a failure to read is a problem."""
        try:
            yield
        except LcrayError as error:
            self.problems.append(str(error))
        except (OSError, duckdb.Error, *MALFORMED) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else brief(error)
            self.problems.append(f"{where}: cannot be read ({reason})")

    def check(self, name: str) -> _Report:
        self.checks.append(name)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, LcrayError):
            self.problems.append(str(error))
        elif isinstance(error, (OSError, duckdb.Error, *MALFORMED)):
            self.problems.append(f"{self.checks[-1]}: cannot be checked ({brief(error)})")
        else:
            return False
        return True


def _changed(run: Place, commits: list[Commit]) -> Iterator[str]:
    """Messages on checkpoints that have changed since the spans read them, or cannot be read."""
    read = {step: digest for commit in commits for step, digest in commit.checkpoints.items()}
    series = open_series(run)
    for step, digest in sorted(read.items()):
        try:
            if series.read(step).sha256 != digest:
                yield f"{run}: step {step} has changed since it was analyzed; use a new output"
        except CheckpointError as error:
            yield str(error)


def _verify_tables(output: Output, plan: Plan, commits: list[Commit], report: _Report) -> None:
    out = output.path
    manifest = None
    with report.check("manifest of the tables"):
        manifest = read_manifest(out)
    if manifest is None:
        return
    report.problems += _stale(output, plan, commits, manifest)
    sound = []
    for table, entry in manifest.tables.items():
        with report.check(f"file of table {table}"):
            path = output.table(table)
            problems = file_problems(path, entry, table)
            problems += [] if problems else _oversized(path, plan, table)
            report.problems += [f"{path}: {p}; run lcray reduce {out}" for p in problems]
            if not problems:
                sound.append(table)
    names = [manifest.tables[table].name for table in sound]
    with (
        report.reading(out),
        local_copies(output.tables, names) as folder,
        _database(folder, plan, manifest, sound) as database,
    ):
        for table in sound:
            with report.check(f"keys of {table} are unique and in order"):
                report.problems += _disorder(output, database, table)
        with report.check("rows of the tables"):
            for check in (*coverage(plan), *invariants(plan)):
                if all(table in sound for table in check.tables):
                    report.checks.append(check.name)
                    report.problems += _violations(out, database, check)


def _oversized(path: Place, plan: Plan, table: str) -> list[str]:
    """The reason not to read the names in a table: there may be gigabytes of them."""
    try:
        with open_uncached(path) as raw, pq.ParquetFile(raw) as file:
            soundness = Soundness(plan)
            soundness.check_sizes(file.metadata, table)
            soundness.check_lengths(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        return [str(error).splitlines()[0]]
    return []


def _verify_shards(out: Place, plan: Plan, report: _Report, run: PlaceLike | None) -> list[Commit]:
    commits = []
    for span in plan.spans:
        with report.check(f"span {span.name}"):
            commit = read_commit(out, span)
            if commit is not None:
                commits.append(_trimmed(commit, whole=run is not None))
                report.problems += check_files(out, commit)
    report.checks.append("every interval is committed")
    missing = missing_intervals(plan, commits)
    if missing:
        report.problems.append(
            f"{out}: {len(missing)} of {plan.n_intervals} intervals are missing: steps "
            f"{name_intervals(missing)}; run the analysis again to finish them"
        )
    report.checks.append("neighbouring spans read the same checkpoint")
    report.problems += disagreements(out, commits)
    return commits


def _trimmed(commit: Commit, *, whole: bool) -> Commit:
    """The part of a commit needed later: all checkpoints, or those that its neighbours share."""
    ends = (commit.span.first, commit.span.last)
    kept = {s: d for s, d in commit.checkpoints.items() if whole or s in ends}
    return replace(commit, files={}, info={}, checkpoints=kept)


def _stale(output: Output, plan: Plan, commits: list[Commit], manifest: Manifest) -> Iterator[str]:
    out = output.path
    if manifest.plan not in (output.plan_digest(), plan_digest(plan.to_dict())):
        yield f"{out}: the tables were reduced by another plan; run lcray reduce {out}"
    spans = tuple(commit.span.name for commit in commits)
    if manifest.spans != spans:
        odd = sorted(set(manifest.spans) ^ set(spans)) or list(spans)
        yield f"{out}: the tables hold other spans than are committed ({', '.join(odd[:5])}); " + (
            f"run lcray reduce {out}"
        )
    for table in tables_of(plan):
        if table not in manifest.tables:
            yield f"{out}: table {table!r} is missing; run lcray reduce {out}"


@contextmanager
def _database(
    tables: Path, plan: Plan, manifest: Manifest, sound: list[str]
) -> Iterator[duckdb.DuckDBPyConnection]:
    """The sound tables, and the plan as relations; no other file can be read."""
    with tempfile.TemporaryDirectory() as folder, connect(_MEMORY) as database:
        database.execute("SET preserve_insertion_order=false")
        database.execute(f"SET temp_directory='{folder}'")
        for table in sound:
            path = tables / f"{table}.parquet"
            source = sql_path(path)
            rows = rows_of(table, source, TABLES[table].absent(pq.read_schema(path)))
            database.execute(f"CREATE VIEW {table} AS {rows}")
        for name, relation in relations(plan, set(manifest.spans)).items():
            database.register(f"_{name}", relation)
            database.execute(f"CREATE TABLE {name} AS SELECT * FROM _{name}")
        for name in ("split", "layer"):
            database.execute(f"CREATE TYPE {name}_rank AS ENUM (SELECT {name} FROM _plan_{name}s)")
        shut(database, [tables / f"{table}.parquet" for table in sound])
        yield database


def _first(database: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    """The first rows of a query, one more than a problem names; signals such as Ctrl-C end it."""
    return interruptible(lambda: database.execute(query).fetchmany(_SHOWN + 1), database.interrupt)


def _disorder(output: Output, database: duckdb.DuckDBPyConnection, table: str) -> Iterator[str]:
    """The first row that does not follow the row before it in the order of the key, if any."""
    for (row,) in _first(database, disorder(table)):
        yield (
            f"{output.table(table)}: row {row} does not follow row {row - 1} in the order of "
            f"{', '.join(TABLES[table].key)}; run lcray reduce {output.path}"
        )


def _violations(out: Place, database: duckdb.DuckDBPyConnection, check: Invariant) -> Iterator[str]:
    try:
        found = _first(database, check.query)
        names = [column[0] for column in database.description or ()]
    except (duckdb.Error, *MALFORMED) as error:
        yield f"{out}: {check.name}: cannot be checked ({brief(error)})"
        return
    for row in found[:_SHOWN]:
        where = ", ".join(f"{name} {value}" for name, value in zip(names, row, strict=True))
        more = "; and further rows" if len(found) > _SHOWN and row is found[_SHOWN - 1] else ""
        yield f"{out}: {check.name}: not so at {where}{more}"
