"""Traced elements: which, and their rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lcray.tables.writing.traces import Traces
from lcray.tasks.layer import Layer
from lcray.tasks.model.layout import Layout

LAYERS = (
    Layer("a", "", "parameter", (2, 3, 1, 2), 0, True),
    Layer("b", "", "parameter", (4,), 0, True),
)
SAMPLES = {0: np.array([1, 5, 7, 11]), 1: np.array([0, 3])}


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("most", [1, 5, 6, 1000])
def test_rows_are_those_of_the_elements_in_bounded_pieces(memory_format: str, most: int) -> None:
    layout = Layout(LAYERS, memory_format)
    random = torch.Generator().manual_seed(0)
    traces = Traces(layout, SAMPLES, 4, torch.float32)
    steps, expected = [3, 8, 9], []
    history: list[Any] = []
    for step in steps:  # fewer than there could have been
        weights, gradient = (torch.randn(layout.size, generator=random) for _ in range(2))
        lc = torch.randn(layout.size, generator=random, dtype=torch.float64)
        known = step != 8
        traces.add(step, weights, gradient if known else None, lc if known else None)
        history.append((weights, gradient, lc, known))
    for number, index in SAMPLES.items():
        for i, place in zip(index.tolist(), layout.places(number, index).tolist(), strict=True):
            for step, (weights, gradient, lc, known) in zip(steps, history, strict=True):
                row = (float(gradient[place]), float(lc[place])) if known else (math.nan, math.nan)
                expected.append((number, i, step, float(weights[place]), *row))
    found = []
    for number, columns in traces.columns(most):
        names = ("index", "step", "weight", "gradient", "lc")
        rows = list(zip(*(columns[name].tolist() for name in names), strict=True))
        assert len(rows) <= max(most, len(steps))
        found += [(number, *row) for row in rows]
    assert np.array_equal(np.array(found), np.array(expected), equal_nan=True)


def test_nothing_is_traced_without_samples() -> None:
    traces = Traces(Layout(LAYERS), {}, 4, torch.float64)
    vector = torch.zeros(16, dtype=torch.float64)
    traces.add(0, vector, None, None)
    assert list(traces.columns(10)) == []
