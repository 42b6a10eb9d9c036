"""What to say where a library that an integration is for is not installed."""

from __future__ import annotations

from lcray.errors import LcrayError


class MissingExtraError(LcrayError, ImportError):
    """A library that is not installed; the message names the extra that brings it."""


def missing(module: str, extra: str) -> MissingExtraError:
    """The error for `module`, which cannot be imported without `extra`."""
    return MissingExtraError(
        f'{module}: its library is missing or cannot be imported: pip install "lcray[{extra}]"'
    )
