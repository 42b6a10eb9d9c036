"""Workers that share the gradients of one span: a lead, and the members that it starts.

A team is placed as a whole, in one placement group: it works with all of its workers or not at all.
If one worker is lost, the team is lost: the driver removes the group with all remaining workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from lcray.allocation.partial_sums import Answer, Request, Seat, deal
from lcray.allocation.path import Point
from lcray.errors import TaskError, TeamError
from lcray.execution.cluster.calls import Reference, plainly, result
from lcray.execution.cluster.connect import in_one_line
from lcray.execution.cluster.resources import Placement
from lcray.execution.worker.data_parallel import (
    Colleague,
    Cut,
    Order,
    SentPoint,
    likeness,
    points_of,
)
from lcray.execution.worker.process import tune_process
from lcray.execution.worker.workbench import Share, Workbench
from lcray.planning.plan import Plan
from lcray.settings import Settings
from lcray.tasks.task import Task


def reserve(placed: Placement) -> PlacementGroup:
    """Reserve room for a team, on as few nodes as possible."""
    needs = {"CPU": placed.cpus, "GPU": placed.gpus, **placed.custom}
    bundle = {name: amount for name, amount in needs.items() if amount}
    room: PlacementGroup = placement_group([bundle] * placed.team, strategy="PACK")
    return room


def options_of(placed: Placement, group: PlacementGroup | None, index: int = 0) -> dict[str, Any]:
    """Options of Ray to start a worker, or the worker at a seat of the team in `group`."""
    where: Any = "SPREAD"
    if group is not None:
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {
        "num_cpus": placed.cpus,
        "num_gpus": placed.gpus,
        "resources": dict(placed.custom),
        "max_restarts": 0,
        "scheduling_strategy": where,
    }


class Member:
    """The actor of a worker of a team, except its lead."""

    def __init__(self) -> None:
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        tune_process(self._device)
        self._colleague: Colleague | None = None

    def set_up(
        self,
        load: Callable[[], Task],
        settings: Settings,
        threads: int,
        partial_sums: int,
        placed: Placement,
        seat: Seat,
    ) -> tuple[Any, ...]:
        """Build model and data; returns their likeness."""

        def work() -> tuple[Any, ...]:
            task = load()
            share = Share(self._device, threads, placed.memory, placed.sharers)
            bench = Workbench(task, settings, share=share, partial_sums=partial_sums, seat=seat)
            self._colleague = Colleague(bench)
            return likeness(bench, task)

        return plainly(work)

    def measure(self, sent: SentPoint) -> Any:
        """Evaluate a few samples of every split at a checkpoint."""
        assert self._colleague is not None
        return plainly(partial(self._colleague.measure, sent))

    def answer(self, order: Order, *sent: SentPoint) -> Any:
        """Compute the sums and the gradient of a part."""
        assert self._colleague is not None
        return plainly(partial(self._colleague.answer, order, sent))


class Team:
    """The members of a team, for its lead: a `lcray.execution.worker.data_parallel.Members`.

    Args:
        group: the room of the team.
        placed: how its workers are placed.
        arguments: the first ones of `Member.set_up`.
    """

    def __init__(self, group: PlacementGroup, placed: Placement, arguments: Sequence[Any]) -> None:
        kind: Any = ray.remote(Member)
        seats = [Seat(index, placed.team) for index in range(1, placed.team)]
        self._members = [
            kind.options(**options_of(placed, group, seat.index)).remote() for seat in seats
        ]
        self._starting = [
            member.set_up.remote(*arguments, placed, seat)
            for member, seat in zip(self._members, seats, strict=True)
        ]
        self._known: list[set[int]] = [set() for _ in seats]  # the steps that each member holds
        self._cut: Cut | None = None
        self._device = torch.device("cpu")

    def welcome(self, bench: Workbench, task: Task) -> None:
        """Wait until all members have set up, as the lead has.

        Raises:
            TaskError: if a member has another model, other data or another kind of device.
            TeamError: if a member has died.
        """
        self._device = bench.device
        own = likeness(bench, task)
        if any(found != own for found in map(_result, self._starting)):
            raise TaskError(
                "task: workers of a team differ in model, data or device; splits() and model() "
                "must give the same everywhere (seed what is random)"
            )
        self._starting = []

    def start(self, plan: Plan) -> None:
        """Prepare for a span of `plan`."""
        self._cut = Cut.of(plan)
        for known in self._known:
            known.clear()

    def measure(self, point: Point) -> Iterator[Any]:
        """Evaluate a few samples on each member; see `Members`."""
        sent = ray.put(SentPoint.of(point))
        return map(_result, [member.measure.remote(sent) for member in self._members])

    def share_out(self, request: Request, n_parts: int) -> tuple[range, Iterator[Answer]]:
        """Start the members on their parts; see `Members`."""
        own, *others = deal(n_parts, len(self._members) + 1)
        put: dict[int, Reference] = {}
        calls: list[Reference] = []
        for member, numbers, known in zip(self._members, others, self._known, strict=True):
            calls += [
                member.answer.remote(*order) for order in self._orders(request, numbers, known, put)
            ]
        return own, map(self._answer, calls)

    def _orders(
        self, request: Request, numbers: range, known: set[int], put: dict[int, Reference]
    ) -> Iterator[tuple[Any, ...]]:
        """The arguments of a member's calls; the first call sends its missing checkpoints."""
        assert self._cut is not None
        points = points_of(request)
        for number in numbers:
            missing = [step for step in points if step not in known]
            for step in missing:
                if step not in put:
                    put[step] = ray.put(SentPoint.of(points[step]))
            known.clear()
            known.update(points)
            order = Order(
                self._cut,
                request.split,
                number,
                tuple(points),
                request.site.s,
                request.share,
                request.gradient,
            )
            yield order, *(put[step] for step in missing)

    def _answer(self, call: Reference) -> Answer:
        sums, array = _result(call)
        if array is None:
            return Answer(sums.to(self._device), None)

        def gradient(where: slice) -> Tensor:
            # A copy of a block, since torch needs writable memory.
            return torch.tensor(array[where], device=self._device)

        return Answer(sums.to(self._device), gradient)


def _result(call: Reference) -> Any:
    try:
        return result(call)
    except RayError as error:
        raise TeamError(f"a worker of its team died ({in_one_line(error)})") from error
