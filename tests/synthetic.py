"""Outputs with planted numbers, tables written directly: large ones in seconds, without shards."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
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
from lcray.tables.reducing.reduce import plan_digest
from lcray.tables.schema import TABLES
from lcray.tasks.layer import Layer

Floats = NDArray[np.float64]

#: Elements of the layers of MNIST-LeNet: conv 5x5-20, conv 5x5-40, fc 400, fc 10.
LENET = {
    "conv1.weight": 500,
    "conv1.bias": 20,
    "conv2.weight": 20_000,
    "conv2.bias": 40,
    "fc1.weight": 256_000,
    "fc1.bias": 400,
    "fc2.weight": 4_000,
    "fc2.bias": 10,
}


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


def write(out: Path, plan: Plan, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """analysis.json, the tables (columns as for `make_table`) and their manifest."""
    (out / "tables").mkdir(parents=True)
    text = json.dumps({"format_version": FORMAT_VERSION, "plan": plan.to_dict()})
    (out / "analysis.json").write_text(text)
    entries = {}
    for name, columns in tables.items():
        path = out / "tables" / f"{name}.parquet"
        pq.write_table(make_table(name, columns), path, row_group_size=TABLES[name].row_group_size)
        data = path.read_bytes()
        rows = pq.read_metadata(path).num_rows
        digest = hashlib.sha256(data).hexdigest()
        entries[name] = {"name": path.name, "rows": rows, "bytes": len(data), "sha256": digest}
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": plan_digest(plan),
        "spans": [span.name for span in plan.spans],
        "tables": entries,
    }
    (out / "tables" / "manifest.json").write_bytes(encode_json(seal(manifest)))
    return out


def layer_columns(
    plan: Plan, counts: NDArray[np.int64], lc: Floats, **more: Floats
) -> dict[str, Any]:
    """Columns of `layers` from counts [S, T, L, 3] and LC [S, T, L]; `more` likewise."""
    split, step, layer = (i.ravel() for i in np.indices(lc.shape))
    names = [la.name for la in plan.layers]
    return {
        "split": (split, [s.name for s in plan.splits]),
        "start_step": step,
        "end_step": step + 1,
        "layer": (layer, names),
        "module": (layer, [la.module for la in plan.layers]),
        "kind": "parameter",
        "numel": np.array([la.numel for la in plan.layers])[layer],
        "lc": lc.ravel(),
        "n_flips": np.zeros(lc.size, np.int64),
        **{
            name: counts[..., i].ravel()
            for i, name in enumerate(("n_helping", "n_hurting", "n_zero"))
        },
        **{name: values.ravel() for name, values in more.items()},
    }


def interval_columns(
    plan: Plan, lc: Floats, gap: Floats, first_order: Floats | None = None
) -> dict[str, Any]:
    """Columns of `intervals` from LC and gaps [S, T]."""
    split, step = (i.ravel() for i in np.indices(lc.shape))
    zeros = np.zeros(lc.size, np.int64)
    return {
        "split": (split, [s.name for s in plan.splits]),
        "start_step": step,
        "end_step": step + 1,
        "loss_change": (lc - gap).ravel(),
        "lc": lc.ravel(),
        "gap": gap.ravel(),
        "first_order_lc": None if first_order is None else first_order.ravel(),
        "rule": "simpson",
        "panels": zeros + 1,
        "n_gradients": zeros + 2,
        "status": "ok",
        "n_helping": zeros,
        "n_hurting": zeros,
        "n_zero": zeros,
    }


def bin_of(x: Floats) -> NDArray[np.int64]:
    """The bin of each magnitude, from its definition: edges (1 + m/8)·2^e."""
    mantissa, exponent = np.frexp(x)
    bins = 8 * (exponent.astype(np.int64) - 1) + np.floor((2 * mantissa - 1) * 8).astype(np.int64)
    return np.where(x >= 2.0**-1022, bins, UNDERFLOW)


def histogram_columns(plan: Plan, lc: Mapping[tuple[str, str], Floats]) -> dict[str, Any]:
    """Columns of `histograms` from the LC [T, n] of every split and layer."""
    rows: list[tuple[int, int, int, int, int, int]] = []
    for s, split in enumerate(plan.splits):
        for first in range(0, plan.n_intervals, plan.window):
            for k, layer in enumerate(plan.layers):
                values = lc[split.name, layer.name][first : first + plan.window].ravel()
                for sign in (-1, 0, 1):
                    bins = bin_of(np.abs(values[np.sign(values) == sign]))
                    found, counts = np.unique(bins, return_counts=True)
                    rows += [
                        (s, first, k, sign, int(b), int(c))
                        for b, c in zip(found, counts, strict=True)
                    ]
    split, window, layer, sign, bins, counts = np.array(rows).T
    lower, upper = bin_edges(bins)
    return {
        "split": (split, [s.name for s in plan.splits]),
        "window": window,
        "layer": (layer, [la.name for la in plan.layers]),
        "sign": sign.astype(np.int8),
        "bin": bins,
        "lower": lower,
        "upper": upper,
        "count": counts,
        "sum": lower * counts,
    }


def element_columns(plan: Plan, lc: Mapping[tuple[str, str], Floats]) -> dict[str, Any]:
    """Columns of `elements`, likewise."""
    parts = []
    for s, split in enumerate(plan.splits):
        for k, layer in enumerate(plan.layers):
            values = lc[split.name, layer.name]
            step, index = (i.ravel() for i in np.indices(values.shape))
            parts.append(
                (np.full(step.size, s), np.full(step.size, k), step, index, values.ravel())
            )
    split, layer, step, index, values = (np.concatenate(p) for p in zip(*parts, strict=True))
    return {
        "split": (split, [s.name for s in plan.splits]),
        "layer": (layer, [la.name for la in plan.layers]),
        "start_step": step,
        "index": index,
        "lc": values,
    }


def count_signs(plan: Plan, lc: Mapping[tuple[str, str], Floats]) -> NDArray[np.int64]:
    """Helping, hurting and zero elements [S, T, L, 3]."""
    signs = (lambda x: x < 0, lambda x: x > 0, lambda x: x == 0)
    return np.stack(
        [
            np.stack(
                [
                    np.stack([is_(lc[split.name, la.name]).sum(axis=1) for is_ in signs], axis=-1)
                    for la in plan.layers
                ],
                axis=1,
            )
            for split in plan.splits
        ]
    )


def from_elements(
    out: Path,
    lc: Mapping[tuple[str, str], Floats],
    *,
    window: int,
    elements: bool = False,
    error: float | None = None,
) -> Path:
    """An output whose elements have this LC [T, n] by split and layer.

    With `error`, the lc_error of every interval and layer.
    """
    sizes = {layer: values.shape[1] for (_, layer), values in lc.items()}
    n_intervals = next(iter(lc.values())).shape[0]
    splits = tuple(dict.fromkeys(split for split, _ in lc))
    tables = ("intervals", "layers", "histograms") + (("elements",) if elements else ())
    plan = make_plan(sizes, n_intervals, window, splits, tables)
    total = np.stack([np.stack([lc[s, la].sum(axis=1) for la in sizes], axis=-1) for s in splits])
    more = {} if error is None else {"lc_error": np.full(total.shape, error)}
    columns: dict[str, dict[str, Any]] = {
        "intervals": interval_columns(plan, total.sum(axis=2), np.zeros(total.shape[:2])),
        "layers": layer_columns(plan, count_signs(plan, lc), total, **more),
        "histograms": histogram_columns(plan, lc),
    }
    if elements:
        columns["elements"] = element_columns(plan, lc)
    return write(out, plan, columns)


def wide(
    out: Path, n_intervals: int = 1000, n_layers: int = 60, *, units: int = 64, seed: int = 0
) -> Path:
    """An output of many small layers, with units and fits beside what `lenet` has."""
    sizes = {f"stage{i // 9}.block{i % 9 // 3}.conv{i % 3}.weight": 640 for i in range(n_layers)}
    return lenet(out, n_intervals, seed=seed, sizes=sizes, units=units)


def lenet(
    out: Path,
    n_intervals: int = 1000,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] = LENET,
    units: int = 0,
) -> Path:
    """An output of the size of MNIST-LeNet's, with every table that findings read.

    With `units`, so many a layer, and Weibull fits.
    """
    rng = np.random.default_rng(seed)
    names = ("intervals", "layers", "histograms", "parameters", "traces", "groups")
    plan = make_plan(sizes, n_intervals, max(1, n_intervals // 10), tables=names)
    splits = tuple(replace(split, groups=tuple(range(10))) for split in plan.splits)
    plan = replace(plan, splits=splits)
    if units:
        plan = replace(plan, trace_sample=16)
    n = np.array([*sizes.values()])
    shape = (2, n_intervals, len(n))
    helping = rng.binomial(np.broadcast_to(n, shape), 0.5)
    counts = np.stack([helping, n - helping, np.zeros(shape, np.int64)], axis=-1)
    lc = rng.normal(-1e-3, 3e-3, shape)
    more = {"lc_helping": lc - 1e-2, "lc_hurting": np.full(shape, 1e-2)}
    more |= {name: np.abs(lc) for name in ("update_norm", "gradient_norm", "lc_error")}
    total = lc.sum(axis=2)
    tables = {
        "intervals": interval_columns(plan, total, 1e-2 * total, 2 * total),
        "layers": layer_columns(plan, counts, lc, first_order_lc=2 * lc, **more),
        "histograms": _lenet_histograms(plan, rng),
        "parameters": _lenet_parameters(plan, rng),
        "traces": _lenet_traces(plan, rng),
        "groups": _lenet_groups(plan, rng),
    }
    if units:
        tables |= {"units": _units(plan, lc, units), "fits": _fits(plan)}
    return write(out, plan, tables)


def _units(plan: Plan, lc: Floats, units: int) -> dict[str, Any]:
    """Units that share their layer's LC evenly."""
    shape = (*lc.shape, units)
    split, step, layer, unit = (i.ravel() for i in np.indices(shape, np.int32))
    return {
        "split": (split, [s.name for s in plan.splits]),
        "start_step": step,
        "layer": (layer, [la.name for la in plan.layers]),
        "unit": unit,
        "lc": np.repeat(lc.ravel() / units, units),
    }


