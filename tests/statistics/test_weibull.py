"""Weibull fits against exact populations, SciPy, and likelihoods evaluated by mpmath."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from planting import bin_of

from lcray.statistics.families import FAMILIES, WEIBULL, Family
from lcray.statistics.histograms import HIGHEST, LOWEST, UNDERFLOW, bin_edges
from lcray.statistics.likelihood import Estimates, distance, fit_bins, fit_samples, slopes
from lcray.tables.reducing.fits import fit_weibulls

Floats = NDArray[np.float64]
Histogram = tuple[Floats, Floats, Floats]

SHAPES = [0.3, 0.5, 1.0, 2.0]
EXPONENTIAL = FAMILIES[1]


@dataclass(frozen=True)
class Fit:
    """One fit, by the names of its parameters, log k and log λ among them."""

    theta: tuple[float, ...]
    relative_errors: tuple[float, ...]
    log_likelihood: float
    ks: float = math.nan

    @property
    def parameters(self) -> dict[str, float]:
        names = ("k", "lambda")[-len(self.theta) :]
        return dict(zip(names, map(math.exp, self.theta), strict=True))

    @property
    def standard_errors(self) -> dict[str, float]:
        pairs = zip(self.parameters.items(), self.relative_errors, strict=True)
        return {name: value * error for (name, value), error in pairs}


def fit_weibull(
    lower: ArrayLike, upper: ArrayLike, counts: ArrayLike, family: Family = WEIBULL
) -> Fit | None:
    """The fit to one histogram, whose bins may leave gaps."""
    low, high = np.asarray(lower, dtype=float), np.asarray(upper, dtype=float)
    if not low.size:
        return None
    edges = np.unique(np.concatenate([low, high]))
    dense = np.zeros((1, len(edges) - 1))
    dense[0, np.searchsorted(edges, low)] = counts
    with np.errstate(divide="ignore"):
        logs = np.log(edges)
    found = fit_bins(family, logs, dense, spare=0)
    ks = float(distance(family, logs, found.theta, dense)[0]) if found.found[0] else math.nan
    return only(found, ks)


def fit_weibull_samples(x: ArrayLike, family: Family = WEIBULL) -> Fit | None:
    return only(fit_samples(family, np.log(np.asarray(x, dtype=float))))


def only(found: Estimates, ks: float = math.nan) -> Fit | None:
    if not found.found[0]:
        return None
    return Fit(tuple(found.theta[0]), tuple(found.errors[0]), float(found.value[0]), ks)


@pytest.fixture(autouse=True)
def _precise() -> object:
    with mp.workdps(50):
        yield


def binned(x: Floats) -> Histogram:
    bins, counts = np.unique(np.where(x == 0, UNDERFLOW, bin_of(x)), return_counts=True)
    return *bin_edges(bins), counts.astype(np.float64)


def draw(k: float, lam: float, n: int, seed: int) -> Floats:
    return lam * np.random.default_rng(seed).weibull(k, n)


def exact_bins_likelihood(histogram: Histogram) -> Callable[[object, object], object]:
    """(log k, log λ) -> the log-likelihood by its definition, in 50 digits."""
    rows = [tuple(map(mp.mpf, map(float, row))) for row in zip(*histogram, strict=True)]

    def log_likelihood(log_k: object, log_lam: object) -> object:
        k, lam = mp.exp(log_k), mp.exp(log_lam)
        return mp.fsum(
            c * (mp.log(-mp.expm1((low / lam) ** k - (high / lam) ** k)) - (low / lam) ** k)
            for low, high, c in rows
            if c
        )

    return log_likelihood


def exact_samples_likelihood(x: Floats) -> Callable[[object, object], object]:
    values = [mp.mpf(float(v)) for v in x]

    def log_likelihood(log_k: object, log_lam: object) -> object:
        k, lam = mp.exp(log_k), mp.exp(log_lam)
        return mp.fsum(
            mp.log(k) - k * mp.log(lam) + (k - 1) * mp.log(v) - (v / lam) ** k for v in values
        )

    return log_likelihood


def check_is_the_maximum(
    fit: Fit | None,
    likelihood: Callable[[object, object], object],
    n: float,
    tolerance: float = 1e-7,
) -> None:
    """Value, zero gradient (in standard errors) and curvature of a likelihood, by mpmath."""
    assert fit is not None
    at = (mp.mpf(fit.theta[0]), mp.mpf(fit.theta[1]))
    value = float(likelihood(*at))
    assert fit.log_likelihood == pytest.approx(value, rel=1e-10)
    gradient = [float(mp.diff(likelihood, at, order)) for order in ((1, 0), (0, 1))]
    second = [float(mp.diff(likelihood, at, order)) for order in ((2, 0), (1, 1), (0, 2))]
    information = -np.array([[second[0], second[1]], [second[1], second[2]]])
    covariance = np.linalg.inv(information)
    assert gradient @ covariance @ gradient <= tolerance**2 * max(1.0, n)
    assert fit.relative_errors == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-5)


def check_is_the_maximum_of_bins(histogram: Histogram) -> None:
    likelihood = exact_bins_likelihood(histogram)
    check_is_the_maximum(fit_weibull(*histogram), likelihood, histogram[2].sum())


# --- the estimate is right ---------------------------------------------------------------------


@pytest.mark.parametrize("k", SHAPES)
@pytest.mark.parametrize("lam", [1e-9, 3.0])
def test_synthetic_samples_give_their_parameters_back_both_ways(k: float, lam: float) -> None:
    x = draw(k, lam, 20_000, seed=17)
    from_bins, from_samples = fit_weibull(*binned(x)), fit_weibull_samples(x)
    assert from_bins is not None and from_samples is not None
    for name, truth in (("k", k), ("lambda", lam)):
        for fit in (from_bins, from_samples):
            assert abs(fit.parameters[name] - truth) < 4 * fit.standard_errors[name]
        # eight bins an octave keep almost all information
        se = from_samples.standard_errors[name]
        assert abs(from_bins.parameters[name] - from_samples.parameters[name]) < 0.2 * se
        assert 0.99 < from_bins.standard_errors[name] / se < 1.02


@pytest.mark.parametrize("k", [0.05, 0.3, 0.53, 1.0, 2.0, 7.0, 20.0])
@pytest.mark.parametrize("lam", [1e-300, 1e-20, 1e-8, 1.0, 1e10])
def test_an_exact_population_gives_its_parameters_back(k: float, lam: float) -> None:
    """Counts proportional to the true probabilities: the maximum is the truth itself."""
    lower, upper = bin_edges(np.concatenate(([UNDERFLOW], np.arange(LOWEST, HIGHEST + 1))))
    with np.errstate(divide="ignore", over="ignore"):
        a = np.exp(k * (np.log(lower) - math.log(lam)))
        b = np.exp(k * (np.log(upper) - math.log(lam)))
        a, b = np.minimum(a, 800), np.minimum(b, 900)
        counts = 1e6 * np.exp(-a) * -np.expm1(a - b)
    counts[counts < 1e-12] = 0
    fit = fit_weibull(lower, upper, counts)
    assert fit is not None
    assert fit.parameters["k"] == pytest.approx(k, rel=1e-9)
    assert fit.parameters["lambda"] == pytest.approx(lam, rel=1e-8)
    assert fit.ks < 1e-9
    assert all(0 < se < math.inf for se in fit.standard_errors.values())


@pytest.mark.parametrize("k", [0.5, 2.0])
def test_standard_errors_match_the_spread_over_replicates(k: float) -> None:
    """(R−1)·s²/σ² is χ² with R−1 degrees of freedom: bounds that fail once in 10,000."""
    replicates, n = 200, 2000
    fits = [
        (fit_weibull(*binned(x)), fit_weibull_samples(x))
        for x in (draw(k, 2.0, n, seed=1000 + r) for r in range(replicates))
    ]
    low, high = scipy.stats.chi2.ppf([5e-5, 1 - 5e-5], replicates - 1) / (replicates - 1)
    for way in (0, 1):
        mine = [pair[way] for pair in fits]
        for name in ("k", "lambda"):
            values = np.array([f.parameters[name] for f in mine if f is not None])
            errors = np.array([f.standard_errors[name] for f in mine if f is not None])
            assert len(values) == replicates
            assert low < values.var(ddof=1) / (errors**2).mean() < high


# --- the likelihood is the one that is stated ---------------------------------------------------


@pytest.mark.parametrize("k", [0.4, 1.5])
def test_the_histogram_fit_maximises_the_interval_censored_likelihood(k: float) -> None:
    histogram = binned(draw(k, 5.0, 300, seed=3))
    check_is_the_maximum_of_bins(histogram)


def test_coarse_bins_with_gaps_and_both_ends_open() -> None:
    histogram = (
        np.array([0.0, 1.0, 3.0, 4.0, 50.0]),
        np.array([0.5, 2.0, 4.0, 9.0, math.inf]),
        np.array([7.0, 4.0, 0.0, 3.0, 2.0]),
    )
    check_is_the_maximum_of_bins(histogram)


def test_two_bins_with_a_gap_are_enough() -> None:
    histogram = (np.array([1.0, 4.0]), np.array([2.0, 5.0]), np.array([3.0, 2.0]))
    check_is_the_maximum_of_bins(histogram)


def test_many_zeros_are_handled_as_an_interval_from_zero() -> None:
    """Half of the counts below 2^-1022, the rest near 1: k is tiny, and finite."""
    histogram = binned(np.concatenate([np.zeros(100), draw(1.0, 1.0, 100, seed=5)]))
    fit = fit_weibull(*histogram)
    check_is_the_maximum(fit, exact_bins_likelihood(histogram), histogram[2].sum())


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.integers(LOWEST, 400), st.integers(1, 10**6), min_size=3, max_size=8))
@example({-8000: 1, 0: 10**6, 1: 10**6, 2: 10**6})
@example({0: 10**6, 1: 10**6, 2: 10**6, 400: 1})
@example({0: 10**6, 1: 1, 2: 10**6})
@example({0: 10**6, 200: 1, 400: 1})
def test_any_histogram_of_three_bins_has_its_maximum_found(rows: dict[int, int]) -> None:
    bins = np.array(sorted(rows))
    histogram = (*bin_edges(bins), np.array([float(rows[b]) for b in bins.tolist()]))
    check_is_the_maximum_of_bins(histogram)


def test_the_histogram_fit_agrees_with_scipy_for_censored_data() -> None:
    low, high, counts = binned(draw(0.7, 1.0, 400, seed=8))
    rows = np.repeat(np.column_stack((low, high)), counts.astype(int), axis=0)
    data = scipy.stats.CensoredData(interval=rows)
    shape, _, scale = scipy.stats.weibull_min.fit(data, floc=0)
    fit = fit_weibull(low, high, counts)
    assert fit is not None
    assert fit.parameters["k"] == pytest.approx(shape, rel=1e-4)
    assert fit.parameters["lambda"] == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("k", [0.2, 1.0, 5.0])
def test_the_sample_fit_maximises_the_likelihood(k: float) -> None:
    x = draw(k, 1e-6, 60, seed=11)
    check_is_the_maximum(fit_weibull_samples(x), exact_samples_likelihood(x), len(x))


def test_the_sample_fit_solves_the_profile_equation() -> None:
    """1/k + mean(log x) = Σ x^k log x / Σ x^k, the textbook's equation for the shape."""
    x = draw(0.6, 1.0, 500, seed=12)

    def profile(k: float) -> float:
        return float(1 / k + np.log(x).mean() - (x**k * np.log(x)).sum() / (x**k).sum())

    k = scipy.optimize.brentq(profile, 0.01, 10, xtol=1e-14)
    fit = fit_weibull_samples(x)
    assert fit is not None
    assert fit.parameters["k"] == pytest.approx(k, rel=1e-10)
    assert fit.parameters["lambda"] == pytest.approx((x**k).mean() ** (1 / k), rel=1e-10)
    direct = scipy.stats.weibull_min.logpdf(x, k, scale=fit.parameters["lambda"]).sum()
    assert fit.log_likelihood == pytest.approx(direct, rel=1e-10)


