"""simpson-sampled against Simpson in full, on five networks early and late in training.

Of every interval the part of each batch is computed once; samples of them are then drawn by the
hundred. That the rule gives what such a sample says is shown by `test_sampled`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from repository import EXAMPLES, needs_data
from torch import Tensor, nn

from lcray.allocation.path import Point, Segment
from lcray.allocation.sampled import BatchSample, Spread, merged, shows_spread
from lcray.execution.worker.workbench import Workbench
from lcray.planning.make import make_settings
from lcray.tasks.task import Task

pytestmark = [pytest.mark.slow, needs_data]

SAMPLES, DRAWS, INTERVALS = (12, 24), 200, 4
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Net:
    """A network of the examples, on a part of its data, and when its intervals begin."""

    script: str
    samples: int
    batch: int
    late: int
    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    gelu: bool = False

    def task(self) -> Task:
        sys.path.insert(0, str(EXAMPLES))
        try:
            task: Task = __import__(self.script).task
        finally:
            sys.path.pop(0)
        data = task.splits()["train"]  # type: ignore[operator]
        part = tuple(tensor[: self.samples] for tensor in data)
        build = smooth if self.gelu else task.model
        return replace(task, model=build, splits={"train": part}, groups=None)


def smooth() -> nn.Module:
    sizes, layers = (784, 100, 50, 10), [nn.Flatten()]  # type: list[nn.Module]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


NETS = {
    "fc": Net("mnist_fc", 2000, 41, 300, sgd, 0.05),
    "fc-gelu": Net("mnist_fc", 2000, 41, 300, sgd, 0.05, gelu=True),
    "lenet": Net("mnist_lenet", 500, 10, 80, sgd, 0.02),
    "resnet20": Net("cifar_resnet20", 240, 5, 40, sgd, 0.05),
    "gpt": Net("char_gpt", 192, 4, 150, torch.optim.AdamW, 1e-3),
}


def states(net: Net, task: Task) -> Iterator[list[dict[str, Tensor]]]:
    """Checkpoints early and late in training, one more than intervals."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = net.optimizer(model.parameters(), lr=net.rate)
    (data,) = task.splits.values()  # type: ignore[union-attr]
    order = torch.Generator().manual_seed(1)
    step = 0
    for begin in (8, net.late):
        found: list[dict[str, Tensor]] = []
        while step <= begin + INTERVALS:
            if step >= begin:
                found.append({k: v.clone() for k, v in model.state_dict().items()})
            model.train()
            chosen = torch.randint(len(data[0]), (64,), generator=order)
            losses = task.loss(model, tuple(part[chosen] for part in data))
            optimizer.zero_grad()
            (losses[0] if isinstance(losses, tuple) else losses).mean().backward()
            optimizer.step()
            step += 1
        yield found


def parts(bench: Workbench, found: list[dict[str, Tensor]]) -> list[Array]:
    """What every batch has of the correction, by layer and in all, [B, L + 1], per interval."""
    (split,) = bench.splits
    numbers = range(len(split.batches))
    strata = np.zeros(len(numbers), np.int64), np.array([len(numbers)])
    points = [Point(step, *bench.flat.flatten(s, step)) for step, s in enumerate(found)]
    made = []
    for start, end in itertools.pairwise(points):
        path = Segment(start, end)
        sample = BatchSample(bench.flat, split, path, numbers, strata, None)
        sample.normalize(1.0, ())
        for s in (0.0, 0.5, 1.0):
            bench.flat.differentiate_buffers(path.moving_buffers(bench.flat))
            path.set_point(bench.flat, s)
            bench.engine.sum_part(split, numbers, None, (), 1.0, merged(sample.taps(s)))
        made.append(sample.values())
    return made


@pytest.mark.parametrize("name", NETS)
def test_no_bias_and_errors_that_cover(name: str) -> None:
    net = NETS[name]
    task = net.task()
    bench = Workbench(task, make_settings({"batch_size": net.batch}))
    rng = np.random.default_rng(0)
    for phase, found in zip(("early", "late"), states(net, task), strict=True):
        first, *later = parts(bench, found)
        n_batches = len(first)
        assert n_batches >= 47
        whole = Spread.of(first, np.zeros(n_batches, np.int64), np.array([n_batches]))
        for n in SAMPLES:
            tells = shows_spread(whole.kurtosis, n)
            of, size = np.zeros(n, np.int64), np.array([n_batches])
            z = []
            for values in later:
                true = values.sum(axis=0)
                for _ in range(DRAWS):
                    drawn = values[rng.permutation(n_batches)[:n]]
                    error = n_batches * drawn.mean(axis=0) - true
                    z.append((error, np.sqrt(Spread.of(drawn, of, size).variance)))
            errors, ses = (np.array(each) for each in zip(*z, strict=True))
            moved = (ses > 0).all(axis=0)
            per = errors.reshape(len(later), DRAWS, -1)[..., moved]
            bias = per.mean(axis=1) / (per.std(axis=1, ddof=1) / np.sqrt(DRAWS))
            # Standard normal, layer by layer and interval by interval, which share the draws.
            assert np.abs(bias).max() < 5 and np.abs(bias.mean()) < 3, (phase, n, bias)
            covered = np.abs(errors) < 1.96 * ses
            shown = tells & moved
            if shown.any():
                assert covered[:, shown].mean() >= 0.9, (phase, n)
                assert covered[:, shown].mean(axis=0).min() >= 0.85, (phase, n)  # of 600 draws each
            assert (phase == "late" and net.script != "char_gpt") or shown.mean() > 0.5, (phase, n)
