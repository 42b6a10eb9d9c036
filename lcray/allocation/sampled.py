"""Simpson's rule with the midpoint on a sample of the batches, and the error that this makes.

Legend: B batches of a split, n of them drawn, H strata, P elements, L layers, G groups.

With g_b the part that batch b has in the gradient, Σ_b g_b = g, what corrects the trapezoid to
Simpson's rule is a sum over batches:

    G = (g(0) + g(1))/2 + Σ_b c_b,        c_b = ⅔·(g_b(½) − (g_b(0) + g_b(1))/2).

It is estimated from a random sample S of the batches by Σ_h B_h/n_h Σ_{b in S_h} c_b. The estimate
is unbiased, since S depends on seed and step alone, and n on earlier intervals. Endpoints are
full-batch and have no such error, so the errors of different intervals are uncorrelated: variances
add over time. They do not add over layers, which share the batches.

Strata are the groups if every batch holds one group, else there is one stratum, the split.

Source: Cochran, *Sampling Techniques*, 3rd ed., ch. 2 and 5: estimated totals of finite
populations, in strata with proportional allocation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.allocation.path import Segment
from lcray.allocation.quadrature import FEWEST_IN_STRATUM, fewest_batches
from lcray.allocation.sums import Tap
from lcray.settings import Settings
from lcray.tasks.data.split import SplitData
from lcray.tasks.model.flat import FlatModel
from lcray.tasks.model.vectors import zeros

# Most of (kurtosis - 1)/n, the relative variance of a variance, for a standard error to be told: in
# the layer itself, and in any other.
_TAILS, _TAILS_ANYWHERE = 0.25, 1.0


@dataclass(frozen=True)
class Sampling:
    """What decides the samples of batches.

    Attributes:
        error: the standard error to aim at, relative to LC, both as sums of |.| over layers.
        seed: of the draws.
    """

    error: float = 0.01
    seed: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Sampling:
        """As in `settings`."""
        return cls(settings.sampling_error, settings.sample_seed)


class BatchSample:
    """A sample of the batches for one interval, and the sums over it.

    Attributes:
        numbers: of the batches, ascending.
        whole: whether the midpoint takes all batches; the sample then only shows their spread.
        share: samples of data in these batches, relative to the whole split.
        scale: 1 / Σ w of the split.

    Args:
        flat: the model.
        split: the batches.
        path: the interval.
        numbers: of the batches, ascending.
        strata: the stratum of each, ascending, and the number of batches in each stratum.
        vector: where the correction goes, [P] float64 of zeros; None if all batches are taken.
    """

    def __init__(
        self,
        flat: FlatModel,
        split: SplitData,
        path: Segment,
        numbers: Sequence[int],
        strata: tuple[NDArray[np.int64], NDArray[np.int64]],
        vector: Tensor | None,
    ) -> None:
        self.numbers, self.whole, self._vector = tuple(numbers), vector is None, vector
        self.share = sum(split.batch_sizes[number] for number in numbers) / split.n_samples
        self.scale = math.nan
        self._flat, self._path, self._strata = flat, path, strata
        of_batch, sizes = strata
        self._expansions = (sizes / np.maximum(1, np.bincount(of_batch, minlength=len(sizes))))[
            of_batch
        ]
        shape = len(numbers), len(flat.layers)
        self._products = torch.zeros(shape, dtype=torch.float64, device=flat.theta.device)
        self._groups = None
        if split.labels and not self.whole:
            shape = len(split.groups), len(flat.layers)
            self._groups = torch.zeros(shape, dtype=torch.float64, device=flat.theta.device)
        self._group_weights: tuple[float, ...] = ()

    @property
    def vector(self) -> Tensor:
        """The correction of the gradient before it is divided by Σ w, [P] float64."""
        assert self._vector is not None
        return self._vector

    def taps(self, s: float) -> dict[int, Tap]:
        """What takes in the gradients of these batches at θ(s), s = 0, ½ or 1, by batch."""
        factor = 2 / 3 if s == 0.5 else -1 / 3
        return {
            number: Tap(
                self._flat,
                self._path,
                factor,
                self._products[place],
                expansion=float(self._expansions[place]),
                vector=self._vector,
                groups=self._groups,
            )
            for place, number in enumerate(self.numbers)
        }

    def normalize(self, total_weight: float, group_weights: Sequence[float]) -> None:
        """Set what the sums are divided by: Σ w of the split, and of each group."""
        self.scale, self._group_weights = 1 / total_weight, tuple(group_weights)

    def group_correction(self) -> Tensor | None:
        """The correction of LC of each group's own mean loss, by layer, [G, L]."""
        if self._groups is None:
            return None
        weights = torch.tensor([w or 1.0 for w in self._group_weights], dtype=torch.float64)
        return self._groups / weights.to(self._groups.device)[:, None]

    def values(self) -> NDArray[np.float64]:
        """The part that each batch has in LC, by layer, and last over all layers, [n, L + 1]."""
        by_layer = self._products.cpu().numpy() * self.scale
        return np.column_stack([by_layer, by_layer.sum(axis=1)])

    def spread(self) -> Spread:
        """How these values differ."""
        return Spread.of(self.values(), *self._strata)


