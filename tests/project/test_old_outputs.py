"""What lcray 0.1.0 wrote stays readable, by every verb; so does what lacks columns that came later.

The fixtures are not made anew: see their README.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scenes
from safetensors.torch import load_file, save_file

import lcray
from lcray.analyses.comparison import compare
from lcray.analyses.registry import FINDINGS
from lcray.errors import OutputError
from lcray.storage.files import encode_json, read_json
from lcray.tables.reading.views import VIEWS
from lcray.tables.schema import TABLES

HERE = Path(__file__).parent.parent / "fixtures" / "v0.1.0"
WRITTEN = (
    "intervals", "layers", "units", "groups", "replicates", "replicate_layers", "histograms",
    "parameters", "traces", "fisher", "fits",
)  # fmt: skip
#: The columns that 0.1.0 did not write.
SINCE = {"intervals": ("lc_se", "gradient_cost"), "layers": ("lc_se",)}
OPTIONS: dict[str, Any] = {"fisher": 2, "samples": 8, "window": 2, "deterministic": False}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the fixtures: `run`, `out` and `task.py`."""
    return Path(shutil.copytree(HERE, tmp_path / "old"))


@pytest.fixture
def out(old: Path) -> Path:
    return old / "out"


def change(out: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = read_json(out / "analysis.json")
    edit(data)
    (out / "analysis.json").write_bytes(encode_json(data))


def made_here(data: dict[str, Any]) -> None:
    """As if by the libraries that there are here, on a processor that may round otherwise."""
    data["fingerprint"] |= {name: version(name) for name in ("torch", "numpy")}
    data["fingerprint"]["lcray"] = lcray.__version__
    data["plan"]["settings"]["deterministic"] = False


def rows(out: Path, table: str) -> list[dict[str, Any]]:
    """What a table's file holds, whatever lcray makes of it; null in columns that came later."""
    found: list[dict[str, Any]] = pq.read_table(out / "tables" / f"{table}.parquet").to_pylist()
    later = [c for c in TABLES[table].schema.names if c in SINCE.get(table, ())]
    return [dict.fromkeys(later) | row for row in found]


def test_they_are_old_and_small() -> None:
    """Else they would prove nothing."""
    record = read_json(HERE / "out" / "analysis.json")
    assert record["fingerprint"]["lcray"] == "0.1.0"
    assert not any("reference" in split for split in record["plan"]["splits"])
    commits = [json.loads(path.read_text()) for path in HERE.glob("out/shards/*/commit.json")]
    assert len(commits) == 2 and not any("stamps" in commit for commit in commits)
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 310_000


def test_opened_with_every_table(out: Path) -> None:
    results = lcray.open(out)
    assert results.tables == WRITTEN
    assert results.notes[0].startswith("split 'train': 8 of 12 samples")
    assert results.plan.splits[0].reference is None
    for name in WRITTEN:
        found = results.arrow(name)
        assert found.to_pylist() == rows(out, name)
        assert found.schema.equals(TABLES[name].schema)
        assert len(getattr(results, name)()) == len(found) > 0
    assert set(results.contents()["name"]) == {*WRITTEN, *(view.name for view in VIEWS)}
    assert len(results.confidence()) == 2 * (2 + 2)


def test_views_and_queries(out: Path) -> None:
    for view in VIEWS:
        assert lcray.query(out, f"FROM {view.name}").columns.tolist() == [*view.columns]
    totals = lcray.query(out, "SELECT lc, lc_bound FROM layer_totals")
    assert np.isfinite(totals["lc_bound"]).all()
    closure = lcray.query(out, "SELECT n_intervals, gap_percent FROM closure")
    assert (closure["n_intervals"] == 4).all() and (closure["gap_percent"].abs() < 1).all()


def test_findings_and_comparison(out: Path) -> None:
    found = lcray.findings(out)
    assert {*found, *found.impossible} == {finding.name for finding in FINDINGS}
    assert len(found) >= 8
    assert np.isfinite(found["layer_totals"]["lc_bound"].to_numpy()).all()
    assert compare(out).num_rows > 0


def test_verified_as_sound(old: Path) -> None:
    found = lcray.verify(old / "out", run=old / "run")
    assert found.problems == () and len(found.checks) > 20


def test_damage_is_still_found(out: Path) -> None:
    path = out / "tables" / "layers.parquet"
    pq.write_table(pq.read_table(path).drop_columns("lc_error"), path)
    assert not lcray.verify(out).ok
    with pytest.raises(OutputError, match="other columns than the table has"):
        lcray.open(out).layers()


def test_report_export_status_and_audit(old: Path, tmp_path: Path) -> None:
    out = old / "out"
    page = lcray.report(out)
    assert isinstance(page, Path) and "0.weight" in page.read_text()
    for kind in ("csv", "tensorboard", "wandb"):
        assert lcray.export(out, kind, tmp_path / kind)
    lines = (tmp_path / "csv" / "layers.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows(out, "layers"))
    found = lcray.status(out)
    assert (found.state, found.spans_done, found.intervals_done) == ("finished", 2, 4)
    audit = lcray.inspect(old / "run")
    assert audit.steps == (0, 1, 2, 3, 4) and audit.n_readable == 5


def test_reduced_to_the_same_numbers(out: Path) -> None:
    before = {name: rows(out, name) for name in WRITTEN}
    lcray.reduce(out)
    for name in WRITTEN:
        assert pq.read_schema(out / "tables" / f"{name}.parquet").equals(TABLES[name].schema)
        if name == "fits":
            keys = [{**row, "value": 0, "se": 0} for row in before[name]]
            assert [{**row, "value": 0, "se": 0} for row in rows(out, name)] == keys
            for column in ("value", "se"):
                pairs = zip(before[name], rows(out, name), strict=True)
                for one, two in pairs:
                    assert (one[column] is None) == (two[column] is None)
                    assert one[column] is None or two[column] == pytest.approx(one[column], 1e-5)
        else:
            assert rows(out, name) == before[name]
    assert lcray.verify(out).problems == ()


def analyze(old: Path, **options: Any) -> lcray.Results:
    resources = lcray.Resources(workers=1, threads=1)
    task = f"{old / 'task.py'}:task"
    return lcray.analyze(old / "run", task, old / "out", resources=resources, **OPTIONS, **options)


@pytest.mark.usefixtures("inline")
def test_resumed_with_nothing_to_do(old: Path) -> None:
    change(old / "out", made_here)
    before, files = scenes.commits(old / "out"), rows(old / "out", "layers")
    analyze(old, repair=True)
    assert scenes.commits(old / "out") == before, "nothing is computed anew"
    assert rows(old / "out", "layers") == files


@pytest.mark.usefixtures("inline")
def test_resumed_with_the_steps_that_the_run_has_gained(old: Path) -> None:
    change(old / "out", made_here)
    before = scenes.commits(old / "out")
    lengthen(old / "run")
    results = analyze(old)
    assert results.plan.steps == (0, 1, 2, 3, 4, 5, 6)
    assert before.items() <= scenes.commits(old / "out").items()
    assert lcray.verify(old / "out", run=old / "run").problems == ()


def lengthen(run: Path) -> None:
    """Two steps more, along the last one."""
    paths = [run / f"step-{step:08d}.safetensors" for step in range(3, 7)]
    a, b = (load_file(path) for path in paths[:2])
    for k, path in enumerate(paths[2:], 1):
        save_file({name: b[name] + k * (b[name] - a[name]) / 2 for name in b}, path)


@pytest.mark.usefixtures("inline")
def test_traced(old: Path) -> None:
    change(old / "out", made_here)
    resources = lcray.Resources(workers=1, threads=1)
    task = f"{old / 'task.py'}:task"
    found = lcray.trace(old / "run", task, old / "out", elements=["top:1"], resources=resources)
    assert found.tables == ("intervals", "layers", "traces")
    lc = lcray.open(old / "out").layers()["lc"].to_numpy()
    assert found.layers()["lc"].to_numpy() == pytest.approx(lc, rel=1e-4, abs=1e-7)


@pytest.mark.usefixtures("inline")
def test_other_libraries_are_refused_in_a_line(old: Path) -> None:
    """Two halves of an output by two versions of torch would be of no single analysis."""
    change(old / "out", made_here)
    change(old / "out", lambda data: data["fingerprint"].__setitem__("torch", "1.0"))
    with pytest.raises(OutputError) as caught:
        analyze(old)
    line = f"{old / 'out'}: holds another analysis (torch: '1.0' there, '{version('torch')}' now)"
    assert str(caught.value) == f"{line}; choose another --out, or ask for the same"


#: Columns of every type in every table, as a version to come may add them.
LATER = """
import lcray.tables.columns as columns

KINDS = {
    "late_float": columns.FLOAT, "late_single": columns._SINGLE, "late_count": columns.COUNT,
    "late_sign": columns.SIGN, "late_word": columns.STRING, "late_flag": columns.pa.bool_(),
}
for name in [name for name in vars(columns) if name.isupper()]:
    fields = getattr(columns, name)
    if isinstance(fields, tuple) and isinstance(fields[0], columns.pa.Field):
        more = [columns.column(c, k, "", "later", since="9.0") for c, k in KINDS.items()]
        setattr(columns, name, (*fields[:-1], *more[:3], fields[-1], *more[3:]))
"""

READ = """
import pathlib, shutil, sys
import pyarrow.compute as pc, pyarrow.parquet as pq, pytest
import lcray, scenes, test_old_outputs as old
from lcray.analyses.comparison import compare
from lcray.tables.schema import TABLES

folder = pathlib.Path(sys.argv[1])
out = folder / "out"

def check(lacks):
    results = lcray.open(out)
    for name in results.tables:
        found, plain = results.arrow(name), old.rows(out, name)
        assert found.schema.equals(TABLES[name].schema), name
        assert all(c in plain[0] for c in KINDS) is not lacks
        assert [{k: v for k, v in row.items() if k not in KINDS} for row in found.to_pylist()] == [
            {k: v for k, v in row.items() if k not in KINDS} for row in plain]
        assert all(found[c].null_count == len(found) == len(plain) > 0 for c in KINDS)
        only = results.arrow(name, columns=["late_word", "late_sign"])
        assert only.column_names == ["late_word", "late_sign"] and len(only) == len(plain)
        for column in KINDS:
            assert not len(results.arrow(name, filters=pc.field(column).is_valid()))
        frame = getattr(results, name)()
        assert list(frame.columns) == TABLES[name].schema.names and frame["late_flag"].isna().all()
        select = ", ".join(f"any_value(typeof({c})), count({c})" for c in KINDS)
        (types,) = lcray.query(out, f"SELECT {select} FROM {name}").to_numpy().tolist()
        assert types[::2] == ["DOUBLE", "FLOAT", "BIGINT", "TINYINT", "VARCHAR", "BOOLEAN"]
        assert types[1::2] == [0] * 6
    for view in old.VIEWS:
        assert len(lcray.query(out, f"FROM {view.name}").columns)
    assert len(lcray.findings(out)) >= 8
    assert lcray.verify(out, run=folder / "run").problems == ()
    assert lcray.report(out).stat().st_size
    for kind in ("csv", "tensorboard", "wandb"):
        assert lcray.export(out, kind, folder / kind)
    assert "late_float" in (folder / "csv" / "layers.csv").read_text().splitlines()[0]
    assert compare(out).num_rows
    assert lcray.status(out).state == "finished"

def views_file():
    import duckdb
    with duckdb.connect() as connection:
        connection.execute("SET VARIABLE lcray_out = ?", [str(out)])  # it has moved
        connection.execute((out / "views.sql").read_text())
        return connection.execute("SELECT count(*) FROM layers").fetchone()[0]

old.change(out, old.made_here)
lcray.verify(out)
shutil.rmtree(out / "findings", ignore_errors=True)
before = old.rows(out, "parameters"), views_file()
data = old.read_json(out / "analysis.json")
data["plan"]["settings"]["deterministic"] = True  # as the tables were reduced by
(out / "analysis.json").write_bytes(old.encode_json(data))
check(lacks=True)
lcray.reduce(out)
check(lacks=False)
after = [{k: v for k, v in r.items() if k not in KINDS} for r in old.rows(out, "parameters")]
assert (after, views_file()) == before
old.change(out, old.made_here)
old.lengthen(folder / "run")
with pytest.MonkeyPatch.context() as patch:
    scenes.work_inline(patch)
    results = old.analyze(folder)
assert results.plan.n_intervals == 6, "old shards and new ones make one table"
check(lacks=False)
print("done")
"""


def test_later_columns_are_null_in_old_files(old: Path) -> None:
    """In another process, whose lcray has six columns more in every table."""
    tests = [str(HERE.parent.parent), str(Path(__file__).parent)]
    path = os.pathsep.join([*tests, str(Path(lcray.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", LATER + READ, str(old)],
        env=scenes.python_environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("done"), done.stderr


def test_only_later_columns_may_lack() -> None:
    schema = TABLES["layers"]
    assert schema.absent(schema.schema) == ()
    for at in range(len(schema.schema)):
        less = schema.schema.remove(at)
        if schema.schema.names[at] in SINCE["layers"]:
            assert schema.absent(less) == (schema.schema.names[at],)
            continue
        with pytest.raises(ValueError, match="other columns"):
            schema.absent(less)
    with pytest.raises(ValueError, match="other columns"):
        schema.absent(schema.schema.append(pa.field("more", pa.int64())))
