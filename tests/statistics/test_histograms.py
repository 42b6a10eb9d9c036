"""Histograms against exact rational arithmetic."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lcray.statistics.histograms import HIGHEST, LOWEST, UNDERFLOW, bin_edges
from lcray.tables.writing.layer_histograms import LayerHistograms

TINY = sys.float_info.min  # 2^-1022, the smallest normal float64
EPSILON = sys.float_info.epsilon

magnitudes = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)


def slow_edges(index: int) -> tuple[Fraction, Fraction]:
    """The edges by their definition."""
    if index == UNDERFLOW:
        return Fraction(0), Fraction(1, 2**1022)
    e, m = divmod(index, 8)
    unit = Fraction(2) ** e
    return (1 + Fraction(m, 8)) * unit, (1 + Fraction(m + 1, 8)) * unit


def bins_of(values: list[float]) -> list[int]:
    """The bins of one layer's values that are not empty."""
    lc = torch.tensor(values, dtype=torch.float64)
    histograms = LayerHistograms(1)
    block = slice(0, len(lc)), [(0, slice(0, len(lc)))]
    histograms.add(lc, [block], np.array([values.count(0.0)]))
    return histograms.nonzero()[2].tolist()


@pytest.mark.parametrize("e", [-1022, -1021, -300, -1, 0, 1, 52, 1022, 1023])
@pytest.mark.parametrize("m", range(8))
def test_an_edge_begins_its_bin_and_the_number_before_it_is_in_the_bin_before(
    e: int, m: int
) -> None:
    edge = math.ldexp(1 + m / 8, e)
    before = float(np.nextafter(edge, 0))
    after = float(np.nextafter(edge, math.inf))
    first = UNDERFLOW if (e, m) == (-1022, 0) else 8 * e + m - 1
    assert bins_of([before]) == [first]
    assert bins_of([edge]) == [8 * e + m]
    assert bins_of([after]) == [8 * e + m]


@given(magnitudes)
@example(sys.float_info.max)
@example(0.0)
@example(TINY)
def test_edges_hold_their_values_and_are_exact(x: float) -> None:
    bins = bins_of([x])
    (lower,), (upper,) = bin_edges(np.array(bins))
    assert lower <= x < upper
    exact = slow_edges(bins[0])
    assert Fraction(float(lower)) == exact[0]
    assert math.isinf(upper) if bins[0] == HIGHEST else Fraction(float(upper)) == exact[1]


def test_edges_leave_no_gap_over_the_whole_range() -> None:
    lower, upper = bin_edges(np.concatenate(([UNDERFLOW], np.arange(LOWEST, HIGHEST + 1))))
    assert (lower[1:] == upper[:-1]).all()
    assert (lower < upper).all()
    assert lower[0] == 0.0 and upper[0] == TINY and upper[-1] == math.inf


@pytest.mark.parametrize("wrong", [UNDERFLOW - 1, UNDERFLOW + 1, LOWEST - 1, HIGHEST + 1])
def test_indices_that_are_no_bins_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"^{wrong} is no histogram bin"):
        bin_edges(np.array([0, wrong]))
