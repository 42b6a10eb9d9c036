"""The tasks of the benchmarks: the example networks without groups, and networks of any width."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcray import Recorder, Task

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import char_gpt
import cifar_resnet20
import mnist_fc
import mnist_lenet
from data import MNIST, load_images, minibatches

mnist_fc_task = replace(mnist_fc.task, groups=None)
mnist_lenet_task = replace(mnist_lenet.task, groups=None)
cifar_resnet20_task = replace(cifar_resnet20.task, groups=None)
char_gpt_task = replace(char_gpt.task, groups=None)


def shifted_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Every training digit at nine places, at most a pixel apart in each direction."""
    images, classes = load_images(MNIST)["train"]
    around = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    places = [around[:, :, y : y + 28, x : x + 28] for y in range(3) for x in range(3)]
    return {"train": (torch.cat(places), classes.repeat(9))}


shifted_fc_task = replace(mnist_fc_task, splits=shifted_digits)


def build_mlp(widths: tuple[int, ...]) -> nn.Module:
    """784-widths-10 with ReLU."""
    sizes = (784, *widths, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mlp(widths: tuple[int, ...] = (100,), samples: int = 8000, splits: int = 1) -> Task:
    """Digits and a fully connected network; every split holds the same `samples` digits."""
    digits = tuple(tensor[:samples].clone() for tensor in load_images(MNIST)["train"])
    return Task(partial(build_mlp, widths), {f"split{i}": digits for i in range(splits)}, loss)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of every digit, [n], in nats."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def in_groups(task: Task, count: int) -> Task:
    """`task` with its ten classes put into `count` groups."""
    return replace(task, groups=lambda batch: batch[1] % count)


def record(task: Task, run: Path, steps: int, rate: float = 0.02) -> Path:
    """Train by SGD with momentum on the first split, and record every step."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    splits = task.splits() if callable(task.splits) else task.splits
    batches = minibatches(next(iter(splits.values())), size=250, steps=steps, seed=0)
    with Recorder(model, run) as recorder:
        for batch in batches:
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
            recorder.step()
    return run
