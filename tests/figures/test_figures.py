"""The data behind figures, against planted numbers and sums written out anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import planting
import pytest
from scipy.stats import expon, lognorm, weibull_min

import lcray
from lcray import figures
from lcray.analyses import tidy
from lcray.analyses.fits import fits as fits_of
from lcray.errors import InapplicableError, UsageError
from lcray.figures.html.along_the_run import loss_curves
from lcray.figures.html.source import read_source
from lcray.tables.reading.results import Results

SIZES = {"b.weight": 6, "a.weight": 4}
T = 10


def planted(results: Results) -> tuple[Any, Any]:
    return results.layers(), results.intervals()


def test_the_loss_is_rebuilt_from_lc(results: Results) -> None:
    intervals = results.intervals()
    frame = figures.reconstruction(results).to_pandas()
    for split in ("train", "val"):
        here = intervals[intervals["split"] == split]
        found = frame[frame["split"] == split]
        first = here["loss_start"].iloc[0]
        assert found["step"].tolist() == [0, *here["end_step"]]
        assert found["loss"].tolist() == [first, *here["loss_end"]]
        for name, column in (("reconstructed", "lc"), ("first_order", "first_order_lc")):
            expected = [first + sum(here[column].iloc[:n]) for n in range(len(here) + 1)]
            assert found[name].to_numpy() == pytest.approx(expected, rel=1e-12)
        assert found["gap"].to_numpy() == pytest.approx(
            [sum(here["gap"].iloc[:n]) for n in range(len(here) + 1)], abs=1e-12
        )


def test_the_measured_change_stands_in_for_an_interval_without_lc(tmp_path: Path) -> None:
    plan = planting.make_plan({"w": 2}, 5, 5, ("train",), ("intervals",))
    lc = np.array([[-1.0, -2.0, np.nan, -0.5, -0.25]])
    loss = np.array([10.0, 9.1, 7.2, 5.0, 4.4, 4.2])
    gap = lc - np.diff(loss)
    columns = planting.interval_columns(plan, lc, gap)
    columns |= {"loss_start": loss[:-1], "loss_end": loss[1:], "loss_change": np.diff(loss)}
    columns["status"] = ["ok", "ok", "nonfinite_gradient", "ok", "ok"]
    out = planting.write_tables(tmp_path / "out", plan, {"intervals": columns})
    frame = figures.reconstruction(lcray.open(out)).to_pandas()
    # -2.2 is measured of the third; by the second LC had missed the loss by -0.2
    assert frame["reconstructed"].tolist() == pytest.approx([10.0, 9.0, 7.0, 4.8, 4.3, 4.05])
    assert frame["gap"].tolist() == pytest.approx([0.0, -0.1, -0.2, -0.2, -0.1, -0.15])
    assert frame["loss"].tolist() == loss.tolist()
    assert frame["first_order"].isna().all()
    few = figures.reconstruction(lcray.open(out), points=2).to_pandas()
    assert few["step"].tolist() == [0, 5]


def test_beyond_an_unknown_loss_the_reconstruction_is_known_again(tmp_path: Path) -> None:
    """And that of the report is the same."""
    plan = planting.make_plan({"w": 2}, 4, 4, ("train",), ("intervals", "layers"))
    loss = np.array([10.0, 9.1, np.nan, 5.0, 4.4])
    lc = np.array([[-1.0, np.nan, np.nan, -0.5]])
    intervals = planting.interval_columns(plan, lc, lc - np.diff(loss))
    intervals |= {"loss_start": loss[:-1], "loss_end": loss[1:], "loss_change": np.diff(loss)}
    intervals["status"] = ["ok", "nonfinite_loss", "nonfinite_loss", "ok"]
    layers = planting.layer_columns(plan, np.ones((1, 4, 1, 3), np.int64), lc[..., None])
    out = planting.write_tables(tmp_path / "out", plan, {"intervals": intervals, "layers": layers})
    frame = figures.reconstruction(lcray.open(out)).to_pandas()
    expected = [10.0, 9.0, np.nan, 4.9, 4.4]
    assert frame["reconstructed"].tolist() == pytest.approx(expected, nan_ok=True)
    assert frame["gap"].tolist() == pytest.approx([0.0, -0.1, -0.1, -0.1, 0.0], abs=1e-15)
    _, rebuilt, gap = loss_curves(read_source(lcray.open(out)))
    np.testing.assert_array_equal(rebuilt[0], frame["reconstructed"])
    np.testing.assert_array_equal(gap[0], frame["gap"])


@pytest.mark.parametrize(("columns", "cuts"), [(200, range(T)), (4, (0, 3, 6, 9)), (1, (0,))])
def test_a_matrix_adds_neighbouring_intervals_up(
    results: Results, columns: int, cuts: tuple[int, ...]
) -> None:
    layers = results.layers()
    found = figures.layer_matrix(results, columns=columns)
    frame = found.to_pandas()
    assert len(frame) == 2 * 2 * len(cuts)
    stops = [*cuts[1:], T]
    for row in frame.itertuples():
        stop = stops[list(cuts).index(row.first_step)]
        assert row.end_step == stop
        here = layers[(layers["split"] == row.split) & (layers["layer"] == row.layer)]
        here = here[(here["start_step"] >= row.first_step) & (here["start_step"] < stop)]
        assert row.lc == pytest.approx(here["lc"].sum(), rel=1e-12)
    assert frame["layer"].iloc[0] == "b.weight"  # the model's order
    assert bool(tidy.notes_of(found)) == (len(cuts) < T)
    with pytest.raises(UsageError, match="at least 1"):
        figures.layer_matrix(results, columns=0)


def test_the_report_shows_the_same_sums(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    lc = {(split, "w"): rng.normal(size=(2001, 2)) for split in ("train", "val")}
    found = lcray.open(planting.from_elements(tmp_path / "out", lc, window=2001))
    source = read_source(found)
    assert source.each == 3 and len(source.starts) == 667
    matrix = figures.layer_matrix(found, columns=1000)
    assert matrix["lc"].to_numpy().tolist() == source.by_layer["lc"].ravel().tolist()
    assert matrix["first_step"].to_pylist() == [*source.starts] * 2
    assert matrix["end_step"].to_pylist() == [*source.ends] * 2
    cuts = np.arange(0, 2001, 3)
    expected = [np.add.reduceat(lc[split, "w"].sum(axis=1), cuts) for split in ("train", "val")]
    assert matrix["lc"].to_numpy() == pytest.approx(np.concatenate(expected), rel=1e-9)


def test_a_column_without_lc_is_null(tmp_path: Path) -> None:
    plan = planting.make_plan({"w": 2}, 4, 4, ("train",), ("layers",))
    lc = np.array([[[np.nan], [np.nan], [np.nan], [-1.0]]])
    counts = np.zeros((1, 4, 1, 3), np.int64)
    out = planting.write_tables(
        tmp_path / "out", plan, {"layers": planting.layer_columns(plan, counts, lc)}
    )
    found = figures.layer_matrix(lcray.open(out), columns=2).column("lc").to_pylist()
    assert found == [None, -1.0]


def test_units_of_a_layer(results: Results) -> None:
    units = results.units()
    frame = figures.unit_matrix(results, "b.weight", split="val", columns=5).to_pandas()
    assert len(frame) == 3 * 5
    for row in frame.itertuples():
        here = units[(units["split"] == "val") & (units["unit"] == row.unit)]
        here = here[here["start_step"].isin([row.first_step, row.first_step + 1])]
        assert row.end_step == row.first_step + 2
        assert row.lc == pytest.approx(here["lc"].sum(), rel=1e-12)
    with pytest.raises(InapplicableError, match=r"'units' has no layer 'a.weight'.*--units"):
        figures.unit_matrix(results, "a.weight")
    with pytest.raises(UsageError, match=r"did you mean 'b.weight'"):
        figures.unit_matrix(results, "b.weigh")
    with pytest.raises(UsageError, match="unknown split 'tset'"):
        figures.unit_matrix(results, "b.weight", split="tset")


def test_tracks_are_of_the_elements_with_the_most_traffic(results: Results) -> None:
    traces = results.traces(layers="b.weight")
    traces = traces[traces["split"] == "train"]
    traffic = traces.assign(lc=traces["lc"].abs()).groupby("index")["lc"].sum()
    frame = figures.tracks(results, "b.weight", count=2).to_pandas()
    assert set(frame["index"]) == set(traffic.nlargest(2).index)
    first = frame["index"].iloc[0]
    mine = traces[traces["index"] == first]
    for name in ("step", "weight", "gradient"):
        assert frame[frame["index"] == first][name].tolist() == mine[name].tolist()
    with pytest.raises(UsageError, match="at least 1"):
        figures.tracks(results, "b.weight", count=0)


def test_classes_add_up_to_layers(results: Results) -> None:
    frame = figures.class_layers(results).to_pandas()
    groups, layers = results.groups(), results.layers()
    assert frame["layer"].iloc[:2].tolist() == ["b.weight", "a.weight"]
    for row in frame.itertuples():
        same = (groups["split"] == row.split) & (groups["layer"] == row.layer)
        here = groups[same & (groups["group"] == row.group)]
        assert row.lc == pytest.approx(here["lc"].sum(), rel=1e-12)
    total = frame.groupby(["split", "layer"], observed=True)["share_of_layer"].sum()
    of_layers = layers.groupby(["split", "layer"], observed=True)["lc"].sum()
    assert total.to_dict() == pytest.approx(of_layers.to_dict(), rel=1e-12)


FITS = {
    "weibull": lambda x, p: weibull_min.cdf(x, p["shape"], scale=p["scale"]),
    "exponential": lambda x, p: expon.cdf(x, scale=p["scale"]),
    "lognormal": lambda x, p: lognorm.cdf(x, p["shape"], scale=p["scale"]),
}


@pytest.mark.parametrize("per_octave", [pytest.param(8, marks=pytest.mark.slow), 2])
def test_densities_are_shares_by_width_and_fits_those_of_the_finding(
    results: Results, per_octave: int
) -> None:
    frame = figures.densities(results, per_octave=per_octave).to_pandas()
    bins = results.histograms()
    fits = fits_of(results, replicates=0, exact=0).to_pandas()
    fits = fits[(fits["window"] == "run") & (fits["split"] == "train")]
    frame = frame[frame["split"] == "train"]
    for layer in ("", *SIZES):
        for sign in (-1, 1):
            found = frame[(frame["layer"] == layer) & (frame["sign"] == sign)]
            here = bins[(bins["split"] == "train") & (bins["sign"] == sign)]
            here = here if not layer else here[here["layer"] == layer]
            n = here["count"].sum()
            assert found["count"].sum() == n
            for row in found.itertuples():
                inside = (here["lower"] >= row.lower * 0.999) & (here["lower"] < row.upper * 0.999)
                assert row.count == here["count"][inside].sum()
                width = np.log(row.upper / row.lower)
                assert row.density == pytest.approx(row.count / n / width, rel=1e-9)
                assert row.upper / row.lower <= 2 ** (1 / per_octave) * 1.1
            for name, cdf in FITS.items():
                chosen = (fits["layer"] == layer) & (fits["sign"] == sign)
                kept = fits[chosen & (fits["distribution"] == name)]
                if kept.empty:  # the finding has no fit either
                    assert found[name].isna().all()
                    continue
                fit = kept.iloc[0]
                mass = cdf(found["upper"], fit) - cdf(found["lower"], fit)
                assert found[name].to_numpy() == pytest.approx(
                    mass / np.log(found["upper"] / found["lower"]).to_numpy(), rel=1e-6
                )
    with pytest.raises(UsageError, match="per_octave 3"):
        figures.densities(results, per_octave=3)


def test_what_lacks_says_what_would_give_it(tmp_path: Path) -> None:
    plan = planting.make_plan({"w": 2}, 2, 2, ("train",), ("intervals",))
    columns = planting.interval_columns(plan, np.zeros((1, 2)), np.zeros((1, 2)))
    bare = lcray.open(planting.write_tables(tmp_path / "out", plan, {"intervals": columns}))
    for compute, why in (
        (figures.layer_matrix, "'layers'"),
        (figures.densities, "'histograms'"),
        (figures.class_layers, "'groups'.*give the task groups"),
        (lambda r: figures.unit_matrix(r, "w"), "'units'.*--units"),
        (lambda r: figures.tracks(r, "w"), "'traces'.*--parameters"),
    ):
        with pytest.raises(InapplicableError, match=f"there is no table {why}"):
            compute(bare)


def test_every_column_says_what_it_is(results: Results) -> None:
    tables = [
        figures.reconstruction(results),
        figures.layer_matrix(results),
        figures.densities(results),
        figures.class_layers(results),
        figures.unit_matrix(results, "b.weight"),
        figures.tracks(results, "b.weight"),
    ]
    for table in tables:
        for field in table.schema:
            assert field.metadata[b"description"], field.name
            assert b"unit" in field.metadata
