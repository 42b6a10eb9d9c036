"""Sums over intervals by element, and over elements by layer and unit, on the device of LC.

Legend: P elements, L layers, U units, T intervals of a span; n elements of a block, in m pieces of
one layer each.

Every vector is in the order of the elements in memory. An interval is processed block by block: on
a CPU, blocks stay in the cache. No other vector of size P is allocated. Only sums by layer and unit
go to the host. They are float64 and added in the order of the blocks: they depend on the layout and
the kind of device alone. Little is kept per element: a sign takes two bits, and movements are read
from the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.allocation.path import Segment
from lcray.tables.writing.layer_histograms import Block, LayerHistograms, Pieces
from lcray.tables.writing.pieces import Array, array_of, count_pieces, module_of, sum_pieces
from lcray.tables.writing.units import Units
from lcray.tasks.model.layout import Layout
from lcray.tasks.model.vectors import zeros

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Takes the elements of some rows out of a vector [P], as an array.
Take = Callable[[Tensor], NDArray[Any]]

#: Quantities with a sign, and counts of their flips; a code has two bits of each, lowest first.
SIGNED = ("lc", "displacement", "gradient")
FLIPS = ("n_flips", "displacement_flips", "gradient_flips")

#: Elements of a block on a CPU: several float64 vectors of this length stay in the cache.
_BLOCK = 1 << 17
#: Elements of a block on another device.
_LARGE = 1 << 22
COUNTS = ("n_helping", "n_hurting", *FLIPS)


@dataclass(frozen=True)
class _Block:
    """A block of the flat vectors.

    Attributes:
        where: the block.
        starts: where its pieces start, [m].
        pieces: the numbers of the pieces, m of all.
        detail: runs of layers with histograms, each as a slice of the block and its pieces.
    """

    where: slice
    starts: tuple[int, ...]
    pieces: slice
    detail: tuple[tuple[slice, Pieces], ...]


@dataclass(frozen=True)
class LayerSums:
    """Sums over the elements of each layer in one interval.

    Attributes:
        helping: sum of the negative LC, [L]; 0 if the interval is not ok.
        hurting: sum of the positive LC, [L].
        update: sum of the squared movement, [L].
        gradient: sum of the squared gradient at the start, [L]; 0 without one.
        units: LC by unit, [U]; empty if the interval is not ok.
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


