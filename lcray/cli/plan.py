"""The command `lcray plan`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import lcray
from lcray.cli.options import ADDRESS, ANALYSIS, RUN, Answer, answers, command, keywords, together


@command(
    "lcray plan runs/mine --task mytask:task",
    "lcray plan runs/mine --task mytask:task --rule simpson-sampled --save plan.json",
)
@RUN
@together(*ANALYSIS, ADDRESS)
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan to this file."
)
@answers
def plan(run: str, task: str, save: Path | None, **options: Any) -> Answer:
    """Estimate what an analysis of RUN takes: gradients, time, memory, disk."""
    from lcray.cli.display.plan import plan_table

    with redirect_stdout(sys.stderr):
        report = lcray.plan(run, task, **keywords(options))
    if save is not None:
        report.save(save)
    data = {
        "estimate": asdict(report.estimate),
        "local": report.local,
        "workers": report.workers,
        "team": report.team,
        "interval_seconds": report.interval_seconds,
        "resident": report.resident,
        "notes": report.notes,
        "plan": report.plan.to_dict(),
    }
    return Answer(data, lambda: plan_table(report))
