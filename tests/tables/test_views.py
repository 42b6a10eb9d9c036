"""The ready-made views: what they hold, in the sandbox and in a DuckDB of one's own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import planting
import pytest
from repository import DOCS

import lcray
from lcray.errors import CorruptionError, UsageError
from lcray.tables.reading.results import Results, open_output
from lcray.tables.reading.views import VIEWS, write_views
from lcray.tables.reducing.reduce import reduce
from lcray.tables.schema import TABLES

WORLD = planting.with_a_gap()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.write_reduced(tmp_path_factory.mktemp("views") / "it's [an] out", WORLD)


@pytest.fixture(scope="module")
def results(out: Path) -> Results:
    return lcray.open(out)


def shell(out: Path, sql: str, **variables: str) -> pd.DataFrame:
    """What a fresh DuckDB says after reading views.sql."""
    with duckdb.connect() as connection:
        for name, value in variables.items():
            connection.execute(f"SET VARIABLE {name} = '{value}'")
        connection.execute((out / "views.sql").read_text())
        return connection.sql(sql).df()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_a_view_has_the_columns_it_says_and_is_the_same_in_both(
    view: Any, results: Results
) -> None:
    order = ", ".join(f'"{name}"' for name in view.columns)
    sql = f"SELECT * FROM {view.name} ORDER BY {order}"
    found = results.sql(sql)
    assert [*found.columns] == [*view.columns]
    assert len(found) or view.name == "hurting_layers"
    alone = shell(Path(str(results.path)), sql)
    assert [*map(tuple, found.astype(object).where(found.notna(), None).to_numpy())] == [
        *map(tuple, alone.astype(object).where(alone.notna(), None).to_numpy())
    ]


def test_no_view_is_called_as_a_table() -> None:
    assert not {view.name for view in VIEWS} & set(TABLES)
    assert len({view.name for view in VIEWS}) == len(VIEWS)


def test_views_hold_the_sums_of_the_tables(tmp_path: Path) -> None:
    results = lcray.open(planting.picture(tmp_path / "out"))
    layers, intervals = results.layers(), results.intervals()
    totals = results.sql("SELECT * FROM layer_totals").set_index(["split", "layer"])
    expected = layers.groupby(["split", "layer"], observed=True)["lc"].sum()
    for key, lc in expected.items():
        assert totals.loc[key, "lc"] == pytest.approx(lc)
        here = layers[(layers["split"] == key[0]) & (layers["layer"] == key[1])]
        share = here["n_helping"].sum() / (here["numel"].sum())
        assert totals.loc[key, "helping"] == pytest.approx(share)
    hurting = results.sql("SELECT split, layer FROM hurting_layers")
    assert {*hurting.itertuples(index=False, name=None)} == {
        k for k, v in expected.items() if v > 0
    }
    worst = results.sql("SELECT * FROM worst_intervals WHERE split = 'val'")
    mine = intervals[intervals["split"] == "val"]
    by_gap = mine.assign(size=mine["gap"].abs()).sort_values("size", ascending=False)
    assert worst["start_step"].tolist() == by_gap["start_step"].tolist()
    assert worst["rank"].tolist() == [*range(1, 11)]
    closure = results.sql("SELECT * FROM closure WHERE split = 'val'").iloc[0]
    assert closure["abs_gap_percent"] == pytest.approx(
        100 * mine["gap"].abs().sum() / mine["loss_change"].abs().sum()
    )
    assert closure["gap"] == pytest.approx(mine["lc"].sum() - mine["loss_change"].sum())
    both = results.sql("SELECT * FROM train_vs_rest").set_index("layer")
    assert both["other"].tolist() == ["val", "val"]
    for layer in ("b.weight", "a.weight"):
        difference = expected["val", layer] - expected["train", layer]
        assert both.loc[layer, "difference"] == pytest.approx(difference)
    units = results.sql("SELECT sum(lc) AS lc FROM unit_totals WHERE split = 'train'")["lc"][0]
    assert units == pytest.approx(expected["train", "b.weight"])


def test_what_has_no_lc_counts_nothing(results: Results) -> None:
    intervals = results.intervals()
    bad = intervals[(intervals["split"] == "val") & (intervals["status"] != "ok")]
    closure = results.sql("SELECT * FROM closure WHERE split = 'val'").iloc[0]
    assert closure["n_without_lc"] == len(bad) == 1
    assert closure["n_intervals"] == 5
    assert len(results.sql("SELECT * FROM shares WHERE split = 'val'")) == 5
    assert results.sql("SELECT min(n_intervals) AS n FROM train_vs_rest")["n"][0] == 5


def test_views_are_read_from_anywhere_and_after_a_move(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = shell(out, "SELECT sum(lc) AS lc FROM layers")["lc"][0]
    copy = tmp_path / "moved"
    shutil.copytree(out, copy)
    table = copy / "tables" / "layers.parquet"
    data = table.read_bytes()
    table.unlink()
    assert shell(copy, "SELECT sum(lc) AS lc FROM layers")["lc"][0] == here  # the old place
    with pytest.raises(duckdb.Error, match="No files found"):
        shell(copy, "FROM layers", lcray_out=str(copy))
    table.write_bytes(data)
    monkeypatch.chdir(copy)
    assert len(shell(copy, "FROM closure", lcray_out=".")) == 2


@pytest.mark.slow
def test_views_are_written_anew_and_verify_has_nothing_against_them(tmp_path: Path) -> None:
    path = planting.write_reduced(tmp_path / "out", WORLD)
    first = (path / "views.sql").read_text()
    (path / "views.sql").write_text("stale")
    assert open_output(path).sql("SELECT count(*) AS n FROM closure")["n"][0] == 2
    reduce(path)
    assert (path / "views.sql").read_text() == first
    assert not [p for p in lcray.verify(path).problems if "views" in p]
    (path / "views.sql").unlink()  # as outputs that an older lcray made
    assert len(open_output(path).sql("SELECT * FROM shares"))
    other = tmp_path / "other"
    other.write_text("mine")
    (path / "views.sql").symlink_to(other)
    with pytest.raises(CorruptionError, match="a link leads out"):
        write_views(path, open_output(path).plan, ("layers",))
    assert other.read_text() == "mine"


def test_names_of_splits_are_no_sql(tmp_path: Path) -> None:
    plan = planting.make_plan({"w": 2}, 2, 2, ("it's; --", "val"), ("layers",))
    columns = planting.layer_columns(plan, np.ones((2, 2, 1, 3), np.int64), np.ones((2, 2, 1)))
    results = lcray.open(planting.write_tables(tmp_path / "out", plan, {"layers": columns}))
    assert results.sql("SELECT other FROM train_vs_rest")["other"].tolist() == ["val"]


def test_a_view_without_its_table_says_what_would_give_it(tmp_path: Path) -> None:
    plan = planting.make_plan({"w": 2}, 2, 2, ("train",), ("layers",))
    columns = planting.layer_columns(plan, np.ones((1, 2, 1, 3), np.int64), np.ones((1, 2, 1)))
    out = planting.write_tables(tmp_path / "out", plan, {"layers": columns})
    results = lcray.open(out)
    with pytest.raises(UsageError, match="view 'class_layers' needs the table 'groups': give the"):
        results.sql("SELECT * FROM class_layers")
    assert results.contents()["name"].tolist() == [
        "layers",
        "layer_totals",
        "hurting_layers",
        "train_vs_rest",
    ]
    write_views(out, replace(plan), results.tables)
    assert len(shell(out, "FROM layer_totals")) == 1


def test_a_view_sees_no_more_than_a_query_may(results: Results) -> None:
    with pytest.raises(UsageError, match="exactly one SELECT"):
        results.sql("CREATE OR REPLACE VIEW closure AS SELECT 1")
    found = results.sql("WITH closure AS (SELECT 7 AS x) SELECT * FROM closure")
    assert found["x"].tolist() == [7], "one's own names come first"


def documented() -> str:
    """The list of views as docs/exports.md has it."""
    lines = ["| view | needs | a row for | columns |", "| --- | --- | --- | --- |"]
    for view in VIEWS:
        columns = ", ".join(f"`{name}`" for name in view.columns)
        lines.append(f"| `{view.name}` | `{view.tables[0]}` | {view.description} | {columns} |")
    return "\n".join(lines)


def test_every_view_is_documented() -> None:
    text = (DOCS / "exports.md").read_text()
    assert text.split("<!-- views -->\n")[1].split("\n<!-- /views -->")[0] == documented()
