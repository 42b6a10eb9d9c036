"""The errors that lcray raises: one line each, saying what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LcrayError(Exception):
    """Root of every error that lcray raises on purpose."""


class UsageError(LcrayError):
    """A setting or an argument that cannot be used; the command line exits with 2."""


class CheckpointError(LcrayError):
    """A run, or one of its checkpoints, that cannot be read or does not fit."""


class RecorderError(LcrayError):
    """A recorder that could not write a checkpoint; raised in the training loop."""


class TaskError(LcrayError):
    """A task that cannot be loaded, or whose model, data or loss break the contract."""


class ClusterError(LcrayError):
    """Ray, or a worker on it, that failed for another reason than the task or the files."""


class OutputError(LcrayError):
    """An output directory that cannot be written, or holds something else."""


class IncompleteError(OutputError):
    """An output with intervals missing; the message names them."""


class CorruptionError(OutputError):
    """A committed file that is missing or differs from its checksum."""


def suggest(name: str, valid: Iterable[str], what: str) -> str:
    """One line for an unknown `name`: the nearest valid one if there is any, and the list.

    Args:
        name: what was asked for.
        valid: the names that exist.
        what: the word for the thing, e.g. ``"rule"``.
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    nearest = f" did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"unknown {what} {name!r}:{nearest} valid: {shown}"
