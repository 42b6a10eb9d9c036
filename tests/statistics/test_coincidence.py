"""Peaks of learning and their coincidences: planted ones, and nulls where there is nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import hypergeom, kstest

from lcray.statistics.coincidence import (
    block_bounds,
    pairwise_coincidences,
    peaks,
    total_coincidences,
)


def test_peaks_are_the_deepest_local_minima_below_zero() -> None:
    lc = np.array([-9.0, -1, -3, -2, -2.5, 1, 0.5, 1, -1, -1, 0, -7])
    #                   neighbours: -3 and -2.5 are minima, 0.5 is one above 0, -1 -1 a plateau,
    #                   and the ends have one neighbour only
    found = peaks(np.stack([lc, lc], axis=1))
    assert np.flatnonzero(found[:, 0]).tolist() == [2, 4, 8]
    assert np.array_equal(found[:, 0], found[:, 1])
    assert np.flatnonzero(peaks(lc[:, None], count=1)).tolist() == [2]
    assert np.flatnonzero(peaks(lc[:, None], count=2)).tolist() == [2, 4]
    assert np.flatnonzero(peaks(lc[:, None], distance=3)).tolist() == [2, 8]
    # -2.5 rises 0.5 above the saddle at -2, the others more
    assert np.flatnonzero(peaks(lc[:, None], prominence=0.6 / lc.std())).tolist() == [2, 8]


def test_the_null_of_a_block_is_hypergeometric() -> None:
    """Of one block, all at once: several pairs whose numbers of peaks differ."""
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 60, 300):
        flags = rng.random((size, 9)) < rng.random(9)
        found, n = pairwise_coincidences(flags, block=size), flags.sum(axis=0)
        for pair, (a, b) in enumerate(zip(found.first, found.second, strict=True)):
            expected = hypergeom.pmf(np.arange(found.null.shape[1]), size, n[a], n[b])
            assert found.null[pair] == pytest.approx(expected, rel=1e-10, abs=1e-300)


def test_where_nothing_is_known_there_is_no_peak() -> None:
    lc = np.array([0.0, -1, 0, np.nan, -2, 0, np.nan, np.nan])
    assert np.flatnonzero(peaks(lc[:, None])).tolist() == [1, 4]
    assert not peaks(np.full((5, 1), np.nan), prominence=1.0).any()
    assert not peaks(np.zeros((5, 2))).any()
    assert not peaks(np.zeros((0, 2))).any()


def test_blocks_cover_everything_and_are_even() -> None:
    assert block_bounds(103, 50).tolist() == [0, 52, 103]
    assert block_bounds(20, 50).tolist() == [0, 20]
    chosen = [len(block_bounds(n, None)) - 1 for n in (1, 9, 60, 400, 1000, 10_000)]
    assert chosen == [1, 1, 6, 20, 20, 200]  # of 10 to 50 intervals
    assert block_bounds(100, 25).tolist() == [0, 25, 50, 75, 100]


def test_the_null_of_a_pair_is_that_of_all_permutations() -> None:
    flags = np.array([[1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0, 0]], bool).T
    halves = (slice(0, 4), slice(4, 7))
    found = pairwise_coincidences(flags, block=4)
    counts = []
    for one in itertools.product(
        *(set(itertools.permutations(flags[half, 0].tolist())) for half in halves)
    ):
        for two in itertools.product(
            *(set(itertools.permutations(flags[half, 1].tolist())) for half in halves)
        ):
            a, b = (np.array(list(itertools.chain(*parts))) for parts in (one, two))
            counts.append(int((a & b).sum()))
    expected = np.bincount(counts) / len(counts)
    assert found.null[0, : len(expected)] == pytest.approx(expected, abs=1e-14)
    assert found.null[0, len(expected) :] == pytest.approx(0.0, abs=1e-14)
    assert found.observed.tolist() == [2]
    assert found.expected[0] == pytest.approx(np.mean(counts))
    assert found.p_value[0] == pytest.approx(np.mean(np.array(counts) >= 2))


def test_the_mean_of_all_pairs_is_that_of_the_permutations() -> None:
    flags = np.random.default_rng(3).random((60, 5)) < 0.2
    pairs = pairwise_coincidences(flags, block=20)
    found = total_coincidences(flags, block=20, permutations=4000)
    assert found.observed == pairs.observed.sum()
    assert found.expected == pytest.approx(pairs.expected.sum())
    spread = found.null.std() / np.sqrt(len(found.null))
    assert abs(found.null.mean() - found.expected) < 4 * spread
    # Under the null pairs are uncorrelated, so that their variances add up.
    k = np.arange(pairs.null.shape[1])
    variance = ((pairs.null @ k**2) - (pairs.null @ k) ** 2).sum()
    assert found.null.var() == pytest.approx(variance, rel=0.15)


def test_planted_peaks_are_found() -> None:
    random = np.random.default_rng(0)
    lc = random.normal(size=(400, 6))
    together = np.arange(10, 400, 40)
    lc[together, :4] = -8.0 - random.random((len(together), 4))  # four layers of six
    flags = peaks(lc, count=20)
    found = pairwise_coincidences(flags)
    planted = (found.first < 4) & (found.second < 4)
    assert (found.observed[planted] >= 10).all()
    assert found.p_value[planted].max() < 1e-4
    assert np.median(found.p_value[~planted]) > 0.1
    assert total_coincidences(flags).p_value == 1 / 1000


def independent(random: np.random.Generator, series: int = 2) -> np.ndarray:
    """Peaks of series that share nothing but a rate that decays, 30 or so each."""
    rate = 0.25 * np.exp(-np.arange(1000) / 120)
    return random.random((1000, series)) < rate[:, None]


def by_circular_shifts(flags: np.ndarray, random: np.random.Generator) -> float:
    shifted = [
        int((np.roll(flags[:, 0], shift) & flags[:, 1]).sum())
        for shift in random.integers(1, len(flags), 200)
    ]
    return (1 + sum(n >= (flags[:, 0] & flags[:, 1]).sum() for n in shifted)) / 201


def rejected(test: Callable[[np.ndarray], float], trials: int) -> float:
    random = np.random.default_rng(5)
    return float(np.mean([test(independent(random)) <= 0.05 for _ in range(trials)]))


def test_a_shared_trend_is_no_synchrony() -> None:
    """Permuting in blocks keeps its level; circular shifts would find synchrony all the time."""
    random = np.random.default_rng(6)
    in_blocks = rejected(lambda flags: pairwise_coincidences(flags).p_value[0], 400)
    shifted = rejected(lambda flags: by_circular_shifts(flags, random), 100)
    whole = rejected(lambda flags: pairwise_coincidences(flags, block=1000).p_value[0], 100)
    assert in_blocks < 0.06
    assert shifted > 0.3
    assert whole > 0.3


def test_p_values_are_uniform_under_the_null() -> None:
    """Ties broken at random: a count has a distribution with steps."""
    random = np.random.default_rng(7)
    of_pairs, of_all = [], []
    for trial in range(300):
        flags = random.random((200, 4)) < 0.1
        pairs = pairwise_coincidences(flags)
        more = pairs.p_value - np.take_along_axis(pairs.null, pairs.observed[:, None], 1)[:, 0]
        of_pairs += (more + random.random() * (pairs.p_value - more))[:1].tolist()
        found = total_coincidences(flags, permutations=199, seed=trial)
        above = np.count_nonzero(found.null > found.observed)
        ties = np.count_nonzero(found.null == found.observed)
        assert found.p_value == (1 + above + ties) / 200
        of_all.append((above + random.random() * (1 + ties)) / 200)
    assert kstest(of_pairs, "uniform").pvalue > 0.05
    assert kstest(of_all, "uniform").pvalue > 0.05


def test_the_same_seed_gives_the_same_permutations() -> None:
    flags = independent(np.random.default_rng(0), 4)
    one, two, other = (total_coincidences(flags, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.null, two.null)
    assert not np.array_equal(one.null, other.null)
