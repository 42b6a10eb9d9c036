"""The command `lcray status`."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import JSON, OUT, command
from lcray.cli.units import duration
from lcray.errors import one_line

if TYPE_CHECKING:
    from lcray.execution.driver.status import Status

_SECONDS_A_LOOK = 5.0


@command("lcray status out/mine", "lcray status out/mine --watch")
@OUT
@click.option("--watch", is_flag=True, help="Show it repeatedly, until the analysis ends.")
@JSON
def status(out: str, watch: bool, as_json: bool) -> None:
    """Show the progress of the analysis of OUT: done, running, failed, time left, gap so far.

    --watch gives up, with exit code 1, on a driver that was killed, or has given no sign for half a
    minute.
    """
    from lcray.execution.driver.status import Silence

    silence = Silence(out)
    while True:
        found = lcray.status(out)
        terminal.show(asdict(found), partial(status_text, found), as_json)
        is_final = found.state in ("finished", "failed", "interrupted")
        if not watch or (is_final and not found.silent):
            break
        silence.check(found)
        time.sleep(_SECONDS_A_LOOK)
        if not as_json:
            terminal.say("")


def status_text(found: Status) -> str:
    """The progress of an analysis, a few lines of text."""
    is_quiet = found.silent and found.state != "interrupted"
    lines = [
        f"{found.state}{' (no recent sign of the driver)' if is_quiet else ''}: "
        f"{found.intervals_done:,}/{found.intervals:,} intervals, "
        f"{found.spans_done:,}/{found.spans:,} spans, {found.workers} workers"
    ]
    if found.rate:
        lines.append(f"{found.rate:.3g} intervals/s, {duration(found.seconds_left or 0.0)} left")
    for split, gap in found.gaps.items():
        share = f" ({gap.gap / abs(gap.loss_change):.3%})" if gap.loss_change else ""
        lines.append(
            f"{split}: change {gap.loss_change:+.4f}, LC {gap.lc:+.4f}, gap {gap.gap:+.2g}{share}"
        )
    lines += [
        f"running: {held.first}-{held.last}, {held.done:.0f}/{held.intervals} intervals in "
        f"{duration(held.seconds)}{f', try {held.attempt}' if held.attempt > 1 else ''}"
        for held in found.running
    ]
    lines += [f"failed: {span.first}-{span.last}: {span.reason}" for span in found.failed]
    lines += [f"error: {found.error}"] if found.error else []
    lines += [f"as of {found.written}"] if found.written else []
    return "\n".join(map(one_line, lines))
