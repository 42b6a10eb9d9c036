"""How much memory this process has had.

Not ``ru_maxrss``: a process takes that over from the one that started it, whose peak it then is.
"""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """What is in memory now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that ever was, since the process began or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Begin anew, at what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))
