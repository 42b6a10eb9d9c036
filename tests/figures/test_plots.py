"""The figures: what their artists hold, against the tables; and their pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import planting
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import lcray
from lcray import plots
from lcray.errors import InapplicableError, LcrayError, UsageError
from lcray.figures.palette import LIGHT
from lcray.tables.reading.results import Results

LAYERS = ["b.weight", "a.weight"]


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before, "settings are changed"
    pyplot.close("all")


def axes() -> Any:
    """Axes of a figure that pyplot does not know."""
    return Figure().subplots()


def test_bars_are_the_totals_of_layers(results: Results) -> None:
    ax = axes()
    assert plots.layer_totals(results, ax, split="val") is ax
    sums = results.sql("SELECT layer, sum(lc) AS lc FROM layers WHERE split = 'val' GROUP BY layer")
    expected = dict(zip(sums["layer"], sums["lc"], strict=True))
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([expected[n] for n in LAYERS])
    assert [text.get_text() for text in ax.get_yticklabels()] == LAYERS
    hatches = [bar.get_hatch() is not None for bar in ax.patches]
    assert hatches == [expected[n] > 0 for n in LAYERS] == [False, True]
    assert ax.get_xlabel() == "LC over the run (loss)"
    assert ax.yaxis_inverted()


def whiskers(ax: Any) -> list[tuple[float, float]]:
    """The ends of the bars of errors, in the order they were drawn."""
    return [(line[0][0], line[1][0]) for drawn in ax.collections for line in drawn.get_segments()]


def test_whiskers_are_what_the_quadrature_may_be_off(results: Results) -> None:
    ends = {
        (row.split, row.layer): (row.lc - row.error, row.lc + row.error)
        for row in results.sql(
            "SELECT split, layer, sum(lc) AS lc, sum(lc_error) AS error FROM layers GROUP BY ALL"
        ).itertuples()
    }
    found = np.array(whiskers(plots.layer_totals(results, axes(), split="val")))
    assert found == pytest.approx(np.array([ends["val", name] for name in LAYERS]))
    found = np.array(whiskers(plots.memorising(results, axes())))
    expected = [ends[split, name] for split in ("train", "val") for name in LAYERS]
    assert found == pytest.approx(np.array(expected))


def test_two_splits_stand_side_by_side(results: Results) -> None:
    ax = plots.memorising(results, axes())
    found = results.layers().pivot_table("lc", "layer", "split", "sum", observed=True)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([found["train"][n] for n in LAYERS] + [*found["val"][LAYERS]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "val"]
    with pytest.raises(UsageError, match="unknown split 'test'"):
        plots.memorising(results, axes(), other="test")


def test_shares_of_fisher_information(results: Results) -> None:
    ax = plots.fisher(results, axes())
    traces = results.fisher()
    traces = traces[(traces["split"] == "train") & (traces["step"] < 10)]
    mean = traces.groupby("layer", observed=True)["trace_true"].mean()
    widths = [bar.get_width() for bar in ax.patches]
    assert widths[2:4] == pytest.approx([mean[n] / mean.sum() for n in LAYERS])
    lc = results.layers().groupby(["split", "layer"], observed=True)["lc"].sum()["train"]
    assert widths[:2] == pytest.approx([lc[n] / lc.sum() for n in LAYERS])


def test_lines_of_loss_and_gap(results: Results) -> None:
    both = plots.loss(results, Figure().subplots(2))
    frame = results.sql("SELECT * FROM intervals WHERE split = 'train' ORDER BY start_step")
    measured, rebuilt = (line.get_ydata() for line in both[0].lines)
    assert measured == pytest.approx([frame["loss_start"][0], *frame["loss_end"]])
    assert rebuilt == pytest.approx(
        [frame["loss_start"][0], *(frame["loss_start"][0] + frame["lc"].cumsum())]
    )
    assert both[1].lines[0].get_ydata() == pytest.approx([0, *frame["gap"].cumsum()], abs=1e-12)
    assert both[0].lines[0].get_xdata().tolist() == [0, *frame["end_step"]]
    with pytest.raises(UsageError, match="has 2 panels"):
        plots.loss(results, axes())


def test_lines_of_first_order_and_trajectories(results: Results) -> None:
    frame = results.sql("SELECT * FROM intervals WHERE split = 'train' ORDER BY start_step")
    ax = plots.first_order(results, axes())
    first = frame["loss_start"][0] + frame["first_order_lc"].cumsum()
    assert ax.lines[2].get_ydata()[1:] == pytest.approx(first)
    ax = plots.trajectories(results, axes(), split="val", layers=["a.weight"])
    mine = results.layers(layers="a.weight")
    mine = mine[mine["split"] == "val"]
    assert ax.lines[1].get_ydata() == pytest.approx(mine["lc"].cumsum())
    assert ax.lines[1].get_linestyle() == "--"  # it hurts
    with pytest.raises(UsageError, match=r"did you mean 'a.weight'"):
        plots.trajectories(results, axes(), layers=["a.wei"])


def test_lines_of_shares(results: Results) -> None:
    ax = plots.shares(results, axes(), window=5, layer="b.weight")
    frame = results.layers(layers="b.weight")
    frame = frame[frame["split"] == "train"]
    share = [frame["n_helping"].iloc[a : a + 5].sum() / 30 for a in (0, 5)]
    assert ax.lines[1].get_ydata() == pytest.approx(share)
    assert ax.lines[2].get_ydata() == pytest.approx(1 - np.array(share))
    assert ax.lines[1].get_xdata() == pytest.approx([2.5, 7.5])


def test_maps_hold_lc_with_zero_in_the_middle(results: Results) -> None:
    ax = plots.layer_map(results, axes(), columns=5, percentile=50)
    mesh = ax.collections[0]
    frame = results.layers()
    frame = frame[frame["split"] == "train"].assign(column=frame["start_step"] // 2)
    grid = frame.pivot_table("lc", "layer", "column", "sum", observed=True).loc[LAYERS]
    assert np.asarray(mesh.get_array()) == pytest.approx(grid.to_numpy())
    assert mesh.norm.vmax == -mesh.norm.vmin == pytest.approx(np.median(np.abs(grid)))
    assert np.allclose(mesh.cmap(0.5), (0.97, 0.97, 0.97, 1), atol=0.02)
    assert mesh.colorbar.extend == "both"
    notes = [text.get_text() for text in ax.texts]
    assert notes == ["colours end at the 50th percentile of |LC|; 2 intervals each added up"]
    marks = ax.collections[1].get_offsets()[:, 1]
    assert marks.tolist() == [1.5], "the second layer hurts"
    with pytest.raises(UsageError, match="percentile 0"):
        plots.layer_map(results, axes(), percentile=0)


def test_maps_of_units_and_classes(results: Results) -> None:
    ax = plots.unit_map(results, "b.weight", axes())
    units = results.units()
    grid = units[units["split"] == "train"].pivot(index="unit", columns="start_step", values="lc")
    assert np.asarray(ax.collections[0].get_array()) == pytest.approx(grid.to_numpy())
    ax = plots.class_layers(results, axes())
    groups = results.groups()
    groups = groups[groups["split"] == "train"]
    grid = groups.pivot_table("lc", "layer", "group", "sum", observed=True).loc[LAYERS]
    assert np.asarray(ax.collections[0].get_array()) == pytest.approx(grid.to_numpy())
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "2"]


def test_the_map_of_coincidences(results: Results) -> None:
    from lcray.analyses.synchrony import coincidences

    ax = plots.coincidences(results, axes())
    found = coincidences(results).to_pandas()
    found = found[(found["split"] == "train") & (found["kind"] == "layer") & found["group"].isna()]
    pair = found[(found["a"] == "b.weight") & (found["b"] == "a.weight")].iloc[0]
    array = ax.collections[0].get_array()
    assert array[0, 1] == pytest.approx(pair["coincidences"] - pair["expected"])
    assert array.mask.tolist() == [[True, False], [False, True]]
    with pytest.raises(UsageError, match="'layer' or 'group'"):
        plots.coincidences(results, axes(), kind="unit")


def test_points_of_a_distribution(results: Results) -> None:
    ax = plots.distribution(results, axes(), layer="b.weight", fits=["weibull"], per_octave=8)
    bins = results.histograms(layers="b.weight")
    bins = bins[(bins["split"] == "train") & (bins["sign"] == -1)]
    bins = bins.groupby(["lower", "upper"])["count"].sum().reset_index()
    width = np.log(bins["upper"] / bins["lower"])
    assert ax.lines[0].get_ydata() == pytest.approx(bins["count"] / bins["count"].sum() / width)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    with pytest.raises(UsageError, match="did you mean 'weibull'"):
        plots.distribution(results, axes(), fits=["weibul"])


def test_tracks_have_three_panels(results: Results) -> None:
    found = plots.tracks(results, "b.weight", Figure().subplots(3), count=1)
    traces = results.traces(layers="b.weight")
    traces = traces[traces["split"] == "train"]
    index = traces.assign(lc=traces["lc"].abs()).groupby("index")["lc"].sum().idxmax()
    mine = traces[traces["index"] == index]
    for ax, column in zip(found, ("weight", "gradient", "lc"), strict=True):
        assert ax.lines[1].get_ydata() == pytest.approx(mine[column].to_numpy(), nan_ok=True)


def test_pyplot_hears_of_no_figure_that_is_given_and_style_gives_back(results: Results) -> None:
    plots.layer_map(results, axes())
    assert pyplot.get_fignums() == []
    with plots.style(font_size=6, width=2, height=1):
        ax = plots.shares(results)
        assert ax.figure.get_size_inches().tolist() == [2, 1]
        assert ax.xaxis.label.get_fontsize() == 6
        assert mpl.rcParams["font.size"] == 6
    assert mpl.rcParams["font.size"] == 10
    assert len(pyplot.get_fignums()) == 1
    with pytest.raises(UsageError, match="must be above 0"), plots.style(width=0):
        pass


@pytest.mark.parametrize("form", ["pdf", "svg"])
def test_vectors_are_written_with_text_as_text(results: Results, tmp_path: Path, form: str) -> None:
    with plots.style():
        ax = plots.layer_totals(results)
        ax.figure.savefig(tmp_path / f"a.{form}")
    data = (tmp_path / f"a.{form}").read_bytes()
    assert data.startswith(b"%PDF-" if form == "pdf" else b"<?xml")
    if form == "svg":
        assert b">b.weight</text>" in data
        assert b"<image" not in data
    else:
        assert b"/FontFile2" in data and b"/Subtype /Type3" not in data


def test_without_a_table_a_figure_says_what_would_give_it(tmp_path: Path) -> None:
    plan = planting.make_plan({"w": 2}, 2, 2, ("train",), ("intervals",))
    columns = planting.interval_columns(plan, np.zeros((1, 2)), np.zeros((1, 2)))
    bare = lcray.open(planting.write_tables(tmp_path / "out", plan, {"intervals": columns}))
    for name in plots.__all__:
        if name in ("style", "loss"):
            continue
        more = ["w"] if name in ("tracks", "unit_map") else []
        with pytest.raises(InapplicableError, match=r"there is no (table|first-order)"):
            getattr(plots, name)(bare, *more)
    assert pyplot.get_fignums() == [], "none is left half drawn"


def test_without_matplotlib_figures_name_the_extra(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plots.layer_totals, plots.loss):
        with pytest.raises(LcrayError, match=r'pip install "lcray\[plots\]"'):
            draw(results)


FIGURES: dict[str, Callable[[Results], Any]] = {
    name: getattr(plots, name) for name in plots.__all__ if name not in ("style",)
} | {
    "unit_map": lambda r: plots.unit_map(r, "b.weight"),
    "tracks": lambda r: plots.tracks(r, "b.weight", count=2),
    "coincidences": lambda r: plots.coincidences(r, kind="group"),
}


def picture(name: str) -> Any:
    @pytest.mark.slow
    @pytest.mark.mpl_image_compare(
        baseline_dir="../baseline",
        filename=f"{name}.png",
        savefig_kwargs={"dpi": 60},
        style="default",
        tolerance=2,
    )
    def compare(results: Results) -> Figure:
        found = FIGURES[name](results)
        figure: Figure = np.atleast_1d(found)[0].figure
        return figure

    return compare


for _name in FIGURES:
    globals()[f"test_picture_of_{_name}"] = picture(_name)


def test_dollars_in_names_begin_no_formula(tmp_path: Path) -> None:
    lc = {
        (split, layer): np.random.default_rng(0).normal(size=(30, 4))
        for split in ("train", r"va$\l{$")
        for layer in (r"a$\frac{$", "b$$")
    }
    found = lcray.open(planting.from_elements(tmp_path / "out", lc, window=10))
    for draw in (plots.layer_totals, plots.memorising, plots.trajectories, plots.coincidences):
        ax = axes()
        draw(found, ax, **({} if draw is plots.memorising else {"split": r"va$\l{$"}))
        ax.figure.savefig(tmp_path / "a.svg")
        assert r"a$\frac{$" in (tmp_path / "a.svg").read_text() or draw is plots.trajectories


def test_where_nothing_has_lc_there_is_a_word(tmp_path: Path) -> None:
    bad = {
        (split, step): "nonfinite_loss" for split in ("val", "train") for step in range(0, 12, 2)
    }
    planting.write_reduced(tmp_path / "out", planting.make_world(bad=bad))
    found = lcray.open(tmp_path / "out")
    for draw in (plots.layer_totals, plots.memorising, lambda r: plots.unit_map(r, "b.weight")):
        with pytest.raises(InapplicableError, match="no interval"):
            draw(found)


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    names = ("a\n\x1b[31mb", "c\td\u202e", "e\x00" + "x" * 60)
    rng = np.random.default_rng(0)
    lc = {(split, name): rng.normal(size=(30, 4)) for split in ("train", "v\x07") for name in names}
    found = lcray.open(planting.from_elements(tmp_path / "out", lc, window=10))
    for draw in (plots.layer_totals, plots.memorising, plots.trajectories, plots.coincidences):
        ax = axes()
        draw(found, ax, **({} if draw is plots.memorising else {"split": "v\x07"}))
        ax.figure.savefig(tmp_path / "a.png")  # a missing glyph would be a warning, and so an error
        legend = ax.get_legend()
        rows = [*ax.get_yticklabels(), *(legend.get_texts() if legend else ())]
        texts = [text.get_text() for text in rows]
        assert r"a\n\x1b[31mb" in texts and all(text.isprintable() for text in texts)
        assert r"v\x07" in ax.get_title(loc="left") or draw is plots.memorising


def test_the_legend_of_tracks_is_beside_the_curves(results: Results) -> None:
    figure = Figure(layout="constrained")
    found = plots.tracks(results, "b.weight", figure.subplots(3), count=4)
    figure.draw_without_rendering()
    legend = found[0].get_legend()
    assert len(legend.get_texts()) == 4
    box = legend.get_window_extent()
    assert all(box.x0 >= ax.get_window_extent().x1 for ax in found)
    assert box.x1 <= figure.bbox.x1


def test_blue_is_for_what_is_wanted(results: Results) -> None:
    """LC below 0, and more coincidences than by chance: as in the report."""
    helping = plots.layer_map(results, axes()).collections[0].cmap
    assert to_hex(helping(0.0)) == LIGHT.diverging[0]
    assert to_hex(helping(1.0)) == LIGHT.diverging[-1]
    together = plots.coincidences(results, axes()).collections[0].cmap
    assert to_hex(together(1.0)) == LIGHT.diverging[0]
