"""Sums by element, layer and unit against loops over exact numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from planting import bin_of
from torch import Tensor
from twin import sign

from lcray.allocation.path import Point, Segment
from lcray.tables.writing import accumulators, layer_histograms, pieces
from lcray.tables.writing.accumulators import Accumulators, LayerSums
from lcray.tables.writing.layer_histograms import LayerHistograms
from lcray.tables.writing.units import Units
from lcray.tasks.layer import Layer
from lcray.tasks.model.layout import Layout

EPSILON = 2.0**-52


def layer(
    name: str, shape: tuple[int, ...], axis: int | None = 0, kind: str = "parameter"
) -> Layer:
    return Layer(name, "", kind, shape, axis, kind == "parameter")


LAYERS = (
    layer("conv", (3, 2, 2, 2)),
    layer("across", (2, 3, 2, 2), 1),
    layer("scalar", (), None),
    layer("none", (0, 3)),
    layer("hollow", (3, 0)),
    layer("left_out", (4, 2)),
    layer("conv1d", (4, 3), 1),
    Layer("grouped", "", "parameter", (6, 2, 2, 3), 1, True, (), 3),
    layer("bias", (5,)),
    layer("mean", (5,), 0, "buffer"),
)
P = sum(item.numel for item in LAYERS)
UNITS = [0, 1, 2, 3, 4, 6, 7, 8, 9]
DETAIL = [0, 1, 2, 3, 4, 6, 7, 8]


@dataclass(frozen=True)
class Interval:
    """An interval in numbers, in the order in memory; LC is None where it is not ok."""

    start: Tensor
    end: Tensor
    lc: Tensor | None
    gradient: Tensor | None

    @property
    def segment(self) -> Segment:
        return Segment(Point(0, self.start, {}), Point(1, self.end, {}))


def signed(random: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Numbers over several orders of magnitude, a fifth of them zeros."""
    values = torch.randn(P, generator=random, dtype=torch.float64)
    values *= torch.exp(4 * torch.randn(P, generator=random, dtype=torch.float64))
    values[torch.rand(P, generator=random) < 0.2] = 0.0
    return values.to(dtype)


def make_intervals(n: int, dtype: torch.dtype, bad: Iterable[int] = ()) -> list[Interval]:
    random = torch.Generator().manual_seed(n)
    points = [torch.randn(P, generator=random, dtype=dtype)]
    for _ in range(n):
        still = torch.rand(P, generator=random) < 0.2
        points.append(torch.where(still, points[-1], signed(random, dtype)))
    return [
        Interval(
            points[t],
            points[t + 1],
            None if t in bad else signed(random, torch.float64),
            None if t in bad else signed(random, dtype),
        )
        for t in range(n)
    ]


def flips(values: list[float | None]) -> int:
    """Neighbours of opposite sign; None is no neighbour."""
    pairs = pairwise(values)
    return sum(a is not None and b is not None and sign(a) * sign(b) == -1 for a, b in pairs)


def close(found: float, exact: float, parts: Iterable[float]) -> bool:
    return abs(found - exact) <= 1e2 * EPSILON * math.fsum(map(abs, parts))


@pytest.fixture(params=["contiguous", "channels_last"])
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(LAYERS, request.param)


@pytest.fixture(params=[7, 1 << 17])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulators, "_BLOCK", request.param)


