"""Checks of a table before it is read: it must not have names or numbers that no analysis writes.

A checksum shows that a file is whole, not who made it. A small dictionary may hold a name of
gigabytes, which every row would repeat; a step may be any number of 64 bits. Sizes are taken from
the footer of the file, before anything is read. Numbers are taken from its statistics, or from the
columns themselves unless the table is very large. `lcray verify` checks much more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lcray.planning.plan import Plan
from lcray.statistics.histograms import HIGHEST, UNDERFLOW
from lcray.tables.arrow import largest_group
from lcray.tables.schema import TABLES, WHOLE_RUN

LONGEST_NAME = 1 << 16  # bytes of a name, at most
_WORD = 64  # bytes of a name that lcray gives, such as a rule or a status
_SLACK = 1 << 14  # bytes for the headers of pages
_INDEX = 8  # bytes for the index of a name, and its share of a page
_ROWS = 1 << 22  # up to here, steps are read to be checked; it takes some tenths of a second
_NAMED_ROWS = 1 << 26  # up to here, names are: this is cheaper
_MOST = 1 << 62


class Soundness:
    """Checks an output's tables by its plan, each table once.

    Args:
        plan: the plan of the output.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def check(self, file: pq.ParquetFile, table: str) -> tuple[str, ...]:
        """The columns that the file lacks; see `TableSchema.absent`.

        Raises ValueError for content that lcray does not write into `table`.

        Args:
            file: the open table.
            table: its name.
        """
        absent = TABLES[table].absent(file.schema_arrow)
        if largest_group(file.metadata) > TABLES[table].row_group_size:
            raise ValueError("larger row groups than the table has")
        self.check_sizes(file.metadata, table)
        for field in file.schema_arrow:
            if pa.types.is_integer(field.type):
                self._check_numbers(file, table, field.name)
            elif field.name in self._names:
                self._check_names(file, field.name)
        return absent

    def check_sizes(self, metadata: pq.FileMetaData, table: str) -> None:
        """Raises ValueError if text takes more bytes than the plan's names can."""
        places = {name: at for at, name in enumerate(metadata.schema.names)}
        for field in TABLES[table].schema:
            if not pa.types.is_dictionary(field.type) or field.name not in places:
                continue
            names = self._names.get(field.name, frozenset[str]())
            sizes = [len(name.encode("utf-8", "surrogatepass")) for name in names]
            longest = max(sizes, default=_WORD)
            if longest > LONGEST_NAME:
                raise ValueError(_too_long(field.name, longest))
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                size = group.column(places[field.name]).total_uncompressed_size
                most = _SLACK + sum(sizes) + group.num_rows * (longest + _INDEX)
                if size > most:
                    raise ValueError(
                        f"{size:,} bytes of names in column {field.name!r}, more than the plan has"
                    )

    def check_lengths(self, file: pq.ParquetFile) -> None:
        """Raises ValueError for a name that is too long, whatever size is in the footer."""
        for field in file.schema_arrow:
            if pa.types.is_dictionary(field.type):
                for part in _parts(file, field.name):
                    longest = pc.max(pc.binary_length(part.dictionary)).as_py() or 0
                    if longest > LONGEST_NAME:
                        raise ValueError(_too_long(field.name, longest))

    def _check_numbers(self, file: pq.ParquetFile, table: str, column: str) -> None:
        low, high = self._ranges.get(column, (0, _MOST))
        if column == "window" and table == "fits":
            low = min(low, WHOLE_RUN)
        if column == "seed":
            return
        few = file.metadata.num_rows <= _ROWS and column in self._values
        found = None if few else _extremes(file.metadata, column)
        values = np.zeros(0, np.int64)
        if found is None:
            values = _unique(file, column)
            found = [] if not len(values) else [int(values[0]), int(values[-1])]
        for value in found:
            if not low <= value <= high:
                raise ValueError(f"{column} {value}, which the plan does not have")
        if few and column == "window":
            odd = values[(values % self._plan.window != 0) & (values != WHOLE_RUN)]
        else:
            odd = values[~np.isin(values, self._values[column])] if few else values[:0]
        if len(odd):
            raise ValueError(f"{column} {odd[0]}, which the plan does not have")

    def _check_names(self, file: pq.ParquetFile, column: str) -> None:
        known = self._names[column]
        few = file.metadata.num_rows <= _NAMED_ROWS
        found = None if few else _extremes(file.metadata, column)
        if found is None:  # statistics leave out very long names
            found = [name for part in _parts(file, column) for name in part.dictionary.to_pylist()]
        odd = sorted(set(found) - known)
        if odd:
            raise ValueError(f"{column} {odd[0][:100]!r}, which the plan does not have")

    @cached_property
    def _names(self) -> Mapping[str, frozenset[str]]:
        plan = self._plan
        return {
            "split": frozenset(split.name for split in plan.splits),
            "layer": frozenset(layer.name for layer in plan.layers),
            "module": frozenset(layer.module for layer in plan.layers),
        }

    @cached_property
    def _values(self) -> Mapping[str, Any]:
        steps = np.unique([step for span in self._plan.spans for step in span.steps])
        return dict.fromkeys(("start_step", "end_step", "step", "window"), steps)

    @cached_property
    def _ranges(self) -> Mapping[str, tuple[int, int]]:
        plan = self._plan
        first, last = plan.spans[0].first, plan.spans[-1].last
        elements = max((layer.numel for layer in plan.layers), default=0)
        units = max((layer.n_units for layer in plan.layers), default=0)
        groups = [group for split in plan.splits for group in split.groups] or [0]
        replicates = max(len(split.replicate_weights) for split in plan.splits)
        return {
            "start_step": (first, last),
            "end_step": (first, last),
            "step": (first, last),
            "window": (first // plan.window * plan.window, last),
            "numel": (0, elements),
            "index": (0, elements - 1),
            "unit": (0, units - 1),
            "group": (min(groups), max(groups)),
            "replicate": (0, replicates - 1),
            "sign": (-1, 1),
            "bin": (UNDERFLOW, HIGHEST),
        }


def _too_long(column: str, size: int) -> str:
    return f"a {column} of {size:,} bytes; a name may have {LONGEST_NAME:,}"


def _extremes(metadata: pq.FileMetaData, column: str) -> list[Any] | None:
    """The lowest and highest value of each row group; None if the file does not have them."""
    at = metadata.schema.names.index(column)
    found: list[Any] = []
    for number in range(metadata.num_row_groups):
        part = metadata.row_group(number).column(at)
        statistics = part.statistics
        if statistics is None or not statistics.has_min_max:
            if statistics is not None and statistics.null_count == part.num_values:
                continue
            return None
        found += [statistics.min, statistics.max]
    return found


def _parts(file: pq.ParquetFile, column: str) -> Any:
    """The column in pieces, one row group after another."""
    for number in range(file.metadata.num_row_groups):
        yield from file.read_row_group(number, columns=[column]).column(0).chunks


def _unique(file: pq.ParquetFile, column: str) -> Any:
    """Its distinct values, ascending."""
    parts = [pc.unique(part.drop_null()).to_numpy() for part in _parts(file, column)]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
