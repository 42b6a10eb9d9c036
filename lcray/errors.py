"""The errors that lcray raises: one line each, that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_LONGEST = 2000  # characters of a message


def one_line(text: str) -> str:
    """`text` on one line of bounded length, whatever a file or a name has put into it.

    Line breaks, control characters (among them escape sequences of terminals) and characters that
    are not Unicode are written as Python would escape them.
    """
    if len(text) > _LONGEST:
        text = text[: _LONGEST // 2] + " … " + text[-_LONGEST // 2 :]
    return visible(text)


def visible(text: str) -> str:
    """`text` as `one_line` writes it, but of any length."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    return repr(character)[1:-1] if kind[0] == "C" or kind in ("Zl", "Zp") else character


class LcrayError(Exception):
    """Root of every error that lcray raises on purpose; its message is one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(LcrayError):
    """A setting or an argument that cannot be used; the command line exits with 2."""


class CheckpointError(LcrayError):
    """A run, or one of its checkpoints, cannot be read or does not match the others."""


class RecorderError(LcrayError):
    """A recorder could not write a checkpoint; raised in the training loop."""


class TaskError(LcrayError):
    """A task cannot be loaded, or its model, data or loss break the contract."""


class DisagreementError(TaskError):
    """A worker computes other numbers than the worker that planned; the analysis cannot go on."""


class ClusterError(LcrayError):
    """Ray, or a worker on it, failed for another reason than the task or the files."""


class TeamError(ClusterError):
    """A team of workers has lost one of them; the team must be replaced as a whole."""


class OutputError(LcrayError):
    """An output directory cannot be written, or holds something else."""


class InapplicableError(LcrayError):
    """An output's tables cannot give a finding; the message says why, and what would help."""


class IncompleteError(OutputError):
    """Intervals of an output are missing; the message names them."""


class CorruptionError(OutputError):
    """A committed file is missing or differs from its checksum."""


def suggest(name: str, valid: Iterable[str], what: str, most: int = 12) -> str:
    """One line for an unknown `name`: the nearest valid name, if there is one, and a list.

    Args:
        name: what was asked for.
        valid: the names that exist.
        what: the word for the thing, e.g. ``"rule"``.
        most: the most names that are listed.
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    nearest = f" did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f"unknown {what} {name!r}:{nearest} valid: {shown}"


def brief(error: BaseException) -> str:
    """An error of the user's code in one line: kind, message, and the user's line behind it."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = ("site-packages", "<frozen", str(Path(__file__).parent))
    own = [frame for frame in frames if not any(part in frame.filename for part in foreign)]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
