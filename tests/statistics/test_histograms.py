"""Counts and histograms against exact rational arithmetic."""

from __future__ import annotations

import math
import pickle
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcray.statistics.histograms import (
    HIGHEST,
    LOWEST,
    UNDERFLOW,
    Counts,
    LayerHistograms,
    LogHistogram,
    SignedHistograms,
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


def check_against_slow(histogram: LogHistogram, values: list[float]) -> None:
    """Counts exactly; sums to the bound of adding up n numbers of one sign in any order."""
    bins, counts, sums = histogram.nonzero()
    expected = Counter(slow_bin(v) for v in values)
    assert dict(zip(bins.tolist(), counts.tolist(), strict=True)) == dict(expected)
    assert bins.tolist() == sorted(expected)
    assert histogram.total == len(values)
    for index, total in zip(bins.tolist(), sums.tolist(), strict=True):
        here = [v for v in values if slow_bin(v) == index]
        try:
            exact = math.fsum(here)
        except OverflowError:
            exact = math.inf
        if math.isinf(exact) or math.isinf(total):  # beyond, or within rounding of, the largest
            assert total >= sys.float_info.max * (1 - len(here) * EPSILON)
        else:
            assert abs(total - exact) <= len(here) * EPSILON * exact


def histogram_of(values: list[float]) -> LogHistogram:
    histogram = LogHistogram()
    histogram.add(np.array(values, dtype=np.float64))
    return histogram


@given(st.lists(magnitudes, max_size=50))
@example([0.0, -0.0, 5e-324, TINY, np.nextafter(TINY, 0), sys.float_info.max, sys.float_info.max])
def test_bins_counts_and_sums_match_the_definition(values: list[float]) -> None:
    check_against_slow(histogram_of(values), values)


@pytest.mark.parametrize("e", [-1022, -1021, -300, -1, 0, 1, 52, 1022, 1023])
@pytest.mark.parametrize("m", range(8))
def test_an_edge_begins_its_bin_and_the_number_before_it_is_in_the_bin_before(
    e: int, m: int
) -> None:
    edge = math.ldexp(1 + m / 8, e)
    before = float(np.nextafter(edge, 0))
    after = float(np.nextafter(edge, math.inf))
    first = UNDERFLOW if (e, m) == (-1022, 0) else 8 * e + m - 1
    assert histogram_of([before]).nonzero()[0].tolist() == [first]
    assert histogram_of([edge]).nonzero()[0].tolist() == [8 * e + m]
    assert histogram_of([after]).nonzero()[0].tolist() == [8 * e + m]


@given(magnitudes)
@example(sys.float_info.max)
@example(0.0)
@example(TINY)
def test_edges_hold_their_values_and_are_exact(x: float) -> None:
    bins, _, _ = histogram_of([x]).nonzero()
    (lower,), (upper,) = bin_edges(bins)
    assert lower <= x < upper
    exact = slow_edges(int(bins[0]))
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
    histogram = LogHistogram()
    with pytest.raises(ValueError, match="is no histogram bin"):
        histogram.add_bins(np.array([0, wrong]), np.array([1, 1]), np.array([1.0, 1.0]))
    assert histogram.total == 0


@given(st.lists(magnitudes, max_size=40), st.data())
def test_merging_any_split_equals_the_whole(values: list[float], data: st.DataObject) -> None:
    owners = data.draw(
        st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)), label="owners"
    )
    merged = LogHistogram()
    for part in range(4):
        mine = [v for v, owner in zip(values, owners, strict=True) if owner == part]
        merged.merge(histogram_of(mine))
    check_against_slow(merged, values)


def test_merging_leaves_the_other_alone() -> None:
    one, other = histogram_of([1.0]), histogram_of([1.0, 4.0, 0.0])
    one.merge(other)
    one.merge(other)
    assert other.nonzero()[1].tolist() == [1, 1, 1]
    assert one.nonzero()[1].tolist() == [2, 3, 2]
    assert one.nonzero()[2].tolist() == [0.0, 3.0, 8.0]


@given(st.lists(magnitudes, max_size=40), st.randoms(use_true_random=False))
def test_rows_of_a_table_rebuild_the_histogram(values: list[float], random: object) -> None:
    histogram = histogram_of(values)
    bins, counts, sums = histogram.nonzero()
    order = np.array(random.sample(range(len(bins)), len(bins)), dtype=np.int64)
    rebuilt = LogHistogram()
    rebuilt.add_bins(bins[order], counts[order], sums[order])
    for a, b in zip(rebuilt.nonzero(), (bins, counts, sums), strict=True):
        assert a.tolist() == b.tolist()


def test_repeated_rows_add_up() -> None:
    histogram = LogHistogram()
    index = np.array([3, UNDERFLOW, 3, UNDERFLOW])
    histogram.add_bins(index, np.array([1, 2, 3, 4]), np.array([1.5, 0.0, 4.5, 0.0]))
    assert [a.tolist() for a in histogram.nonzero()] == [[UNDERFLOW, 3], [6, 4], [0.0, 6.0]]


