"""The command `lcray reduce`."""

from __future__ import annotations

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import OUT, command


@command("lcray reduce out/mine", "lcray reduce out/mine --allow-missing")
@OUT
@click.option("--allow-missing", is_flag=True, help="Merge even if intervals are missing.")
def reduce(out: str, allow_missing: bool) -> None:
    """Merge the shards of OUT into its tables."""
    from lcray.tables.reducing.reduce import name_intervals

    found = lcray.reduce(out, allow_missing=allow_missing)
    for table, rows in found.rows.items():
        terminal.say(f"{table}: {rows:,} rows")
    if found.missing:
        terminal.say(f"missing steps: {name_intervals(found.missing)}")
