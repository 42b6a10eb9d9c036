"""Draws how time grows: ``python -m tests.benchmarks.plot bench.json docs/growth.svg``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

from .suite import Row, load

AXES = ("intervals", "parameters", "samples", "splits")


def points(rows: Iterable[Row], axis: str) -> tuple[list[int], list[float]]:
    """What was varied, and the seconds."""
    pairs = [
        (int(row.metric.removeprefix("seconds at ")), row.value)
        for row in rows
        if row.case == f"growth {axis}" and row.metric.startswith("seconds at ")
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def draw(rows: list[Row], path: Path) -> None:
    """Seconds of a span against each axis, with the least-squares line.

    Raises:
        ValueError: if the rows hold no growth.
    """
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "lcray"  # the same figure for the same rows
    figure, panels = plt.subplots(1, len(AXES), figsize=(12, 3), layout="constrained")
    figures = {(row.case, row.metric): row.value for row in rows}
    for axis, panel in zip(AXES, panels, strict=True):
        x, y = points(rows, axis)
        if not x:
            raise ValueError(f"no rows of growth against {axis}; run the benchmarks' growth first")
        slope, intercept, residual = (
            figures[f"growth {axis}", f"line_{name}"] for name in ("slope", "intercept", "residual")
        )
        ends = [0, max(x)]
        panel.plot(ends, [intercept + slope * end for end in ends], color="tab:gray", linewidth=1)
        panel.plot(x, y, "o", color="tab:blue")
        panel.set(xlabel=axis, ylim=(0, None), title=f"largest residual {residual:.1%}")
        panel.title.set_fontsize("medium")
    panels[0].set_ylabel("seconds of a span")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(load(source), target)
