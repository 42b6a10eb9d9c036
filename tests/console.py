"""Commands that run in this process, and what Rich shows, as plain text."""

from __future__ import annotations

import io
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from rich.console import Console, RenderableType

from lcray.cli import app


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr beside progress; nothing was printed."""
        lines = [line for line in self.err.splitlines() if not PROGRESS.fullmatch(line)]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err + self.out
        assert self.out == ""
        return lines[0]


PROGRESS = re.compile(
    r"lcray: (starting workers|working in this process|measuring a gradient|intervals|merging "
    r"tables).*"
)
Lcray = Callable[..., Ran]


def exit_code(*arguments: object) -> int:
    """Of ``lcray ARGUMENTS``, which runs in this process."""
    before = signal.getsignal(signal.SIGTERM)
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lcray", *map(str, arguments)])
        try:
            app.main()
        except SystemExit as error:
            code = error.code or 0
        finally:
            signal.signal(signal.SIGTERM, before)
    assert isinstance(code, int)
    return code


def shown(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=500, markup=False, highlight=False)
    console.print(what)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