@pytest.mark.parametrize("outlier", [1e-300, 1e300])
def test_one_outlier_far_away_does_not_stop_the_fit(outlier: float) -> None:
    x = np.append(draw(2.0, 1.0, 300, seed=13), outlier)
    check_is_the_maximum(fit_weibull_samples(x), exact_samples_likelihood(x), len(x))
    histogram = binned(x)
    check_is_the_maximum_of_bins(histogram)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.02, 30), st.floats(-3, 3), st.floats(-3, 3), st.floats(1e-3, 3))
@pytest.mark.slow
def test_slopes_of_a_bin_match_derivatives_by_mpmath(
    k: float, log_lam: float, low: float, width: float
) -> None:
    for lo, hi in ((low, low + width), (-math.inf, low + width), (low, math.inf)):

        def log_p(x: object, y: object, lo: float = lo, hi: float = hi) -> object:
            below = mp.exp(-mp.exp(mp.exp(x) * (lo - y))) if math.isfinite(lo) else mp.mpf(1)
            above = mp.exp(-mp.exp(mp.exp(x) * (hi - y))) if math.isfinite(hi) else mp.mpf(0)
            return mp.log(below - above)

        if k * (max(lo, -50) - log_lam) > 6:  # a probability of e^-400: needs more digits
            continue
        theta, edges = np.array([[math.log(k), log_lam]]), np.array([lo, hi])
        with mp.workdps(300):
            at = tuple(map(mp.mpf, theta[0].tolist()))
            exact = float(log_p(*at))
            orders = ((1, 0), (0, 1), (3, 0), (0, 3))
            *by_theta, third, other = (float(mp.diff(log_p, at, order)) for order in orders)
        terms = lambda t, edges=edges: WEIBULL.log_mass(t, edges)  # noqa: E731
        assert terms(theta)[0, 0] == pytest.approx(exact, rel=1e-9, abs=1e-15)
        # A central difference of step h is off by h²/6 of the third derivative, beside rounding,
        # which h divides.
        bend = np.abs([third, other]) * 1e-10 / 6
        rounding = 1e-7 * max(map(abs, (exact, *by_theta))) + 1e-10
        found = slopes(terms, theta)[0, :, 0]
        assert (np.abs(found - by_theta) <= 1.5 * bend + rounding).all()


