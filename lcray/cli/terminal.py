"""Printing: only characters that the terminal has, and none that control it.

Names come out of files: control characters in them, such as escape sequences, are written as Python
would escape them. Characters that the encoding of the terminal or pipe lacks are replaced.
"""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from lcray.errors import visible

if TYPE_CHECKING:  # slow to import, and not needed for refusals and --help
    from rich.console import Console

#: Columns where no table is folded: in a file or a pipe, and to measure its width.
WIDE = 10_000
#: Columns of ``--help`` at most.
HELP_WIDTH = 100
_HANDLER = "lcray.plainer"
_PLAINER = str.maketrans(
    {"Σ": "sum", "±": "+/-", "–": "-", "−": "-", "…": "...", "×": "x", "·": "*", "→": "->"}
    | dict.fromkeys("━╸╺─", "-")
    | dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*")
)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_PLAINER)
    return lacking.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_HANDLER, _plainer)


def prepare() -> None:
    """Lets the standard streams replace characters that they lack, so that printing never fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def fitting(text: str) -> str:
    """`text` in characters that the standard output has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, _HANDLER).decode(encoding)


def harmless(text: str) -> str:
    """`text` with its line breaks and tabs, every other control character escaped."""
    return text if text.isprintable() else "".join(_kept(c) for c in text)


def _kept(character: str) -> str:
    return character if character in "\n\t" else visible(character)


def say(text: object, *, err: bool = False, end: bool = True) -> None:
    """Prints a text as it is to the standard output, or to that of errors."""
    # Not click's own choice of a stream: it writes UTF-8 where the encoding is ASCII.
    click.echo(harmless(str(text)), file=sys.stderr if err else sys.stdout, nl=end)


def show(data: Any, render: Callable[[], Any], as_json: bool) -> None:
    """Prints an answer, as JSON or for readers: a text, or what a console renders."""
    if as_json:
        click.echo(json.dumps(data, default=str))
    elif isinstance(found := render(), str):
        say(found)
    else:
        console().print(found)


def console() -> Console:
    """Shows text as it is, and folds no table that goes to a file or a pipe."""
    from rich.console import Console, RenderHook
    from rich.segment import Segment

    class Harmless(RenderHook):
        def __init__(self, inner: Any = None) -> None:
            self._inner = inner

        def process_renderables(self, renderables: list[Any]) -> list[Any]:
            return [Harmless(inner) for inner in renderables]

        def __rich_console__(self, console: Console, options: Any) -> Iterator[Segment]:
            for text, style, control in console.render(self._inner, options):
                yield Segment(text if control else harmless(text), style, control)

    width = None if sys.stdout.isatty() else WIDE
    found = Console(width=width, soft_wrap=True, highlight=False, markup=False)
    found.push_render_hook(Harmless())
    return found
