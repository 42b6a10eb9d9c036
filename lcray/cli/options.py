"""What commands of the command line share: options, their sections in ``--help``, completion."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from lcray.analyses.titles import TITLES
from lcray.cli import terminal
from lcray.errors import one_line
from lcray.settings import Settings

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

#: The commands in the order of ``lcray --help``, the way from training to a report.
PATH: dict[str, tuple[str, ...]] = {
    "Start": ("demo",),
    "Record": ("convert",),
    "Inspect and plan": ("inspect", "plan"),
    "Analyze": ("analyze", "submit", "status", "reduce", "verify", "trace"),
    "Report and ask": ("report", "findings", "compare", "plots", "query", "export"),
}
#: The options of an analysis by what they are about; those of a command alone stand first.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "The integral": ("rule", "refine", "rtol", "max_panels"),
    "Data and loss": (
        "splits",
        "samples",
        "sample_seed",
        "batch_norm",
        "dtype",
        "batch_size",
        "batch_seed",
        "memory_format",
        "partial_sums",
        "partial",
        "deterministic",
    ),
    "Tables": ("layers", "window", "elements", "parameters", "units", "trace", "trace_seed"),
    "Fisher information": ("fisher", "fisher_kind", "fisher_samples", "fisher_seed"),
    "Workers": (
        "workers",
        "data_parallel",
        "gpus_per_worker",
        "cpus_per_worker",
        "custom",
        "threads",
        "memory",
        "patience",
        "span_length",
    ),
}
#: Commands that go on where they were interrupted.
_GO_ON = ("demo", "convert", "analyze", "submit", "trace")
_OWN = "Options"
_SHARES_A_PAGE = 12  # options, from which on they are shown by section
_DEFAULTS = {field.name: field.default for field in fields(Settings)}


class _Helpful(click.Command):
    """A command whose help is written in characters that the terminal has."""

    def get_help(self, ctx: click.Context) -> str:
        """The help."""
        return terminal.fitting(super().get_help(ctx))


class Command(_Helpful):
    """A command whose help ends in worked examples, and shows many options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options, by section where there are many."""
        own: list[tuple[str, str]] = []
        found: dict[str, list[tuple[str, str]]] = {_OWN: own}
        params = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for title, names in _SECTIONS.items() if len(params) > _SHARES_A_PAGE else ():
            found[title] = [r for p in params if p.name in names if (r := p.get_help_record(ctx))]
        shown = {name for title in found for name in _SECTIONS.get(title, ())}
        own += [r for p in params if p.name not in shown if (r := p.get_help_record(ctx))]
        for title, rows in found.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Group(_Helpful, click.Group):
    """The program: its commands stand by the step of the way that they are for."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant; a misspelled one names the nearest."""
        near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
        if self.get_command(ctx, args[0]) is None and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that is meant; interrupted, it says whether another try goes on."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if not error.args and ctx.invoked_subcommand in _GO_ON:
                raise KeyboardInterrupt("run the same command again to go on") from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands by step; those that have no step of their own come last."""
        known = {name for names in PATH.values() for name in names}
        rest = {"More": tuple(name for name in self.list_commands(ctx) if name not in known)}
        for title, names in {**PATH, **rest}.items():
            there = [(name, command) for name in names if (command := self.commands.get(name))]
            if there:
                with formatter.section(title):
                    formatter.write_dl([(n, c.get_short_help_str(limit=200)) for n, c in there])


def refusal(error: click.ClickException) -> str:
    """One line about a command line that cannot be: what is wrong, and where to read more."""
    context = getattr(error, "ctx", None)
    said = one_line(" ".join(error.format_message().split())).rstrip(".")
    said = said[:1].lower() + said[1:]
    if context is not None and context.info_name == "query" and "extra argument" in said:
        said += "; put the SELECT in quotes"
    return said + (f"; see {context.command_path} --help" if context is not None else "")


def example(*lines: str) -> str:
    """An epilog: worked examples, one a line, none of them wrapped."""
    return "\b\n" + "\n".join(["Examples:" if len(lines) > 1 else "Example:", *map(_indent, lines)])


def _indent(line: str) -> str:
    return f"  {line}"


def after_commas(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """A callback for a repeatable option that takes several names at once, too: ``a,b``."""
    return tuple(name.strip() for item in given for name in item.split(",") if name.strip())


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completion of RUN and OUT: the shell knows the folders."""
    return [CompletionItem(incomplete, type="dir")]


def finding_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Completion of names of findings, also after a comma."""
    before, comma, last = incomplete.rpartition(",")
    return [
        CompletionItem(before + comma + name, help=title)
        for name, title in TITLES.items()
        if name.startswith(last)
    ]


def _choices(values: Sequence[str]) -> Callable[..., list[CompletionItem]]:
    def complete(ctx: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
        return [CompletionItem(value) for value in values if value.startswith(start)]

    return complete


def _option(
    name: str, text: str, *, one_of: Sequence[str] = (), **kwargs: Any
) -> Callable[[Decorated], Decorated]:
    """An option for a field of `Settings`; the default stays the library's."""
    field = name.split("/")[0].removeprefix("--").replace("-", "_")
    default = _DEFAULTS.get(field)
    shown = f"  [default: {default}]" if default not in (None, False, (), True) else ""
    if one_of:
        kwargs["shell_complete"] = _choices(one_of)
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
        if not name or not math.isfinite(found[name]):
            raise click.BadParameter(f"{item!r} must have the form name=amount")
    return found


