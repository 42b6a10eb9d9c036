"""The error for an integration whose library is not installed."""

from __future__ import annotations

from lcray.errors import LcrayError


class MissingExtraError(LcrayError, ImportError):
    """A library is not installed; the message names the extra that installs it."""


def missing(module: str, extra: str) -> MissingExtraError:
    """The error for `module`, which cannot be imported without `extra`."""
    return MissingExtraError(
        f'{module}: its library is missing or cannot be imported: pip install "lcray[{extra}]"'
    )