def _fits(plan: Plan) -> dict[str, Any]:
    """The Weibull distributions that `_lenet_histograms` draws from, over the run."""
    shape = (len(plan.splits), len(plan.layers), 2, 2)
    split, layer, sign, parameter = (i.ravel() for i in np.indices(shape))
    return {
        "split": (split, [s.name for s in plan.splits]),
        "window": np.full(split.size, -1),
        "layer": (layer, [la.name for la in plan.layers]),
        "sign": (2 * sign - 1).astype(np.int8),
        "distribution": "weibull",
        "parameter": (parameter, ["k", "lambda"]),
        "value": np.where(parameter == 0, 0.5 + 0.02 * layer, 1e-8),
        "se": np.full(split.size, 1e-3),
    }


def _lenet_histograms(plan: Plan, rng: np.random.Generator) -> dict[str, Any]:
    bins = np.arange(-320, -40)
    lower, upper = bin_edges(bins)
    rows = []
    for s in range(2):
        for first in range(0, plan.n_intervals, plan.window):
            for k, layer in enumerate(plan.layers):
                for sign in (-1, 1):
                    edges = np.concatenate([lower, upper[-1:]])
                    mass = np.diff(-np.exp(-((edges / 1e-8) ** (0.5 + 0.02 * k))))
                    count = rng.multinomial(layer.numel * plan.window // 2, mass / mass.sum())
                    some = count > 0
                    key = np.array([s, first, k, sign])[:, None]
                    row = np.broadcast_to(key, (4, some.sum()))
                    rows.append(np.vstack([row, bins[some], count[some]]))
    split, window, layer, sign, bins, counts = np.concatenate(rows, axis=1)
    low, high = bin_edges(bins)
    return {
        "split": (split, [s.name for s in plan.splits]),
        "window": window,
        "layer": (layer, [la.name for la in plan.layers]),
        "sign": sign.astype(np.int8),
        "bin": bins,
        "lower": low,
        "upper": high,
        "count": counts,
        "sum": low * counts,
    }


def _lenet_parameters(plan: Plan, rng: np.random.Generator) -> dict[str, Any]:
    n = np.array([layer.numel for layer in plan.layers])
    layer = np.tile(np.repeat(np.arange(len(n)), n), 2)
    index = np.tile(np.concatenate([np.arange(m) for m in n]), 2)
    helping = rng.binomial(plan.n_intervals, 0.51, len(layer))
    flips = rng.binomial(plan.n_intervals - 1, 0.4, len(layer))
    normal = rng.normal(size=len(layer))
    return {
        "split": (np.repeat([0, 1], n.sum()), [s.name for s in plan.splits]),
        "layer": (layer, [la.name for la in plan.layers]),
        "index": index,
        "lc": 1e-6 * normal,
        "abs_lc": 1e-5 * np.abs(normal),
        "n_helping": helping,
        "n_hurting": plan.n_intervals - helping,
        "n_zero": np.zeros(len(layer), np.int64),
        "n_flips": flips,
        "displacement": normal,
        "path_length": 10 * np.abs(normal),
        "displacement_flips": flips,
        "gradient_flips": flips,
    }


def _lenet_traces(plan: Plan, rng: np.random.Generator) -> dict[str, Any]:
    index = [
        np.sort(rng.choice(la.numel, min(plan.trace_sample, la.numel), False)) for la in plan.layers
    ]
    steps = plan.n_intervals + 1
    sampled = sum(map(len, index))
    layer = np.repeat(np.arange(len(index)), [len(i) * steps for i in index])
    rows = sampled * steps
    noise = rng.normal(size=(sampled, steps))
    lc = 1e-7 * noise
    lc[:, -1] = np.nan
    return {
        "split": (np.repeat([0, 1], rows), [s.name for s in plan.splits]),
        "layer": (np.tile(layer, 2), [la.name for la in plan.layers]),
        "index": np.tile(np.repeat(np.concatenate(index), steps), 2),
        "step": np.tile(np.arange(steps), 2 * sampled),
        "weight": np.tile(np.cumsum(1e-3 * noise, axis=1).ravel(), 2),
        "gradient": np.tile(1e-3 * noise[:, ::-1].ravel(), 2),
        "lc": np.tile(lc.ravel(), 2),
    }


def _lenet_groups(plan: Plan, rng: np.random.Generator) -> dict[str, Any]:
    shape = (2, plan.n_intervals, len(plan.layers), 10)
    split, step, layer, group = (i.ravel() for i in np.indices(shape))
    return {
        "split": (split, [s.name for s in plan.splits]),
        "start_step": step,
        "layer": (layer, [la.name for la in plan.layers]),
        "group": group,
        "lc": rng.normal(-1e-3, 3e-3, split.size),
        "weight": np.full(split.size, 0.1),
    }


def picture(out: Path, n_intervals: int = 10) -> Path:
    """A small output with every table that figures read; the layer ``a.weight`` hurts."""
    rng = np.random.default_rng(7)
    names = ("intervals", "layers", "units", "groups", "histograms", "parameters", "traces")
    sizes = {"b.weight": 6, "a.weight": 4}
    plan = make_plan(sizes, n_intervals, 5, tables=(*names, "fisher"))
    plan = replace(
        plan,
        unit_layers=("b.weight",),
        splits=tuple(replace(split, groups=(0, 1, 2)) for split in plan.splits),
    )
    drift = {"b.weight": -2e-2, "a.weight": 5e-3}
    lc = {
        (split.name, name): rng.normal(drift[name], 3e-2, (n_intervals, n))
        for split in plan.splits
        for name, n in sizes.items()
    }
    total = np.stack(
        [np.stack([lc[s.name, la].sum(axis=1) for la in sizes], axis=-1) for s in plan.splits]
    )
    change = total.sum(axis=2)
    gap = 0.05 * change * rng.choice([-1, 1], change.shape)
    intervals = interval_columns(plan, change, gap, 1.5 * change)
    loss = 3.0 + np.concatenate([np.zeros((2, 1)), np.cumsum(change - gap, axis=1)], axis=1)
    intervals |= {"loss_start": loss[:, :-1].ravel(), "loss_end": loss[:, 1:].ravel()}
    more = {name: np.abs(total) for name in ("update_norm", "gradient_norm", "lc_error")}
    tables = {
        "intervals": intervals,
        "layers": layer_columns(plan, count_signs(plan, lc), total, **more),
        "units": _unit_columns(plan, lc, 3),
        "groups": _class_columns(plan, total),
        "histograms": histogram_columns(plan, lc),
        "parameters": _sums_of(plan, lc),
        "traces": _all_traced(plan, lc),
        "fisher": _traces_of_fisher(plan),
    }
    return write(out, plan, tables)


def _columns_of(plan: Plan, shape: tuple[int, ...]) -> tuple[dict[str, Any], list[Any]]:
    """Split and start step of an array [S, T, …] as columns, and the other indices."""
    split, step, *rest = (i.ravel() for i in np.indices(shape))
    return {"split": (split, [s.name for s in plan.splits]), "start_step": step}, rest


def _unit_columns(plan: Plan, lc: Mapping[tuple[str, str], Floats], n_units: int) -> dict[str, Any]:
    name = plan.unit_layers[0]
    each = np.stack(
        [lc[s.name, name].reshape(plan.n_intervals, n_units, -1).sum(axis=2) for s in plan.splits]
    )
    columns, (unit,) = _columns_of(plan, each.shape)
    return columns | {"layer": name, "unit": unit, "lc": each.ravel()}


def _class_columns(plan: Plan, total: Floats) -> dict[str, Any]:
    """Three classes of weights ½, ¼, ¼ whose parts add up to `total` [S, T, L]."""
    weight, part = np.array([0.5, 0.25, 0.25]), np.array([1.4, -0.6, 0.2])
    each = total[..., None] * part / weight
    columns, (layer, group) = _columns_of(plan, each.shape)
    names = [la.name for la in plan.layers]
    more = {"layer": (layer, names), "group": group, "lc": each.ravel(), "weight": weight[group]}
    return columns | more


def _sums_of(plan: Plan, lc: Mapping[tuple[str, str], Floats]) -> dict[str, Any]:
    parts = []
    for s, split in enumerate(plan.splits):
        for k, layer in enumerate(plan.layers):
            x = lc[split.name, layer.name]
            n, index = layer.numel, np.arange(layer.numel)
            signs = [(x < 0).sum(axis=0), (x > 0).sum(axis=0), (x == 0).sum(axis=0)]
            flips = (x[1:] * x[:-1] < 0).sum(axis=0)
            parts.append(
                [np.full(n, s), np.full(n, k), index, x.sum(0), np.abs(x).sum(0), *signs, flips]
            )
    split, layer, index, net, gross, helping, hurting, zero, flips = (
        np.concatenate(p) for p in zip(*parts, strict=True)
    )
    return {
        "split": (split, [s.name for s in plan.splits]),
        "layer": (layer, [la.name for la in plan.layers]),
        "index": index,
        "lc": net,
        "abs_lc": gross,
        "n_helping": helping,
        "n_hurting": hurting,
        "n_zero": zero,
        "n_flips": flips,
        "displacement": net,
        "path_length": gross,
        "displacement_flips": flips,
        "gradient_flips": flips,
    }


def _all_traced(plan: Plan, lc: Mapping[tuple[str, str], Floats]) -> dict[str, Any]:
    parts = []
    for s, split in enumerate(plan.splits):
        for k, layer in enumerate(plan.layers):
            x = np.vstack([lc[split.name, layer.name], np.full(layer.numel, np.nan)]).T
            index, step = (i.ravel() for i in np.indices(x.shape))
            parts.append([np.full(x.size, s), np.full(x.size, k), index, step, x.ravel()])
    split, layer, index, step, values = (np.concatenate(p) for p in zip(*parts, strict=True))
    return {
        "split": (split, [s.name for s in plan.splits]),
        "layer": (layer, [la.name for la in plan.layers]),
        "index": index,
        "step": step,
        "weight": np.sin(index + step / 3),
        "gradient": np.cos(index + step),
        "lc": values,
    }


def _traces_of_fisher(plan: Plan) -> dict[str, Any]:
    steps = np.arange(0, plan.n_intervals + 1, 5)
    split, at, layer = (i.ravel() for i in np.indices((2, len(steps), len(plan.layers))))
    true = 1.0 + layer + 0.1 * at + split
    return {
        "split": (split, [s.name for s in plan.splits]),
        "step": steps[at],
        "layer": (layer, [la.name for la in plan.layers]),
        "trace_true": true,
        "trace_true_se": 0.1 * true,
        "trace_empirical": 2.0 * true,
        "trace_empirical_se": 0.2 * true,
        "n_items": np.full(true.size, 8),
        "seed": np.zeros(true.size, np.int64),
    }


if __name__ == "__main__":
    lenet(Path(sys.argv[1]), int(sys.argv[2]))
