"""The command `lcray export`."""

from __future__ import annotations

import click

import lcray
from lcray.cli import terminal
from lcray.cli.options import OUT, command


@command(
    "lcray export out/mine --to tensorboard --out runs/mine/lcray",
    "lcray export out/mine --to csv --out tables --table layers",
)
@OUT
@click.option(
    "--to",
    required=True,
    type=click.Choice(["tensorboard", "wandb", "csv"]),
    help="tensorboard: scalars and histograms at the steps of training; wandb: an offline run, "
    "for wandb sync; csv: the tables, with units in columns.json.",
)
@click.option("--out", "folder", required=True, help="The folder to write into.")
@click.option("--table", "tables", multiple=True, help="csv: only this table (repeatable).")
def export(out: str, to: str, folder: str, tables: tuple[str, ...]) -> None:
    """Write the tables of OUT for TensorBoard, Weights & Biases, or as CSV."""
    for path in lcray.export(out, to, folder, tables=tables or None):
        terminal.say(path)
