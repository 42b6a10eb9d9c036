"""Oscillation, run lengths, extremes: planted numbers, and plain loops over them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planting
import planting_large
import pytest
from twin import sign

import lcray
from lcray.analyses.extremes import extremes
from lcray.analyses.oscillation import oscillation
from lcray.analyses.run_length import run_lengths
from lcray.analyses.trace_arrays import sampled_layers
from lcray.errors import UsageError
from lcray.tables.reading.results import Results

STEPS = tuple(range(0, 25, 2))  # twelve intervals
BAD = ("val", 10)


def make_world() -> planting.World:
    """Twelve intervals; in `a.bias` LC changes its sign every third interval."""
    world = planting.make_world(spans=(STEPS[:5], STEPS[4:]), window=8, bad={BAD: "nonfinite_loss"})
    for (split, layer), lc in world.lc.items():
        if layer == "a.bias":
            signs = np.where(np.arange(12) // 3 % 2 == 0, -1.0, 1.0)[:, None]
            world.lc[split, layer] = signs * (1e-3 + np.abs(lc))
    # the sample that the seed chooses is that of the factory: first and last element
    return replace(world, plan=replace(world.plan, trace_sample=2))


WORLD = make_world()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("oscillation") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcray.analyses.trace_arrays.trace_indices", ends)
        planting.write_reduced(out, WORLD)
        yield lcray.open(out)


def ends(plan: Any, *, sample_only: bool) -> dict[int, np.ndarray]:
    assert sample_only
    return {
        number: np.array(sorted({0, layer.numel - 1}))
        for number, layer in enumerate(plan.layers)
        if layer.kind == "parameter"
    }


def values(quantity: str, split: str, layer: str) -> np.ndarray:
    """[T, n], NaN where the interval is not ok."""
    planted = {
        "lc": WORLD.lc[split, layer],
        "displacement": WORLD.move[layer],
        "gradient": WORLD.gradient[split, layer][:-1],
    }[quantity].copy()
    for t in range(12):
        if not WORLD.ok(split, t) and quantity != "gradient":
            planted[t] = np.nan
    return planted


def count(planted: np.ndarray, inside: range) -> tuple[int, int]:
    """Flips, and pairs that could, at the intervals `inside`."""
    seen = possible = 0
    for column in planted.T:
        for t in inside:
            if t > 0:
                product = sign(column[t]) * sign(column[t - 1])
                seen, possible = seen + (product == -1), possible + (product != 0)
    return seen, possible


def rows_of(results: Results, source: str) -> list[dict[str, Any]]:
    return [r for r in oscillation(results).to_pylist() if r["source"] == source]


WINDOWS = {"run": range(12), "0:8": range(4), "8:16": range(4, 8), "16:24": range(8, 12)}


def test_the_sample(results: Results) -> None:
    rows = rows_of(results, "traces")
    assert len(rows) == 2 * 3 * 4 * 3
    for row in rows:
        planted = values(row["quantity"], row["split"], row["layer"])
        planted = planted[:, sorted({0, planted.shape[1] - 1})]
        inside = WINDOWS[row["window"]]
        assert (row["n_flips"], row["n_pairs"]) == count(planted, inside)
        assert row["n_elements"] == planted.shape[1]
        part = np.nan_to_num(planted[list(inside)])
        gross = np.abs(part).sum()
        assert row["net"] == pytest.approx(np.abs(part.sum(axis=0)).sum() / gross, rel=1e-9)
        if row["n_flips"]:
            assert row["half_period"] == pytest.approx(row["n_pairs"] / row["n_flips"])


def test_all_elements_over_the_run(results: Results) -> None:
    rows = rows_of(results, "parameters")
    assert len(rows) == 2 * 3 * 3
    for row in rows:
        planted = values(row["quantity"], row["split"], row["layer"])
        assert row["n_flips"] == count(planted, range(12))[0] or row["quantity"] == "gradient"
        assert row["window"] == "run"
        if row["quantity"] == "displacement":
            n_ok = 10 if row["split"] == "val" else 12
            moving = int((np.nan_to_num(planted) != 0).any(axis=0).sum())
            assert row["n_pairs"] == moving * (9 if n_ok == 10 else 11)
        if row["quantity"] != "gradient":
            part = np.nan_to_num(planted)
            net = np.abs(part.sum(axis=0)).sum() / np.abs(part).sum()
            assert row["net"] == pytest.approx(net)
        else:
            assert row["net"] is None


def test_all_elements_in_windows(results: Results) -> None:
    rows = rows_of(results, "layers")
    assert len(rows) == 2 * 4 * 4
    totals: dict[Any, int] = {}
    for row in rows:
        key = row["split"], row["window"]
        if row["layer"] == "":
            totals[key] = row["n_flips"]
            continue
        planted = values("lc", row["split"], row["layer"])
        assert row["n_flips"] == count(planted, WINDOWS[row["window"]])[0]
        totals[key] -= row["n_flips"]
        if row["flip_rate_low"] is not None:
            assert row["flip_rate_low"] <= row["flip_rate"] <= row["flip_rate_high"]
        if row["window"] != "run":
            assert row["flip_rate_low"] is None  # too few intervals
        elif row["layer"] == "b.weight":
            assert row["flip_rate_low"] < row["flip_rate_high"]
    assert set(totals.values()) == {0}


def test_the_planted_half_period(results: Results) -> None:
    rows = [
        r for r in rows_of(results, "layers") if (r["split"], r["layer"]) == ("train", "a.bias")
    ]
    run = rows[0]
    assert (run["n_flips"], run["n_pairs"]) == (3 * 5, 11 * 5)
    assert run["half_period"] == pytest.approx(11 / 3)
    lengths = [
        (r["length"], r["n_complete"], r["n_cut"])
        for r in run_lengths(results).to_pylist()
        if (r["split"], r["layer"], r["quantity"]) == ("train", "a.bias", "lc")
    ]
    assert lengths == [(3, 2 * 2, 2 * 2)]  # of two elements: the inner two runs, and the outer two


def test_run_lengths_cover_every_sign(results: Results) -> None:
    total = {}
    for row in run_lengths(results).to_pylist():
        key = row["split"], row["layer"], row["quantity"]
        total[key] = total.get(key, 0) + row["length"] * (row["n_complete"] + row["n_cut"])
    for sample in sampled_layers(results):
        for quantity, found in sample.quantities().items():
            signs = np.count_nonzero(np.nan_to_num(found))
            assert total.get((sample.split, sample.layer, quantity), 0) == signs


def test_the_parameters_that_help_and_hurt_most(results: Results) -> None:
    rows = extremes(results, top=4).to_pylist()
    expected = []
    for split in ("val", "train"):
        sums = [
            (float(np.nansum(values("lc", split, layer.name)[:, i])), k, layer.name, i)
            for k, layer in enumerate(WORLD.plan.layers)
            if layer.kind == "parameter"
            for i in range(layer.numel)
        ]
        for direction, key in (("helps", 1), ("hurts", -1)):
            chosen = sorted((key * lc, k, name, i) for lc, k, name, i in sums if key * lc < 0)[:4]
            expected += [
                (split, direction, rank, name, i) for rank, (_, _, name, i) in enumerate(chosen, 1)
            ]
    names = ("split", "direction", "rank", "layer", "index")
    assert [tuple(row[name] for name in names) for row in rows] == expected
    for a, b in itertools.pairwise(rows):
        if a["direction"] == b["direction"] and a["split"] == b["split"]:
            assert abs(a["lc"]) >= abs(b["lc"])
    with pytest.raises(UsageError, match="top 0: must be at least 1"):
        extremes(results, top=0)


def test_a_large_layer_gives_the_same_bits_every_time(tmp_path: Path) -> None:
    """Its rows are read by several threads, which end in any order."""
    sizes = {"wide.weight": 5 << 18, "small.bias": 3}
    found = lcray.open(planting_large.lenet(tmp_path / "out", 4, sizes=sizes))
    nets = {tuple(oscillation(found)["net"].to_pylist()) for _ in range(12)}
    assert len(nets) == 1


def test_without_parameters_and_traces(tmp_path: Path) -> None:
    out = planting.write_reduced(tmp_path, planting.make_world(tables=("intervals", "layers")))
    rows = oscillation(lcray.open(out)).to_pylist()
    assert {row["source"] for row in rows} == {"layers"}


def test_pairs_are_of_the_smaller_of_two_neighbours(tmp_path: Path) -> None:
    """Of four elements, all alive at first, one later: only one could flip from then on."""
    lc = np.array([[1.0, 1, 1, 1], [-1, -1, -1, -1], [1, 0, 0, 0], [-1, 0, 0, 0], [1, 1, 0, 0]])
    out = planting.from_elements(tmp_path / "out", {("train", "a.weight"): lc}, window=5)
    rows = oscillation(lcray.open(out)).to_pylist()
    (row,) = (r for r in rows if r["layer"] == "a.weight" and r["window"] == "run")
    assert row["n_pairs"] == 4 + 1 + 1 + 1
