"""The command line: thin calls of the public functions. Exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from rich.console import Console

import lcray
from lcray import compare_command, findings_command, submit_command, trace_command
from lcray.errors import LcrayError, UsageError
from lcray.planning import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

_SECONDS_A_LOOK = 5.0
_DEFAULTS = {field.name: field.default for field in fields(Settings)}


def _option(name: str, text: str, **kwargs: Any) -> Callable[[Command], Command]:
    """An option for a field of `Settings`; the default stays the library's."""
    field = name.split("/")[0].removeprefix("--").replace("-", "_")
    default = _DEFAULTS.get(field)
    shown = f"  [default: {default}]" if default not in (None, False, (), True) else ""
    return click.option(name, default=None, help=text + shown, **kwargs)


def _amounts(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, float]:
    """``name=amount`` each."""
    found = {}
    for item in given:
        name, _, amount = item.rpartition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"{item!r} must have the form name=amount")
    return found


_SETTINGS = (
    _option(
        "--rule",
        "left (first order), midpoint, trapezoid, simpson (RK4), gauss-lobatto, gauss; rule*n; or "
        "auto: trapezoid where the gap and regular midpoint probes allow, else simpson, halved "
        "where needed, within --rtol.",
    ),
    _option("--refine", "Halve the panels of intervals that miss the tolerance.", is_flag=True),
    _option("--rtol", "Tolerance of the gap, relative to the loss change.", type=float),
    _option("--max-panels", "Cap of the refinement.", type=int),
    click.option("--split", "splits", multiple=True, help="Only this split (repeatable)."),
    _option(
        "--samples",
        "Samples of a split to take at most, drawn at random; results are then estimates with "
        "confidence intervals  [default: all].",
        type=int,
    ),
    _option("--sample-seed", "Seed of that draw.", type=int),
    _option("--layers", "Only these layers in the detailed tables, as in 'conv*'."),
    _option("--batch-norm", "running: the checkpoint's statistics; batch: the batch's own."),
    _option("--dtype", "float32 or float64."),
    _option("--batch-size", "Samples a batch  [default: chosen by a short probe].", type=int),
    _option("--memory-format", "contiguous, channels_last, or auto: the faster one."),
    _option("--partial-sums", "Parts of each gradient  [default: --data-parallel].", type=int),
    _option("--batch-seed", "Seed of the batches where they are part of the loss.", type=int),
    _option("--partial", "Checkpoints may lack tensors (adapters).", is_flag=True),
    _option("--window", "Width of the windows of histograms and fits, in steps.", type=int),
    _option("--elements", "Write the elements table: LC of every element.", is_flag=True),
    _option("--parameters/--no-parameters", "Force the parameters and traces tables on or off."),
    _option("--units", "Write units also for layers with more than 10,000.", is_flag=True),
    click.option("--trace", multiple=True, help="Trace this element, as layer:index (repeatable)."),
    _option("--trace-seed", "Seed of the sample of traced elements.", type=int),
    _option(
        "--fisher",
        "Write the fisher table, at every step or, as --fisher=K, at the multiples of K: the trace "
        "of each layer's Fisher information, by targets that the model draws (sample_targets of "
        "the task) and by those of the data.",
        type=int,
        is_flag=False,
        flag_value=1,
        metavar="[=K]",
    ),
    _option("--fisher-kind", "both, or empirical: by the data's targets alone."),
    _option("--fisher-samples", "The most samples of a split that fisher takes.", type=int),
    _option("--fisher-seed", "Seed of these samples, and of the targets drawn.", type=int),
    _option("--deterministic/--no-deterministic", "Enforce deterministic algorithms on CUDA."),
)
_RUN = (
    click.argument("run"),
    click.option("--task", required=True, help="package.module:attribute or file.py:attribute."),
    click.option("--steps", help="Only checkpoints with a <= step <= b, as in 100:200."),
    click.option("--span-length", type=int, help="Intervals a span, the unit of work and retry."),
    click.option("--workers", type=int, help="Workers; one a GPU, else one a CPU core."),
    click.option("--data-parallel", type=int, default=1, help="Workers that share a gradient."),
    click.option("--gpus-per-worker", type=float, help="GPUs each; fractions share one."),
    click.option(
        "--cpus-per-worker", type=float, default=1.0, show_default=True, help="CPUs each."
    ),
    click.option(
        "--resource",
        "custom",
        multiple=True,
        metavar="NAME=AMOUNT",
        callback=_amounts,
        help="A custom resource of the cluster that each takes (repeatable).",
    ),
    click.option("--threads", type=int, help="Threads a worker  [default: 1]."),
    click.option(
        "--memory", type=float, help="GiB a worker  [default: its share of what is free]."
    ),
    click.option(
        "--patience",
        type=float,
        help="Seconds without progress after which a worker is replaced  [default: 20 times what "
        "a step should take, at least 300].",
    ),
    click.option("--address", help="Ray cluster to use; its own local Ray by default."),
)
_OUT = click.argument("out")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def _with(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _resources(options: dict[str, Any]) -> Any:
    names = [field.name for field in fields(lcray.Resources)]
    return lcray.Resources(**{name: options.pop(name) for name in names})


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, ())}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(lcray.__version__, prog_name="lcray")
def app() -> None:
    """Loss change allocation over checkpoints: which parameters learned, when, by how much.

    \b
    First steps:
      lcray demo                                        train, analyze and look, in a minute
      lcray inspect RUN                                 is this run fit for analysis?
      lcray plan RUN --task module:task                 how long will it take?
      lcray analyze RUN --task module:task --out OUT    loss change allocation, to Parquet
      lcray query OUT "SELECT * FROM layers"            ask DuckDB
    """  # noqa: D301 - click takes the backspace for a paragraph to be left as it is


