"""The report, in a real browser: its numbers against own SQL and sums over the tables."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browsing
import numpy as np
import pandas as pd
import planting
import planting_large
import pytest
import scenes
from browsing import Sight
from click.testing import CliRunner
from matplotlib.figure import Figure

import lcray
from lcray import plots
from lcray.analyses.synchrony import peaks_of_learning
from lcray.cli.app import app
from lcray.errors import CorruptionError, OutputError, UsageError

SECTIONS = (
    "loss",
    "layers",
    "heat-map",
    "trajectories",
    "shares",
    "distribution",
    "units",
    "traces",
    "synchrony",
    "classes",
    "splits",
    "first-order",
    "fisher",
)
WORDS = ("helping", "hurting")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<b>bold</b> & %{x} {y} ${z}",
    "quote\"'`backtick",
    "line\nbreak\u202e",
    "a.very.long.name.of.a.layer." + "x" * 90,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, plain_run: Path) -> Path:
    """An output with every table that a section reads."""
    path = tmp_path_factory.mktemp("report") / "out"
    with pytest.MonkeyPatch.context() as patch:
        scenes.work_inline(patch)
        lcray.analyze(plain_run, "scenes:plain", path, fisher=4, fisher_kind="empirical", window=4)
    lcray.report(path)
    return path


@pytest.fixture(scope="module")
def seen(browser: Any, out: Path) -> Sight:
    sight = browsing.look(browser, out / "report.html")
    for section in SECTIONS:
        sight.show(section)
    return sight


@pytest.fixture(scope="module")
def hostile_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    lc = {
        (split, name): rng.normal(-2e-3 if name == HOSTILE[0] else -1e-4, 1e-3, (30, 4))
        for split in ("<i>train</i>", "val'; --")
        for name in HOSTILE
    }
    path = tmp_path_factory.mktemp("hostile") / "<out> & 'x'"
    return planting.from_elements(path, lc, window=10)


@pytest.mark.slow
def test_every_section_is_drawn_without_a_word_and_without_the_network(seen: Sight) -> None:
    marks = ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image"
    for section in SECTIONS:
        assert seen.page.locator(f"#{section} .chart").locator(marks).count() > 0, section
        for part in (".says", ".reading"):
            assert len(seen.page.locator(f"#{section} {part}").inner_text()) > 20
    assert seen.said == []
    assert seen.asked == []


@pytest.mark.slow
def test_the_headline_numbers_are_those_of_the_tables(seen: Sight, out: Path) -> None:
    frame = lcray.open(out).intervals()
    train = frame[frame["split"] == "train"]
    values = seen.page.locator(".card .value").all_inner_texts()
    change, lc, _, helping, gradients = values
    assert number(change) == pytest.approx(train["loss_change"].sum(), rel=1e-3)
    assert number(lc) == pytest.approx(train["lc"].sum(), rel=1e-3)
    signs = train[["n_helping", "n_hurting", "n_zero"]].sum()
    assert number(helping) == pytest.approx(100 * signs["n_helping"] / signs.sum(), abs=0.05)
    assert number(gradients) == train["n_gradients"].sum()


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", "").removesuffix("\N{NO-BREAK SPACE}%"))


@pytest.mark.slow
def test_tables_are_what_sql_gives(seen: Sight, out: Path) -> None:
    found = lcray.open(out)
    totals = found.sql(
        "SELECT layer, sum(lc) AS lc FROM layers WHERE split = 'train' GROUP BY layer"
    ).set_index("layer")["lc"]
    rows = seen.rows("layers")
    assert {row[0]: row[1] for row in rows} == pytest.approx(dict(totals))
    words = {(True, True): "hurts", (True, False): "helps"}
    for row in rows:
        assert row[3] == words.get((abs(row[1]) > row[2], row[1] > 0), "neither")

    cells = found.layers()
    cells = cells[cells["split"] == "train"].set_index(["layer", "start_step"])["lc"]
    shown = {(row[0], row[1]): row[2] for row in seen.rows("heat-map")}
    assert shown == pytest.approx(dict(cells))

    groups = found.groups()
    groups = groups[groups["split"] == "train"].groupby(["layer", "group"], observed=True)["lc"]
    shown = {(row[0], row[1]): row[2] for row in seen.rows("classes")}
    assert shown == pytest.approx(dict(groups.sum()))

    loss = found.intervals()
    loss = loss[loss["split"] == "train"]
    rows = seen.rows("loss")
    assert [row[1] for row in rows[1:]] == pytest.approx(list(loss["loss_end"]))
    assert [row[3] for row in rows[1:]] == pytest.approx(list(loss["gap"].cumsum()), abs=1e-9)


@pytest.mark.slow
def test_fisher_and_shares_are_those_of_the_tables(seen: Sight, out: Path) -> None:
    found = lcray.open(out)
    fisher = found.fisher()
    mean = fisher[fisher["split"] == "train"].groupby("layer", observed=True)
    trace = mean["trace_empirical"].mean()
    # Steps of the run's windows: those before its last checkpoint.
    last = found.plan.steps[-1]
    inside = fisher[(fisher["split"] == "train") & (fisher["step"] < last)]
    trace = inside.groupby("layer", observed=True)["trace_empirical"].mean()
    shown = {row[0]: row[2] for row in seen.rows("fisher")}
    assert shown == pytest.approx(dict(100 * trace / trace.sum()))
    layers = found.layers()
    train = (
        layers[layers["split"] == "train"]
        .groupby("start_step")[["n_helping", "n_hurting", "n_zero"]]
        .sum()
    )
    share = 100 * train["n_helping"] / train.sum(axis=1)
    assert [row[1] for row in seen.rows("shares")] == pytest.approx(list(share))


@pytest.mark.slow
def test_the_slider_shows_the_layers_of_an_interval_and_of_a_window(seen: Sight, out: Path) -> None:
    layers = lcray.open(out).layers()
    layers = layers[layers["split"] == "train"]
    seen.page.locator("#bar select").nth(1).select_option(label="single interval")
    seen.move(7)
    assert panel(seen) == pytest.approx(by_layer(layers[layers["start_step"] == 7]))
    assert "Steps 7 to 8" in seen.page.locator("#bar output").inner_text()
    seen.page.locator("#bar select").nth(1).select_option(label="window of 4 steps")
    seen.settle()
    inside = layers["start_step"].between(4, 7)
    assert panel(seen) == pytest.approx(by_layer(layers[inside]))
    seen.show("loss")
    seen.move(2)
    seen.page.wait_for_function(
        "() => { const [band] = document.querySelector('#loss .chart')._fullLayout.shapes; "
        "return band.x0 === 8 && band.x1 === 12; }"
    )
    seen.page.locator("#slider").focus()
    seen.page.keyboard.press("ArrowLeft")
    seen.settle()
    assert panel(seen) == pytest.approx(by_layer(layers[inside]))


def panel(seen: Sight) -> dict[str, float]:
    rows = "[...document.querySelectorAll('#moment tbody tr')]"
    found = seen.page.evaluate(
        f"{rows}.map((r) => [r.children[0].textContent, +r.children[1].dataset.value])"
    )
    return {name: value for name, value in found}


def by_layer(rows: pd.DataFrame) -> dict[str, float]:
    return {str(k): v for k, v in rows.groupby("layer", observed=True)["lc"].sum().items()}


@pytest.mark.slow
def test_drop_downs_change_the_chart(seen: Sight, out: Path) -> None:
    found = lcray.open(out)
    name = found.plan.layers[2].name
    seen.show("distribution")
    seen.choose("distribution", name)
    counts = found.sql(
        f"SELECT sum(count) AS n FROM histograms WHERE layer = '{name}' AND split = 'train' "
        "AND sign = -1 AND lower > 0"
    )["n"][0]
    assert sum(row[3] for row in seen.rows("distribution") if row[0] == "helping") == counts
    seen.show("units")
    seen.choose("units", name)
    units = found.units(layers=name)
    units = units[units["split"] == "train"].set_index(["unit", "start_step"])["lc"]
    shown = {(row[0], row[1]): row[2] for row in seen.rows("units")}
    assert shown == pytest.approx(dict(units))


@pytest.mark.slow
def test_the_split_is_that_of_all_charts(seen: Sight, out: Path) -> None:
    box = seen.page.locator("#bar select").first
    box.select_option(label="val")
    seen.settle()
    layers = lcray.open(out).layers()
    expected = by_layer(layers[layers["split"] == "val"])
    assert {row[0]: row[1] for row in seen.rows("layers")} == pytest.approx(expected)
    box.select_option(label="train")
    seen.settle()


@pytest.mark.slow
def test_hovering_names_layer_iteration_and_value(seen: Sight) -> None:
    seen.show("heat-map")
    seen.page.locator("#heat-map .chart").scroll_into_view_if_needed()
    box = seen.page.locator("#heat-map .heatmaplayer image").bounding_box()
    seen.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.1 * box["height"], steps=3)
    text = seen.page.wait_for_selector("#heat-map .hoverlayer .hovertext").text_content()
    layer = seen.page.evaluate("document.querySelector('#heat-map .chart')._fullData[0].y[0]")
    assert layer in text and re.search(r"steps 3 to 4\D", text) and "units of the loss" in text


@pytest.mark.slow
def test_cells_and_bars_lie_under_the_band_of_their_interval(seen: Sight, out: Path) -> None:
    rows = lcray.open(out).intervals()
    rows = rows[rows["split"] == "train"].sort_values("start_step")
    edges = [*rows["start_step"], rows["end_step"].iloc[-1]]
    for section in ("heat-map", "units"):
        seen.show(section)
        x = f"Array.from(document.querySelector('#{section} .chart')._fullData[0].x)"
        assert seen.page.evaluate(x) == edges
    seen.show("traces")
    bars = """() => {
        const chart = document.querySelector('#traces .chart'), axis = chart._fullLayout.xaxis;
        const boxes = [...chart.querySelectorAll('.barlayer path')].map((bar) => bar.getBBox());
        return boxes.map((box) => [axis.p2d(box.x), axis.p2d(box.x + box.width)]);
    }"""
    found = seen.page.evaluate(bars)
    for (left, right), start, end in zip(found, edges, edges[1:], strict=False):
        assert start - 0.1 < left < right < end + 0.1
    assert len(found) == len(edges) - 1
    reach = seen.page.evaluate("document.querySelector('#traces .chart')._fullLayout.xaxis.range")
    assert reach == [edges[0], edges[-1]]


@pytest.mark.slow
def test_peaks_stand_in_the_middle_of_their_intervals(seen: Sight, out: Path) -> None:
    found = peaks_of_learning(lcray.open(out), groups=False).to_pandas()
    found = found[(found["split"] == "train") & found["group"].isna()]
    seen.show("synchrony")
    chart = "document.querySelector('#synchrony .chart')"
    x = seen.page.evaluate(f"Array.from({chart}._fullData[0].x)")
    assert x == [start + 0.5 for start in found["start_step"]] != []
    assert seen.page.evaluate(f"{chart}._fullLayout.xaxis.range") == [0, 12]
    said = seen.page.evaluate(f"{chart}._fullData[0].text[0]")
    assert said.endswith(
        f"steps {found['start_step'].iloc[0]} to {found['start_step'].iloc[0] + 1}"
    )


@pytest.mark.slow
def test_thick_and_thin_lines_of_shares_are_told_apart(seen: Sight) -> None:
    seen.show("shares")
    legend = seen.page.locator("#shares .legendtext").all_text_contents()
    lines = seen.page.evaluate(
        "document.querySelector('#shares .chart')._fullData.map((t) => [t.name, t.line.width])"
    )
    expected = [[f"{k}, {what}", n] for k in WORDS for what, n in (("interval", 1), ("window", 3))]
    assert lines == expected and legend == [name for name, _ in lines]
    assert "in windows of 1 interval." in seen.page.locator("#shares .reading").inner_text()


@pytest.mark.slow
def test_layers_have_the_colours_of_matplotlibs_figures(seen: Sight, out: Path) -> None:
    seen.show("trajectories")
    chart = "document.querySelector('#trajectories .chart')"
    drawn = seen.page.evaluate(f"{chart}._fullData.map((t) => [t.name, t.line.color])")
    ax = plots.trajectories(lcray.open(out), Figure().subplots())
    assert dict(drawn) == {line.get_label(): line.get_color() for line in ax.lines[1:]}
    reading = seen.page.locator("#trajectories .reading").inner_text()
    assert "in the order of the model" in reading and "grey" not in reading


def test_of_many_layers_the_text_says_that_six_have_colours() -> None:
    from lcray.figures.html.along_the_run import _colouring

    assert _colouring(6) == "Colours go from dark to light in the order of the model."
    assert _colouring(7).startswith("The 6 that reach furthest have colours")


@pytest.mark.slow
def test_light_and_dark(browser: Any, seen: Sight, out: Path) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    line = "document.querySelector('#loss .chart')._fullData[0].line.color"
    light = seen.page.evaluate(colour), seen.page.evaluate(line)
    seen.page.locator("#theme").click()
    seen.settle()
    toggled = seen.page.evaluate(colour), seen.page.evaluate(line)
    seen.page.locator("#theme").click()
    seen.settle()
    assert light[0] == "rgb(255, 255, 255)" and toggled[0] != light[0] and toggled[1] != light[1]
    assert (seen.page.evaluate(colour), seen.page.evaluate(line)) == light
    dark = browsing.look(browser, out / "report.html", width=390, theme="dark")
    assert (dark.page.evaluate(colour), dark.page.evaluate(line)) == toggled
    wide = dark.page.evaluate("document.documentElement.scrollWidth")
    assert wide == 390 and dark.said == []
    dark.page.context.close()


@pytest.mark.slow
def test_hostile_names_are_names(browser: Any, hostile_out: Path) -> None:
    path = lcray.report(hostile_out)
    text = path.read_text()
    assert "<img src=x" not in text
    sight = browsing.look(browser, path)
    for section in ("layers", "heat-map", "trajectories", "shares", "splits"):
        sight.show(section)
    assert sight.said == [] and sight.asked == []
    assert sight.page.locator("img, i i, main b b").count() == 0
    names = [row[0] for row in sight.rows("layers")]
    assert names == [*HOSTILE]
    ticks = sight.page.locator("#layers .ytick text").all_text_contents()
    assert ticks[1].strip() == HOSTILE[1]
    assert all("<i>train</i>" in o for o in sight.page.locator("#bar option").all_inner_texts()[:1])
    legend = sight.page.locator("#trajectories .legendtext").all_text_contents()
    assert {HOSTILE[0], HOSTILE[1]} <= set(legend)
    for place in (".lede", "#layers .says"):  # the layer that helped most is named
        assert HOSTILE[0] in sight.page.locator(place).inner_text()
    missing = sight.page.locator(".absent li").all_inner_texts()
    assert any("Units" in line and "analyze with --units" in line for line in missing)
    assert any("Fisher" in line and "--fisher" in line for line in missing)
    assert sight.page.locator("#units .chart").count() == 0
    sight.page.context.close()


def test_the_same_output_gives_the_same_bytes(out: Path, tmp_path: Path) -> None:
    first = (out / "report.html").read_bytes()
    copy = shutil.copytree(out, tmp_path / "elsewhere" / "out")
    lcray.report(copy)
    assert (copy / "report.html").read_bytes() == first
    assert str(out.parent).encode() not in first


def test_the_command_line_says_where_the_page_is_and_its_links_lead_on(
    out: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "pages of mine.html"
    done = CliRunner().invoke(app, ["report", str(out), "--out", str(elsewhere)])
    assert done.output.splitlines()[-1] == elsewhere.resolve().as_uri()
    for path in (elsewhere, out / "report.html"):
        links = set(re.findall(r'href="([^"#]*\.parquet)"', path.read_text()))
        assert len(links) >= 7
        for link in links:
            assert (path.parent / link).resolve().is_file()
    for arguments in ([str(out), str(out)], ["--compare", str(out)]):
        assert CliRunner().invoke(app, ["report", *arguments]).exit_code == 2


def test_what_cannot_be_reported_is_one_line(out: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file"):
        lcray.report(tmp_path)
    with pytest.raises(UsageError, match="given twice"):
        lcray.report(out, out)
    torn = shutil.copytree(out, tmp_path / "torn", ignore=shutil.ignore_patterns("*.html"))
    (torn / "tables" / "layers.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(CorruptionError, match=r"layers\.parquet"):
        lcray.report(torn)
    assert not (torn / "report.html").exists()
    half = planting.write_output(tmp_path / "half", planting.make_world())
    with pytest.raises(OutputError, match="no tables yet"):
        lcray.report(half)


def test_without_plotly_there_is_a_word(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "lcray\[report\]"'):
        lcray.report(out)


@pytest.mark.slow
def test_printed_it_has_every_section_with_its_chart(seen: Sight, out: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    sight = browsing.look(seen.page.context.browser, out / "report.html", theme="dark")
    printed = pypdf.PdfReader(io.BytesIO(sight.page.pdf(prefer_css_page_size=True)))
    text = "".join(page.extract_text() for page in printed.pages)
    assert len(printed.pages) > 3
    flat = "".join(text.split())
    for section in SECTIONS:
        title = sight.page.locator(f"#{section} h2").inner_text()
        assert "".join(title.split()) in flat
    # The labels of axes are in the charts alone, and heat maps are pictures.
    for label in ("step", "density", "gradient", "LCsofar(loss)"):
        assert label in flat
    assert sum(len(page.images) for page in printed.pages) >= 3
    marks = ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image"
    for section in SECTIONS:
        assert sight.page.locator(f"#{section} .chart").locator(marks).count() > 0
    assert sight.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert sight.said == []
    sight.page.context.close()


@pytest.mark.slow
def test_runs_side_by_side(browser: Any, out: Path, plain_out: Path, tmp_path: Path) -> None:
    other = shutil.copytree(plain_out, tmp_path / "other")
    path = lcray.report(out, other, file=tmp_path / "both.html")
    sight = browsing.look(browser, path, width=390)
    for section in ("loss", "layers", "heat-map", "shares"):
        sight.show(section)
    assert sight.said == [] and sight.asked == []
    assert sight.page.evaluate("document.documentElement.scrollWidth") == 390
    rows = sight.rows("layers")
    for column, one in ((1, out), (2, other)):
        layers = lcray.open(one).layers()
        expected = by_layer(layers[layers["split"] == "train"])
        assert {row[0]: row[column] for row in rows} == pytest.approx(expected)
    sight.page.context.close()


@pytest.mark.slow
def test_a_thousand_intervals_of_sixty_layers_keep_to_the_size(
    browser: Any, tmp_path: Path
) -> None:
    out = planting_large.wide(tmp_path / "out", units=2)
    path = lcray.report(out)
    assert path.stat().st_size < 15e6
    sight = browsing.look(browser, path)
    first = lcray.open(out).plan.layers[0].name
    rows = [row for row in sight.rows("heat-map") if row[0] == first]
    expected = lcray.open(out).sql(
        f"SELECT lc FROM layers WHERE layer = '{first}' AND split = 'train' ORDER BY start_step"
    )
    assert [row[2] for row in rows] == pytest.approx(list(expected["lc"]), rel=1e-6)
    assert sight.said == []
    sight.page.context.close()


@pytest.mark.slow
def test_a_long_run_is_added_up_and_says_so(browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lc = {("train", name): rng.normal(-1e-4, 1e-3, (2500, 2)) for name in ("a", "b")}
    out = planting.from_elements(tmp_path / "out", lc, window=250)
    sight = browsing.look(browser, lcray.report(out))
    sight.show("heat-map")
    assert "adds up 3 of them" in sight.page.locator("#heat-map").inner_text()
    shown = [row[2] for row in sight.rows("heat-map") if row[0] == "a"]
    sums = np.add.reduceat(lc["train", "a"].sum(axis=1), np.arange(0, 2500, 3))
    assert shown == pytest.approx(list(sums), rel=1e-6)
    rows = sight.rows("loss")
    assert rows[-1][2] == pytest.approx(sum(v.sum() for v in lc.values()), rel=1e-6)
    sight.page.context.close()


def test_layers_hurt_where_their_bound_leaves_no_doubt() -> None:
    from types import SimpleNamespace

    from lcray.figures.html.layers import _hurting, _verdict

    source: Any = SimpleNamespace(layers=["a", "b", "c"])

    def said(*pairs: tuple[float, float]) -> str:
        return _hurting(source, *np.array(pairs).T)

    assert said((0.5, 0.1), (0.2, 0.3), (-1, 0.1)) == "a hurts in total, b within the bound."
    assert said((0.5, 0.1), (0.7, 0.2), (-1, 2)) == "b and a hurt in total."
    assert said((-0.5, 0.1), (0.2, 0.3), (-1, 0)) == "b ends above 0, within the bound."
    assert said((-0.5, 0.1), (-0.2, 0.1), (-1, 0)) == "no layer hurts in total."
    assert said((0.5, np.nan), (-0.2, np.nan), (-1, np.nan)) == "a hurts in total."
    pairs = [(0.5, 0.1), (0.5, 0.6), (-0.5, 0.1), (-0.5, 0.6), (0.0, 0.0), (0.5, np.nan)]
    words = ["hurts", "neither", "helps", "neither", "neither", "hurts"]
    assert [_verdict(lc, bound) for lc, bound in pairs] == words


def test_totals_have_bounds_and_the_head_says_what_lc_is(out: Path) -> None:
    """The whiskers are Σ lc_error; nothing of the page resamples a total."""
    from lcray.analyses.titles import WHAT_HAPPENED
    from lcray.figures.html.layers import run_totals
    from lcray.figures.html.layers import totals as section_of_totals
    from lcray.figures.html.source import read_source
    from lcray.figures.html.store import Store

    source = read_source(lcray.open(out))
    sums = lcray.open(out).sql("SELECT split, layer, sum(lc_error) AS e FROM layers GROUP BY ALL")
    sums = sums.set_index(["split", "layer"])["e"]
    lc, bound = run_totals(source)
    assert lc.shape == bound.shape == (len(source.splits), len(source.layers))
    for s, split in enumerate(source.splits):
        for k, layer in enumerate(source.layers):
            assert bound[s, k] == pytest.approx(sums[split, layer], rel=1e-12)
    store = Store()
    (figure, *_) = section_of_totals(source, store).figures.values()
    names = [column["name"] for column in figure.columns]
    assert names == ["layer", "lc", "lc_bound", "verdict", "elements"]
    assert figure.traces[0]["error_x"]["array"] == figure.columns[2]["values"]
    page = (out / "report.html").read_text()
    assert page.count(WHAT_HAPPENED) == 1 and "Whiskers are bounds" in page
