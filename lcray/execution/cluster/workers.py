"""The crew of workers: starting and ending them, and following the nodes of the cluster."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from lcray.errors import ClusterError, TaskError, TeamError, UsageError
from lcray.execution.cluster.actor import Worker
from lcray.execution.cluster.calls import Reference, result
from lcray.execution.cluster.connect import in_one_line
from lcray.execution.cluster.resources import Resources, place_workers
from lcray.execution.cluster.team import options_of, reserve
from lcray.execution.worker.descriptions import Description

_EARLY_DEATHS = 3  # per worker, in a row and during set-up, until the analysis ends

_ASKED = 3  # workers for the same call, until the call counts as the cause of death


class Crew:
    """Workers by number: ready workers, and workers that set up.

    If workers share gradients, a worker here is the lead of a team, which is placed, lost and ended
    with it.

    Args:
        setup: the first arguments of `Worker.set_up`.
        resources: the resources to use.
        limit: the most workers that can be kept busy.

    Raises:
        UsageError: if the cluster does not have the resources.
    """

    def __init__(self, setup: tuple[Any, ...], resources: Resources, limit: int) -> None:
        self._setup, self._resources, self.limit = setup, resources, limit
        self._placed = place_workers(resources, _nodes(), limit)
        # The kind of device is decided once, by the first nodes.
        self._resources = replace(resources, gpus_per_worker=self._placed.gpus)
        self._numbers = itertools.count()
        self.ready: dict[int, Any] = {}  # actors
        self._starting: dict[Reference, tuple[int, Any]] = {}
        self._rooms: dict[int, Any] = {}  # of teams
        self.description: Description | None = None
        self._early = 0  # deaths in a row

    @property
    def wanted(self) -> int:
        """The number of workers, or teams, that were asked for, or that fit."""
        return self._placed.workers

    @property
    def team(self) -> int:
        """Workers that share a gradient."""
        return self._placed.team

    @property
    def patience(self) -> float | None:
        """The user's limit for workers without progress, in seconds; None for the default."""
        return self._resources.patience

    @property
    def setting_up(self) -> list[Reference]:
        """References that are ready when a worker has set up."""
        return list(self._starting)

    def follow(self) -> None:
        """Look at the nodes: some may have joined or left.

        Workers that should start on a node that is gone are not waited for, unless the user gave
        their number: then there is room when a node joins.
        """
        try:
            self._placed = place_workers(self._resources, _nodes(), self.limit)
        except UsageError:  # no suitable node is left for now
            return
        surplus = len(self.ready) + len(self._starting) - self.wanted
        if self._resources.workers is None:
            for reference in list(self._starting)[-surplus:] if surplus > 0 else ():
                self._let_go(*self._starting.pop(reference))

    def fill(self, most: int) -> None:
        """Start workers until their number is `wanted` or `most`, whichever is smaller."""
        while len(self.ready) + len(self._starting) < min(self.wanted, most):
            number, placed, room = next(self._numbers), self._placed, None
            if placed.team > 1:
                room = self._rooms[number] = reserve(placed)
            worker: Any = ray.remote(Worker)
            actor = worker.options(**options_of(placed, room)).remote()
            reference = actor.set_up.remote(*self._setup, placed, room)
            self._starting[reference] = number, actor

    def _let_go(self, number: int, actor: Any) -> None:
        ray.kill(actor)
        if number in self._rooms:
            remove_placement_group(self._rooms.pop(number))  # kills all processes in it

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer of a ready worker; if it dies, another one is asked.

        Raises:
            RayError: if all workers that were asked have died.
            LcrayError: from the call.
        """
        for left in reversed(range(_ASKED)):
            number = self.await_one()
            try:
                return result(getattr(self.ready[number], method).remote(*arguments))
            except RayError:
                self.end(number)
                if not left:
                    raise
        raise AssertionError("unreachable")

    def await_one(self) -> int:
        """The number of a ready worker, after waiting for one if necessary.

        Raises:
            TaskError, CheckpointError, ClusterError: from setting up workers.
        """
        while not self.ready:
            self.fill(max(1, self.wanted))
            found, _ = ray.wait(self.setting_up, num_returns=1)
            self.welcome(found[0])
        first: int = next(iter(self.ready))
        return first

    def welcome(self, reference: Reference) -> int | None:
        """Add a worker that has set up; its description must equal the others'.

        Returns:
            Its number; None if it has died, so that others may be needed.

        Raises:
            TaskError, CheckpointError, ClusterError: from setting up workers.
        """
        number, actor = self._starting.pop(reference)
        try:
            found: Description = result(reference)
        except (RayError, TeamError) as error:
            self._let_go(number, actor)
            self._early += 1
            if self._early > _EARLY_DEATHS * self.wanted:
                raise ClusterError(
                    f"workers: keep dying while they set up ({in_one_line(error)}); is there "
                    "enough memory for model and data?"
                ) from error
            return None
        self.ready[number] = actor
        self._early = 0
        # The first worker's, even if it is gone: others may have computed with the same.
        self.description = self.description or found
        if found != self.description:
            raise TaskError(
                "task: workers differ in model, data or device; splits() and model() must give "
                "the same everywhere (seed what is random)"
            )
        return number

    def end(self, number: int) -> None:
        """End a worker that is lost, hangs, or is no longer needed."""
        self._let_go(number, self.ready.pop(number))

    def dismiss(self) -> None:
        """End all workers."""
        for number, actor in [*self.ready.items(), *self._starting.values()]:
            self._let_go(number, actor)
        self.ready.clear()
        self._starting.clear()


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