@app.command()
@click.option(
    "--dir",
    "directory",
    default="lcray-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where run and output go.",
)
@click.option("--workers", type=int, help="Workers; one a CPU core by default.")
def demo(directory: Path, workers: int | None) -> None:
    """Train a small net on handwritten digits, analyze it, and show what there is."""
    from lcray import digits, display

    console = _console()
    console.print(f"Training a small LeNet on scikit-learn's digits, recording {directory / 'run'}")
    with _working() as report:
        results = digits.demo(directory, workers=workers, on_progress=report)
    console.print(display.layer_table(results), "", display.summary(results), "")
    query = (
        "SELECT layer, sum(lc) AS lc FROM layers WHERE split = 'train' GROUP BY layer ORDER BY lc"
    )
    console.print("LC < 0 helps: it lowered the loss. To go on:")
    console.print(f'  lcray query {results.path} "{query}"')


@app.command()
@click.argument("run")
@click.option("--steps", help="Only checkpoints with a <= step <= b, as in 100:200.")
@click.option("--layers", help="Only tensors whose names match, as in 'conv*'.")
@_JSON
def inspect(run: str, steps: str | None, layers: str | None, as_json: bool) -> None:
    """Audit a run: gaps, duplicates, NaN, outliers, torn files, what is frozen."""
    from lcray import display

    found = lcray.inspect(run, steps, layers)
    _show(asdict(found) | {"ok": found.ok}, lambda: display.audit_table(found), as_json)
    if not found.ok:
        sys.exit(1)


@app.command()
@_with(*_RUN, *_SETTINGS)
@click.option("--save", type=click.Path(path_type=Path), help="Write the plan to this file.")
@_JSON
def plan(run: str, task: str, save: Path | None, as_json: bool, **options: Any) -> None:
    """Say what an analysis of RUN would take: gradients, time, memory, disk."""
    from lcray import display

    with redirect_stdout(sys.stderr):
        report = lcray.plan(run, task, resources=_resources(options), **_given(options))
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


