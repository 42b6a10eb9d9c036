"""How accurate the rules are for the gradients they take, against a dense rule.

Legend: T intervals, P elements, L layers. Every rule goes the way of an analysis; LC by element is
read from the `elements` shards, sums from `intervals` and `layers`. Errors are relative to the
dense rule on the same samples: `layer_error` is Σ|difference| / Σ|LC| over layers and intervals,
`parameter_error` the median over intervals of the norm of the difference over that of the LC [P].
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from . import adapter
from .nets import FC, GPT, LENET, RESNET, Net
from .player import Player
from .suite import Bench, Row

RULES: dict[str, dict[str, Any]] = {
    "trapezoid": {"rule": "trapezoid"},
    "simpson": {},
    "gauss-lobatto": {"rule": "gauss-lobatto"},
    "simpson-sampled": {"rule": "simpson-sampled"},
}
DENSE, QUICK_DENSE = "simpson*16", "simpson*2"
THREADS = 2
START = 16  # by then the rates have warmed up
UNITS = {"gradients_per_interval": "1"}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Found:
    """What one rule gave: columns of `intervals` [T], LC by layer [T, L] and by element [T, P]."""

    n_gradients: Array
    gap: Array
    loss_change: Array
    converged: Array
    layers: Array
    elements: Array


def figures(found: Found, dense: Found) -> dict[str, float]:
    """The metrics of one rule."""
    difference = np.linalg.norm(found.elements - dense.elements, axis=1)
    errors = difference / np.linalg.norm(dense.elements, axis=1)
    return {
        "gradients_per_interval": float(found.n_gradients.mean()),
        "gap": float(np.abs(found.gap).sum() / np.abs(found.loss_change).sum()),
        "unconverged": float(1 - found.converged.mean()),
        "layer_error": float(
            np.abs(found.layers - dense.layers).sum() / np.abs(dense.layers).sum()
        ),
        "parameter_error": float(np.median(errors)),
        "parameter_error_worst": float(errors.max()),
    }


class Comparison:
    """A player that allocates one stretch of a run by several rules."""

    def __init__(
        self, task: str, run: str, steps: str, options: dict[str, Any], dense: dict[str, Any]
    ) -> None:
        adapter.tune()
        self._arguments = (task, run, steps)
        self._options = {"splits": ["train"], "elements": True, "parameters": False, **options}
        self._dense = self._allocate(dense)

    def compare(self, options: dict[str, Any]) -> dict[str, float]:
        return figures(self._allocate(options), self._dense)

    def _allocate(self, options: dict[str, Any]) -> Found:
        task, run, steps = self._arguments
        chosen = {**self._options, **options}
        workspace = adapter.open_workspace(task, run, chosen, steps, THREADS)
        plan = adapter.draft(workspace, len(workspace.series.steps), THREADS)
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as out:
            adapter.run_span(workspace, plan, 0, Path(out))
            return read(Path(out))


def read(out: Path) -> Found:
    """What the single span in `out` holds."""

    def column(table: str, name: str) -> Array:
        (path,) = out.glob(f"shards/*/{table}-*.parquet")
        return pq.read_table(path, columns=[name])[name].to_numpy()

    names = ("n_gradients", "gap", "loss_change", "converged")
    intervals = [column("intervals", name).astype(float) for name in names]
    n = len(intervals[0])
    layers = column("layers", "lc").reshape(n, -1)
    index = column("elements", "index")
    if not ((np.diff(index) == 1) | (index[1:] == 0)).all():
        raise ValueError(f"{out}: elements are not in the order of intervals, layers and indices")
    return Found(*intervals, layers, column("elements", "lc").reshape(n, -1).astype(float))


@dataclass(frozen=True)
class Choice:
    """A network on as many samples and intervals as the dense rule allows in minutes."""

    net: Net
    intervals: int
    dense_dtype: str = "float64"


CHOICES = (
    Choice(replace(FC, samples=2000), 24),
    Choice(replace(LENET, samples=400), 16),
    # Convolutions in float64 take four times as long; float32 passes err by 1e-6.
    Choice(replace(RESNET, samples=128, name="cifar-resnet20"), 8, "float32"),
    Choice(replace(GPT, samples=64), 24),
)


def measure(choice: Choice, bench: Bench) -> Iterator[Row]:
    """All rules on one network."""
    net = choice.net
    samples, count = bench.pick(net.samples, 16), bench.pick(choice.intervals, 1)
    start = bench.pick(START, 0)
    with Player(
        "tests.benchmarks.economy:Comparison",
        net.environment(samples),
        task=net.task,
        run=net.run(bench),
        steps=f"{start}:{start + count}",
        options=net.options,
        dense={"rule": bench.pick(DENSE, QUICK_DENSE), "dtype": choice.dense_dtype},
    ) as player:
        for name in bench.pick([*RULES], ["simpson", "simpson-sampled"]):
            for metric, value in player.ask("compare", options=RULES[name]).items():
                yield Row(f"{net.name} {name}", metric, value, UNITS.get(metric, "ratio"))


CASES = {f"economy/{choice.net.name}": partial(measure, choice) for choice in CHOICES}
