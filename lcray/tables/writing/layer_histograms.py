"""The histograms of many layers, filled on the device that holds LC.

Legend: L layers with a histogram, W columns.

A bin's key is the upper bits of |LC|, see `lcray.statistics.histograms`. Keys have columns in a
cyclic window: a key is in column `key mod W`, W a power of two, so that columns come from bits
alone. The lowest key of the window stands for all that is below: zeros and subnormals. The highest
stands for all that is above, and is never used. The window is widened where an interval needs it,
which shows only afterwards: the interval is then counted once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lcray.statistics.histograms import (
    BIAS,
    FIRST_NORMAL,
    NON_FINITE,
    SHIFT,
    UNDERFLOW,
    Floats,
    Integers,
)

#: The pieces of layers in a block, one after another: a row each, and a slice within the block.
Pieces = Sequence[tuple[int, slice]]
#: A block of a vector, and its pieces.
Block = tuple[slice, Pieces]

_LEAST = 256  # columns: 32 octaves
_USUAL = BIAS - 8 * 40  # from 2^-40
_SIGN = 63
_IN_ORDER = ("cpu",)  # devices that add to a cell in the order of the values
_TINY = torch.finfo(torch.float64).tiny


class LayerHistograms:
    """The histograms of |LC| by sign of many layers.

    Counts are exact. Sums are float64, added by interval and then over intervals. Size: 32 bytes
    per layer and bin between the lowest and the highest of all layers, or up to twice that.

    Args:
        n_layers: L.
        device: where LC is.
    """

    def __init__(self, n_layers: int, device: torch.device | str = "cpu") -> None:
        self._n, self._device = n_layers, torch.device(device)
        self._lowest, self._width = _USUAL, _LEAST  # the key for all that is below, W
        self._counts = self._zeros(torch.int64)
        self._sums = self._zeros(torch.float64)
        self._ones: Tensor | None = None
        self._n_zero = np.zeros(n_layers, np.int64)
        self._n_subnormal = np.zeros((n_layers, 2), np.int64)

    def add(self, lc: Tensor, blocks: Sequence[Block], n_zero: Integers) -> None:
        """Add the LC of an interval.

        Args:
            lc: LC, float64, finite.
            blocks: the parts of it to add.
            n_zero: number of zeros of each layer in these parts, [L].

        Raises:
            ValueError: for non-finite values; nothing is added then.
        """
        self.begin()
        for where, pieces in blocks:
            self.put(lc[where], lc[where].abs(), pieces)
        self.end(lc, blocks, n_zero)

    def begin(self) -> None:
        """Begin an interval, of which every part is put in turn."""
        self._own = self._zeros(torch.int32), self._zeros(torch.float64)

    def put(self, lc: Tensor, magnitude: Tensor, pieces: Pieces) -> None:
        """Add a part of an interval, no more than stays in the cache.

        Args:
            lc: LC, [n] float64.
            magnitude: |LC|, [n]; its memory is used for other numbers.
            pieces: a layer's row, and its slice of this part, for each layer in it.
        """
        (counts, sums), width = self._own, self._width
        # Only operations on bits: adding integers is four times slower.
        cells = magnitude.view(torch.int64).bitwise_right_shift_(SHIFT)
        cells.clamp_(*self._ends).bitwise_and_(width - 1)
        signs = lc.view(torch.int64) >> _SIGN  # all ones where the sign bit is set
        cells.bitwise_or_(signs.bitwise_and_(width))
        first, last = pieces[0][0], pieces[-1][0] + 1
        if len(pieces) > 1:
            for row, piece in pieces:
                cells[piece].bitwise_or_((row - first) * 2 * width)
        if self._ones is None or len(self._ones) < len(cells):
            self._ones = torch.ones(len(cells), dtype=torch.int32, device=self._device)
        counts[first:last].view(-1).scatter_add_(0, cells, self._ones[: len(cells)])
        add_by_cell(sums[first:last].view(-1), cells, lc)

    def end(self, lc: Tensor, blocks: Sequence[Block], n_zero: Integers) -> None:
        """End an interval whose parts were all put. Arguments and errors: as `add`."""
        counts, sums = self._own
        columns = [key % self._width for key in self._ends]
        low, high = (counts[..., column].cpu().numpy().sum(1) for column in columns)
        # Subnormals and normal values outside the window count at its ends.
        if high.any() or not np.array_equal(low, n_zero):
            self._cover(lc, blocks)
            self.begin()
            for where, pieces in blocks:
                self.put(lc[where], lc[where].abs(), pieces)
            counts, sums = self._own
            self._n_subnormal += _subnormals(lc, blocks, self._n)
        self._counts += counts
        self._sums += sums
        self._n_zero += n_zero
        del self._own
        self._ones = None

    def nonzero(self) -> tuple[Integers, Integers, Integers, Integers, Floats]:
        """The non-empty bins, sorted by layer, sign (-1, 0, 1) and bin.

        Returns:
            layers, signs, bins, counts and sums of |LC|, each [B].
        """
        keys = np.arange(self._lowest + 1, self._lowest + self._width)
        columns = keys % self._width
        counts, sums = self._counts.cpu().numpy(), np.abs(self._sums.cpu().numpy())
        layers, rows, places = np.nonzero(counts[:, :, columns])
        found = [(layers, 1 - 2 * rows, keys[places] - BIAS)]
        numbers = [counts[layers, rows, columns[places]]]
        totals = [sums[layers, rows, columns[places]]]
        below = self._lowest % self._width
        zeros, tiny = np.nonzero(self._n_zero)[0], np.nonzero(self._n_subnormal)
        for layer, row, number in (
            (zeros, None, self._n_zero[zeros]),
            (*tiny, self._n_subnormal[tiny]),
        ):
            signs = np.zeros(len(layer), np.int64) if row is None else 1 - 2 * row
            found.append((layer, signs, np.full(len(layer), UNDERFLOW)))
            numbers.append(number)
            totals.append(np.zeros(len(layer)) if row is None else sums[layer, row, below])
        layers, signs, bins = map(np.concatenate, zip(*found, strict=True))
        order = np.lexsort((bins, signs, layers))
        count, total = np.concatenate(numbers), np.concatenate(totals)
        return layers[order], signs[order], bins[order], count[order], total[order]

    @property
    def _ends(self) -> tuple[int, int]:
        return self._lowest, self._lowest + self._width - 1

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros((self._n, 2, self._width), dtype=dtype, device=self._device)

    def _cover(self, lc: Tensor, blocks: Iterable[Block]) -> None:
        """Widen the window so that it holds the keys of `lc`, and the special ones at its ends."""
        lo, hi = _range(lc, blocks)
        if hi < lo:
            return
        old, before = self._width, self._lowest
        held = self._counts.sum((0, 1)).cpu().numpy()
        keys = np.arange(before + 1, before + old)
        used = keys[held[keys % old] > 0]
        lo, hi = min([lo, *used[:1].tolist()]), max([hi, *used[-1:].tolist()])
        width = max(_LEAST, 1 << (hi - lo + 2).bit_length())
        lowest = max(FIRST_NORMAL - 1, lo - 1 - (width - (hi - lo + 3)) // 2)
        counts, sums = self._counts, self._sums
        self._lowest, self._width = lowest, width
        self._counts, self._sums = self._zeros(torch.int64), self._zeros(torch.float64)
        source, target = (torch.from_numpy(used % w).to(self._device) for w in (old, width))
        for new, one in ((self._counts, counts), (self._sums, sums)):
            new[..., target] = one[..., source]
            new[..., lowest % width] = one[..., before % old]


def add_by_cell(sums: Tensor, cells: Tensor, values: Tensor) -> None:
    """Add values [n] to the sums [m] of their cells [n], always in the same order."""
    if values.device.type in _IN_ORDER:
        sums.scatter_add_(0, cells, values)
        return
    # Atomic additions come in any order: sort, and sum each cell's values.
    cells, order = cells.sort(stable=True)
    edges = torch.arange(len(sums) + 1, device=cells.device)
    lengths = torch.searchsorted(cells, edges).diff()
    sums += torch.segment_reduce(values[order], "sum", lengths=lengths, unsafe=True)


def _range(lc: Tensor, blocks: Iterable[Block]) -> tuple[int, int]:
    """The lowest and the highest key of a normal number; the lowest is higher if there is none."""
    lo, hi = NON_FINITE, 0
    for where, _ in blocks:
        keys = lc[where].abs().view(torch.int64) >> SHIFT
        normal = keys[keys >= FIRST_NORMAL]
        if len(normal):
            low, high = (int(key) for key in normal.aminmax())
            lo, hi = min(lo, low), max(hi, high)
    if hi >= NON_FINITE:
        raise ValueError("a histogram cannot hold NaN or infinite values: leave them out")
    return lo, hi


def _subnormals(lc: Tensor, blocks: Iterable[Block], n_layers: int) -> Integers:
    """Number of subnormal values by layer and sign, [L, 2]."""
    found = np.zeros((n_layers, 2), np.int64)
    for where, pieces in blocks:
        values = lc[where]
        small = (values.abs() < _TINY) & (values != 0)
        if bool(small.any()):
            for row, piece in pieces:
                mine = values[piece][small[piece]]
                found[row] += [int((mine > 0).sum()), int((mine < 0).sum())]
    return found
