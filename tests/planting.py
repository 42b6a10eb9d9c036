"""Outputs with planted numbers, every table derived from them: as spans to be reduced, or reduced.

Nothing here is shared with the merging code: a table is the same function of the planted arrays
for a span and for the whole run, so that a reduced output must equal the table of one span that
covers everything. S splits, T intervals, L layers, n elements of a layer.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lcray.planning.plan import Plan, Span, SplitPlan
from lcray.settings import Settings
from lcray.statistics.histograms import UNDERFLOW, bin_edges
from lcray.storage.files import FORMAT_VERSION, encode_json, seal
from lcray.tables.arrow import make_table
from lcray.tables.output import Output
from lcray.tables.record import Record, plan_digest
from lcray.tables.reducing.reduce import reduce
from lcray.tables.schema import TABLES
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
FISHER = 4  # every fourth step
Rows = list[dict[str, Any]]
Columns = dict[str, Any]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
ByElement = Mapping[tuple[str, str], Floats]  # (split, layer) -> [T, n]


@dataclass
class World:
    """Planted numbers."""

    plan: Plan
    lc: dict[tuple[str, str], Floats]  # (split, layer) -> [T, n]
    move: dict[str, Floats] = field(default_factory=dict)  # layer -> [T, n]
    gradient: dict[tuple[str, str], Floats] = field(default_factory=dict)  # -> [T + 1, n]
    weight: dict[str, Floats] = field(default_factory=dict)  # layer -> [T + 1, n]
    loss: dict[str, Floats] = field(default_factory=dict)  # split -> [T + 1]
    gap: dict[str, Floats] = field(default_factory=dict)  # split -> [T]
    has_left: bool = True
    status: dict[tuple[str, int], str] = field(default_factory=dict)  # (split, start_step)

    @property
    def steps(self) -> tuple[int, ...]:
        return self.plan.steps

    def ok(self, split: str, t: int) -> bool:
        return (split, self.steps[t]) not in self.status

    def are_ok(self, split: str, ts: range) -> NDArray[np.bool_]:
        return np.array([self.ok(split, t) for t in ts])

    def good(self, split: str, ts: range) -> Counts:
        """The intervals of `ts` that have LC."""
        return np.array(ts)[self.are_ok(split, ts)]

    def signed(self, split: str, values: Floats, ts: range) -> Floats:
        """The values at `ts`; 0, which flips nothing, where an interval is not ok."""
        return np.where(self.are_ok(split, ts)[:, None], values[np.array(ts)], 0.0)


def make_world(
    *,
    spans: tuple[tuple[int, ...], ...] = ((0, 2, 4, 6), (6, 8), (8, 10, 12)),
    window: int = 4,
    seed: int = 0,
    bad: dict[tuple[str, int], str] | None = None,
    has_left: bool = True,
    tables: tuple[str, ...] | None = None,
    layers: tuple[Layer, ...] = LAYERS,
) -> World:
    rng = np.random.default_rng(seed)
    shares, drawn = (tuple(8 * share for share in shares) for shares in (SHARES, DRAWN))
    splits = tuple(
        SplitPlan(name, 8, 8, 8.0, 1.0, 2, (3, 7), shares, True, 20, drawn)
        for name in ("val", "train")  # not in alphabetical order, and neither are the layers
    )
    plan = Plan(
        settings=Settings(dtype="float64", window=window, elements=True, fisher=FISHER),
        layers=layers,
        splits=splits,
        spans=tuple(Span(steps) for steps in spans),
        window=window,
        tables=ALL if tables is None else tables,
        unit_layers=tuple(layer.name for layer in layers),
        detail_layers=tuple(layer.name for layer in layers if layer.kind == "parameter"),
        trace_sample=2,
    )
    T = plan.n_intervals
    world = World(plan, {}, has_left=has_left, status=dict(bad or {}))
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


def with_a_gap() -> World:
    """An interval has no LC, and there is no gradient at the start of any."""
    return make_world(bad={("val", 6): "nonfinite_loss"}, has_left=False)


def make_plan(
    sizes: Mapping[str, int],
    n_intervals: int,
    window: int,
    splits: tuple[str, ...] = ("train", "val"),
    tables: tuple[str, ...] = ("intervals", "layers"),
) -> Plan:
    """A plan of layers of these sizes, one span, steps 0 … n_intervals."""
    layers = tuple(
        Layer(name, name.rpartition(".")[0], "parameter", (n,), 0, True)
        for name, n in sizes.items()
    )
    return Plan(
        settings=Settings(window=window, elements="elements" in tables),
        layers=layers,
        splits=tuple(SplitPlan(name, 8, 8, 8.0, 2.0, 1) for name in splits),
        spans=(Span(tuple(range(n_intervals + 1))),),
        window=window,
        tables=tables,
        unit_layers=(),
        detail_layers=tuple(sizes),
        trace_sample=256,
    )


# Columns, as for `make_table`, from arrays


def layer_columns(
    plan: Plan, counts: Counts, lc: Floats, start: int = 0, **more: NDArray[Any]
) -> Columns:
    """Columns of `layers` from counts [S, T, L, 3] and LC [S, T, L]; `more` likewise."""
    split, t, layer = (i.ravel() for i in np.indices(lc.shape))
    steps, t = np.array(plan.steps), t + start
    return {
        "split": (split, [s.name for s in plan.splits]),
        "start_step": steps[t],
        "end_step": steps[t + 1],
        "layer": (layer, [la.name for la in plan.layers]),
        "module": (layer, [la.module for la in plan.layers]),
        "kind": (layer, [la.kind for la in plan.layers]),
        "numel": np.array([la.numel for la in plan.layers])[layer],
        "lc": lc.ravel(),
        "n_flips": np.zeros(lc.size, np.int64),
        **_columns_of_counts(counts),
        **{name: values.ravel() for name, values in more.items()},
    }


def interval_columns(
    plan: Plan, lc: Floats, gap: Floats, first_order: Floats | None = None, start: int = 0
) -> Columns:
    """Columns of `intervals` from LC and gaps [S, T]."""
    split, t = (i.ravel() for i in np.indices(lc.shape))
    steps, t = np.array(plan.steps), t + start
    return {
        "split": (split, [s.name for s in plan.splits]),
        "start_step": steps[t],
        "end_step": steps[t + 1],
        "loss_change": (lc - gap).ravel(),
        "lc": lc.ravel(),
        "gap": gap.ravel(),
        "first_order_lc": None if first_order is None else first_order.ravel(),
        "rule": "simpson",
        "panels": 1,
        "n_gradients": 2,
        "status": "ok",
        **_columns_of_counts(np.zeros((*lc.shape, 3), np.int64)),
    }


def _columns_of_counts(counts: Counts) -> Columns:
    names = ("n_helping", "n_hurting", "n_zero")
    return {name: counts[..., i].ravel() for i, name in enumerate(names)}


def signs(values: Floats) -> Counts:
    """How many are below, above and at zero, along the last axis: [..., 3]."""
    each = (values < 0, values > 0, values == 0)
    return np.stack([found.sum(axis=-1) for found in each], axis=-1)


def by_layer(plan: Plan, of: Callable[[str, Layer], NDArray[Any]]) -> NDArray[Any]:
    """[S, T, L, …] from what `of` gives of each split and layer, [T, …]."""
    each = [[of(split.name, layer) for layer in plan.layers] for split in plan.splits]
    return np.stack([np.stack(row, axis=1) for row in each])


def cells(
    plan: Plan,
    of: Callable[[SplitPlan, Any], Mapping[str, Any]],
    layers: Iterable[str] | None = None,
    order: tuple[str, ...] = (),
) -> Columns:
    """The columns that `of` gives of each split and layer, broadcast and one after the other.

    Sorted by the columns `order`, if any; with no layers, once per split.
    """
    names = [layer.name for layer in plan.layers] if layers is None else list(layers)
    chosen = [layer for layer in plan.layers if layer.name in names] or [None]
    places = [la.name for la in plan.layers]
    parts = []
    for s, split in enumerate(plan.splits):
        for layer in chosen:
            keys = {"split": s} | ({} if layer is None else {"layer": places.index(layer.name)})
            found = keys | dict(of(split, layer))
            arrays = np.broadcast_arrays(*found.values())
            parts.append(dict(zip(found, map(np.ravel, arrays), strict=True)))
    columns: Columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if order:
        by = np.lexsort([columns[name] for name in reversed(order)])
        columns = {name: values[by] for name, values in columns.items()}
    columns["split"] = (columns["split"], [split.name for split in plan.splits])
    if "layer" in columns:
        columns["layer"] = (columns["layer"], places)
    return columns


def bin_of(x: Floats) -> Counts:
    """The bin of each magnitude, from its definition: edges (1 + m/8)·2^e."""
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    bins = 8 * (exponent.astype(np.int64) - 1) + np.floor((2 * mantissa - 1) * 8).astype(np.int64)
    return np.where(x >= 2.0**-1022, bins, UNDERFLOW)


def slow_bin(x: float) -> int:
    """The bin by its definition: x in [(1 + m/8)·2^e, (1 + (m+1)/8)·2^e), in fractions."""
    if x < sys.float_info.min:
        return UNDERFLOW
    _, power = math.frexp(x)  # x = mantissa·2^power, mantissa in [1/2, 1)
    e = power - 1
    m = math.floor((Fraction(x) / Fraction(2) ** e - 1) * 8)
    return 8 * e + m


# Tables of a world, in the intervals `ts`


def intervals(world: World, ts: range) -> Columns:
    plan, at = world.plan, np.array(ts)
    names = [split.name for split in plan.splits]
    ok = np.array([world.are_ok(name, ts) for name in names])
    lc = by_layer(plan, lambda split, la: world.lc[split, la.name][at].sum(axis=1)).sum(axis=2)
    start, end = (np.array([world.loss[name][at + i] for name in names]) for i in (0, 1))
    known = {"loss_start": start, "loss_end": end, "loss_change": end - start}
    columns = interval_columns(plan, np.where(ok, lc, np.nan), lc - (end - start), None, ts[0])
    columns["gap"] = np.where(ok, lc - (end - start), np.nan).ravel()
    status = [world.status.get((name, world.steps[t]), "ok") for name in names for t in ts]
    return columns | {
        **{name: np.where(ok, values, np.nan).ravel() for name, values in known.items()},
        **_columns_of_counts(_counts(world, ts).sum(axis=2)),
        "converged": [True if each else None for each in ok.ravel()],
        "status": status,
    }


def _counts(world: World, ts: range) -> Counts:
    """Of the elements of parameters, where intervals are ok: [S, T, L, 3]."""

    def of(split: str, layer: Layer) -> Counts:
        counted = world.are_ok(split, ts) & (layer.kind == "parameter")
        return signs(world.lc[split, layer.name][np.array(ts)]) * counted[:, None]

    return by_layer(world.plan, of)


def layers(world: World, ts: range) -> Columns:
    plan, at = world.plan, np.array(ts)

    def over(of: Callable[[Floats], Floats]) -> Floats:
        """A function of LC [T, n] to [T], where intervals are ok."""
        return known(lambda split, layer: of(world.lc[split, layer.name][at]))

    def known(of: Callable[[str, Layer], Floats]) -> Floats:
        return by_layer(plan, lambda s, la: np.where(world.are_ok(s, ts), of(s, la), np.nan))

    def flips_of(split: str, layer: Layer) -> Counts:
        x = np.sign(world.signed(split, world.lc[split, layer.name], ts))
        flips = (x[1:] * x[:-1] == -1).sum(axis=1) * (layer.kind == "parameter")
        return np.concatenate([[0], flips])

    def gradient(split: str, layer: Layer) -> Floats:
        return world.gradient[split, layer.name][at]

    more = {
        "n_flips": by_layer(plan, flips_of),
        "lc_error": over(lambda x: np.full(len(x), 1e-9)),
        "lc_helping": over(lambda x: np.minimum(x, 0.0).sum(axis=1)),
        "lc_hurting": over(lambda x: np.maximum(x, 0.0).sum(axis=1)),
        "update_norm": known(lambda _, la: np.linalg.norm(world.move[la.name][at], axis=1)),
    }
    if world.has_left:
        more["first_order_lc"] = known(
            lambda s, la: (gradient(s, la) * world.move[la.name][at]).sum(axis=1)
        )
        more["gradient_norm"] = known(lambda s, la: np.linalg.norm(gradient(s, la), axis=1))
    return layer_columns(
        plan, _counts(world, ts), over(lambda x: x.sum(axis=1)), start=ts[0], **more
    )


BY_TIME = ("split", "start_step")


def units(world: World, ts: range) -> Columns:
    def of(split: SplitPlan, layer: Layer) -> Columns:
        at, n = world.good(split.name, ts), layer.n_units
        each = world.lc[split.name, layer.name][at].reshape(len(at), n, layer.numel // n)
        return {**_starts(world, at), "unit": np.arange(n), "lc": each.sum(axis=2)}

    return cells(world.plan, of, world.plan.unit_layers, BY_TIME)


def groups(world: World, ts: range) -> Columns:
    def of(split: SplitPlan, layer: Layer) -> Columns:
        at = world.good(split.name, ts)
        total = world.lc[split.name, layer.name][at].sum(axis=1)
        first = np.sin(at + layer.numel) * 1e-3
        lc = np.stack([first, (total - SHARES[0] * first) / SHARES[1]], axis=1)
        return {**_starts(world, at), "group": split.groups, "lc": lc, "weight": SHARES}

    return cells(world.plan, of, None, BY_TIME)


def replicate_layers(world: World, ts: range) -> Columns:
    def of(split: SplitPlan, layer: Layer) -> Columns:
        at = world.good(split.name, ts)
        lc = _layer_on_replicates(world, split, layer, at)
        return {**_starts(world, at), **_replicates(), "lc": lc}

    return cells(world.plan, of, None, BY_TIME)


def replicates(world: World, ts: range) -> Columns:
    def of(split: SplitPlan, _: None) -> Columns:
        at, loss = world.good(split.name, ts), world.loss[split.name]
        start, end = (_on_replicates(loss[t], t, 100) for t in (at, at + 1))
        layers = [_layer_on_replicates(world, split, la, at) for la in world.plan.layers]
        ends = np.array(world.steps)[at + 1][:, None]
        losses = {"loss_start": start, "loss_end": end, "loss_change": end - start}
        lc = {"end_step": ends, "lc": np.sum(layers, axis=0)}
        return {**_starts(world, at), **_replicates(), **losses, **lc}

    return cells(world.plan, of, ())


def _starts(world: World, at: Counts) -> Columns:
    return {"start_step": np.array(world.steps)[at][:, None]}


def _replicates() -> Columns:
    return {"replicate": np.arange(len(DRAWN)), "weight": DRAWN}


def _on_replicates(total: Floats, t: Counts, salt: int) -> Floats:
    """What a quantity [T] is on each replicate, [T, R], so that their mean is `total`."""
    first = np.sin(t[:, None] + salt + np.arange(len(DRAWN) - 1)) * 1e-3
    rest = (total - first @ np.array(DRAWN[:-1])) / DRAWN[-1]
    return np.column_stack([first, rest])


def _layer_on_replicates(world: World, split: SplitPlan, layer: Layer, at: Counts) -> Floats:
    total = world.lc[split.name, layer.name][at].sum(axis=1)
    return _on_replicates(total, at, layer.numel)


def histograms(world: World, ts: range) -> Columns:
    def of(split: SplitPlan, layer: Layer) -> Columns:
        at = world.good(split.name, ts)
        x, step = np.broadcast_arrays(
            world.lc[split.name, layer.name][at], np.array(world.steps)[at][:, None]
        )
        window = step - step % world.plan.window
        keys = np.stack([window, np.sign(x).astype(np.int64), bin_of(np.abs(x))]).reshape(3, -1)
        (window, sign, bins), where, count = np.unique(
            keys, axis=1, return_inverse=True, return_counts=True
        )
        lower, upper = bin_edges(bins)
        total = np.bincount(where.ravel(), np.abs(x).ravel(), len(count))
        edges = {"bin": bins, "lower": lower, "upper": upper}
        return {"window": window, "sign": sign, **edges, "count": count, "sum": total}

    return cells(world.plan, of, world.plan.detail_layers, ("split", "window"))


def parameters(world: World, ts: range) -> Columns:
    def of(split: SplitPlan, layer: Layer) -> Columns:
        key, at = (split.name, layer.name), world.good(split.name, ts)
        zeros = np.zeros((len(world.steps), layer.numel))  # where nothing is planted
        lc = world.signed(split.name, world.lc[key], ts)
        move = world.signed(split.name, world.move.get(layer.name, zeros), ts)
        gradient = world.signed(split.name, world.gradient.get(key, zeros), ts)
        counts = _columns_of_counts(signs(world.lc[key][at].T))
        sums = {"lc": lc.sum(0), "abs_lc": np.abs(lc).sum(0), "n_flips": _flips(lc)}
        moved = {"displacement": move.sum(0), "path_length": np.abs(move).sum(0)}
        flips = {"displacement_flips": _flips(move), "gradient_flips": _flips(gradient)}
        return {"index": np.arange(layer.numel), **counts, **sums, **moved, **flips}

    columns = cells(world.plan, of, world.plan.detail_layers)
    return columns if world.has_left else columns | {"gradient_flips": None}


def _flips(values: Floats) -> Counts:
    x = np.sign(values)
    return (x[1:] * x[:-1] == -1).sum(axis=0)


def traces(world: World, ts: range) -> Columns:
    """Of some elements of each layer, at every step of `ts` and, at the end, one more."""
    at = np.array([*ts, ts[-1] + 1] if ts[-1] + 1 == len(world.steps) - 1 else ts)

    def of(split: SplitPlan, layer: Layer) -> Columns:
        key, n = (split.name, layer.name), layer.numel
        index = np.linspace(0, n - 1, min(n, world.plan.trace_sample)).astype(np.int64)
        zeros = np.zeros((len(world.steps), n))
        lc = np.full((len(at), len(index)), np.nan)
        lc[: len(ts)] = np.where(
            world.are_ok(split.name, ts)[:, None], world.lc[key][np.array(ts)][:, index], np.nan
        )
        weight, gradient = world.weight.get(layer.name, zeros), world.gradient.get(key, zeros)
        return {
            "index": index[:, None],
            "step": np.array(world.steps)[at],
            "weight": weight[at][:, index].T,
            "gradient": gradient[at][:, index].T,
            "lc": lc.T,
        }

    return cells(world.plan, of, world.plan.detail_layers)


def elements(world: World, ts: range, *, order: tuple[str, ...] = ()) -> Columns:
    def of(split: SplitPlan, layer: Layer) -> Columns:
        at = world.good(split.name, ts)
        lc = world.lc[split.name, layer.name][at].astype(np.float32)
        return {**_starts(world, at), "index": np.arange(layer.numel), "lc": lc}

    return cells(world.plan, of, world.plan.detail_layers, order)


def fisher(world: World, ts: range) -> Columns:
    """At the chosen steps that an interval of `ts` ends at, and at the first step of the run."""
    at = np.arange(ts[0] + (ts[0] > 0), ts[-1] + 2)
    at = at[np.array(world.steps)[at] % FISHER == 0]

    def of(_: SplitPlan, layer: Layer) -> Columns:
        true = 1.0 + at / 7 + world.plan.layers.index(layer)
        return {
            "step": np.array(world.steps)[at],
            "trace_true": true,
            "trace_true_se": 0.1 + at / 70,
            "trace_empirical": 1.0 + true,
            "trace_empirical_se": 0.2 + at / 70,
            "n_items": 8,
            "seed": 0,
        }

    trainable = [layer.name for layer in world.plan.layers if layer.trainable]
    return cells(world.plan, of, trainable, ("split", "step"))


def borders(world: World, ts: range) -> Columns:
    def of(split: SplitPlan, layer: Layer) -> Columns:
        key = (split.name, layer.name)
        found: Columns = {"index": np.arange(layer.numel)}
        values = {"lc": world.lc[key], "displacement": world.move[layer.name]}
        for name, planted in (values | {"gradient": world.gradient[key]}).items():
            signed = np.sign(world.signed(split.name, planted, ts)).astype(np.int8)
            found |= {f"{name}_first": signed[0], f"{name}_last": signed[-1]}
        return found

    columns = cells(world.plan, of, world.plan.detail_layers)
    hidden = {"gradient_first": None, "gradient_last": None}
    return columns if world.has_left else columns | hidden


DERIVE: dict[str, Callable[[World, range], Columns]] = {
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
ALL = tuple(DERIVE)


def rows(world: World, table: str, ts: range | None = None) -> Rows:
    """The rows of a table in the intervals `ts`; else those that the reduced table must have."""
    ts = range(world.plan.n_intervals) if ts is None else ts
    found: Rows = make_table(table, DERIVE[table](world, ts)).to_pylist()
    return found


def span_range(world: World, span: Span) -> range:
    return range(world.steps.index(span.first), world.steps.index(span.last))


# Outputs that are to be reduced


def as_table(name: str, rows: Rows) -> Any:
    return make_table(name, {key: [row[key] for row in rows] for key in (rows[0] if rows else ())})


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
            if table in (rows or {}):
                data = as_table(table, rows[table]) if rows[table] else None
            elif table == "elements":
                data = make_table(table, elements(world, ts, order=("start_step",)))
            else:
                data = make_table(table, DERIVE[table](world, ts))
            if data:
                writer.write(table, data)
        checkpoints = {step: f"{step:064x}" for step in span.steps}
        return writer.commit(checkpoints=checkpoints | (digests or {}), info={"seconds": 0.5})


def write_analysis(out: Path, plan: Plan) -> None:
    out.mkdir(parents=True, exist_ok=True)
    Output(out).write(record_of(plan, str(out)))


def record_of(plan: Plan, run: str = "run") -> Record:
    """The record of a planted output: of no run that there is."""
    return Record(run, "m:t", plan, {"device": plan.device_kind}, {"python": "3"})


def write_output(out: Path, world: World, *, attempt: str = "a0") -> Path:
    """analysis.json and all spans, not reduced."""
    write_analysis(out, world.plan)
    for span in world.plan.spans:
        assert write_span(out, world, span, attempt)
    return out


def write_reduced(out: Path, world: World) -> Path:
    """The same, reduced."""
    reduce(write_output(out, world))
    return out


# Outputs with their tables, without shards: large ones in seconds


def write_tables(out: Path, plan: Plan, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """analysis.json, the tables (columns as for `make_table`) and their manifest."""
    write_analysis(out, plan)
    (out / "tables").mkdir()
    entries = {}
    for name, columns in tables.items():
        path = out / "tables" / f"{name}.parquet"
        pq.write_table(make_table(name, columns), path, row_group_size=TABLES[name].row_group_size)
        data = path.read_bytes()
        count = pq.read_metadata(path).num_rows
        digest = hashlib.sha256(data).hexdigest()
        entries[name] = {"name": path.name, "rows": count, "bytes": len(data), "sha256": digest}
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": plan_digest(plan.to_dict()),
        "spans": [span.name for span in plan.spans],
        "tables": entries,
    }
    (out / "tables" / "manifest.json").write_bytes(encode_json(seal(manifest)))
    return out


def from_elements(
    out: Path,
    lc: ByElement,
    *,
    window: int,
    with_elements: bool = False,
    error: float | None = None,
) -> Path:
    """An output whose elements have this LC [T, n] by split and layer.

    With `error`, the lc_error of every interval and layer.
    """
    sizes = {layer: values.shape[1] for (_, layer), values in lc.items()}
    n_intervals = next(iter(lc.values())).shape[0]
    splits = tuple(dict.fromkeys(split for split, _ in lc))
    tables = ("intervals", "layers", "histograms") + (("elements",) if with_elements else ())
    plan = make_plan(sizes, n_intervals, window, splits, tables)
    world, every = World(plan, dict(lc)), range(n_intervals)
    total = by_layer(plan, lambda split, la: lc[split, la.name].sum(axis=1))
    more = {} if error is None else {"lc_error": np.full(total.shape, error)}
    columns = {
        "intervals": interval_columns(plan, total.sum(axis=2), np.zeros(total.shape[:2])),
        "layers": layer_columns(plan, _counts(world, every), total, **more),
        "histograms": histograms(world, every),
    }
    if with_elements:
        columns["elements"] = elements(world, every)
    return write_tables(out, plan, columns)


def picture(out: Path, n_intervals: int = 10) -> Path:
    """A small output with every table that figures read; the layer ``a.weight`` hurts."""
    rng = np.random.default_rng(7)
    names = ("intervals", "layers", "units", "groups", "histograms", "parameters", "traces")
    plan = make_plan({"b.weight": 6, "a.weight": 4}, n_intervals, 5, tables=(*names, "fisher"))
    three = replace(plan.layers[0], shape=(3, 2))
    plan = replace(
        plan,
        layers=(three, plan.layers[1]),
        unit_layers=("b.weight",),
        splits=tuple(replace(split, groups=(0, 1, 2)) for split in plan.splits),
    )
    drift = {"b.weight": -2e-2, "a.weight": 5e-3}
    lc = {
        (split.name, layer.name): rng.normal(drift[layer.name], 3e-2, (n_intervals, layer.numel))
        for split in plan.splits
        for layer in plan.layers
    }
    world, every = World(plan, lc), range(n_intervals)
    total = by_layer(plan, lambda split, la: lc[split, la.name].sum(axis=1))
    change = total.sum(axis=2)
    gap = 0.05 * change * rng.choice([-1, 1], change.shape)
    loss = 3.0 + np.concatenate([np.zeros((2, 1)), np.cumsum(change - gap, axis=1)], axis=1)
    losses = {"loss_start": loss[:, :-1].ravel(), "loss_end": loss[:, 1:].ravel()}
    more = {name: np.abs(total) for name in ("update_norm", "gradient_norm", "lc_error")}
    sums, traced = parameters(world, every), traces(world, every)
    index, step = traced["index"], traced["step"]
    sums |= {"displacement": sums["lc"], "path_length": sums["abs_lc"]}
    sums |= {f"{name}_flips": sums["n_flips"] for name in ("displacement", "gradient")}
    columns = {
        "intervals": interval_columns(plan, change, gap, 1.5 * change) | losses,
        "layers": layer_columns(plan, _counts(world, every), total, **more),
        "units": units(world, every),
        "groups": _three_groups(world),
        "histograms": histograms(world, every),
        "parameters": sums,
        "traces": traced | {"weight": np.sin(index + step / 3), "gradient": np.cos(index + step)},
        "fisher": _growing_fisher(plan),
    }
    return write_tables(out, plan, columns)


def _three_groups(world: World) -> Columns:
    """Three groups of weights ½, ¼, ¼ whose parts add up to the LC of each layer."""
    weight, part = np.array([0.5, 0.25, 0.25]), np.array([1.4, -0.6, 0.2])

    def of(split: SplitPlan, layer: Layer) -> Columns:
        lc = world.lc[split.name, layer.name].sum(axis=1)[:, None] * part / weight
        return {**_starts(world, np.arange(len(lc))), "group": range(3), "lc": lc, "weight": weight}

    return cells(world.plan, of, None, BY_TIME)


def _growing_fisher(plan: Plan) -> Columns:
    """Every five steps, more of it in later layers and splits."""
    steps = np.arange(0, plan.n_intervals + 1, 5)

    def of(split: SplitPlan, layer: Layer) -> Columns:
        true = 1.0 + plan.layers.index(layer) + steps / 50 + plan.splits.index(split)
        errors = {"trace_true_se": 0.1 * true, "trace_empirical_se": 0.2 * true}
        traces = {"trace_true": true, "trace_empirical": 2.0 * true}
        return {"step": steps, **traces, **errors, "n_items": 8, "seed": 0}

    return cells(plan, of, None, ("split", "step"))
