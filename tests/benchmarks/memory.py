"""A worker's memory, beside activations and data, in float32 vectors of the parameters.

The networks are wide and the data small, so that vectors of P are what counts. What a process takes
that has imported everything and has worked on a tiny network is subtracted. What is left has a
part that does not grow with P (buffers of fixed size, code that only large matrices need): so two
networks are measured, and the slope between them is the figure beside that of the larger one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import adapter
from .peaks import peak_bytes, resident_bytes
from .player import Player
from .suite import Bench, Row
from .tasks import mlp, record

WIDE, WIDER, TINY = (4096, 1024), (8192, 1024), (4,)
SAMPLES = 64
INTERVALS = 4
RULES: dict[str, dict[str, Any]] = {
    "trapezoid": {"rule": "trapezoid"},
    "simpson": {},
    "simpson refined to 16 panels": {"refine": True, "rtol": 1e-12, "max_panels": 16},
    "gauss-lobatto": {"rule": "gauss-lobatto"},
    "simpson-sampled": {"rule": "simpson-sampled"},
}


class Footprint:
    """A player whose memory grows: first the tiny network, then the wide one."""

    def __init__(self) -> None:
        adapter.tune()

    def tiny(self, run: str) -> int:
        """Bytes in use after all code was at work once."""
        self._work(TINY, run, {})
        return resident_bytes()

    def wide(self, widths: list[int], run: str, options: dict[str, Any]) -> int:
        """The most bytes that were ever in use."""
        self._work(tuple(widths), run, options)
        return peak_bytes()

    def _work(self, widths: tuple[int, ...], run: str, options: dict[str, Any]) -> None:
        workspace = adapter.open_workspace(mlp(widths, SAMPLES), run, options)
        plan = adapter.draft(workspace, INTERVALS)
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as out:
            adapter.run_span(workspace, plan, 0, Path(out))


def measure(bench: Bench) -> Iterator[Row]:
    """One process for each rule and size: the peak of a process never falls."""
    tiny = str(record(mlp(TINY, 1000), bench.folder / "tiny", INTERVALS))
    runs: dict[tuple[int, ...], tuple[str, int]] = {}
    for widths in (WIDE, WIDER):
        task = mlp(widths, 1000)
        run = record(task, bench.folder / f"wide-{widths[0]}", INTERVALS)
        runs[widths] = str(run), sum(p.numel() for p in task.model().parameters())
    for name in bench.pick([*RULES], ["simpson", "simpson-sampled"]):
        if not adapter.has_rule(RULES[name].get("rule", "simpson")):
            continue
        found = []
        for widths, (run_of, size) in runs.items():
            environment = adapter.worker_environment()
            with Player("tests.benchmarks.memory:Footprint", environment) as player:
                base = player.ask("tiny", run=tiny)
                peak = player.ask("wide", widths=widths, run=run_of, options=RULES[name])
            found.append((4 * size, peak - base))
        (small, less), (large, more) = found
        case = f"memory {name}"
        yield Row(case, "memory_over_parameters", more / large, "4 P bytes")
        slope = (more - less) / (large - small)
        yield Row(case, "memory_growth_with_parameters", slope, "4 P bytes")


CASES = {"memory": measure}
