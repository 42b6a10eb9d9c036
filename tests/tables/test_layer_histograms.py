"""Histograms of many layers against exact rational arithmetic."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planting import slow_bin
from torch import Tensor

from lcray.tables.writing.layer_histograms import Block, LayerHistograms, add_by_cell

TINY = sys.float_info.min  # 2^-1022, the smallest normal float64
EPSILON = sys.float_info.epsilon

signed = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 5e-324])


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


def add(histograms: LayerHistograms, layers: dict[int, list[float]], n: int = 5) -> None:
    """Add an interval: the values of each layer follow each other, in two blocks."""
    lc = torch.tensor([v for values in layers.values() for v in values], dtype=torch.float64)
    pieces: list[tuple[int, slice]] = []
    n_zero, start = np.zeros(n, np.int64), 0
    for layer, values in layers.items():
        pieces.append((layer, slice(start, start + len(values))))
        n_zero[layer], start = values.count(0.0), start + len(values)
    histograms.add(lc, [cut(pieces[:2]), cut(pieces[2:])] if pieces[2:] else [cut(pieces)], n_zero)


def cut(pieces: list[tuple[int, slice]]) -> Block:
    first, last = pieces[0][1].start, pieces[-1][1].stop
    return slice(first, last), [(row, slice(p.start - first, p.stop - first)) for row, p in pieces]


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
    histograms, all_values = LayerHistograms(5), {layer: list[float]() for layer in range(5)}
    for block in blocks:
        held = {layer: values * times for layer, values in enumerate(block) if values}
        if held:
            add(histograms, held)
        for layer, values in held.items():
            all_values[layer] += values
    check_layers(histograms, all_values)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_histograms_of_many_layers_refuse_non_finite_values(bad: float) -> None:
    histograms = LayerHistograms(2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        add(histograms, {0: [1.0], 1: [bad]}, 2)
    assert [len(a) for a in histograms.nonzero()] == [0] * 5


@pytest.mark.parametrize("path", ["in order", "sorted"])
def test_values_are_added_to_their_cells(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Elsewhere than on a CPU values are sorted first; that can be done on a CPU as well.
    if path == "sorted":
        monkeypatch.setattr("lcray.tables.writing.layer_histograms._IN_ORDER", ())
    random = torch.Generator().manual_seed(0)
    cells = torch.randint(1, 9, (1000,), generator=random)
    values = torch.randn(1000, generator=random, dtype=torch.float64)
    sums = torch.ones(12, dtype=torch.float64)
    add_by_cell(sums, cells, values)
    for cell, total in enumerate(sums.tolist()):
        mine: Tensor = values[cells == cell]
        parts = [1.0, *mine.tolist()]
        assert abs(total - math.fsum(parts)) <= 1e-14 * math.fsum(map(abs, parts))
    assert sums[0] == sums[9] == 1.0
