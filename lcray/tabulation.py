"""From interval LC to the rows of a span's shards.

Legend: T intervals of the span, P elements, L layers, G groups, U units. Everything is kept by
split, since row groups never mix splits, and written when the span is done; only `elements`, which
would not fit, is written interval by interval.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcray.allocation import OK, IntervalLC
from lcray.arrow import make_table
from lcray.layers import Layer
from lcray.path import Segment
from lcray.planning import Plan, SplitPlan
from lcray.quadrature import get_rule
from lcray.shards import ShardWriter
from lcray.summary import Counts, SignedHistograms, bin_edges

_FLIPS = ("lc", "displacement", "gradient")


class SplitTables:
    """The rows of one split in one span.

    Args:
        plan: what was chosen.
        split: the split.
        writer: of the span's shards.
    """

    def __init__(self, plan: Plan, split: SplitPlan, writer: ShardWriter) -> None:
        self._plan, self._split, self._writer = plan, split, writer
        stops = np.cumsum([0, *(layer.numel for layer in plan.layers)])
        self._slices = [slice(int(a), int(b)) for a, b in pairwise(stops)]
        self._numbers = {layer.name: n for n, layer in enumerate(plan.layers)}
        self._detail = {self._numbers[name] for name in plan.detail_layers}
        self._rows: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self._histograms: dict[tuple[int, int], SignedHistograms] = defaultdict(SignedHistograms)
        self._signs = _Signs(int(stops[-1]), get_rule(plan.settings.rule).has_left)
        self._sums = _ElementSums(int(stops[-1])) if "parameters" in plan.tables else None
        self._samples = trace_indices(plan) if "traces" in plan.tables else {}

    def add(self, result: IntervalLC, segment: Segment) -> None:
        """Add one interval; intervals come in the order of their steps."""
        ok = result.status == OK
        lc = result.lc.cpu() if result.lc is not None else None
        delta = segment.delta.cpu()
        start = None if result.start_gradient is None else result.start_gradient.cpu()
        flips = self._signs.advance(lc, delta if ok else None, start)
        per_layer = self._add_layers(result, lc, delta, start, flips["lc"])
        self._add_interval(result, per_layer)
        if lc is not None:
            self._add_units(result.start_step, lc)
            if self._sums is not None:
                self._sums.add(lc, delta, flips)
            if "elements" in self._plan.tables:
                self._write_elements(result.start_step, lc)
        self._add_groups(result)
        self._add_traces(result, segment, lc, start)

    def _add_layers(
        self,
        result: IntervalLC,
        lc: Tensor | None,
        delta: Tensor,
        start: Tensor | None,
        flips: Tensor | None,
    ) -> tuple[list[float], Counts]:
        """Append the layers' rows; returns LC by layer and the counts of the interval."""
        window = self._plan.window_of(result.start_step)
        total, lcs = Counts(), []
        rows = self._rows["layers"]
        for number, (layer, where) in enumerate(zip(self._plan.layers, self._slices, strict=True)):
            counts, helping, hurting, n_flips = Counts(), math.nan, math.nan, 0
            if lc is not None:
                values = lc[where]
                helping = float(values.clamp(max=0).sum())
                hurting = float(values.clamp(min=0).sum())
                if layer.kind == "parameter":
                    counts = self._count(number, window, values)
                    n_flips = 0 if flips is None else int(flips[where].sum())
            total += counts
            lcs.append(helping + hurting)
            rows["lc_helping"].append(helping)
            rows["lc_hurting"].append(hurting)
            rows["n_helping"].append(counts.n_helping)
            rows["n_hurting"].append(counts.n_hurting)
            rows["n_zero"].append(counts.n_zero)
            rows["n_flips"].append(n_flips)
            rows["update_norm"].append(float(torch.linalg.vector_norm(delta[where])))
            rows["gradient_norm"].append(
                math.nan if start is None else float(torch.linalg.vector_norm(start[where]))
            )
        rows["lc"] += lcs
        rows["lc_error"] += self._listed(result.layer_error)
        rows["first_order_lc"] += self._listed(result.first_order)
        rows["start_step"] += [result.start_step] * len(lcs)
        rows["end_step"] += [result.end_step] * len(lcs)
        return lcs, total

    def _count(self, number: int, window: int, values: Tensor) -> Counts:
        if number in self._detail:
            return self._histograms[window, number].add(values)
        helping, hurting = int((values < 0).sum()), int((values > 0).sum())
        return Counts(helping, hurting, len(values) - helping - hurting)

    def _listed(self, values: Tensor | None) -> list[float]:
        return [math.nan] * len(self._slices) if values is None else values.tolist()

    def _add_interval(self, result: IntervalLC, per_layer: tuple[list[float], Counts]) -> None:
        lcs, counts = per_layer
        ok = result.status == OK
        lc = math.fsum(lcs) if ok else math.nan
        change = result.loss_end - result.loss_start
        first = math.fsum(self._listed(result.first_order))
        row = {
            "start_step": result.start_step,
            "end_step": result.end_step,
            "loss_start": result.loss_start,
            "loss_end": result.loss_end,
            "loss_change": change,
            "lc": lc,
            "gap": lc - change,
            "first_order_lc": first,
            "panels": result.panels,
            "n_gradients": result.n_gradients,
            "converged": result.converged if ok else None,
            "status": result.status,
            "n_helping": counts.n_helping,
            "n_hurting": counts.n_hurting,
            "n_zero": counts.n_zero,
        }
        for name, value in row.items():
            self._rows["intervals"][name].append(value)

    def _add_units(self, start_step: int, lc: Tensor) -> None:
        for layer, where in self._of(self._plan.unit_layers):
            values = lc[where].view(layer.shape)
            if layer.unit_axis is not None:
                values = values.movedim(layer.unit_axis, 0)
            width = layer.numel // max(1, layer.n_units)  # a layer may be empty
            units = values.reshape(layer.n_units, width).sum(1).numpy()
            rows = self._rows["units"]
            rows["layer"].append(np.full(len(units), self._number(layer), np.int32))
            rows["unit"].append(np.arange(len(units)))
            rows["start_step"].append(np.full(len(units), start_step))
            rows["lc"].append(units)

    def _add_groups(self, result: IntervalLC) -> None:
        if result.group_lc is None or result.status != OK:
            return
        # [G, L] to rows sorted by layer, then group.
        values = result.group_lc.cpu().numpy().T
        layers, groups = values.shape
        share = np.asarray(self._split.group_weights) / self._split.total_weight
        rows = self._rows["groups"]
        rows["layer"].append(np.repeat(np.arange(layers, dtype=np.int32), groups))
        rows["group"].append(np.tile(np.asarray(self._split.groups), layers))
        rows["start_step"].append(np.full(layers * groups, result.start_step))
        rows["lc"].append(values.reshape(-1))
        rows["weight"].append(np.tile(share, layers))

    def _write_elements(self, start_step: int, lc: Tensor) -> None:
        for layer, where in self._of(self._plan.detail_layers):
            columns = {
                "split": self._split.name,
                "layer": layer.name,
                "start_step": start_step,
                "index": np.arange(layer.numel),
                "lc": lc[where].numpy().astype(np.float32),
            }
            self._writer.write("elements", make_table("elements", columns))

    def _add_traces(
        self, result: IntervalLC, segment: Segment, lc: Tensor | None, start: Tensor | None
    ) -> None:
        weights = segment.start.vector.cpu()
        for number, index in self._samples.items():
            at = torch.from_numpy(index + self._slices[number].start)
            rows = self._rows["traces"]
            blank = np.full(len(index), np.nan)
            rows[f"weight {number}"].append(weights[at].double().numpy())
            rows[f"gradient {number}"].append(blank if start is None else start[at].numpy())
            rows[f"lc {number}"].append(blank if lc is None else lc[at].numpy())
        self._rows["traces"]["step"].append(result.start_step)

    def write(self) -> None:
        """Write what was added; the split's turn comes in the plan's order."""
        layers = self._plan.layers
        rows = self._rows["layers"]
        times = len(rows["start_step"]) // len(layers)
        numbers = np.tile(np.arange(len(layers), dtype=np.int32), times)
        known = {
            "layer": self._codes(numbers),
            "module": [layer.module for layer in layers] * times,
            "kind": [layer.kind for layer in layers] * times,
            "numel": [layer.numel for layer in layers] * times,
        }
        self._write("layers", {**rows, **known})
        self._write("intervals", {**self._rows["intervals"], "rule": self._plan.settings.rule})
        for name in ("units", "groups"):
            if name in self._plan.tables:
                joined = {key: np.concatenate(parts) for key, parts in self._rows[name].items()}
                if joined:
                    self._write(name, {**joined, "layer": self._codes(joined["layer"])})
        if "histograms" in self._plan.tables:
            self._write_histograms()
        if self._sums is not None:
            for layer, where in self._of(self._plan.detail_layers):
                columns = self._sums.columns(where, self._signs.has_gradient)
                self._write("parameters", {**columns, "layer": layer.name})
        for layer, where in zip(layers, self._slices, strict=True):
            if layer.kind == "parameter":
                self._write("borders", {**self._signs.columns(where), "layer": layer.name})
        self._write_traces()

    def _write_histograms(self) -> None:
        for (window, number), histograms in sorted(self._histograms.items()):
            for sign in (-1, 0, 1):
                bins, counts, sums = histograms.by_sign[sign].nonzero()
                lower, upper = bin_edges(bins)
                rows = self._rows["histograms"]
                rows["window"].append(np.full(len(bins), window))
                rows["layer"].append(np.full(len(bins), number, np.int32))
                rows["sign"].append(np.full(len(bins), sign, np.int8))
                for name, part in zip(
                    ("bin", "lower", "upper", "count", "sum"),
                    (bins, lower, upper, counts, sums),
                    strict=True,
                ):
                    rows[name].append(part)
        joined = {key: np.concatenate(parts) for key, parts in self._rows["histograms"].items()}
        if joined:
            self._write("histograms", {**joined, "layer": self._codes(joined["layer"])})

    def _write_traces(self) -> None:
        rows = self._rows["traces"]
        steps = np.asarray(rows.pop("step", []), np.int64)
        for number, index in self._samples.items():
            columns: dict[str, Any] = {
                name: np.stack(rows[f"{name} {number}"], axis=1).reshape(-1)
                for name in ("weight", "gradient", "lc")
            }
            columns["index"] = np.repeat(index, len(steps))
            columns["step"] = np.tile(steps, len(index))
            self._write("traces", {**columns, "layer": self._plan.layers[number].name})

    def _write(self, table: str, columns: dict[str, Any]) -> None:
        self._writer.write(table, make_table(table, {**columns, "split": self._split.name}))

    def _codes(self, numbers: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], list[str]]:
        return numbers, [layer.name for layer in self._plan.layers]

    def _number(self, layer: Layer) -> int:
        return self._numbers[layer.name]

    def _of(self, names: tuple[str, ...]) -> list[tuple[Layer, slice]]:
        """The named layers and where they are; names come in the plan's order."""
        numbers = [self._numbers[name] for name in names]
        return [(self._plan.layers[n], self._slices[n]) for n in numbers]


