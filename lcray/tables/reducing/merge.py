"""Merges the shards of all spans into the rows of each table, in order and in bounded memory.

Every function yields pieces of a table in the order of its key. Spans are read in the order of
their steps and sums are added in that order, so the result depends on the shards alone. Memory
holds at most a block of rows and one more row group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lcray.errors import CorruptionError
from lcray.planning.plan import Plan
from lcray.statistics.histograms import bin_edges
from lcray.storage import Place
from lcray.tables.arrow import make_table
from lcray.tables.shards.commit import Commit, Outline
from lcray.tables.shards.reader import ShardFile, open_shard

#: Rows that a block may hold; a layer with more elements is cut (`parameters`) or streamed.
BLOCK = 1 << 19

Attempt = Commit | Outline
Arrays = dict[str, NDArray[Any]]
Range = tuple[tuple[str, str], int, int]

_FLOAT_SUMS = ("lc", "abs_lc", "displacement", "path_length")
_COUNT_SUMS = ("n_helping", "n_hurting", "n_zero", "n_flips", "displacement_flips")
_BORDER_FLIPS = {"n_flips": "lc", "displacement_flips": "displacement"}


@dataclass(frozen=True)
class Source:
    """The committed shards of an output.

    Attributes:
        out: the output directory.
        plan: its plan.
        commits: one per committed span, in the order of steps.
        block: number of rows per block, at most.
    """

    out: Place
    plan: Plan
    commits: tuple[Attempt, ...]
    block: int = BLOCK

    @cached_property
    def splits(self) -> list[str]:
        """The names of the splits, in the plan's order."""
        return [split.name for split in self.plan.splits]

    @cached_property
    def layers(self) -> list[str]:
        """The names of the layers, in the model's order."""
        return [layer.name for layer in self.plan.layers]

    def files(self, table: str) -> Iterator[tuple[Attempt, ShardFile]]:
        """The committed files of a table, one open at a time."""
        for commit in self.commits:
            file = open_shard(self.out, commit, table)
            if file is not None:
                with file:
                    yield commit, file

    def codes(self, table: pa.Table, column: str) -> NDArray[np.int32]:
        """The positions of a column's names in the plan's order, [n].

        Raises:
            CorruptionError: for a name that the plan does not have.
        """
        names = {"split": self.splits, "layer": self.layers}[column]
        position = {name: i for i, name in enumerate(names)}
        values = table.column(column).combine_chunks()
        used = values.dictionary.to_pylist()
        lookup = np.array([position.get(name, -1) for name in used] or [0], np.int32)
        codes = lookup[values.indices.to_numpy()]
        if len(codes) and codes.min() < 0:
            raise CorruptionError(
                f"{self.out}: a shard has rows of a {column} that the plan does not have; "
                "run lcray verify"
            )
        return np.asarray(codes, np.int32)

    def canonical(self, table: pa.Table) -> pa.Table:
        """`table` with the plan's names as the dictionaries of split and layer."""
        for column, names in (("split", self.splits), ("layer", self.layers)):
            at = table.schema.get_field_index(column)
            if at >= 0:
                codes = pa.array(self.codes(table, column), pa.int32())
                values = pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))
                table = table.set_column(at, table.schema.field(at), values)
        return table


def concatenated(source: Source, table: str) -> Iterator[pa.Table]:
    """Rows of `intervals`, `units` or `groups`: those of all spans, split by split."""
    for split in source.splits:
        for _, file in source.files(table):
            for group, partition in enumerate(file.partitions):
                if partition == (split,):
                    yield source.canonical(file.read([group]))


def layers(source: Source) -> Iterator[pa.Table]:
    """Rows of `layers`, with the flips between the last interval of a span and the next span."""
    for split in source.splits:
        before: Attempt | None = None
        for commit, file in source.files("layers"):
            flips = None
            if before is not None and before.span.last == commit.span.first:
                flips = _flips_by_layer(source, split, before, commit)
            for group, partition in enumerate(file.partitions):
                if partition == (split,):
                    rows = source.canonical(file.read([group]))
                    yield rows if flips is None else _with_flips(source, rows, commit, flips)
            before = commit


def _with_flips(
    source: Source, rows: pa.Table, commit: Attempt, flips: NDArray[np.int64]
) -> pa.Table:
    first = rows.column("start_step").to_numpy() == commit.span.first
    counts = np.where(first, flips[source.codes(rows, "layer")], rows.column("n_flips").to_numpy())
    at = rows.schema.get_field_index("n_flips")
    return rows.set_column(at, rows.schema.field(at), pa.array(counts, pa.int64()))


