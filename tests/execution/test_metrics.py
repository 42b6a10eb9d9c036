"""What is counted for whoever scrapes the cluster; `test_cluster` sees Ray export it."""

from __future__ import annotations

import pytest

from lcray.execution.cluster.metrics import Metrics
from lcray.execution.worker.reports import SpanReport
from lcray.planning.plan import Span


def test_every_count_and_the_gap_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums by hand."""
    values: dict[tuple[str, str], float] = {}

    class Noted:
        def __init__(self, name: str, *more: object) -> None:
            self._name = name

        def inc(self, value: float = 1.0) -> None:
            values[self._name, ""] = values.get((self._name, ""), 0.0) + value

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self._name, tags["split"]] = value

    monkeypatch.setattr("lcray.execution.cluster.metrics.Counter", Noted)
    monkeypatch.setattr("lcray.execution.cluster.metrics.Gauge", Noted)
    metrics = Metrics()
    metrics.done(
        Span((0, 1, 2, 3)), SpanReport(True, 12, 1.0, {"a": (-2.0, -1.5), "b": (1.0, 0.0)})
    )
    metrics.done(Span((3, 4)), SpanReport(True, 5, 1.0, {"a": (-1.0, -1.25)}))
    metrics.done(Span((4, 6)), SpanReport(False, 0, 0.0))
    metrics.failed()
    assert values == {
        ("lcray_spans_done", ""): 3,
        ("lcray_spans_failed", ""): 1,
        ("lcray_intervals", ""): 5,
        ("lcray_gradients", ""): 17,
        ("lcray_gap", "a"): 0.25,
        ("lcray_gap", "b"): -1.0,
    }
