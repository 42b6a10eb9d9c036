"""LC by unit, on the device of LC.

Legend: P elements, U units.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.tasks.model.layout import Layout

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Units:
    """Positions of the units of some layers.

    Args:
        layout: layout of the flat vectors.
        numbers: numbers of the layers, ascending.

    Attributes:
        size: U.
        numbers: the number of each unit's layer, [U].
        index: the number of each unit within its layer, [U].
    """

    def __init__(self, layout: Layout, numbers: Collection[int]) -> None:
        self._layout = layout
        sizes = [layout.layers[number].n_units for number in numbers]
        stops = np.cumsum([0, *sizes])
        self._first: dict[int, int] = dict(zip(numbers, stops.tolist(), strict=False))
        self.size = int(stops[-1])
        self.numbers = np.repeat(np.asarray(list(numbers), np.int32), sizes)
        self.index = np.arange(self.size) - np.repeat(stops[:-1], sizes)
        layers = [(number, layout.layers[number]) for number in numbers]
        held = [(number, layer.unit_axis in (None, 0)) for number, layer in layers if layer.numel]
        self._along = [number for number, along in held if along]
        self._across = [number for number, along in held if not along]
        self._stretches = list(self._runs())

    def sums(self, lc: Tensor) -> Floats:
        """LC [P] summed by unit, [U]."""
        total = torch.zeros(self.size, dtype=torch.float64, device=lc.device)
        for where, starts, place in self._stretches if lc.device.type == "cpu" else ():
            np.add.reduceat(lc[where].numpy(), starts, out=total[place].numpy())
        along = () if lc.device.type == "cpu" else self._along
        for number in (*along, *self._across):
            layer, first = self._layout.layers[number], self._first[number]
            total[first : first + layer.n_units] = self._of_layer(lc, number)
        found: Floats = total.cpu().numpy()
        return found

    def _of_layer(self, lc: Tensor, number: int) -> Tensor:
        layer = self._layout.layers[number]
        if layer.unit_axis in (None, 0):
            return lc[self._layout.slices[number]].view(layer.n_units, -1).sum(1)
        values = self._layout.shaped(lc, number)
        if layer.unit_groups > 1:  # [groups, inputs of a group, outputs of a group, …]
            values = torch.unflatten(values, 0, (layer.unit_groups, -1))
            return values.sum([1, *range(3, values.dim())]).reshape(-1)
        return values.sum([axis for axis in range(len(layer.shape)) if axis != layer.unit_axis])

    def _runs(self) -> Iterator[tuple[slice, Integers, slice]]:
        """Runs of layers whose units are stretches: a slice, where units start in it, the units."""
        at, starts, first = slice(0, 0), list[Integers](), 0
        for number in self._along:
            where, layer = self._layout.slices[number], self._layout.layers[number]
            if starts and (
                where.start != at.stop or self._first[number] != first + sum(map(len, starts))
            ):
                yield at, np.concatenate(starts), slice(first, first + sum(map(len, starts)))
                starts = []
            if not starts:
                at, first = where, self._first[number]
            at = slice(at.start, where.stop)
            width = layer.numel // layer.n_units
            starts.append(where.start - at.start + np.arange(layer.n_units) * width)
        if starts:
            yield at, np.concatenate(starts), slice(first, first + sum(map(len, starts)))
