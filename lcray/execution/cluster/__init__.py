"""Ray: actors with one workspace each, and the loop that hands spans to them.

This is the only package that imports ray. The driver's memory is O(workers + spans) and never holds
tensor data. Actors are stateless between spans, so losing one costs only its current span. When Ray
ends, it also ends the process connected to it. So the driver has a process of its own (`driver`),
and the process that called lcray supervises it (`supervision`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Pool", "connection", "workplace"]

if TYPE_CHECKING:
    from lcray.execution.cluster.connect import connection as connection
    from lcray.execution.cluster.pool import Pool as Pool
    from lcray.execution.cluster.supervision import workplace as workplace

# Imported on first use, since the driver's process starts Ray before it loads torch.
_PUBLIC = {
    "Pool": "pool",
    "connection": "connect",
    "workplace": "supervision",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lcray.execution.cluster' has no attribute {name!r}")
    return getattr(import_module(f"lcray.execution.cluster.{_PUBLIC[name]}"), name)