class Accumulators:
    """The sums of one split over the intervals of a span.

    Args:
        layout: layout of the flat vectors.
        intervals: the largest T.
        units: the units to sum.
        detail: numbers of the layers with histograms, ascending.
        by_element: whether to keep sums by element as well as the signs.
        device: where the vectors are.

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
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_ok = 0
        self._device = torch.device(device)
        self.by_element = ElementSums(layout.size, intervals, device) if by_element else None
        self._layout, self._units, self._detail = layout, units, list(detail)
        self._first, self._last = (zeros(layout.size, torch.uint8, device) for _ in range(2))
        self._n_intervals = 0
        self._buffers = np.array([layer.kind == "buffer" for layer in layout.layers])
        self._numel = np.array([layer.numel for layer in layout.layers])
        size = _BLOCK if self._device.type == "cpu" else _LARGE
        self._blocks: list[_Block] = []
        numbers: list[int] = []
        rows = {number: row for row, number in enumerate(detail)}
        for where, pieces in layout.pieces(size):
            own = slice(len(numbers), len(numbers) + len(pieces))
            numbers += [number for number, _ in pieces]
            starts = tuple(piece.start for _, piece in pieces)
            self._blocks.append(_Block(where, starts, own, tuple(_runs(pieces, rows))))
        self._numbers = np.array(numbers, np.int64)
        # Pieces of a layer follow each other.
        self._starts = np.flatnonzero(np.diff(self._numbers, prepend=-1))
        self._binned: list[Block] = [
            (slice(block.where.start + run.start, block.where.start + run.stop), pieces)
            for block in self._blocks
            for run, pieces in block.detail
        ]

    def add(
        self,
        lc: Tensor | None,
        segment: Segment,
        gradient: Tensor | None,
        histograms: LayerHistograms | None = None,
    ) -> LayerSums:
        """Add the next interval; all tensors are on the device.

        Args:
            lc: LC, [P] float64; None if the interval is not ok.
            segment: the path.
            gradient: gradient at the start of an interval that is ok, [P]; None if unknown.
            histograms: histograms to which |LC| is added, of the layers that have them.
        """
        work = _Work(self._blocks, len(self._numbers), self._device)
        if histograms is not None and lc is not None:
            histograms.begin()
        with np.errstate(invalid="ignore"):  # NaN where a checkpoint is not finite
            for block in self._blocks:
                own = work.on(block)
                own.add_squares(segment.difference(block.where), gradient)
                if lc is not None:
                    self._take(own, lc[block.where], gradient is not None, histograms)
        held = self._numbers[self._starts]
        sums = work.by_layer(self._starts, held, len(self._buffers))
        if lc is None:
            self._last.fill_(0)  # there is no flip from here to the next interval
        else:
            sums = replace(sums, units=self._units.sums(lc))
            if histograms is not None:
                n_zero = self._numel - sums.n_helping - sums.n_hurting
                histograms.end(lc, self._binned, n_zero[self._detail])
            self.n_ok += 1
        self._n_intervals += 1
        for count in (sums.n_helping, sums.n_hurting, sums.n_flips):
            count[self._buffers] = 0
        return sums

    def _take(
        self, work: _BlockWork, lc: Tensor, has_slope: bool, histograms: LayerHistograms | None
    ) -> None:
        """Signs, flips and sums of one block of an interval that is ok."""
        where, run = work.block.where, module_of(self._device)
        codes = work.add_signs(lc, has_slope)
        last = array_of(self._last[where])
        flips, other = array_of(work.flips), array_of(work.spare)
        run.bitwise_xor(array_of(codes), last, out=flips)
        run.bitwise_right_shift(flips, 1, out=other)
        # Both bits of a sign differ exactly if it is opposite.
        run.bitwise_and(flips, other, out=flips)
        last[...] = array_of(codes)
        if not self._n_intervals:
            self._first[where] = codes
        for place, row in enumerate(array_of(work.bits[2:])):
            run.bitwise_right_shift(flips, 2 * place, out=row)
            run.bitwise_and(row, 1, out=row)
        work.add_up(lc)
        if self.by_element is not None:
            self.by_element.add(where, lc, work)
        if histograms is not None:
            for part, pieces in work.block.detail:
                histograms.put(lc[part], work.magnitude[part], pieces)

    def borders(self, take: Take, has_gradient: bool) -> dict[str, NDArray[np.int8]]:
        """The columns of `borders` for the elements that `take` takes of a vector [P]."""
        columns = {}
        for end, vector in (("first", self._first), ("last", self._last)):
            codes = take(vector)
            for place, name in enumerate(SIGNED[: None if has_gradient else 2]):
                two = codes >> 2 * place
                columns[f"{name}_{end}"] = (two & 1).view(np.int8) - (two >> 1 & 1).view(np.int8)
        return columns


class _BlockWork:
    """What is computed of a block of n elements and m pieces.

    Attributes:
        block: the block.
        bits: whether LC is negative, and positive; whether LC, movement and gradient have flipped,
            [5, n] uint8.
        flips: flips in one byte, [n].
        spare: of any use, [n] uint8.
        magnitude: |LC|, [n].
    """

    def __init__(self, block: _Block, work: _Work) -> None:
        n = block.where.stop - block.where.start
        self.block = block
        self._floats, self.magnitude = work.floats[:4, :n], work.floats[4, :n]
        self.bits, (self.flips, self.spare) = work.bits[:5, :n], work.bits[5:7, :n]
        self._signs = work.bits[7:, :n]
        self._totals, self._counts = work.totals[:, block.pieces], work.counts[:, block.pieces]
        self._delta, self._slope = self.magnitude, self.magnitude

    def add_squares(self, delta: Tensor, gradient: Tensor | None) -> None:
        """Sum the squares of movement [n] and gradient [P]."""
        squares = self._floats[2:]
        torch.mul(delta, delta, out=squares[0])
        self._delta = delta
        if gradient is not None:
            self._slope = gradient[self.block.where]
            squares[1].copy_(self._slope).mul_(squares[1])
        some = squares if gradient is not None else squares[:1]
        sum_pieces(some, self.block.starts, self._totals[2 : 2 + len(some)])

    def add_signs(self, lc: Tensor, has_slope: bool) -> Tensor:
        """The codes of the signs of LC, movement and gradient, [n] uint8."""
        run, codes = module_of(lc.device), self._signs[2]
        names = (lc, self._delta, self._slope) if has_slope else (lc, self._delta)
        for place, values in enumerate(names):
            below, above = self._signs[:2] if place else self.bits[:2]
            run.less(array_of(values), 0, out=array_of(below.view(torch.bool)))
            run.greater(array_of(values), 0, out=array_of(above.view(torch.bool)))
            if place:
                codes.add_(above, alpha=1 << 2 * place).add_(below, alpha=2 << 2 * place)
            else:
                torch.add(above, below, alpha=2, out=codes)
        return codes

    def add_up(self, lc: Tensor) -> None:
        """Sum LC [n] and count bits."""
        torch.clamp(lc, max=0.0, out=self._floats[0])
        torch.clamp(lc, min=0.0, out=self._floats[1])
        sum_pieces(self._floats[:2], self.block.starts, self._totals[:2])
        count_pieces(self.bits[:3], self.block.starts, self._counts)
        torch.abs(lc, out=self.magnitude)


class _Work:
    """Memory for the blocks of an interval, and the sums of their M pieces.

    Attributes:
        floats: negative LC, positive LC, squared movement and gradient, and |LC|, [5, n] float64.
        bits: see `_BlockWork`; and signs and codes, [10, n] uint8.
        totals: sums of the first four floats, [4, M].
        counts: sums of the first three bits, [3, M].
    """

    def __init__(self, blocks: Collection[_Block], n_pieces: int, device: torch.device) -> None:
        n = max((block.where.stop - block.where.start for block in blocks), default=0)
        self.floats = torch.empty((5, n), dtype=torch.float64, device=device)
        self.bits = torch.empty((10, n), dtype=torch.uint8, device=device)
        self.totals = torch.zeros((4, n_pieces), dtype=torch.float64, device=device)
        self.counts = torch.zeros((3, n_pieces), dtype=torch.int64, device=device)

    def on(self, block: _Block) -> _BlockWork:
        """The memory for one block."""
        return _BlockWork(block, self)

    def by_layer(self, starts: Integers, held: Integers, n_layers: int) -> LayerSums:
        """The sums of layers from those of pieces.

        Args:
            starts: the first piece of each layer that has any.
            held: the numbers of these layers.
            n_layers: L.
        """
        totals, counts = np.zeros((4, n_layers)), np.zeros((3, n_layers), np.int64)
        if len(starts):
            with np.errstate(over="ignore", invalid="ignore"):
                totals[:, held] = np.add.reduceat(self.totals.cpu().numpy(), starts, axis=1)
            counts[:, held] = np.add.reduceat(self.counts.cpu().numpy(), starts, axis=1)
        helping, hurting, update, gradient = totals
        return LayerSums(helping, hurting, update, gradient, np.zeros(0), *counts)


def _runs(pieces: Pieces, rows: Mapping[int, int]) -> Iterator[tuple[slice, Pieces]]:
    """Runs of layers that have a row, as slices of a block, with the rows' slices of the run."""
    for chosen, run in groupby(pieces, key=lambda piece: piece[0] in rows):
        if chosen:
            found = list(run)
            first, last = found[0][1].start, found[-1][1].stop
            yield (
                slice(first, last),
                [(rows[n], slice(p.start - first, p.stop - first)) for n, p in found],
            )


