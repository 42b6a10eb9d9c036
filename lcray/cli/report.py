"""The command `lcray report`."""

from __future__ import annotations

from pathlib import Path

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import command, folders
from lcray.storage import Remote, place


@command("lcray report out/mine", "lcray report --compare out/a out/b --out comparison.html --open")
@click.argument("outs", nargs=-1, required=True, metavar="OUT...", shell_complete=folders)
@click.option("--compare", is_flag=True, help="Put several outputs side by side on one page.")
@click.option(
    "--out",
    "file",
    metavar="FILE",
    help="Where the page goes.  [default: OUT/report.html; of several, comparison.html in the "
    "first]",
)
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
def report(outs: tuple[str, ...], compare: bool, file: str | None, show: bool) -> None:
    """Make one HTML page of OUT: charts, tables, and the source of each number.

    The page is a single file that needs no server and no network: open it, print it, send it. It
    links to the tables beside it.
    """
    if len(outs) > 1 and not compare:
        raise click.UsageError(f"{len(outs)} outputs: give --compare to put them side by side")
    if compare and len(outs) < 2:
        raise click.UsageError("--compare takes two outputs or more")
    if show and isinstance(place(file or outs[0]), Remote):
        raise click.UsageError("--open shows a page on this machine: name it with --out FILE")
    path = lcray.report(*outs, file=file)
    address = path.resolve().as_uri() if isinstance(path, Path) else str(path)
    terminal.say(address)
    if not show:
        return
    import webbrowser

    if not webbrowser.open(address):
        raise click.ClickException(f"no browser could be opened; open {address} yourself")
