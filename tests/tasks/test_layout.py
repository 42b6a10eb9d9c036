"""Where elements are in memory, and how tables find them by their row-by-row index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcray.tasks.layer import Layer
from lcray.tasks.model.layout import Layout

SHAPES = [(3, 2, 2, 4), (5,), (0, 3), (), (2, 3, 2, 2, 2), (4, 6), (1, 1, 1, 1)]


def layers(kind: str = "parameter") -> list[Layer]:
    return [
        Layer(f"l{n}", "", kind, shape, 0 if shape else None, True)
        for n, shape in enumerate(SHAPES)
    ]


@pytest.fixture(params=["contiguous", "channels_last"])
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(layers(), request.param)


def filled(layout: Layout) -> torch.Tensor:
    """A flat vector whose elements are 1000 · layer + row-by-row index."""
    vector = torch.full((layout.size,), -1.0)
    for number, layer in enumerate(layout.layers):
        values = 1000.0 * number + torch.arange(layer.numel)
        layout.shaped(vector, number).copy_(values.view(layer.shape))
    return vector


def test_every_element_has_one_place(layout: Layout) -> None:
    vector = filled(layout)
    expected = [1000.0 * n + i for n, layer in enumerate(layout.layers) for i in range(layer.numel)]
    assert sorted(vector.tolist()) == expected
    for number, where in enumerate(layout.slices):
        assert all(value // 1000 == number for value in vector[where].tolist())


def test_channels_are_innermost_in_weights_of_convolutions_only() -> None:
    last = Layout(layers(), "channels_last")
    assert [last.channels_last(n) for n in range(len(SHAPES))] == [
        len(shape) in (4, 5) for shape in SHAPES
    ]
    weight = last.shaped(torch.zeros(last.size), 0)
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert not any(Layout(layers("buffer"), "channels_last").channels_last(n) for n in range(7))


def test_rows_and_places_are_by_the_index_of_tables(layout: Layout) -> None:
    vector = filled(layout)
    for number, layer in enumerate(layout.layers):
        for start in range(layer.numel + 1):
            for stop in range(start, layer.numel + 1):
                found = layout.rows(vector, number, start, stop)
                assert found.tolist() == [1000.0 * number + i for i in range(start, stop)]
        index = np.arange(layer.numel)[::-1]
        if layer.numel:
            places = layout.places(number, index)
            assert vector[torch.from_numpy(places.copy())].tolist() == [
                1000.0 * number + i for i in index
            ]


@pytest.mark.parametrize("size", [1, 3, 7, 24, 1000])
def test_blocks_and_pieces_cover_everything_once(layout: Layout, size: int) -> None:
    seen = []
    for block, pieces in layout.pieces(size):
        assert 0 < block.stop - block.start <= size
        for number, where in pieces:
            first = block.start + where.start
            last = block.start + where.stop
            assert layout.slices[number].start <= first < last <= layout.slices[number].stop
            seen += range(first, last)
    assert seen == list(range(layout.size))
    assert [i for b in layout.blocks(size) for i in range(b.start, b.stop)] == seen
