"""What Rich shows, as plain text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def shown(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=500, markup=False, highlight=False)
    console.print(what)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
