"""The command `lcray findings`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

import lcray


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


@click.command()
@click.argument("out")
@click.option(
    "--window", type=int, help="Width of the windows in steps  [default: the analysis's]."
)
@click.option(
    "--windows",
    metavar="NAME=A:B,…",
    callback=ranges,
    help="Windows by name: the intervals with A <= start step < B, as in early=0:100,late=900:.",
)
@click.option("--only", multiple=True, help="Only this finding (repeatable).")
@click.option("--seed", default=0, show_default=True, help="Of every random draw.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def findings(out: str, only: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Turn the tables of OUT into findings: who helps, how LC is distributed, and more.

    Each goes to OUT/findings/NAME.parquet; shown is a summary of the whole run.
    """
    from rich.console import Console

    from lcray import display

    found = lcray.findings(out, only=only or None, **options)
    if as_json:
        tables = {name: display.records(table.to_pandas()) for name, table in found.items()}
        data = {"path": str(found.path), "findings": tables, "impossible": found.impossible}
        click.echo(json.dumps(data, default=str))
        return
    width = None if sys.stdout.isatty() else 10_000  # no table is folded in a file or a pipe
    console = Console(width=width, soft_wrap=True, highlight=False, markup=False)
    console.print(display.findings_summary(found))
