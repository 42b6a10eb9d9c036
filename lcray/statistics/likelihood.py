"""Maximum likelihood of many histograms, or many sets of samples, at once.

A histogram's likelihood is that of interval-censored data, Π_b (F(u_b) − F(l_b))^c_b; that of
samples is the density's. Both are averages over cells of a term ℓ(θ) with a weight: for bins log
masses, for samples log densities of log x. Fisher scoring climbs the first, Newton steps the
second; derivatives by θ = (log shape, log scale) are central differences. Errors:

    information matrix   I⁻¹, I = −∂²ℓ/∂θ², for independent values
    blocks               I⁻¹·Var(Σ scores)·I⁻¹ with the scores summed in blocks of iterations: the
                         score bootstrap of Hu and Kalbfleisch (2000, Canadian Journal of
                         Statistics 28:449), the first order of refitting every resample

Legend: H histograms, B bins, E = B + 1 edges, p parameters, W units of time (windows, iterations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcray.statistics.families import Family

Floats = NDArray[np.float64]
Terms = Callable[[Floats], Floats]  # θ [H, p] -> ℓ [H, B]

_STEP = 1e-5  # of first differences, in log shape and log scale
_WIDE = 1e-3  # of second differences
_ROUNDS = 100
_FARTHEST = 1.0  # a step of θ


@dataclass(frozen=True)
class Estimates:
    """Fits of H histograms.

    Attributes:
        theta: [H, p]; NaN where there is no maximum.
        value: log-likelihoods [H].
        information: −∂²/∂θ² of the log-likelihoods [H, p, p].
    """

    theta: Floats
    value: Floats
    information: Floats

    @property
    def found(self) -> NDArray[np.bool_]:
        """Whether there is a maximum, [H]."""
        return np.asarray(np.isfinite(self.theta).all(axis=1))


def fit_bins(family: Family, edges: Floats, counts: Floats) -> Estimates:
    """Fits histograms that share their bins.

    Args:
        family: the distribution.
        edges: log of the edges [E], ascending, the first may be -inf.
        counts: [H, B], >= 0.

    Returns:
        The fits. Those with fewer than two bins more than parameters have no maximum that says
        anything, and are NaN.
    """
    n = counts.sum(axis=1)
    theta = np.full((len(counts), family.p), np.nan)
    value = np.full(len(counts), np.nan)
    information = np.full((len(counts), family.p, family.p), np.nan)
    fit = np.flatnonzero((counts > 0).sum(axis=1) > family.p)
    if len(fit):
        weights = counts[fit] / n[fit, None]
        begin = family.start(*_moments(edges, weights))
        there, settled = _score(family, edges, weights, begin, n[fit])
        fit, there, weights = fit[settled], there[settled], weights[settled]
    if len(fit):
        theta[fit] = there
        value[fit], information[fit] = _bend(
            lambda t: family.log_mass(t, edges), there, counts[fit]
        )
    return Estimates(theta, value, information)


def fit_samples(family: Family, y: Floats) -> Estimates:
    """Fits samples, given as their logarithms y [n]; H = 1."""
    weights = np.full((1, len(y)), 1.0)
    nothing = Estimates(
        *(np.full((1, *shape), np.nan) for shape in ((family.p,), (), (family.p,) * 2))
    )
    if len(y) <= family.p or y.min() == y.max():
        return nothing
    theta = family.start(np.array([y.mean()]), np.array([y.std()]))
    terms: Terms = lambda t: family.log_density(t, y)  # noqa: E731
    here, bent = _bend(terms, theta, weights)
    damping = 0.0
    for _ in range(_ROUNDS):
        gradient = (slopes(terms, theta) @ weights[0])[0]
        damped = bent[0] + damping * (np.diag(np.abs(np.diag(bent[0]))) + 1e-9 * np.eye(family.p))
        try:
            step = np.linalg.solve(damped, gradient)
        except np.linalg.LinAlgError:
            step = gradient / len(y)
        step = np.clip(step, -_FARTHEST, _FARTHEST)
        there, bent_there = _bend(terms, theta + step, weights)
        if gradient @ step >= 0 and there[0] >= here[0] - 1e-12 * abs(here[0]):
            theta, here, bent = theta + step, there, bent_there
            damping = damping / 8 if damping > 1e-3 else 0.0
            if np.abs(step).max() * np.sqrt(len(y)) < 1e-5:
                return Estimates(theta, here - y.sum(), bent)  # by x: the density of y over x
        else:
            damping = max(8 * damping, 1e-3)
    return nothing


def slopes(terms: Terms, theta: Floats) -> Floats:
    """∂ℓ/∂θ by central differences, [H, p, B]; 0 where ℓ is not finite."""
    parts = []
    for i in range(theta.shape[1]):
        shift = np.zeros(theta.shape[1])
        shift[i] = _STEP
        with np.errstate(invalid="ignore", over="ignore"):
            parts.append((terms(theta + shift) - terms(theta - shift)) / (2 * _STEP))
    found = np.stack(parts, axis=1)
    return np.where(np.isfinite(found), found, 0.0)


def _moments(edges: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of log x, from the middles of bins."""
    low, high = edges[:-1].copy(), edges[1:]
    low[0] = low[0] if np.isfinite(low[0]) else high[0] - np.log(2.0)
    middle = (low + high) / 2
    mean = weights @ middle
    variance = (weights * (middle - mean[:, None]) ** 2).sum(axis=1)
    return mean, np.sqrt(variance + ((high - low) ** 2).min() / 12)


