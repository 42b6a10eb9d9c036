"""The reader of an output: tables as pandas, Arrow, or SQL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lcray.checkpoints.naming import matches
from lcray.errors import CorruptionError, UsageError, suggest
from lcray.planning.plan import Plan
from lcray.storage import Place, PlaceLike, Remote, local_copies, open_seekable, place
from lcray.storage.files import exists
from lcray.storage.numbers import step_range
from lcray.tables.manifest import read_manifest
from lcray.tables.output import Output
from lcray.tables.reading.confidence import frame, sums
from lcray.tables.reading.duckdb import check_name, connect, query_room, select, shut, sql_path
from lcray.tables.reading.formats import distinct, holding
from lcray.tables.reading.recipes import quotes_for, recipe_for, tables_for
from lcray.tables.reading.soundness import Soundness
from lcray.tables.reading.views import needed_by, rows_of, views_of
from lcray.tables.record import Record
from lcray.tables.schema import TABLES

if TYPE_CHECKING:  # large libraries that a driver, which only opens an output, does not need
    import duckdb
    import pandas as pd

_TIME = ("start_step", "step", "window")


def open_output(out: PlaceLike) -> Results:
    """The results in `out`.

    Raises:
        OutputError: if there is no output there, or it is not reduced yet.
        CorruptionError: if its plan or manifest is damaged.
    """
    return results_of(Output(place(out)))


def results_of(output: Output) -> Results:
    """As `open_output`, for an `Output` that may have been read already."""
    check_name(output.path)
    return Results(output, output.record(), tuple(read_manifest(output.path).tables))


def query(out: PlaceLike, sql: str) -> pd.DataFrame:
    """The result of one SELECT on the tables of `out`; raises as `open_output`, `Results.sql`."""
    return open_output(out).sql(sql)


@dataclass(frozen=True, repr=False)
class Results:
    """The tables of an output.

    There is one method per table, which gives a pandas frame; strings are categories, with splits
    and layers in the plan's order. `steps` (``"a:b"``, either end open) keeps intervals with
    a <= start_step < b (windows by their first step). `layers` keeps the layers that match a
    pattern such as ``"conv*"``.

    Attributes:
        output: the paths of the output.
        record: the origin of the output.
        tables: the names of its tables.
    """

    output: Output
    record: Record
    tables: tuple[str, ...]

    @property
    def path(self) -> Place:
        """The output directory, or its address."""
        return self.output.path

    @property
    def plan(self) -> Plan:
        """The plan of the analysis."""
        return self.record.plan

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the numbers, one line each."""
        return self.record.notes

    def intervals(self, *, steps: str | None = None) -> pd.DataFrame:
        """Loss and LC of every interval; raises as `arrow`."""
        return self.table("intervals", steps=steps)

    def layers(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """LC of every layer and interval; raises as `arrow`."""
        return self.table("layers", steps=steps, layers=layers)

    def units(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """LC of every unit and interval; raises as `arrow`."""
        return self.table("units", steps=steps, layers=layers)

    def groups(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """LC of each group's mean loss; raises as `arrow`."""
        return self.table("groups", steps=steps, layers=layers)

    def replicates(self, *, steps: str | None = None) -> pd.DataFrame:
        """Loss and LC on each replicate of a sample; raises as `arrow`."""
        return self.table("replicates", steps=steps)

    def replicate_layers(
        self, *, steps: str | None = None, layers: str | None = None
    ) -> pd.DataFrame:
        """LC of every layer on each replicate of a sample; raises as `arrow`."""
        return self.table("replicate_layers", steps=steps, layers=layers)

    def histograms(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """Absolute LC on a logarithmic scale; raises as `arrow`."""
        return self.table("histograms", steps=steps, layers=layers)

    def parameters(self, *, layers: str | None = None) -> pd.DataFrame:
        """Every parameter over the run; raises as `arrow`."""
        return self.table("parameters", layers=layers)

    def traces(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """A sample of elements, step by step; raises as `arrow`."""
        return self.table("traces", steps=steps, layers=layers)

    def elements(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """LC of every element and interval; raises as `arrow`."""
        return self.table("elements", steps=steps, layers=layers)

    def fisher(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """Traces of the Fisher information of every layer; raises as `arrow`."""
        return self.table("fisher", steps=steps, layers=layers)

    def fits(self, *, steps: str | None = None, layers: str | None = None) -> pd.DataFrame:
        """Distributions fitted to absolute LC; window -1 is the whole run. Raises as `arrow`."""
        return self.table("fits", steps=steps, layers=layers)

    def contents(self) -> pd.DataFrame:
        """The tables, with their rows, and the views for `sql`: name, kind, rows, holds.

        Raises:
            CorruptionError: if the manifest is damaged.
        """
        import pandas as pd

        entries = read_manifest(self.path).tables
        rows = [(t, "table", entries[t].rows, TABLES[t].description) for t in self.tables]
        views = [(view.name, "view", None, view.description) for view in views_of(self.tables)]
        frame = pd.DataFrame([*rows, *views], columns=["name", "kind", "rows", "holds"])
        return frame.astype({"rows": "Int64"})

    def confidence(
        self, *, steps: str | None = None, layers: str | None = None, level: float = 0.95
    ) -> pd.DataFrame:
        """Loss change and LC over some intervals, with the uncertainty from sampling the data.

        Returns:
            Columns split, quantity (``loss_change``, ``lc``), layer (empty for all together),
            estimate, se, low and high; see `lcray.tables.reading.confidence`. Splits that were
            taken whole have se 0. Intervals that are not ok do not count.

        Raises:
            UsageError: for invalid `steps` or `layers`, or a level that is not between 0 and 1.
            CorruptionError: if the tables cannot be read.
        """
        asked = sums(*_bounds(steps or ":"), replicated="replicates" in self.tables)
        names = self._layers(layers)
        return frame(self.plan.splits, names, self.sql_arrow(asked).to_pandas(), level)

    def table(
        self, name: str, *, steps: str | None = None, layers: str | None = None
    ) -> pd.DataFrame:
        """A table as a pandas frame; raises as `arrow`."""
        return self._frame(self.arrow(name, steps=steps, layers=layers))

    def arrow(
        self,
        name: str,
        *,
        columns: Iterable[str] | None = None,
        filters: pc.Expression | None = None,
        steps: str | None = None,
        layers: str | None = None,
    ) -> pa.Table:
        """A table as Arrow; only the necessary parts of the file are read.

        Args:
            name: the name of the table.
            columns: the columns to read; None for all.
            filters: a further condition on the rows.
            steps: as for the class.
            layers: as for the class.

        Raises:
            UsageError: for a table or column that does not exist or was not asked for in the
                analysis, or invalid `steps` or `layers`.
            CorruptionError: if the file cannot be read.
        """
        path = self._file(name)
        known = TABLES[name].schema.names
        wanted = list(known if columns is None else columns)
        for column in wanted:
            if column not in known:
                raise UsageError(suggest(column, known, f"column of {name!r}"))
        conditions = [self._within(name, steps), self._matching(name, layers), filters]
        condition = None
        for part in conditions:
            if part is not None:
                condition = part if condition is None else condition & part
        try:
            return self._read(path, name, wanted, condition).unify_dictionaries()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._unreadable(path, error) from error

    def _read(
        self, path: Place, name: str, columns: list[str], rows: pc.Expression | None
    ) -> pa.Table:
        if not isinstance(path, Remote):
            new = TABLES[name].schema if self._check(path, name) else None
            return pq.read_table(path, columns=columns, filters=rows, schema=new, partitioning=None)
        with open_seekable(path) as source:
            with pq.ParquetFile(source) as file:
                new = TABLES[name].schema if self._soundness.check(file, name) else None
            source.seek(0)
            return pq.read_table(source, columns=columns, filters=rows, schema=new)

    def sql(self, query: str) -> pd.DataFrame:
        """The answer to one SELECT over the tables and views, as a pandas frame.

        The query can use the tables and `lcray.tables.reading.views` by their names, and nothing
        else: no file, no network.

        Raises:
            UsageError: if it is not one valid SELECT, or has types that pandas lacks.
        """
        found = self.sql_arrow(query)
        with holding("a pandas frame"):
            return self._frame(found.rename_columns(distinct(found.column_names)))

    def sql_arrow(self, query: str, *, threads: int | None = None) -> pa.Table:
        """As `sql`, as an Arrow table; a single thread adds up floats in the order of the rows.

        With `threads` None, one per core, sums may differ in their last bits.
        """
        room = query_room()
        import duckdb

        try:
            query.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"SQL: not valid UTF-8 at character {error.start} ({query[error.start]!r}); write "
                "the query in UTF-8"
            ) from error
        with self._local(query) as folder, connect(room, threads) as connection:
            shut(connection, self._create_views(connection, folder))
            try:
                return select(connection, query, room // 2)
            except duckdb.Error as error:
                message = " ".join(str(error).split("\n\n")[0].split())
                if isinstance(error, duckdb.CatalogException):
                    message = tables_for(query, self.tables, self.path) or message
                elif isinstance(error, duckdb.ParserException) and (cure := quotes_for(query)):
                    message = f"{message}; {cure}"
                raise UsageError(f"SQL: {message}") from error

    def __repr__(self) -> str:
        return f"Results({str(self.path)!r}, tables: {', '.join(self.tables)})"

    @contextmanager
    def _local(self, query: str) -> Iterator[Path]:
        """A local folder with the tables; for a remote output, copies of those in the query."""
        needed = needed_by(query, self.tables)
        names = [self._file(table).name for table in self.tables if table in needed]
        try:
            with local_copies(self.output.tables, names) as folder:
                yield folder
        except OSError as error:
            raise self._unreadable(self.output.tables, error) from error

    def _create_views(self, connection: duckdb.DuckDBPyConnection, folder: Path) -> list[Path]:
        """Makes the views of the tables in `folder`, and the views on these; returns the files."""
        import duckdb

        files = []
        for table in self.tables:
            path = folder / self._file(table).name
            if isinstance(self.path, Remote) and not path.exists():
                continue  # the query does not name it
            try:
                absent = self._check(path, table)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise self._unreadable(self._file(table), error) from error
            try:
                rows = rows_of(table, sql_path(path), absent)
                connection.execute(f"CREATE VIEW {table} AS {rows}")
            except duckdb.Error as error:
                raise self._unreadable(path, error) from error
            files.append(path)
        for view in views_of([path.stem for path in files]):
            connection.execute(f"CREATE VIEW {view.name} AS {view.select(self.plan)}")
        return files

    @cached_property
    def _soundness(self) -> Soundness:
        return Soundness(self.plan)

    @cached_property
    def _checked(self) -> dict[tuple[Any, ...], tuple[str, ...]]:
        return {}  # the columns that a sound file lacks, by table and stamp

    def _check(self, path: Path, table: str) -> tuple[str, ...]:
        """The columns that are missing since an earlier lcray wrote the file.

        Raises ValueError for content that no analysis by this plan writes; a file is checked once.
        """
        status = path.stat()
        stamp = (table, status.st_size, status.st_mtime_ns, status.st_ino)
        if stamp not in self._checked:
            with pq.ParquetFile(path) as file:
                self._checked[stamp] = self._soundness.check(file, table)
        return self._checked[stamp]

    def _unreadable(self, path: Place, error: Exception) -> CorruptionError:
        reason = (getattr(error, "strerror", None) or str(error).splitlines()[0])[:300]
        return CorruptionError(f"{path}: cannot be read ({reason}); run lcray reduce {self.path}")

    def _file(self, name: str) -> Place:
        if name in self.tables:
            path = self.output.table(name)
            if not exists(path):
                raise CorruptionError(f"{path}: missing; run lcray reduce {self.path}")
            return path
        if name not in TABLES or name == "borders":
            raise UsageError(suggest(name, self.tables, "table"))
        raise UsageError(f"{self.path}: has no table {name!r}; {recipe_for(name)}")

    def _within(self, name: str, steps: str | None) -> pc.Expression | None:
        if steps is None:
            return None
        first, last = _bounds(steps)
        column = next((c for c in TABLES[name].key if c in _TIME), None)
        if column is None:
            raise UsageError(f"table {name!r} is over the whole run: leave steps out")
        condition = pc.field(column) >= first
        return condition if last is None else condition & (pc.field(column) < last)

    def _matching(self, name: str, pattern: str | None) -> pc.Expression | None:
        if pattern is None:
            return None
        if "layer" not in TABLES[name].key:
            raise UsageError(f"table {name!r} has no layers: leave the pattern out")
        return pc.field("layer").cast(pa.string()).isin(self._layers(pattern))

    def _layers(self, pattern: str | None) -> list[str]:
        names = [layer.name for layer in self.plan.layers]
        matching = [layer for layer in names if pattern is None or matches(layer, pattern)]
        if not matching:
            raise UsageError(suggest(str(pattern), names, "layer"))
        return matching

    def _frame(self, table: pa.Table) -> pd.DataFrame:
        """A frame that keeps types despite missing values, with splits and layers in order."""
        import pandas as pd

        # Without the metadata, which would choose types and indices.
        frame: pd.DataFrame = table.replace_schema_metadata(None).to_pandas()
        orders = {
            "split": [split.name for split in self.plan.splits],
            "layer": [layer.name for layer in self.plan.layers],
            "module": list(dict.fromkeys(layer.module for layer in self.plan.layers)),
        }
        for field in table.schema:
            if pa.types.is_dictionary(field.type) and field.name in orders:
                found = frame[field.name].cat.remove_unused_categories()
                if found.cat.categories.isin(orders[field.name]).all():  # else a name would go
                    ordered = pd.CategoricalDtype(orders[field.name], ordered=True)
                    frame[field.name] = found.astype(ordered)
            elif table.column(field.name).null_count and pa.types.is_integer(field.type):
                frame[field.name] = table.column(field.name).to_pandas(integer_object_nulls=True)
                frame[field.name] = frame[field.name].astype("Int64")
            elif table.column(field.name).null_count and pa.types.is_boolean(field.type):
                frame[field.name] = frame[field.name].astype("boolean")
        return frame


def _bounds(steps: str) -> tuple[int, int | None]:
    found = step_range(steps)
    if found is None:
        raise UsageError(f"steps {steps!r}: give a range such as '0:100', '100:' or ':100'")
    return found[0] or 0, found[1]
