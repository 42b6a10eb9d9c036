"""The command `lcray analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import (
    ADDRESS,
    ANALYSIS,
    COURSE,
    JSON,
    RUN,
    command,
    folders,
    keywords,
    together,
)


@command(
    "lcray analyze runs/mine --task mytask:task --out out/mine",
    "lcray analyze runs/mine --task mytask:task --out out/few --samples 2000 --steps 0:100",
    "lcray analyze runs/mine --task mytask:task --out out/mine --plan plan.json",
)
@RUN
@together(*ANALYSIS, ADDRESS)
@click.option(
    "--out",
    required=True,
    metavar="OUT",
    shell_complete=folders,
    help="Output directory or URI: a new one, or one of the same analysis, which is then resumed.",
)
@together(*COURSE)
@JSON
def analyze(
    run: str, task: str, out: str, saved: Path | None, as_json: bool, **options: Any
) -> None:
    """Allocate the loss changes of RUN to its parameters, into the tables of --out.

    Run the same command again to resume: committed spans are skipped, and new steps of the run are
    added. An interrupt loses nothing that is committed.
    """
    from lcray.cli.display.frames import records
    from lcray.cli.display.results import summary, totals
    from lcray.cli.progress import working

    with working() as report:
        results = lcray.analyze(
            run,
            task,
            out,
            plan=saved,
            on_progress=report,
            **keywords(options),
        )
    data = records(totals(results))
    terminal.show({"out": str(out), "splits": data}, lambda: summary(results), as_json)
    if not as_json:
        terminal.say(f"next: lcray report {out}")
