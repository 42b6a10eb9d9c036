"""What tables cost a worker per element and interval, without gradients and without disk.

The vectors are random: LC and gradients over several orders of magnitude, a tenth of the elements
at rest. Figures are processor time on one thread, medians over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .adapter import (
    ElementsWriter,
    IntervalLC,
    Plan,
    Point,
    Segment,
    SplitTables,
    tables_plan,
)
from .suite import Bench, Row

Shapes = list[tuple[int, ...]]

FC: Shapes = [(100, 784), (100,), (50, 100), (50,), (10, 50), (10,)]
LENET: Shapes = [(20, 1, 5, 5), (20,), (40, 20, 5, 5), (40,), (400, 640), (400,), (10, 400), (10,)]
STAGES = [(16, 16), *[(16, 16)] * 5, (16, 32), *[(32, 32)] * 5, (32, 64), *[(64, 64)] * 5]
RESNET: Shapes = [
    (16, 3, 3, 3),
    *(shape for i, o in STAGES for shape in ((o, i, 3, 3), (o,), (o,))),
    (10, 64),
    (10,),
]
LARGE: Shapes = [(3072, 768), (3072,), (768, 3072), (768,)] * 2 + [(768, 768)]
NETS = {"mnist-fc": FC, "mnist-lenet": LENET, "cifar-resnet20": RESNET, "10M": LARGE}


class Discarded:
    """Stands for the writer of a span's shards."""

    def __init__(self, span: Any) -> None:
        self.span = span

    def write(self, table: str, data: Any) -> None:
        """Nothing is written."""


def spread(random: torch.Generator, size: int, dtype: torch.dtype) -> Tensor:
    """Numbers over several orders of magnitude, [size]."""
    values = torch.randn(size, generator=random) * 1e-6
    return (values * torch.exp(2 * torch.randn(size, generator=random))).to(dtype)


class Player:
    """The tables of one split, fed with random intervals."""

    def __init__(self, plan: Plan, n: int) -> None:
        random = torch.Generator().manual_seed(0)
        size = self.size = sum(layer.numel for layer in plan.layers)
        still = torch.rand(size, generator=random) < 0.1
        self._points = [torch.randn(size, generator=random)]
        for _ in range(2):
            moved = self._points[0] + spread(random, size, torch.float32) * 1e2
            self._points.append(torch.where(still, self._points[0], moved))
        self._lc = [spread(random, size, torch.float64) for _ in range(2)]
        for lc in self._lc:
            lc[still] = 0.0
        self._gradients = [spread(random, size, torch.float32) for _ in range(2)]
        writer: Any = Discarded(plan.spans[0])
        self._tables = SplitTables(plan, plan.splits[0], writer, ElementsWriter(writer))
        self._n, self._step = n, 0

    def round(self) -> float:
        """Processor time per element and interval, in ns."""
        seconds = 0.0
        for _ in range(self._n):
            t = self._step % 2
            ends = (Point(self._step + i, self._points[(t + i) % 3], {}) for i in (0, 1))
            segment = Segment(*ends)
            segment.difference(slice(0, 1))  # small models have all of it by now
            found = IntervalLC(
                self._step, self._step + 1, "ok", 1.0, 1.0, "simpson", self._lc[t],
                start_gradient=self._gradients[t],
            )  # fmt: skip
            begin = time.process_time()
            self._tables.add(found, segment)
            seconds += time.process_time() - begin
            self._step += 1
        return seconds * 1e9 / self.size / self._n


def measure(name: str, bench: Bench) -> Iterator[Row]:
    """The default tables of one network."""
    torch.set_num_threads(1)
    size = sum(torch.Size(shape).numel() for shape in NETS[name])
    n = bench.pick(max(3, 10_000_000 // size), 2)
    rounds = bench.pick(7, 2)
    player = Player(tables_plan(NETS[name], n * (rounds + 1)), n)
    player.round()
    values = [player.round() for _ in range(rounds)]
    yield Row(f"tables/{name}", "per_element_and_interval", median(values), "ns")


CASES = {f"tables/{name}": partial(measure, name) for name in NETS}
