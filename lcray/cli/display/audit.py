"""The audit of a run. Pure."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from lcray.checkpoints import Audit
from lcray.cli.units import count, size
from lcray.errors import visible

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


def audit_table(audit: Audit) -> Group:
    """The run in one line, and a line for each problem."""
    dtypes = ", ".join(f"{number} {name}" for name, number in audit.dtypes.items())
    head = (
        f"{audit.root}: {count(len(audit.steps), 'checkpoint')}, steps {audit.steps[0]} to "
        f"{audit.steps[-1]}; {audit.n_tensors} tensors ({dtypes}), {audit.n_elements:,} float "
        f"elements, {size(audit.nbytes)}"
    )
    lines: list[RenderableType] = [Text(visible(head))]
    for finding in audit.findings:
        text = Text(f"{finding.severity:8}", _COLOURS.get(finding.severity, ""))
        lines.append(text.append(visible(finding.message), "default"))
    if not audit.findings:
        lines.append(Text("nothing stands out", "green"))
    return Group(*lines)
