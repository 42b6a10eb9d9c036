"""Loss change allocation over checkpoints: which parameters learned, when, and by how much."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Imported on first use, so that `import lcray` costs nothing.
_PUBLIC = {
    "Recorder": "lcray.checkpoints",
    "Task": "lcray.tasks.task",
    "Resources": "lcray.execution.cluster.resources",
    "Results": "lcray.tables.reading.results",
    "LcrayError": "lcray.errors",
    "allocate": "lcray.execution.in_memory",
    "analyze": "lcray.execution.driver.analyze",
    "compare": "lcray.analyses.comparison",
    "convert": "lcray.checkpoints.convert.convert",
    "demo": "lcray.digits",
    "export": "lcray.figures.exports.export",
    "findings": "lcray.analyses.findings",
    "inspect": "lcray.checkpoints",
    "open": "lcray.tables.reading.results",
    "plan": "lcray.execution.driver.analyze",
    "query": "lcray.tables.reading.results",
    "reduce": "lcray.tables.reducing.reduce",
    "report": "lcray.figures.html.report",
    "status": "lcray.execution.driver.status",
    "submit": "lcray.execution.driver.submit",
    "trace": "lcray.execution.driver.trace",
    "verify": "lcray.tables.verifying.verify",
}
_RENAMED = {"open": "open_output"}

__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from lcray.analyses.comparison import compare as compare
    from lcray.analyses.findings import findings as findings
    from lcray.checkpoints import Recorder as Recorder
    from lcray.checkpoints import inspect as inspect
    from lcray.checkpoints.convert.convert import convert as convert
    from lcray.digits import demo as demo
    from lcray.errors import LcrayError as LcrayError
    from lcray.execution.cluster.resources import Resources as Resources
    from lcray.execution.driver.analyze import analyze as analyze
    from lcray.execution.driver.analyze import plan as plan
    from lcray.execution.driver.status import status as status
    from lcray.execution.driver.submit import submit as submit
    from lcray.execution.driver.trace import trace as trace
    from lcray.execution.in_memory import allocate as allocate
    from lcray.figures.exports.export import export as export
    from lcray.figures.html.report import report as report
    from lcray.tables.reading.results import Results as Results
    from lcray.tables.reading.results import open_output
    from lcray.tables.reading.results import query as query
    from lcray.tables.reducing.reduce import reduce as reduce
    from lcray.tables.verifying.verify import verify as verify
    from lcray.tasks.task import Task as Task

    open = open_output  # so that type checkers see it as exported


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lcray' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
