"""Histograms against exact rational arithmetic."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcray.statistics.histograms import (
    HIGHEST,
    LOWEST,
    UNDERFLOW,
    LayerHistograms,
    bin_edges,
)

TINY = sys.float_info.min  # 2^-1022, the smallest normal float64
EPSILON = sys.float_info.epsilon

magnitudes = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)
signed = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 5e-324])


def slow_bin(x: float) -> int:
    """The bin by its definition: x in [(1 + m/8)·2^e, (1 + (m+1)/8)·2^e), in fractions."""
    if x < TINY:
        return UNDERFLOW
    _, power = math.frexp(x)  # x = mantissa·2^power, mantissa in [1/2, 1)
    e = power - 1
    m = math.floor((Fraction(x) / Fraction(2) ** e - 1) * 8)
    return 8 * e + m


def slow_edges(index: int) -> tuple[Fraction, Fraction]:
    """The edges by their definition."""
    if index == UNDERFLOW:
        return Fraction(0), Fraction(1, 2**1022)
    e, m = divmod(index, 8)
    unit = Fraction(2) ** e
    return (1 + Fraction(m, 8)) * unit, (1 + Fraction(m + 1, 8)) * unit


def bins_of(values: list[float]) -> list[int]:
    """The bins of one layer's values that are not empty."""
    histograms = LayerHistograms(1)
    histograms.add(np.array(values), np.array([0]), np.array([0]))
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


def rows_by_definition(layers: dict[int, list[float]]) -> dict[tuple[int, int, int], list[float]]:
    """The magnitudes of each (layer, sign, bin)."""
    found: dict[tuple[int, int, int], list[float]] = {}
    for layer, values in layers.items():
        for v in values:
            key = layer, (v > 0) - (v < 0), slow_bin(abs(v))
            found.setdefault(key, []).append(abs(v))
    return found


def check_layers(histograms: LayerHistograms, layers: dict[int, list[float]]) -> None:
    """Rows in order, counts exactly, sums to the bound of adding up in any order."""
    expected = rows_by_definition(layers)
    numbers, signs, bins, counts, sums = (a.tolist() for a in histograms.nonzero())
    assert list(zip(numbers, signs, bins, strict=True)) == sorted(expected)
    for key, count, total in zip(sorted(expected), counts, sums, strict=True):
        here = expected[key]
        assert count == len(here)
        exact = float(sum(map(Fraction, here))) if sum(map(Fraction, here)) < 2**1023 else math.inf
        if math.isinf(exact) or math.isinf(total):
            assert total >= sys.float_info.max / 4
        else:
            assert abs(total - exact) <= len(here) * EPSILON * exact


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.lists(signed, max_size=9), min_size=5, max_size=5), max_size=4),
    st.sampled_from([1, 20]),
)
@example([[[-0.0, 0.0, 5e-324, -5e-324, -1.0, -TINY, TINY], [], [-1e300], [0.0], []]], 1)
@example([[[0.0], [], [], [-0.0], []], [[5e-324], [], [TINY], [1e308, 1e308], [1.0]]], 1)
@example([[[], [], [], [3.0, -7.0, 1e-308], []], [[3.0], [], [], [], []]], 1)
@example([[[1.0, -2.0], [], [], [4.0], []], [[0.25], [64.0], [], [], [-0.0]]], 300)
def test_histograms_of_many_layers_match_the_definition(
    blocks: list[list[list[float]]], times: int
) -> None:
    # Few values a layer go one by one into the arrays, many into a table of the block first.
    histograms, all_values = LayerHistograms(5), {layer: list[float]() for layer in range(5)}
    for block in blocks:
        held = {layer: values * times for layer, values in enumerate(block) if values}
        if held:
            lengths = [len(values) for values in held.values()]
            histograms.add(
                np.array([v for values in held.values() for v in values]),
                np.array(list(held)),
                np.cumsum([0, *lengths[:-1]]),
            )
        for layer, values in held.items():
            all_values[layer] += values
    check_layers(histograms, all_values)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_histograms_of_many_layers_refuse_non_finite_values(bad: float) -> None:
    histograms = LayerHistograms(2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        histograms.add(np.array([1.0, bad]), np.array([0, 1]), np.array([0, 1]))
    assert [len(a) for a in histograms.nonzero()] == [0] * 5
