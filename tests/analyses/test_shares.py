from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import planting
import pytest

import lcray
from lcray.analyses.habits import habits
from lcray.analyses.shares import shares


def output(path: Path, counts: np.ndarray, window: int) -> lcray.Results:
    """Layers a, b with these counts [T, 2, 3], one split."""
    sizes = {name: int(counts[0, i].sum()) for i, name in enumerate("ab")}
    plan = planting.make_plan(sizes, len(counts), window, ("train",), ("layers",))
    lc = np.zeros((1, len(counts), 2))
    columns = planting.layer_columns(plan, counts[None], lc)
    return lcray.open(planting.write_tables(path, plan, {"layers": columns}))


def planted() -> np.ndarray:
    """a: 6 of 10 help at even, 2 at odd steps, 2 zeros; b: 1 of 4 helps, none zero."""
    even, odd = [[6, 2, 2], [1, 3, 0]], [[2, 6, 2], [1, 3, 0]]
    return np.array([even, odd] * 20)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    results = output(tmp_path_factory.mktemp("shares") / "out", planted(), 10)
    return shares(results, windows={"even": "4:5", "half": ":20"}).to_pandas()


def pick(found: pd.DataFrame, window: str, layer: str, resolution: str) -> pd.Series:
    rows = found[
        (found["window"] == window)
        & (found["layer"] == layer)
        & (found["resolution"] == resolution)
    ]
    assert len(rows) == 1
    return rows.iloc[0]


def test_shares_of_an_interval(found: pd.DataFrame) -> None:
    row = pick(found, "4:5", "a", "interval")
    assert (row["helping"], row["hurting"], row["zero"]) == (0.6, 0.2, 0.2)
    assert row["helping_of_nonzero"] == 0.75
    assert np.isnan(row["helping_se"])
    both = pick(found, "5:6", "", "interval")
    assert (both["n_helping"], both["n_hurting"], both["n_zero"]) == (3, 9, 2)
    assert both["helping"] == 3 / 14 and both["helping_of_nonzero"] == 3 / 12


def test_shares_of_windows_and_the_run(found: pd.DataFrame) -> None:
    run = pick(found, "run", "a", "run")
    assert run["n_intervals"] == 40
    assert run["helping"] == 0.4 and run["helping_of_nonzero"] == 0.5
    assert pick(found, "even", "a", "window")["helping"] == 0.6
    assert pick(found, "half", "", "window")["helping"] == 5 / 14
    assert len(found) == 3 * (3 + 40)


def test_errors_of_shares(found: pd.DataFrame) -> None:
    """B never varies; a alternates, which blocks of even length cancel and odd ones almost."""
    assert pick(found, "run", "b", "run")["helping_se"] == 0
    run = pick(found, "run", "a", "run")
    assert 0 <= run["helping_se"] < 0.2 / np.sqrt(40)  # less than for independent iterations
    assert run["helping_low"] <= run["helping"] <= run["helping_high"]
    assert np.isnan(pick(found, "even", "a", "window")["helping_se"])  # of one interval


def test_intervals_that_are_not_ok_count_nothing(tmp_path: Path) -> None:
    counts = planted()
    plan = planting.make_plan({"a": 10, "b": 4}, 40, 10, ("train",), ("layers",))
    lc = np.zeros((1, 40, 2))
    lc[0, 3] = np.nan
    counts[3] = 0
    columns = planting.layer_columns(plan, counts[None], lc)
    found = shares(lcray.open(planting.write_tables(tmp_path / "out", plan, {"layers": columns})))
    frame = found.to_pandas()
    assert pick(frame, "run", "a", "run")["n_intervals"] == 39
    assert "3:4" not in set(frame["window"])


def test_the_error_of_a_share_is_that_of_dependent_iterations(tmp_path: Path) -> None:
    """Shares that follow an AR(1): the error of their mean is known, 2.4 times the naive one."""
    n, rho, errors = 300, 0.7, []
    lags = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    truth = 0.04 * np.sqrt((rho**lags).sum() / (1 - rho**2)) / n
    for trial in range(16):
        noise = np.random.default_rng(trial).normal(size=n)
        p = np.empty(n)
        p[0] = noise[0] / np.sqrt(1 - rho**2)
        for t in range(1, n):
            p[t] = rho * p[t - 1] + noise[t]
        helping = np.clip(np.round(500 + 40 * p), 0, 1000).astype(int)
        both = np.stack([helping, 1000 - helping, np.full(n, 250)], axis=-1)
        results = output(tmp_path / str(trial), np.stack([both, both], axis=1), n)
        row = pick(shares(results).to_pandas(), "run", "a", "run")
        errors.append(row["helping_of_nonzero_se"])
        for error in ("se", "low", "high"):  # 1,000 of 1,250 are not zero at every step
            of_all = 0.8 * row[f"helping_of_nonzero_{error}"]
            assert row[f"helping_{error}"] == pytest.approx(of_all, rel=1e-9)
    assert 0.75 * truth < np.mean(errors) < 1.1 * truth


def parameters(path: Path, helping: np.ndarray, zero: np.ndarray, n: int) -> lcray.Results:
    plan = planting.make_plan({"a": len(helping)}, n, n, ("train",), ("parameters",))
    columns = {
        "split": "train",
        "layer": "a",
        "index": np.arange(len(helping)),
        "n_helping": helping,
        "n_hurting": n - helping - zero,
        "n_zero": zero,
        "n_flips": np.zeros(len(helping), np.int64),
        "displacement_flips": np.zeros(len(helping), np.int64),
    }
    return lcray.open(planting.write_tables(path, plan, {"parameters": columns}))


def test_habits_of_planted_parameters(tmp_path: Path) -> None:
    """Ten iterations: shares 0 (dead), 0.2, 0.5, 0.5, 0.9 (of 10), and 1 of 1 that is not zero."""
    helping = np.array([0, 2, 5, 5, 9, 1])
    zero = np.array([10, 0, 0, 0, 0, 9])
    found = habits(parameters(tmp_path / "out", helping, zero, 10)).to_pandas()
    both = found[found["layer"] == "a"].set_index("denominator")
    assert (
        found[found["layer"] == ""]
        .drop(columns="layer")
        .equals(found[found["layer"] == "a"].drop(columns="layer").set_axis([0, 1]))
    )
    share = np.array([0, 0.2, 0.5, 0.5, 0.9, 0.1])
    every = both.loc["all"]
    assert every["n"] == 6
    assert every["mean"] == pytest.approx(share.mean())
    assert every["sd"] == pytest.approx(share.std())
    assert every["near_half"] == pytest.approx(2 / 6)
    assert every["q50"] == 0.2 and every["q99"] == 0.9 and every["q01"] == 0
    nonzero = both.loc["nonzero"]
    assert nonzero["n"] == 5
    assert nonzero["mean"] == pytest.approx((0.2 + 0.5 + 0.5 + 0.9 + 1) / 5)
    p = nonzero["mean"]
    assert nonzero["sd_if_independent"] == pytest.approx(np.sqrt(p * (1 - p) * (4 / 10 + 1) / 5))


def test_parameters_that_help_by_chance_are_spread_as_chance_has_it(tmp_path: Path) -> None:
    helping = np.random.default_rng(0).binomial(200, 0.5, 20_000)
    found = habits(parameters(tmp_path / "out", helping, 0 * helping, 200)).to_pandas().iloc[0]
    assert found["sd"] == pytest.approx(found["sd_if_independent"], rel=0.02)
