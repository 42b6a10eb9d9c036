"""The command line: thin calls of the public functions. Exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click

import lcray
from lcray.cli import compare, convert, export, findings, submit, terminal, trace
from lcray.cli import query as query_command
from lcray.cli import report as report_command
from lcray.cli.options import (
    ADDRESS,
    ANALYSIS,
    COURSE,
    JSON,
    OUT,
    RUN,
    STEPS,
    Group,
    example,
    folders,
    given,
    refusal,
    take_resources,
    together,
)
from lcray.errors import LcrayError, UsageError
from lcray.storage.interrupt import Stopped

_SECONDS_A_LOOK = 5.0


@click.group(
    cls=Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": terminal.HELP_WIDTH,
    },
    epilog="Every command has --help with examples. Docs: docs/ of the repository; completion: "
    "docs/completion.md.",
)
@click.version_option(lcray.__version__, prog_name="lcray")
def app() -> None:
    """Loss change allocation over checkpoints: which parameters learned, when, by how much.

    \b
    First steps:
      lcray demo                                        train, analyze and look
      lcray inspect RUN                                 is this run fit for analysis?
      lcray plan RUN --task module:task                 how long will it take?
      lcray analyze RUN --task module:task --out OUT    loss change allocation, to Parquet
      lcray report OUT                                  one HTML page: charts and tables
      lcray query OUT "SELECT * FROM layers"            ask DuckDB

    \b
    The way: record (lcray.Recorder in the training loop, or any safetensors
    checkpoints) -> inspect -> plan -> analyze -> report.
    """  # noqa: D301 - click takes the backspace for a paragraph to be left as it is


@app.command(epilog=example("lcray demo", "lcray demo --dir /tmp/try --workers 2"))
@click.option(
    "--dir",
    "directory",
    default="lcray-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    shell_complete=folders,
    help="Where run and output go.",
)
@click.option("--workers", type=int, help="Number of workers.  [default: one per CPU core]")
def demo(directory: Path, workers: int | None) -> None:
    """Train a small net on handwritten digits, analyze it, and show what there is."""
    from lcray import digits
    from lcray.cli import display

    console = terminal.console()
    console.print(f"Training a small LeNet on scikit-learn's digits, recording {directory / 'run'}")
    with _working() as report:
        results = digits.demo(directory, workers=workers, on_progress=report)
    console.print(display.layer_table(results), "", display.summary(results), "")
    query = (
        "SELECT layer, sum(lc) AS lc FROM layers WHERE split = 'train' GROUP BY layer ORDER BY lc"
    )
    console.print("LC < 0 helps: it lowered the loss. To go on:")
    console.print(f"  lcray report {results.path}")
    console.print(f'  lcray query {results.path} "{query}"')


@app.command(
    epilog=example("lcray inspect runs/mine", "lcray inspect runs/mine --steps 0:100 --json")
)
@RUN
@STEPS
@click.option("--layers", metavar="PATTERN", help="Only tensors whose names match, as in 'conv*'.")
@JSON
def inspect(run: str, steps: str | None, layers: str | None, as_json: bool) -> None:
    """Audit a run: gaps, duplicates, NaN, outliers, torn files, what is frozen."""
    from lcray.cli import display

    found = lcray.inspect(run, steps, layers)
    _show(asdict(found) | {"ok": found.ok}, lambda: display.audit_table(found), as_json)
    if not found.ok:
        sys.exit(1)


@app.command(
    epilog=example(
        "lcray plan runs/mine --task mytask:task",
        "lcray plan runs/mine --task mytask:task --rule auto --rtol 0.05 --save plan.json",
    )
)
@RUN
@together(*ANALYSIS, ADDRESS)
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan to this file."
)
@JSON
def plan(run: str, task: str, save: Path | None, as_json: bool, **options: Any) -> None:
    """Say what an analysis of RUN would take: gradients, time, memory, disk."""
    from lcray.cli import display

    with redirect_stdout(sys.stderr):
        report = lcray.plan(run, task, resources=take_resources(options), **given(options))
    if save is not None:
        report.save(save)
    data = {
        "estimate": asdict(report.estimate),
        "workers": report.workers,
        "team": report.team,
        "interval_seconds": report.interval_seconds,
        "resident": report.resident,
        "notes": report.notes,
        "plan": report.plan.to_dict(),
    }
    _show(data, lambda: display.plan_table(report), as_json)


@app.command(
    epilog=example(
        "lcray analyze runs/mine --task mytask:task --out out/mine",
        "lcray analyze runs/mine --task mytask:task --out out/few --samples 2000 --steps 0:100",
        "lcray analyze runs/mine --task mytask:task --out out/mine --plan plan.json",
    )
)
@RUN
@together(*ANALYSIS, ADDRESS)
@click.option(
    "--out",
    required=True,
    metavar="OUT",
    shell_complete=folders,
    help="Output directory, or its URI; new, or of the same analysis, which then goes on.",
)
@together(*COURSE)
@JSON
def analyze(
    run: str, task: str, out: str, saved: Path | None, as_json: bool, **options: Any
) -> None:
    """Allocate the loss changes of RUN to its parameters, into the tables of --out.

    Running the same command again resumes: what is committed is skipped, and steps that the run
    has gained are added. Interrupting loses nothing that is committed.
    """
    from lcray.cli import display

    resources = take_resources(options)
    with _working() as report:
        results = lcray.analyze(
            run,
            task,
            out,
            plan=saved,
            resources=resources,
            on_progress=report,
            **given(options),
        )
    data = display.records(display.totals(results))
    _show({"out": str(out), "splits": data}, lambda: display.summary(results), as_json)
    if not as_json:
        terminal.say(f"next: lcray {'report' if 'report' in app.commands else 'findings'} {out}")


app.add_command(submit.submit)
app.add_command(trace.trace)
app.add_command(findings.findings)
app.add_command(compare.compare)
app.add_command(query_command.query)
app.add_command(export.export)
app.add_command(convert.convert)
app.add_command(report_command.report)


@app.command(epilog=example("lcray reduce out/mine", "lcray reduce out/mine --allow-missing"))
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


@app.command(epilog=example("lcray verify out/mine", "lcray verify out/mine --run runs/mine"))
@OUT
@click.option(
    "--run",
    metavar="RUN",
    shell_complete=folders,
    help="Read this run again too: are its checkpoints those that OUT was computed from?",
)
@JSON
def verify(out: str, run: str | None, as_json: bool) -> None:
    """Check every checksum, coverage and additivity invariant of OUT."""
    found = lcray.verify(out, run=run)
    good = f"{out}: {len(found.checks)} checks, no problems"
    sums = [name for name in found.checks if "of kind parameter" in name]
    if sums:
        good += f" ({'; '.join(sums)}; the LC of buffers is in layers)"
    _show(asdict(found) | {"ok": found.ok}, lambda: "\n".join(found.problems) or good, as_json)
    if not found.ok:
        sys.exit(1)


@app.command(epilog=example("lcray status out/mine", "lcray status out/mine --watch"))
@OUT
@click.option("--watch", is_flag=True, help="Show it again and again, until the analysis ends.")
@JSON
def status(out: str, watch: bool, as_json: bool) -> None:
    """Say how far the analysis of OUT is: done, running, failed, time left, gap so far.

    --watch gives up, with exit code 1, on a driver that was killed, or has given no sign for half a
    minute.
    """
    from lcray.cli import display
    from lcray.execution.driver.status import Silence

    silence = Silence(out)
    while True:
        found = lcray.status(out)
        _show(asdict(found), partial(display.status_text, found), as_json)
        is_final = found.state in ("finished", "failed", "interrupted")
        if not watch or (is_final and not found.silent):
            break
        silence.check(found)
        time.sleep(_SECONDS_A_LOOK)
        if not as_json:
            terminal.say("")


def _show(data: dict[str, Any], render: Callable[[], Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(data, default=str))
    else:
        terminal.console().print(render())


@contextmanager
def _working() -> Iterator[Callable[[Any], None]]:
    """What shows progress; what Ray and the user's modules print meanwhile goes to stderr."""
    from lcray.cli.progress import reporting

    with reporting() as report, redirect_stdout(sys.stderr):
        yield report


def main() -> None:
    """Run the command line; every error is one line on stderr."""
    # The default ends the process without unwinding, which would leave workers behind; and Ray
    # makes an exit code of its own of SystemExit, but passes KeyboardInterrupt on.
    received = [signal.SIGINT]

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    terminal.prepare()
    try:
        app(prog_name="lcray", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        terminal.say(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        terminal.say(f"lcray: {refusal(error)}", err=True)
        sys.exit(error.exit_code)
    except LcrayError as error:
        terminal.say(f"lcray: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, click.Abort) as error:
        known = str(error.__cause__ or "")
        terminal.say(f"lcray: interrupted{'; ' if known else ''}{known}", err=True)
        if isinstance(error.__cause__, Stopped):  # in order would be late, or never
            os._exit(128 + signal.SIGINT)  # whichever signal it was: a query leaves nothing undone
        sys.exit(128 + received[-1])
