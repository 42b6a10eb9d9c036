"""The command `lcray trace`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import Command, example, folders
from lcray.execution.cluster.resources import Resources

_PLACING = {field.name for field in fields(Resources)}


@click.command(
    cls=Command,
    epilog=example("lcray trace runs/mine --task mytask:task --out out/mine --trace top:10"),
)
@click.argument("run", shell_complete=folders)
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
@click.option("--into", metavar="OUT", help="The new output  [default: OUT/traced].")
def trace(run: str, task: str, out: str, **options: Any) -> None:
    """Trace the parameters that helped and hurt most: a second pass over RUN, resumable.

    Under the plan of --out, with all of its gradients again. The new output has the tables
    intervals, layers and traces: weight, gradient and LC, step by step.
    """
    from lcray.cli.progress import reporting

    placed = {name: options.pop(name) for name in _PLACING & options.keys()}
    given = {name: value for name, value in placed.items() if value not in (None, ())}
    with reporting() as report:
        found = lcray.trace(
            run, task, out, resources=Resources(**given), on_progress=report, **options
        )
    terminal.say(f"tables: {found.path / 'tables'}/*.parquet")


def like(analyze: click.Command) -> click.Command:
    """The command, with what `analyze` says of the task and of workers."""
    wanted = {"task"} | _PLACING
    trace.params += [option for option in analyze.params if option.name in wanted]
    return trace
