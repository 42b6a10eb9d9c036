"""Calls of actors, and how errors travel from a worker to the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from lcray.errors import ClusterError, LcrayError
from lcray.execution.cluster.connect import in_one_line

T = TypeVar("T")

Reference = Any  # of a result on the cluster: ray.ObjectRef


def plainly(work: Callable[[], T]) -> T:
    """Run `work`; an exception leaves the worker as an error that any process can read."""
    try:
        return work()
    except LcrayError as error:
        raise type(error)(str(error)) from None
    except Exception as error:
        raise ClusterError(f"worker: {in_one_line(error)}") from error


def fetched(references: Sequence[Reference]) -> dict[Reference, Any]:
    """The results of calls, fetched together for little more than one; empty if one failed."""
    try:
        return dict(zip(references, ray.get([*references]), strict=True))
    except RayError:  # of any of them: `result` raises it for its call
        return {}


def result(reference: Reference) -> Any:
    """The result of a call; an `LcrayError` in the worker is raised unchanged.

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