# --- invariances ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(-300, 300), st.integers(1, 10**9), min_size=3, max_size=20),
    st.integers(-900, 900),
)
def test_scaling_by_a_power_of_two_scales_lambda_exactly(rows: dict[int, int], j: int) -> None:
    bins = np.array(sorted(rows))
    counts = np.array([[float(rows[b]) for b in bins.tolist()]])
    (fit,), (scaled,) = fit_weibulls(bins, counts), fit_weibulls(bins + 8 * j, counts)
    assert fit and {*fit} == {*scaled}
    for name, values in fit.items():
        power = j if name == "lambda" else 0
        assert scaled[name] == pytest.approx(
            [math.ldexp(v, power) for v in values], rel=0, nan_ok=True
        )


def test_scaling_samples_scales_lambda() -> None:
    x = draw(0.5, 1.0, 200, seed=21)
    fit, scaled = fit_weibull_samples(x), fit_weibull_samples(x * 2.0**-500)
    assert fit is not None and scaled is not None
    assert scaled.theta[0] == pytest.approx(fit.theta[0], rel=1e-9)
    assert scaled.theta[1] == pytest.approx(fit.theta[1] - 500 * math.log(2), rel=1e-12)


def test_empty_bins_change_nothing() -> None:
    low, high, counts = binned(draw(1.0, 1.0, 500, seed=23))
    everywhere = bin_edges(np.arange(-400, 200))
    spread = np.zeros(600)
    spread[np.searchsorted(everywhere[0], low)] = counts
    assert fit_weibull(*everywhere, spread) == fit_weibull(low, high, counts)


