"""Turn interval LC into the rows of a span's shards.

Legend: T intervals of the span, P elements, L layers, G groups, U units, S traced elements.

Rows are kept by split, since row groups never mix splits. Rows of every interval are written when
they fill a row group, histograms when their window ends, `elements` by a separate thread, and all
other rows when the span is done. No vector of size P is made for this.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.allocation.interval import OK, IntervalLC
from lcray.allocation.path import Point, Segment
from lcray.allocation.quadrature import get_rule
from lcray.planning.plan import Plan, SplitPlan
from lcray.statistics.histograms import bin_edges
from lcray.tables.arrow import make_table
from lcray.tables.schema import TABLES
from lcray.tables.shards.writer import ShardWriter
from lcray.tables.writing.accumulators import Accumulators, LayerSums
from lcray.tables.writing.layer_histograms import LayerHistograms
from lcray.tables.writing.row_groups import ElementsWriter, IntervalRows, Piece
from lcray.tables.writing.traced_elements import trace_indices
from lcray.tables.writing.traces import Traces
from lcray.tables.writing.units import Units
from lcray.tasks.model.layout import Layout
from lcray.tasks.model.vectors import zeros


class SplitTables:
    """The rows of one split in one span.

    Args:
        plan: the plan.
        split: the split.
        writer: writer of the span's shards.
        elements: writes `elements` for all splits of the span.
        device: where the vectors are.
    """

    def __init__(
        self,
        plan: Plan,
        split: SplitPlan,
        writer: ShardWriter,
        elements: ElementsWriter,
        device: torch.device | str = "cpu",
    ) -> None:
        self._plan, self._split, self._writer, self._elements = plan, split, writer, elements
        self._layout = Layout(plan.layers, plan.memory_format)
        numbers = {layer.name: n for n, layer in enumerate(plan.layers)}
        self._detail = [numbers[name] for name in plan.detail_layers]
        self._parameters = np.array([layer.kind == "parameter" for layer in plan.layers])
        self._numel = np.array([layer.numel for layer in plan.layers])
        dtype = torch.float32 if plan.settings.dtype == "float32" else torch.float64
        intervals = len(writer.span.intervals)
        unit_layers = plan.unit_layers if "units" in plan.tables else ()
        units = Units(self._layout, [numbers[name] for name in unit_layers])
        has_histograms = "histograms" in plan.tables
        self._sums = Accumulators(
            self._layout,
            intervals,
            units,
            self._detail if has_histograms else [],
            "parameters" in plan.tables,
            device,
        )
        self._device = device
        self._intervals: dict[str, list[Any]] = defaultdict(list)
        self._layers = IntervalRows("layers", self._fixed_layers(), self._write)
        self._unit_rows = IntervalRows("units", self._fixed_units(units), self._write)
        shares = np.asarray(split.group_weights) / split.total_weight
        self._groups = IntervalRows(
            "groups", self._fixed_parts("group", split.groups, shares), self._write
        )
        shares = np.asarray(split.replicate_weights) / split.total_weight
        of_run = shares if "replicates" in plan.tables else shares[:0]
        own = {"replicate": np.arange(len(of_run)), "weight": of_run}
        self._replicates = IntervalRows("replicates", own, self._write)
        own = self._fixed_parts("replicate", range(len(shares)), shares)
        self._replicate_layers = IntervalRows("replicate_layers", own, self._write)
        self._window = -1
        self._histograms = LayerHistograms(len(self._detail), device) if has_histograms else None
        samples = trace_indices(plan) if "traces" in plan.tables else {}
        self._traces = Traces(self._layout, samples, intervals, dtype, device)
        self._moves: list[tuple[int, int]] = []  # the intervals that are ok

    def add(self, result: IntervalLC, segment: Segment) -> None:
        """Add one interval; intervals come in the order of their steps.

        Raises:
            OutputError: if writing rows of this or an earlier interval to disk fails.
        """
        ok = result.status == OK
        lc, start = result.lc, result.start_gradient
        self._open_window(result.start_step)
        sums = self._sums.add(lc, segment, start, self._histograms)
        n_zero = np.where(self._parameters & ok, self._numel - sums.n_helping - sums.n_hurting, 0)
        self._add_layers(result, sums, n_zero)
        self._add_interval(result, sums, n_zero)
        self._traces.add(result.start_step, segment.start.vector, start, lc)
        if lc is not None:
            steps = {"start_step": result.start_step}
            self._unit_rows.add(steps, {"lc": sums.units})
            if result.group_lc is not None:
                self._add_parts(result, result.group_lc.cpu().numpy())
            self._moves.append((result.start_step, result.end_step))
            if "elements" in self._plan.tables:
                self._add_elements(result.start_step, lc)

    def write(self, read: Callable[[int], Tensor]) -> None:
        """Write the added rows; splits must be written in the plan's order.

        Args:
            read: gives the flat vector [P] of the checkpoint at a step, in the order in memory.

        Raises:
            OutputError: if writing to disk fails, now or earlier for `elements`.
        """
        by_interval = (self._layers, self._unit_rows, self._groups)
        for rows in (*by_interval, self._replicates, self._replicate_layers):
            rows.flush()
        self._write("intervals", self._intervals)
        self._write_histograms()
        has_gradient = get_rule(self._plan.settings.rule).has_left
        self._write_parameters(read, has_gradient)
        for piece in self._pieces("borders", np.flatnonzero(self._parameters).tolist()):
            columns = self._sums.borders(partial(self._rows, piece), has_gradient)
            self._write_piece("borders", piece, columns)
        for number, columns in self._traces.columns(TABLES["traces"].row_group_size):
            self._write("traces", {**columns, "layer": self._plan.layers[number].name})
        self._elements.drain()
        # The rows refer to this object: the vectors would stay until garbage collection.
        del self._sums, self._traces

    def _fixed_layers(self) -> dict[str, Any]:
        layers = self._plan.layers
        return {
            "layer": self._named(np.arange(len(layers), dtype=np.int32)),
            "module": _encoded([layer.module for layer in layers]),
            "kind": _encoded([layer.kind for layer in layers]),
            "numel": self._numel,
        }

    def _fixed_units(self, units: Units) -> dict[str, Any]:
        return {"layer": self._named(units.numbers), "unit": units.index}

    def _fixed_parts(
        self, part: str, numbers: Sequence[int], shares: NDArray[Any]
    ) -> dict[str, Any]:
        """Fixed columns of the table ``<part>s``: all groups or replicates, layer by layer."""
        layers = np.arange(len(self._plan.layers), dtype=np.int32)
        if {"group": "groups", "replicate": "replicate_layers"}[part] not in self._plan.tables:
            layers = layers[:0]
        return {
            "layer": self._named(np.repeat(layers, len(numbers))),
            part: np.tile(np.asarray(numbers, np.int64), len(layers)),
            "weight": np.tile(shares, len(layers)),
        }

    def _add_parts(self, result: IntervalLC, lc: NDArray[Any]) -> None:
        """Add LC of groups and replicates, [G + R, L], as rows sorted by layer first."""
        steps = {"start_step": result.start_step}
        groups, replicates = np.split(lc, [len(self._split.groups)])
        self._groups.add(steps, {"lc": groups.T.reshape(-1)})
        self._replicate_layers.add(steps, {"lc": replicates.T.reshape(-1)})
        if len(replicates):
            before, after = map(np.array, result.replicate_losses)
            columns = {"loss_start": before, "loss_end": after, "loss_change": after - before}
            columns["lc"] = np.array([math.fsum(row) for row in replicates])
            self._replicates.add({**steps, "end_step": result.end_step}, columns)

    def _named(self, numbers: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
        return numbers, [layer.name for layer in self._plan.layers]

    def _add_layers(self, result: IntervalLC, sums: LayerSums, n_zero: NDArray[Any]) -> None:
        ok = result.status == OK
        start = result.start_gradient
        self._layers.add(
            {"start_step": result.start_step, "end_step": result.end_step},
            {
                "lc": sums.helping + sums.hurting if ok else sums.helping + math.nan,
                "lc_error": self._listed(result.layer_error),
                "lc_se": self._listed(result.layer_se),
                "lc_helping": sums.helping if ok else sums.helping + math.nan,
                "lc_hurting": sums.hurting if ok else sums.hurting + math.nan,
                "n_helping": sums.n_helping,
                "n_hurting": sums.n_hurting,
                "n_zero": n_zero,
                "n_flips": sums.n_flips,
                "first_order_lc": self._listed(result.first_order),
                "update_norm": np.sqrt(sums.update),
                "gradient_norm": np.sqrt(sums.gradient) if start is not None else self._listed(),
            },
        )

    def _listed(self, values: Tensor | None = None) -> NDArray[np.float64]:
        """One number per layer, [L]; NaN for no number."""
        if values is None:
            return np.full(len(self._plan.layers), math.nan)
        return values.cpu().numpy().astype(np.float64)

    def _add_interval(self, result: IntervalLC, sums: LayerSums, n_zero: NDArray[Any]) -> None:
        ok = result.status == OK
        lc = math.fsum(sums.helping + sums.hurting) if ok else math.nan
        change = result.loss_end - result.loss_start
        row = {
            "start_step": result.start_step,
            "end_step": result.end_step,
            "loss_start": result.loss_start,
            "loss_end": result.loss_end,
            "loss_change": change,
            "lc": lc,
            "lc_se": math.nan if result.lc_se is None else result.lc_se,
            "gap": lc - change,
            "first_order_lc": math.fsum(self._listed(result.first_order)),
            "rule": result.rule,
            "panels": result.panels,
            "n_gradients": result.n_gradients,
            "gradient_cost": result.n_gradients + result.sampled_gradients,
            "converged": result.converged if ok else None,
            "status": result.status,
            "n_helping": int(sums.n_helping.sum()),
            "n_hurting": int(sums.n_hurting.sum()),
            "n_zero": int(n_zero.sum()),
        }
        for name, value in row.items():
            self._intervals[name].append(value)

    def _add_elements(self, start_step: int, lc: Tensor) -> None:
        """Hand over float32 copies; small layers are put together."""
        limit = TABLES["elements"].row_group_size
        parts: list[tuple[str, int, Tensor]] = []
        size = 0
        for piece in self._pieces("elements", self._detail):
            values = self._layout.rows(lc, *piece).to(torch.float32)
            if parts and size + len(values) > limit:
                self._elements.put(self._split.name, start_step, parts)
                parts, size = [], 0
            parts.append((self._plan.layers[piece.number].name, piece.start, values))
            size += len(values)
        if parts:
            self._elements.put(self._split.name, start_step, parts)

    def _open_window(self, start_step: int) -> None:
        """Write the histograms of the previous window if `start_step` is in another one."""
        window = self._plan.window_of(start_step)
        if window != self._window:
            self._write_histograms()
        self._window = window

    def _write_histograms(self) -> None:
        if self._histograms is None:
            return
        layers, signs, bins, counts, sums = self._histograms.nonzero()
        if len(bins):
            lower, upper = bin_edges(bins)
            columns = {"bin": bins, "lower": lower, "upper": upper, "count": counts, "sum": sums}
            numbers = np.asarray(self._detail, np.int32)[layers]
            columns |= {"window": np.full(len(bins), self._window), "sign": signs.astype(np.int8)}
            self._write("histograms", {**columns, "layer": self._named(numbers)})
            self._histograms = LayerHistograms(len(self._detail), self._device)

    def _write_parameters(self, read: Callable[[int], Tensor], has_gradient: bool) -> None:
        sums = self._sums.by_element
        if sums is None:
            return
        movement = _Movement(self._layout, self._moves, read)
        for piece in self._pieces("parameters", self._detail):
            columns = sums.columns(partial(self._rows, piece), self._sums.n_ok, has_gradient)
            self._write_piece("parameters", piece, {**columns, **movement.rows(piece)})

    def _pieces(self, table: str, numbers: Iterable[int]) -> Iterator[Piece]:
        """The elements of some layers, in pieces of at most one row group."""
        size = TABLES[table].row_group_size
        for number in numbers:
            numel = self._plan.layers[number].numel
            for start in range(0, numel, size):
                yield Piece(number, start, min(numel, start + size))

    def _rows(self, piece: Piece, vector: Tensor) -> NDArray[Any]:
        return self._layout.rows(vector, *piece).cpu().numpy()

    def _write_piece(self, table: str, piece: Piece, columns: Mapping[str, Any]) -> None:
        place = {
            "layer": self._plan.layers[piece.number].name,
            "index": np.arange(piece.start, piece.stop),
        }
        self._write(table, {**columns, **place})

    def _write(self, table: str, columns: Mapping[str, Any]) -> None:
        self._writer.write(table, make_table(table, {**columns, "split": self._split.name}))


class _Movement:
    """Movement of elements over the intervals that are ok: net, and along the path.

    Args:
        layout: layout of the flat vectors.
        intervals: (start, end) step of each.
        read: gives the vector [P] of a step.
    """

    def __init__(
        self, layout: Layout, intervals: list[tuple[int, int]], read: Callable[[int], Tensor]
    ) -> None:
        self._layout = layout
        self._net, self._path = (zeros(layout.size, torch.float64) for _ in range(2))
        step, vector = -1, torch.empty(0)
        for start, end in intervals:
            before = vector if step == start else read(start).cpu()
            step, vector = end, read(end).cpu()
            segment = _segment(before, vector)
            for where in layout.blocks():
                delta = segment.difference(where)
                self._net[where] += delta
                self._path[where] += delta.abs()
            del before, segment  # two vectors at once, not three

    def rows(self, piece: Piece) -> dict[str, NDArray[np.float64]]:
        """Columns for some elements."""
        return {
            "displacement": self._layout.rows(self._net, *piece).numpy(),
            "path_length": self._layout.rows(self._path, *piece).numpy(),
        }


def _segment(start: Tensor, end: Tensor) -> Segment:
    return Segment(Point(0, start, {}), Point(1, end, {}))


def _encoded(names: list[str]) -> tuple[NDArray[np.int32], list[str]]:
    """Codes and the names they stand for."""
    unique = list(dict.fromkeys(names))
    codes = {name: code for code, name in enumerate(unique)}
    return np.array([codes[name] for name in names], np.int32), unique
