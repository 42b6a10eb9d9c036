"""The command `lcray submit`: takes the options of `lcray analyze`, which the job runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import ANALYSIS, COURSE, command, keywords, together
from lcray.errors import UsageError


@command(
    "lcray submit /shared/runs/mine --task mytask:task --out /shared/out/mine",
    "lcray submit s3://b/runs/mine --task mytask:task --out s3://b/out --address http://H:8265",
)
@click.argument("run")
@click.option(
    "--out",
    required=True,
    metavar="OUT",
    help="Output: absolute, as the cluster sees it, or a URI.",
)
@click.option(
    "--address",
    metavar="URL",
    help="Job server of the cluster, http://HEAD:8265.  [default: RAY_API_SERVER_ADDRESS, else "
    "port 8265 of this machine]",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATH",
    help="Send this file or folder along with the code (repeatable).",
)
@click.option(
    "--env",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set this variable for the job; no secrets (repeatable).",
)
@click.option("--no-wait", is_flag=True, help="Print the job's id, and do not wait for it.")
@together(*ANALYSIS, *COURSE)
def submit(
    run: str,
    task: str,
    out: str,
    address: str | None,
    include: tuple[str, ...],
    env: tuple[str, ...],
    no_wait: bool,
    saved: Path | None,
    **options: Any,
) -> None:
    """Have a Ray cluster run lcray analyze: send the task's code, follow the log.

    RUN and --out are absolute paths on storage that every node sees, or URIs. The module or package
    of --task is sent, with its imports from the same folder; never checkpoints, outputs, hidden
    files or virtual environments. The exit code is that of the job. Ctrl-C leaves the job
    running, and says how to follow and how to stop it.

    Where the cluster asks for a token (a cluster should), set RAY_AUTH_MODE=token in the shell that
    starts the head and in this one, with the same token in ~/.ray/auth_token.
    """
    found = lcray.submit(
        run,
        task,
        out,
        address=address,
        plan=saved,
        include=include,
        env=_variables(env),
        wait=not no_wait,
        on_package=lambda package: terminal.say(f"lcray: sending {package}", err=True),
        on_submit=lambda job: terminal.say(f"lcray: submitted {job.job}", err=True),
        on_log=lambda text: click.echo(text, file=sys.stdout, nl=False),
        **keywords(options),
    )
    if no_wait:
        terminal.say(found.job)
    elif found.exit_code:
        terminal.say(f"lcray: job {found.job} {found.message}", err=True)
        sys.exit(found.exit_code)


def _variables(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair or not pair.partition("=")[0].isidentifier():
            raise UsageError(f"env {pair!r}: must have the form NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
