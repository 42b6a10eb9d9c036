"""Histograms of |LC| by sign on a logarithmic scale.

A bin of a histogram is one of eight equal parts of an octave. Its edges are (1 + m/8)·2^e, m in
0..7, so the bin of a float64 is its exponent and the first three bits of its mantissa. Binning is
therefore exact, the same on every machine, and a shift instead of a search. Bin 0 is
[1, 1.125), bin 8 is [2, 2.25), bin -1 is [0.9375, 1). Exact zeros and subnormals (below 2^-1022)
share the bin `UNDERFLOW`.

LC < 0 helps (sign -1), LC > 0 hurts (sign +1), LC = 0 is neither (sign 0). Sums are in the units
of the loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_SHIFT = 49  # 52 bits of mantissa, of which three stay in the key
_BIAS = 1023 << 3
_MAGNITUDE = (1 << 14) - 1  # the key without its sign bit
_FIRST_NORMAL = 1 << 3  # the key of 2^-1022; those below are zeros and subnormals
_NON_FINITE = 2047 << 3  # the key of infinity; NaNs are at it or above
_ZERO, _SUBNORMAL, _SPECIAL = 0, 1, 2  # columns of `LayerHistograms` before those of normal bins

UNDERFLOW = -_BIAS
"""The bin of exact zeros and subnormals: [0, 2^-1022)."""
LOWEST = _FIRST_NORMAL - _BIAS
"""The bin after `UNDERFLOW`: it begins at 2^-1022. There are no bins between the two."""
HIGHEST = _NON_FINITE - 1 - _BIAS
"""The last bin, which holds the largest finite float64; its upper edge is infinity."""


def bin_edges(bins: Integers) -> tuple[Floats, Floats]:
    """The exact edges of bins: a magnitude x is in the bin with lower <= x < upper.

    Args:
        bins: bin indices [B], each `UNDERFLOW` or in `LOWEST`..`HIGHEST`.

    Returns:
        lower [B] and upper [B]. `UNDERFLOW` is [0, 2^-1022). The upper edge of `HIGHEST`, 2^1024,
        is not a float64 and is given as infinity, so that `x < upper` is true there as well.

    Raises:
        ValueError: for a number that is not a bin.
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


class LayerHistograms:
    """The histograms of |LC| by sign of many layers.

    Counts are exact; sums are float64, added in the order of the calls. Size: 32 bytes per layer
    and bin, for all bins between the lowest and the highest of all layers.

    Args:
        n_layers: number of layers.
    """

    def __init__(self, n_layers: int) -> None:
        self._lo = _NON_FINITE  # key of the first bin of the arrays, after zeros and subnormals
        self._counts = np.zeros((n_layers, 2, _SPECIAL), np.int64)
        self._sums = np.zeros((n_layers, 2, _SPECIAL))

    def add(self, lc: Floats, layers: Integers, starts: Integers) -> None:
        """Add the LC of elements that are ordered by layer.

        Args:
            lc: LC [n], float64, finite; few enough to fit into the cache.
            layers: the number of the layer of each stretch of elements [m]; no layer twice.
            starts: the start of each stretch [m], ascending from 0.

        Raises:
            ValueError: for non-finite values; then nothing is added.
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
        local = size <= 4 * len(lc)  # these are summed in their own table first: more accurate
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
        """Replace keys by columns of the arrays, in place; the arrays are widened as needed.

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
        """Widen the range of bins to include the keys [lo, hi), by eight octaves at a time."""
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
