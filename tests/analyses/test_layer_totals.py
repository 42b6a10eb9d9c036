"""Totals of layers and their trajectories: one that hurts, one that does neither."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import planting
import pytest
from scipy.stats import spearmanr

import lcray
from lcray.analyses.layer_totals import layer_totals
from lcray.analyses.tidy import notes_of
from lcray.analyses.trajectories import trajectories
from lcray.errors import UsageError
from lcray.tables.reading.results import Results
from lcray.tasks.layer import Layer

T = 60
LAYERS = (
    Layer("helps", "", "parameter", (3,), 0, True),
    Layer("hurts", "", "parameter", (2,), 0, True),
    Layer("mean", "", "buffer", (2,), 0, False),
    Layer("neither", "", "parameter", (5,), 0, True),
    Layer("frozen", "", "parameter", (4,), 0, False),
    Layer("more", "", "parameter", (6,), 0, True),
)
DRIFT = {"helps": -1.0, "hurts": 0.5, "mean": -0.1, "neither": 0.0, "frozen": 0.0, "more": -0.2}


def make_world() -> planting.World:
    world = planting.make_world(
        spans=(tuple(range(31)), tuple(range(30, T + 1))),
        window=20,
        layers=LAYERS,
        tables=("intervals", "layers"),
        bad={("val", 7): "nonfinite_loss"},
    )
    random = np.random.default_rng(1)
    for (split, layer), lc in world.lc.items():
        noise = random.normal(size=lc.shape)
        if layer == "neither":  # sums to 0 exactly, whatever the noise
            noise -= noise.mean()
        planted = 0.0 * lc if layer == "frozen" else DRIFT[layer] + noise
        world.lc[split, layer] = planted * 1e-3
    return replace(world)


WORLD = make_world()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return lcray.open(planting.write_reduced(tmp_path_factory.mktemp("totals") / "out", WORLD))


def planted(split: str, layer: str) -> np.ndarray:
    names = [la.name for la in LAYERS] if layer == "" else [layer]
    total = sum(WORLD.lc[split, name].sum(axis=1) for name in names)
    if split == "val":
        total[7] = 0.0
    return np.asarray(total)


def test_totals(results: Results) -> None:
    table = layer_totals(results)
    rows = table.to_pylist()
    assert len(rows) == 2 * 4 * 7
    windows = {"run": slice(0, T), "0:20": slice(0, 20), "20:40": slice(20, 40)}
    for row in rows:
        if row["window"] not in windows:
            continue
        lc = planted(row["split"], row["layer"])[windows[row["window"]]]
        assert row["lc"] == pytest.approx(lc.sum(), rel=1e-9, abs=1e-15)
        n_ok = len(lc) - (row["split"] == "val" and row["window"] in ("run", "0:20"))
        assert row["n_intervals"] == n_ok
        assert row["share_hurting"] == pytest.approx((lc > 0).sum() / n_ok)
    run = {r["layer"]: r for r in rows if (r["split"], r["window"]) == ("train", "run")}
    assert run["frozen"]["resampled_se"] == 0.0
    assert run[""]["numel"] == 22
    assert sum(run[la.name]["share"] for la in LAYERS) == pytest.approx(1.0)
    # Independent noise of 1e-3 an element and interval: √(T n) of it.
    assert run["helps"]["resampled_se"] == pytest.approx(1e-3 * math.sqrt(T * 3), rel=0.3)
    parameters = [la for la in LAYERS if la.kind == "parameter"]
    rank = spearmanr(
        [la.numel for la in parameters], [planted("train", la.name).sum() for la in parameters]
    )
    size = f"size {rank.statistic:+.2f} (p = {rank.pvalue:.2g}, 5 layers)"
    assert f"train: rank correlation of LC with a layer's {size}" in notes_of(table)


def output(path: Path, lc: np.ndarray, error: np.ndarray | None, **settings: object) -> Results:
    """Layers a, b and so on with LC and lc_error [T, L]."""
    sizes = {chr(97 + i): 4 for i in range(lc.shape[1])}
    plan = planting.make_plan(sizes, len(lc), 10, ("train",), ("layers",))
    plan = replace(plan, settings=replace(plan.settings, **settings))
    more = {} if error is None else {"lc_error": error[None]}
    counts = np.zeros((1, *lc.shape, 3), np.int64)
    columns = planting.layer_columns(plan, counts, lc[None], **more)
    return lcray.open(planting.write_tables(path, plan, {"layers": columns}))


def run_rows(results: Results) -> dict[str, dict]:
    rows = layer_totals(results).to_pylist()
    return {row["layer"]: row for row in rows if row["window"] == "run"}


def test_a_verdict_needs_more_than_the_bound(tmp_path: Path) -> None:
    """Whatever intervals do, a total is as exact as its terms: lc_error adds up, and decides."""
    swing = np.array([3.0, -2.75] * 10)  # Σ = 2.5; resampling spreads it far over 0
    lc = np.stack([swing, -swing, swing, -swing, 0 * swing], axis=1)
    error = np.tile([0.12, 0.12, 0.13, 0.13, 0.0], (20, 1))  # Σ = 2.4 and 2.6
    rows = run_rows(output(tmp_path / "out", lc, error))
    assert [rows[name]["lc"] for name in "abcde"] == [2.5, -2.5, 2.5, -2.5, 0.0]
    bounds = [rows[name]["lc_bound"] for name in "abcde"]
    assert bounds == pytest.approx([2.4, 2.4, 2.6, 2.6, 0.0], rel=1e-12)
    assert rows[""]["lc_bound"] == pytest.approx(2 * (2.4 + 2.6), rel=1e-12)
    assert [rows[name]["hurts"] for name in ("", *"abcde")] == [0, 1, -1, 0, 0, 0]
    for name in "abcd":  # the question of other stretches has an answer of its own
        assert rows[name]["resampled_low"] < rows[name]["lc"] < rows[name]["resampled_high"]


def test_a_window_has_the_bound_of_its_intervals(tmp_path: Path) -> None:
    error = np.arange(20.0)[:, None]
    rows = layer_totals(output(tmp_path / "out", -1.0 + 0 * error, error)).to_pylist()
    found = {r["window"]: (r["lc_bound"], r["hurts"]) for r in rows if r["layer"] == "a"}
    assert found == {"run": (190.0, 0), "0:10": (45.0, 0), "10:20": (145.0, 0)}


def test_without_an_embedded_rule_there_is_no_verdict_and_a_note(tmp_path: Path) -> None:
    results = output(tmp_path / "out", np.full((20, 2), -1.0), None, rule="midpoint")
    table = layer_totals(results)
    assert {(row["lc_bound"], row["hurts"]) for row in table.to_pylist()} == {(None, 0)}
    assert "no lc_error (rule midpoint)" in notes_of(table)[0]


def test_a_sample_of_the_data_is_named(tmp_path: Path) -> None:
    results = output(tmp_path / "out", np.full((20, 1), -1.0), np.zeros((20, 1)))
    assert notes_of(layer_totals(results)) == []
    drawn = replace(results.plan.splits[0], drawn_from=80, replicate_weights=(4.0, 4.0))
    plan = replace(results.plan, splits=(drawn,))
    results = replace(results, record=replace(results.record, plan=plan))
    (note,) = notes_of(layer_totals(results))
    assert "train: 8 of 80 samples" in note and "confidence()" in note


def test_trajectories_add_up(results: Results) -> None:
    rows = trajectories(results).to_pylist()
    assert len(rows) == 2 * 7 * T
    for split in ("val", "train"):
        for layer in ("", *(la.name for la in LAYERS)):
            mine = [r for r in rows if (r["split"], r["layer"]) == (split, layer)]
            assert [r["step"] for r in mine] == list(range(1, T + 1))
            expected = np.cumsum(planted(split, layer))
            assert [r["lc"] for r in mine] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    few = [r for r in trajectories(results, points=4).to_pylist() if r["layer"] == ""]
    assert [r["step"] for r in few if r["split"] == "val"] == [1, 21, 40, 60]
    last = [r for r in trajectories(results, points=1).to_pylist() if r["layer"] == ""]
    assert [r["step"] for r in last] == [60, 60]
    with pytest.raises(UsageError, match="points 0: must be at least 1"):
        trajectories(results, points=0)


def test_few_intervals_are_not_resampled(tmp_path: Path) -> None:
    out = planting.write_reduced(tmp_path, planting.make_world(tables=("intervals", "layers")))
    rows = layer_totals(lcray.open(out)).to_pylist()
    assert {(row["resampled_se"], row["resampled_low"]) for row in rows} == {(None, None)}
    assert all(row["lc_bound"] is not None for row in rows)  # needs no number of intervals