@app.command()
@_with(*_RUN, *_SETTINGS)
@click.option("--out", required=True, help="Output directory, or its URI.")
@click.option("--plan", "saved", type=click.Path(path_type=Path), help="Use a saved plan.")
@click.option("--repair", is_flag=True, help="Compute anew what is committed but damaged.")
@click.option("--follow", is_flag=True, help="Go on while training writes, until the run ends.")
@click.option(
    "--idle",
    type=float,
    help="With --follow: seconds without a new checkpoint that end a run  [default: 600; a "
    "recorder's run says itself that it ended].",
)
@_JSON
def analyze(
    run: str, task: str, out: str, saved: Path | None, as_json: bool, **options: Any
) -> None:
    """Allocate the loss changes of RUN to its parameters, into the tables of --out.

    Running the same command again resumes: what is committed is skipped, and steps that the run
    has gained are added. Interrupting loses nothing that is committed.
    """
    from lcray import display

    resources = _resources(options)
    with _working() as report:
        results = lcray.analyze(
            run,
            task,
            out,
            plan=saved,
            resources=resources,
            on_progress=report,
            **_given(options),
        )
    data = display.records(display.totals(results))
    _show({"out": str(out), "splits": data}, lambda: display.summary(results), as_json)


app.add_command(submit_command.like(analyze))
app.add_command(trace_command.like(analyze))
app.add_command(findings_command.findings)
app.add_command(compare_command.compare)


@app.command()
@_OUT
@click.option("--allow-missing", is_flag=True, help="Merge even if intervals are missing.")
def reduce(out: str, allow_missing: bool) -> None:
    """Merge the shards of OUT into its tables."""
    from lcray.reduction import name_intervals

    found = lcray.reduce(out, allow_missing=allow_missing)
    for table, rows in found.rows.items():
        click.echo(f"{table}: {rows:,} rows")
    if found.missing:
        click.echo(f"missing steps: {name_intervals(found.missing)}")


@app.command()
@_OUT
@click.option(
    "--run",
    help="Read this run again too: are its checkpoints those that OUT was computed from?",
)
@_JSON
def verify(out: str, run: str | None, as_json: bool) -> None:
    """Check every checksum, coverage and additivity invariant of OUT."""
    found = lcray.verify(out, run=run)
    good = f"{out}: {len(found.checks)} checks, no problems"
    _show(asdict(found) | {"ok": found.ok}, lambda: "\n".join(found.problems) or good, as_json)
    if not found.ok:
        sys.exit(1)


@app.command()
@_OUT
@click.option("--watch", is_flag=True, help="Show it again and again, until the analysis ends.")
@_JSON
def status(out: str, watch: bool, as_json: bool) -> None:
    """Say how far the analysis of OUT is: done, running, failed, time left, gap so far."""
    from lcray import display

    while True:
        found = lcray.status(out)
        _show(asdict(found), partial(display.status_text, found), as_json)
        if not watch or found.state in ("finished", "failed", "interrupted"):
            break
        time.sleep(_SECONDS_A_LOOK)
        if not as_json:
            click.echo()


@app.command()
@_OUT
@click.argument("sql")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="How to print the answer; tables round, stop at 50 rows, and stand on end where too wide.",
)
def query(out: str, sql: str, form: str) -> None:
    """Run one SELECT on the tables of OUT, read-only, in DuckDB."""
    from lcray import display

    frame = lcray.query(out, sql)
    if form == "csv":
        click.echo(frame.to_csv(index=False), nl=False)
    elif form == "json":
        click.echo(json.dumps(display.records(frame), default=str))
    else:
        console = _console()
        console.print(display.fitted(frame, console.width))


def _show(data: dict[str, Any], render: Callable[[], Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(data, default=str))
    else:
        _console().print(render())


@contextmanager
def _working() -> Iterator[Callable[[Any], None]]:
    """What shows progress; what Ray and the user's modules print meanwhile goes to stderr."""
    from lcray.progress import reporting

    with reporting() as report, redirect_stdout(sys.stderr):
        yield report


def _console() -> Console:
    """Shows text as it is, and folds no table that goes to a file or a pipe."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Run the command line; every error is one line on stderr."""
    # The default ends the process without unwinding, which would leave workers behind; and Ray
    # makes an exit code of its own of SystemExit, but passes KeyboardInterrupt on.
    received = [signal.SIGINT]

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LcrayError as error:
        click.echo(f"lcray: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, click.Abort) as error:
        known = str(error.__cause__ or "") or "run the same command again to go on"
        click.echo(f"lcray: interrupted; {known}", err=True)
        sys.exit(128 + received[-1])
