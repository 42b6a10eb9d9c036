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
    Command,
    example,
    folders,
    given,
    take_resources,
    together,
)


@click.command(
    cls=Command,
    epilog=example(
        "lcray analyze runs/mine --task mytask:task --out out/mine",
        "lcray analyze runs/mine --task mytask:task --out out/few --samples 2000 --steps 0:100",
        "lcray analyze runs/mine --task mytask:task --out out/mine --plan plan.json",
    ),
)
@RUN
@together(*ANALYSIS, ADDRESS)
@click.option(
    "--out",
    required=True,
    metavar="OUT",
    shell_complete=folders,
    help="Output directory, or its URI; new, or of the same analysis, which then goes on.",
)
@together(*COURSE)
@JSON
def analyze(
    run: str, task: str, out: str, saved: Path | None, as_json: bool, **options: Any
) -> None:
    """Allocate the loss changes of RUN to its parameters, into the tables of --out.

    Running the same command again resumes: what is committed is skipped, and steps that the run
    has gained are added. Interrupting loses nothing that is committed.
    """
    from lcray.cli.display.frames import records
    from lcray.cli.display.results import summary, totals
    from lcray.cli.progress import working

    resources = take_resources(options)
    with working() as report:
        results = lcray.analyze(
            run,
            task,
            out,
            plan=saved,
            resources=resources,
            on_progress=report,
            **given(options),
        )
    data = records(totals(results))
    terminal.show({"out": str(out), "splits": data}, lambda: summary(results), as_json)
    if not as_json:
        terminal.say(f"next: lcray report {out}")
