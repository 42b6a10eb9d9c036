"""Repeated runs: planted layers that hurt and that differ, and conditions that do not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planting
import pytest
from click.testing import CliRunner
from scipy.signal import lfilter
from scipy.stats import kstest, spearmanr, t, ttest_ind

import lcray
from lcray.analyses.comparison import one_condition, two_conditions
from lcray.analyses.momentum import against_momentum
from lcray.analyses.tidy import notes_of
from lcray.cli.app import app
from lcray.errors import UsageError
from lcray.tasks.layer import Layer

T = 12
DRIFT = {"hurts": 2.0, "same": 0.0, "frozen": 0.0, "first": -3.0}
LAYERS = tuple(Layer(name, "", "parameter", (2,), 0, True) for name in DRIFT)


def world_of(seed: int, shift: float = 0.0, **options: Any) -> planting.World:
    """LC of `first` is higher by `shift` an interval; of `frozen` exactly 0."""
    given = {"spans": (tuple(range(T + 1)),), "window": 6, "tables": ("intervals", "layers")}
    world = planting.make_world(layers=LAYERS, seed=seed, **(given | options))
    random = np.random.default_rng(seed)
    for (split, layer), lc in world.lc.items():
        drift = DRIFT[layer] + (shift if layer == "first" else 0.0)
        noise = random.normal(size=lc.shape)
        world.lc[split, layer] = 1e-3 * (drift + noise) * (layer != "frozen")
    return world


def write(folder: Path, world: planting.World) -> Path:
    return planting.write_reduced(folder, world)


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six runs, and six with another condition."""
    folder = tmp_path_factory.mktemp("runs")
    worlds = [world_of(seed, shift=2.5 * (seed >= 6)) for seed in range(12)]
    return [write(folder / str(seed), world) for seed, world in enumerate(worlds)]


def planted(seed: int, layer: str, steps: slice = slice(None)) -> float:
    world = world_of(seed, shift=2.5 * (seed >= 6))
    names = DRIFT if layer == "" else (layer,)
    return float(sum(world.lc["train", name][steps].sum() for name in names))


def rows_of(table: Any, split: str = "train", window: str = "run") -> dict[Any, dict[str, Any]]:
    kept = [r for r in table.to_pylist() if (r["split"], r["window"]) == (split, window)]
    return {(r["condition"], r["layer"]): r for r in kept}


def sign_flips(x: np.ndarray) -> float:
    means = [np.mean(np.array(s) * x) for s in itertools.product([1, -1], repeat=len(x))]
    return float(np.mean(np.abs(means) >= abs(x.mean()) - 1e-15))


def exchanges(x: np.ndarray, y: np.ndarray) -> float:
    every = np.concatenate([x, y])
    seen = []
    for chosen in itertools.combinations(range(len(every)), len(x)):
        mine = np.zeros(len(every), bool)
        mine[list(chosen)] = True
        seen.append(every[mine].mean() - every[~mine].mean())
    return float(np.mean(np.abs(seen) >= abs(x.mean() - y.mean()) - 1e-15))


