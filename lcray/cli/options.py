"""Options, their sections in ``--help``, and completion, shared by the commands."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from lcray.analyses.titles import TITLES
from lcray.cli import terminal
from lcray.errors import one_line
from lcray.execution.cluster.resources import Resources
from lcray.settings import SECTIONS, WORKERS, Settings, flag_of, help_of, option_of

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

#: The commands in the order of ``lcray --help``, from training to a report.
PATH: dict[str, tuple[str, ...]] = {
    "Start": ("demo",),
    "Record": ("convert",),
    "Inspect and plan": ("inspect", "plan"),
    "Analyze": ("analyze", "submit", "status", "reduce", "verify", "trace"),
    "Report and ask": ("report", "findings", "compare", "query", "export"),
}
#: Commands that resume after an interrupt.
_RESUMED = ("demo", "convert", "analyze", "submit", "trace")
_OWN = "Options"
_SHARES_A_PAGE = 12  # options, from which on they are shown by section


class _Helpful(click.Command):
    """A command whose help is written in characters that the terminal has."""

    def get_help(self, ctx: click.Context) -> str:
        """The help."""
        return terminal.fitting(super().get_help(ctx))


class Command(_Helpful):
    """A command whose help ends in worked examples, and shows many options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options, by section where there are many."""
        params = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        found: dict[str, list[tuple[str, str]]] = {section: [] for section in (_OWN, *SECTIONS)}
        for param in params:
            section = getattr(param, "section", "") if len(params) > _SHARES_A_PAGE else ""
            found[section or _OWN] += [r] if (r := param.get_help_record(ctx)) else []
        for title, rows in found.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Group(_Helpful, click.Group):
    """The program; its help lists commands by purpose."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command; a misspelled one is refused with the nearest name."""
        near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
        if self.get_command(ctx, args[0]) is None and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; after an interrupt, says whether running it again resumes."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if not error.args and ctx.invoked_subcommand in _RESUMED:
                raise KeyboardInterrupt("run the same command again to resume") from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands by purpose; those without one come last."""
        known = {name for names in PATH.values() for name in names}
        rest = {"More": tuple(name for name in self.list_commands(ctx) if name not in known)}
        for title, names in {**PATH, **rest}.items():
            there = [(name, command) for name in names if (command := self.commands.get(name))]
            if there:
                with formatter.section(title):
                    formatter.write_dl([(n, c.get_short_help_str(limit=200)) for n, c in there])


def refusal(error: click.ClickException) -> str:
    """One line about an invalid command line: what is wrong, and where to read more."""
    context = getattr(error, "ctx", None)
    said = one_line(" ".join(error.format_message().split())).rstrip(".")
    said = said[:1].lower() + said[1:]
    if context is not None and context.info_name == "query" and "extra argument" in said:
        said += "; put the SELECT in quotes"
    return said + (f"; see {context.command_path} --help" if context is not None else "")


def command(
    *examples: str, cls: type[Command] = Command
) -> Callable[[Callable[..., Any]], click.Command]:
    """Makes a command of a function; its help ends in the examples, one per line, never wrapped."""
    title = "Examples:" if len(examples) > 1 else "Example:"
    return click.command(cls=cls, epilog="\b\n" + "\n  ".join([title, *examples]))


class Answer(NamedTuple):
    """What a command found.

    Attributes:
        data: for scripts.
        render: makes what readers see.
        ok: whether the exit code is 0.
    """

    data: Any
    render: Callable[[], Any]
    ok: bool = True


def answers(function: Callable[..., Answer]) -> Callable[..., None]:
    """Prints what a command found, for scripts with its option --json, and ends with its code."""

    @JSON
    @wraps(function)
    def printing(*, as_json: bool, **options: Any) -> None:
        found = function(**options)
        terminal.show(found.data, found.render, as_json)
        if not found.ok:
            sys.exit(1)

    return printing


def after_commas(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """A callback for a repeatable option that also takes several names at once: ``a,b``."""
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


class _Option(click.Option):
    """An option that stands in a section of ``--help``."""

    def __init__(self, *args: Any, section: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def _options(kind: type[Any]) -> list[Callable[[Any], Any]]:
    """An option for each field of a dataclass; defaults stay the library's."""
    hints = get_type_hints(kind)
    return [_option_of(each, hints[each.name]) for each in fields(kind)]


def _option_of(each: Field[Any], hint: Any) -> Callable[[Any], Any]:
    told, flag = option_of(each), f"--{flag_of(each)}"
    (kind,) = {hint} if not isinstance(hint, UnionType) else {*get_args(hint)} - {NoneType}
    more: dict[str, Any] = {"section": told.section, "metavar": told.metavar}
    if kind is bool and each.default is not False:
        flag += f"/--no-{flag_of(each)}"
    elif kind is bool:
        more |= {"is_flag": True}
    elif get_origin(kind) is not None:  # several, or amounts by name
        more |= {"multiple": True, "callback": _amounts if get_origin(kind) is Mapping else None}
    else:
        more |= {"type": kind}
    if told.bare is not None:
        more |= {"is_flag": False, "flag_value": told.bare}
    if told.choices:
        more["metavar"] = told.metavar or f"[{'|'.join(told.choices)}]"
        more["shell_complete"] = _choices(told.choices)
    return click.option(flag, each.name, cls=_Option, default=None, help=help_of(each), **more)


*PLACING, ADDRESS = _options(Resources)
RUN = click.argument("run", shell_complete=folders)
OUT = click.argument("out", shell_complete=folders)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
TASK = click.option(
    "--task",
    required=True,
    metavar="MODULE:ATTRIBUTE",
    help="The task: package.module:attribute or path/file.py:attribute.",
)
STEPS = click.option(
    "--steps", metavar="A:B", help="Only checkpoints with a <= step <= b, as in 100:200."
)
#: The options of an analysis, in addition to the run.
ANALYSIS = (
    TASK,
    STEPS,
    click.option(
        "--span-length",
        cls=_Option,
        section=WORKERS,
        type=int,
        help="Intervals per span, the unit of work and retry.  [default: about three minutes]",
    ),
    *PLACING,
    *_options(Settings),
)
#: How an analysis runs, here or as a job.
COURSE = (
    click.option(
        "--plan",
        "saved",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Use a plan that lcray plan --save wrote.",
    ),
    click.option("--repair", is_flag=True, help="Recompute committed spans that are damaged."),
    click.option(
        "--follow", is_flag=True, help="Follow a run while training writes it, until it ends."
    ),
    click.option(
        "--idle",
        type=float,
        metavar="SECONDS",
        help="With --follow: seconds without a new checkpoint after which the run has ended.  "
        "[default: 600; never for a run of lcray.Recorder, which records its end]",
    ),
)


def keywords(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, for the library, which has the defaults of the others."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    placing = [each.name for each in fields(Resources) if each.name in given]
    resources = Resources(**{name: given.pop(name) for name in placing})
    return {"resources": resources, **given}


def together(*options: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """One decorator for several, in their order."""

    def decorate(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
