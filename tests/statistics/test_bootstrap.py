from __future__ import annotations

import numpy as np
import pytest

from lcray.statistics.bootstrap import FEWEST, Bootstrap, block_length, multiplicities


def autoregressive(rho: float, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """AR(1) along the first axis, stationary, innovations of variance 1."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=shape)
    x = np.empty(shape)
    x[0] = noise[0] / np.sqrt(1 - rho**2)
    for t in range(1, len(x)):
        x[t] = rho * x[t - 1] + noise[t]
    return x


def variance_of_sum(rho: float, n: int) -> float:
    """Σ_ij ρ^|i−j| / (1 − ρ²), by its definition."""
    lags = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    return float((rho**lags).sum() / (1 - rho**2))


@pytest.mark.parametrize(("n", "length"), [(10, 1), (10, 3), (7, 7), (7, 100), (9, 4)])
def test_every_resample_has_n_iterations_in_blocks(n: int, length: int) -> None:
    found = np.concatenate([*multiplicities(n, length, 50, np.random.default_rng(0))])
    assert found.shape == (50, n)
    assert (found.sum(axis=1) == n).all()
    assert (found == found.astype(int)).all() and (found >= 0).all()
    if length >= n:
        assert (found == 1).all()
    else:
        assert found.std() > 0


@pytest.mark.parametrize("length", [1, 4, 9, 20])
def test_every_iteration_is_drawn_once_on_average(length: int) -> None:
    """The first and last as often as the rest, so that resamples are centred at the data's sum."""
    found = np.concatenate([*multiplicities(20, length, 20_000, np.random.default_rng(0))])
    error = found.std(axis=0) / np.sqrt(len(found))
    assert np.abs(found.mean(axis=0) - 1) == pytest.approx(0, abs=1e-12 + 4.5 * error.max())
    fast = -np.exp(-np.arange(100) / 3)[:, None]  # a loss that falls within the first block
    sums = Bootstrap(0, replicates=4000, length=8).sums(fast)
    assert sums is not None
    error = float(sums.std() / np.sqrt(len(sums)))
    assert float(sums.mean()) == pytest.approx(float(fast.sum()), abs=4.5 * error)


def test_the_variance_of_the_mean_of_an_autoregression() -> None:
    """Known exactly; independent draws miss it by (1 + ρ)/(1 − ρ) = 9, blocks by a tenth or two."""
    n, rho = 1500, 0.8
    x = autoregressive(rho, (n, 24), 1)
    truth = variance_of_sum(rho, n)
    blocks = np.mean([Bootstrap(i, 200).sums(x[:, [i]]).var() for i in range(24)])
    alone = np.mean([Bootstrap(i, 200, length=1).sums(x[:, [i]]).var() for i in range(24)])
    assert 0.72 * truth < blocks < 1.15 * truth
    assert alone < truth / 7


def test_block_lengths_are_those_of_the_theory() -> None:
    """B of an AR(1) from its exact covariances: G = Σ|k|R(k), D = 4/3 (ΣR(k))²."""
    n, rho = 1500, 0.8
    k = np.arange(-400, 401)
    covariance = rho ** np.abs(k) / (1 - rho**2)
    g, d = (np.abs(k) * covariance).sum(), 4 / 3 * covariance.sum() ** 2
    expected = (2 * g**2 / d * n) ** (1 / 3)
    x = autoregressive(rho, (n, 24), 2)
    found = np.array([block_length(x[:, [i]]) for i in range(24)])
    assert np.median(found) == pytest.approx(expected, rel=0.35)
    assert block_length(x) == found.max()
    white = np.random.default_rng(0).normal(size=(n, 24))
    assert np.median([block_length(white[:, [i]]) for i in range(24)]) <= 4


def test_constants_and_few_iterations() -> None:
    assert block_length(np.full((50, 2), 0.1)) == 1
    assert Bootstrap().sums(np.ones((FEWEST - 1, 1))) is None
    sums = Bootstrap(replicates=20).sums(np.ones((FEWEST, 1)))
    assert sums is not None and (sums == FEWEST).all()


def test_what_no_resample_has_gets_no_error() -> None:
    """Such as the share of helping elements in a frozen layer; warnings are errors here."""
    drawn = np.stack([np.arange(101.0), np.full(101, np.nan), np.r_[1.0, np.full(100, np.nan)]], 1)
    se, low, high = Bootstrap(level=0.9).interval(drawn)
    assert se[0] == pytest.approx(drawn[:, 0].std(ddof=1))
    assert (low[0], high[0]) == pytest.approx((5, 95))
    assert np.isnan([se[1:], low[1:], high[1:]]).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replicate sums what its own multiplicities say, however few are held at once."""
    x = np.random.default_rng(0).normal(size=(40, 3))
    whole = Bootstrap(5, replicates=30, length=4).sums(x)
    assert whole is not None and np.array_equal(whole, Bootstrap(5, 30, 0.95, 4).sums(x))
    monkeypatch.setattr("lcray.statistics.bootstrap._CHUNK", 41)
    parts = Bootstrap(5, replicates=30, length=4).sums(x)
    assert parts is not None and parts.shape == whole.shape
    rows = [*multiplicities(40, 4, 30, np.random.default_rng(5))]
    assert len(rows) == 30
    assert parts == pytest.approx(np.concatenate(rows) @ x, rel=1e-12)


@pytest.mark.slow
def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    n, rho, trials = 400, 0.6, 400
    x = autoregressive(rho, (n, trials), 3)
    hits = 0
    for i in range(trials):
        draws = Bootstrap(i, replicates=400)
        sums = draws.sums(x[:, [i]])
        assert sums is not None
        _, low, high = draws.interval(sums)
        hits += int(low[0] <= 0 <= high[0])
    assert 0.88 < hits / trials < 0.98