@dataclass(frozen=True)
class Spread:
    """How the batches of a sample differ, by layer, and last for the sum over layers, [L + 1].

    Attributes:
        variance: of the estimate, Σ_h B_h (B_h - n_h)/n_h · s_h², where s_h² is the variance of the
            batches of a stratum.
        need: Σ_h B_h s_h²: with n batches in proportion, the variance is (B/n - 1) times this.
        kurtosis: of the batches about the means of their strata.
    """

    variance: NDArray[np.float64]
    need: NDArray[np.float64]
    kurtosis: NDArray[np.float64]

    @classmethod
    def of(
        cls, values: NDArray[Any], of_batch: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> Spread:
        """The spread of `values` [n, L + 1].

        Args:
            values: of the batches.
            of_batch: the stratum of each, ascending, [n].
            sizes: the number of batches in each stratum, [H].
        """
        present, starts, inverse, counts = np.unique(
            of_batch, return_index=True, return_inverse=True, return_counts=True
        )
        means = np.add.reduceat(values, starts) / counts[:, None]
        squares = (values - means[inverse]) ** 2
        within = np.add.reduceat(squares, starts) / np.maximum(1, counts - 1)[:, None]
        size = sizes[present]
        factor = size * (size - counts) / counts
        second, fourth = squares.sum(axis=0), (squares**2).sum(axis=0)
        return cls(
            variance=(factor[:, None] * within).sum(axis=0),
            need=(size[:, None] * within).sum(axis=0),
            kurtosis=len(values) * fourth / np.where(second > 0, second, np.inf) ** 2,
        )


class Sampler:
    """Draws the samples of a split, as large as earlier intervals of the block say.

    Args:
        flat: the model.
        split: the batches.
        sampling: what decides the samples.
    """

    def __init__(self, flat: FlatModel, split: SplitData, sampling: Sampling) -> None:
        self._flat, self._split, self._sampling = flat, split, sampling
        self._strata = _strata(split)
        self._n_batches = len(split.batches)
        self._vectors: list[Tensor] = []
        self._fewest = fewest_batches(self._n_batches, len(self._strata))
        self._noise = self._signal = 0.0
        self._kurtosis = np.zeros(len(flat.layers) + 1)

    @property
    def knows(self) -> bool:
        """Whether an interval of the block has shown how the batches differ."""
        return self._signal > 0.0

    def forget(self) -> None:
        """Begin a block."""
        self._noise = self._signal = 0.0

    def draw(self, path: Segment, *, whole: bool, late: bool = False) -> BatchSample:
        """A sample of the batches for an interval.

        Args:
            path: the interval.
            whole: whether to take all batches; they then show how they differ.
            late: whether its start has been evaluated: if all batches are to be taken, what they
                show is not worth another gradient, unless nothing has shown it yet.
        """
        sizes = np.array([len(stratum) for stratum in self._strata])
        each = np.ceil((self._n_batches if whole else self._wanted()) * sizes / sizes.sum())
        counts = np.minimum(sizes, np.maximum(FEWEST_IN_STRATUM, each)).astype(np.int64)
        whole = bool(counts.sum() == self._n_batches)
        if whole and (self._fewest == self._n_batches or (late and self.knows)):
            counts[:] = 0
        name = zlib.crc32(self._split.name.encode())
        rng = np.random.default_rng([self._sampling.seed, name, path.start.step])
        chosen = [
            np.sort(rng.permutation(stratum)[:count])
            for stratum, count in zip(self._strata, counts, strict=True)
        ]
        strata = np.repeat(np.arange(len(sizes)), counts), sizes
        vector = None if whole else self._next_vector()
        numbers = np.concatenate(chosen).tolist()
        return BatchSample(self._flat, self._split, path, numbers, strata, vector)

    def learn(self, sample: BatchSample, layer_lc: Tensor) -> tuple[Tensor, float]:
        """Take in the spread of a sample whose interval is done.

        Args:
            sample: the sample.
            layer_lc: LC of the interval by layer, [L].

        Returns:
            the standard error of LC from sampling, by layer, [L], and of its sum. It is 0 if all
            batches were taken, and NaN where a few batches make up most of the spread: a sample
            says little about it then, whether or not it has them. That was seen in the interval
            of the block that took all batches; this sample must not tell, since those without such
            a batch look best.
        """
        errors = np.zeros(len(layer_lc) + 1)
        if sample.numbers:
            spread = sample.spread()
            noise = float(np.sqrt(spread.need[:-1]).sum()) ** 2
            signal = float(layer_lc.abs().sum()) ** 2
            if math.isfinite(noise) and math.isfinite(signal):
                self._noise, self._signal = self._noise + noise, self._signal + signal
            if sample.whole:
                self._kurtosis = spread.kurtosis
            else:
                tells = shows_spread(self._kurtosis, len(sample.numbers))
                errors = np.where(tells, np.sqrt(spread.variance), math.nan)
        return torch.from_numpy(errors[:-1]), float(errors[-1])

    def _wanted(self) -> int:
        """The number of batches whose standard error is the one to aim at; see `BatchSample`."""
        # (B/n - 1)·noise = error²·signal
        ratio = self._sampling.error**2 * self._signal / self._noise if self._noise else math.inf
        return max(self._fewest, math.ceil(self._n_batches / (1 + ratio)))

    def _next_vector(self) -> Tensor:
        """One of two, in turn: two samples are open at the point between their intervals."""
        if len(self._vectors) < 2:
            theta = self._flat.theta
            self._vectors.append(zeros(len(theta), torch.float64, theta.device))
        else:
            self._vectors.reverse()
            self._vectors[-1].zero_()
        return self._vectors[-1]


def shows_spread(kurtosis: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    """Whether a sample of `n` batches shows how all differ, by layer, given their kurtosis.

    Where it is large in one layer, it may soon be so in others, by the same few items.
    """
    tails = (kurtosis - 1) / n
    shown: NDArray[np.bool_] = (tails <= _TAILS) & (tails.max() <= _TAILS_ANYWHERE)
    return shown


def merged(*taps: Mapping[int, Tap]) -> dict[int, tuple[Tap, ...]]:
    """All taps of every batch."""
    numbers = sorted({number for each in taps for number in each})
    return {n: tuple(each[n] for each in taps if n in each) for n in numbers}


def _strata(split: SplitData) -> list[NDArray[np.int64]]:
    """The batches of every stratum."""
    if not split.sorted_by_group or not split.groups:
        return [np.arange(len(split.batches))]
    groups = np.array([present[0] for present in split.present])
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]
