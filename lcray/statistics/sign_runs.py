"""Sign flips and runs of equal sign.

Legend: T intervals, N elements. Signs are −1, 0, +1; what is not known has sign 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def signs(values: Floats) -> NDArray[np.int8]:
    """The signs of `values`, 0 for NaN."""
    return np.sign(np.nan_to_num(values, nan=0.0)).astype(np.int8)


def flips(values: Floats) -> tuple[Counts, Counts]:
    """Sign flips between neighbouring intervals.

    A flip at interval t: the signs at t − 1 and t multiply to −1.

    Args:
        values: [T, N].

    Returns:
        The elements that flip at each interval, and those that could (neither sign is 0), [T];
        both 0 at the first.
    """
    product = np.zeros(values.shape, np.int8)
    known = signs(values)
    product[1:] = known[1:] * known[:-1]
    return np.count_nonzero(product < 0, axis=1), np.count_nonzero(product, axis=1)


def net_share(values: Floats) -> float:
    """Net progress against distance travelled: Σ_n |Σ_t x| / Σ_n Σ_t |x|.

    1 where every element goes one way, about 1/√T for independent Gaussian steps, NaN where
    nothing moves.

    Args:
        values: [T, N]; NaN counts as no step.
    """
    known = np.nan_to_num(values, nan=0.0)
    distance = np.abs(known).sum()
    return float(np.abs(known.sum(axis=0)).sum() / distance) if distance else float("nan")


@dataclass(frozen=True)
class RunLengths:
    """How long signs last.

    Attributes:
        length: of runs, in intervals, ascending, [n].
        complete: runs of that length between two flips, [n].
        cut: runs of that length that touch the beginning, the end or a sign of 0: they may be
            longer than what is seen, [n].
    """

    length: Counts
    complete: Counts
    cut: Counts


def run_lengths(values: Floats) -> RunLengths:
    """Lengths of the maximal stretches of one sign, over all elements.

    Args:
        values: [T, N].
    """
    known = np.pad(signs(values), ((1, 1), (0, 0))).T.reshape(-1)  # each element between zeros
    edges = np.flatnonzero(np.diff(known)) + 1
    if len(edges) < 2:
        return RunLengths(*(np.zeros(0, np.int64) for _ in range(3)))
    starts, ends = edges[:-1], edges[1:]
    value = known[starts]
    starts, ends, value = (part[value != 0] for part in (starts, ends, value))
    between = (known[starts - 1] == -value) & (known[ends] == -value)
    complete = np.bincount((ends - starts)[between])
    cut = np.bincount((ends - starts)[~between], minlength=len(complete))
    complete = np.pad(complete, (0, len(cut) - len(complete)))
    length = np.flatnonzero(complete + cut)
    return RunLengths(length, complete[length], cut[length])