def test_counts_are_exact_beyond_the_integers_of_float64() -> None:
    histogram = LogHistogram()
    many = 2**53 + 1
    histogram.add_bins(np.array([0]), np.array([many]), np.array([1.0]))
    histogram.merge(histogram_of([1.0]))
    assert histogram.nonzero()[1].tolist() == [many + 1]


@settings(max_examples=50)
@given(st.integers(65_500, 140_000), st.integers(0, 2**32 - 1))
def test_layers_of_several_chunks_match_an_independent_count(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lc = np.ldexp(rng.standard_normal(n), rng.integers(-40, 10, n))
    lc[rng.integers(0, n, 30)] = 0.0
    histograms = SignedHistograms()
    counts = histograms.add(torch.from_numpy(lc))
    assert counts == Counts(int((lc < 0).sum()), int((lc > 0).sum()), int((lc == 0).sum()))
    for sign in (-1, 1):
        mine = np.abs(lc[np.sign(lc) == sign])
        mantissa, power = np.frexp(mine)
        keys = 8 * (power.astype(np.int64) - 1) + np.floor(16 * mantissa).astype(np.int64) - 8
        expected, numbers = np.unique(keys, return_counts=True)
        bins, found, sums = histograms.by_sign[sign].nonzero()
        assert bins.tolist() == expected.tolist()
        assert found.tolist() == numbers.tolist()
        for index in (expected[0], expected[len(expected) // 2], expected[-1]):
            exact = math.fsum(mine[keys == index])
            assert abs(sums[bins == index][0] - exact) <= n * EPSILON * exact


@given(st.lists(signed, max_size=60))
@example([-0.0, 0.0, 5e-324, -5e-324, -5e-324, -1.0])
@example([-5e-324, -TINY])
@example([-0.0])
def test_signs_go_to_their_histograms(values: list[float]) -> None:
    histograms = SignedHistograms()
    counts = histograms.add(torch.tensor(values, dtype=torch.float64))
    helping = [-v for v in values if v < 0]
    hurting = [v for v in values if v > 0]
    zero = [v for v in values if v == 0]
    assert counts == Counts(len(helping), len(hurting), len(zero))
    check_against_slow(histograms.by_sign[-1], helping)
    check_against_slow(histograms.by_sign[1], hurting)
    check_against_slow(histograms.by_sign[0], zero)


def test_signed_histograms_merge_and_accumulate() -> None:
    first, second = SignedHistograms(), SignedHistograms()
    total = first.add(np.array([-1.0, 2.0, 0.0])) + first.add(np.array([-1.0, -4.0]))
    assert total == Counts(n_helping=3, n_hurting=1, n_zero=1)
    second.add(np.array([-4.0, 0.5]))
    first.merge(second)
    assert [a.tolist() for a in first.by_sign[-1].nonzero()] == [[0, 16], [2, 2], [2.0, 8.0]]
    assert [a.tolist() for a in first.by_sign[1].nonzero()] == [[-8, 8], [1, 1], [0.5, 2.0]]
    assert [a.tolist() for a in first.by_sign[0].nonzero()] == [[UNDERFLOW], [1], [0.0]]


def test_the_input_is_not_changed_and_need_not_be_contiguous() -> None:
    values = np.array([1.0, -7.0, 2.0, -7.0, 0.0, -7.0])
    kept = values.copy()
    histogram = LogHistogram()
    histogram.add(values[::2])
    assert histogram.nonzero()[0].tolist() == [UNDERFLOW, 0, 8]
    assert (values == kept).all()


def test_one_zero_does_not_make_a_histogram_large() -> None:
    narrow, wide = histogram_of([1.0, 1.5]), histogram_of([0.0, 1.0, 1.5])
    assert len(pickle.dumps(wide)) < len(pickle.dumps(narrow)) + 100


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 100_000])
def test_non_finite_values_are_refused_whole(bad: float, place: int) -> None:
    values = np.ones(100_001)
    values[place] = bad
    histogram, histograms = LogHistogram(), SignedHistograms()
    with pytest.raises(ValueError, match="NaN or infinite"):
        histogram.add(values)
    with pytest.raises(ValueError, match="NaN or infinite"):
        histograms.add(values)
    assert histogram.total == 0
    assert [h.total for h in histograms.by_sign.values()] == [0, 0, 0]


@pytest.mark.parametrize("bad", [-1.0, -5e-324])
def test_negative_magnitudes_are_refused_whole(bad: float) -> None:
    histogram = LogHistogram()
    with pytest.raises(ValueError, match="negative"):
        histogram.add(np.array([1.0, bad]))
    assert histogram.total == 0


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2, dtype=torch.float64)])
def test_other_dtypes_and_shapes_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float64 values"):
        SignedHistograms().add(bad)


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
