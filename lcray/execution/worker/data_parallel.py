"""What a worker does for the lead of its team: sums over its parts of a split.

The worker has the model and its own part of the data. The lead sends each checkpoint once. The
worker derives the points between them, and the directions of the groups' derivatives, as the lead
does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lcray.allocation.partial_sums import Colleagues, PartSums, Request, Site, cut_parts
from lcray.allocation.path import Point, Segment
from lcray.execution.worker.agreement import measure
from lcray.execution.worker.workbench import Workbench
from lcray.planning.plan import Plan, Reference
from lcray.tasks.model.vectors import zeros
from lcray.tasks.task import Task, source_hash


class Members(Colleagues, Protocol):
    """The other workers of a team, as the workspace of its lead sees them."""

    def start(self, plan: Plan) -> None:
        """Prepare for a span of `plan`."""

    def measure(self, point: Point) -> Iterable[Mapping[str, Reference]]:
        """Evaluate a few samples of every split at a checkpoint, on each member."""


@dataclass(frozen=True)
class Cut:
    """How the plan cuts data and sums.

    Attributes:
        batch_size: the most samples per batch.
        memory_format: memory format of model and data.
        partial_sums: number of parts in which the batches of a split are summed.
    """

    batch_size: int
    memory_format: str
    partial_sums: int

    @classmethod
    def of(cls, plan: Plan) -> Cut:
        """The cut of `plan`."""
        return cls(plan.batch_size, plan.memory_format, plan.partial_sums)


@dataclass(frozen=True)
class Order:
    """A part to compute.

    Attributes:
        cut: the cut of the plan.
        split: the name of the split.
        number: the number of the part.
        steps: steps of the checkpoints: both ends of the path, and the next one if it is needed.
        s: the position on the path.
        share: the factor of Σ w ∂ℓ/∂θ.
        gradient: whether to compute the gradient.
    """

    cut: Cut
    split: str
    number: int
    steps: tuple[int, ...]
    s: float
    share: float
    gradient: bool


@dataclass(frozen=True)
class SentPoint:
    """A checkpoint to send: [P] in the compute dtype, and the tensors that do not move."""

    step: int
    vector: NDArray[Any]
    constants: Mapping[str, Tensor]

    @classmethod
    def of(cls, point: Point) -> SentPoint:
        """Copy `point` to the CPU."""
        constants = {name: value.cpu() for name, value in point.constants.items()}
        return cls(point.step, point.vector.cpu().numpy(), constants)


def points_of(request: Request) -> dict[int, Point]:
    """The checkpoints that an evaluation needs, by step, in order."""
    path, following = request.site.segment, request.site.following
    points = [path.start, path.end] + ([] if following is None else [following.end])
    return {point.step: point for point in points}


def likeness(bench: Workbench, task: Task) -> tuple[Any, ...]:
    """What must be the same for all workers of a team."""
    source = source_hash(task, bench.flat.model)
    declared = source, task.batch_loss
    return bench.flat.layers, bench.hashes, bench.base_hash(), bench.device.type, declared


class Colleague:
    """A worker of a team that is not its lead.

    Args:
        bench: the task's model and data.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._points: dict[int, Point] = {}
        self._paths: dict[tuple[int, int], Segment] = {}
        self._sum: Tensor | None = None

    def answer(
        self, order: Order, sent: Sequence[SentPoint]
    ) -> tuple[PartSums, NDArray[np.float64] | None]:
        """The sums of a part, on the CPU, and its gradient [P], valid until the next call.

        Args:
            order: what to compute.
            sent: the checkpoints it needs that no earlier order had.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        cut, engine = order.cut, self._bench.engine
        self._bench.adopt(cut.batch_size, cut.memory_format, cut.partial_sums, whole=False)
        site = self._site(order, sent)
        split = next(split for split in self._bench.splits if split.name == order.split)
        directions = site.enter(engine.flat)
        out = None
        if order.gradient:
            self._sum = out = engine.new_vector() if self._sum is None else self._sum.zero_()
        batches = cut_parts(len(split.batches), cut.partial_sums)[order.number]
        sums = engine.sum_part(split, batches, out, directions, order.share)
        return sums.to("cpu"), None if out is None else out.cpu().numpy()

    def measure(self, sent: SentPoint) -> dict[str, Reference]:
        """Evaluate a few samples of every split at a checkpoint.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        return measure(self._bench, self._kept(sent))

    def _site(self, order: Order, sent: Sequence[SentPoint]) -> Site:
        for point in sent:
            self._points[point.step] = self._kept(point)
        self._points = {step: self._points[step] for step in order.steps}
        known = {point.step for point in sent}
        self._paths = {
            ends: path
            for ends, path in self._paths.items()
            if set(ends) <= set(order.steps) - known
        }
        start, end, *after = order.steps
        following = self._path(end, after[0]) if after else None
        return Site(self._path(start, end), order.s, following)

    def _path(self, start: int, end: int) -> Segment:
        made = Segment(self._points[start], self._points[end])
        return self._paths.setdefault((start, end), made)

    def _kept(self, sent: SentPoint) -> Point:
        """A copy of a sent checkpoint, so that it can leave the memory that workers share."""
        flat = self._bench.flat
        vector = zeros(len(flat.theta), flat.theta.dtype)
        np.copyto(vector.numpy(), sent.vector)
        return Point(sent.step, vector.to(flat.theta.device), sent.constants)
