"""The command `lcray verify`."""

from __future__ import annotations

from dataclasses import asdict

import click

import lcray
from lcray.cli.options import OUT, Answer, answers, command, folders


@command("lcray verify out/mine", "lcray verify out/mine --run runs/mine")
@OUT
@click.option(
    "--run",
    metavar="RUN",
    shell_complete=folders,
    help="Also check that OUT was computed from the checkpoints of this run.",
)
@answers
def verify(out: str, run: str | None) -> Answer:
    """Check every checksum, coverage and additivity invariant of OUT."""
    found = lcray.verify(out, run=run)
    good = f"{out}: {len(found.checks)} checks, no problems"
    sums = [name for name in found.checks if "of kind parameter" in name]
    if sums:
        good += f" ({'; '.join(sums)}; the LC of buffers is in layers)"
    data = asdict(found) | {"ok": found.ok}
    return Answer(data, lambda: "\n".join(found.problems) or good, found.ok)
