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

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SHIFT = 49  # 52 bits of mantissa, of which three stay in the key
BIAS = 1023 << 3
FIRST_NORMAL = 1 << 3  # the key of 2^-1022; those below are zeros and subnormals
NON_FINITE = 2047 << 3  # the key of infinity; NaNs are at it or above

UNDERFLOW = -BIAS
"""The bin of exact zeros and subnormals: [0, 2^-1022)."""
LOWEST = FIRST_NORMAL - BIAS
"""The bin after `UNDERFLOW`: it begins at 2^-1022. There are no bins between the two."""
HIGHEST = NON_FINITE - 1 - BIAS
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
    lower = ((bins + BIAS) << SHIFT).view(np.float64)
    upper = (np.where(underflow, LOWEST, bins + 1) + BIAS << SHIFT).view(np.float64)
    return lower, upper
