"""The actor that a worker is, and how a task gets there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import ray
import ray.cloudpickle

from lcray.cluster.connecting import in_one_line
from lcray.errors import ClusterError, LcrayError, TaskError
from lcray.planning import Plan, Settings, Span
from lcray.process import tune_process
from lcray.reduction import Reduction, merge
from lcray.resources import Placement
from lcray.span import Description, Probe, SpanReport, Workspace
from lcray.storage import place
from lcray.task import TaskSource

T = TypeVar("T")


@dataclass(frozen=True)
class Shipment:
    """A task on its way to a worker, with the folders that the driver imports from."""

    search_path: tuple[str, ...]
    pickled: bytes

    @classmethod
    def pack(cls, source: TaskSource) -> Shipment:
        """Pack a source.

        Raises:
            TaskError: if the object cannot be sent.
        """
        try:
            return cls(tuple(sys.path), ray.cloudpickle.dumps(source))
        except Exception as error:
            raise TaskError(
                f"task: cannot be sent to workers ({in_one_line(error)}); name it module:attribute"
            ) from error

    def unpack(self) -> TaskSource:
        """The source, importable here wherever the driver's folders exist here as well."""
        known = set(sys.path)
        sys.path += [p for p in self.search_path if p not in known and os.path.exists(p)]
        try:
            source: TaskSource = ray.cloudpickle.loads(self.pickled)
        except Exception as error:
            raise TaskError(
                f"task: cannot be loaded on a worker ({in_one_line(error)}); is its code there too?"
            ) from error
        return source


class Worker:
    """The actor: a workspace, and the calls that the driver makes on it."""

    def __init__(self) -> None:
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        tune_process(self._device)
        self._workspace: Workspace | None = None

    def set_up(
        self,
        shipped: Shipment,
        run: str,
        settings: Settings,
        steps: str | None,
        threads: int,
        placement: Placement,
    ) -> Description:
        """Build model and data."""

        def work() -> Description:
            task = shipped.unpack().load()
            self._workspace = Workspace(
                task,
                run,
                settings,
                steps=steps,
                device=self._device,
                threads=threads,
                memory=placement.memory,
                sharers=placement.sharers,
            )
            return self._workspace.describe()

        return _plainly(work)

    def probe(self) -> Probe:
        """Evaluate the splits at the first checkpoint."""
        return _plainly(self._ready().probe)

    def losses(self, plan: Plan) -> dict[str, float]:
        """The mean loss of each split at the first checkpoint."""
        return _plainly(lambda: self._ready().losses(plan))

    def run_span(self, plan: Plan, span: Span, out: str, attempt: str) -> SpanReport:
        """Compute and commit a span."""
        return _plainly(lambda: self._ready().run(plan, span, place(out), attempt))

    def reduce(self, out: str, allow_missing: bool) -> Reduction:
        """Merge the shards of `out`, here rather than in the driver."""
        return _plainly(lambda: merge(out, allow_missing=allow_missing))

    def _ready(self) -> Workspace:
        if self._workspace is None:
            raise ClusterError("worker: was not set up")
        return self._workspace


def _plainly(work: Callable[[], T]) -> T:
    """Run `work`; what it raises leaves the worker as an error that any process can read."""
    try:
        return work()
    except LcrayError as error:
        raise type(error)(str(error)) from None
    except Exception as error:
        raise ClusterError(f"worker: {in_one_line(error)}") from error
