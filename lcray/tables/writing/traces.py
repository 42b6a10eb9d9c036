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
    """Weight, gradient and LC of some elements, interval by interval, [S, T] each.

    Args:
        layout: layout of the flat vectors.
        samples: the indices of the elements, by the number of the layer.
        intervals: the largest T.
        dtype: dtype of weights and gradients.
    """

    def __init__(
        self,
        layout: Layout,
        samples: Mapping[int, NDArray[np.int64]],
        intervals: int,
        dtype: torch.dtype,
    ) -> None:
        self._samples, self._steps = samples, np.zeros(intervals, np.int64)
        places = [layout.places(number, index) for number, index in samples.items()]
        self._at = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *places]))
        shape = len(self._at), intervals
        self._weight, self._gradient = (torch.empty(shape, dtype=dtype) for _ in range(2))
        self._lc = torch.empty(shape, dtype=torch.float64)
        self._n = 0

    def add(self, step: int, weights: Tensor, gradient: Tensor | None, lc: Tensor | None) -> None:
        """Add an interval that starts at `step`."""
        self._steps[self._n] = step
        self._weight[:, self._n] = weights[self._at]
        self._gradient[:, self._n] = math.nan if gradient is None else gradient[self._at]
        self._lc[:, self._n] = math.nan if lc is None else lc[self._at]
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
                    name: value[row : row + len(part), : self._n].reshape(-1).numpy()
                    for name, value in values.items()
                }
                columns["index"] = np.repeat(part, self._n)
                columns["step"] = np.tile(steps, len(part))
                yield number, columns
                row += len(part)
