"""Distributions of |LC| on the logarithmic axis, all with a shape and a scale.

With y = log x and θ = (log shape, log scale), or (log scale,), each of them gives the logarithms of
its distribution function, of the complement and of the density of y, with full precision in the
tails. The parameters are those of SciPy with location 0:

    weibull               F = 1 − exp(−(x/λ)^k)                      `scipy.stats.weibull_min`
    exponential           the same with k = 1                        `scipy.stats.expon`
    lognormal             log x normal; shape σ, scale exp(μ)        `scipy.stats.lognorm`
    generalized_gaussian  density ∝ exp(−(x/α)^β), the magnitude     `scipy.stats.halfgennorm`
                          of a generalized Gaussian

Legend: H histograms, or any rows; y is [E] or [H, E], θ is [H, p], results are [H, E].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammainc, gammaincc, gammaln, log_ndtr, polygamma

Floats = NDArray[np.float64]
Part = Callable[[Floats, Floats], Floats]

_HALVINGS = 14  # of an interval that a start lies in: to 1e-3
_LOG2 = math.log(2.0)
_EULER = 0.5772156649015329


@dataclass(frozen=True)
class Family:
    """One distribution.

    Attributes:
        name: as in tables.
        has_shape: whether θ begins with the logarithm of a shape.
        log_tails: (θ, y) -> log F and log(1 − F).
        log_density: (θ, y) -> log of the density of y = log x.
        start: (means [H], standard deviations [H] of y) -> θ with about this mean and deviation.
    """

    name: str
    has_shape: bool
    log_tails: Callable[[Floats, Floats], tuple[Floats, Floats]]
    log_density: Part
    start: Part

    @property
    def p(self) -> int:
        """The number of parameters."""
        return 2 if self.has_shape else 1

    def log_mass(self, theta: Floats, edges: Floats) -> Floats:
        """log(F(upper) − F(lower)) of the bins between edges [E] or [H, E], [H, E − 1].

        It is computed on the side on which it is a difference of small numbers.
        """
        below, above = self.log_tails(theta, edges)
        left = below[:, 1:] < -_LOG2
        large = np.where(left, below[:, 1:], above[:, :-1])
        small = np.where(left, below[:, :-1], above[:, 1:])
        with np.errstate(invalid="ignore", divide="ignore"):
            gap = np.maximum(np.where(np.isneginf(small), np.inf, large - small), 0.0)
            return np.asarray(large + np.log(-np.expm1(-gap)))


def _log_hazard(theta: Floats, y: Floats) -> Floats:
    """shape·(y − log scale)."""
    if theta.shape[1] == 1:
        return np.asarray(y - theta)
    return np.exp(theta[:, :1]) * (y - theta[:, 1:])


def _weibull_log_tails(theta: Floats, y: Floats) -> tuple[Floats, Floats]:
    with np.errstate(over="ignore", divide="ignore"):
        z = _log_hazard(theta, y)
        negative = -np.exp(z)
        # far below, where exp(z) may underflow, F is exp(z)
        return np.where(z < -40, z, np.log(-np.expm1(negative))), negative


def _weibull_log_density(theta: Floats, y: Floats) -> Floats:
    z = _log_hazard(theta, y)
    shape = theta[:, :1] if theta.shape[1] == 2 else 0.0
    with np.errstate(over="ignore"):
        return np.asarray(shape + z - np.exp(z))


def _weibull_start(mean: Floats, sd: Floats) -> Floats:
    shape = math.pi / math.sqrt(6) / sd  # log x is Gumbel
    return np.stack([np.log(shape), mean + _EULER / shape], axis=1)


def _exponential_start(mean: Floats, sd: Floats) -> Floats:
    # the mean of a lognormal variable; this is only a start
    return np.asarray(mean + np.minimum(sd, 4.0) ** 2 / 2)[:, None]


def _z(theta: Floats, y: Floats) -> Floats:
    return (y - theta[:, 1:]) / np.exp(theta[:, :1])


def _normal_log_density(theta: Floats, y: Floats) -> Floats:
    return np.asarray(-(_z(theta, y) ** 2) / 2 - theta[:, :1] - 0.5 * math.log(2 * math.pi))


def _gaussian_log_tails(theta: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Log P(1/β, h) and log Q(1/β, h) with h = (x/α)^β.

    For small h, P = h^a/Γ(a + 1)·(1 − h·a/(a + 1) + …): for a large β, h may underflow although Q
    is well below 1. Where Q underflows, its asymptotic series is used (DLMF 8.11.2). Elsewhere the
    smaller of P and Q is computed, which takes nearly all the time, and the other from it.
    """
    log_h = _log_hazard(theta, y)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        h = np.exp(log_h)
        a = np.broadcast_to(np.exp(-theta[:, :1]), h.shape)
        tiny, left = h < 1e-8, h < a
        part = np.full_like(h, 0.5)  # P on the left, Q on the right
        some = left & ~tiny
        part[some] = gammainc(a[some], h[some])
        part[~left] = gammaincc(a[~left], h[~left])
        log_part, log_rest = np.log(part), np.log1p(-part)
        below, above = np.where(left, log_part, log_rest), np.where(left, log_rest, log_part)
        if tiny.any():
            b, x = a[tiny], h[tiny]
            below[tiny] = b * log_h[tiny] - gammaln(b + 1) - x * b / (b + 1)
            above[tiny] = np.log(-np.expm1(below[tiny]))
        far = ~left & (part <= 1e-280)
        if far.any():
            b, x = a[far], h[far]
            series = np.log1p((b - 1) / x * (1 + (b - 2) / x * (1 + (b - 3) / x)))
            found = -x + (b - 1) * np.log(x) - gammaln(b) + series
            above[far] = np.where(np.isinf(x), -np.inf, found)
        return below, above


def _gaussian_log_density(theta: Floats, y: Floats) -> Floats:
    a = np.exp(-theta[:, :1])
    with np.errstate(over="ignore"):
        h = np.exp(_log_hazard(theta, y))
    return np.asarray(theta[:, :1] + y - theta[:, 1:] - h - gammaln(a))


def _gaussian_start(mean: Floats, sd: Floats) -> Floats:
    """Log x = log α + log G/β, with G of a gamma distribution of shape 1/β."""
    low, high = np.full(len(sd), -6.0), np.full(len(sd), 3.0)
    for _ in range(_HALVINGS):  # the deviation falls as the shape rises
        middle = (low + high) / 2
        inverse = np.exp(-middle)
        wide = inverse * np.sqrt(polygamma(1, inverse)) > sd
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    log_shape = (low + high) / 2
    inverse = np.exp(-log_shape)
    return np.stack([log_shape, mean - inverse * polygamma(0, inverse)], axis=1)


def _normal_start(mean: Floats, sd: Floats) -> Floats:
    return np.stack([np.log(sd), mean], axis=1)


def _normal_log_tails(theta: Floats, y: Floats) -> tuple[Floats, Floats]:
    z = _z(theta, y)
    return log_ndtr(z), log_ndtr(-z)


WEIBULL = Family("weibull", True, _weibull_log_tails, _weibull_log_density, _weibull_start)
#: In the order of tables.
FAMILIES: tuple[Family, ...] = (
    WEIBULL,
    Family("exponential", False, _weibull_log_tails, _weibull_log_density, _exponential_start),
    Family("lognormal", True, _normal_log_tails, _normal_log_density, _normal_start),
    Family(
        "generalized_gaussian", True, _gaussian_log_tails, _gaussian_log_density, _gaussian_start
    ),
)
