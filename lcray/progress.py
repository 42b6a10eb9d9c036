"""Progress on stderr: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lcray.computing import Progress as State

_PHASES = {
    "start": "starting workers",
    "probe": "measuring a gradient",
    "spans": "intervals",
    "reduce": "merging tables",
}
_SECONDS_A_LINE = 60.0


@contextmanager
def reporting() -> Iterator[Callable[[State], None]]:
    """A function to tell the progress to, while the block lasts."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Callable[[State], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)

        def report(state: State) -> None:
            progress.update(
                bar,
                description=_PHASES[state.phase],
                completed=state.done,
                total=state.total or None,
            )

        yield report


def _lines() -> Callable[[State], None]:
    last_phase, last_time = "", 0.0

    def report(state: State) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        finished = state.phase == "spans" and state.done == state.total
        if state.phase == last_phase and now - last_time < _SECONDS_A_LINE and not finished:
            return
        last_phase, last_time = state.phase, now
        count = f" {state.done}/{state.total}" if state.phase == "spans" else ""
        sys.stderr.write(f"lcray: {_PHASES[state.phase]}{count}\n")
        sys.stderr.flush()

    return report
