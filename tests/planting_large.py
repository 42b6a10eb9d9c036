"""Outputs as large as those of real networks, in seconds; ``python planting_large.py OUT T``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from planting import (
    BY_TIME,
    Columns,
    Floats,
    cells,
    interval_columns,
    layer_columns,
    make_plan,
    write_tables,
)

from lcray.planning.plan import Plan, SplitPlan
from lcray.statistics.histograms import bin_edges
from lcray.tasks.layer import Layer

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

    With `units`, so many per layer, and Weibull fits.
    """
    rng = np.random.default_rng(seed)
    names = ("intervals", "layers", "histograms", "parameters", "traces", "groups")
    plan = make_plan(sizes, n_intervals, max(1, n_intervals // 10), tables=names)
    splits = tuple(replace(split, groups=tuple(range(10))) for split in plan.splits)
    plan = replace(plan, splits=splits, trace_sample=16 if units else plan.trace_sample)
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
        "histograms": _histograms(plan, rng),
        "parameters": _parameters(plan, rng),
        "traces": _traces(plan, rng),
        "groups": _groups(plan, rng),
    }
    if units:
        tables |= {"units": _units(plan, lc, units), "fits": _fits(plan)}
    return write_tables(out, plan, tables)


def _weibull(plan: Plan, layer: Layer) -> tuple[float, float]:
    """Shape and scale of the magnitudes in a layer."""
    return 0.5 + 0.02 * plan.layers.index(layer), 1e-8


def _histograms(plan: Plan, rng: np.random.Generator) -> Columns:
    bins = np.arange(-320, -40)
    lower, upper = bin_edges(bins)
    edges = np.append(lower, upper[-1])
    windows = np.arange(0, plan.n_intervals, plan.window)

    def of(_: SplitPlan, layer: Layer) -> Columns:
        k, scale = _weibull(plan, layer)
        mass = np.diff(-np.exp(-((edges / scale) ** k)))
        draws = layer.numel * plan.window // 2
        count = rng.multinomial(draws, mass / mass.sum(), (len(windows), 2))
        window, sign, which = np.nonzero(count)
        counts = count[window, sign, which]
        return {
            "window": windows[window],
            "sign": 2 * sign - 1,
            "bin": bins[which],
            "lower": lower[which],
            "upper": upper[which],
            "count": counts,
            "sum": lower[which] * counts,
        }

    return cells(plan, of, order=("split", "window"))


def _parameters(plan: Plan, rng: np.random.Generator) -> Columns:
    def of(_: SplitPlan, layer: Layer) -> Columns:
        n, T = layer.numel, plan.n_intervals
        helping, flips = rng.binomial(T, 0.51, n), rng.binomial(T - 1, 0.4, n)
        normal = rng.normal(size=n)
        flipped = {f"{name}_flips": flips for name in ("n", "displacement", "gradient")}
        counts = {"n_helping": helping, "n_hurting": T - helping, "n_zero": 0}
        sums = {"lc": 1e-6 * normal, "abs_lc": 1e-5 * np.abs(normal)}
        moved = {"displacement": normal, "path_length": 10 * np.abs(normal)}
        return {"index": np.arange(n), **counts, **sums, **moved, **flipped}

    return cells(plan, of)


def _traces(plan: Plan, rng: np.random.Generator) -> Columns:
    step = np.arange(plan.n_intervals + 1)

    def of(_: SplitPlan, layer: Layer) -> Columns:
        index = np.arange(min(plan.trace_sample, layer.numel))[:, None]
        noise = rng.normal(size=(len(index), len(step)))
        lc = np.where(step < plan.n_intervals, 1e-7 * noise, np.nan)
        weight = np.cumsum(1e-3 * noise, axis=1)
        return {
            "index": index,
            "step": step,
            "weight": weight,
            "gradient": 1e-3 * noise[:, ::-1],
            "lc": lc,
        }

    return cells(plan, of)


def _groups(plan: Plan, rng: np.random.Generator) -> Columns:
    def of(split: SplitPlan, _: Layer) -> Columns:
        lc = rng.normal(-1e-3, 3e-3, (plan.n_intervals, len(split.groups)))
        start = np.arange(plan.n_intervals)[:, None]
        return {"start_step": start, "group": split.groups, "lc": lc, "weight": 0.1}

    return cells(plan, of, order=BY_TIME)


def _units(plan: Plan, lc: Floats, units: int) -> Columns:
    """Units that share their layer's LC evenly."""

    def of(split: SplitPlan, layer: Layer) -> Columns:
        of_layer = lc[plan.splits.index(split), :, plan.layers.index(layer), None]
        start = np.arange(plan.n_intervals)[:, None]
        return {"start_step": start, "unit": np.arange(units), "lc": of_layer / units}

    return cells(plan, of, order=BY_TIME)


def _fits(plan: Plan) -> Columns:
    """The Weibull distributions that the histograms are drawn from, over the run."""

    def of(_: SplitPlan, layer: Layer) -> Columns:
        sign, which = np.array([-1, -1, 1, 1]), np.array([0, 1, 0, 1])
        value = np.array(_weibull(plan, layer))[which]
        return {"window": -1, "sign": sign, "parameter": which, "value": value, "se": 1e-3}

    columns = cells(plan, of)
    return columns | {
        "distribution": "weibull",
        "parameter": (columns["parameter"], ["k", "lambda"]),
    }


if __name__ == "__main__":
    lenet(Path(sys.argv[1]), int(sys.argv[2]))