@pytest.fixture(params=["cpu", "elsewhere"], autouse=True)
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices use works on a CPU as well, only more slowly."""
    if request.param == "elsewhere":
        monkeypatch.setattr(accumulators, "module_of", lambda device: torch)
        monkeypatch.setattr(accumulators, "array_of", lambda tensor: tensor)
        monkeypatch.setattr(accumulators, "sum_pieces", pieces.sum_one_by_one)
        monkeypatch.setattr(accumulators, "count_pieces", pieces.sum_one_by_one)
        monkeypatch.setattr(layer_histograms, "_IN_ORDER", ())


def run(
    layout: Layout, intervals: list[Interval], histograms: LayerHistograms | None = None
) -> tuple[Accumulators, list[LayerSums]]:
    units = Units(layout, UNITS)
    sums = Accumulators(layout, len(intervals), units, DETAIL, True)
    return sums, [sums.add(i.lc, i.segment, i.gradient, histograms) for i in intervals]


@pytest.mark.usefixtures("block")
def test_sums_of_layers(layout: Layout) -> None:
    intervals = make_intervals(6, torch.float32, bad=(2,))
    _, found = run(layout, intervals)
    for t, (interval, sums) in enumerate(zip(intervals, found, strict=True)):
        before = intervals[t - 1].lc if t else None
        for number, where in enumerate(layout.slices):
            moves = (interval.end[where].double() - interval.start[where].double()).tolist()
            squares = [move * move for move in moves]
            assert close(float(sums.update[number]), math.fsum(squares), squares)
            if interval.lc is None or interval.gradient is None:
                assert sums.helping[number] == sums.hurting[number] == sums.gradient[number] == 0
                assert sums.n_helping[number] == sums.n_hurting[number] == 0
                assert sums.n_flips[number] == 0
                continue
            lc = interval.lc[where].tolist()
            helping, hurting = [v for v in lc if v < 0], [v for v in lc if v > 0]
            assert close(float(sums.helping[number]), math.fsum(helping), helping)
            assert close(float(sums.hurting[number]), math.fsum(hurting), hurting)
            slopes = [slope * slope for slope in interval.gradient[where].tolist()]
            assert close(float(sums.gradient[number]), math.fsum(slopes), slopes)
            turned = 0
            if before is not None:
                pairs = zip(before[where].tolist(), lc, strict=True)
                turned = sum(sign(a) * sign(b) == -1 for a, b in pairs)
            counts = (len(helping), len(hurting), turned)
            if layout.layers[number].kind == "buffer":
                counts = (0, 0, 0)
            assert (
                sums.n_helping[number],
                sums.n_hurting[number],
                sums.n_flips[number],
            ) == counts, (t, number)
    assert sum(int(sums.n_flips.sum()) for sums in found) > 0


@pytest.mark.usefixtures("block")
def test_sums_of_units(layout: Layout) -> None:
    (interval,) = make_intervals(1, torch.float32)
    _, (found,) = run(layout, [interval])
    assert interval.lc is not None
    expected = []
    for number in UNITS:
        item = LAYERS[number]
        parts: list[list[float]] = [[] for _ in range(item.n_units)]
        index = np.arange(item.numel)
        values = interval.lc[torch.from_numpy(layout.places(number, index))].tolist()
        for i, value in zip(index, values, strict=True):
            place = np.unravel_index(i, item.shape) if item.shape else ()
            unit = 0 if item.unit_axis is None else int(place[item.unit_axis])
            if item.unit_groups > 1:  # inputs of two rows each, outputs of two columns each
                unit += 2 * (int(place[0]) // 2)
            parts[unit].append(value)
        expected += parts
    units = Units(layout, UNITS)
    assert units.size == len(expected) == len(found.units) == 3 + 3 + 1 + 0 + 3 + 3 + 6 + 5 + 5
    assert units.numbers.tolist() == [n for n in UNITS for _ in range(LAYERS[n].n_units)]
    assert units.index.tolist() == [u for n in UNITS for u in range(LAYERS[n].n_units)]
    for total, parts in zip(found.units, expected, strict=False):
        assert close(float(total), math.fsum(parts), parts)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_elements(layout: Layout, dtype: torch.dtype) -> None:
    intervals = make_intervals(9, dtype, bad=(0, 4))
    sums, _ = run(layout, intervals)
    assert sums.by_element is not None
    columns = sums.by_element.columns(Tensor.numpy, sums.n_ok, True)
    for i in range(P):
        lc = [None if s.lc is None else float(s.lc[i]) for s in intervals]
        move = [
            None if s.lc is None else float(s.end[i].double() - s.start[i].double())
            for s in intervals
        ]
        slope = [None if s.gradient is None else float(s.gradient[i]) for s in intervals]
        known = [v for v in lc if v is not None]
        row = {name: column[i] for name, column in columns.items()}
        assert close(row["lc"], math.fsum(known), known)
        assert close(row["abs_lc"], math.fsum(map(abs, known)), known)
        signs = [sign(v) for v in known]
        counts = row["n_helping"], row["n_hurting"], row["n_zero"]
        assert counts == (signs.count(-1), signs.count(1), signs.count(0))
        assert row["n_flips"] == flips(lc)
        assert row["displacement_flips"] == flips(move)
        assert row["gradient_flips"] == flips(slope)
    assert min(columns[name].max() for name in accumulators.FLIPS) > 1
    assert "gradient_flips" not in sums.by_element.columns(Tensor.numpy, 0, False)


@pytest.mark.parametrize("bad", [(), (0,), (5,), (0, 5)])
def test_borders_are_the_signs_at_both_ends(layout: Layout, bad: tuple[int, ...]) -> None:
    intervals = make_intervals(6, torch.float32, bad)
    sums, _ = run(layout, intervals)
    columns = sums.borders(Tensor.numpy, True)
    for end, interval in (("first", intervals[0]), ("last", intervals[-1])):
        found: dict[str, Any] = {"displacement": interval.end.double() - interval.start.double()}
        found |= {"lc": interval.lc, "gradient": interval.gradient}
        for name, values in found.items():
            expected = [0] * P if interval.lc is None else list(map(sign, values.tolist()))
            assert columns[f"{name}_{end}"].tolist() == expected
            assert columns[f"{name}_{end}"].dtype == np.int8
    assert set(sums.borders(Tensor.numpy, False)) == {
        f"{name}_{end}" for name in ("lc", "displacement") for end in ("first", "last")
    }


@pytest.mark.usefixtures("block")
def test_histograms_are_those_of_each_layer(layout: Layout) -> None:
    intervals = make_intervals(5, torch.float32, bad=(1,))
    histograms = LayerHistograms(len(DETAIL))
    run(layout, intervals, histograms)
    expected = []
    for row, number in enumerate(DETAIL):
        values = np.concatenate(
            [i.lc[layout.slices[number]].numpy() for i in intervals if i.lc is not None]
        )
        for which in (-1, 0, 1):
            mine = np.abs(values[np.sign(values) == which])
            bins = bin_of(mine)
            for bin_ in np.unique(bins):
                here = mine[bins == bin_]
                total = pytest.approx(math.fsum(here), rel=1e-14)
                expected.append((row, which, bin_, len(here), total))
    assert list(zip(*histograms.nonzero(), strict=True)) == expected


@pytest.mark.parametrize(("intervals", "bytes_each"), [(255, 1), (256, 2), (40_000, 4)])
def test_counts_are_as_narrow_as_the_span_allows(intervals: int, bytes_each: int) -> None:
    layout = Layout((layer("one", (1,)),))
    sums = Accumulators(layout, intervals, Units(layout, []), [], True)
    assert sums.by_element is not None
    added = min(intervals, 300)
    zero = torch.zeros(1, dtype=torch.float64)
    for t in range(added):
        up = torch.full((1,), 1.0 if t % 2 else -1.0, dtype=torch.float64)
        sums.add(up.abs(), Segment(Point(0, zero, {}), Point(1, up, {})), up)
    columns = sums.by_element.columns(Tensor.numpy, sums.n_ok, True)
    assert columns["n_hurting"][0] == added and columns["n_zero"][0] == 0
    assert columns["displacement_flips"][0] == columns["gradient_flips"][0] == added - 1
    assert columns["n_flips"].dtype.itemsize == bytes_each


def test_non_finite_checkpoints_and_overflow_pass_without_warnings() -> None:
    layout = Layout((layer("two", (2,)), layer("one", (1,))))
    sums = Accumulators(layout, 1, Units(layout, [0, 1]), [], True)
    start = torch.tensor([math.inf, 0.0, 1.0], dtype=torch.float64)
    end = torch.tensor([0.0, 1e200, 4.0], dtype=torch.float64)
    found = sums.add(None, Segment(Point(0, start, {}), Point(1, end, {})), None)
    assert not math.isfinite(found.update[0]) and found.update[1] == 9.0
