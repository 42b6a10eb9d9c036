"""The workers there are: starting and ending them, and following the nodes of the cluster."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from lcray.cluster.actor import Worker
from lcray.cluster.connecting import in_one_line
from lcray.errors import ClusterError, LcrayError, TaskError, UsageError
from lcray.resources import Resources, place_workers
from lcray.span import Description

Reference = Any  # of a result on the cluster: ray.ObjectRef

_EARLY_DEATHS = 3  # a worker, in a row and while they set up, until the analysis ends

_ASKED = 3  # workers for the same, until it is taken to be what kills them


def result(reference: Reference) -> Any:
    """What a call gave; an `LcrayError` of the worker's is raised as it was.

    Raises:
        RayError: if the worker is lost.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LcrayError):
            raise type(cause)(str(cause)) from error
        raise ClusterError(f"worker: {in_one_line(cause)}") from error


class Crew:
    """Workers by number: those that are ready, and those that set up.

    Args:
        setup: the first arguments of `Worker.set_up`.
        resources: what may be used.
        limit: the most workers that there is work for.

    Raises:
        UsageError: for resources that cannot be had.
    """

    def __init__(self, setup: tuple[Any, ...], resources: Resources, limit: int) -> None:
        self._setup, self._resources, self.limit = setup, resources, limit
        self._placed = place_workers(resources, _nodes(), limit)
        # Which kind of device is used is decided once, by the nodes that were there first.
        self._resources = replace(resources, gpus_per_worker=self._placed.gpus)
        self._numbers = itertools.count()
        self.ready: dict[int, Any] = {}  # actors
        self._starting: dict[Reference, tuple[int, Any]] = {}
        self.description: Description | None = None
        self._early = 0  # deaths in a row

    @property
    def wanted(self) -> int:
        """The number of workers that were asked for, or fit."""
        return self._placed.workers

    @property
    def patience(self) -> float | None:
        """What the user says about workers that make no progress."""
        return self._resources.patience

    @property
    def setting_up(self) -> list[Reference]:
        """What tells that a worker has set up."""
        return list(self._starting)

    def follow(self) -> None:
        """See what nodes there are now: some may have joined or left.

        Workers that were to start on a node that is gone are not waited for, unless they were
        asked for by number: then there is room as soon as a node joins.
        """
        try:
            self._placed = place_workers(self._resources, _nodes(), self.limit)
        except UsageError:  # no node that fits is left for now
            return
        surplus = len(self.ready) + len(self._starting) - self.wanted
        if self._resources.workers is None:
            for reference in list(self._starting)[-surplus:] if surplus > 0 else ():
                ray.kill(self._starting.pop(reference)[1])

    def fill(self, most: int) -> None:
        """Start workers until there are as many as are wanted, or `most`."""
        while len(self.ready) + len(self._starting) < min(self.wanted, most):
            placed = self._placed
            worker: Any = ray.remote(Worker)
            actor = worker.options(
                num_cpus=placed.cpus,
                num_gpus=placed.gpus,
                resources=dict(placed.custom),
                scheduling_strategy="SPREAD",
                max_restarts=0,
            ).remote()
            reference = actor.set_up.remote(*self._setup, placed)
            self._starting[reference] = next(self._numbers), actor

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a worker that is ready answers; another one is asked where it dies.

        Raises:
            RayError: if all have died that were asked.
            LcrayError: as the call raises it.
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
        """A worker that is ready.

        Raises:
            TaskError, CheckpointError, ClusterError: as setting up raises them.
        """
        while not self.ready:
            self.fill(max(1, self.wanted))
            found, _ = ray.wait(self.setting_up, num_returns=1)
            self.welcome(found[0])
        first: int = next(iter(self.ready))
        return first

    def welcome(self, reference: Reference) -> int | None:
        """Take in a worker that has set up: it must have found what the others found.

        Returns:
            its number; None if it has died, and others may be needed.

        Raises:
            TaskError, CheckpointError, ClusterError: as setting up raises them.
        """
        number, actor = self._starting.pop(reference)
        try:
            found: Description = result(reference)
        except RayError as error:
            ray.kill(actor)
            self._early += 1
            if self._early > _EARLY_DEATHS * self.wanted:
                raise ClusterError(
                    f"workers: keep dying while they set up ({in_one_line(error)}); is there "
                    "enough memory for model and data?"
                ) from error
            return None
        self.ready[number] = actor
        self._early = 0
        # The first one's, even where that worker is gone: others may have computed with the same.
        self.description = self.description or found
        if found != self.description:
            raise TaskError(
                "task: workers differ in model, data or device; splits() and model() must give "
                "the same everywhere (seed what is random)"
            )
        return number

    def end(self, number: int) -> None:
        """End a worker that is lost, hangs, or is no longer needed."""
        ray.kill(self.ready.pop(number))

    def dismiss(self) -> None:
        """End all of them."""
        for actor in [*self.ready.values(), *(actor for _, actor in self._starting.values())]:
            ray.kill(actor)
        self.ready.clear()
        self._starting.clear()


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
