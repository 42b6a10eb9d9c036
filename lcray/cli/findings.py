"""The command `lcray findings`."""

from __future__ import annotations

import json
from typing import Any

import click

import lcray
from lcray.analyses.titles import TITLES
from lcray.cli import terminal
from lcray.cli.options import JSON, OUT, Command, after_commas, command, finding_names


def ranges(
    context: click.Context, parameter: click.Parameter, given: str | None
) -> dict[str, str] | None:
    """Windows by name, from ``name=a:b,…``."""
    if given is None:
        return None
    found = {}
    for item in given.split(","):
        name, separator, text = item.partition("=")
        if not separator or name in found:
            raise click.BadParameter(f"{item!r} must have the form name=a:b, each name once")
        found[name] = text
    return found


class _Findings(Command):
    """Lists the findings in its help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Findings, for --only"):
            formatter.write_dl([*TITLES.items()])


@command(
    "lcray findings out/mine",
    "lcray findings out/mine --only shares,fits --windows early=0:20,late=80:100",
    cls=_Findings,
)
@OUT
@click.option(
    "--window", type=int, help="Width of the windows in steps.  [default: the analysis's]"
)
@click.option(
    "--windows",
    metavar="NAME=A:B,…",
    callback=ranges,
    help="Windows by name: the intervals with A <= start step < B, as in early=0:100,late=900:.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME,…",
    callback=after_commas,
    shell_complete=finding_names,
    help="Only these findings, of those below.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of every random draw.")
@JSON
def findings(out: str, only: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Turn the tables of OUT into findings: who helps, how LC is distributed, and more.

    Each is written to OUT/findings/NAME.parquet; the summary shown covers the whole run.
    """
    from lcray.cli.display.findings import findings_summary
    from lcray.cli.display.frames import records
    from lcray.cli.progress import reporting
    from lcray.execution.driver.progress import Progress

    with reporting() as report:
        found = lcray.findings(
            out,
            only=only or None,
            on_progress=lambda name, done, total: report(Progress("findings", done, total)),
            **options,
        )
    if as_json:
        tables = {name: records(table.to_pandas()) for name, table in found.items()}
        data = {"path": str(found.path), "findings": tables, "impossible": found.impossible}
        click.echo(json.dumps(data, default=str))
        return
    console = terminal.console()
    console.print(findings_summary(found, console.width))
