"""Progress on stderr: a bar with the time left on a terminal, one line per minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from lcray.cli.units import duration
from lcray.execution.driver.progress import Progress as State
from lcray.planning.costs import START_SECONDS

_PHASES = {
    "start": "starting workers",
    "local": "working in this process",
    "restart": "Ray has ended; restarting it once",
    "probe": "measuring a gradient",
    "spans": "intervals",
    "reduce": "merging tables",
    "findings": "findings",
}
_COUNTED = ("spans", "findings")
_SECONDS_A_LINE = 60.0
_LONG = 600.0  # seconds; a longer analysis says so before it begins


@contextmanager
def reporting() -> Iterator[Callable[[State], None]]:
    """A function to tell the progress to, while the block lasts."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def working() -> Iterator[Callable[[State], None]]:
    """As `reporting`; what Ray and the user's modules print meanwhile goes to stderr."""
    with reporting() as report, redirect_stdout(sys.stderr):
        yield report


@contextmanager
def _bar() -> Iterator[Callable[[State], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None, left="")
        warn = _warner(lambda text: console.print(text, markup=False, soft_wrap=True))

        def report(state: State) -> None:
            warn(state)
            progress.update(
                bar,
                description=_PHASES[state.phase],
                completed=int(state.done + state.running),
                total=state.total or None,
                left=_left(state),
            )

        yield report


def _lines() -> Callable[[State], None]:
    last_phase, last_time = "", 0.0

    def write(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    warn = _warner(write)

    def report(state: State) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        finished = state.phase in _COUNTED and state.done == state.total
        if state.phase == last_phase and now - last_time < _SECONDS_A_LINE and not finished:
            return
        warn(state)
        last_phase, last_time = state.phase, now
        if state.phase == "local":
            return
        done = int(state.done + state.running)
        count = f" {done}/{state.total}" if state.phase in _COUNTED else ""
        left = _left(state) if (state.seconds_left or 0.0) >= _SECONDS_A_LINE else ""
        write(f"lcray: {_PHASES[state.phase]}{count}{', ' if left else ''}{left}")

    return report


def _left(state: State) -> str:
    known = state.seconds_left is not None and state.done < state.total
    return f"{duration(state.seconds_left)} left" if known else ""


def _warner(write: Callable[[str], None]) -> Callable[[State], None]:
    """Says once, before the first interval, that it will take long, and how to learn more.

    Also says that no workers are started, and why.
    """
    silent = False

    def warn(state: State) -> None:
        nonlocal silent
        if state.phase == "local":
            why = (
                ""
                if not state.seconds_left
                else f": all gradients take about {duration(state.seconds_left)}, starting workers "
                f"about {START_SECONDS:.0f} s (--no-local starts them)"
            )
            write(f"lcray: {_PHASES['local']}{why}")
        if state.phase != "spans" or silent:
            return
        silent = True
        if (state.seconds_left or 0.0) > _LONG:
            write(
                f"lcray: this will take about {duration(state.seconds_left)}; lcray plan "
                "explains why; after an interrupt, the same command resumes"
            )

    return warn