class _Signs:
    """Signs of LC, movement and gradient: of the span's first and latest interval, [P] int8."""

    def __init__(self, size: int, has_gradient: bool) -> None:
        self.has_gradient = has_gradient
        self._zeros = torch.zeros(size, dtype=torch.int8)
        self._first: dict[str, Tensor | None] = {}
        self._last: dict[str, Tensor | None] = {}

    def advance(
        self, lc: Tensor | None, delta: Tensor | None, gradient: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Take the next interval; returns where each sign flipped, None without a predecessor."""
        flips: dict[str, Tensor | None] = {}
        for name, values in zip(_FLIPS, (lc, delta, gradient), strict=True):
            sign = None if values is None else torch.sign(values).to(torch.int8)
            before = self._last.get(name)
            flips[name] = None if sign is None or before is None else sign * before == -1
            self._first.setdefault(name, sign)
            self._last[name] = sign
        return flips

    def columns(self, where: slice) -> dict[str, Any]:
        """Columns of `borders` for one layer."""
        columns: dict[str, Any] = {"index": np.arange(where.stop - where.start)}
        for end, signs in (("first", self._first), ("last", self._last)):
            for name in _FLIPS:
                if name != "gradient" or self.has_gradient:
                    sign = signs[name]
                    columns[f"{name}_{end}"] = (self._zeros if sign is None else sign)[
                        where
                    ].numpy()
        return columns


class _ElementSums:
    """Sums over the span's intervals by element, [P]."""

    def __init__(self, size: int) -> None:
        exact = ("lc", "abs_lc", "displacement", "path_length")
        whole = ("n_helping", "n_hurting", "n_zero")
        flips = ("n_flips", "displacement_flips", "gradient_flips")
        self._sums = {name: torch.zeros(size, dtype=torch.float64) for name in exact}
        self._sums |= {name: torch.zeros(size, dtype=torch.int32) for name in (*whole, *flips)}

    def add(self, lc: Tensor, delta: Tensor, flips: dict[str, Tensor | None]) -> None:
        """Add one interval."""
        sums = self._sums
        sums["lc"] += lc
        sums["abs_lc"] += lc.abs()
        sums["displacement"] += delta
        sums["path_length"] += delta.abs()
        sums["n_helping"] += lc < 0
        sums["n_hurting"] += lc > 0
        sums["n_zero"] += lc == 0
        for name, column in zip(_FLIPS, list(sums)[-3:], strict=True):
            flipped = flips[name]
            if flipped is not None:
                sums[column] += flipped

    def columns(self, where: slice, has_gradient: bool) -> dict[str, Any]:
        """Columns of `parameters` for one layer."""
        columns: dict[str, Any] = {k: v[where].numpy() for k, v in self._sums.items()}
        if not has_gradient:
            del columns["gradient_flips"]
        return {**columns, "index": np.arange(where.stop - where.start)}


def trace_indices(plan: Plan) -> dict[int, np.ndarray[Any, Any]]:
    """The elements to trace, ascending, by the number of the layer: a seeded sample and named ones.

    The sample of a layer depends on the seed and the layer's name alone.
    """
    named: dict[str, list[int]] = defaultdict(list)
    for item in plan.settings.trace:
        match = re.fullmatch(r"(.+):(\d+)", item)
        if match:
            named[match[1]].append(int(match[2]))
    chosen = {}
    for number, layer in enumerate(plan.layers):
        if layer.name not in plan.detail_layers and layer.name not in named:
            continue
        size = min(plan.trace_sample, layer.numel) if layer.name in plan.detail_layers else 0
        seed = [plan.settings.trace_seed, zlib.crc32(layer.name.encode())]
        sample = np.random.default_rng(seed).choice(layer.numel, size, replace=False)
        index = np.unique(np.concatenate([sample, np.asarray(named[layer.name], np.int64)]))
        if len(index):
            chosen[number] = index.astype(np.int64)
    return chosen
