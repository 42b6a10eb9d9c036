"""Traced elements, whose weight, gradient and LC are kept at each step.

Legend: P elements, S traced elements, T intervals of a span.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.tasks.model.layout import Layout


class Traces:
    """Weight, gradient and LC of some elements, interval by interval, [T, S] each.

    Args:
        layout: layout of the flat vectors.
        samples: the indices of the elements, by the number of the layer.
        intervals: the largest T.
        dtype: dtype of weights and gradients.
        device: where the vectors are; rows stay there until they are asked for.
    """

    def __init__(
        self,
        layout: Layout,
        samples: Mapping[int, NDArray[np.int64]],
        intervals: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._samples, self._steps = samples, np.zeros(intervals, np.int64)
        places = [layout.places(number, index) for number, index in samples.items()]
        self._at = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *places])).to(device)
        shape = intervals, len(self._at)
        self._weight, self._gradient = (
            torch.empty(shape, dtype=dtype, device=device) for _ in range(2)
        )
        self._lc = torch.empty(shape, dtype=torch.float64, device=device)
        self._n = 0

    def add(self, step: int, weights: Tensor, gradient: Tensor | None, lc: Tensor | None) -> None:
        """Add an interval that starts at `step`."""
        self._steps[self._n] = step
        for rows, vector in ((self._weight, weights), (self._gradient, gradient), (self._lc, lc)):
            if vector is None:
                rows[self._n] = math.nan
            else:
                torch.index_select(vector, 0, self._at, out=rows[self._n])
        self._n += 1

    def columns(self, most: int) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """The layer's number and the columns of `traces`, in blocks of at most `most` rows."""
        steps, row = self._steps[: self._n], 0
        size = max(1, most // max(1, self._n))
        for number, index in self._samples.items():
            for start in range(0, len(index), size):
                part = index[start : start + size]
                values = {
                    "weight": self._weight,
                    "gradient": self._gradient,
                    "lc": self._lc,
                }
                columns = {
                    name: value[: self._n, row : row + len(part)].T.reshape(-1).cpu().numpy()
                    for name, value in values.items()
                }
                columns["index"] = np.repeat(part, self._n)
                columns["step"] = np.tile(steps, len(part))
                yield number, columns
                row += len(part)
