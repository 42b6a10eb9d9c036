"""The command `lcray trace`."""

from __future__ import annotations

from typing import Any

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import ADDRESS, PLACING, RUN, TASK, command, folders, keywords, together


@command("lcray trace runs/mine --task mytask:task --out out/mine --trace top:10")
@RUN
@click.option(
    "--out",
    required=True,
    metavar="OUT",
    shell_complete=folders,
    help="An output of the same run and task.",
)
@click.option(
    "--trace",
    "elements",
    multiple=True,
    default=("top:10",),
    show_default=True,
    metavar="WHAT",
    help="top:K, the K parameters that helped and the K that hurt most; or layer:index "
    "(repeatable).",
)
@click.option("--into", metavar="OUT", help="The new output.  [default: OUT/traced]")
@together(TASK, *PLACING, ADDRESS)
def trace(run: str, task: str, out: str, **options: Any) -> None:
    """Trace the parameters that helped and hurt most: a second pass over RUN, resumable.

    It follows the plan of --out and computes all gradients again. The new output has the tables
    intervals, layers and traces: weight, gradient and LC, step by step.
    """
    from lcray.cli.progress import reporting

    with reporting() as report:
        found = lcray.trace(run, task, out, on_progress=report, **keywords(options))
    terminal.say(f"tables: {found.path / 'tables'}/*.parquet")
