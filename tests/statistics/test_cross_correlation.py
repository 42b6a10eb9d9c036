"""Lags: planted by momentum, where they can be computed, and signals that share nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import kstest

from lcray.errors import UsageError
from lcray.statistics.bootstrap import Bootstrap
from lcray.statistics.cross_correlation import default_max_lag, lag_of_peak

QUICK = Bootstrap(replicates=200)


def gradients(rho: float, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Autoregressive, of order 1: correlations rho^|k|."""
    noise = np.random.default_rng(seed).normal(size=(shape[0] + 200, shape[1]))
    return lfilter([1.0], [1.0, -rho], noise, axis=0)[200:]


def with_momentum(force: np.ndarray, beta: float) -> np.ndarray:
    """Movements by SGD: v ← βv + force."""
    return lfilter([1.0], [1.0, -beta], force, axis=0)


def expected_correlation(tau: np.ndarray, beta: float, rho: float) -> np.ndarray:
    """Of an exponential average with an AR(1) signal: Σ_j β^j ρ^|τ−j|, summed directly."""
    j = np.arange(20_000)[:, None]
    found: np.ndarray = (beta**j * rho ** np.abs(tau[None] - j)).sum(axis=0)
    return found


@pytest.mark.parametrize(("beta", "rho"), [(0.9, 0.8), (0.7, 0.9), (0.95, 0.9)])
def test_momentum_lags_as_computed(beta: float, rho: float) -> None:
    force = gradients(rho, (4000, 60))
    found = lag_of_peak(with_momentum(force, beta), force, max_lag=25, bootstrap=QUICK)
    assert found is not None
    expected = expected_correlation(found.lags, beta, rho)
    planted = int(found.lags[expected.argmax()])
    assert planted > 0
    assert found.lag_lower <= planted <= found.lag_upper
    assert abs(found.lag - planted) <= 1
    assert found.p_value < 0.01
    # The standard deviations of both signals, from their spectra.
    norm = np.sqrt((1 + beta * rho) / ((1 - beta**2) * (1 - beta * rho)))
    assert found.correlation == pytest.approx(expected / norm, abs=0.03)
    assert (found.lower <= found.correlation).all() and (found.correlation <= found.upper).all()


def test_without_momentum_there_is_no_lag() -> None:
    force = gradients(0.8, (600, 20))
    noisy = 0.1 * force + 0.1 * np.random.default_rng(1).normal(size=force.shape)
    found = lag_of_peak(noisy, force, bootstrap=QUICK)
    assert found is not None
    assert (found.lag, found.lag_lower, found.lag_upper) == (0, 0, 0)
    assert (found.n_elements, found.n_intervals) == (20, 500)


@pytest.mark.parametrize("shift", [-4, 3])
def test_a_planted_shift_and_its_sign(shift: int) -> None:
    """Positive where the first signal comes later; a mean and a slope change nothing."""
    signal = np.random.default_rng(2).normal(size=(300, 8))
    follower = np.roll(signal, shift, axis=0)
    slope = np.linspace(0, 50, 300)[:, None]
    for x, trend in ((follower + 7, "constant"), (follower + slope, "linear"), (follower, "none")):
        found = lag_of_peak(x, signal, max_lag=10, trend=trend, bootstrap=QUICK)
        assert found is not None
        assert (found.lag, found.lag_lower, found.lag_upper) == (shift, shift, shift)


def test_the_phase_of_an_oscillation() -> None:
    """A sine of period 24 through momentum β: its phase is arg 1/(1 − β e^{−iω})."""
    omega, beta = 2 * np.pi / 24, 0.9
    phases = np.random.default_rng(3).uniform(0, 2 * np.pi, 30)
    force = np.sin(omega * np.arange(3000)[:, None] + phases)
    found = lag_of_peak(with_momentum(force, beta), force, max_lag=11, bootstrap=QUICK)
    assert found is not None
    delay = -np.angle(1 / (1 - beta * np.exp(-1j * omega))) / omega
    assert found.lag == round(delay)


def test_p_values_are_uniform_under_the_null() -> None:
    """Independent signals, each autocorrelated: the resampled blocks take that into account."""
    found = []
    for trial in range(120):
        x, y = (gradients(0.5, (500, 10), seed=2 * trial + i) for i in (0, 1))
        lag = lag_of_peak(x, y, max_lag=10, bootstrap=Bootstrap(seed=trial, replicates=200))
        assert lag is not None
        found.append(lag.p_value)
    assert kstest(found, "uniform").pvalue > 0.05


def test_elements_that_do_not_vary_or_are_not_known() -> None:
    signal = np.random.default_rng(4).normal(size=(300, 6))
    follower = np.roll(signal, 2, axis=0)
    follower[:, 0] = 0.1  # frozen: its mean is not 0.1 to the last bit
    signal[:, 1] = 0.0
    signal[100:110] = np.nan
    found = lag_of_peak(follower, signal, max_lag=5, bootstrap=QUICK)
    assert found is not None
    assert (found.lag, found.n_elements) == (2, 4)
    assert np.isfinite(found.correlation).all()
    assert lag_of_peak(np.full((300, 2), 0.1), signal[:, :2], bootstrap=QUICK) is None
    assert lag_of_peak(np.full((300, 2), np.nan), signal[:, :2], bootstrap=QUICK) is None


def test_what_is_too_short_or_cannot_be_asked_for() -> None:
    signal = np.random.default_rng(5).normal(size=(27, 2))
    assert lag_of_peak(signal, signal, max_lag=10) is None
    assert lag_of_peak(signal, signal, max_lag=9) is not None
    assert default_max_lag(27) == 5
    assert default_max_lag(10_000) == 50
    with pytest.raises(UsageError, match="trend 'cubic': must be one of none, constant, linear"):
        lag_of_peak(signal, signal, trend="cubic")
    with pytest.raises(UsageError, match="max_lag -1: must be at least 0"):
        lag_of_peak(signal, signal, max_lag=-1)
