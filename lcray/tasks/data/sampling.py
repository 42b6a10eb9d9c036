"""Seeded samples of a split, drawn once for a whole analysis, and divided into replicates.

Legend: N samples in the data set, n of them drawn, R replicates.

A simple random sample without replacement is taken, so its mean is an unbiased estimate of the mean
of the data set. It is divided at random into R replicates of equal size, up to one sample. Each
replicate is such a sample itself, so the spread of the replicates' results says how accurate the
estimate is. This also holds for sums over any window.

Source: random groups, in Wolter, *Introduction to Variance Estimation* (2007), chapter 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Replicates of a sample with at least as many samples; 19 degrees of freedom.
MOST_REPLICATES = 20


@dataclass(frozen=True)
class Draw:
    """The drawn samples of a split.

    Attributes:
        population: samples in the data set, N.
        numbers: the drawn samples, ascending, [n] int64.
        replicates: the replicate of each drawn sample, from 0, [n] int64.
        n_replicates: R.
    """

    population: int
    numbers: NDArray[Any]
    replicates: NDArray[Any]
    n_replicates: int

    def parts(self, places: Sequence[int] | NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Each replicate with samples at the `places` of `numbers`, and these samples' places."""
        among = np.asarray(places)
        for replicate in range(self.n_replicates):
            own = among[self.replicates[among] == replicate]
            if len(own):
                yield replicate, own


def draw(name: str, population: int, samples: int | None, seed: int) -> Draw | None:
    """`samples` samples of the split called `name`; None if all of them are to be taken.

    Args:
        name: of the split; draws of splits with the same size and seed are independent.
        population: samples in the data set.
        samples: the number to draw; None for all.
        seed: of the draw.
    """
    if samples is None or samples >= population:
        return None
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), samples])
    drawn = rng.choice(population, samples, replace=False)  # in random order
    order = np.argsort(drawn)
    count = min(MOST_REPLICATES, samples)
    return Draw(population, drawn[order], (np.arange(samples) % count)[order], count)
