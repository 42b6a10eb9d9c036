"""Mergeable summaries of loss change allocation (LC): counts by sign and log-scale histograms.

A bin of a histogram is one of eight equal parts of an octave: its edges are (1 + m/8)·2^e, m in
0..7, so the bin of a float64 is its exponent and the first three bits of its mantissa. That
makes binning exact, the same on every machine, and a shift instead of a search. Bin 0 is
[1, 1.125), bin 8 is [2, 2.25), bin -1 is [0.9375, 1). Exact zeros and subnormals (below 2^-1022)
share the bin `UNDERFLOW`.

LC < 0 helps (sign -1), LC > 0 hurts (sign +1), LC = 0 is neither (sign 0). Sums are in the units
of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_SHIFT = 49  # 52 bits of mantissa, of which three stay in the key
_BIAS = 1023 << 3
_MAGNITUDE = (1 << 14) - 1  # the key without its sign bit
_FIRST_NORMAL = 1 << 3  # the key of 2^-1022; those below are zeros and subnormals
_NON_FINITE = 2047 << 3  # the key of infinity; NaNs are at it or above
_CHUNK = 1 << 16  # elements: the values, their keys and the two tables stay in the cache
_ZERO, _SUBNORMAL, _SPECIAL = 0, 1, 2  # columns of `LayerHistograms` before those of normal bins

UNDERFLOW = -_BIAS
"""The bin of exact zeros and subnormals: [0, 2^-1022)."""
LOWEST = _FIRST_NORMAL - _BIAS
"""The bin after `UNDERFLOW`: it begins at 2^-1022. There are no bins between the two."""
HIGHEST = _NON_FINITE - 1 - _BIAS
"""The last bin, which holds the largest finite float64; its upper edge is infinity."""


@dataclass(frozen=True)
class Counts:
    """How many elements help (LC < 0), hurt (LC > 0) and do neither (LC = 0)."""

    n_helping: int = 0
    n_hurting: int = 0
    n_zero: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.n_helping + other.n_helping,
            self.n_hurting + other.n_hurting,
            self.n_zero + other.n_zero,
        )


def bin_edges(bins: Integers) -> tuple[Floats, Floats]:
    """The exact edges of bins: a magnitude x is in its bin where lower <= x < upper.

    Args:
        bins: bin indices [B], each `UNDERFLOW` or in `LOWEST`..`HIGHEST`.

    Returns:
        lower [B] and upper [B]. `UNDERFLOW` is [0, 2^-1022); the upper edge of `HIGHEST`, 2^1024,
        is no float64 and is given as infinity, so that `x < upper` holds there too.

    Raises:
        ValueError: for an index that is no bin.
    """
    bins = np.asarray(bins, dtype=np.int64)
    underflow = bins == UNDERFLOW
    valid = underflow | ((bins >= LOWEST) & (bins <= HIGHEST))
    if not valid.all():
        wrong = int(bins[~valid][0])
        raise ValueError(
            f"{wrong} is no histogram bin: use {UNDERFLOW} (underflow) or {LOWEST}..{HIGHEST}"
        )
    lower = ((bins + _BIAS) << _SHIFT).view(np.float64)
    upper = (np.where(underflow, LOWEST, bins + 1) + _BIAS << _SHIFT).view(np.float64)
    return lower, upper


class LogHistogram:
    """Counts and sums of magnitudes (>= 0) by logarithmic bin; small and mergeable.

    Counts are exact; sums are float64 (infinity where they pass it), added in the order of the
    calls, so that the same calls give the same bits. Size: 16 bytes a bin between the lowest
    and the highest non-empty one.
    """

    def __init__(self) -> None:
        self._lo = 0  # bin of the first entry of the arrays
        self._counts = np.zeros(0, np.int64)
        self._sums = np.zeros(0, np.float64)
        # apart from the arrays, which would otherwise span all bins because of one zero
        self._underflow_count = 0
        self._underflow_sum = 0.0

    @property
    def total(self) -> int:
        """The number of values added."""
        return int(self._counts.sum()) + self._underflow_count

    def add(self, values: Floats | torch.Tensor) -> None:
        """Add magnitudes.

        Args:
            values: float64 magnitudes [n], finite and >= 0.

        Raises:
            ValueError: for negative or non-finite values, or another dtype or shape; nothing is
                added then.
        """
        staged = SignedHistograms()
        if staged.add(values).n_helping:
            raise ValueError("a histogram of magnitudes got negative values: pass absolute values")
        self.merge(staged.by_sign[1])
        self.merge(staged.by_sign[0])

    def add_bins(self, bins: Integers, counts: Integers, sums: Floats) -> None:
        """Add what is already binned, e.g. rows of a table: the inverse of `nonzero`.

        Args:
            bins: bin indices [B], in any order; a repeated bin adds up.
            counts: number of values a bin [B].
            sums: sum of the values of a bin [B].

        Raises:
            ValueError: for an index that is no bin; nothing is added then.
        """
        bins = np.asarray(bins, dtype=np.int64)
        bin_edges(bins)
        under = bins == UNDERFLOW
        self._add_underflow(int(counts[under].sum()), float(sums[under].sum()))
        normal = ~under
        if normal.any():
            bins = bins[normal]
            lo = int(bins.min())
            dense_counts = np.zeros(int(bins.max()) - lo + 1, np.int64)
            dense_sums = np.zeros(len(dense_counts))
            np.add.at(dense_counts, bins - lo, counts[normal])
            np.add.at(dense_sums, bins - lo, sums[normal])
            self._add_dense(lo, dense_counts, dense_sums)

    def merge(self, other: LogHistogram) -> None:
        """Add everything that `other` holds; `other` stays as it is."""
        self._add_underflow(other._underflow_count, other._underflow_sum)
        self._add_dense(other._lo, other._counts, other._sums)

    def nonzero(self) -> tuple[Integers, Integers, Floats]:
        """The non-empty bins in ascending order: indices [B], counts [B], sums [B]."""
        filled = np.flatnonzero(self._counts)
        bins, counts, sums = filled + self._lo, self._counts[filled], self._sums[filled]
        if self._underflow_count:
            bins = np.concatenate(([UNDERFLOW], bins))
            counts = np.concatenate(([self._underflow_count], counts))
            sums = np.concatenate(([self._underflow_sum], sums))
        return bins, counts, sums

    def _add_underflow(self, count: int, total: float) -> None:
        self._underflow_count += count
        self._underflow_sum += total

    def _add_dense(self, lo: int, counts: Integers, sums: Floats) -> None:
        """Add neighbouring bins from `lo` on; empty ones at the ends do not widen the range."""
        filled = np.flatnonzero(counts)
        if not len(filled):
            return
        first, last = int(filled[0]), int(filled[-1]) + 1
        self._cover(lo + first, lo + last)
        here = slice(lo + first - self._lo, lo + last - self._lo)
        self._counts[here] += counts[first:last]
        with np.errstate(over="ignore"):
            self._sums[here] += sums[first:last]

    def _cover(self, lo: int, hi: int) -> None:
        """Widen the range of bins so that it holds [lo, hi)."""
        if not len(self._counts):
            self._lo = lo
        below = max(self._lo - lo, 0)
        above = max(hi - self._lo - len(self._counts), 0)
        if below or above:
            self._counts = np.pad(self._counts, (below, above))
            self._sums = np.pad(self._sums, (below, above))
            self._lo -= below


class SignedHistograms:
    """One `LogHistogram` of |LC| a sign: -1 helps, +1 hurts, 0 exact zeros; mergeable."""

    def __init__(self) -> None:
        self.by_sign = {-1: LogHistogram(), 0: LogHistogram(), 1: LogHistogram()}

    def add(self, lc: Floats | torch.Tensor) -> Counts:
        """Add the LC of the elements of one layer, each magnitude to the histogram of its sign.

        Args:
            lc: LC [n], float64, finite, on the CPU; units of the loss.

        Returns:
            The counts of these elements alone.

        Raises:
            ValueError: for non-finite values, or another dtype or shape; nothing is added then.
        """
        values = _as_array(lc)
        if len(values) <= _CHUNK:
            return self._add_chunk(values)
        staged = SignedHistograms()  # so that a NaN in a late chunk leaves nothing behind
        counts = Counts()
        for start in range(0, len(values), _CHUNK):
            counts += staged._add_chunk(values[start : start + _CHUNK])
        self.merge(staged)
        return counts

    def merge(self, other: SignedHistograms) -> None:
        """Add everything that `other` holds; `other` stays as it is."""
        for sign, histogram in other.by_sign.items():
            self.by_sign[sign].merge(histogram)

    def _add_chunk(self, chunk: Floats) -> Counts:
        if not len(chunk):
            return Counts()
        table = _tabulate(chunk)
        for row, sign in enumerate((1, -1)):
            histogram = self.by_sign[sign]
            histogram._add_dense(table.lo, table.counts[row], sign * table.sums[row])
            histogram._add_underflow(table.n_subnormal[row], sign * table.subnormal_sums[row])
        self.by_sign[0]._add_underflow(table.n_zero, 0.0)
        n_hurting = int(table.counts[0].sum()) + table.n_subnormal[0]
        return Counts(len(chunk) - n_hurting - table.n_zero, n_hurting, table.n_zero)


class LayerHistograms:
    """The histograms of |LC| by sign of many layers, in the bins of `SignedHistograms`.

    Counts are exact; sums are float64, added in the order of the calls. Size: 32 bytes a layer
    and bin between the lowest and the highest of all layers.

    Args:
        n_layers: how many.
    """

    def __init__(self, n_layers: int) -> None:
        self._lo = _NON_FINITE  # key of the first bin of the arrays, after zeros and subnormals
        self._counts = np.zeros((n_layers, 2, _SPECIAL), np.int64)
        self._sums = np.zeros((n_layers, 2, _SPECIAL))

    def add(self, lc: Floats, layers: Integers, starts: Integers) -> None:
        """Add the LC of elements that lie layer by layer.

        Args:
            lc: LC [n], float64, finite; no more than stays in the cache.
            layers: the number of the layer of each stretch [m]; no layer twice.
            starts: where each stretch starts [m], ascending from 0.

        Raises:
            ValueError: for non-finite values; nothing is added then.
        """
        bits = lc.view(np.int64)
        cells = bits >> _SHIFT
        cells &= _MAGNITUDE
        has_special = self._to_columns(cells)
        width = self._counts.shape[2]
        signs = bits >> 63  # all ones where the sign bit is set
        signs &= width
        cells += signs
        if has_special:
            cells[lc == 0] = _ZERO
        shape = len(layers), 2, width
        size = len(layers) * 2 * width
        local = size <= 4 * len(lc)  # then summed in a table of their own first, more accurately
        if len(layers) > 1 or not local:
            rows = np.arange(len(layers)) if local else layers
            cells += np.repeat(rows * (2 * width), np.diff(starts, append=len(lc)))
        with np.errstate(over="ignore"):
            if local:
                self._counts[layers] += np.bincount(cells, minlength=size).reshape(shape)
                self._sums[layers] += np.bincount(cells, lc, minlength=size).reshape(shape)
            else:
                np.add.at(self._counts.reshape(-1), cells, 1)
                np.add.at(self._sums.reshape(-1), cells, lc)

    def nonzero(self) -> tuple[Integers, Integers, Integers, Integers, Floats]:
        """The non-empty bins, sorted by layer, sign (-1, 0, 1) and bin.

        Returns:
            layers, signs, bins, counts and sums of |LC|, each [B].
        """
        layers, rows, columns = filled = np.nonzero(self._counts)
        signs = np.where(columns == _ZERO, 0, 1 - 2 * rows)
        bins = np.where(columns < _SPECIAL, UNDERFLOW, columns + (self._lo - _SPECIAL - _BIAS))
        order = np.lexsort((bins, signs, layers))
        counts, sums = self._counts[filled], np.abs(self._sums[filled])
        return layers[order], signs[order], bins[order], counts[order], sums[order]

    def _to_columns(self, keys: Integers) -> bool:
        """Make columns of the arrays of the keys, in place; the arrays are widened as needed.

        Returns whether there are zeros or subnormals, which all become `_SUBNORMAL`.
        """
        lo, hi = int(keys.min()), int(keys.max())
        if hi >= _NON_FINITE:
            raise ValueError("a histogram cannot hold NaN or infinite values: leave them out")
        has_special = lo < _FIRST_NORMAL
        if hi >= _FIRST_NORMAL:
            if has_special:
                lo = int(keys.min(where=keys >= _FIRST_NORMAL, initial=hi))
            self._cover(lo, hi + 1)
        keys -= self._lo - _SPECIAL
        if has_special:
            np.maximum(keys, _SUBNORMAL, out=keys)
        return has_special

    def _cover(self, lo: int, hi: int) -> None:
        """Widen the range of bins so that it holds the keys [lo, hi), by eight octaves at once."""
        lo, hi = max(lo & -64, _FIRST_NORMAL), hi + 63 & -64
        held = self._counts.shape[2] - _SPECIAL
        if not held:
            self._lo = lo
        below, above = max(self._lo - lo, 0), max(hi - self._lo - held, 0)
        if below or above:
            self._counts = _widened(self._counts, below, above)
            self._sums = _widened(self._sums, below, above)
            self._lo -= below


def _widened(array: NDArray[Any], below: int, above: int) -> NDArray[Any]:
    """With empty columns below and above those of the normal bins, [layers, 2, columns]."""
    layers, signs, columns = array.shape
    wide = np.zeros((layers, signs, columns + below + above), array.dtype)
    wide[..., :_SPECIAL] = array[..., :_SPECIAL]
    wide[..., _SPECIAL + below : columns + below] = array[..., _SPECIAL:]
    return wide


class _Table(NamedTuple):
    """One chunk by sign (row 0 positive, row 1 negative) and bin; sums keep their sign."""

    lo: int
    counts: Integers  # [2, bins from lo on]
    sums: Floats  # [2, bins from lo on]
    n_subnormal: tuple[int, int] = (0, 0)
    subnormal_sums: tuple[float, float] = (0.0, 0.0)
    n_zero: int = 0


def _as_array(values: Floats | torch.Tensor) -> Floats:
    array = values if isinstance(values, np.ndarray) else values.detach().numpy()
    if array.dtype != np.float64 or array.ndim != 1:
        raise ValueError(
            f"a histogram needs float64 values [n], not {array.dtype} of shape {array.shape}: "
            "convert and flatten them"
        )
    return array


def _tabulate(chunk: Floats) -> _Table:
    """Bin one chunk: sign, exponent and three bits of mantissa are one shift away."""
    signs = chunk.view(np.int64) >> _SHIFT
    keys = signs & _MAGNITUDE
    lo, hi = int(keys.min()), int(keys.max())
    if hi >= _NON_FINITE:
        raise ValueError("a histogram cannot hold NaN or infinite values: leave the interval out")
    width = hi - lo + 1
    # in place: keys of negative values follow those of positive ones
    signs >>= 14
    signs &= width
    keys -= lo
    keys += signs
    counts: Integers = np.bincount(keys, minlength=2 * width).reshape(2, width)
    totals = np.bincount(keys, weights=chunk, minlength=2 * width).reshape(2, width)
    sums = np.asarray(totals, dtype=np.float64)
    if lo >= _FIRST_NORMAL:
        return _Table(lo - _BIAS, counts, sums)
    return _split_underflow(chunk, lo, counts, sums)


def _split_underflow(chunk: Floats, lo: int, counts: Integers, sums: Floats) -> _Table:
    """Tell exact zeros (of either sign) from subnormals, and both from the normal bins."""
    bits = chunk.view(np.int64)
    negative_zero = np.iinfo(np.int64).min
    zeros = (
        len(bits) - int(np.count_nonzero(bits)),
        int(np.count_nonzero(bits == negative_zero)),
    )
    cut = _FIRST_NORMAL - lo
    under, totals = counts[:, :cut].sum(axis=1), sums[:, :cut].sum(axis=1)
    return _Table(
        LOWEST,
        counts[:, cut:],
        sums[:, cut:],
        (int(under[0]) - zeros[0], int(under[1]) - zeros[1]),
        (float(totals[0]), float(totals[1])),
        sum(zeros),
    )
