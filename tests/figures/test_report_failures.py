"""The report of outputs whose intervals have failed, in part or all; without a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import planting
import pytest
from click.testing import CliRunner

import lcray
from lcray.analyses.closure import closures
from lcray.cli.app import app
from lcray.errors import UsageError
from lcray.figures.html import along_the_run
from lcray.figures.html.comparison import compared
from lcray.figures.html.slider import windows
from lcray.figures.html.source import Source, read_source
from lcray.figures.html.store import Store
from lcray.figures.html.totals import cards, lede

LOSS = np.array([3.0, 2.5, 2.0, 1.0, 0.5])
GAP = 0.125  # of every interval but the third, whose gradient is not finite: it has no LC


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Source:
    plan = planting.make_plan({"a.weight": 4, "b.weight": 2}, 4, 2, ("train",))
    gap = np.array([[GAP, GAP, np.nan, GAP]])
    lc = np.diff(LOSS) + gap
    intervals = planting.interval_columns(plan, lc, gap)
    intervals |= {
        "loss_start": LOSS[:-1],
        "loss_end": LOSS[1:],
        "loss_change": np.diff(LOSS),
        "status": np.array(["ok", "ok", "nonfinite_gradient", "ok"], object),
    }
    shares = lc[..., None] * np.array([0.75, 0.25])
    layers = planting.layer_columns(plan, np.ones((1, 4, 2, 3), np.int64), shares)
    out = tmp_path_factory.mktemp("broken") / "out"
    return read_source(
        lcray.open(planting.write_tables(out, plan, {"intervals": intervals, "layers": layers}))
    )


def test_a_change_without_lc_is_not_held_against_lc(broken: Source) -> None:
    (found,) = closures(broken.results)
    assert found.loss_change == pytest.approx(-1.5)  # the whole loss fell by 2.5
    assert found.lc == pytest.approx(-1.5 + 3 * GAP) and found.gap == pytest.approx(3 * GAP)
    closure = broken.results.sql("SELECT loss_change, lc, gap FROM closure").iloc[0]
    assert [found.loss_change, found.lc, found.gap] == pytest.approx([*closure])
    assert "25" in cards(found)[2][1] and "over the intervals that have LC" in cards(found)[0][2]
    assert "fell from 3 to 0.5" in lede(broken, found)
    assert found.n_bad == 1


def test_the_reconstruction_misses_the_loss_by_the_gap_alone(broken: Source) -> None:
    measured, rebuilt, gap = along_the_run.loss_curves(broken)
    assert measured[0] == pytest.approx(LOSS)
    assert gap[0] == pytest.approx([0, GAP, 2 * GAP, 2 * GAP, 3 * GAP])
    assert rebuilt == pytest.approx(measured + gap)
    section = along_the_run.loss(broken, Store())
    assert "0.38, 25\N{NO-BREAK SPACE}% of its change" in section.says
    assert any("its measured change is used" in note for note in section.notes)


def test_windows_compare_what_can_be_compared(broken: Source) -> None:
    store = Store()
    for window in windows(broken, store):
        references = window["change"][0], window["total"][0]
        change, lc = (values(store, reference) for reference in references)
        assert np.nansum(change) == pytest.approx(-1.5)
        assert np.nansum(lc) == pytest.approx(-1.5 + 3 * GAP)


def values(store: Store, reference: dict) -> np.ndarray:
    import base64

    kind, text = store.arrays[reference["$"]]
    start, size = reference["at"]
    return np.frombuffer(base64.b64decode(text), "<" + kind)[start : start + size]


@pytest.mark.parametrize("splits", [("val", "train"), ("val",), ("train",)])
@pytest.mark.slow
def test_where_nothing_has_lc_the_page_says_so(splits: tuple[str, ...], tmp_path: Path) -> None:
    bad = {(split, step): "nonfinite_loss" for split in splits for step in range(0, 12, 2)}
    out = tmp_path / "out"
    planting.write_reduced(out, planting.make_world(bad=bad))  # its first split is val
    text = lcray.report(out).read_text()
    assert "intervals have no LC" in text
    assert ("No interval has LC on val" in text) == ("val" in splits)
    assert "nan" not in text.partition("<section id=settings")[0].rpartition("</style>")[2]


def test_runs_of_other_layers_do_not_agree_on_signs(tmp_path: Path) -> None:
    one, other = (
        planting.from_elements(tmp_path / name, {("train", name): -np.ones((2, 3))}, window=1)
        for name in ("a", "b")
    )
    page = compared([lcray.open(one), lcray.open(other)], tmp_path / "page.html").decode()
    assert "No layer is in all runs." in page and "the same sign" not in page


def test_no_page_and_no_answer_takes_the_place_of_an_outputs_own_files(tmp_path: Path) -> None:
    out = planting.from_elements(tmp_path / "out", {("train", "w"): -np.ones((2, 3))}, window=1)
    other = planting.from_elements(tmp_path / "b", {("train", "w"): -np.ones((2, 3))}, window=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(out)
    for name in ("out/analysis.json", "link/tables/layers.parquet", "out/shards/new/x.html"):
        with pytest.raises(UsageError, match=r"is part of the output .*name another file"):
            lcray.report(other, out, file=tmp_path / name)
        asked = ["query", str(out), "SELECT 1 AS a", "--format", "json", "--output"]
        done = CliRunner().invoke(app, [*asked, str(tmp_path / name)])
        assert isinstance(done.exception, UsageError)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    asked[-1:] = ["--output", str(out / "mine.json")]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert json.loads((out / "mine.json").read_text()) == [{"a": 1}]
    with pytest.raises(UsageError, match="given twice"):
        lcray.report(out, tmp_path / "link")


def test_runs_are_compared_on_the_same_split(tmp_path: Path) -> None:
    one, other = (
        planting.from_elements(tmp_path / name, {(name, "w"): -np.ones((2, 3))}, window=1)
        for name in ("train", "val")
    )
    with pytest.raises(UsageError, match=r"first splits differ \(train, val\)"):
        lcray.report(one, other)
