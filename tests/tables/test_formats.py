"""`lcray query`: its forms, read back with other libraries."""

from __future__ import annotations

import csv
import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planting
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st

import lcray
from lcray.cli import query
from lcray.cli.app import app
from lcray.errors import UsageError
from lcray.tables.reading.formats import to_csv, write_csv

SQL = """SELECT 'a, "b"' || chr(10) || 'ü' AS text, 'nan'::DOUBLE AS n, 'inf'::DOUBLE AS i,
'-inf'::DOUBLE AS m, NULL::DOUBLE AS none, 9007199254740993 AS big, 0.1::DOUBLE + 0.2 AS x,
true AS yes, sum(n_helping) AS total, NULL::BIGINT AS no FROM layers"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.picture(tmp_path_factory.mktemp("answers") / "out")


def ask(*args: Any) -> Result:
    return CliRunner().invoke(app, ["query", *map(str, args)], catch_exceptions=False)


def total(out: Path) -> int:
    return int(lcray.open(out).layers()["n_helping"].sum())


def test_csv_keeps_what_there_is(out: Path) -> None:
    text = ask(out, SQL, "--format", "csv").stdout_bytes.decode()
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["text"] == 'a, "b"\nü'
    assert (row["n"], row["i"], row["m"], row["none"], row["no"]) == ("nan", "inf", "-inf", "", "")
    assert row["big"] == "9007199254740993"
    assert float(row["x"]) == 0.1 + 0.2
    assert row["yes"] == "true"
    assert row["total"] == str(total(out))
    frame = pd.read_csv(io.StringIO(text))
    assert frame["big"][0] == 9007199254740993
    assert frame["i"][0] == math.inf


def test_csv_has_no_formulas_and_numbers_keep_their_sign(tmp_path: Path) -> None:
    names = ("=cmd|' /C calc'!A0", "+1", "-1+2", "@SUM(1)", "\t=1", "\r=1", "fine=1", "'=1")
    shown = ("'=cmd|' /C calc'!A0", "'+1", "'-1+2", "'@SUM(1)", "'\t=1", "'\r=1", "fine=1", "'=1")
    lc = {("-split", name): np.full((2, 1), -0.25) for name in names}
    out = planting.from_elements(tmp_path / "out", lc, window=2)
    sql = """SELECT split, layer, lc, -1 AS n, '-inf'::DOUBLE AS i, -1.5::DECIMAL(4, 2) AS d
    FROM layers WHERE start_step = 0"""
    text = ask(out, sql, "--format", "csv").stdout_bytes.decode()
    rows = [*csv.DictReader(io.StringIO(text, newline=""))]
    assert [row["layer"] for row in rows] == [*shown]
    assert {(r["split"], r["lc"], r["n"], r["i"], r["d"]) for r in rows} == {
        ("'-split", "-0.25", "-1", "-inf", "-1.50")
    }
    assert ask(out, 'SELECT 1 AS "=A1"', "--format", "csv").stdout == "'=A1\n1\n"
    lcray.export(out, "csv", tmp_path / "csv", tables=["layers"])
    with (tmp_path / "csv" / "layers.csv").open(newline="") as file:
        exported = [*csv.DictReader(file)]
    assert {row["layer"] for row in exported} == {*shown}
    assert {row["lc"] for row in exported} == {"-0.25"}


NUMBERS = [0.0, -0.0, 1.0, -2.5, 5e-324, 9.99e-7, 1e-6, 1.5e-6, 1e-5, -3e-5, 1.25e-5, 1e-4]
NUMBERS += [1e10, 12345678901.5, 1e15, 123456789012345.6, 1e16, -1e22, 1.7976931348623157e308]


@given(st.lists(st.floats(width=64) | st.none(), min_size=1))
@example([*NUMBERS, *[-number for number in NUMBERS], math.nan, math.inf, -math.inf, None])
def test_csv_writes_numbers_as_python_does(numbers: list[float | None]) -> None:
    text = to_csv(pa.table({"a": pa.array(numbers, pa.float64()), "b": [1] * len(numbers)}))
    _, *lines = text.decode().splitlines()
    assert lines == [f"{'' if x is None else repr(x)},1" for x in numbers]


TEXTS = st.none() | st.text(st.sampled_from("ab=+-@\t\r\n,'\"ü "), max_size=4)


@given(st.lists(st.tuples(TEXTS, TEXTS, st.none() | st.booleans(), st.none() | st.decimals(-9, 9))))
@example([])
@example([(None, None, None, None)])
def test_csv_is_that_of_the_standard_library(rows: list[tuple[Any, ...]]) -> None:
    texts, names, flags, decimals = zip(*rows, strict=True) if rows else [()] * 4
    columns = {
        "=x": pa.array(texts, pa.string()),
        "y": pa.array(names, pa.string()).dictionary_encode(),
        "z": pa.array(flags, pa.bool_()),
        "d": pa.array([None if d is None else round(d, 3) for d in decimals], pa.decimal128(9, 3)),
        "l": pa.array([[1, 2]] * len(rows), pa.list_(pa.int8())),
    }

    def cell(value: Any) -> Any:
        formula = isinstance(value, str) and value[:1] in {*"=+-@\t\r"}
        return str(value).lower() if isinstance(value, bool) else f"'{value}" if formula else value

    for chosen in (list(columns), ["=x"], ["y"]):
        table = pa.table({name: columns[name] for name in chosen})
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\r\n")
        writer.writerow(map(cell, chosen))
        lines = [sink.getvalue()]
        for row in zip(*(columns[name].to_pylist() for name in chosen), strict=True):
            sink = io.StringIO()
            csv.writer(sink, lineterminator="\r\n").writerow(map(cell, row))
            lines.append(sink.getvalue())
        assert to_csv(table).decode() == "".join(line[:-2] + "\n" for line in lines)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_json_has_numbers_and_null(out: Path, form: str) -> None:
    text = ask(out, SQL, "--format", form).stdout
    found = json.loads(text, parse_constant=pytest.fail)
    row = found[0] if form == "json" else found
    assert row == {
        "text": 'a, "b"\nü',
        "n": None,
        "i": None,
        "m": None,
        "none": None,
        "big": 9007199254740993,
        "x": 0.1 + 0.2,
        "yes": True,
        "total": total(out),
        "no": None,
    }
    lines = ask(out, "SELECT * FROM layers", "--format", "jsonl").stdout.splitlines()
    assert len(lines) == len(lcray.open(out).layers())


def test_parquet_is_whole(out: Path, tmp_path: Path) -> None:
    data = ask(out, SQL, "--format", "parquet").stdout_bytes
    (row,) = pq.read_table(io.BytesIO(data)).to_pylist()
    assert row["big"] == 9007199254740993
    assert math.isnan(row["n"]) and row["i"] == math.inf and row["none"] is None
    file = tmp_path / "new" / "a.parquet"
    found = ask(out, "SELECT * FROM layers", "--format", "parquet", "--output", file)
    assert found.stdout == ""
    assert f"{file}: {file.stat().st_size:,} bytes" in found.stderr
    assert pq.read_table(file).num_rows == len(lcray.open(out).layers())


def test_parquet_is_not_for_a_terminal(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query.sys.stdout.__class__, "isatty", lambda _: True, raising=False)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(query.sys, "stdout", Terminal())
    assert query.query.callback is not None
    with pytest.raises(UsageError, match="binary: give --output FILE"):
        query.query.callback(str(out), "SELECT 1", "parquet", None)


def test_tables_say_what_they_leave_out_and_go_to_no_file(out: Path, tmp_path: Path) -> None:
    shown = ask(out, "SELECT * FROM units").stdout
    assert "50 of 60 rows" in shown
    with pytest.raises(UsageError, match="give --format csv"):
        ask(out, "SELECT 1", "--output", tmp_path / "a")


def test_columns_of_the_same_name_are_told_apart(out: Path) -> None:
    sql = "SELECT 1 AS a, 2 AS a"
    assert ask(out, sql, "--format", "csv").stdout == "a,a_2\n1,2\n"
    assert json.loads(ask(out, sql, "--format", "json").stdout) == [{"a": 1, "a_2": 2}]


def test_without_sql_tables_and_views_are_listed(out: Path) -> None:
    rows = json.loads(ask(out, "--format", "json").stdout)
    results = lcray.open(out)
    listed = {row["name"]: row for row in rows}
    assert [n for n, row in listed.items() if row["kind"] == "table"] == [*results.tables]
    for name in results.tables:
        assert listed[name]["rows"] == results.arrow(name).num_rows
    assert listed["closure"]["rows"] is None
    assert "closure" in ask(out).stdout
    assert ask(out, "SELECT 1 AS a WHERE false", "--format", "json").stdout == "[]\n"


@pytest.mark.parametrize("form", ["table", "csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "value", ["DATE '100000-01-01'", "INTERVAL 1 DAY", "union_value(k := 1)", "MAP {'a': 'nan'}"]
)
def test_types_without_a_place_are_one_line(out: Path, form: str, value: str) -> None:
    try:
        text = ask(out, f"SELECT {value} AS v", "--format", form).stdout_bytes
    except UsageError as error:
        assert form in str(error) or "pandas" in str(error)
        assert "CAST(x AS VARCHAR)" in str(error) and "\n" not in str(error)
        assert form != "parquet" or "DATE" not in value
    else:
        assert text
    cast = ask(out, f"SELECT ({value})::VARCHAR AS v", "--format", form)
    assert cast.exit_code == 0


def test_json_of_a_map_has_null_for_what_is_not_finite(out: Path) -> None:
    text = ask(out, "SELECT MAP {'a': 'nan'::DOUBLE, 'b': 0.5} AS m", "--format", "json").stdout
    assert json.loads(text) == [{"m": [["a", None], ["b", 0.5]]}]


@pytest.mark.slow
def test_long_names_are_written_a_few_rows_at_a_time() -> None:
    """Each row has a string of its own: 16,384 of a megabyte at once would be 16 GB."""
    names = pa.DictionaryArray.from_arrays(np.zeros(600, np.int32), ["x" * (1 << 20)])
    table = pa.table({"name": names, "n": np.arange(600)})
    held: list[int] = []

    class Sink(io.StringIO):
        def write(self, text: str) -> int:
            held.append(len(text))
            return len(text)

    tracemalloc.start()
    try:
        write_csv(table, Sink())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(held) == len("name,n\n") + 600 * ((1 << 20) + 2) + 10 + 90 * 2 + 500 * 3
    assert peak < 200 << 20  # all 600 of them would be 629 MB
