"""The command `lcray demo`."""

from __future__ import annotations

from pathlib import Path

import click

from lcray.cli import terminal
from lcray.cli.options import command, folders


@command("lcray demo", "lcray demo --dir /tmp/try --workers 2")
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
@click.option("--workers", type=int, help="Number of workers.  [default: none, but this process]")
def demo(directory: Path, workers: int | None) -> None:
    """Train a small net on handwritten digits, analyze it, and show the result."""
    from lcray import digits
    from lcray.cli.display.results import layer_table, summary
    from lcray.cli.progress import working

    console = terminal.console()
    console.print(f"Training a small LeNet on scikit-learn's digits, recording {directory / 'run'}")
    with working() as report:
        results = digits.demo(directory, workers=workers, on_progress=report)
    console.print(layer_table(results), "", summary(results), "")
    query = (
        "SELECT layer, sum(lc) AS lc FROM layers WHERE split = 'train' GROUP BY layer ORDER BY lc"
    )
    console.print("LC < 0 helps: it lowered the loss. Next:")
    console.print(f"  lcray report {results.path}")
    console.print(f'  lcray query {results.path} "{query}"')
