"""Whole numbers and ranges of steps, as users and file names write them."""

from __future__ import annotations

import re

from lcray.errors import UsageError
from lcray.storage.json_types import LIMIT

_DIGITS = re.compile(r"[0-9]+")
_RANGE = re.compile(r"\s*([0-9]*)\s*:\s*([0-9]*)\s*")
_MOST = len(str(LIMIT))  # digits; Python converts long numbers slowly, and refuses very long ones


def whole_number(text: str) -> int | None:
    """The number that `text` writes in the digits 0 to 9; None for any other text.

    Numbers from 2^63 on, which no table can hold, become 2^63, however many digits they have.
    """
    if not _DIGITS.fullmatch(text):
        return None
    digits = text.lstrip("0")
    return min(int(digits or "0"), LIMIT) if len(digits) <= _MOST else LIMIT


def step_range(text: str) -> tuple[int | None, int | None] | None:
    """The two steps of ``a:b``, None for a step that is left out; None if `text` is not a range.

    Raises:
        UsageError: for a step from 2^63 on, which no table can hold.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last = (whole_number(part) for part in match.groups())
    for step, part in zip((first, last), match.groups(), strict=True):
        if step == LIMIT:
            raise UsageError(f"steps {brief(text)}: {brief(part)} is too large; steps end at 2**63")
    return first, last


def brief(text: str) -> str:
    """`text` in quotes, shortened where it is long."""
    return repr(text if len(text) <= 40 else text[:37] + "…")
