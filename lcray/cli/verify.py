"""The command `lcray verify`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import JSON, OUT, Command, example, folders


@click.command(
    cls=Command, epilog=example("lcray verify out/mine", "lcray verify out/mine --run runs/mine")
)
@OUT
@click.option(
    "--run",
    metavar="RUN",
    shell_complete=folders,
    help="Also check that OUT was computed from the checkpoints of this run.",
)
@JSON
def verify(out: str, run: str | None, as_json: bool) -> None:
    """Check every checksum, coverage and additivity invariant of OUT."""
    found = lcray.verify(out, run=run)
    good = f"{out}: {len(found.checks)} checks, no problems"
    sums = [name for name in found.checks if "of kind parameter" in name]
    if sums:
        good += f" ({'; '.join(sums)}; the LC of buffers is in layers)"
    terminal.show(
        asdict(found) | {"ok": found.ok}, lambda: "\n".join(found.problems) or good, as_json
    )
    if not found.ok:
        sys.exit(1)
