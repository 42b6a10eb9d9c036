"""The circular block bootstrap over iterations, and the length of its blocks.

Values of neighbouring iterations are dependent. So iterations are drawn in blocks of consecutive
ones, where the first iteration follows the last (Politis and Romano 1992, in *Exploring the Limits
of Bootstrap*, 263). Every iteration is then drawn once on average, and sums are centred at those of
the data. Blocks that stop at the ends would draw the first and last iterations, at which training
does most, less often. The length follows Politis and White (2004, Econometric Reviews 23:53;
corrected by Patton, Politis and White 2009, ibid. 28:372). For the sample mean, with R(k) the
autocovariances, λ the flat-top lag window and M twice the lag after which correlations are
negligible, it is

    b = (2 G² / D)^(1/3) n^(1/3),   G = Σ λ(k/M) |k| R(k),   D = 4/3 (Σ λ(k/M) R(k))²

Blocks of length b estimate the variance of a mean too low, by a relative bias of order 1/b, and
they count a trend within a window as variance. All columns share the same draws, which keeps the
dependence between layers.

Legend: T iterations, K columns, B replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: With fewer iterations no error is given: blocks of so few say nothing.
FEWEST = 8
REPLICATES = 1000
#: The columns of `Bootstrap.spread`, with their descriptions.
RESAMPLED = {
    "resampled_se": "standard deviation of the sum over resamplings of the window's intervals",
    "resampled_low": "lower end of its resampled interval: other stretches of the same process",
    "resampled_high": "upper end of its resampled interval",
}
_CHUNK = 1 << 21  # weights of a chunk of replicates: 16 MB


@dataclass(frozen=True)
class Bootstrap:
    """The way in which errors are estimated.

    Attributes:
        seed: of the draws.
        replicates: B.
        level: of the intervals.
        length: of the blocks; None for the length by Politis and White.
    """

    seed: int = 0
    replicates: int = REPLICATES
    level: float = 0.95
    length: int | None = None

    def sums(self, values: Floats, length: int | None = None) -> Floats | None:
        """Sums over iterations in every replicate, [B, K].

        Args:
            values: [T, K], one row per iteration, in order.
            length: of the blocks; None for that of `block_length` over all columns.

        Returns:
            The sums, the same for the same seed; None if T is below `FEWEST`.
        """
        n = len(values)
        if n < FEWEST:
            return None
        length = length or self.length or block_length(values)
        rng = np.random.default_rng(self.seed)
        found = [w @ values for w in multiplicities(n, length, self.replicates, rng)]
        return np.concatenate(found)

    def spread(self, values: Floats) -> dict[str, Floats]:
        """Columns `resampled_se`, `resampled_low` and `resampled_high` of sums over iterations.

        They say how much each sum would vary if these iterations were other stretches of the same
        process. They are not the error of the sum itself, which is as exact as its terms.

        Args:
            values: [T, K], one row per iteration, in order.

        Returns:
            [K] each; no columns if T is below `FEWEST`.
        """
        drawn = self.sums(values)
        return {} if drawn is None else dict(zip(RESAMPLED, self.interval(drawn), strict=True))

    def interval(self, replicates: Floats) -> tuple[Floats, Floats, Floats]:
        """Standard error and percentile interval of a statistic from its replicates [B, ...].

        Replicates without the statistic are left out; NaN if fewer than two have it, as for a ratio
        whose denominator is always 0.
        """
        tail = (1 - self.level) / 2
        some = np.isfinite(replicates).sum(axis=0) > 1
        known = replicates[:, some]
        found = np.full((3, *some.shape), np.nan)
        found[0, some] = np.nanstd(known, axis=0, ddof=1)
        found[1:, some] = np.nanquantile(known, (tail, 1 - tail), axis=0)
        return found[0], found[1], found[2]


def multiplicities(
    n: int, length: int, replicates: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """How often each of n iterations is drawn, chunk by chunk, [B in all, n]; rows sum to n.

    It is once on average: blocks begin anywhere, and the first iteration follows the last.
    """
    length = max(1, min(length, n))
    n_blocks = -(-n // length)
    last = n - (n_blocks - 1) * length  # the last block is cut so that n are drawn in all
    lengths = np.full(n_blocks, length)
    lengths[-1] = last
    step = max(1, _CHUNK // (2 * n))
    for done in range(0, replicates, step):
        rows = min(step, replicates - done)
        starts = rng.integers(0, n, (rows, n_blocks))
        edges = np.zeros((rows, 2 * n))
        row = np.repeat(np.arange(rows), n_blocks)
        np.add.at(edges, (row, starts.ravel()), 1.0)
        np.add.at(edges, (row, (starts + lengths).ravel()), -1.0)
        times = np.cumsum(edges, axis=1)
        yield times[:, :n] + times[:, n:]


def block_length(values: Floats) -> int:
    """The length by Politis and White for a mean of `values` [T, K]: the longest of all columns.

    It is at most min(3 √T, T/3), as its authors advise, and 1 if all columns are constant.
    """
    n = len(values)
    centred = values - values.mean(axis=0)
    covariances = _autocovariances(centred)
    moving = covariances[0] > 1e-24 * (values**2).mean(axis=0)
    longest = max(1, math.ceil(min(3 * math.sqrt(n), n / 3)))
    lengths = [_rule(covariances[:, k], n) for k in np.flatnonzero(moving)]
    return min(longest, max(1, math.ceil(max(lengths, default=1.0))))


def _autocovariances(centred: Floats) -> Floats:
    """R(k), k = 0 … T − 1, of each column: [T, K]."""
    n = len(centred)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, size, axis=0)
    return np.asarray(np.fft.irfft(np.abs(spectrum) ** 2, size, axis=0)[:n] / n)


def _rule(covariance: Floats, n: int) -> float:
    """The length b for one column."""
    window = max(5, math.ceil(math.sqrt(math.log10(n))))
    longest = min(math.ceil(math.sqrt(n)) + window, n - 1)
    bound = 2 * math.sqrt(math.log10(n) / n)
    small = np.abs(covariance[1 : longest + 1] / covariance[0]) < bound
    # the first lag after which `window` correlations in a row are negligible
    runs = np.convolve(small, np.ones(window), "valid") == window
    if runs.any():
        lag = int(np.argmax(runs))
    else:
        lag = int(np.flatnonzero(~small).max()) + 1 if (~small).any() else 0
    reach = max(1, min(2 * lag, longest))
    k = np.arange(-reach, reach + 1)
    weight = np.clip(2 * (1 - np.abs(k) / reach), 0, 1) * covariance[np.abs(k)]
    spread = float(weight.sum()) ** 2
    if spread <= 0:
        return 1.0
    slope = float((np.abs(k) * weight).sum())
    return float((2 * slope**2 / (4 / 3 * spread)) ** (1 / 3) * n ** (1 / 3))
