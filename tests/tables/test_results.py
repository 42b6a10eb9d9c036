from __future__ import annotations

import os
from pathlib import Path

import duckdb
import pandas as pd
import planting
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from attacks import ATTACKS

from lcray.errors import CorruptionError, OutputError, UsageError
from lcray.storage.files import encode_json, read_sealed, seal
from lcray.tables.reading.recipes import RESERVED
from lcray.tables.reading.results import Results, open_output
from lcray.tables.reading.views import VIEWS
from lcray.tables.schema import TABLES as SCHEMAS
from lcray.tables.verifying.verify import verify
from lcray.tasks.layer import Layer

WORLD = planting.with_a_gap()
TABLES = [t for t in planting.ALL if t != "borders"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "o'ut"  # a quote must not end an SQL string
    planting.write_reduced(path, WORLD)
    return path


@pytest.fixture(scope="module")
def results(out: Path) -> Results:
    return open_output(out)


def plain(frame: pd.DataFrame) -> list[dict[str, object]]:
    """Rows with None for what is missing."""
    rows = frame.astype(object).to_dict("records")
    return [{k: None if pd.isna(v) else v for k, v in row.items()} for row in rows]


def approximately(row: dict[str, object], names: list[str]) -> dict[str, object]:
    values = {name: row.get(name) for name in names}
    return {
        k: pytest.approx(float(v), rel=1e-12, abs=1e-15)
        if hasattr(v, "__float__") and not isinstance(v, int)
        else v
        for k, v in values.items()
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_a_frame(results: Results, name: str) -> None:
    frame = getattr(results, name)()
    assert results.table(name).equals(frame)
    expected = planting.rows(WORLD, name)
    rows = plain(frame)
    assert len(rows) == len(expected) > 0
    for row, want in zip(rows, expected, strict=True):
        assert row == approximately(want, list(row))


def test_plan_and_path(results: Results, out: Path) -> None:
    assert results.plan == WORLD.plan
    assert results.path == out
    assert set(results.tables) == {*TABLES, "fits"}


def test_categories_are_in_the_plan_s_order(results: Results) -> None:
    frame = results.layers()
    names = ["b.weight", "b.mean", "a.bias", "scale"]
    assert list(frame["layer"].cat.categories) == names
    assert list(frame["split"].cat.categories) == ["val", "train"]
    assert list(frame["module"].cat.categories) == ["b", "a", ""]
    assert frame["layer"].cat.ordered
    assert frame.groupby("layer", observed=True)["lc"].sum().index.tolist() == names
    # also where a selection has only some of them
    assert list(results.units(layers="a*")["layer"].cat.categories) == names


def test_names_that_the_plan_does_not_have_are_not_lost(results: Results) -> None:
    """As in a table that was damaged: pandas would make them missing values."""
    names = pa.array(["train", "wal"]).dictionary_encode()
    frame = results._frame(pa.table({"split": names}))
    assert frame["split"].to_list() == ["train", "wal"]


def test_missing_integers_stay_integers(results: Results) -> None:
    assert results.parameters()["gradient_flips"].dtype == "Int64"
    assert results.intervals()["converged"].dtype == "boolean"
    assert results.intervals()["n_zero"].dtype == "int64"


@pytest.mark.parametrize(
    ("steps", "keep"),
    [
        ("4:8", lambda s: 4 <= s < 8),
        ("4:", lambda s: s >= 4),
        (":4", lambda s: s < 4),
        (":", lambda s: True),
        ("5:6", lambda s: False),
    ],
)
@pytest.mark.parametrize("name", ["intervals", "elements", "histograms", "traces"])
def test_steps_narrow(results: Results, name: str, steps: str, keep) -> None:
    column = {"histograms": "window", "traces": "step"}.get(name, "start_step")
    expected = [row[column] for row in planting.rows(WORLD, name) if keep(row[column])]
    assert results.table(name, steps=steps)[column].tolist() == expected


def test_steps_leave_the_whole_run_out(results: Results) -> None:
    assert -1 in set(results.fits()["window"])
    assert set(results.fits(steps=":5")["window"]) == {0, 4}


def test_layers_narrow(results: Results) -> None:
    frame = results.layers(layers="b.*", steps="2:4")
    assert frame["layer"].tolist() == ["b.weight", "b.mean"] * 2
    assert set(results.parameters(layers="scale")["layer"]) == {"scale"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.table("layer"), "did you mean 'layers'"),
        (lambda r: r.table("borders"), "unknown table 'borders'"),
        (lambda r: r.arrow("layers", columns=["lcc"]), "did you mean 'lc'"),
        (lambda r: r.layers(steps="4"), "give a range such as"),
        (lambda r: r.layers(steps="b:a"), "give a range such as"),
        (lambda r: r.layers(steps="٤:"), "give a range such as"),
        (lambda r: r.layers(steps="0:9223372036854775808"), r"steps end at 2\*\*63"),
        (lambda r: r.layers(steps="0:" + "9" * 5000), r"steps end at 2\*\*63"),
        (lambda r: r.histograms(steps="9" * 5000 + ":"), r"steps end at 2\*\*63"),
        (lambda r: r.layers(layers="scal"), "did you mean 'scale'"),
        (lambda r: r.table("intervals", layers="a*"), "has no layers"),
        (lambda r: r.table("parameters", steps="0:4"), "over the whole run"),
    ],
)
def test_what_cannot_be_asked(results: Results, call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call(results)
    assert "\n" not in str(caught.value)


def test_arrow_reads_columns_and_filters(results: Results) -> None:
    condition = (pc.field("lc") < 0) & (pc.field("start_step") == 2)
    table = results.arrow("layers", columns=["layer", "lc"], filters=condition, layers="b*")
    expected = [
        (row["layer"], row["lc"])
        for row in planting.rows(WORLD, "layers")
        if row["layer"][0] == "b" and row["start_step"] == 2 and row["lc"] < 0
    ]
    assert table.column_names == ["layer", "lc"]
    assert table.column("layer").to_pylist() == [layer for layer, _ in expected]
    assert table.column("lc").to_pylist() == pytest.approx([lc for _, lc in expected], rel=1e-12)
    assert 0 < len(expected) < 4
    assert pa.types.is_dictionary(table.schema.field("layer").type)


def test_sql_sees_the_tables(results: Results) -> None:
    frame = results.sql(
        "SELECT layer, sum(n_helping)::BIGINT AS n FROM layers WHERE split = 'val' "
        "GROUP BY layer ORDER BY layer"
    )
    expected: dict[str, int] = {}
    for row in planting.rows(WORLD, "layers"):
        if row["split"] == "val":
            expected[row["layer"]] = expected.get(row["layer"], 0) + row["n_helping"]
    assert dict(zip(frame["layer"], frame["n"], strict=True)) == expected
    for table in [*TABLES, "fits"]:
        count = results.sql_arrow(f"SELECT count(*) AS n FROM {table}").column("n").to_pylist()
        assert count == [len(results.table(table))]


def test_a_query_about_the_tables_sees_them_all(results: Results) -> None:
    """Whatever table it names, and however it names them."""
    sql = "SELECT table_name AS name FROM information_schema.tables WHERE table_name <> 'fits'"
    assert {*TABLES} - {"fits"} <= {*results.sql(sql)["name"]}
    put_together = "SELECT count(*) AS n FROM query('FROM lay' || 'ers') WHERE 'intervals' <> ''"
    assert results.sql(put_together)["n"].tolist() == [len(results.layers())]
    with pytest.raises(UsageError, match="layers"):
        results.sql("SELECT * FROM intervals JOIN layer USING (split)")


@pytest.mark.parametrize("attack", ATTACKS)
def test_sql_reaches_nothing_else(results: Results, out: Path, attack: str) -> None:
    secret = pd.DataFrame({"a": [1]})  # a variable of the caller's is no table
    link = out / "tables" / "link"
    if not link.is_symlink():
        os.symlink("/etc/passwd", link)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    query = attack.replace("{out}", str(out).replace("'", "''"))
    with pytest.raises(UsageError, match=r"^SQL: ") as caught:
        results.sql(query)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert len(secret) == 1


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("SELECT group FROM groups", "group"),
        ("SELECT lc FROM groups WHERE group = 3", "group"),
        ('SELECT "group" FROM groups GROUP BY ALL,', None),
        ("SELECT window FROM histograms", "window"),
        ("SELECT lc FROM histograms WHERE window=0", "window"),
        ("SELECT window, sum(count) FROM histograms GROUP BY window", "window"),
        ("SELECT Window, lc FROM histograms", "window"),
        ("SELECT sum(lc) OVER (PARTITION BY window) FROM histograms", "window"),
        ('SELECT "window" FROM histograms GROUP BY ALL,', None),
        ("SELECT sum(count) OVER w FROM histograms h WINDOW w AS (ORDER BY h.window) BY", None),
    ],
)
def test_a_column_that_is_a_word_of_sql_is_named_where_it_lacks_its_quotes(
    results: Results, query: str, word: str | None
) -> None:
    with pytest.raises(UsageError, match=r"^SQL: Parser Error") as caught:
        results.sql(query)
    told = f'; a column named {word} is written "{word}", in quotes'
    assert str(caught.value).endswith(told) == (word is not None)
    assert ("in quotes" in str(caught.value)) == (word is not None)


