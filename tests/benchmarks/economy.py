"""How accurate the rules are for the gradients they take, against a dense rule.

Legend: T intervals, P elements, L layers. Every rule goes the way of an analysis; LC by element is
read from the `elements` shards, sums from `intervals` and `layers`. Errors are relative to the
dense rule on all samples: `layer_error` is Σ|difference| / Σ|LC| over layers and intervals,
`parameter_error` the median over intervals of the norm of the difference over that of the LC [P].
A rule with standard errors has two metrics more: `stated_error` is the `layer_error` that these
lead to expect where they are given (of a normal error, |.| is √(2/π) standard errors on average),
and `unstated` the share of layers and intervals where they are not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from . import adapter, tasks
from .nets import FC, GPT, LENET, QUICK_STEPS, RESNET, Net
from .player import Player
from .suite import Bench, Row

RULES: dict[str, dict[str, Any]] = {
    "trapezoid": {"rule": "trapezoid"},
    "midpoint": {"rule": "midpoint"},
    "simpson": {},
    "gauss-2": {"rule": "gauss-2"},
    "gauss-lobatto": {"rule": "gauss-lobatto"},
    "simpson-sampled": {"rule": "simpson-sampled"},
    "simpson-sampled, 3 %": {"rule": "simpson-sampled", "sampling_error": 0.03},
}
DENSE, QUICK_DENSE = "simpson*16", "simpson*2"
SHIFTED = "shifted_fc"
THREADS = 1
START = 16  # by then the rates have warmed up
UNITS = {"gradients_per_interval": "1"}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Found:
    """What one rule gave: columns of `intervals` [T], LC by layer [T, L] and by element [T, P].

    The cost is in gradients of all samples; `layer_se` is NaN where no error is given.
    """

    cost: Array
    gap: Array
    loss_change: Array
    converged: Array
    layers: Array
    layer_se: Array
    elements: Array


def figures(found: Found, dense: Found) -> dict[str, float]:
    """The metrics of one rule."""
    difference = np.linalg.norm(found.elements - dense.elements, axis=1)
    errors = difference / np.linalg.norm(dense.elements, axis=1)
    result = {
        "gradients_per_interval": float(found.cost.mean()),
        "gap": float(np.abs(found.gap).sum() / np.abs(found.loss_change).sum()),
        "layer_error": float(
            np.abs(found.layers - dense.layers).sum() / np.abs(dense.layers).sum()
        ),
        "parameter_error": float(np.median(errors)),
        "parameter_error_worst": float(errors.max()),
    }
    if not np.isnan(found.converged).any():
        result["unconverged"] = float(1 - found.converged.mean())
    stated = ~np.isnan(found.layer_se)
    if stated.any():
        lc = np.abs(dense.layers[stated]).sum()
        result["stated_error"] = math.sqrt(2 / math.pi) * float(found.layer_se[stated].sum() / lc)
        result["unstated"] = float(1 - stated.mean())
    return result


class Comparison:
    """A player that allocates one stretch of a run by several rules."""

    def __init__(
        self, task: str, run: str, steps: str, options: dict[str, Any], dense: dict[str, Any]
    ) -> None:
        adapter.tune()
        self._arguments = (task, run, steps)
        self._options = {"splits": ["train"], "elements": True, "parameters": False, **options}
        self._samples = 0
        self._dense = self._allocate(dense)

    def compare(self, options: dict[str, Any]) -> dict[str, float]:
        return figures(self._allocate(options), self._dense)

    def sample(self, cost: float) -> dict[str, float]:
        """The metrics of Simpson's rule on as many samples as make it cost so many gradients."""
        return self.compare({"samples": min(self._samples, round(cost / 2 * self._samples))})

    def _allocate(self, options: dict[str, Any]) -> Found:
        task, run, steps = self._arguments
        chosen = {**self._options, **options}
        workspace = adapter.open_workspace(task, run, chosen, steps, THREADS)
        plan = adapter.draft(workspace, len(workspace.series.steps), THREADS)
        with tempfile.TemporaryDirectory(prefix="lcray-bench-") as out:
            adapter.run_span(workspace, plan, 0, Path(out))
            found = read(Path(out))
        (split,) = plan.splits
        self._samples = split.drawn_from or split.n_samples
        return replace(found, cost=found.cost * split.n_samples / self._samples)


