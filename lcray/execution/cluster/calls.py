"""Calls of actors: errors on their way out of a worker, and into whoever called it."""

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
    """Run `work`; what it raises leaves the worker as an error that any process can read."""
    try:
        return work()
    except LcrayError as error:
        raise type(error)(str(error)) from None
    except Exception as error:
        raise ClusterError(f"worker: {in_one_line(error)}") from error


def fetched(references: Sequence[Reference]) -> dict[Reference, Any]:
    """What calls gave, all at once, which costs little more than one; nothing if one failed."""
    try:
        return dict(zip(references, ray.get([*references]), strict=True))
    except RayError:  # of whichever: `result` tells of each
        return {}


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
