"""Sums for the tables on a GPU against those on the CPU, and against themselves."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from lcray.allocation.path import Point, Segment
from lcray.tables.writing.accumulators import FLIPS, Accumulators, LayerSums
from lcray.tables.writing.layer_histograms import LayerHistograms, add_by_cell
from lcray.tables.writing.traces import Traces
from lcray.tables.writing.units import Units
from lcray.tasks.layer import Layer
from lcray.tasks.model.layout import Layout

SHAPES = ((300, 200), (300,), (7, 300), (1, 7), (500, 40, 3, 3))
LAYERS = tuple(Layer(f"l{n}", "", "parameter", s, 0, True) for n, s in enumerate(SHAPES))
ALL = list(range(len(LAYERS)))
STEPS = 3


def vector(seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers over several orders of magnitude, a fifth of them zeros."""
    size = sum(layer.numel for layer in LAYERS)
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=random, dtype=torch.float64)
    values *= torch.exp(4 * torch.randn(size, generator=random, dtype=torch.float64))
    values[torch.rand(size, generator=random) < 0.2] = 0.0
    return values.to(dtype)


def run(device: str) -> tuple[list[LayerSums], dict[str, np.ndarray], list[np.ndarray]]:
    """Sums by interval, columns by element, and histograms."""
    layout = Layout(LAYERS)
    histograms = LayerHistograms(len(ALL), device)
    sums = Accumulators(layout, STEPS, Units(layout, ALL), ALL, True, device)
    found = []
    for t in range(STEPS):
        ends = (vector(100 + t + i, torch.float32).to(device) for i in (0, 1))
        segment = Segment(*(Point(t + i, end, {}) for i, end in enumerate(ends)))
        lc, gradient = (vector(t, torch.float64), vector(10 + t, torch.float32))
        found.append(sums.add(lc.to(device), segment, gradient.to(device), histograms))
    assert sums.by_element is not None

    def take(values: Tensor) -> np.ndarray:
        return values.cpu().numpy()

    columns = sums.by_element.columns(take, sums.n_ok, True) | sums.borders(take, True)
    return found, columns, list(histograms.nonzero())


def test_sums_are_those_of_the_cpu() -> None:
    (cpu, by_element, bins), (gpu, own, own_bins) = run("cpu"), run("cuda")
    for there, here in zip(cpu, gpu, strict=True):
        scale = float((there.hurting - there.helping).sum())
        for field in fields(LayerSums):
            a, b = getattr(there, field.name), getattr(here, field.name)
            if field.name.startswith("n_"):
                assert np.array_equal(a, b)
            elif field.name in ("update", "gradient"):
                assert np.allclose(a, b, rtol=1e-12, atol=0)
            else:
                assert np.abs(a - b).max() <= 1e-12 * scale
    assert max(by_element[name].max() for name in FLIPS) > 0
    for name, column in by_element.items():
        assert np.array_equal(column, own[name]), name  # additions of single numbers are exact
    for a, b in zip(bins[:4], own_bins[:4], strict=True):
        assert np.array_equal(a, b)
    assert np.allclose(bins[4], own_bins[4], rtol=1e-12, atol=0)


def test_the_same_bits_every_time() -> None:
    (first, _, bins), (second, _, again) = run("cuda"), run("cuda")
    for one, other in zip(first, second, strict=True):
        for field in fields(LayerSums):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name))
    assert all(map(np.array_equal, bins, again))


def test_values_are_added_to_their_cells() -> None:
    random = torch.Generator().manual_seed(0)
    cells = torch.randint(1, 9, (100_000,), generator=random)
    values = torch.rand(100_000, generator=random, dtype=torch.float64)
    sums, expected = torch.zeros(12, dtype=torch.float64, device="cuda"), torch.zeros(12).double()
    add_by_cell(sums, cells.cuda(), values.cuda())
    expected.scatter_add_(0, cells, values)
    assert torch.allclose(sums.cpu(), expected, rtol=1e-12, atol=0)


def test_traces_are_those_of_the_elements() -> None:
    samples = {0: np.array([0, 5, 59_999]), 4: np.array([7])}
    traces = Traces(Layout(LAYERS), samples, STEPS, torch.float32, "cuda")
    for t in range(2):
        weights, lc = vector(t, torch.float32), vector(t, torch.float64)
        traces.add(t, weights.cuda(), None if t else weights.cuda(), lc.cuda())
    for number, columns in traces.columns(1000):
        places = Layout(LAYERS).places(number, samples[number])
        expected = np.stack([vector(t, torch.float64).numpy()[places] for t in range(2)], 1)
        assert np.array_equal(columns["lc"], expected.reshape(-1))
        assert np.isnan(columns["gradient"].reshape(-1, 2)[:, 1]).all()


def test_a_path_says_whether_it_is_finite() -> None:
    start = torch.zeros(5_000_000, device="cuda")
    for bad in (float("nan"), float("inf")):
        end = start.clone()
        end[-1] = bad
        assert not Segment(Point(0, start, {}), Point(1, end, {})).is_finite
        both = Segment(Point(0, end, {}), Point(1, end, {}))
        assert both.is_finite is (bad == float("inf"))  # equal infinities do not move
