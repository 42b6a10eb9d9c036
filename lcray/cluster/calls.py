"""Calls of actors: errors on their way out of a worker, and into whoever called it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from lcray.cluster.connecting import in_one_line
from lcray.errors import ClusterError, LcrayError

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
