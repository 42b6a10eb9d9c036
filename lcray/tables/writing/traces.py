"""Traced elements, whose weight, gradient and LC are kept at each step.

Legend: P elements, S traced elements, T intervals of a span.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.planning.plan import Plan
from lcray.storage.numbers import whole_number
from lcray.tasks.model.layout import Layout


def trace_indices(plan: Plan, *, sample_only: bool = False) -> dict[int, NDArray[np.int64]]:
    """The elements to trace, ascending, by the number of the layer: a seeded sample and named ones.

    The sample of a layer depends on the seed and the layer's name alone. With `sample_only`, the
    named ones are left out: statistics should cover elements that nobody chose.
    """
    named: dict[str, list[int]] = defaultdict(list)
    for item in () if sample_only else plan.settings.trace:
        name, _, digits = item.rpartition(":")
        element = whole_number(digits)
        if name and element is not None:
            named[name].append(element)
    chosen = {}
    for number, layer in enumerate(plan.layers):
        if layer.name not in plan.detail_layers and layer.name not in named:
            continue
        size = min(plan.trace_sample, layer.numel) if layer.name in plan.detail_layers else 0
        seed = [plan.settings.trace_seed, zlib.crc32(layer.name.encode())]
        sample = np.random.default_rng(seed).choice(layer.numel, size, replace=False)
        own = [element for element in named[layer.name] if element < layer.numel]
        index = np.unique(np.concatenate([sample, np.asarray(own, np.int64)]))
        if len(index):
            chosen[number] = index.astype(np.int64)
    return chosen


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
