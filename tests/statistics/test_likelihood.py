from __future__ import annotations

import mpmath
import numpy as np
import pytest
from planting import bin_of
from scipy import optimize, stats

from lcray.statistics.families import FAMILIES, Family
from lcray.statistics.histograms import bin_edges
from lcray.statistics.likelihood import (
    covariance,
    distance,
    fit_bins,
    fit_samples,
    simulated_distances,
    slopes,
)

BY_NAME = {family.name: family for family in FAMILIES}
WEIBULL, LOGNORMAL = BY_NAME["weibull"], BY_NAME["lognormal"]
SCIPY = {
    "weibull": lambda shape, scale: stats.weibull_min(shape, scale=scale),
    "exponential": lambda shape, scale: stats.expon(scale=scale),
    "lognormal": lambda shape, scale: stats.lognorm(shape, scale=scale),
    "generalized_gaussian": lambda shape, scale: stats.halfgennorm(shape, scale=scale),
}


def theta_of(family: Family, shape: float, scale: float) -> np.ndarray:
    return np.log([[shape, scale]] if family.has_shape else [[scale]])


def histogram(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log edges, the first -inf, and counts [1, B], of positive x in the bins of the tables."""
    bins, counts = np.unique(bin_of(x), return_counts=True)
    grid = np.arange(bins[0], bins[-1] + 1)
    lower, upper = bin_edges(grid)
    dense = np.zeros(len(grid) + 1)
    dense[bins - bins[0] + 1] = counts
    return np.log(np.concatenate([[0.0], lower, upper[-1:]]) + 0.0), dense[None]


@pytest.fixture(autouse=True)
def _log_of_zero() -> object:
    with np.errstate(divide="ignore"):
        yield


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [0.35, 1.0, 2.5])
def test_distributions_are_those_of_scipy(family: Family, shape: float) -> None:
    scale = 3e-7
    frozen = SCIPY[family.name](shape, scale)
    x = scale * np.array([1e-12, 1e-4, 0.03, 0.4, 1.0, 1.7, 4.0, 11.0])
    y, theta = np.log(x), theta_of(family, shape, scale)
    log_cdf, log_sf = family.log_tails(theta, y)
    assert log_cdf[0] == pytest.approx(frozen.logcdf(x), rel=1e-9, abs=1e-12)
    assert log_sf[0] == pytest.approx(frozen.logsf(x), rel=1e-9, abs=1e-12)
    density = family.log_density(theta, y)[0] - y
    assert density == pytest.approx(frozen.logpdf(x), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("shape", [0.35, 2.5, 8.0, 2000.0])
def test_the_tails_of_the_generalized_gaussian_hold(shape: float) -> None:
    family = BY_NAME["generalized_gaussian"]
    theta = theta_of(family, shape, 1.0)
    for h in (mpmath.mpf(10) ** -400, 1e-12, 1e-7, 300.0, 640.0, 700.0, 1e4, 1e8):
        y = np.array([float(mpmath.log(h)) / shape])
        exact = mpmath.gammainc(1 / mpmath.mpf(shape), h, mpmath.inf, regularized=True)
        below = mpmath.gammainc(1 / mpmath.mpf(shape), 0, h, regularized=True)
        log_cdf, log_sf = family.log_tails(theta, y)
        assert log_sf[0, 0] == pytest.approx(float(mpmath.log(exact)), rel=1e-8)
        assert log_cdf[0, 0] == pytest.approx(float(mpmath.log(below)), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_masses_add_up_and_stay_finite_far_out(family: Family) -> None:
    edges = np.concatenate([[-np.inf], np.linspace(-60, 14, 593), [np.inf]])
    mass = family.log_mass(theta_of(family, 0.7, 1.0), edges)
    assert np.exp(mass).sum() == pytest.approx(1, rel=1e-12)
    assert (mass[0, :-1] < 0).all()
    assert np.isfinite(mass[0, 1:550]).all()  # up to exp(9) scales, where Q underflows


@pytest.mark.parametrize("k", [0.3, 0.5, 1.0, 2.0])
def test_a_weibull_is_recovered_within_its_error_from_samples_and_from_bins(k: float) -> None:
    x = 1e-7 * np.random.default_rng(int(10 * k)).weibull(k, 5000)
    edges, counts = histogram(x)
    binned, exact = fit_bins(WEIBULL, edges, counts), fit_samples(WEIBULL, np.log(x))
    for found in (binned, exact):
        se = np.sqrt(np.diag(covariance(found.information[0])))
        assert (np.abs(found.theta[0] - np.log([k, 1e-7])) < 3.5 * se).all()
    # the two differ by what bins an eighth of an octave wide lose
    assert (np.abs(binned.theta - exact.theta)[0] < 0.25 * se).all()


def test_samples_of_the_other_families_have_their_maxima() -> None:
    x = np.random.default_rng(2).lognormal(-15, 1.3, 3000)
    y = np.log(x)
    lognormal = fit_samples(LOGNORMAL, y)
    assert np.exp(lognormal.theta[0, 0]) == pytest.approx(y.std(), rel=1e-8)
    assert lognormal.theta[0, 1] == pytest.approx(y.mean(), rel=1e-8)
    assert lognormal.value[0] == pytest.approx(
        stats.lognorm(y.std(), scale=np.exp(y.mean())).logpdf(x).sum()
    )
    assert np.exp(fit_samples(BY_NAME["exponential"], y).theta[0, 0]) == pytest.approx(x.mean())
    z = np.abs(stats.gennorm(1.4, scale=2e-3).rvs(3000, random_state=3))
    shape, _, scale = stats.halfgennorm.fit(1e3 * z, floc=0)
    found = np.exp(fit_samples(BY_NAME["generalized_gaussian"], np.log(z)).theta[0])
    assert found == pytest.approx([shape, 1e-3 * scale], rel=1e-3)


def test_slopes_far_out_are_0_and_no_warning() -> None:
    """∂ log mass/∂ log k is −log(x/λ)·(x/λ)^k there: beyond the largest float."""
    family, edges = FAMILIES[0], np.array([0.0, 1.0, 706.0, 707.0])
    found = slopes(lambda t: family.log_mass(t, edges), np.zeros((1, 2)))
    assert np.isfinite(found).all() and found[0, 0, -1] == 0.0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_many_histograms_are_fitted_as_each_alone(family: Family) -> None:
    rng = np.random.default_rng(4)
    edges = np.concatenate([[-np.inf], np.linspace(-12, 6, 145)])
    x = [np.log(s * rng.weibull(k, 800)) for k in (0.5, 1.3) for s in (0.1, 1.0)]
    counts = np.stack([np.histogram(np.maximum(y, -20), np.maximum(edges, -99))[0] for y in x])
    together = fit_bins(family, edges, counts.astype(float))
    for h in range(len(x)):
        alone = fit_bins(family, edges, counts[h : h + 1].astype(float))
        assert alone.theta[0] == pytest.approx(together.theta[h], abs=1e-5)
        assert alone.value[0] == pytest.approx(together.value[h], rel=1e-12)


def test_histograms_without_a_maximum_are_none() -> None:
    edges = np.concatenate([[-np.inf], np.arange(4.0)])
    counts = np.array([[0, 9, 0, 0], [0, 5, 5, 0], [0, 0, 0, 0], [1, 5, 5, 2.0]])
    assert fit_bins(WEIBULL, edges, counts).found.tolist() == [False, False, False, True]
    assert not fit_samples(WEIBULL, np.zeros(50)).found.any()


def p_value(family: Family, x: np.ndarray, rng: np.random.Generator) -> float:
    edges, counts = histogram(x)
    found = fit_bins(family, edges, counts)
    seen = distance(family, edges, found.theta, counts)[0]
    drawn = simulated_distances(family, edges, found.theta[0], len(x), 99, rng)
    return float((1 + (drawn >= seen).sum()) / 100)


@pytest.mark.parametrize("family", [WEIBULL, LOGNORMAL], ids=lambda f: f.name)
def test_p_values_are_uniform_where_the_family_is_true(family: Family) -> None:
    rng = np.random.default_rng(6)
    frozen = SCIPY[family.name](0.6, 1e-6)
    found = [p_value(family, frozen.rvs(300, random_state=rng), rng) for _ in range(120)]
    assert stats.kstest(found, stats.uniform.cdf).pvalue > 0.02


def test_p_values_are_small_where_it_is_not() -> None:
    rng = np.random.default_rng(7)
    assert p_value(LOGNORMAL, rng.weibull(0.5, 3000), rng) == 0.01
    assert p_value(WEIBULL, rng.lognormal(0, 2, 3000), rng) == 0.01


def test_slopes_that_overflow_are_none_and_warn_of_nothing() -> None:
    found = slopes(lambda theta: np.where(theta > 0, -1e306, 1e306), np.zeros((1, 1)))
    assert found.tolist() == [[[0.0]]]


#: Counts by bin where the likelihood bends twice as much as scoring expects, for some family.
FEW_BINS = (
    {0: 1, 1: 1, 2: 1},
    {7: 166, 12: 204, 28: 574},
    {1: 9, 14: 1, 24: 9, 30: 4},
    {11: 259, 20: 673, 22: 389, 35: 62},
    {12: 6, 16: 1, 38: 9},
    {3: 1, 4: 1, 5: 7, 13: 7, 22: 1},
    {10: 892, 12: 672, 26: 114, 29: 358, 30: 466},
)


def sought(family: Family, edges: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, float]:
    """θ and the averaged log-likelihood that SciPy's simplex finds, of SciPy's distributions."""
    some = counts > 0
    middle = (edges[1:] + edges[:-1])[some] / 2
    share = counts[some] / counts.sum()
    mean = share @ middle
    spread = np.sqrt(share @ (middle - mean) ** 2)

    def loss(theta: np.ndarray) -> float:
        frozen = SCIPY[family.name](np.exp(theta[0]), np.exp(theta[-1]))
        x = np.exp(edges)
        below = np.diff(frozen.cdf(x))[some]
        above = -np.diff(frozen.sf(x))[some]  # where these are the small numbers
        mass = np.where(frozen.cdf(x[1:])[some] < 0.5, below, above)
        return float(-share @ np.log(mass))

    begin = {"weibull": [-np.log(spread), mean], "lognormal": [np.log(spread), mean]}
    options = {"xatol": 1e-10, "fatol": 1e-15, "maxiter": 5000, "maxfev": 5000}
    with np.errstate(all="ignore"):
        start = begin.get(family.name, [mean])
        found = optimize.minimize(loss, start, method="Nelder-Mead", options=options)
    assert found.success
    return found.x, -found.fun


@pytest.mark.parametrize("family", FAMILIES[:3], ids=lambda f: f.name)
@pytest.mark.parametrize("cells", FEW_BINS, ids=str)
def test_few_bins_settle_where_an_independent_search_ends(
    family: Family, cells: dict[int, int]
) -> None:
    edges = np.arange(41) / 8 * np.log(2) - 5
    counts = np.zeros(40)
    counts[list(cells)] = list(cells.values())
    found = fit_bins(family, edges, counts[None])
    assert found.found.all()
    theta, value = sought(family, edges, counts)
    assert found.theta[0] == pytest.approx(theta, abs=1e-5)
    assert found.value[0] / counts.sum() == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("seed", [43, 56, 119])
def test_some_histograms_of_few_bins_have_no_derivatives_and_no_error(seed: int) -> None:
    """Generalized Gaussians of which a shift by a small step is beyond float64."""
    rng = np.random.default_rng(seed)
    edges = np.concatenate([[-np.inf], np.arange(161) / 8 * np.log(2) - 9])
    counts = np.zeros((40, 161))
    for row in counts:
        n = rng.integers(2, 8)
        row[rng.integers(0, 161, n)] = rng.integers(1, 10 ** rng.integers(1, 4), n)
    found = fit_bins(BY_NAME["generalized_gaussian"], edges, counts)
    assert found.found.any() and np.isfinite(found.value[found.found]).all()


def test_the_uniform_is_not_taken_for_a_generalized_gaussian() -> None:
    """Where density rises with x the likelihood does so up to β = ∞: there is no maximum."""
    edges, counts = np.arange(5.0), np.array([[1.0, 5.0, 20.0, 90.0]])
    assert not fit_bins(BY_NAME["generalized_gaussian"], edges, counts).found.any()
    assert fit_bins(BY_NAME["generalized_gaussian"], edges, counts[:, ::-1]).found.all()
