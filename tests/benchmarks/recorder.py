"""What recording every step costs: LeNet on MNIST, batch 256, SGD with momentum, dropout.

Two models train in turns, blocks of steps with and without a recorder, so that a slow spell of the
machine hits both; a round's overhead is the quotient of its two blocks. `recorder_cpu_overhead`
compares processor time of the whole process, the writer's thread included: with one thread it is
the figure to trust on a machine that others use as well (waiting threads of a larger team spin, and
count).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lcray.checkpoints import Recorder

from .player import Player
from .suite import Bench, Row

BATCH = 256


def lenet() -> nn.Module:
    """conv5-20, pool, conv5-40, pool, fc400, fc10, with dropout: 280,970 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 40, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(640, 400),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(400, 10),
    )


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST as floats `[8000, 1, 28, 28]` in [0, 1] and labels `[8000]`."""
    with np.load(folder / "mnist_10k.npz") as arrays:
        x = torch.from_numpy(arrays["x_train"]).float().div_(255).unsqueeze(1)
        return x, torch.from_numpy(arrays["y_train"])


def trainer(x: torch.Tensor, y: torch.Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """A model, and a function that takes one training step on it."""
    torch.manual_seed(0)
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

    return model, step


def timed(step: Callable[[], object], n: int) -> tuple[float, float]:
    """Seconds a call, over `n` calls: of the wall clock, and of the processor."""
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(n):
        step()
    return (time.perf_counter() - begin) / n, (time.process_time() - cpu) / n


def compare(
    x: torch.Tensor, y: torch.Tensor, folder: Path, rounds: int, steps: int
) -> dict[str, float]:
    """Medians over interleaved rounds: seconds a step without, with, and inside `Recorder.step`."""
    _, plain = trainer(x, y)
    model, step = trainer(x, y)
    inside: list[float] = []
    with Recorder(model, folder) as recorder:

        def recorded() -> None:
            step()
            begin = time.perf_counter()
            recorder.step()
            inside.append(time.perf_counter() - begin)

        timed(plain, 5), timed(recorded, 5)
        inside.clear()
        pairs = []
        for i in range(rounds):
            order = [plain, recorded] if i % 2 == 0 else [recorded, plain]
            seconds = {f: timed(f, steps) for f in order}
            pairs.append((seconds[plain], seconds[recorded]))
    return {
        "step_plain": statistics.median(a[0] for a, _ in pairs),
        "step_recorded": statistics.median(b[0] for _, b in pairs),
        "recorder_step": statistics.median(inside),
        "recorder_overhead": statistics.median(b[0] / a[0] for a, b in pairs) - 1,
        "recorder_cpu_overhead": statistics.median(b[1] / a[1] for a, b in pairs) - 1,
    }


class Trainer:
    """A player that trains with and without a recorder."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._data = load(Path(os.environ["LCRAY_DATA"]))

    def compare(self, rounds: int, steps: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as folder:
            return compare(*self._data, Path(folder) / "run", rounds, steps)


def measure(bench: Bench) -> Iterator[Row]:
    """The figures with one thread and with two."""
    for threads in bench.pick((1, 2), (1,)):
        with Player("tests.benchmarks.recorder:Trainer", threads=threads) as trainer:
            figures = trainer.ask("compare", rounds=bench.pick(20, 2), steps=bench.pick(10, 2))
        for metric, value in figures.items():
            unit = "ratio" if metric.endswith("overhead") else "s"
            yield Row(f"mnist-lenet training threads={threads}", metric, value, unit)


CASES = {"recorder": measure}
