"""A small share of the simulation of a million intervals: nothing is lost, whatever goes wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from benchmarks import scale, simulation
from benchmarks.player import Player

import lcray


def test_the_scheduler_sees_all_spans_done_by_workers_that_fail() -> None:
    counts = scale.schedule(5000, 200)
    assert counts["given_up"] < 5000 * 1e-4
    assert counts["failed"] > 20 and counts["lost"] > 5
    assert counts["events"] == 5000 - counts["given_up"] + counts["failed"] + counts["lost"]


def tables(out: Path) -> dict[str, str]:
    lcray.reduce(out)
    files = sorted((out / "tables").glob("*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_with_failures_deaths_and_stragglers_loses_nothing(tmp_path: Path) -> None:
    quiet, wild = tmp_path / "quiet", tmp_path / "wild"
    for out in (quiet, wild):
        plan = simulation.make(out, 1600, 8, 3, ("intervals", "layers"))
    for span in plan.spans:
        simulation.write_span(plan, span, quiet, "a")
    faults = {"error": 0.05, "death": 0.01, "straggle": 0.02, "slow": 0.5}
    with Player(scale.DRIVER) as driver:
        found = driver.ask("drive", out=str(wild), workers=20, nodes=2, faults=faults)
        again = driver.ask("resume", out=str(wild))
    assert found["workers_lost"] > 0
    assert (again["spans"], again["intervals"], again["given_up"]) == (200, 1600, 0)
    assert tables(wild) == tables(quiet)
