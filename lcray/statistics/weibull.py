"""The Weibull distribution, location 0, fitted by maximum likelihood.

With y = log x, F(x) = 1 − exp(−(x/λ)^k) has the cumulative hazard H = (x/λ)^k = exp(a·t + c) on the
standard axis t = (y − centre)/scale. The log-likelihood is concave in (a, c), of samples as of
bins (Pratt 1981, JASA 76:103), so damped Newton steps find the one maximum from anywhere.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from lcray.statistics.newton import (
    Axis,
    Bins,
    Family,
    Fit,
    Floats,
    Slopes,
    fit_histogram,
    fit_samples,
)

_LOG2 = math.log(2.0)
_EULER = 0.5772156649015329
_CEILING = 700.0  # exp(-700) is nothing beside 1, and exp(700) is finite
_LIMIT = 1e200  # hazards beyond it belong to no fit, and their products would overflow


def fit_weibull(lower: ArrayLike, upper: ArrayLike, counts: ArrayLike) -> Fit | None:
    """Fit a Weibull distribution (location 0) to a histogram by interval-censored likelihood.

    Maximises Σ_b c_b·log(F(u_b) − F(l_b)). Standard errors take the samples to be independent,
    which values of LC are not: they are too small.

    Args:
        lower: lower edges [B], ascending, >= 0; bins may leave gaps but not overlap.
        upper: upper edges [B], > lower; the last may be infinity.
        counts: samples a bin [B], >= 0.

    Returns:
        The fit, or None where the likelihood has no maximum: fewer than two non-empty bins, or
        only two, if they touch (the steeper the better) or one begins at 0 and the other ends
        at infinity (the flatter the better). Also None where λ lies beyond float64.

    Raises:
        UsageError: for edges or counts that are no histogram.
    """
    return fit_histogram(WEIBULL, lower, upper, counts)


def fit_weibull_samples(x: ArrayLike) -> Fit | None:
    """Fit a Weibull distribution (location 0) to samples by maximum likelihood.

    Standard errors take the samples to be independent, which values of LC are not: they are too
    small.

    Args:
        x: samples [n], finite and > 0.

    Returns:
        The fit, or None where the likelihood has no maximum: fewer than two distinct samples.

    Raises:
        UsageError: for samples that are not finite or not positive.
    """
    return fit_samples(WEIBULL, x)


def _weibull_bins(theta: Floats, bins: Bins, weights: Floats, _axis: Axis) -> Slopes:
    """Slopes of log(exp(−A) − exp(−B)), with A, B the cumulative hazards exp(a·t + c) of the edges.

    With D = B − A, log P = −A + log(1 − exp(−D)). All is written in α = A/D, which depends on the
    bin's width alone, and q = D/(exp(D) − 1): narrow bins then lose no digits, and every term of
    the information is a square.
    """
    from scipy.special import exprel  # a driver, which imports this, has no memory for SciPy

    a, c = theta
    if a <= 0:
        return _NOWHERE
    t_low = np.where(np.isfinite(bins.t_lower), bins.t_lower, 0.0)  # there A = 0
    t_high = np.where(np.isfinite(bins.t_upper), bins.t_upper, 0.0)  # there q = 0
    width = np.where(np.isfinite(bins.width), bins.width, 0.0)  # there α = 0
    with np.errstate(over="ignore"):
        hazard = np.exp(a * bins.t_lower + c)
        alpha = 1 / np.expm1(a * bins.width)
        log_d = a * bins.t_upper + c + np.log(-np.expm1(-a * bins.width))
        d = np.exp(np.minimum(log_d, _CEILING))
        q = 1 / exprel(d)
    if hazard.max() > _LIMIT:
        return _NOWHERE
    log_p = np.where(log_d < -_CEILING, log_d, _log1mexp(np.maximum(d, 1e-305))) - hazard
    lever = t_high + alpha * width
    bend = q * (d + q - 1)
    slant = bend * lever + hazard * t_low
    curvature = bend * lever**2 + hazard * t_low**2 + q * width**2 * alpha * (1 + alpha)
    i_aa, i_ac, i_cc = weights @ curvature, weights @ slant, weights @ (bend + hazard)
    return Slopes(
        float(weights @ log_p),
        np.array([weights @ (q * lever - hazard * t_low), weights @ (q - hazard)]),
        np.array([[i_aa, i_ac], [i_ac, i_cc]]),
    )


def _log1mexp(d: Floats) -> Floats:
    """log(1 − exp(−d)) for d > 0 (Mächler 2012)."""
    return np.where(d < _LOG2, np.log(-np.expm1(-d)), np.log1p(-np.exp(-np.maximum(d, _LOG2))))


def _weibull_samples(theta: Floats, t: Floats, _axis: Axis) -> Slopes:
    """Slopes of the log-density log a + z − exp(z), z = a·t + c."""
    a, c = theta
    with np.errstate(over="ignore"):
        hazard = np.exp(a * t + c)
    if a <= 0 or hazard.max() > _LIMIT:
        return _NOWHERE
    n = len(t)
    h, th, tth = hazard.sum() / n, t @ hazard / n, (t * t) @ hazard / n
    mean = t.sum() / n
    return Slopes(
        float(math.log(a) + a * mean + c - h),
        np.array([1 / a + mean - th, 1 - h]),
        np.array([[1 / a**2 + tth, th], [th, h]]),
    )


def _weibull_cdf(theta: Floats, t: Floats, _axis: Axis) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(-np.expm1(-np.exp(theta[0] * t + theta[1])))


def _weibull_natural(theta: Floats, axis: Axis) -> tuple[Floats, Floats]:
    """The shape k = a/scale, log λ = centre − scale·c/a, and their derivatives by a and c."""
    a, c = theta
    log_scale = axis.centre - axis.scale * c / a
    power = round(log_scale / _LOG2)
    with np.errstate(over="ignore", invalid="ignore"):
        lam = np.ldexp(math.exp(log_scale - power * _LOG2), axis.exponent + power)
        by_a, by_c = lam * (axis.scale * c / a**2), -lam * (axis.scale / a)
    return np.array([a / axis.scale, lam]), np.array([[1 / axis.scale, 0.0], [by_a, by_c]])


_NOWHERE = Slopes(-math.inf, np.zeros(2), np.eye(2))  # outside of what can be evaluated

WEIBULL = Family(
    name="weibull",
    parameters=("k", "lambda"),
    # a standard Gumbel variable has mean −γ and standard deviation π/√6
    start=(math.pi / math.sqrt(6), -_EULER),
    bins=_weibull_bins,
    samples=_weibull_samples,
    cdf=_weibull_cdf,
    natural=_weibull_natural,
)