def test_every_column_that_is_a_word_of_sql_is_known() -> None:
    columns = {field.name for table in SCHEMAS.values() for field in table.schema}
    columns |= {column for view in VIEWS for column in view.columns}
    query = "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category = 'reserved'"
    reserved = {name for (name,) in duckdb.sql(query).fetchall()}
    assert columns & reserved == set(RESERVED)


def test_not_reduced_or_no_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file"):
        open_output(tmp_path)
    planting.write_analysis(tmp_path, WORLD.plan)
    with pytest.raises(OutputError, match=f"has no tables yet.*or lcray reduce {tmp_path}"):
        open_output(tmp_path)


@pytest.mark.parametrize("name", ["elements", "units", "groups", "traces", "intervals"])
def test_a_table_that_was_not_asked_for(tmp_path: Path, name: str) -> None:
    tables = tuple(t for t in planting.ALL if t != name)
    world = planting.make_world(tables=tables, spans=((0, 2),))
    planting.write_reduced(tmp_path, world)
    results = open_output(tmp_path)
    option = {"elements": "--elements", "units": "--units", "traces": "--parameters"}
    with pytest.raises(UsageError, match=rf"no table '{name}'.*{option.get(name, '')}"):
        results.table(name)


def test_a_table_file_that_is_gone_or_torn(tmp_path: Path) -> None:
    planting.write_reduced(tmp_path, planting.make_world(spans=((0, 2),)))
    results = open_output(tmp_path)
    path = tmp_path / "tables" / "layers.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptionError, match=r"layers\.parquet: cannot be read"):
        results.layers()
    with pytest.raises(CorruptionError, match=r"layers\.parquet: cannot be read"):
        results.sql("SELECT 1")
    path.unlink()
    with pytest.raises(CorruptionError, match="missing; run lcray reduce"):
        results.layers()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format_version": 3}, OutputError, "format version 3"),
        ({"tables": 3}, CorruptionError, "not a manifest"),
        ({"spans": None}, CorruptionError, "not a manifest"),
        ({"tables": {"layers": {"name": "x"}}}, CorruptionError, "not a manifest"),
        (
            {"tables": {"layers": {"name": "../x", "rows": 1, "bytes": 1, "sha256": ""}}},
            CorruptionError,
            "unknown tables",
        ),
    ],
)
def test_a_manifest_is_read_strictly(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    planting.write_reduced(tmp_path, planting.make_world(spans=((0, 2),)))
    path = tmp_path / "tables" / "manifest.json"
    path.write_bytes(encode_json(seal(read_sealed(path) | change)))
    with pytest.raises(error, match=message):
        open_output(tmp_path)


@pytest.mark.parametrize(("name", "near"), [("g[1]", "g1"), ("o*", "oo"), ("o?", "oo")])
def test_a_path_is_no_pattern(tmp_path: Path, name: str, near: str) -> None:
    mine, other = planting.make_world(seed=1), planting.make_world(seed=2)
    for folder, world in ((name, mine), (near, other)):
        planting.write_reduced(tmp_path / folder, world)
    found = open_output(tmp_path / name).sql("SELECT lc FROM layers")["lc"].tolist()
    expected = [row["lc"] for row in planting.rows(mine, "layers")]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert verify(tmp_path / name).problems == ()


def test_names_that_recur_are_numbered(results: Results) -> None:
    join = "FROM intervals a JOIN intervals b USING (split, start_step)"
    frame = results.sql(f"SELECT a.lc, b.lc {join}")
    assert list(frame) == ["lc", "lc_2"]
    assert len(frame) == len(results.intervals())
    assert frame["lc"].equals(frame["lc_2"])
    frame = results.sql("SELECT 1 AS x, 2 AS x, 3 AS x_2, 4 AS x")
    assert len(set(frame)) == 4
    assert frame.iloc[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "option"), [("elements", "--elements"), ("traces", "--parameters")]
)
def test_sql_on_a_table_that_was_not_written_names_the_option(
    tmp_path: Path, name: str, option: str
) -> None:
    tables = tuple(t for t in planting.ALL if t != name)
    planting.write_reduced(tmp_path, planting.make_world(tables=tables, spans=((0, 2),)))
    results = open_output(tmp_path)
    with pytest.raises(UsageError, match=f"^SQL: there is no table '{name}'.*{option}"):
        results.sql(f"SELECT * FROM {name}")
    with pytest.raises(UsageError, match="nonsense"):  # the name alone is no table
        results.sql(f"SELECT nonsense AS {name} FROM layers")


def test_a_layer_with_a_bracket_is_found_by_its_name(tmp_path: Path) -> None:
    layers = (
        Layer("a[0].w", "a[0]", "parameter", (2,), 0, True),
        Layer("a0.w", "a0", "parameter", (2,), 0, True),
    )
    world = planting.make_world(layers=layers, spans=((0, 2),))
    planting.write_reduced(tmp_path, world)
    results = open_output(tmp_path)
    assert set(results.layers(layers="a[0].w")["layer"]) == {"a[0].w", "a0.w"}
    assert set(results.layers(layers="a[[]0].w")["layer"]) == {"a[0].w"}


def test_the_repr_is_one_short_line(results: Results) -> None:
    text = repr(results)
    assert "\n" not in text and len(text) < 400
    assert text.startswith("Results(") and "intervals" in text