_RULES = ("left", "midpoint", "trapezoid", "simpson", "gauss-lobatto", "gauss", "auto")
SETTINGS = (
    _option(
        "--rule",
        "left (first order), midpoint, trapezoid, simpson (RK4), gauss-lobatto, gauss; rule*n; or "
        "auto: trapezoid where the gap and regular midpoint probes allow, else simpson, halved "
        "where needed, within --rtol.",
        one_of=_RULES,
        metavar="NAME",
    ),
    _option("--refine", "Halve the panels of intervals that miss the tolerance.", is_flag=True),
    _option("--rtol", "Tolerance of the gap, relative to the loss change.", type=float),
    _option("--max-panels", "Cap of the refinement.", type=int),
    click.option(
        "--split", "splits", multiple=True, metavar="NAME", help="Only this split (repeatable)."
    ),
    _option(
        "--samples",
        "Samples of a split to take at most, drawn at random; results are then estimates with "
        "confidence intervals  [default: all].",
        type=int,
    ),
    _option("--sample-seed", "Seed of that draw  [default: 0].", type=int),
    _option(
        "--layers", "Only these layers in the detailed tables, as in 'conv*'.", metavar="PATTERN"
    ),
    _option(
        "--batch-norm",
        "running: the checkpoint's statistics; batch: the batch's own.",
        one_of=("running", "batch"),
        metavar="[running|batch]",
    ),
    _option(
        "--dtype",
        "Of the forward and backward pass; sums are in float64 in any case.",
        one_of=("float32", "float64"),
        metavar="[float32|float64]",
    ),
    _option("--batch-size", "Samples a batch  [default: chosen by a short probe].", type=int),
    _option(
        "--memory-format",
        "auto: whichever a short probe finds faster.",
        one_of=("contiguous", "channels_last", "auto"),
        metavar="[contiguous|channels_last|auto]",
    ),
    _option("--partial-sums", "Parts of each gradient  [default: --data-parallel].", type=int),
    _option(
        "--batch-seed",
        "Seed of the batches where they are part of the loss  [default: 0].",
        type=int,
    ),
    _option("--partial", "Checkpoints may lack tensors (adapters).", is_flag=True),
    _option(
        "--window",
        "Width of the windows of histograms and fits, in steps  [default: about ten a run].",
        type=int,
    ),
    _option("--elements", "Write the elements table: LC of every element.", is_flag=True),
    _option(
        "--parameters/--no-parameters",
        "Force the parameters and traces tables on or off  [default: by size].",
    ),
    _option("--units", "Write units also for layers with more than 10,000.", is_flag=True),
    click.option(
        "--trace",
        multiple=True,
        metavar="LAYER:INDEX",
        help="Trace this element (repeatable), beside a random sample of each layer.",
    ),
    _option("--trace-seed", "Seed of the sample of traced elements  [default: 0].", type=int),
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
    _option(
        "--fisher-kind",
        "empirical: by the data's targets alone.",
        one_of=("both", "empirical"),
        metavar="[both|empirical]",
    ),
    _option("--fisher-samples", "The most samples of a split that fisher takes.", type=int),
    _option(
        "--fisher-seed",
        "Seed of these samples, and of the targets drawn  [default: 0].",
        type=int,
    ),
    _option(
        "--deterministic/--no-deterministic",
        "Enforce deterministic algorithms on CUDA  [default: on].",
    ),
)
RUN = (
    click.argument("run", shell_complete=folders),
    click.option(
        "--task",
        required=True,
        metavar="MODULE:ATTRIBUTE",
        help="The task: package.module:attribute or path/file.py:attribute.",
    ),
    click.option(
        "--steps", metavar="A:B", help="Only checkpoints with a <= step <= b, as in 100:200."
    ),
    click.option(
        "--span-length",
        type=int,
        help="Intervals a span, the unit of work and retry  [default: about three minutes].",
    ),
    click.option("--workers", type=int, help="Workers  [default: one a GPU, else one a CPU core]."),
    click.option(
        "--data-parallel",
        type=int,
        default=1,
        show_default=True,
        help="Workers that share a gradient.",
    ),
    click.option(
        "--gpus-per-worker",
        type=float,
        help="GPUs each; fractions share one  [default: 1 where there are any].",
    ),
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
        "--memory",
        type=float,
        metavar="GIB",
        help="GiB a worker  [default: its share of what is free].",
    ),
    click.option(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="Seconds without progress after which a worker is replaced  [default: 20 times what "
        "a step should take, at least 300].",
    ),
    click.option(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to use, HEAD:6379; local for a Ray of its own  [default: RAY_ADDRESS, "
        "else local].",
    ),
)
OUT = click.argument("out", shell_complete=folders)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def together(*options: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """One decorator for several, in their order."""

    def decorate(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
