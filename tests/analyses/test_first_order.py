from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import planting
import pytest
from scipy import stats

import lcray
from lcray.analyses.first_order import first_order


def output(
    path: Path, change: np.ndarray, gap: np.ndarray, first: np.ndarray | None
) -> lcray.Results:
    plan = planting.make_plan({"a": 3}, len(change), len(change), ("train",), ("intervals",))
    given = None if first is None else first[None]
    columns = planting.interval_columns(plan, (change + gap)[None], gap[None], given)
    return lcray.open(planting.write_tables(path, plan, {"intervals": columns}))


def run_rows(results: lcray.Results, **options: object) -> pd.DataFrame:
    frame = first_order(results, **options).to_pandas()
    return frame[frame["window"] == "run"].set_index("rule")


def test_the_gaps_of_both(tmp_path: Path) -> None:
    change = np.array([-1.0, -1, 0.5, -0.5] * 5)
    gap = np.array([0.01, -0.02, 0, 0] * 5)
    found = run_rows(output(tmp_path / "out", change, gap, 2 * change - 0.5))
    simpson, left = found.loc["simpson"], found.loc["first order"]
    assert simpson["gradients"] == 2 and left["gradients"] == 1
    assert simpson["loss_change"] == pytest.approx(-10)
    assert simpson["gap"] == pytest.approx(-0.05)
    assert simpson["gap_percent"] == pytest.approx(-0.5)
    assert simpson["abs_gap_percent"] == pytest.approx(100 * 0.15 / 15)
    assert (simpson["worst_step"], simpson["worst_gap"]) == (1, pytest.approx(-0.02))
    assert left["lc"] == pytest.approx(-30)
    assert left["gap_percent"] == pytest.approx(-200)
    assert left["worst_gap"] == pytest.approx(-1.5)
    assert left["bias"] == -1  # on average -1 an interval: it overstates the decrease
    assert left["gap_resampled_low"] < left["gap"] < left["gap_resampled_high"] < 0


def test_intervals_that_are_not_ok_have_no_part(tmp_path: Path) -> None:
    change = np.full(20, -0.1)
    change[7] = np.nan
    plan = planting.make_plan({"a": 3}, 20, 20, ("train",), ("intervals",))
    columns = planting.interval_columns(plan, change[None], np.zeros((1, 20)), 2 * change[None])
    columns["status"] = np.where(np.isnan(change), "nonfinite_loss", "ok").astype(object)
    found = run_rows(
        lcray.open(planting.write_tables(tmp_path / "out", plan, {"intervals": columns}))
    )
    assert [*found["n_intervals"]] == [19, 19]
    assert found.loc["first order"]["loss_change"] == pytest.approx(-1.9)
    assert found.loc["first order"]["gap"] == pytest.approx(-1.9)


def test_without_a_node_at_0_there_is_the_rule_alone(tmp_path: Path) -> None:
    change = np.full(20, -0.1)
    found = run_rows(output(tmp_path / "out", change, 0 * change, None))
    assert [*found.index] == ["simpson"]
    assert found.loc["simpson"]["bias"] == 0 and found.loc["simpson"]["gap"] == 0


def test_few_intervals_have_no_bias(tmp_path: Path) -> None:
    change = np.full(5, -0.1)
    found = run_rows(output(tmp_path / "out", change, 0 * change, 2 * change)).loc["first order"]
    assert found["bias"] == 0 and np.isnan(found["gap_resampled_se"])


@pytest.mark.slow
def test_gaps_without_a_sign_are_seldom_called_biased(tmp_path: Path) -> None:
    """At a level of 0.95: in one of twenty, give or take what 40 tries allow."""
    called = 0
    for trial in range(40):
        gap = np.random.default_rng(trial).normal(size=200)
        results = output(tmp_path / str(trial), np.full(200, -1.0), gap, None)
        called += abs(int(run_rows(results, seed=trial).loc["simpson"]["bias"]))
    assert stats.binomtest(called, 40, 0.05, alternative="greater").pvalue > 0.01