def test_one_condition(outs: list[Path]) -> None:
    rows = rows_of(lcray.compare(*outs[:6]))
    assert set(rows) == {("first", name) for name in ("", *DRIFT)}
    for name in ("", *DRIFT):
        row, x = rows["first", name], np.array([planted(seed, name) for seed in range(6)])
        assert row["n"] == 6
        assert row["lc"] == pytest.approx(x.mean(), rel=1e-9, abs=1e-15)
        se = x.std(ddof=1) / np.sqrt(6)
        assert row["lc_se"] == pytest.approx(se, rel=1e-9, abs=1e-15)
        assert row["lc_high"] - row["lc"] == pytest.approx(2.5705818 * se, rel=1e-6, abs=1e-15)
        if name != "frozen":
            p_t = 2 * t.sf(abs(x.mean() / se), 5)
            assert row["p_t"] == pytest.approx(p_t, rel=1e-6)
        assert row["p_permutation"] == pytest.approx(sign_flips(x))
    assert rows["first", "hurts"]["lc_low"] > 0
    assert rows["first", "hurts"]["p_t_adjusted"] < 0.01
    assert rows["first", "hurts"]["p_permutation"] == 2 / 64
    assert rows["first", "same"]["p_t_adjusted"] > 0.05
    frozen = rows["first", "frozen"]
    assert (frozen["lc"], frozen["lc_se"], frozen["p_t"], frozen["p_permutation"]) == (
        0,
        0,
        None,
        1,
    )
    # Benjamini & Hochberg over the layers that have a p-value; the network is no further layer.
    p = sorted(r["p_t"] for (_, name), r in rows.items() if name and r["p_t"] is not None)
    adjusted = sorted(r["p_t_adjusted"] for r in rows.values() if r["p_t_adjusted"] is not None)
    steps = [p[i] * len(p) / (i + 1) for i in range(len(p))]
    assert adjusted == pytest.approx([min(steps[i:]) for i in range(len(p))])
    assert rows["first", ""]["p_t_adjusted"] is None


def test_two_conditions(outs: list[Path]) -> None:
    rows = rows_of(lcray.compare(*outs[:6], against=outs[6:]))
    for name in ("", "hurts", "same", "first"):
        x, y = (np.array([planted(s, name) for s in seeds]) for seeds in (range(6), range(6, 12)))
        assert rows["second", name]["lc"] == pytest.approx(y.mean())
        row = rows["difference", name]
        assert row["lc"] == pytest.approx(x.mean() - y.mean(), rel=1e-9)
        parts = x.var(ddof=1) / 6, y.var(ddof=1) / 6
        freedom = sum(parts) ** 2 / sum(part**2 / 5 for part in parts)  # Welch 1947
        score = row["lc"] / np.sqrt(sum(parts))
        assert row["p_t"] == pytest.approx(2 * t.sf(abs(score), freedom), rel=1e-6)
        assert row["p_permutation"] == pytest.approx(exchanges(x, y))
        assert row["lc_low"] < row["lc"] < row["lc_high"]
    assert rows["difference", "first"]["p_t_adjusted"] < 0.01
    assert rows["difference", "first"]["lc"] < 0
    assert rows["difference", "same"]["p_t_adjusted"] > 0.05
    frozen = rows["difference", "frozen"]
    assert (frozen["lc"], frozen["lc_se"], frozen["p_t"], frozen["p_permutation"]) == (
        0,
        0,
        None,
        1,
    )


def test_pairs(outs: list[Path]) -> None:
    rows = rows_of(lcray.compare(*outs[:6], against=outs[6:], paired=True))
    d = np.array([planted(s, "first") - planted(s + 6, "first") for s in range(6)])
    row = rows["difference", "first"]
    se = d.std(ddof=1) / np.sqrt(6)
    assert row["lc_se"] == pytest.approx(se, rel=1e-9)
    assert row["p_t"] == pytest.approx(2 * t.sf(abs(d.mean() / se), 5), rel=1e-6)
    assert row["p_permutation"] == pytest.approx(sign_flips(d))


def test_intervals_of_a_difference_are_those_of_scipy() -> None:
    """Conditions of unequal size and spread: the degrees of freedom are Welch's."""
    random = np.random.default_rng(0)
    x, y = random.normal(0, 1, 6), random.normal(0, 4, 9)
    found = two_conditions(x, y, level=0.9)
    expected = ttest_ind(x, y, equal_var=False)
    assert found.p_t == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))


def test_there_is_no_p_value_from_fewer_than_six(outs: list[Path]) -> None:
    for table in (lcray.compare(*outs[:5]), lcray.compare(*outs[:6], against=outs[6:11])):
        for row in rows_of(table).values():
            few = row["n"] < 6
            assert (row["p_permutation"] is None) == few
            assert row["p_t"] is None or not few
            assert row["lc_se"] is not None
    for row in rows_of(lcray.compare(outs[0], against=outs[6:8])).values():
        if row["condition"] != "second":
            assert row["n"] == 1
            assert {row[k] for k in ("lc_se", "lc_low", "p_t", "p_permutation")} == {None}


