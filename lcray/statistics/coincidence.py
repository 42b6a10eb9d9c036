"""Peaks of learning, and whether several series have them at the same intervals.

Legend: T intervals, S series, B blocks of intervals, R permutations.

The null hypothesis is that the peaks of each series are independent of the other series, at a rate
that may change with time. So the peaks of every series are permuted independently, but only within
blocks of consecutive intervals. Learning slows down, so peaks are dense at the beginning of every
series; permutations of the whole run, or circular shifts, would count this shared trend as
synchrony.

Source: [LCA] Lan, Liu, Zhou, Yosinski, NeurIPS 2019 (arXiv 1909.01440), section 4.4 for the peaks;
permutations within blocks: Good, *Permutation, Parametric and Bootstrap Tests of Hypotheses*, 2005.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]


def peaks(
    lc: Floats, *, count: int = 20, prominence: float | None = None, distance: int = 1
) -> Flags:
    """The intervals at which a series learned most.

    A peak of learning is a local minimum of LC below 0: −LC is larger than at both neighbours (a
    plateau counts once, in its middle). The `count` deepest peaks are kept.

    Args:
        lc: LC interval by interval, in units of the loss, [T, S]. NaN counts as no learning.
        count: the most peaks of a series.
        prominence: the least height of a peak above its neighbouring saddles, in standard
            deviations of its series; None for no condition.
        distance: the least number of intervals between two peaks of a series; of peaks that are
            closer, the deeper one is kept.

    Returns:
        Whether there is a peak, [T, S].
    """
    from scipy.signal import find_peaks  # slow to import

    found = np.zeros(lc.shape, bool)
    for number, column in enumerate(lc.T):
        depth = np.where(np.isnan(column), -np.inf, -column)
        tall = depth[np.isfinite(depth)]
        least = None if prominence is None or not len(tall) else prominence * tall.std()
        at, _ = find_peaks(
            depth, height=np.nextafter(0.0, 1.0), distance=distance, prominence=least
        )
        deepest = at[np.argsort(-depth[at], kind="stable")[:count]]
        found[deepest, number] = True
    return found


def default_block(n_intervals: int) -> int:
    """A twentieth of the intervals, but 10 to 50: short compared with changes of the rate of peaks.

    If the rates fall to 1/e within as few as three blocks of 50, tests of a pair at the 5 % level
    reject a true null hypothesis in 3 to 6 % of cases; with longer blocks, the trend counts more.
    """
    return min(50, max(10, round(n_intervals / 20)))


def block_bounds(n_intervals: int, block: int | None) -> NDArray[np.int64]:
    """The bounds of blocks of about `block` intervals, [B + 1]; lengths differ by at most 1."""
    block = default_block(n_intervals) if block is None else block
    n_blocks = max(1, round(n_intervals / block))
    return np.round(np.linspace(0, n_intervals, n_blocks + 1)).astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """Coincidences of pairs of series.

    Attributes:
        first: numbers of the first series of each pair, [n].
        second: of the second, [n].
        observed: intervals at which both have a peak, [n].
        expected: their mean under the null, [n].
        p_value: P(as many or more) under the null, exact, [n].
        null: P(exactly k) under the null, [n, K + 1].
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    observed: NDArray[np.int64]
    expected: Floats
    p_value: Floats
    null: Floats


def pairwise_coincidences(flags: Flags, *, block: int | None = None) -> Pairs:
    """Coincidences of every pair of series, tested one-sidedly against permutation in blocks.

    If a block b of n_b intervals has a_b and c_b peaks, which are permuted independently, the
    number of its coincidences is hypergeometric(n_b, a_b, c_b). The number over the run is the sum
    over the blocks, and its distribution their convolution: nothing is drawn.

    Args:
        flags: the peaks, [T, S].
        block: about the number of intervals per block; None for `default_block`.
    """
    first, second = np.triu_indices(flags.shape[1], 1)
    observed = np.count_nonzero(flags[:, first] & flags[:, second], axis=0)
    bounds = block_bounds(len(flags), block)
    counts = np.add.reduceat(flags.astype(np.int64), bounds[:-1], axis=0) if len(flags) else None
    null = np.ones((len(first), 1))
    expected = np.zeros(len(first))
    for number, size in enumerate(np.diff(bounds) if counts is not None else ()):
        a, c = counts[number][first], counts[number][second]  # type: ignore[index]
        expected += a * c / size
        null = _convolved(null, _block_null(int(size), a, c))
    tail = np.cumsum(null[:, ::-1], axis=1)[:, ::-1]
    p_value = np.minimum(1.0, np.take_along_axis(tail, observed[:, None], axis=1)[:, 0])
    return Pairs(first, second, observed, expected, p_value, null)


def _block_null(size: int, a: NDArray[np.int64], c: NDArray[np.int64]) -> Floats:
    """P(k coincidences) of each pair in one block, [n, K + 1]."""
    most = int(np.minimum(a, c).max(initial=0))
    if most == 0:
        return np.ones((len(a), 1))
    k = np.arange(most + 1)
    shapes, where = np.unique(np.stack([a, c], axis=1), axis=0, return_inverse=True)
    from scipy.stats import hypergeom  # slow to import

    found: Floats = np.asarray(hypergeom.pmf(k, size, shapes[:, :1], shapes[:, 1:]))
    return found[where.reshape(-1)]


def _convolved(left: Floats, right: Floats) -> Floats:
    """Row by row."""
    out = np.zeros((len(left), left.shape[1] + right.shape[1] - 1))
    for k in range(right.shape[1]):
        out[:, k : k + left.shape[1]] += left * right[:, k : k + 1]
    return out


@dataclass(frozen=True)
class Synchrony:
    """Coincidences of all series together.

    Attributes:
        observed: pairs of series with a peak at the same interval, over all intervals.
        expected: its mean under the null.
        p_value: P(as many or more) under the null, by R permutations: (1 + #) / (1 + R).
        null: the number in each permutation, [R].
    """

    observed: int
    expected: float
    p_value: float
    null: NDArray[np.int64]


def total_coincidences(
    flags: Flags, *, block: int | None = None, permutations: int = 999, seed: int = 0
) -> Synchrony:
    """Whether the series peak together more often than by chance, one-sided.

    The statistic is Σ_t n_t (n_t − 1)/2, with n_t the series that peak at interval t: the sum of
    the coincidences of all pairs.

    Args:
        flags: the peaks, [T, S].
        block: about the number of intervals per block; None for `default_block`.
        permutations: R.
        seed: of the permutations.
    """
    random = np.random.default_rng(seed)
    bounds = block_bounds(len(flags), block)
    null = np.zeros(permutations, np.int64)
    expected = 0.0
    for start, end in pairwise(bounds.tolist()):
        part = flags[start:end]
        counts = part.sum(axis=0)
        if (counts > 0).sum() < 2:
            continue
        expected += float(counts.sum() ** 2 - (counts**2).sum()) / 2 / (end - start)
        moving = np.ascontiguousarray(part[:, counts > 0].T)
        many = np.broadcast_to(moving, (permutations, *moving.shape))
        null += _pairs(random.permuted(many, axis=2).sum(axis=1))
    observed = int(_pairs(flags.sum(axis=1)[None])[0])
    p_value = (1 + int(np.count_nonzero(null >= observed))) / (1 + permutations)
    return Synchrony(observed, expected, p_value, null)


def _pairs(n: NDArray[np.int64]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = (n * (n - 1) // 2).sum(axis=1)
    return found
