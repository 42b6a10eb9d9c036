"""The place of each layer in the flat vectors, and the order of its elements.

Legend: P elements of all layers.

Layers follow each other in the model's order. Within a layer, elements have the order that the
model computes in: row by row, or, with ``channels_last``, with the channels of convolution weights
innermost. Tables name elements by their row-by-row index, whatever the order in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from lcray.tasks.layer import Layer

#: Elements of a block: a few float64 vectors of this length stay in the cache.
BLOCK = 1 << 16


class Layout:
    """The order of the elements in every flat vector [P] of a model.

    Attributes:
        layers: the layers, in the model's order.
        memory_format: ``contiguous`` or ``channels_last``.
        slices: one slice per layer.
        size: P.

    Args:
        layers: the layers.
        memory_format: of weights with at least one axis beside their channel axes.
    """

    def __init__(self, layers: Sequence[Layer], memory_format: str = "contiguous") -> None:
        self.layers = tuple(layers)
        self.memory_format = memory_format
        stops = [0]
        for layer in self.layers:
            stops.append(stops[-1] + layer.numel)
        self.slices = tuple(slice(a, b) for a, b in pairwise(stops))
        self.size = stops[-1]

    def channels_last(self, number: int) -> bool:
        """Whether the layer of this number has its channels innermost."""
        layer = self.layers[number]
        last = self.memory_format == "channels_last" and layer.kind == "parameter"
        return last and len(layer.shape) in (4, 5)

    def shaped(self, vector: Tensor, number: int) -> Tensor:
        """The elements of one layer, a view of `vector` in the layer's shape."""
        shape, part = self.layers[number].shape, vector[self.slices[number]]
        if not self.channels_last(number):
            return part.view(shape)
        return part.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def in_order(self, tensor: Tensor, number: int) -> Tensor:
        """The elements of a tensor of a layer's shape, in memory order, [n].

        A view if the tensor already has that order.
        """
        return (tensor.movedim(1, -1) if self.channels_last(number) else tensor).reshape(-1)

    def rows(self, vector: Tensor, number: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of one layer, row by row, [stop - start]."""
        if not self.channels_last(number):
            first = self.slices[number].start
            return vector[first + start : first + stop]
        width = max(1, self.layers[number].numel // max(1, self.layers[number].shape[0]))
        first = start // width
        part = self.shaped(vector, number)[first : -(-stop // width)].reshape(-1)
        return part[start - first * width : stop - first * width]

    def places(self, number: int, index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Positions in a flat vector of the elements of one layer with these row-by-row indices."""
        first = self.slices[number].start
        if not self.channels_last(number):
            return index + first
        shape = self.layers[number].shape
        rows, channels, *rest = np.unravel_index(index, shape)
        moved = (shape[0], *shape[2:], shape[1])
        return np.ravel_multi_index((rows, *rest, channels), moved) + first

    def blocks(self, size: int = BLOCK) -> Iterator[slice]:
        """Slices of at most `size` elements that cover a flat vector."""
        for start in range(0, self.size, size):
            yield slice(start, min(self.size, start + size))

    def pieces(self, size: int = BLOCK) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
        """Each block with the layers that have elements in it: (number, slice within the block)."""
        number = 0
        for block in self.blocks(size):
            found = []
            while number < len(self.slices):
                where = self.slices[number]
                low, high = max(where.start, block.start), min(where.stop, block.stop)
                if low < high:
                    found.append((number, slice(low - block.start, high - block.start)))
                if where.stop > block.stop:
                    break
                number += 1
            yield block, found
