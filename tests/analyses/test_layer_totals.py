"""Totals of layers and their trajectories: one that hurts, one that does neither."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import output_factory as factory
import pytest
from scipy.stats import spearmanr

import lcray
from lcray.analyses.layer_totals import layer_totals
from lcray.analyses.tidy import notes_of
from lcray.analyses.trajectories import trajectories
from lcray.errors import UsageError
from lcray.layers import Layer
from lcray.reduction import reduce
from lcray.results import Results

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


def make_world() -> factory.World:
    world = factory.make_world(
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
    out = factory.write_output(tmp_path_factory.mktemp("totals") / "out", WORLD)
    reduce(out)
    return lcray.open(out)


def planted(split: str, layer: str) -> np.ndarray:
    names = [la.name for la in LAYERS] if layer == "" else [layer]
    total = sum(WORLD.lc[split, name].sum(axis=1) for name in names)
    if split == "val":
        total[7] = 0.0
    return np.asarray(total)


def test_totals_and_verdicts(results: Results) -> None:
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
    verdicts = {"helps": -1, "hurts": 1, "neither": 0, "frozen": 0, "more": -1}
    assert {name: run[name]["hurts"] for name in verdicts} == verdicts
    assert run["frozen"]["lc_se"] == 0.0
    assert run[""]["numel"] == 22
    assert sum(run[la.name]["share"] for la in LAYERS) == pytest.approx(1.0)
    # Independent noise of 1e-3 an element and interval: √(T n) of it.
    assert run["helps"]["lc_se"] == pytest.approx(1e-3 * math.sqrt(T * 3), rel=0.3)
    parameters = [la for la in LAYERS if la.kind == "parameter"]
    rank = spearmanr(
        [la.numel for la in parameters], [planted("train", la.name).sum() for la in parameters]
    )
    assert f"size {rank.statistic:+.2f} (p = {rank.pvalue:.2g}, 5 layers)" in notes_of(table)[1]


def test_the_error_bars_cover_as_often_as_they_say() -> None:
    """Of layers that do nothing, 5 % come out as helping or hurting, or not many more."""
    from lcray.analyses.blocks import Bootstrap
    from lcray.analyses.layer_totals import _errors

    lc = np.random.default_rng(0).normal(size=(300, 400))
    found = _errors(lc, Bootstrap(length=1, replicates=400))
    assert 0.02 < np.mean(np.abs(found["hurts"])) < 0.09


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


def test_few_intervals_have_no_error(tmp_path: Path) -> None:
    out = factory.write_output(tmp_path, factory.make_world(tables=("intervals", "layers")))
    reduce(out)
    rows = layer_totals(lcray.open(out)).to_pylist()
    assert {(row["lc_se"], row["hurts"]) for row in rows} == {(None, 0)}
