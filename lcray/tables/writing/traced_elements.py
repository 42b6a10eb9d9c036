"""Which elements are traced; without torch, since readers ask this as well."""

from __future__ import annotations

import zlib
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from lcray.planning.plan import Plan
from lcray.storage.numbers import whole_number


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
