"""Pages of the site that are made from the code, so that they cannot be out of date.

MkDocs calls `on_config` and `on_files`; the functions before them return Markdown.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

import lcray
from lcray.analyses.registry import FINDINGS
from lcray.cli.app import app
from lcray.cli.options import PATH
from lcray.settings import flag_of, help_of
from lcray.tables.reading.recipes import OPTIONS
from lcray.tables.schema import TABLES

_INTERNAL = ("borders",)  # in shards alone


def tables_page() -> str:
    """Every table and column, from `lcray.tables.schema`."""
    parts = [
        "# Tables",
        "`OUT/tables/<table>.parquet`; `lcray.open(OUT)` has a method of each name, `lcray query` "
        "takes SQL on them. Rows are sorted by key. What is not finite is null. Units and "
        "descriptions are in the files' Arrow metadata as well.",
    ]
    for name, table in TABLES.items():
        if name not in _INTERNAL:
            asked = f" Only there if asked for: {OPTIONS[name]}." if name in OPTIONS else ""
            parts += [f"## {name}", f"{_sentence(table.description)}{asked}"]
            parts += [f"Key: {_listed(table.key)}.", columns(table.schema)]
    return "\n\n".join(parts) + "\n"


def findings_page() -> str:
    """Every table of findings, from the schemas beside the functions that make them."""
    parts = [
        "# Tables of findings",
        "`OUT/findings/<name>.parquet`, made by `lcray findings OUT`; what each means and how to "
        "read it is in [the findings](../findings.md).",
    ]
    for finding in FINDINGS:
        form = finding_schema(finding.name)
        key = form.metadata[b"lcray.key"].decode().split(",")
        parts += [f"## {finding.name}", _sentence(form.metadata[b"lcray.description"].decode())]
        needs = _listed(finding.needs)
        parts += [f"Made from: {needs}. Key: {_listed(key)}.", columns(form)]
    return "\n\n".join(parts) + "\n"


def finding_schema(name: str) -> pa.Schema:
    """The schema of a finding's table: a constant of the module of its function."""
    (finding,) = (each for each in FINDINGS if each.name == name)
    module = importlib.import_module(getattr(finding.compute, "__module__", ""))
    forms = [form for form in vars(module).values() if isinstance(form, pa.Schema)]
    (found,) = (f for f in forms if (f.metadata or {}).get(b"lcray.finding") == name.encode())
    return found


def columns(form: pa.Schema) -> str:
    """A table of a schema's columns."""
    lines = ["| column | type | unit | |", "| --- | --- | --- | --- |"]
    for field in form:
        unit = (field.metadata or {}).get(b"unit", b"").decode()
        text = (field.metadata or {}).get(b"description", b"").decode().replace("|", "\\|")
        null = " or null" if field.nullable else ""
        lines.append(f"| `{field.name}` | {_kind(field.type)}{null} | {unit} | {text} |")
    return "\n".join(lines)


def options_table(kind: type[Any]) -> str:
    """Every field of a dataclass of options: in Python, on the command line, its meaning."""
    lines = ["| Python | command line | |", "| --- | --- | --- |"]
    for each in fields(kind):
        lines.append(f"| `{each.name}` | `--{flag_of(each)}` | {help_of(each)} |")
    return "\n".join(lines)


def api_page() -> str:
    """The public names, each as its docstring has it."""
    parts = ["# Python", "Everything public is at the top: `import lcray`."]
    for name in lcray.__all__:
        public, shown = getattr(lcray, name), f"lcray.{name}"
        options = f"    options:\n      heading: {shown}\n      toc_label: {shown}"
        parts.append(f"::: {public.__module__}.{public.__qualname__}\n{options}")
        if public is lcray.Resources:  # the fields end its docstring only once it is imported
            parts.append(options_table(public))
    return "\n\n".join(parts) + "\n"


def cli_page() -> str:
    """The help of every command, as it is printed."""
    parts = ["# Command line", "Exit codes: 0 done, 1 failed, 2 usage; 128 + n: signal n."]
    known = [name for names in PATH.values() for name in names if name in app.commands]
    width = {"terminal_width": 76, "max_content_width": 76, "resilient_parsing": True}
    top = app.make_context("lcray", [], **width)
    parts += _page_of(app, top, "lcray")
    for name in [*known, *(name for name in app.commands if name not in known)]:
        command = app.commands[name]
        context = command.make_context(name, [], parent=top, **width)
        parts += _page_of(command, context, f"lcray {name}")
    return "\n\n".join(parts) + "\n"


def _page_of(command: click.Command, context: click.Context, title: str) -> Iterator[str]:
    yield f"## {title}"
    yield f"```text\n{command.get_help(context)}\n```"


def _kind(kind: pa.DataType) -> str:
    return "string" if pa.types.is_dictionary(kind) else str(kind)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].replace('|', chr(92) + '|').rstrip('.')}."


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


#: Pages that are made, by their place.
PAGES = {
    "reference/tables.md": tables_page,
    "reference/findings.md": findings_page,
    "reference/api.md": api_page,
    "reference/cli.md": cli_page,
}


def on_config(config: Any) -> Any:
    """Leaves out of the navigation what is not there."""
    config.nav = _there(config.nav, Path(config.docs_dir))
    return config


def _there(nav: list[Any], folder: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _there(target, folder)})
        elif target in PAGES or (folder / target).exists():
            kept.append(entry)
    return kept


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made."""
    from mkdocs.structure.files import File

    for place, make in PAGES.items():
        files.append(File.generated(config, place, content=make()))
    return files