# --- goodness of fit ----------------------------------------------------------------------------


def test_ks_of_a_histogram_is_the_largest_distance_at_any_edge() -> None:
    low, high = np.array([0.0, 1.0, 2.0, 8.0, 40.0]), np.array([1.0, 2.0, 4.0, 9.0, math.inf])
    counts = np.array([10.0, 60.0, 5.0, 20.0, 5.0])
    fit = fit_weibull(low, high, counts)
    assert fit is not None
    k, lam = fit.parameters["k"], fit.parameters["lambda"]
    shares = {0.0: 0.0, 1.0: 0.1, 2.0: 0.7, 4.0: 0.75, 8.0: 0.75, 9.0: 0.95, 40.0: 0.95}
    distances = [abs(share - (1 - math.exp(-((x / lam) ** k)))) for x, share in shares.items()]
    assert fit.ks == pytest.approx(max(distances), rel=1e-9)


def test_ks_of_a_histogram_sees_the_edge_behind_a_gap() -> None:
    """Nearly all lies in [8, 10): F_fit passes F_empirical by most just before it, at 8."""
    fit = fit_weibull([0.0, 1.0, 8.0, 9.0], [1.0, 2.0, 9.0, 10.0], [1, 1, 50, 50])
    assert fit is not None
    k, lam = fit.parameters["k"], fit.parameters["lambda"]
    shares = {1.0: 1 / 102, 2.0: 2 / 102, 8.0: 2 / 102, 9.0: 52 / 102, 10.0: 1.0}
    distances = {x: abs(s - (1 - math.exp(-((x / lam) ** k)))) for x, s in shares.items()}
    assert max(distances, key=lambda x: distances[x]) == 8.0
    assert fit.ks == pytest.approx(distances[8.0], rel=1e-9)


