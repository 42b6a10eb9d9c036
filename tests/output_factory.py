"""A small output with planted numbers, every table derived from them by plain loops.

Nothing here is shared with the merging code: a table is the same function of the planted arrays
for a span and for the whole run, so that a reduced output must equal the table of one span that
covers everything.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcray.planning.plan import Plan, Span, SplitPlan
from lcray.settings import Settings
from lcray.statistics.histograms import UNDERFLOW, bin_edges
from lcray.tables.arrow import make_table
from lcray.tables.shards.writer import ShardWriter
from lcray.tasks.layer import Layer

LAYERS = (
    Layer("b.weight", "b", "parameter", (3, 4), 0, True),
    Layer("b.mean", "b", "buffer", (3,), 0, False),
    Layer("a.bias", "a", "parameter", (5,), 0, True),
    Layer("scale", "", "parameter", (), None, True),
)
SHARES = (0.25, 0.75)
DRAWN = (0.25, 0.375, 0.375)  # the shares of the replicates, of 2, 3 and 3 samples
ALL = (
    "intervals",
    "layers",
    "units",
    "groups",
    "replicates",
    "replicate_layers",
    "histograms",
    "parameters",
    "traces",
    "elements",
    "fisher",
    "borders",
)
FISHER = 4  # every fourth step
Rows = list[dict[str, Any]]


@dataclass
class World:
    """Planted numbers: T intervals, n elements of a layer."""

    plan: Plan
    lc: dict[tuple[str, str], np.ndarray]  # (split, layer) -> [T, n]
    move: dict[str, np.ndarray]  # layer -> [T, n]
    gradient: dict[tuple[str, str], np.ndarray]  # (split, layer) -> [T + 1, n]
    weight: dict[str, np.ndarray]  # layer -> [T + 1, n]
    loss: dict[str, np.ndarray]  # split -> [T + 1]
    gap: dict[str, np.ndarray]  # split -> [T]
    has_left: bool = True
    status: dict[tuple[str, int], str] = field(default_factory=dict)  # (split, start_step)

    @property
    def steps(self) -> tuple[int, ...]:
        return self.plan.steps

    def ok(self, split: str, t: int) -> bool:
        return (split, self.steps[t]) not in self.status


def make_world(
    *,
    spans: tuple[tuple[int, ...], ...] = ((0, 2, 4, 6), (6, 8), (8, 10, 12)),
    window: int = 4,
    seed: int = 0,
    bad: dict[tuple[str, int], str] | None = None,
    has_left: bool = True,
    tables: tuple[str, ...] = ALL,
    layers: tuple[Layer, ...] = LAYERS,
) -> World:
    rng = np.random.default_rng(seed)
    parameters = tuple(layer.name for layer in layers if layer.kind == "parameter")
    splits = tuple(
        SplitPlan(
            name,
            8,
            8,
            8.0,
            1.0,
            2,
            (3, 7),
            tuple(8 * s for s in SHARES),
            True,
            20,
            tuple(8 * s for s in DRAWN),
        )
        for name in ("val", "train")  # not in alphabetical order, and neither are the layers
    )
    plan = Plan(
        settings=Settings(dtype="float64", window=window, elements=True, fisher=FISHER),
        layers=layers,
        splits=splits,
        spans=tuple(Span(steps) for steps in spans),
        window=window,
        tables=tables,
        unit_layers=tuple(layer.name for layer in layers),
        detail_layers=parameters,
        trace_sample=2,
    )
    T = plan.n_intervals
    world = World(plan, {}, {}, {}, {}, {}, {}, has_left, dict(bad or {}))
    for layer in layers:
        n = layer.numel
        move = rng.normal(size=(T, n)) * (rng.random((T, n)) > 0.2)
        world.move[layer.name] = move
        world.weight[layer.name] = np.cumsum(np.vstack([rng.normal(size=n), move]), axis=0)
        for split in splits:
            heavy = rng.weibull(0.6, size=(T, n)) * rng.choice([-1.0, 1.0], size=(T, n))
            world.lc[split.name, layer.name] = np.where(move == 0, 0.0, heavy * 1e-3)
            world.gradient[split.name, layer.name] = rng.normal(size=(T + 1, n))
    for split in splits:
        total = sum(world.lc[split.name, layer.name].sum(axis=1) for layer in layers)
        world.gap[split.name] = rng.normal(size=T) * 1e-5
        change = total - world.gap[split.name]
        world.loss[split.name] = 2.0 + np.concatenate([[0.0], np.cumsum(change)])
    return world


def sign(x: float) -> int:
    return int(x > 0) - int(x < 0)


def flips(values: list[float]) -> int:
    return sum(sign(a) * sign(b) == -1 for a, b in itertools.pairwise(values))


def intervals(world: World, ts: range) -> Rows:
    rows = []
    for split in world.plan.splits:
        for t in ts:
            row: dict[str, Any] = {
                "split": split.name,
                "start_step": world.steps[t],
                "end_step": world.steps[t + 1],
                "rule": "simpson",
                "panels": 1,
                "n_gradients": 2,
                "status": world.status.get((split.name, world.steps[t]), "ok"),
                "n_helping": 0,
                "n_hurting": 0,
                "n_zero": 0,
            }
            if world.ok(split.name, t):
                loss = world.loss[split.name]
                row["loss_start"], row["loss_end"] = loss[t], loss[t + 1]
                row["loss_change"] = loss[t + 1] - loss[t]
                row["lc"] = math.fsum(
                    x for layer in world.plan.layers for x in world.lc[split.name, layer.name][t]
                )
                row["gap"] = row["lc"] - row["loss_change"]
                row["converged"] = True
                for layer in world.plan.layers:
                    if layer.kind == "parameter":
                        _count(row, world.lc[split.name, layer.name][t])
            rows.append(row)
    return rows


def _count(row: dict[str, Any], values: np.ndarray) -> None:
    for x in values:
        row["n_zero" if x == 0 else "n_helping" if x < 0 else "n_hurting"] += 1


def layers(world: World, ts: range) -> Rows:
    rows = []
    for split in world.plan.splits:
        for t in ts:
            for layer in world.plan.layers:
                lc = world.lc[split.name, layer.name]
                row: dict[str, Any] = {
                    "split": split.name,
                    "start_step": world.steps[t],
                    "end_step": world.steps[t + 1],
                    "layer": layer.name,
                    "module": layer.module,
                    "kind": layer.kind,
                    "numel": layer.numel,
                    "n_helping": 0,
                    "n_hurting": 0,
                    "n_zero": 0,
                    "n_flips": 0,
                }
                if world.ok(split.name, t):
                    row["lc"] = math.fsum(lc[t])
                    row["lc_error"] = 1e-9
                    row["lc_helping"] = math.fsum(x for x in lc[t] if x < 0)
                    row["lc_hurting"] = math.fsum(x for x in lc[t] if x > 0)
                    row["update_norm"] = math.sqrt(math.fsum(world.move[layer.name][t] ** 2))
                    if world.has_left:
                        g = world.gradient[split.name, layer.name][t]
                        row["first_order_lc"] = math.fsum(g * world.move[layer.name][t])
                        row["gradient_norm"] = math.sqrt(math.fsum(g**2))
                    if layer.kind == "parameter":
                        _count(row, lc[t])
                        if t - 1 in ts and world.ok(split.name, t - 1):
                            row["n_flips"] = sum(
                                flips([a, b]) for a, b in zip(lc[t - 1], lc[t], strict=True)
                            )
                rows.append(row)
    return rows


def units(world: World, ts: range) -> Rows:
    return [
        {
            "split": split.name,
            "start_step": world.steps[t],
            "layer": layer.name,
            "unit": unit,
            "lc": math.fsum(part),
        }
        for split in world.plan.splits
        for t in ts
        if world.ok(split.name, t)
        for layer in world.plan.layers
        for unit, part in enumerate(world.lc[split.name, layer.name][t].reshape(layer.n_units, -1))
    ]


def groups(world: World, ts: range) -> Rows:
    rows = []
    for split in world.plan.splits:
        for t in ts:
            for layer in world.plan.layers if world.ok(split.name, t) else ():
                total = math.fsum(world.lc[split.name, layer.name][t])
                first = math.sin(t + layer.numel) * 1e-3
                parts = (first, (total - SHARES[0] * first) / SHARES[1])
                for group, share, lc in zip(split.groups, SHARES, parts, strict=True):
                    rows.append(
                        {
                            "split": split.name,
                            "start_step": world.steps[t],
                            "layer": layer.name,
                            "group": group,
                            "lc": lc,
                            "weight": share,
                        }
                    )
    return rows


def _on_replicates(total: float, t: int, salt: int) -> list[float]:
    """What a quantity is on each replicate, so that their mean is `total`."""
    first = [math.sin(t + salt + r) * 1e-3 for r in range(len(DRAWN) - 1)]
    rest = total - math.fsum(x * share for x, share in zip(first, DRAWN, strict=False))
    return [*first, rest / DRAWN[-1]]


def replicate_layers(world: World, ts: range) -> Rows:
    return [
        {
            "split": split.name,
            "start_step": world.steps[t],
            "layer": layer.name,
            "replicate": replicate,
            "lc": lc,
            "weight": DRAWN[replicate],
        }
        for split in world.plan.splits
        for t in ts
        if world.ok(split.name, t)
        for layer in world.plan.layers
        for replicate, lc in enumerate(
            _on_replicates(math.fsum(world.lc[split.name, layer.name][t]), t, layer.numel)
        )
    ]


def replicates(world: World, ts: range) -> Rows:
    by_layer: dict[tuple[str, int, int], list[float]] = {}
    for row in replicate_layers(world, ts):
        key = (row["split"], row["start_step"], row["replicate"])
        by_layer.setdefault(key, []).append(row["lc"])
    rows = []
    for split in world.plan.splits:
        loss = world.loss[split.name]
        for t in ts:
            before, after = (_on_replicates(loss[t + end], t + end, 100) for end in (0, 1))
            for r, share in enumerate(DRAWN if world.ok(split.name, t) else ()):
                rows.append(
                    {
                        "split": split.name,
                        "start_step": world.steps[t],
                        "replicate": r,
                        "end_step": world.steps[t + 1],
                        "loss_start": before[r],
                        "loss_end": after[r],
                        "loss_change": after[r] - before[r],
                        "lc": math.fsum(by_layer[split.name, world.steps[t], r]),
                        "weight": share,
                    }
                )
    return rows


def bin_of(x: float) -> int:
    """The bin of |x| from its definition: edges (1 + m/8)·2^e."""
    if x == 0:
        return UNDERFLOW
    mantissa, exponent = math.frexp(abs(x))  # mantissa in [0.5, 1)
    return 8 * (exponent - 1) + int((2 * mantissa - 1) * 8)


def histograms(world: World, ts: range) -> Rows:
    bins: dict[tuple[int, int, int, int, int], list[float]] = {}
    for s, split in enumerate(world.plan.splits):
        for t in ts:
            for k, layer in enumerate(world.plan.layers):
                if layer.kind == "parameter" and world.ok(split.name, t):
                    window = world.steps[t] - world.steps[t] % world.plan.window
                    for x in world.lc[split.name, layer.name][t]:
                        bins.setdefault((s, window, k, sign(x), bin_of(x)), []).append(abs(x))
    rows = []
    for (s, window, k, which, bin_), values in sorted(bins.items()):
        lower, upper = bin_edges(np.array([bin_]))
        rows.append(
            {
                "split": world.plan.splits[s].name,
                "window": window,
                "layer": world.plan.layers[k].name,
                "sign": which,
                "bin": bin_,
                "lower": lower[0],
                "upper": upper[0],
                "count": len(values),
                "sum": math.fsum(values),
            }
        )
    return rows


def _signed(world: World, split: str, values: np.ndarray, ts: range) -> list[float]:
    """The values of an element at `ts`; 0, which flips nothing, where an interval is not ok."""
    return [float(values[t]) if world.ok(split, t) else 0.0 for t in ts]


def parameters(world: World, ts: range) -> Rows:
    rows = []
    for split in world.plan.splits:
        for layer in world.plan.layers:
            for index in range(layer.numel if layer.kind == "parameter" else 0):
                lc = _signed(world, split.name, world.lc[split.name, layer.name][:, index], ts)
                move = _signed(world, split.name, world.move[layer.name][:, index], ts)
                g = world.gradient[split.name, layer.name][:, index]
                counted = [lc[i] for i, t in enumerate(ts) if world.ok(split.name, t)]
                rows.append(
                    {
                        "split": split.name,
                        "layer": layer.name,
                        "index": index,
                        "lc": math.fsum(lc),
                        "abs_lc": math.fsum(abs(x) for x in lc),
                        "n_helping": sum(x < 0 for x in counted),
                        "n_hurting": sum(x > 0 for x in counted),
                        "n_zero": sum(x == 0 for x in counted),
                        "n_flips": flips(lc),
                        "displacement": math.fsum(move),
                        "path_length": math.fsum(abs(x) for x in move),
                        "displacement_flips": flips(move),
                        "gradient_flips": flips(_signed(world, split.name, g, ts))
                        if world.has_left
                        else None,
                    }
                )
    return rows


def traces(world: World, ts: range) -> Rows:
    """The first and last element of each layer, at every step of `ts` and, at the end, one more."""
    last = ts[-1] + 1 == len(world.steps) - 1
    return [
        {
            "split": split.name,
            "layer": layer.name,
            "index": index,
            "step": world.steps[t],
            "weight": world.weight[layer.name][t, index],
            "gradient": world.gradient[split.name, layer.name][t, index],
            "lc": world.lc[split.name, layer.name][t, index]
            if t in ts and world.ok(split.name, t)
            else None,
        }
        for split in world.plan.splits
        for layer in world.plan.layers
        if layer.kind == "parameter"
        for index in sorted({0, layer.numel - 1})
        for t in [*ts, *([ts[-1] + 1] if last else [])]
    ]


def elements(world: World, ts: range, *, by_time: bool = False) -> Rows:
    rows = [
        (s, k, t, index)
        for s in range(len(world.plan.splits))
        for k, layer in enumerate(world.plan.layers)
        if layer.kind == "parameter"
        for t in ts
        if world.ok(world.plan.splits[s].name, t)
        for index in range(layer.numel)
    ]
    if by_time:
        rows.sort(key=lambda row: (row[2], row[0], row[1], row[3]))
    return [
        {
            "split": world.plan.splits[s].name,
            "layer": world.plan.layers[k].name,
            "start_step": world.steps[t],
            "index": index,
            "lc": np.float32(
                world.lc[world.plan.splits[s].name, world.plan.layers[k].name][t, index]
            ),
        }
        for s, k, t, index in rows
    ]


def fisher(world: World, ts: range) -> Rows:
    """At the chosen steps that an interval of `ts` ends at, and at the first step of the run."""
    return [
        {
            "split": split.name,
            "step": world.steps[t],
            "layer": layer.name,
            "trace_true": 1.0 + t / 7 + k,
            "trace_true_se": 0.1 + t / 70,
            "trace_empirical": 2.0 + t / 7 + k,
            "trace_empirical_se": 0.2 + t / 70,
            "n_items": 8,
            "seed": 0,
        }
        for split in world.plan.splits
        for t in range(ts[0] + (ts[0] > 0), ts[-1] + 2)
        if world.steps[t] % FISHER == 0
        for k, layer in enumerate(world.plan.layers)
        if layer.trainable
    ]


def borders(world: World, ts: range) -> Rows:
    rows = []
    for split in world.plan.splits:
        for layer in world.plan.layers:
            for index in range(layer.numel if layer.kind == "parameter" else 0):
                key = (split.name, layer.name)
                row = {"split": split.name, "layer": layer.name, "index": index}
                for name, values in (
                    ("lc", world.lc[key]),
                    ("displacement", world.move[layer.name]),
                    ("gradient", world.gradient[key]),
                ):
                    for end, t in (("first", ts[0]), ("last", ts[-1])):
                        known = sign(values[t, index]) if world.ok(split.name, t) else 0
                        hidden = name == "gradient" and not world.has_left
                        row[f"{name}_{end}"] = None if hidden else known
                rows.append(row)
    return rows


DERIVE = {
    "intervals": intervals,
    "layers": layers,
    "units": units,
    "groups": groups,
    "replicates": replicates,
    "replicate_layers": replicate_layers,
    "histograms": histograms,
    "parameters": parameters,
    "traces": traces,
    "elements": elements,
    "fisher": fisher,
    "borders": borders,
}


def whole(world: World, table: str) -> Rows:
    """The rows that the reduced table must have."""
    return DERIVE[table](world, range(world.plan.n_intervals))


def span_range(world: World, span: Span) -> range:
    return range(world.steps.index(span.first), world.steps.index(span.last))


def as_table(name: str, rows: Rows) -> Any:
    columns: dict[str, list[Any]] = {key: [] for row in rows for key in row}
    for row in rows:
        for key in columns:
            columns[key].append(row.get(key))
    return make_table(name, columns)


def checkpoint_digest(step: int) -> str:
    return f"{step:064x}"


def write_span(
    out: Path,
    world: World,
    span: Span,
    attempt: str = "a0",
    rows: dict[str, Rows] | None = None,
    digests: dict[int, str] | None = None,
) -> bool:
    """Commits one span; `rows` replaces tables."""
    ts = span_range(world, span)
    with ShardWriter(out, span, attempt) as writer:
        for table in world.plan.tables:
            if rows and table in rows:
                data = rows[table]
            elif table == "elements":
                data = elements(world, ts, by_time=True)
            else:
                data = DERIVE[table](world, ts)
            if data:
                writer.write(table, as_table(table, data))
        checkpoints = {step: checkpoint_digest(step) for step in span.steps}
        return writer.commit(checkpoints=checkpoints | (digests or {}), info={"seconds": 0.5})


def write_analysis(out: Path, world: World) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format_version": 2, "plan": world.plan.to_dict()})
    (out / "analysis.json").write_text(text)


def write_output(out: Path, world: World, *, attempt: str = "a0") -> Path:
    """analysis.json and all spans, not reduced."""
    write_analysis(out, world)
    for span in world.plan.spans:
        assert write_span(out, world, span, attempt)
    return out
