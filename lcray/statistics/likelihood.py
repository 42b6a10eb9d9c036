"""Maximum likelihood of many histograms, or of samples.

The likelihood of a histogram is that of interval-censored data, Π_b (F(u_b) − F(l_b))^c_b; the
likelihood of samples is the product of their densities. Both are weighted averages over cells of a
term ℓ(θ): the log mass of a bin, or the log density of log x of a sample. They are maximised by
Newton steps, with damping as by Levenberg and Marquardt if a step does not ascend. Derivatives by
θ = (log shape, log scale) are differences. There are two kinds of errors; the first are too small
for values of LC, which depend on each other:

    information matrix   I⁻¹, I = −∂²ℓ/∂θ², for independent values
    blocks               I⁻¹·Var(Σ scores)·I⁻¹ with the scores summed in blocks of iterations: the
                         score bootstrap of Hu and Kalbfleisch (2000, Canadian Journal of
                         Statistics 28:449), the first order of refitting every resample

Legend: H histograms, B bins, E = B + 1 edges, p parameters, W units of time (windows, iterations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcray.statistics.families import Family, Floats

Terms = Callable[[Floats], Floats]  # θ [H, p] -> ℓ [H, B]
Cells = Callable[[Floats, Any], Floats]  # θ [h, p] of some rows, and which -> ℓ [h, B]

_STEP = 1e-5  # of the differences of single terms, in log shape and log scale
_NARROW, _WIDE = 2e-4, 2e-3  # of those of their sums, in units of θ: on the way, at the maximum
_ROUNDS, _DOUBLINGS = 200, 30
_TOGETHER = 1 << 18  # cells that are evaluated at once; above it, single calls are as fast
_FLAT = 1e-7  # a curvature up to this counts as 0, in units of θ
_STEEPEST = 9.0  # log of a shape that bins cannot distinguish from infinity


@dataclass(frozen=True)
class Estimates:
    """Fits of H histograms.

    Attributes:
        theta: [H, p]; NaN if there is no maximum.
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

    @property
    def errors(self) -> Floats:
        """Standard errors of θ [H, p] if values were independent; NaN if there are none."""
        with np.errstate(invalid="ignore"):
            return np.sqrt([np.diag(covariance(one)) for one in self.information])


# steps to where values overflow are rejected
@np.errstate(over="ignore", invalid="ignore")
def fit_bins(family: Family, edges: Floats, counts: Floats, *, spare: int = 1) -> Estimates:
    """Fits histograms that share their bins.

    Args:
        family: the distribution.
        edges: log of the edges [E], ascending; the first may be -inf, the last inf.
        counts: [H, B], >= 0.
        spare: a histogram must have this many more bins than parameters for a fit. With 0, a fit
            may match all bins exactly; if it does so only in a limit, there is no maximum.

    Returns:
        The fits; NaN if there is no maximum, or there are too few bins.
    """
    n, filled = counts.sum(axis=1), (counts > 0).sum(axis=1)
    enough = (filled >= family.p + spare) & (filled > 1)
    enough &= ~((filled == 2) & (family.p == 2) & _any_shape(edges, counts))
    found = Estimates(*(np.full((len(n), *shape), np.nan) for shape in _shapes(family)))
    if enough.any():
        own, counts = _filled(edges, counts[enough])
        weights = counts / n[enough, None]
        cells: Cells = lambda theta, rows: family.log_mass(theta, own[rows])  # noqa: E731
        fitted = _Hill(family, *_moments(own, weights), cells, weights).climb(n[enough])
        for name, values in vars(fitted).items():
            getattr(found, name)[enough] = values
    return found


@np.errstate(over="ignore", invalid="ignore")
def fit_samples(family: Family, y: Floats) -> Estimates:
    """Fits samples, given as their logarithms y [n]; H = 1."""
    if len(y) <= family.p or y.min() == y.max():
        return Estimates(*(np.full((1, *shape), np.nan) for shape in _shapes(family)))
    n, mean, sd = (np.array([value]) for value in (float(len(y)), y.mean(), y.std()))
    cells: Cells = lambda theta, _: family.log_density(theta, y)  # noqa: E731
    weights = np.full((1, len(y)), 1 / len(y))
    found = _Hill(family, mean, sd, cells, weights).climb(n)
    return Estimates(found.theta, found.value - y.sum(), found.information)  # by x: density over x


def _shapes(family: Family) -> tuple[tuple[int, ...], ...]:
    """Of one fit's θ, value and information."""
    return (family.p,), (), (family.p,) * 2


def _any_shape(edges: Floats, counts: Floats) -> NDArray[np.bool_]:
    """Whether the two bins with values are neighbours, or open at both ends, [H].

    Then the supremum of the likelihood is at an infinite shape, or at no shape.
    """
    first = (counts > 0).argmax(axis=1)
    last = counts.shape[1] - 1 - (counts > 0)[:, ::-1].argmax(axis=1)
    open_ = np.isneginf(edges[first]) & np.isposinf(edges[last + 1])
    return np.asarray((last == first + 1) | open_)