# --- nothing to fit, and bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    "histogram",
    [
        ([], [], []),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [0, 0, 0]),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [0, 9, 0]),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [4, 9, 0]),  # two that touch: ever steeper
        ([0.0, 2.0, 3.0], [2.0, 3.0, math.inf], [4, 0, 9]),  # both ends open: ever flatter
    ],
)
def test_a_histogram_without_a_maximum_has_no_fit(histogram: tuple[list[float], ...]) -> None:
    assert fit_weibull(*histogram) is None


@pytest.mark.parametrize(
    ("bins", "counts"),
    [
        # almost all below 2^-1022: the median, and with it λ, is no float64
        ([UNDERFLOW, 0, 16], [10**9, 1, 1]),
        # almost all above 1.875·2^1023
        ([0, 16, HIGHEST], [1, 1, 10**9]),
    ],
)
def test_an_estimate_beyond_float64_is_no_fit(bins: list[int], counts: list[int]) -> None:
    assert fit_weibulls(np.array(bins), np.array([counts], float)) == [{}]


def test_a_wild_start_finds_its_way_back() -> None:
    """Hazards of exp(900) on the way: refused, and the steps shortened."""
    x = draw(1.0, 1.0, 300, seed=33)
    wild = dataclasses.replace(
        WEIBULL, start=lambda mean, sd: np.stack([6.8 - np.log(sd), mean], axis=1)
    )
    for fit, usual in (
        (fit_weibull(*binned(x), family=wild), fit_weibull(*binned(x))),
        (fit_weibull_samples(x, wild), fit_weibull_samples(x)),
    ):
        assert fit is not None and usual is not None
        assert fit.parameters == pytest.approx(usual.parameters, rel=1e-9)


@pytest.mark.parametrize("x", [[], [1.0], [0.1, 0.1, 0.1]])
def test_fewer_than_two_distinct_samples_have_no_fit(x: list[float]) -> None:
    assert fit_weibull_samples(x) is None


def test_an_exponential_has_its_closed_form() -> None:
    """λ = mean(x), with a standard error of λ/√n."""
    x = draw(1.0, 40.0, 5000, seed=31)
    fit = fit_weibull_samples(x, EXPONENTIAL)
    from_bins = fit_weibull(*binned(x), family=EXPONENTIAL)
    assert fit is not None and from_bins is not None
    mean = x.mean()
    assert fit.parameters == {"lambda": pytest.approx(mean, rel=1e-10)}
    assert fit.standard_errors == {"lambda": pytest.approx(mean / math.sqrt(5000), rel=1e-6)}
    assert fit.log_likelihood == pytest.approx(-5000 * math.log(mean) - 5000, rel=1e-12)
    assert from_bins.parameters["lambda"] == pytest.approx(mean, rel=1e-3)


def test_one_parameter_is_found_from_two_bins_that_touch() -> None:
    """F(1) = 1/4 of what lies in [0, 1) and [1, 100): λ = −1/log(3/4)."""
    fit = fit_weibull([0.0, 1.0], [1.0, 100.0], [1, 3], EXPONENTIAL)
    assert fit is not None
    assert fit.parameters["lambda"] == pytest.approx(-1 / math.log(0.75), rel=1e-9)


@pytest.mark.parametrize("term", [0.0, math.nan, -math.inf], ids=["flat", "unknown", "impossible"])
def test_a_likelihood_that_does_not_settle_gives_no_fit(term: float) -> None:
    def same(theta: Floats, y: Floats) -> Floats:
        return np.full((len(theta), np.shape(y)[-1]), term)

    def log_mass(self: Family, theta: Floats, edges: Floats) -> Floats:
        return same(theta, edges[..., 1:])

    kind = type("Broken", (Family,), {"log_mass": log_mass})
    broken = kind("broken", True, WEIBULL.log_tails, same, WEIBULL.start)
    assert fit_weibull([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [1, 1, 1], broken) is None
    assert fit_weibull_samples([1.0, 2.0, 3.0], broken) is None
