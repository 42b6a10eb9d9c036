"""Folders whose names mean something to other programs: every verb says what it says elsewhere.

DuckDB and Arrow take ``split=train`` in a path for a partition, and make a column of it; DuckDB
takes ``[1]`` and ``*`` for a pattern.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import planting
import pytest
import scenes
from click.testing import CliRunner
from repository import PACKAGE

import lcray
from lcray.cli.app import app
from lcray.errors import OutputError
from lcray.execution.driver.analyze import analyze
from lcray.storage import place, storage_of
from lcray.tables.reading.results import open_output

#: All at once: columns of every table, numbers and names, and patterns.
DEEP = "split=train/status=final/kind=a/seed=3/lc=1/layer=0.weight/window=2/start_step=7/g[1]*?"


def put(out: Path, to: Path) -> Path:
    shutil.copytree(out, to)
    return to


@pytest.fixture(scope="module")
def deep(plain_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(plain_out, tmp_path_factory.mktemp("paths") / DEEP / "out")


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    "name", ["split=train", "status=final", "kind=a", "seed=3", "lc=1", "layer=x/split=val", "n*"]
)
@pytest.mark.slow
def test_query_and_verify(plain_out: Path, tmp_path: Path, name: str) -> None:
    out = put(plain_out, tmp_path / name / "out")
    here, there = lcray.open(plain_out), lcray.open(out)
    for table in ("intervals", "layers", "histograms"):
        query = f"SELECT * FROM {table} ORDER BY ALL"
        assert there.sql(query).equals(here.sql(query)), table
        assert there.table(table).equals(here.table(table)), table
    assert lcray.verify(out) == lcray.verify(plain_out)


@pytest.mark.slow
def test_views(plain_out: Path, deep: Path) -> None:
    here, there = lcray.open(plain_out), lcray.open(deep)
    for name in here.contents()["name"]:
        query = f"SELECT * FROM {name} ORDER BY ALL"
        assert there.sql(query).equals(here.sql(query)), name
    assert there.confidence().equals(here.confidence())


@pytest.mark.parametrize("moved", [False, True])
def test_views_for_a_duckdb_of_ones_own(
    plain_out: Path, deep: Path, tmp_path: Path, moved: bool
) -> None:
    query = "SELECT split, count(*) AS n, sum(lc) AS lc FROM layers GROUP BY split ORDER BY split"
    out = put(deep, tmp_path / "split=val" / "a[b]") if moved else deep
    with duckdb.connect() as connection:
        if moved:
            connection.execute("SET VARIABLE lcray_out = $1", [str(out)])
        else:
            lcray.reduce(out)  # writes views.sql for where it is now
        connection.execute((out / "views.sql").read_text())
        found = connection.sql(query).df()
        assert connection.sql("SELECT count(*) FROM layer_totals").fetchall() == [(8,)]
    expected = lcray.open(plain_out).layers().groupby("split", observed=True)["lc"]
    found = found.set_index("split")
    assert dict(found["n"]) == dict(expected.size())
    assert dict(found["lc"]) == pytest.approx(dict(expected.sum()))


def test_compare(tmp_path: Path) -> None:
    outs = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        lc = {(split, "w"): rng.normal(size=(6, 3)) for split in ("train", "val")}
        outs.append(planting.from_elements(tmp_path / f"seed-{seed}", lc, window=3))
    moved = [put(out, tmp_path / "split=train" / "layer=w" / out.name) for out in outs]
    assert lcray.compare(*moved).equals(lcray.compare(*outs))


def test_reduce_status_and_export(plain_out: Path, deep: Path, tmp_path: Path) -> None:
    before = scenes.tables(plain_out)
    lcray.reduce(deep)
    assert scenes.tables(deep) == before
    here, there = lcray.status(plain_out), lcray.status(deep)
    assert (there.state, there.gaps) == (here.state, here.gaps)
    for out, folder in ((plain_out, "here"), (deep, "kind=there")):
        lcray.export(out, "csv", tmp_path / folder)
    files = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "kind=there").iterdir()} == files
    (events,) = lcray.export(deep, "tensorboard", tmp_path / "lc=1" / "events")
    assert events.stat().st_size > 1000


@pytest.mark.slow
def test_findings(plain_out: Path, deep: Path, tmp_path: Path) -> None:
    here, there = lcray.findings(put(plain_out, tmp_path / "out")), lcray.findings(deep)
    assert there.impossible == here.impossible
    assert {*there} == {*here} and len(here) > 5
    for name in here:
        assert there[name].equals(here[name]), name
        assert pd.read_parquet(deep / "findings" / f"{name}.parquet", partitioning=None).equals(
            here[name].to_pandas()
        )


@pytest.mark.slow
def test_report(plain_out: Path, deep: Path, tmp_path: Path) -> None:
    def page(out: Path, file: str) -> str:
        lcray.report(out, file=tmp_path / file)
        text = (tmp_path / file).read_text("utf-8")
        text = re.sub(r'<a href="[^"]*\.parquet">', "<a>", text)
        return text.replace(json.dumps(str(out))[1:-1], "OUT")

    assert page(deep, "there.html") == page(plain_out, "here.html")


@pytest.mark.slow
def test_inspect_analyze_and_repair(
    plain_run: Path, plain_out: Path, tmp_path: Path, inline: None
) -> None:
    folder, out = put(plain_run, tmp_path / DEEP / "run"), tmp_path / DEEP / "out"
    assert lcray.inspect(folder).findings == lcray.inspect(plain_run).findings
    assert "no problems" not in run("inspect", folder)
    plan = lcray.open(plain_out).plan
    analyze(folder, "scenes:plain", out, plan=plan)
    assert scenes.tables(out) == scenes.tables(plain_out)
    (damaged,) = (out / "shards" / plan.spans[1].name).glob("layers-*.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert not lcray.verify(out).ok
    analyze(folder, "scenes:plain", out, plan=plan, repair=True)
    assert scenes.tables(out) == scenes.tables(plain_out)
    assert lcray.verify(out, run=folder).problems == ()


@pytest.mark.slow
def test_an_output_on_s3(plain_out: Path, bucket: str) -> None:
    there, here = place(f"{bucket}/split=train/kind=a/g[1]/out"), lcray.open(plain_out)
    for path in (path for path in plain_out.rglob("*") if path.is_file()):
        target = there / path.relative_to(plain_out).as_posix()
        storage_of(target).write(target, path.read_bytes())
    results = open_output(there)
    query = "SELECT * FROM layers ORDER BY ALL"
    assert results.sql(query).equals(here.sql(query))
    assert results.layers().equals(here.layers())
    assert lcray.verify(there).problems == ()
    lcray.reduce(there)
    text = storage_of(there).read(there / "views.sql").decode()
    assert text.count("read_parquet(") == text.count("hive_partitioning = false") > 5


def test_a_path_that_is_not_utf8_is_one_line(plain_out: Path, tmp_path: Path) -> None:
    out = put(plain_out, Path(f"{tmp_path}/out-\udcff"))
    line = r"out-\\udcff: the path is not UTF-8, as DuckDB and Arrow need it; rename the folder"
    for read in (
        lambda: lcray.query(out, "SELECT 1"),
        lambda: lcray.findings(out),
        lambda: lcray.report(out),
        lambda: lcray.export(out, "csv", tmp_path / "csv"),
    ):
        with pytest.raises(OutputError, match=line):
            read()
    assert any("is not UTF-8" in problem for problem in lcray.verify(out).problems)


def test_nothing_of_the_package_reads_parquet_by_its_path_alone() -> None:
    """Of a path, DuckDB and Arrow make columns unless they are told not to."""
    calls = []
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text()
        for call in re.findall(r"read_parquet\([^\n]*|parquet_scan\([^\n]*", text):
            calls.append(call)
            assert "hive_partitioning = false" in call, f"{file.name}: {call}"
        for call in re.findall(r"read_table\(([^\n]*)", text):
            assert "partitioning=None" in call or call.startswith("source,"), f"{file.name}: {call}"
        assert "pyarrow.dataset" not in text, file.name
    assert len(calls) == 1, "all of them go through lcray.tables.reading.views.scan"


def test_the_docs_read_tables_so_too() -> None:
    root = PACKAGE.parent
    pages = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "examples").rglob("*.*")]
    for page in pages:
        if page.suffix in (".md", ".py", ".sql", ".ipynb"):
            for call in re.findall(r"read_parquet\([^\n]*", page.read_text()):
                assert re.search("hive_partitioning ?= ?false|partitioning=None", call), page
