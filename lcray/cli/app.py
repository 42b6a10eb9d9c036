"""The command line: thin calls of the public functions. Exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import click

import lcray
from lcray.cli import terminal
from lcray.cli.analyze import analyze
from lcray.cli.compare import compare
from lcray.cli.convert import convert
from lcray.cli.demo import demo
from lcray.cli.export import export
from lcray.cli.findings import findings
from lcray.cli.inspect import inspect
from lcray.cli.options import Group, refusal
from lcray.cli.plan import plan
from lcray.cli.query import query
from lcray.cli.reduce import reduce
from lcray.cli.report import report
from lcray.cli.signals import leave
from lcray.cli.status import status
from lcray.cli.submit import submit
from lcray.cli.trace import trace
from lcray.cli.verify import verify
from lcray.errors import LcrayError, UsageError
from lcray.storage.interrupt import Stopped

COMMANDS = (
    demo, convert, inspect, plan, analyze, submit, status, reduce, verify, trace, report, findings,
    compare, query, export,
)  # fmt: skip


@click.group(
    cls=Group,
    commands=COMMANDS,
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


def main() -> None:
    """Run the command line; every error is one line on stderr."""
    # The default ends the process without unwinding, which would leave workers behind; and Ray
    # makes an exit code of its own of SystemExit, but passes KeyboardInterrupt on.
    received = [signal.SIGINT]

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