def _flips_by_layer(source: Source, split: str, left: Attempt, right: Attempt) -> NDArray[np.int64]:
    """LC flips between two adjacent spans, for each layer, [layers]."""
    flips = np.zeros(len(source.layers), np.int64)
    with ExitStack() as stack:
        files = [open_shard(source.out, commit, "borders") for commit in (left, right)]
        before, after = (stack.enter_context(f) if f is not None else None for f in files)
        if before is None and after is None:
            return flips
        if before is None or after is None:
            raise _no_borders(source, left if before is None else right)
        for ranges in _blocks(source, split, after):
            a = before.read_ranges(ranges, ["index", "lc_last"])
            b = after.read_ranges(ranges, ["index", "lc_first", "layer"])
            _check_index(before, a, ranges)
            _check_index(after, b, ranges)
            flipped = _numbers(a, "lc_last") * _numbers(b, "lc_first") == -1
            flips += np.bincount(source.codes(b, "layer")[flipped], minlength=len(flips))
    return flips


def _blocks(source: Source, split: str, file: ShardFile) -> Iterator[list[Range]]:
    """The elements of a split's layers, in order, cut into blocks of bounded size."""
    block: list[Range] = []
    room = source.block
    for layer in source.layers:
        rows = file.extents.get((split, layer), 0)
        start = 0
        while start < rows:
            stop = min(rows, start + room)
            block.append(((split, layer), start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield block
                block, room = [], source.block
    if block:
        yield block


def _check_index(file: ShardFile, rows: pa.Table, ranges: list[Range]) -> None:
    """Check that every layer lists all elements in order, since they are matched by position."""
    expected = np.concatenate([np.arange(start, stop) for _, start, stop in ranges])
    if not np.array_equal(_numbers(rows, "index"), expected):
        raise CorruptionError(f"{file.path}: elements are not in order; run lcray verify")


def _numbers(rows: pa.Table, column: str) -> NDArray[Any]:
    values: NDArray[Any] = rows.column(column).to_numpy()
    return values


def parameters(source: Source) -> Iterator[pa.Table]:
    """Rows of `parameters`: sums over the spans, and the flips between adjacent ones."""
    for split in source.splits:
        for _, file in source.files("parameters"):
            blocks = list(_blocks(source, split, file))
            break
        else:
            return
        for ranges in blocks:
            yield _summed(source, ranges)


def _summed(source: Source, ranges: list[Range]) -> pa.Table:
    """One block of `parameters` over all spans."""
    n = sum(stop - start for _, start, stop in ranges)
    sums: Arrays = {name: np.zeros(n) for name in _FLOAT_SUMS}
    sums |= {name: np.zeros(n, np.int64) for name in (*_COUNT_SUMS, "gradient_flips")}
    known = np.ones(n, bool)  # whether gradient_flips is known
    border: tuple[int, pa.Table] | None = None
    for commit, file in source.files("parameters"):
        rows = file.read_ranges(ranges)
        _check_index(file, rows, ranges)
        for name in (*_FLOAT_SUMS, *_COUNT_SUMS):
            sums[name] += _numbers(rows, name)
        sums["gradient_flips"] += rows.column("gradient_flips").fill_null(0).to_numpy()
        known &= rows.column("gradient_flips").is_valid().to_numpy()
        signs = _border(source, commit, ranges)
        if border is not None and border[0] == commit.span.first:
            for name, what in _BORDER_FLIPS.items():
                before, after = border[1].column(f"{what}_last"), signs.column(f"{what}_first")
                sums[name] += before.to_numpy() * after.to_numpy() == -1
            last, first = border[1].column("gradient_last"), signs.column("gradient_first")
            both = last.fill_null(0).to_numpy() * first.fill_null(0).to_numpy()
            sums["gradient_flips"] += both == -1
        border = commit.span.last, signs
    layer = [source.layers.index(key[1]) for key, _, _ in ranges]
    lengths = [stop - start for _, start, stop in ranges]
    return make_table(
        "parameters",
        {
            **sums,
            "split": (source.splits.index(ranges[0][0][0]), source.splits),
            "layer": (np.repeat(layer, lengths), source.layers),
            "index": np.concatenate([np.arange(start, stop) for _, start, stop in ranges]),
            "gradient_flips": pa.array(sums["gradient_flips"], pa.int64(), mask=~known),
        },
    )


def _no_borders(source: Source, commit: Attempt) -> CorruptionError:
    return CorruptionError(
        f"{source.out}: span {commit.span.name} has no borders; run lcray verify"
    )


def _border(source: Source, commit: Attempt, ranges: list[Range]) -> pa.Table:
    file = open_shard(source.out, commit, "borders")
    if file is None:
        raise _no_borders(source, commit)
    with file:
        rows = file.read_ranges(ranges)
        _check_index(file, rows, ranges)
    return rows


def _gathered(
    source: Source, table: str, layer_at: int, size: int
) -> Iterator[tuple[str, list[str]]]:
    """Blocks of at most `size` rows of whole layers, or of one larger layer: (split, layers).

    Args:
        source: the shards.
        table: the name of the table.
        layer_at: position of the layer in the table's partition.
        size: number of rows per block.
    """
    rows: dict[tuple[str, str], int] = {}
    for _, file in source.files(table):
        for key, n in file.extents.items():
            name = (key[0], key[layer_at])
            rows[name] = rows.get(name, 0) + n
    for split in source.splits:
        block: list[str] = []
        room = size
        for layer in source.layers:
            n = rows.get((split, layer), 0)
            if block and n > room:
                yield split, block
                block, room = [], size
            if n:
                block.append(layer)
                room -= n
        if block:
            yield split, block


def _read(
    source: Source, table: str, layer_at: int, split: str, block: list[str], streamed: bool = False
) -> Iterator[pa.Table]:
    """The rows of some layers, one table per span, or one per row group if `streamed`."""
    for _, file in source.files(table):
        keys = enumerate(file.partitions)
        groups = [g for g, key in keys if key[0] == split and key[layer_at] in block]
        for part in [[g] for g in groups] if streamed else [groups] if groups else []:
            yield source.canonical(file.read(part))


def traces(source: Source) -> Iterator[pa.Table]:
    """Rows of `traces`, step after step for each element.

    If two spans both have a row for the step at which they meet, the later span's row is kept: it
    has the LC of the interval that starts there.
    """
    for split, block in _gathered(source, "traces", 1, source.block):
        rows = pa.concat_tables(list(_read(source, "traces", 1, split, block))).combine_chunks()
        keys = [source.codes(rows, "layer"), _numbers(rows, "index"), _numbers(rows, "step")]
        order = np.lexsort(keys[::-1])
        changes = np.zeros(len(order) - 1, bool)
        for key in keys:
            changes |= np.diff(key[order]) != 0
        yield rows.take(order[np.append(changes, True)])


def elements(source: Source) -> Iterator[pa.Table]:
    """Rows of `elements`: the intervals of each layer, one after another.

    Small layers are read and sorted together; a layer larger than a block is streamed.
    """
    for split, block in _gathered(source, "elements", 2, 4 * source.block):
        if len(block) == 1:
            yield from _read(source, "elements", 2, split, block, streamed=True)
        else:
            rows = pa.concat_tables(list(_read(source, "elements", 2, split, block)))
            yield rows.take(np.argsort(source.codes(rows, "layer"), kind="stable"))


def histograms(source: Source) -> Iterator[pa.Table]:
    """Rows of `histograms`, one table for each (split, window), which may lie in several spans."""
    for code in range(len(source.splits)):
        for window in _windows(source, source.splits[code]):
            lower, upper = bin_edges(window["bin"])
            columns = window | {"lower": lower, "upper": upper}
            layer = (window["layer"], source.layers)
            split = (code, source.splits)
            yield make_table("histograms", columns | {"split": split, "layer": layer})


def _windows(source: Source, split: str) -> Iterator[Arrays]:
    """The merged bins of each window of a split, in order; windows may straddle spans."""
    held: list[Arrays] = []
    rows = 0
    for _, file in source.files("histograms"):
        for group, partition in enumerate(file.partitions):
            if partition != (split,):
                continue
            for part in _by_window(source, file.read([group])):
                if held and held[0]["window"][0] != part["window"][0]:
                    yield merge_bins(held)
                    held, rows = [], 0
                held.append(part)
                rows += len(part["bin"])
                if rows > source.block:
                    held = [merge_bins(held)]
                    rows = len(held[0]["bin"])
    if held:
        yield merge_bins(held)


def _by_window(source: Source, table: pa.Table) -> Iterator[Arrays]:
    names = ("window", "sign", "bin", "count", "sum")
    columns: Arrays = {name: _numbers(table, name) for name in names}
    columns["layer"] = source.codes(table, "layer")
    edges = np.flatnonzero(np.diff(columns["window"])) + 1
    for start, stop in zip([0, *edges], [*edges, table.num_rows], strict=True):
        yield {name: values[start:stop] for name, values in columns.items()}


def merge_bins(parts: Sequence[Arrays]) -> Arrays:
    """Adds up bins with equal (layer, sign, bin), sorted by these; `window` is that of the first.

    Args:
        parts: columns window, layer (codes), sign, bin, count, sum, [n] each.
    """
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((joined["bin"], joined["sign"], joined["layer"]))
    joined = {name: values[order] for name, values in joined.items()}
    change = np.ones(len(order), bool)
    change[1:] = False
    for name in ("layer", "sign", "bin"):
        change[1:] |= np.diff(joined[name]) != 0
    starts = np.flatnonzero(change)
    merged = {name: joined[name][starts] for name in ("layer", "sign", "bin")}
    merged["window"] = np.full(len(starts), joined["window"][0])
    for name in ("count", "sum"):
        merged[name] = np.add.reduceat(joined[name], starts)
    return merged
