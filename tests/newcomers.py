"""Tasks as a newcomer may write them, each wrong in one way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scenes import Pair, build_plain, cross_entropy, points
from torch import Tensor, nn

from lcray.tasks.task import Task


def mean(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def number(model: nn.Module, batch: Pair) -> Any:
    return mean(model, batch).item()


def detached(model: nn.Module, batch: Pair) -> Tensor:
    return cross_entropy(model, batch).detach()


def nothing(model: nn.Module, batch: Pair) -> Any:
    cross_entropy(model, batch)


def dropped(model: nn.Module, batch: Pair) -> Tensor:
    return F.dropout(cross_entropy(model, batch))


def byte_labels() -> dict[str, Pair]:
    return {name: (x, y.to(torch.uint8)) for name, (x, y) in points().items()}


def float_labels() -> dict[str, Pair]:
    return {name: (x, y.float()) for name, (x, y) in points().items()}


def uneven() -> dict[str, Pair]:
    return {name: (x, y[:-1]) for name, (x, y) in points().items()}


def elsewhere() -> dict[str, Pair]:
    return torch.load("data/of/someone/else.pt")  # type: ignore[no-any-return]


def bare() -> Any:
    return points()["train"]


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def renamed() -> nn.Module:
    return nn.ModuleDict({"body": build_plain()})


class Sized(nn.Module):
    """Needs an argument that nobody gives."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 3)


no_task = {"model": build_plain, "splits": points, "loss": cross_entropy}
reduced = Task(build_plain, points, mean)
of_numbers = Task(build_plain, points, number)
without_graph = Task(build_plain, points, detached)
returns_nothing = Task(build_plain, points, nothing)
random = Task(build_plain, points, dropped)
bytes_as_labels = Task(build_plain, byte_labels, cross_entropy)
floats_as_labels = Task(build_plain, float_labels, cross_entropy)
of_other_lengths = Task(build_plain, uneven, cross_entropy)
data_elsewhere = Task(build_plain, elsewhere, cross_entropy)
one_split_bare = Task(build_plain, bare, cross_entropy)
other_shapes = Task(wider, points, cross_entropy)
other_names = Task(renamed, points, cross_entropy)
model_with_argument = Task(Sized, points, cross_entropy)  # type: ignore[arg-type]
