"""Maximum-likelihood fits of heavy-tailed distributions to magnitudes of LC.

A fit takes a histogram (the likelihood is then that of interval-censored data, exact for any
bins) or the samples themselves. [LCA] (arXiv 1909.01440, author response) finds that LC follows
a Weibull distribution, F(x) = 1 − exp(−(x/λ)^k), one for each sign.

The samples are **dependent** (parameters share gradients, neighbouring intervals share weights),
so standard errors from the information matrix, which take them to be independent, are too small;
log-likelihoods and AIC compare distributions on the same data, and are no tests of fit.

How: damped Newton steps in coefficients of the family's own choice, on a standard axis of log x.
A `Family` holds what belongs to one distribution; the rest is common.

Legend: B bins, n samples, p parameters, θ the coefficients that are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lcray.errors import UsageError

Floats = NDArray[np.float64]

_LOG2 = math.log(2.0)
_STEPS = 200


@dataclass(frozen=True)
class Fit:
    """A fitted distribution.

    The samples behind LC are dependent; `standard_errors` take them to be independent and are
    therefore too small (a block bootstrap over time gives honest ones).

    Attributes:
        distribution: the name of the family, e.g. ``"weibull"``.
        parameters: the estimates by name: ``"k"`` (shape), ``"lambda"`` (scale, units of x).
        standard_errors: by name, from the observed information matrix and the delta method.
        n: the number of samples.
        log_likelihood: of the bins (log probabilities) or of the samples (log densities): the
            two are not comparable with each other.
        aic: 2·(number of parameters) − 2·log_likelihood.
        ks: the largest |F_empirical − F_fit|, over the bin edges or over the samples.
    """

    distribution: str
    parameters: dict[str, float]
    standard_errors: dict[str, float]
    n: int
    log_likelihood: float
    aic: float
    ks: float


class Axis(NamedTuple):
    """The standard axis t = (log x − log 2^exponent − centre) / scale that fits are made on.

    A power of two is split off exactly, so that scaling the data by 2^j scales λ exactly.
    """

    exponent: int
    centre: float
    scale: float


class Bins(NamedTuple):
    """Bins on the standard axis; t_lower is −inf for an edge at 0, t_upper inf for one at inf."""

    t_lower: Floats
    t_upper: Floats
    width: Floats


class Slopes(NamedTuple):
    """Of a log-likelihood averaged over samples: value, gradient [p], minus the Hessian [p, p]."""

    value: float
    gradient: Floats
    information: Floats


@dataclass(frozen=True)
class Family:
    """What a distribution has to say for itself to be fitted; coefficients θ are on `Axis`.

    Attributes:
        name: as in `Fit.distribution`.
        parameters: names of the natural parameters.
        start: θ [p] for data with mean 0 and standard deviation 1 on the axis.
        bins: (θ, bins, weights that sum to 1, axis) -> log-probability, averaged.
        samples: (θ, t, axis) -> log-density by t, averaged.
        cdf: (θ, t, axis) -> F.
        natural: (θ, axis) -> parameters [p] and their derivatives by θ [p, p].
    """

    name: str
    parameters: tuple[str, ...]
    start: tuple[float, ...]
    bins: Callable[[Floats, Bins, Floats, Axis], Slopes]
    samples: Callable[[Floats, Floats, Axis], Slopes]
    cdf: Callable[[Floats, Floats, Axis], Floats]
    natural: Callable[[Floats, Axis], tuple[Floats, Floats]]


def fit_histogram(
    family: Family, lower: ArrayLike, upper: ArrayLike, counts: ArrayLike
) -> Fit | None:
    """Fit any family to a histogram; arguments, result and errors as for `fit_weibull`."""
    low, high, number = _check_histogram(lower, upper, counts)
    free_slope = len(family.parameters) > 1
    if len(low) < 2 or (free_slope and len(low) == 2 and _any_slope_fits(low, high)):
        return None
    n = float(number.sum())
    weights = number / n
    axis, bins = _standardise_bins(low, high, weights)
    found = _maximise(family.start, lambda theta: family.bins(theta, bins, weights, axis), n)
    if found is None:
        return None
    theta = found.theta
    after = np.cumsum(weights)
    gaps = np.abs(
        [
            family.cdf(theta, bins.t_lower, axis) - np.concatenate(([0.0], after[:-1])),
            family.cdf(theta, bins.t_upper, axis) - after,
        ]
    )
    return _report(family, found, axis, round(n), n * found.value, float(gaps.max()))


def fit_samples(family: Family, x: ArrayLike) -> Fit | None:
    """Fit any family to samples; argument, result and errors as for `fit_weibull_samples`."""
    values = np.sort(np.asarray(x, dtype=np.float64).ravel())
    n = len(values)
    if n and not (values[0] > 0 and np.isfinite(values[-1])):
        raise UsageError("samples of a fit must be finite and positive: drop zeros, NaN, infinity")
    if n < 2:
        return None
    exponent = int(np.frexp(values[n // 2])[1])
    y = _log(values, exponent)
    if y[0] == y[-1]:
        return None
    axis = Axis(exponent, float(y.mean()), float(y.std()))
    t = (y - axis.centre) / axis.scale
    found = _maximise(family.start, lambda theta: family.samples(theta, t, axis), n)
    if found is None:
        return None
    rank = np.arange(n) / n
    cdf = family.cdf(found.theta, t, axis)
    ks = float(max((rank + 1 / n - cdf).max(), (cdf - rank).max()))
    # density by x is density by t over dx/dt = x·scale
    jacobian = math.log(axis.scale) + axis.centre + axis.exponent * _LOG2
    return _report(family, found, axis, n, n * (found.value - jacobian), ks)


def _any_slope_fits(low: Floats, high: Floats) -> bool:
    """Whether the likelihood of two non-empty bins has its supremum at an infinite or zero k."""
    return bool(low[1] == high[0] or (low[0] == 0 and high[1] == math.inf))


def _check_histogram(
    lower: ArrayLike, upper: ArrayLike, counts: ArrayLike
) -> tuple[Floats, Floats, Floats]:
    """The non-empty bins as float64."""
    low, high, number = (np.asarray(a, dtype=np.float64) for a in (lower, upper, counts))
    if not (low.ndim == 1 and low.shape == high.shape == number.shape):
        raise UsageError("a histogram needs lower, upper and counts of one length [B]")
    # comparisons are written so that NaN fails them
    if not ((low >= 0).all() and (low < high).all() and (high[:-1] <= low[1:]).all()):
        raise UsageError("histogram edges must be >= 0, ascending and without overlap: sort bins")
    if not ((number >= 0).all() and np.isfinite(number).all()):
        raise UsageError("histogram counts must be finite and >= 0")
    filled = number > 0
    return low[filled], high[filled], number[filled]


def _log(x: Floats, exponent: int) -> Floats:
    """log(x / 2^exponent) without rounding or overflow in the division."""
    mantissa, power = np.frexp(x)
    with np.errstate(divide="ignore"):  # log 0 = -inf is wanted
        return np.asarray(np.log(mantissa) + (power - exponent) * _LOG2)


def _standardise_bins(low: Floats, high: Floats, weights: Floats) -> tuple[Axis, Bins]:
    """Put bins on an axis where their middles have mean 0 and standard deviation 1."""
    middle = int(np.searchsorted(np.cumsum(weights), 0.5))
    edge = high if math.isfinite(high[middle]) else low
    exponent = int(np.frexp(edge[middle])[1])
    y_low, y_high = _log(low, exponent), _log(high, exponent)
    # the whole of an octave stands for a bin that has no end
    from_ = np.where(low > 0, y_low, y_high - _LOG2)
    to = np.where(np.isfinite(high), y_high, from_ + _LOG2)
    y = (from_ + to) / 2
    centre = float(weights @ y)
    scale = math.sqrt(float(weights @ (y - centre) ** 2))
    t_low, t_high = (y_low - centre) / scale, (y_high - centre) / scale
    mantissa_low, power_low = np.frexp(low)
    mantissa_high, power_high = np.frexp(high)
    with np.errstate(divide="ignore"):
        width = np.log(mantissa_high / mantissa_low) + (power_high - power_low) * _LOG2
    return Axis(exponent, centre, scale), Bins(t_low, t_high, width / scale)


class _Maximum(NamedTuple):
    """Where the averaged log-likelihood is largest, and the covariance of θ from one sample."""

    theta: Floats
    value: float
    covariance: Floats


def _maximise(
    start: tuple[float, ...], slopes_at: Callable[[Floats], Slopes], n: float
) -> _Maximum | None:
    """The maximum of a concave likelihood, or None where the ascent does not settle."""
    try:
        found = _ascend(start, slopes_at, n)
        if found is None or not math.isfinite(found[1].value):
            return None
        theta, slopes = found
        return _Maximum(theta, slopes.value, np.asarray(np.linalg.inv(slopes.information)))
    except np.linalg.LinAlgError:  # flat in some direction
        return None


def _ascend(
    start: tuple[float, ...], slopes_at: Callable[[Floats], Slopes], n: float
) -> tuple[Floats, Slopes] | None:
    """Newton steps, damped as by Levenberg and Marquardt where they do not ascend."""
    theta, here = _flatten(np.array(start), slopes_at)
    damping = 0.0
    for _ in range(_STEPS):
        newton = np.linalg.solve(here.information, here.gradient)
        gain = float(here.gradient @ newton)
        # squared length of the step: in standard errors, and in those of a single sample
        if max(n, 1e4) * gain < 1e-8:
            theta = theta + newton  # its gain is below the rounding of the value: not judged
            return theta, slopes_at(theta)
        rounding = 2e-15 * (1 + abs(here.value))
        damped = here.information + damping * np.diag(np.diag(here.information))
        step = np.linalg.solve(damped, here.gradient)
        there = slopes_at(theta + step)
        if there.value >= here.value + 1e-4 * float(here.gradient @ step) - rounding:
            theta, here = theta + step, there
            damping = damping / 8 if damping > 1e-3 else 0.0
        else:
            damping = max(8 * damping, 1e-3)
    return None


def _flatten(theta: Floats, slopes_at: Callable[[Floats], Slopes]) -> tuple[Floats, Slopes]:
    """Halve θ while that helps: outliers make exp(t·θ) enormous, and Newton steps tiny."""
    here = slopes_at(theta)
    for _ in range(_STEPS):
        flatter = slopes_at(theta / 2)
        if math.isfinite(here.value) and here.value >= flatter.value:
            break
        theta, here = theta / 2, flatter
    return theta, here


def _report(
    family: Family, found: _Maximum, axis: Axis, n: int, log_likelihood: float, ks: float
) -> Fit | None:
    """Estimates and errors in natural parameters; None where those lie beyond float64."""
    parameters, derivatives = family.natural(found.theta, axis)
    if not (np.isfinite(parameters).all() and np.isfinite(derivatives).all()):
        return None
    size = np.abs(derivatives).max(axis=1)  # whose square may lie beyond float64
    if (size == 0).any():
        return None
    relative = derivatives / size[:, None]
    errors = size * np.sqrt(np.diag(relative @ found.covariance @ relative.T) / n)
    return Fit(
        family.name,
        dict(zip(family.parameters, parameters.tolist(), strict=True)),
        dict(zip(family.parameters, errors.tolist(), strict=True)),
        n,
        log_likelihood,
        2.0 * len(parameters) - 2.0 * log_likelihood,
        ks,
    )
