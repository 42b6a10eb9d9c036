"""Metrics of an analysis for tools that scrape the cluster: ``ray_lcray_…`` in Prometheus."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from lcray.execution.worker.reports import SpanReport
from lcray.planning.plan import Span


class Metrics:
    """Counts spans, intervals and gradients, and shows the gap so far, by split."""

    def __init__(self) -> None:
        self._spans = Counter("lcray_spans_done", "Spans that are committed.")
        self._failed = Counter("lcray_spans_failed", "Spans that were given up.")
        self._intervals = Counter("lcray_intervals", "Intervals that are committed.")
        self._gradients = Counter("lcray_gradients", "Full-batch gradients, over all splits.")
        self._gap = Gauge(
            "lcray_gap", "Sum of LC minus the measured loss change so far, in nats.", ("split",)
        )
        self._sums: dict[str, float] = {}

    def done(self, span: Span, report: SpanReport) -> None:
        """Count a committed span."""
        self._spans.inc()
        self._intervals.inc(span.n_intervals)
        if report.n_gradients:
            self._gradients.inc(report.n_gradients)
        for split, (change, lc) in report.sums.items():
            self._sums[split] = self._sums.get(split, 0.0) + lc - change
            self._gap.set(self._sums[split], {"split": split})

    def failed(self) -> None:
        """Count a span that was given up."""
        self._failed.inc()
