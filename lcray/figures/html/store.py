"""The arrays of a page, each packed once, and references to them and to their parts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: The least number of values that are kept in single precision: seven digits suffice for a chart.
SINGLE_FROM = 4096

Reference = dict[str, Any]


@dataclass(frozen=True)
class Packed:
    """An array in a store.

    Attributes:
        number: its position there.
        shape: of the array.
    """

    number: int
    shape: tuple[int, ...]

    @property
    def whole(self) -> Reference:
        """The whole array; with two axes, as rows."""
        if len(self.shape) == 2:
            return {"$": self.number, "rows": self.shape[0]}
        return {"$": self.number}

    @property
    def flat(self) -> Reference:
        """The array's values, row by row."""
        return {"$": self.number}

    def row(self, *index: int) -> Reference:
        """A part of the array along its first axes."""
        size = int(np.prod(self.shape[len(index) :], dtype=np.int64))
        number = int(np.ravel_multi_index(index, self.shape[: len(index)]))
        return {"$": self.number, "at": [number * size, size]}

    def matrix(self, *index: int) -> Reference:
        """The same part, as rows."""
        return {**self.row(*index), "rows": self.shape[len(index)]}


@dataclass(frozen=True)
class Store:
    """The arrays of a page.

    Attributes:
        arrays: each as ``[dtype, base64]``, little-endian, in the order in which they were added.
    """

    arrays: list[list[str]] = field(default_factory=list)
    _known: dict[tuple[str, bytes], int] = field(default_factory=dict, repr=False)

    def add(self, values: Any) -> Packed:
        """Pack numbers; the same numbers are packed once.

        Args:
            values: an array or sequence of numbers; NaN for missing values.
        """
        array = np.ascontiguousarray(values)
        kind = _dtype(array)
        data = array.astype("<" + kind).tobytes()
        number = self._known.setdefault((kind, data), len(self.arrays))
        if number == len(self.arrays):
            self.arrays.append([kind, base64.b64encode(data).decode()])
        return Packed(number, array.shape)

    def put(self, values: Any) -> Reference:
        """Pack the values, and return a reference to them."""
        return self.add(values).whole


def _dtype(array: np.ndarray[Any, Any]) -> str:
    if array.dtype.kind in "iub":
        largest = int(np.abs(array.astype(np.int64)).max(initial=0))
        return "i4" if largest < 2**31 else "f8"  # exact to 2**53
    return "f8" if array.size < SINGLE_FROM else "f4"


def column(
    name: str, values: Reference | Sequence[Any], unit: str = "", *, each: int = 1
) -> dict[str, Any]:
    """A column of a figure's table; its value at row i is ``values[i // each % len(values)]``."""
    return {"name": name, "unit": unit, "values": values, "each": each}
