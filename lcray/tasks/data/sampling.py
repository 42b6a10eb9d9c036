"""Seeded samples of a split, drawn once for a whole analysis, and their random replicate groups.

Legend: N samples in the data set, n of them drawn, R replicates.

A simple random sample without replacement, so that its mean is an unbiased estimate of that of
the data set. It is divided at random into R replicates of equal size, to within one. Each of them
is such a sample itself, so how far their results lie apart says how far the estimate may be off,
for sums over any window as well.

Source: random groups, in Wolter, *Introduction to Variance Estimation* (2007), chapter 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Replicates of a sample that has so many samples, at least; 19 degrees of freedom.
MOST_REPLICATES = 20


@dataclass(frozen=True)
class Draw:
    """The samples of a split that were drawn.

    Attributes:
        population: samples in the data set, N.
        numbers: those that were drawn, ascending, [n] int64.
        replicates: the replicate of each, from 0, [n] int64.
        n_replicates: R.
    """

    population: int
    numbers: NDArray[Any]
    replicates: NDArray[Any]
    n_replicates: int

    def parts(self, places: Sequence[int] | NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Each replicate that has samples among those at `places` of `numbers`, and which."""
        among = np.asarray(places)
        for replicate in range(self.n_replicates):
            own = among[self.replicates[among] == replicate]
            if len(own):
                yield replicate, own


def draw(name: str, population: int, samples: int | None, seed: int) -> Draw | None:
    """`samples` of the split called `name`; None where all of them are to be taken.

    Args:
        name: of the split; splits of one size and seed have draws that know nothing of each other.
        population: samples in the data set.
        samples: to draw; None for all.
        seed: of the draw.
    """
    if samples is None or samples >= population:
        return None
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), samples])
    drawn = rng.choice(population, samples, replace=False)  # in random order
    order = np.argsort(drawn)
    count = min(MOST_REPLICATES, samples)
    return Draw(population, drawn[order], (np.arange(samples) % count)[order], count)