def read(out: Path) -> Found:
    """What the single span in `out` holds."""

    def column(table: str, name: str) -> Array:
        (path,) = out.glob(f"shards/*/{table}-*.parquet")
        return pq.read_table(path, columns=[name])[name].to_numpy()

    names = ("gradient_cost", "gap", "loss_change", "converged")
    intervals = [column("intervals", name).astype(float) for name in names]
    n = len(intervals[0])
    layers, layer_se = (
        column("layers", name).astype(float).reshape(n, -1) for name in ("lc", "lc_se")
    )
    index = column("elements", "index")
    if not ((np.diff(index) == 1) | (index[1:] == 0)).all():
        raise ValueError(f"{out}: elements are not in the order of intervals, layers and indices")
    elements = column("elements", "lc").reshape(n, -1).astype(float)
    return Found(*intervals, layers, layer_se, elements)


@dataclass(frozen=True)
class Choice:
    """A network on as many samples and intervals as the dense rule allows in minutes.

    Attributes:
        net: the network.
        intervals: more than a block of the sampled rule.
        dense: the rule that the others are compared with.
        dense_dtype: its precision.
        batch: samples per batch of the sampled rule, where data are so few that batches of its
            usual size would all be taken.
        leave_out: rules that are not run.
    """

    net: Net
    intervals: int
    dense: str = DENSE
    dense_dtype: str = "float64"
    batch: int | None = None
    leave_out: frozenset[str] = frozenset()

    def run(self, bench: Bench) -> str:
        """The recorded run."""
        if self.net.script != SHIFTED:
            return self.net.run(bench)
        task, steps = tasks.shifted_fc_task, bench.pick(START + self.intervals, QUICK_STEPS)
        return str(tasks.record(task, bench.folder / SHIFTED, steps, rate=0.05))


CHOICES = (
    Choice(replace(FC, samples=2000, name="mnist-fc-2000"), 24),
    # In float32 passes err by 1e-6, and take a half to a quarter of the time.
    Choice(
        replace(FC, samples=8000, name="mnist-fc-8000"),
        24,
        dense="simpson*8",
        dense_dtype="float32",
    ),
    Choice(
        Net(f"mnist-fc-{9 * 8000}", SHIFTED, 8000, 0, "sgemm"),
        32,
        dense="simpson",
        dense_dtype="float32",
        leave_out=frozenset({"simpson", "gauss-lobatto"}),
    ),
    Choice(replace(LENET, samples=400), 18, dense="simpson*8", dense_dtype="float32"),
    Choice(
        replace(RESNET, samples=128, name="cifar-resnet20", options={}),
        18,
        dense="simpson*8",
        dense_dtype="float32",
        batch=2,
    ),
    Choice(replace(GPT, samples=64), 24, batch=1),
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
        run=choice.run(bench),
        steps=f"{start}:{start + count}",
        options=net.options,
        dense={"rule": bench.pick(choice.dense, QUICK_DENSE), "dtype": choice.dense_dtype},
    ) as player:
        names = bench.pick([*RULES], ["simpson", "simpson-sampled"])
        results = {}
        for name in (name for name in names if name not in choice.leave_out):
            options = dict(RULES[name])
            if name.startswith("simpson-sampled"):
                options |= {"batch_size": choice.batch}
            results[name] = player.ask("compare", options=options)
        cost = results["simpson-sampled"]["gradients_per_interval"]
        results["simpson, samples"] = player.ask("sample", cost=cost)
        for name, result in results.items():
            for metric, value in result.items():
                yield Row(f"{net.name} {name}", metric, value, UNITS.get(metric, "ratio"))


CASES = {f"economy/{choice.net.name}": partial(measure, choice) for choice in CHOICES}