class ElementSums:
    """Sums over a span's intervals by element, [P] each.

    LC and |LC| are summed in float64; counts are as narrow as T allows.

    Args:
        size: P.
        intervals: the largest T.
        device: where the vectors are.
    """

    def __init__(self, size: int, intervals: int, device: torch.device | str = "cpu") -> None:
        kinds = (torch.uint8, torch.int16, torch.int32)
        count = next(kind for kind in kinds if intervals <= torch.iinfo(kind).max)

        def vectors(names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
            return {name: zeros(size, dtype, device) for name in names}

        self._lc = vectors(("lc", "abs_lc"), torch.float64)
        self._counts = zeros(len(COUNTS) * size, count, device).view(len(COUNTS), size)

    def add(self, where: slice, lc: Tensor, work: _BlockWork) -> None:
        """Add one block of an interval.

        Args:
            where: the block, of n elements.
            lc: LC, [n].
            work: what is known of the block.
        """
        self._lc["lc"][where].add_(lc)
        self._lc["abs_lc"][where].add_(work.magnitude)
        counts: Array = array_of(self._counts[:, where])
        module_of(lc.device).add(counts, array_of(work.bits), out=counts)

    def columns(self, take: Take, n_ok: int, has_gradient: bool) -> dict[str, NDArray[Any]]:
        """The columns of `parameters` for the elements that `take` takes of a vector [P].

        Displacement and path length are not among them: they come from the checkpoints.

        Args:
            take: takes n of P elements.
            n_ok: number of intervals added.
            has_gradient: whether gradients at the start are known.
        """
        columns: dict[str, NDArray[Any]] = {name: take(total) for name, total in self._lc.items()}
        columns |= {name: take(row) for name, row in zip(COUNTS, self._counts, strict=True)}
        for name in ("n_helping", "n_hurting"):
            columns[name] = columns[name].astype(np.int64)
        columns["n_zero"] = n_ok - columns["n_helping"] - columns["n_hurting"]
        if not has_gradient:
            del columns["gradient_flips"]
        return columns
