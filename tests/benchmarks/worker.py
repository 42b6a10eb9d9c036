"""A player that does what a worker of an analysis does, without Ray."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from . import adapter, machine
from .peaks import peak_bytes


class Worker:
    """A workspace on one thread.

    Args:
        task: the reference of the task.
        run: the run.
        steps: the range of steps.
        span_length: intervals a span.
        options: fields of `Settings`.
    """

    def __init__(
        self, task: str, run: str, steps: str, span_length: int, options: dict[str, Any]
    ) -> None:
        adapter.tune()
        self._watch = adapter.time_evaluations()
        self._workspace = adapter.open_workspace(
            task, run, {"splits": ["train"], **options}, steps, sharers=2
        )
        self._span_length = span_length

    def draft(self) -> dict[str, Any]:
        """Make the plan that all workers use."""
        return adapter.draft(self._workspace, self._span_length).to_dict()

    def use(self, plan: dict[str, Any]) -> None:
        """Work by a plan."""
        self._plan = adapter.Plan.from_dict(plan)

    def round(self, index: int = 0, out: str | None = None) -> dict[str, float]:
        """Compute and commit a span; its files are removed unless `out` is given."""
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as scratch:
            self._watch.seconds, begin = 0.0, time.perf_counter()
            report = adapter.run_span(self._workspace, self._plan, index, Path(out or scratch))
            seconds = time.perf_counter() - begin
        return {
            "gradients": adapter.count_gradients(self._plan, report),
            "seconds": seconds,
            "inside": self._watch.seconds,
            "peak_bytes": peak_bytes(),
        }

    def peak(self, kind: str) -> float:
        """The best rate of ``sgemm`` or ``conv`` in FLOP/s, here and now."""
        return machine.best_rate(kind)

    def flops(self) -> float:
        """FLOPs of one sample, forward and backward."""
        return machine.count_flops(self._workspace.task)
