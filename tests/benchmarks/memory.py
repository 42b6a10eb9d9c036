"""A worker's memory, beside activations and data, in float32 vectors of the parameters.

The network is wide (P = 7.4 million) and the data small, so that vectors of P are what counts. What
a process takes that has imported everything and has worked on a tiny network is subtracted.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import adapter
from .player import Player
from .suite import Bench, Row
from .tasks import mlp, record

WIDTHS, TINY = (4096, 1024), (4,)
SAMPLES = 64
INTERVALS = 4
RULES: dict[str, dict[str, Any]] = {
    "trapezoid": {"rule": "trapezoid"},
    "simpson": {},
    "simpson refined to 16 panels": {"refine": True, "rtol": 1e-12, "max_panels": 16},
    "gauss-lobatto": {"rule": "gauss-lobatto"},
    "auto": {"rule": "auto"},
}


class Footprint:
    """A player whose memory grows: first the tiny network, then the wide one."""

    def __init__(self) -> None:
        adapter.tune()

    def tiny(self, run: str) -> int:
        """Bytes in use after all code was at work once."""
        self._work(TINY, run, {})
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def wide(self, run: str, options: dict[str, Any]) -> int:
        """The most bytes that were ever in use."""
        self._work(WIDTHS, run, options)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _work(self, widths: tuple[int, ...], run: str, options: dict[str, Any]) -> None:
        workspace = adapter.open_workspace(mlp(widths, SAMPLES), run, options)
        plan = adapter.draft(workspace, INTERVALS)
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as out:
            adapter.run_span(workspace, plan, 0, Path(out))


def measure(bench: Bench) -> Iterator[Row]:
    """One process for each rule: the peak of a process never falls."""
    task = mlp(WIDTHS, 1000)
    size = sum(parameter.numel() for parameter in task.model().parameters())
    wide = str(record(task, bench.folder / "wide", INTERVALS))
    tiny = str(record(mlp(TINY, 1000), bench.folder / "tiny", INTERVALS))
    for name in bench.pick([*RULES], ["simpson", "auto"]):
        if not adapter.has_rule(RULES[name].get("rule", "simpson")):
            continue
        with Player("tests.benchmarks.memory:Footprint", adapter.worker_environment()) as player:
            base = player.ask("tiny", run=tiny)
            extra = player.ask("wide", run=wide, options=RULES[name]) - base
        yield Row(f"memory {name}", "memory_over_parameters", extra / (4 * size), "4 P bytes")


CASES = {"memory": measure}
