"""What all cases share: rows, and the folder with the recorded runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One figure; `case` says what it was measured on."""

    case: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True)
class Bench:
    """Where a benchmark works, and whether it is only to show that it does."""

    folder: Path
    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    def example_run(self, script: str, steps: int) -> Path:
        """The run of an example's training script, trained once."""
        run = self.folder / f"{script}-{steps}"
        if not run.exists():
            path = ROOT / "examples" / f"{script}.py"
            command = [sys.executable, path, "--run", run, "--steps", str(steps)]
            whole = {k: v for k, v in os.environ.items() if k != "LCRAY_SAMPLES"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=whole)
        return run


Case = Callable[[Bench], Iterable[Row]]


def chosen(cases: Mapping[str, Case], only: Iterable[str]) -> dict[str, Case]:
    """The cases whose name contains one of `only`; all where there is none.

    Raises:
        ValueError: for a word that is in no name.
    """
    words = list(only)
    for word in words:
        if not any(word in name for name in cases):
            raise ValueError(f"no case has {word!r} in its name; there are: {', '.join(cases)}")
    wanted = {n: c for n, c in cases.items() if any(word in n for word in words)}
    return wanted if words else dict(cases)


def save(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a JSON list, one a line."""
    lines = ",\n".join(json.dumps(asdict(row), allow_nan=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def load(path: Path) -> list[Row]:
    """Read what `save` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())]


def format_table(rows: Iterable[Row]) -> str:
    """Rows as aligned text, four significant digits."""
    cells = [(r.case, r.metric, f"{r.value:,.4g}", r.unit) for r in rows]
    cells = [("case", "metric", "value", "unit"), *cells]
    a, b, c, _ = (max(len(row[i]) for row in cells) for i in range(4))
    return "\n".join(f"{w:{a}}  {x:{b}}  {y:>{c}}  {z}".rstrip() for w, x, y, z in cells)
