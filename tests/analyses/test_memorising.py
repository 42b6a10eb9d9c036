from __future__ import annotations

from pathlib import Path

import numpy as np
import planting
import pytest

import lcray
from lcray.analyses.memorising import memorising, overfitting
from lcray.errors import InapplicableError, UsageError

T, WIDTH = 200, 20


def output(path: Path, lc: np.ndarray, splits: tuple[str, ...] = ("val", "train")) -> lcray.Results:
    """Layers a, b and so on with LC [S, T, L]."""
    sizes = {f"{chr(97 + i)}": 4 for i in range(lc.shape[2])}
    plan = planting.make_plan(sizes, lc.shape[1], WIDTH, splits, ("layers",))
    counts = np.zeros((*lc.shape, 3), np.int64)
    return lcray.open(
        planting.write_tables(path, plan, {"layers": planting.layer_columns(plan, counts, lc)})
    )


def planted(onset: int, seed: int = 0) -> np.ndarray:
    """Train falls always; on val, layer a rises from `onset` on, b never does, c rises on both."""
    rng = np.random.default_rng(seed)
    lc = rng.normal(-1.0, 0.3, (2, T, 3))
    lc[0, onset:, 0] += 1.6
    lc[:, :, 2] += 2.0
    return lc


def test_splits_side_by_side(tmp_path: Path) -> None:
    lc = planted(100)
    frame = memorising(output(tmp_path / "out", lc), windows={"x": "40:60"}).to_pandas()
    assert set(frame["train"]) == {"train"} and set(frame["other"]) == {"val"}
    for layer, values in (("a", lc[:, :, 0]), ("", lc.sum(axis=2))):
        rows = frame[frame["layer"] == layer].set_index("window")
        run, window, interval = rows.loc["run"], rows.loc["x"], rows.loc["41:42"]
        for row, part, until in (
            (run, slice(None), T),
            (window, slice(40, 60), 60),
            (interval, slice(41, 42), 42),
        ):
            val, train = values[:, part].sum(axis=1)
            assert row["lc_train"] == pytest.approx(train)
            assert row["lc_other"] == pytest.approx(val)
            assert row["difference"] == pytest.approx(val - train)
            assert row["cumulative_train"] == pytest.approx(values[1, :until].sum())
            assert row["cumulative_other"] == pytest.approx(values[0, :until].sum())
        low, high = (window[f"lc_train_resampled_{end}"] for end in ("low", "high"))
        assert low < window["lc_train"] < high
        assert np.isnan(interval["lc_train_resampled_low"])
        assert (run["resolution"], interval["resolution"]) == ("run", "interval")


def test_each_side_has_its_bound_and_the_difference_both(tmp_path: Path) -> None:
    lc, error = np.full((2, T, 2), -1.0), np.zeros((2, T, 2))
    error[0], error[1] = 0.25, 0.5  # val and train
    error[1, :, 1] = 0.125
    lc[1, 7] = error[1, 7] = np.nan  # neither split counts this interval
    sizes = {"a": 4, "b": 4}
    plan = planting.make_plan(sizes, T, WIDTH, ("val", "train"), ("layers",))
    columns = planting.layer_columns(plan, np.zeros((*lc.shape, 3), np.int64), lc, lc_error=error)
    results = lcray.open(planting.write_tables(tmp_path / "out", plan, {"layers": columns}))
    frame = memorising(results).to_pandas()
    names = [f"{name}_bound" for name in ("lc_train", "lc_other", "difference")]
    expected = {"a": (0.5, 0.25, 0.75), "b": (0.125, 0.25, 0.375), "": (0.625, 0.5, 1.125)}
    for layer, bounds in expected.items():
        rows = frame[frame["layer"] == layer].set_index("window")
        assert tuple(rows.loc["run", names]) == pytest.approx(tuple((T - 1) * x for x in bounds))
        assert tuple(rows.loc["20:40", names]) == pytest.approx(tuple(WIDTH * x for x in bounds))
        assert tuple(rows.loc["41:42", names]) == pytest.approx(bounds)


@pytest.mark.parametrize("split", [0, 1])
def test_intervals_that_one_split_lacks_have_no_part_in_the_other(
    tmp_path: Path, split: int
) -> None:
    lc = planted(100)
    lc[split, 50] = np.nan
    frame = memorising(output(tmp_path / "out", lc)).to_pandas()
    row = frame[(frame["layer"] == "a") & (frame["window"] == "run")].iloc[0]
    val, train = np.delete(lc[:, :, 0], 50, axis=1).sum(axis=1)
    assert row["n_intervals"] == T - 1 and "50:51" not in set(frame["window"])
    assert (row["lc_other"], row["lc_train"]) == pytest.approx((val, train))
    assert (row["cumulative_other"], row["cumulative_train"]) == pytest.approx((val, train))


def test_the_planted_onset_is_found_and_no_other(tmp_path: Path) -> None:
    lc = planted(100)
    frame = overfitting(output(tmp_path / "out", lc)).to_pandas().set_index("layer")
    assert frame.loc["a"]["onset"] == 100 and frame.loc["a"]["window"] == "100:120"
    assert frame.loc["a"]["lc_train_after"] == pytest.approx(lc[1, 100:, 0].sum())
    assert frame.loc["a"]["lc_other_after"] == pytest.approx(lc[0, 100:, 0].sum())
    assert np.isnan(frame.loc["b"]["onset"]) and frame.loc["b"]["window"] == ""
    assert np.isnan(frame.loc["c"]["onset"])  # rises on train as well: not overfitting
    assert (frame["n_windows"] == 10).all()


def test_a_rise_that_does_not_last_is_no_onset(tmp_path: Path) -> None:
    lc = planted(T)
    lc[0, 40:80, 0] += 1.6  # two windows
    results = output(tmp_path / "out", lc)
    assert overfitting(results).to_pandas()["onset"].isna().all()
    short = overfitting(results, patience=2).to_pandas().set_index("layer")
    assert short.loc["a"]["onset"] == 40


def test_noise_does_not_overfit(tmp_path: Path) -> None:
    """A val LC without drift, 100 layers and 8 rows of three windows each: none by chance."""
    rng = np.random.default_rng(1)
    lc = np.stack([rng.normal(0, 1, (T, 100)), rng.normal(-1, 0.3, (T, 100))])
    frame = overfitting(output(tmp_path / "out", lc)).to_pandas()
    assert frame["onset"].notna().sum() <= 1


def test_one_split_or_windows_too_small(tmp_path: Path) -> None:
    lc = planted(100)
    one = output(tmp_path / "one", lc[1:], ("train",))
    for compute in (memorising, overfitting):
        with pytest.raises(InapplicableError, match="one split, 'train'"):
            compute(one)
    results = output(tmp_path / "out", lc)
    found = overfitting(results, window=5)
    assert found.to_pandas()["onset"].isna().all()
    assert b"fewer than 8" in found.schema.metadata[b"lcray.notes"]
    with pytest.raises(UsageError, match="patience 0"):
        overfitting(results, patience=0)
    with pytest.raises(UsageError, match="did you mean 'train'"):
        memorising(results, train="trian")