def _filled(edges: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Edges and counts of each row's own bins, [H, E] and [H, E − 1], with gaps as single bins.

    Shorter rows end in edges at infinity, where every distribution is known without effort.
    """
    filled = np.pad(counts > 0, ((0, 0), (1, 1)))
    used = filled[:, 1:] | filled[:, :-1]
    order = np.argsort(~used, axis=1, kind="stable")[:, : used.sum(axis=1).max()]
    used = np.take_along_axis(used, order, axis=1)
    own = np.where(used, edges[order], np.inf)
    counts = np.take_along_axis(np.pad(counts, ((0, 0), (0, 1))), order, axis=1)
    return own, np.where(used, counts, 0.0)[:, :-1]


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
    """Mean and standard deviation of log x, [H] each, as if bins were filled evenly.

    A bin without an end counts as an octave long.
    """
    low, high = edges[:, :-1], edges[:, 1:]
    low = np.where(np.isfinite(low), low, high - np.log(2.0))
    high = np.where(np.isfinite(high), high, low + np.log(2.0))
    low, high = (np.where(weights > 0, edge, 0.0) for edge in (low, high))
    mean = (weights * (low + high) / 2).sum(axis=1)
    spread = ((low + high) / 2 - mean[:, None]) ** 2 + (high - low) ** 2 / 12
    return mean, np.sqrt((weights * spread).sum(axis=1))


class _Hill:
    """Averaged log-likelihoods Σ weight·ℓ [H], and the way to their maxima.

    It starts at the θ with this mean and deviation of log x. Steps u are in units, θ = unit·u, in
    which the information was 1 at the last point.
    """

    def __init__(
        self, family: Family, mean: Floats, sd: Floats, cells: Cells, weights: Floats
    ) -> None:
        self._cells, self._weights = cells, weights
        everywhere = np.arange(len(weights))
        self.theta = family.start(mean, sd)
        self.value = self.average(self.theta, everywhere)
        for _ in range(_DOUBLINGS):  # with outliers, hazards are enormous and steps tiny
            wide = family.start(mean, 2 * sd)
            of_wide = self.average(wide, everywhere)
            better = ~((self.value >= of_wide) & np.isfinite(self.value))
            if not better.any():
                break
            self.theta[better], self.value[better] = wide[better], of_wide[better]
            sd = np.where(better, 2 * sd, sd)
        self._unit = np.tile(np.eye(family.p), (len(weights), 1, 1))
        if family.has_shape:
            self._unit[:, 1, 1] = sd
        self.gradient, self.information = self.derivatives(everywhere)
        self._whiten(everywhere)

    def average(self, theta: Floats, rows: Any) -> Floats:
        """Σ weight·ℓ of some rows, over the cells that have any weight."""
        weights = self._weights[rows]
        terms = np.where(weights > 0, weights * self._cells(theta, rows), 0.0)
        return np.asarray(terms.sum(axis=1))

    def moved(self, u: Floats, rows: Any) -> Floats:
        """θ of some rows after a step u, [p] or [h, p]."""
        step = (self._unit[rows] @ np.broadcast_to(u, self.theta[rows].shape)[..., None])[..., 0]
        return np.asarray(self.theta[rows] + step)

    def derivatives(self, rows: Any, width: float = _NARROW) -> tuple[Floats, Floats]:
        """Gradient [h, p] and minus the second derivatives [h, p, p] of some rows, by u."""
        p = self.theta.shape[1]
        gradient, bent = np.empty((len(rows), p)), np.empty((len(rows), p, p))
        places = [*product((0, 1, -1), repeat=p)]  # steps in each direction
        at = dict(zip(places, self._shifted(width * np.array(places), rows), strict=True))
        zero = (0,) * p
        for i in range(p):
            up, down = (at[(*zero[:i], sign, *zero[i + 1 :])] for sign in (1, -1))
            gradient[:, i] = (up - down) / (2 * width)
            bent[:, i, i] = (2 * at[zero] - up - down) / width**2
        if p == 2:
            cross = at[1, 1] - at[1, -1] - at[-1, 1] + at[-1, -1]
            bent[:, 1, 0] = bent[:, 0, 1] = -cross / (4 * width**2)
        return gradient, bent

    def _shifted(self, shifts: Floats, rows: Any) -> Floats:
        """Averages [S, h] of some rows after each of S steps."""
        steps = (self._unit[rows] @ shifts[:, None, :, None])[..., 0]
        moved = self.theta[rows] + steps  # [S, h, p]
        if self._weights.shape[1] * moved[..., 0].size > _TOGETHER:
            return np.stack([self.average(theta, rows) for theta in moved])
        found = self.average(moved.reshape(-1, moved.shape[2]), np.tile(rows, len(moved)))
        return found.reshape(len(moved), -1)

    def _whiten(self, rows: Any) -> None:
        """Choose units in which the information of these rows is 1, if it is positive."""
        fine = _positive(self.information[rows])
        rows = rows[fine]
        root = np.linalg.inv(np.linalg.cholesky(self.information[rows]))
        self._unit[rows] = self._unit[rows] @ root.swapaxes(1, 2)
        self.gradient[rows] = (root @ self.gradient[rows][..., None])[..., 0]
        self.information[rows] = np.eye(root.shape[-1])

    def climb(self, n: Floats) -> Estimates:
        """The maxima, of n values [H]; NaN for rows that do not converge."""
        damping, settled = np.zeros(len(n)), np.zeros(len(n), np.bool_)
        active = np.arange(len(n))
        for _ in range(_ROUNDS):
            fine = np.isfinite(self.value) & np.isfinite(self.information).all(axis=(1, 2))
            active = active[fine[active] & ~settled[active]]
            if not len(active):
                break
            gradient, damped = self.gradient[active], damping[active]
            step = np.clip(_solved(self.information[active], gradient, damped), -1.0, 1.0)
            gain = np.einsum("hp,hp->h", gradient, step)
            there = self.moved(step, active)
            reached = self.average(there, active)
            # gain: the squared length of the step in standard errors of a single value; that of the
            # next step is about its square; a gain below the rounding of the value is accepted
            near = (gain < 1e-12) & (damped == 0)
            near &= np.abs(there - self.theta[active])[:, 0] < 1e-3
            least = self.value[active] + 1e-4 * gain - 2e-15 * (1 + np.abs(self.value[active]))
            climbs = (gain >= 0) & (near | (reached >= least))
            up = active[climbs]
            self.theta[up], self.value[up] = there[climbs], reached[climbs]
            self.gradient[up], self.information[up] = self.derivatives(up)
            self._whiten(up)
            settled[active] = climbs & near
            less = np.where(damped > 1e-3, damped / 8, 0.0)
            damping[active] = np.where(climbs, less, np.maximum(8 * damped, 1e-3))
        settled = self._refine(np.flatnonzero(settled))
        back = np.linalg.inv(self._unit)
        information = back.swapaxes(1, 2) @ self.information @ back
        found = Estimates(self.theta, n * self.value, n[:, None, None] * information)
        for values in vars(found).values():
            values[~settled] = np.nan
        return found

    def _refine(self, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """One more step of the rows that converged, and their information.

        Returns which rows have a maximum. Derivatives are differences of two widths, whose errors
        cancel to the fourth order.
        """
        fine, coarse = self.derivatives(rows, _WIDE), self.derivatives(rows, 2 * _WIDE)
        gradient, bent = ((4 * f - c) / 3 for f, c in zip(fine, coarse, strict=True))
        peaks = _positive(bent) & (self.theta[rows, 0] < _STEEPEST)
        rows, bent = rows[peaks], bent[peaks]
        self.information[rows] = bent
        self.theta[rows] = self.moved(_solved(bent, gradient[peaks], np.zeros(len(rows))), rows)
        settled = np.zeros(len(self.theta), np.bool_)
        settled[rows] = True
        return settled


def _positive(information: Floats) -> NDArray[np.bool_]:
    """Whether the curvature is positive in every direction, [h]."""
    known = np.isfinite(information).all(axis=(1, 2), keepdims=True)
    curvature = np.linalg.eigvalsh(np.where(known, information, 0.0))
    return np.asarray(curvature[:, 0] > np.maximum(_FLAT, 1e-12 * curvature[:, -1]))


def _solved(information: Floats, gradient: Floats, damping: Floats) -> Floats:
    """Newton steps [h, p], with this multiple of the diagonal [h] as damping."""
    size = np.abs(np.einsum("hpp->hp", information))
    extra = damping[:, None] * size + 1e-12
    eye = np.eye(information.shape[-1])
    steps = np.linalg.solve(information + extra[:, None] * eye, gradient[..., None])
    return np.asarray(steps[..., 0])


def covariance(information: Floats) -> Floats:
    """The inverse of an information matrix [p, p]; NaN if there is none."""
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

    This is a parametric bootstrap: n independent values are drawn from F(θ) into bins, θ is fitted
    again by one scoring step, which is exact to first order in 1/√n, and the distance between the
    two is computed.

    Returns:
        [replicates].
    """
    # all values below the edges, and all above them, are two more bins
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
        fitted = np.exp(family.log_tails(theta, edges)[0])
        return np.asarray(np.abs(below / below[:, -1:] - fitted).max(axis=1))