def test_windows(outs: list[Path]) -> None:
    table = lcray.compare(*outs[:2], window=6)
    assert {r["window"] for r in table.to_pylist()} == {"run", "0:6", "6:12"}
    expected = np.mean([planted(seed, "first", slice(6, 12)) for seed in (0, 1)])
    assert rows_of(table, window="6:12")["first", "first"]["lc"] == pytest.approx(expected)


def test_p_values_are_uniform_under_the_null() -> None:
    random = np.random.default_rng(0)
    found = {"one": [], "two": [], "flips": []}
    for _ in range(120):
        x, y = random.normal(size=7), random.normal(size=6)
        one, two = one_condition(x), two_conditions(x, y)
        found["one"].append(one.p_t)
        found["two"].append(two.p_t)
        found["flips"].append(one.p_permutation - random.random() / 64)  # 2/128 a step
    for name, values in found.items():
        assert kstest(values, "uniform").pvalue > 0.05, name


def test_two_analyses_of_one_run_are_no_two_runs(outs: list[Path], tmp_path: Path) -> None:
    """Their LC differs by rounding, as with batches of another size."""
    again = world_of(1)
    for key, lc in again.lc.items():
        again.lc[key] = lc * (1 + 1e-7)
    other = write(tmp_path / "again", again)
    for first, second in (((*outs[:2], other), ()), (outs[:2], (outs[7], other))):
        with pytest.raises(UsageError, match=r"again: analyzes the same run as .*/1, by the LC"):
            lcray.compare(*first, against=second)


def test_what_cannot_be_compared(outs: list[Path], tmp_path: Path) -> None:
    other = world_of(0)
    other.plan = replace(other.plan, splits=other.plan.splits[:1])
    for name, world, words in (
        ("splits", other, "other splits"),
        ("layers", planting.make_world(tables=("intervals", "layers")), "other layers"),
        ("steps", world_of(0, spans=(tuple(range(5)),)), "other steps"),
    ):
        with pytest.raises(UsageError, match=words):
            lcray.compare(outs[0], write(tmp_path / name, world))
    with pytest.raises(UsageError, match="is given twice"):
        lcray.compare(outs[0], against=[outs[0]])
    with pytest.raises(UsageError, match="2 outputs against 1"):
        lcray.compare(*outs[:2], against=outs[2:3], paired=True)
    with pytest.raises(UsageError, match="give the outputs"):
        lcray.compare()
    with pytest.raises(UsageError, match="adjust 'holm': must be one of bh, by"):
        lcray.compare(outs[0], adjust="holm")
    with pytest.raises(UsageError, match="level 1: must be between 0 and 1"):
        lcray.compare(outs[0], level=1.0)


def test_the_command(outs: list[Path]) -> None:
    names = [str(out) for out in outs]
    more = [word for out in names[6:] for word in ("--against", out)]
    done = CliRunner().invoke(app, ["compare", *names[:6], *more, "--json"])
    assert done.exit_code == 0, done.output
    table = lcray.compare(*outs[:6], against=outs[6:])
    assert json.loads(done.output) == table.to_pylist()
    listed = CliRunner().invoke(app, ["compare", *names[:6], "--against", *names[6:], "--json"])
    assert listed.output == done.output
    listed = CliRunner().invoke(
        app, ["compare", "--json", *names[:6], f"--against={names[6]}", *names[7:]]
    )
    assert listed.output == done.output
    first = CliRunner().invoke(app, ["compare", "--json", "--against", *names[6:]])
    assert (first.exit_code, "Missing argument 'OUT...'" in first.output) == (2, True)
    shown = CliRunner().invoke(app, ["compare", *names[:6]]).output
    assert "hurts" in shown and "p_permutation_adjusted" in shown


