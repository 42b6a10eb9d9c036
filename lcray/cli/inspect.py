"""The command `lcray inspect`."""

from __future__ import annotations

from dataclasses import asdict

import click

import lcray
from lcray.cli.options import RUN, STEPS, Answer, answers, command


@command("lcray inspect runs/mine", "lcray inspect runs/mine --steps 0:100 --json")
@RUN
@STEPS
@click.option("--layers", metavar="PATTERN", help="Only tensors whose names match, as in 'conv*'.")
@answers
def inspect(run: str, steps: str | None, layers: str | None) -> Answer:
    """Audit a run: gaps, duplicates, NaN, outliers, torn files, frozen tensors."""
    from lcray.cli.display.audit import audit_table

    found = lcray.inspect(run, steps, layers)
    return Answer(asdict(found) | {"ok": found.ok}, lambda: audit_table(found), found.ok)
