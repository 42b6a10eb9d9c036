"""The command `lcray inspect`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import JSON, RUN, STEPS, Command, example


@click.command(
    cls=Command,
    epilog=example("lcray inspect runs/mine", "lcray inspect runs/mine --steps 0:100 --json"),
)
@RUN
@STEPS
@click.option("--layers", metavar="PATTERN", help="Only tensors whose names match, as in 'conv*'.")
@JSON
def inspect(run: str, steps: str | None, layers: str | None, as_json: bool) -> None:
    """Audit a run: gaps, duplicates, NaN, outliers, torn files, frozen tensors."""
    from lcray.cli.display.audit import audit_table

    found = lcray.inspect(run, steps, layers)
    terminal.show(asdict(found) | {"ok": found.ok}, lambda: audit_table(found), as_json)
    if not found.ok:
        sys.exit(1)
