"""The page: sections and numbers in one HTML file that needs no other file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from lcray.errors import UsageError, one_line
from lcray.figures.html.sections import Absent, Section
from lcray.figures.html.store import Store
from lcray.figures.palette import css, themes
from lcray.storage import Place, Remote

#: What a page may do: run its own two scripts, and contact no server.
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)


def render(
    title: str,
    head: str,
    sections: Sequence[Section | Absent],
    data: dict[str, Any],
    store: Store,
    links: dict[str, str],
) -> bytes:
    """The page.

    Args:
        title: of the page, as text.
        head: the HTML before the sections.
        sections: in order.
        data: data for the script, in addition to the sections.
        store: the arrays that sections and data refer to.
        links: the address of each table's file, relative to the page; a missing table has no
            link.

    Raises:
        UsageError: if Plotly is not installed.
    """
    static = files("lcray.figures.html") / "static"
    plotly, script = plotly_source(), (static / "page.js").read_text("utf-8")
    shown = [section for section in sections if isinstance(section, Section)]
    data = {
        **data,
        "themes": themes(),
        "arrays": store.arrays,
        "sections": [section.data() for section in shown],
    }
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = Template((static / "page.html").read_text("utf-8")).substitute(
        title=escape(title),
        policy=_POLICY.format(scripts=" ".join(map(_hash, (plotly, script)))),
        style=css() + "\n" + (static / "page.css").read_text("utf-8"),
        head=head,
        contents="\n".join(
            f'<li><a href="#{section.id}">{escape(section.title)}</a></li>' for section in shown
        ),
        sections="\n".join(_section(section, links) for section in shown),
        absent=_absent([section for section in sections if isinstance(section, Absent)]),
        plotly=_pack(plotly),
        data=_pack(packed),
        script=script,
    )
    return page.encode()


def plotly_source() -> str:
    """Plotly's script, from its Python package.

    Raises:
        UsageError: if it is not installed.
    """
    found = importlib.util.find_spec("plotly")  # importing it would take longer than reading it
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.exists():
            return path.read_text("utf-8")
    raise UsageError('the report draws with Plotly, which is missing: pip install "lcray[report]"')


def _pack(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def links_to(out: Place, page: Path, tables: Sequence[str]) -> dict[str, str]:
    """The address of each table's file, relative to the page's folder."""
    if isinstance(out, Remote):
        return {name: quote(f"{out}/tables/{name}.parquet", safe="/:@") for name in tables}
    base = page.resolve().parent
    return {
        name: quote(
            os.path.relpath(out.resolve() / "tables" / f"{name}.parquet", base).replace(os.sep, "/")
        )
        for name in tables
    }


def _section(section: Section, links: dict[str, str]) -> str:
    notes = "".join(f"<p class=note>{_text(note)}</p>" for note in section.notes)
    height = max(figure.height for figure in section.figures.values())
    return (
        f'<section class=figure id="{section.id}" aria-labelledby="{section.id}-title">'
        f'<h2 id="{section.id}-title">{escape(section.title)}</h2>'
        f"<p class=says>{_text(section.says)}</p>"
        f"<p class=reading>{_text(section.reading)}</p>"
        f'<div class=controls></div><div class=chart style="min-height:{height}px"></div>{notes}'
        f"<div class=sources><details class=table><summary>Table</summary>"
        "<div class=rows></div></details>"
        f"<details class=sql><summary>SQL and files</summary><pre><code>{escape(section.sql)}"
        f"</code></pre><p>{_files(section.tables, links)}</p></details></div></section>"
    )


def _files(tables: Sequence[str], links: dict[str, str]) -> str:
    parts = []
    for name in tables:
        shown = f"<code>tables/{escape(name)}.parquet</code>"
        link = links.get(name, "")
        local = link and not link.split("/")[0].endswith(":")
        parts.append(f'<a href="{escape(link)}">{shown}</a>' if local else shown)
    asks = "lcray query OUT &quot;…&quot;"
    return f"From {' and '.join(parts)}. Ask with <code>{asks}</code>."


def _absent(sections: Sequence[Absent]) -> str:
    if not sections:
        return ""
    rows = "".join(
        f'<li id="{section.id}"><b>{escape(section.title)}</b>: {_text(section.reason)}</li>'
        for section in sections
    )
    return f"<section class=absent><h2>Sections that are missing</h2><ul>{rows}</ul></section>"


def _text(text: str) -> str:
    """Text as HTML; text between backticks becomes code."""
    parts = escape(one_line(text)).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """An HTML table of texts; the first column holds names."""
    head = "".join(f"<th scope=col>{escape(one_line(cell))}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + f"<th scope=row>{escape(one_line(row[0]))}</th>"
        + "".join(f"<td>{escape(one_line(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f"<div class=scroll><table class={kind or 'numbers'}><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
