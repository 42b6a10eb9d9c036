"""The verb `export`: an output's tables in the format of another tool."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lcray.errors import OutputError, UsageError, suggest
from lcray.figures.exports.csv_files import write_csv_files
from lcray.storage import PlaceLike, Remote, place
from lcray.tables.reading.results import open_output

KINDS = ("tensorboard", "wandb", "csv")


def export(
    out: PlaceLike, to: str, folder: str | Path, *, tables: Iterable[str] | None = None
) -> tuple[Path, ...]:
    """Write an output's tables for another tool.

    Args:
        out: the output directory or its URI, with its tables.
        to: ``tensorboard``: scalars of every split and layer, and histograms of LC, at the steps
            of training; ``wandb``: an offline run with the tables of layers and a few curves;
            ``csv``: the tables themselves.
        folder: a local folder; created if missing. A folder of TensorBoard may hold other runs.
        tables: the tables to write, for ``csv`` only; None for all.

    Returns:
        The files or folders that were written.

    Raises:
        UsageError: for an unknown kind, a folder that is a URI or part of `out`, or tables that do
            not exist or are chosen for another kind than ``csv``.
        OutputError: if there are no tables in `out`, or `folder` cannot be written.
        CorruptionError: if `folder` is below `out`, and a link leads out of there.
        LcrayError: if the other tool's package is not installed.
    """
    if to not in KINDS:
        raise UsageError(suggest(to, KINDS, "export"))
    if tables is not None and to != "csv":
        raise UsageError(f"tables can be chosen for csv only, not for {to}")
    if isinstance(place(folder), Remote):
        raise UsageError(f"{folder}: an export goes to a local folder; copy it afterwards")
    results, target = open_output(out), Path(folder)
    results.output.beside(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if to == "csv":
            return write_csv_files(results, target, tables)
        if to == "tensorboard":
            from lcray.figures.exports.tensorboard_events import write_events  # slow to import

            return write_events(results, target)
        from lcray.figures.exports.wandb_run import write_wandb

        return write_wandb(results, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from error
