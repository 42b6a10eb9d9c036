"""Quantities in words."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """Seconds in words, to two units."""
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(n_bytes: int | None) -> str:
    """Bytes in words."""
    if n_bytes is None:
        return "unknown"
    value, unit = float(n_bytes), 0
    while round(value) >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    digits = f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return f"{digits} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def count(number: int, what: str, several: str = "") -> str:
    """A number with its noun, singular or plural."""
    return f"{number} {what}" if number == 1 else f"{number} {several or what + 's'}"
