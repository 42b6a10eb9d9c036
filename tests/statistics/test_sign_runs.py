"""Flips, runs and net progress: planted half-periods, and independent signs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lcray.statistics.sign_runs import flips, net_share, run_lengths


def square_wave(half_period: int, intervals: int, phases: list[int]) -> np.ndarray:
    t = np.arange(intervals)[:, None] + np.array(phases)
    return np.where(t // half_period % 2 == 0, 1.5, -0.5)


@pytest.mark.parametrize("half_period", [1, 2, 7])
def test_a_planted_half_period(half_period: int) -> None:
    values = square_wave(half_period, 8 * half_period, list(range(half_period)))
    found = run_lengths(values)
    inner = found.complete > 0
    assert found.length[inner].tolist() == [half_period]
    seen, possible = flips(values)
    assert possible.tolist() == [0] + [half_period] * (8 * half_period - 1)
    # Over whole half-periods one element of each phase flips at every interval.
    assert seen[half_period:].tolist() == [1] * (7 * half_period)


def test_runs_against_a_plain_loop() -> None:
    values = np.random.default_rng(0).choice([-2.0, -0.1, 0.0, 0.3, np.nan], (50, 9))
    complete: dict[int, int] = {}
    cut: dict[int, int] = {}
    n_flips = 0
    for column in values.T:
        seen = [0 if math.isnan(x) else int(x > 0) - int(x < 0) for x in column]
        n_flips += sum(a * b == -1 for a, b in itertools.pairwise(seen))
        runs = [(key, len(list(part))) for key, part in itertools.groupby(seen)]
        for i, (key, length) in enumerate(runs):
            if key:
                around = [runs[j][0] if 0 <= j < len(runs) else 0 for j in (i - 1, i + 1)]
                which = complete if around == [-key, -key] else cut
                which[length] = which.get(length, 0) + 1
    found = run_lengths(values)
    assert found.length.tolist() == sorted(complete.keys() | cut.keys())
    assert found.complete.tolist() == [complete.get(n, 0) for n in found.length.tolist()]
    assert found.cut.tolist() == [cut.get(n, 0) for n in found.length.tolist()]
    assert flips(values)[0].sum() == n_flips


def test_independent_signs_flip_half_of_the_time() -> None:
    values = np.random.default_rng(1).normal(size=(2000, 40))
    seen, possible = flips(values)
    pairs = possible.sum()
    assert pairs == 1999 * 40
    assert abs(seen.sum() / pairs - 0.5) < 4 * 0.5 / math.sqrt(pairs)
    found = run_lengths(values)
    runs = found.complete.sum()
    for length in (1, 2, 3):  # P(length) = 2^-length
        share = found.complete[found.length == length][0] / runs
        assert abs(share - 0.5**length) < 4 * math.sqrt(0.5**length / runs)


def test_net_progress() -> None:
    assert net_share(np.array([[1.0, -1], [3, -5]])) == 1.0
    assert net_share(np.array([[1.0, -1], [-1, np.nan], [2, 1]])) == pytest.approx(2 / 6)
    assert net_share(square_wave(1, 10, [0]) + np.array([[-0.5]])) == 0.0
    assert math.isnan(net_share(np.zeros((3, 2))))
    walk = np.random.default_rng(2).normal(size=(400, 2000))
    # E|Σ x| = √(2T/π) and E Σ|x| = T √(2/π)
    assert net_share(walk) == pytest.approx(1 / math.sqrt(400), rel=0.05)


def test_nothing_at_all() -> None:
    for empty in (np.zeros((5, 2)), np.zeros((0, 3)), np.full((4, 1), np.nan)):
        assert run_lengths(empty).length.tolist() == []
        assert flips(empty)[0].sum() == 0