def test_intervals_without_lc_count_0_and_are_named(outs: list[Path], tmp_path: Path) -> None:
    world = world_of(6)
    world.status["train", 3] = "nonfinite_loss"
    out = write(tmp_path / "gap", world)
    table = lcray.compare(*outs[:6], out)
    expected = [planted(seed, "first") for seed in range(6)]
    known = np.delete(world.lc["train", "first"], 3, axis=0)
    row = rows_of(table)["first", "first"]
    assert row["lc"] == pytest.approx(np.mean([*expected, known.sum()]), rel=1e-6)
    note = f"{out}: train: 1 intervals have no LC and count as 0"
    assert notes_of(table) == [note]
    assert note in CliRunner().invoke(app, ["compare", *map(str, [*outs[:6], out])]).output
    assert notes_of(lcray.compare(*outs[:6])) == []
    few = "no p-values where a condition has fewer than 6 runs"
    assert notes_of(lcray.compare(*outs[:5])) == [few]


def moving(seed: int, momentum: float) -> planting.World:
    """A run whose `first` layer has this momentum; its LC is that, in thousandths an interval."""
    world = world_of(seed, spans=(tuple(range(161)),), tables=("intervals", "layers", "traces"))
    random = np.random.default_rng(seed)
    force = lfilter([1.0], [1.0, -0.9], random.normal(size=(161, 2)), axis=0)
    move = lfilter([1.0], [1.0, -momentum], force, axis=0)[:160]
    world.weight["first"] = np.cumsum(np.vstack([np.ones((1, 2)), move]), axis=0)
    for split in ("val", "train"):
        world.gradient[split, "first"] = -force
        world.lc[split, "first"] = np.full((160, 2), momentum / 2e3)
        world.lc[split, "first"][0, 0] += seed * 1e-6
    return world


def test_lc_and_lag_against_momentum(tmp_path: Path) -> None:
    given = [(0.9, 1), (0.0, 2), (0.9, 3), (0.5, 4)]
    outs = [(m, write(tmp_path / str(seed), moving(seed, m))) for m, seed in given]
    table = against_momentum(outs, layers="first")
    rows = [r for r in table.to_pylist() if r["split"] == "train"]
    assert [(r["layer"], r["momentum"], r["n"]) for r in rows] == [
        ("first", 0.0, 1), ("first", 0.5, 1), ("first", 0.9, 2),
    ]  # fmt: skip
    sums = [0.0 + 2e-6, 0.5 * 0.16 + 4e-6, 0.9 * 0.16 + 2e-6]
    assert [r["lc"] for r in rows] == pytest.approx(sums, rel=1e-9)
    assert [r["errors"] for r in rows] == ["bound", "bound", "runs"]
    for row, bound in zip(rows[:2], (160e-9, 160e-9), strict=True):  # lc_error is 1e-9, planted
        assert row["lc_se"] is None
        ends = (row["lc"] - bound, row["lc"] + bound)
        assert (row["lc_low"], row["lc_high"]) == pytest.approx(ends, rel=1e-9)
    assert rows[2]["lc_se"] == pytest.approx(1e-6, rel=1e-6)  # of ±1e-6 over two runs
    assert rows[0]["lag"] == 0 < rows[2]["lag"]
    assert all(r["lag_low"] <= r["lag"] <= r["lag_high"] for r in rows)
    rank = spearmanr([0.0, 0.5, 0.9, 0.9], [2e-6, 0.080004, 0.144001, 0.144003]).statistic
    assert f"momentum {rank:+.2f} (n = 4)" in notes_of(table)[1]
    every = against_momentum(outs[:1]).to_pylist()
    assert {r["layer"] for r in every} == set(DRIFT)  # one module owns them all
    with pytest.raises(UsageError, match="unknown layer 'fc'"):
        against_momentum(outs, layers="fc")
    with pytest.raises(UsageError, match="give outputs"):
        against_momentum([])