def _total(weights: Floats, terms: Floats) -> Floats:
    """Σ weight·ℓ over the cells that have any, [H]."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(weights > 0, weights * terms, 0.0).sum(axis=1))


def _score(
    family: Family, edges: Floats, weights: Floats, theta: Floats, n: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """Fisher scoring, steps halved until they climb enough; where it settles, and whether so."""
    theta = theta.copy()
    settled = np.zeros(len(theta), np.bool_)
    active = np.arange(len(theta))
    value = _total(weights, family.log_mass(theta, edges))
    for _ in range(_ROUNDS):
        if not len(active):
            break
        here, w = theta[active], weights[active]
        slope = slopes(lambda t: family.log_mass(t, edges), here)
        mass = np.exp(family.log_mass(here, edges))
        fisher = np.einsum("hpb,hb,hqb->hpq", slope, mass, slope)
        fisher += 1e-12 * np.eye(family.p)
        gradient = np.einsum("hpb,hb->hp", slope, w)
        step = np.linalg.solve(fisher, gradient[..., None])[..., 0]
        step /= np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True) / _FARTHEST)
        gain = np.einsum("hp,hp->h", gradient, step)  # no less than 0
        theta[active], value[active] = _climb(family, edges, w, here, step, value[active], gain)
        moved = np.abs(theta[active] - here).max(axis=1)
        done = (np.maximum(n[active], 1e4) * gain < 1e-8) & (moved < 1e-3)
        settled[active[done]] = True
        active = active[~done & np.isfinite(value[active])]
    return theta, settled


def _climb(
    family: Family,
    edges: Floats,
    weights: Floats,
    here: Floats,
    step: Floats,
    value: Floats,
    gain: Floats,
) -> tuple[Floats, Floats]:
    """The first of here + step, + step/2, … that climbs as the slope promises; else `here`.

    A quarter of `gain`, which a step would climb if the slope stayed, has to be there (Armijo): of
    few bins the likelihood may bend twice as much as scoring expects, so that whole steps end as
    far behind the maximum as they began before it, and never settle.
    """
    best, best_value = here.copy(), value.copy()
    left = np.arange(len(here))
    size = 1.0
    for _ in range(12):
        there = here[left] + size * step[left]
        reached = _total(weights[left], family.log_mass(there, edges))
        least = value[left] + 0.25 * size * gain[left] - 1e-14 * np.abs(value[left])
        fine = (reached >= least) | ~np.isfinite(value[left])
        fine &= np.isfinite(reached)
        best[left[fine]], best_value[left[fine]] = there[fine], reached[fine]
        left = left[~fine]
        if not len(left):
            break
        size /= 2
    return best, best_value


def _bend(terms: Terms, theta: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Σ weight·ℓ [H] and minus its second derivatives [H, p, p], by central differences."""
    p = theta.shape[1]
    shifts = _WIDE * np.eye(p)

    def at(shift: Floats) -> Floats:
        return _total(weights, terms(theta + shift))

    here = at(np.zeros(p))
    bent = np.empty((len(theta), p, p))
    for i in range(p):
        bent[:, i, i] = -(at(shifts[i]) - 2 * here + at(-shifts[i])) / _WIDE**2
        for j in range(i):
            a, b = shifts[i], shifts[j]
            with np.errstate(invalid="ignore"):  # where there is no likelihood: no curvature
                cross = at(a + b) - at(a - b) - at(b - a) + at(-a - b)
            bent[:, i, j] = bent[:, j, i] = -cross / (4 * _WIDE**2)
    return here, bent


def covariance(information: Floats) -> Floats:
    """The inverse of an information matrix [p, p]; NaN where there is none."""
    try:
        inverse = np.linalg.inv(information)
    except np.linalg.LinAlgError:
        return np.full_like(information, np.nan)
    fine = bool((np.diag(inverse) > 0).all())
    return np.asarray(inverse if fine else np.full_like(information, np.nan), np.float64)


def simulated_distances(
    family: Family, edges: Floats, theta: Floats, n: int, replicates: int, rng: np.random.Generator
) -> Floats:
    """Kolmogorov–Smirnov distances over the edges of histograms drawn from a fit, each refitted.

    A parametric bootstrap: n values in bins from F(θ), θ fitted anew by one scoring step, which is
    exact to first order in 1/√n, and the distance of the two taken. Values are drawn independently.

    Returns:
        [replicates].
    """
    # with everything below and above the edges as bins of their own
    whole = np.concatenate([[-np.inf], edges[np.isfinite(edges)], [np.inf]])
    here = theta[None]
    terms: Terms = lambda t: family.log_mass(t, whole)  # noqa: E731
    mass = np.exp(terms(here))[0]
    mass /= mass.sum()
    slope = slopes(terms, here)[0]
    fisher = (slope * mass) @ slope.T
    drawn = rng.multinomial(n, mass, size=replicates) / n
    shift = drawn @ slope.T @ covariance(fisher)
    by_theta = np.cumsum(slope * mass, axis=1)  # ∂F/∂θ at the edges
    apart = np.cumsum(drawn - mass, axis=1) - shift @ by_theta
    return np.asarray(np.abs(apart).max(axis=1))


def distance(family: Family, edges: Floats, theta: Floats, counts: Floats) -> Floats:
    """Kolmogorov–Smirnov distances over the edges, of histograms [H, B] from their fits [H, p]."""
    below = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts, axis=1)], axis=1)
    with np.errstate(invalid="ignore"):
        fitted = np.exp(family.log_cdf(theta, edges))
        return np.asarray(np.abs(below / below[:, -1:] - fitted).max(axis=1))
