"""Sign flips and runs of equal sign.

Legend: T intervals, N elements. Signs are −1, 0, +1; an unknown value has sign 0.
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

    An element flips at interval t if the product of its signs at t − 1 and t is −1.

    Args:
        values: [T, N].

    Returns:
        The number of elements that flip at each interval, and of those that could (neither sign is
        0), [T]; both are 0 at the first interval.
    """
    product = np.zeros(values.shape, np.int8)
    known = signs(values)
    product[1:] = known[1:] * known[:-1]
    return np.count_nonzero(product < 0, axis=1), np.count_nonzero(product, axis=1)


def net_share(values: Floats) -> float:
    """Net progress compared with the distance travelled: Σ_n |Σ_t x| / Σ_n Σ_t |x|.

    It is 1 if every element goes one way, about 1/√T for independent Gaussian steps, and NaN if
    nothing moves.

    Args:
        values: [T, N]; NaN counts as no step.
    """
    known = np.nan_to_num(values, nan=0.0)
    distance = np.abs(known).sum()
    return float(np.abs(known.sum(axis=0)).sum() / distance) if distance else float("nan")


@dataclass(frozen=True)
class RunLengths:
    """Numbers of runs of equal sign, by length.

    Attributes:
        length: of runs, in intervals, ascending, [n].
        complete: number of runs of this length between two flips, [n].
        cut: number of runs of this length that touch the beginning, the end or a sign of 0, and
            may be longer, [n].
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
