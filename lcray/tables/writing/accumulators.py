"""Sums over intervals by element, and over elements by layer and unit, in one pass over blocks.

Legend: P elements, L layers, U units, T intervals of a span; m stretches of layers in a block.

Every vector is in the order of the elements in memory. An interval is processed block by block, so
that intermediate values stay in the cache and no other vector of size P is allocated. Sums are
float64 and added in the order of the blocks: they depend on the layout alone. Little is kept per
element: a sign takes two bits, and movements are read from the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.allocation.path import Segment
from lcray.statistics.histograms import LayerHistograms
from lcray.tasks.model.layout import Layout
from lcray.tasks.model.vectors import zeros

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bits = NDArray[Any]  # uint8

#: Takes the elements of some rows out of a vector [P].
Take = Callable[[NDArray[Any]], NDArray[Any]]

#: Quantities with a sign, and counts of their flips; a code has two bits of each, lowest first.
SIGNED = ("lc", "displacement", "gradient")
FLIPS = ("n_flips", "displacement_flips", "gradient_flips")

#: Elements of a block: several float64 vectors of this length stay in the cache.
_BLOCK = 1 << 15


@dataclass(frozen=True)
class _Stretches:
    """Stretches [m] of a block that belong to one layer or unit each: its number and the start."""

    numbers: Integers
    starts: Integers


@dataclass(frozen=True)
class _Block:
    """A block of the flat vectors.

    Attributes:
        where: the block.
        layers: the stretches of layers.
        units: the stretches of units; U for elements without a unit. None if there are no units.
        detail: runs of layers with histograms, each as a slice of the block and its stretches.
    """

    where: slice
    layers: _Stretches
    units: _Stretches | None
    detail: tuple[tuple[slice, _Stretches], ...]


@dataclass(frozen=True)
class LayerSums:
    """Sums over the elements of each layer in one interval.

    Attributes:
        helping: sum of the negative LC, [L]; 0 if the interval is not ok.
        hurting: sum of the positive LC, [L].
        update: sum of the squared movement, [L].
        gradient: sum of the squared gradient at the start, [L]; 0 without one.
        units: LC by unit, and of all elements without a unit, [U + 1].
        n_helping: elements of parameters with LC < 0, [L].
        n_hurting: elements with LC > 0, [L].
        n_flips: elements whose LC has the opposite sign in the interval before, [L].
    """

    helping: Floats
    hurting: Floats
    update: Floats
    gradient: Floats
    units: Floats
    n_helping: Integers
    n_hurting: Integers
    n_flips: Integers

    @classmethod
    def zero(cls, layers: int, units: int) -> LayerSums:
        """Sums over no elements: all 0."""
        a, b, c, d = (np.zeros(layers) for _ in range(4))
        e, f, g = (np.zeros(layers, np.int64) for _ in range(3))
        return cls(a, b, c, d, np.zeros(units), e, f, g)


class Units:
    """Positions of the units of some layers.

    Args:
        layout: layout of the flat vectors.
        numbers: numbers of the layers, ascending.

    Attributes:
        size: U.
        numbers: the number of each unit's layer, [U].
        index: the number of each unit within its layer, [U].
    """

    def __init__(self, layout: Layout, numbers: Collection[int]) -> None:
        self._layout = layout
        sizes = [layout.layers[number].n_units for number in numbers]
        stops = np.cumsum([0, *sizes])
        self._first = dict(zip(numbers, stops.tolist(), strict=False))
        self.size = int(stops[-1])
        self.numbers = np.repeat(np.asarray(list(numbers), np.int32), sizes)
        self.index = np.arange(self.size) - np.repeat(stops[:-1], sizes)
        # Units along an axis other than the first are not stretches.
        self._across = [n for n in numbers if layout.layers[n].unit_axis not in (None, 0)]

    def stretches(self, block: slice, pieces: list[tuple[int, slice]]) -> _Stretches | None:
        """The units along the first axis within a block."""
        if not self.size:
            return None
        numbers, starts = [], []
        for number, piece in pieces:
            layer, first = self._layout.layers[number], self._first.get(number)
            if first is None or number in self._across:
                numbers.append(np.array([self.size]))
                starts.append(np.array([piece.start]))
                continue
            width = layer.numel // layer.n_units
            before = block.start + piece.start - self._layout.slices[number].start
            length = piece.stop - piece.start
            within = np.arange(before // width, (before + length - 1) // width + 1)
            numbers.append(first + within)
            starts.append(piece.start + np.maximum(within * width - before, 0))
        return _Stretches(np.concatenate(numbers), np.concatenate(starts))

    def add_across(self, lc: Tensor, sums: Floats) -> None:
        """Add the units along other axes to `sums`, [U + 1]."""
        for number in self._across:
            layer, first = self._layout.layers[number], self._first[number]
            axes = [axis for axis in range(len(layer.shape)) if axis != layer.unit_axis]
            values = self._layout.shaped(lc, number)
            if layer.unit_groups > 1:  # [groups, inputs of a group, outputs of a group, …]
                values = values.unflatten(0, (layer.unit_groups, -1))
                values = values.sum([1, *range(3, values.dim())]).reshape(-1)
            else:
                values = values.sum(axes)
            sums[first : first + layer.n_units] += values.numpy()


class Accumulators:
    """The sums of one split over the intervals of a span.

    Args:
        layout: layout of the flat vectors.
        intervals: the largest T.
        units: the units to sum.
        detail: numbers of the layers with histograms, ascending.
        by_element: whether to keep sums by element as well as the signs.

    Attributes:
        by_element: the sums by element, or None.
        n_ok: intervals with LC so far.
    """

    def __init__(
        self,
        layout: Layout,
        intervals: int,
        units: Units,
        detail: Collection[int],
        by_element: bool,
    ) -> None:
        self.n_ok = 0
        self.by_element = ElementSums(layout.size, intervals) if by_element else None
        self._layout, self._units = layout, units
        self._first: Bits = _vector(layout.size, torch.uint8)
        self._last: Bits = _vector(layout.size, torch.uint8)
        self._n_intervals = 0
        self._buffers = np.array([layer.kind == "buffer" for layer in layout.layers])
        self._blocks = list(_blocks(layout, units, detail))

    def add(
        self,
        lc: Tensor | None,
        segment: Segment,
        gradient: Tensor | None,
        histograms: LayerHistograms | None = None,
    ) -> LayerSums:
        """Add the next interval; all tensors are on the CPU.

        Args:
            lc: LC, [P] float64; None if the interval is not ok.
            segment: the path.
            gradient: gradient at the start of an interval that is ok, [P]; None if unknown.
            histograms: histograms to which |LC| is added, of the layers that have them.
        """
        sums = LayerSums.zero(len(self._layout.layers), self._units.size + 1)
        values = None if lc is None else lc.numpy()
        slopes = None if gradient is None else gradient.numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            for block in self._blocks:
                where, delta = block.where, segment.difference(block.where).numpy()
                _add_squares(sums.update, delta, block.layers)
                slope = None if slopes is None else slopes[where]
                if slope is not None:
                    _add_squares(sums.gradient, slope, block.layers)
                if values is not None:
                    self._take(block, values[where], delta, slope, sums)
                    if histograms is not None:
                        for part, layers in block.detail:
                            histograms.add(values[where][part], layers.numbers, layers.starts)
        if lc is None:
            self._last.fill(0)  # there is no flip from here to the next interval
        else:
            self._units.add_across(lc, sums.units)
            self.n_ok += 1
        self._n_intervals += 1
        for count in (sums.n_helping, sums.n_hurting, sums.n_flips):
            count[self._buffers] = 0
        return sums

    def _take(
        self, block: _Block, lc: Floats, delta: Floats, slope: NDArray[Any] | None, sums: LayerSums
    ) -> None:
        """Signs, flips and sums of one block of an interval that is ok."""
        where, layers = block.where, block.layers
        hurting, helping = (lc > 0).view(np.uint8), (lc < 0).view(np.uint8)
        codes = helping << 1
        codes |= hurting
        codes |= _codes(delta) << 2
        if slope is not None:
            codes |= _codes(slope) << 4
        flips = codes ^ self._last[where]
        flips &= flips >> 1  # both bits of a sign differ exactly if it is opposite
        self._last[where] = codes
        if not self._n_intervals:
            self._first[where] = codes
        magnitude = np.abs(lc)
        # x - |x| is exactly 2x for x < 0, else 0: much faster than minimum.
        sums.helping[layers.numbers] += _summed(lc - magnitude, layers) / 2
        sums.hurting[layers.numbers] += _summed(lc + magnitude, layers) / 2
        sums.n_helping[layers.numbers] += _counted(helping, layers)
        sums.n_hurting[layers.numbers] += _counted(hurting, layers)
        sums.n_flips[layers.numbers] += _counted(flips & 1, layers)
        if block.units is not None:
            sums.units[block.units.numbers] += _summed(lc, block.units)
        if self.by_element is not None:
            self.by_element.add(where, lc, magnitude, (helping, hurting), flips)

    def borders(self, take: Take, has_gradient: bool) -> dict[str, NDArray[np.int8]]:
        """The columns of `borders` for the elements that `take` takes of a vector [P]."""
        columns = {}
        for end, vector in (("first", self._first), ("last", self._last)):
            codes = take(vector)
            for place, name in enumerate(SIGNED[: None if has_gradient else 2]):
                two = codes >> 2 * place
                columns[f"{name}_{end}"] = (two & 1).view(np.int8) - (two >> 1 & 1).view(np.int8)
        return columns


class ElementSums:
    """Sums over a span's intervals by element, [P] each.

    LC and |LC| are summed in float64; counts are as narrow as T allows.

    Args:
        size: P.
        intervals: the largest T.
    """

    def __init__(self, size: int, intervals: int) -> None:
        kinds = (torch.uint8, torch.int16, torch.int32)
        count = next(kind for kind in kinds if intervals <= torch.iinfo(kind).max)
        self._lc = _vectors(("lc", "abs_lc"), size, torch.float64)
        self._signs = _vectors(("n_helping", "n_hurting"), size, count)
        self._flips = _vectors(FLIPS, size, count)

    def add(
        self,
        where: slice,
        lc: Floats,
        magnitude: Floats,
        signs: tuple[Bits, Bits],
        flips: Bits,
    ) -> None:
        """Add one block of an interval.

        Args:
            where: the block, of n elements.
            lc: LC, [n].
            magnitude: |LC|, [n].
            signs: whether LC is negative, and positive, as 0 and 1, [n] each.
            flips: bits 0, 2 and 4 say whether LC, movement and gradient have flipped, [n].
        """
        self._lc["lc"][where] += lc
        self._lc["abs_lc"][where] += magnitude
        for total, bits in zip(self._signs.values(), signs, strict=True):
            total[where] += bits
        for place, total in enumerate(self._flips.values()):
            total[where] += flips >> 2 * place & 1

    def columns(self, take: Take, n_ok: int, has_gradient: bool) -> dict[str, NDArray[Any]]:
        """The columns of `parameters` for the elements that `take` takes of a vector [P].

        Displacement and path length are not among them: they come from the checkpoints.

        Args:
            take: takes n of P elements.
            n_ok: number of intervals added.
            has_gradient: whether gradients at the start are known.
        """
        columns: dict[str, NDArray[Any]] = {name: take(total) for name, total in self._lc.items()}
        columns |= {name: take(count).astype(np.int64) for name, count in self._signs.items()}
        columns["n_zero"] = n_ok - columns["n_helping"] - columns["n_hurting"]
        columns |= {name: take(count) for name, count in self._flips.items()}
        if not has_gradient:
            del columns["gradient_flips"]
        return columns


def _vectors(names: Iterable[str], size: int, dtype: torch.dtype) -> dict[str, NDArray[Any]]:
    return {name: _vector(size, dtype) for name in names}


def _vector(size: int, dtype: torch.dtype) -> NDArray[Any]:
    array: NDArray[Any] = zeros(size, dtype).numpy()
    return array


def _codes(values: NDArray[Any]) -> Bits:
    """The sign of each value in two bits: 1 for +, 2 for -, 0 for 0, [n]."""
    codes: Bits = (values < 0).view(np.uint8) << 1
    codes |= (values > 0).view(np.uint8)
    return codes


def _summed(values: Floats, stretches: _Stretches) -> Floats:
    return np.add.reduceat(values, stretches.starts)


def _counted(bits: Bits, stretches: _Stretches) -> Integers:
    """The number of ones among zeros and ones, in each stretch, [m]."""
    if len(stretches.starts) == 1:
        return np.array([np.count_nonzero(bits)])
    return np.add.reduceat(bits, stretches.starts, dtype=np.int64)


def _add_squares(sums: Floats, values: NDArray[Any], stretches: _Stretches) -> None:
    squares = values.astype(np.float64)
    squares *= squares
    sums[stretches.numbers] += np.add.reduceat(squares, stretches.starts)


def _blocks(layout: Layout, units: Units, detail: Collection[int]) -> Iterator[_Block]:
    rows = {number: row for row, number in enumerate(detail)}
    for where, pieces in layout.pieces(_BLOCK):
        numbers = np.array([number for number, _ in pieces])
        starts = np.array([piece.start for _, piece in pieces])
        runs = []
        for chosen, run in groupby(pieces, key=lambda piece: piece[0] in rows):
            if chosen:
                found = list(run)
                first, last = found[0][1].start, found[-1][1].stop
                mine = np.array([rows[number] for number, _ in found])
                offsets = np.array([piece.start - first for _, piece in found])
                runs.append((slice(first, last), _Stretches(mine, offsets)))
        yield _Block(
            where, _Stretches(numbers, starts), units.stretches(where, pieces), tuple(runs)
        )
