"""Tables with the right checksums that hold what no analysis writes: one line from every verb."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planting
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lcray
from lcray.errors import CorruptionError, OutputError
from lcray.storage.files import encode_json, read_sealed, seal
from lcray.tables.reading.soundness import LONGEST_NAME, Soundness
from lcray.tables.schema import TABLES

WORLD = planting.make_world(bad={("val", 6): "nonfinite_loss"})
HUGE = 1 << 62


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.write_reduced(tmp_path_factory.mktemp("soundness") / "out", WORLD)


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def put(out: Path, table: str, rows: pa.Table, **options: Any) -> Path:
    """Writes the rows as a table of the output, with the right checksums."""
    path, manifest = out / "tables" / f"{table}.parquet", out / "tables" / "manifest.json"
    pq.write_table(rows, path, compression="zstd", **options)
    data = path.read_bytes()
    sealed = read_sealed(manifest)
    entry = {"rows": rows.num_rows, "bytes": len(data)}
    sealed["tables"][table] |= entry | {"sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_bytes(encode_json(seal(sealed)))
    return path


def changed(out: Path, table: str, column: str, value: Any, at: int = 1) -> pa.Table:
    """The rows of a table, one of them with another value."""
    rows = pq.ParquetFile(out / "tables" / f"{table}.parquet").read()
    values = rows.column(column).to_pylist()
    values[at] = value
    schema = TABLES[table].schema
    place = schema.get_field_index(column)
    field = schema.field(column)
    plain = pa.string() if pa.types.is_dictionary(field.type) else field.type
    array = pa.array(values, plain)
    array = array.dictionary_encode() if plain == pa.string() else array
    return rows.set_column(place, field, array.cast(field.type))


IMPOSSIBLE: list[tuple[str, str, Any]] = [
    ("layers", "start_step", HUGE),
    ("layers", "start_step", -5),
    ("layers", "start_step", 3),  # between two steps of the plan
    ("layers", "end_step", HUGE),
    ("layers", "layer", "none of the plan"),
    ("layers", "split", "none of the plan"),
    ("layers", "n_helping", -1),
    ("intervals", "start_step", HUGE),
    ("intervals", "end_step", -5),
    ("intervals", "split", "none of the plan"),
    ("histograms", "window", HUGE),
    ("histograms", "window", -5),
    ("histograms", "window", 2),  # no multiple of 4
    ("histograms", "bin", 10**6),
    ("histograms", "sign", 7),
    ("histograms", "count", -1),
    ("traces", "step", HUGE),
    ("traces", "index", 1 << 40),
    ("units", "unit", 5),
    ("groups", "group", 5000),
    ("fits", "window", -2),
    ("replicates", "replicate", 3),
    ("parameters", "index", -1),
    ("elements", "index", HUGE),
    ("fisher", "step", -5),
]


def verbs(out: Path, table: str, folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "frame": lambda: lcray.open(out).table(table),
        "arrow": lambda: lcray.open(out).arrow(table, columns=[TABLES[table].schema.names[-1]]),
        "query": lambda: lcray.query(out, "SELECT 1"),
        "csv": lambda: lcray.export(out, "csv", folder / "csv", tables=[table]),
        "findings": lambda: lcray.findings(out, only=["layer_totals"]),
        "report": lambda: lcray.report(out, file=folder / "report.html"),
        "tensorboard": lambda: lcray.export(out, "tensorboard", folder / "tensorboard"),
    }


@pytest.mark.parametrize(("table", "column", "value"), IMPOSSIBLE)
@pytest.mark.slow
def test_impossible_values_are_one_line(
    out: Path, tmp_path: Path, table: str, column: str, value: Any
) -> None:
    path = put(out, table, changed(out, table, column, value))
    shown = f"{column} {value!r}"
    for name, call in verbs(out, table, tmp_path).items():
        try:
            call()
        except OutputError as error:
            assert str(error).startswith(
                f"{path}: cannot be read ({shown}, which the plan does not"
            )
            assert "\n" not in str(error) and "run lcray reduce" in str(error)
        else:
            assert name in ("findings", "tensorboard"), f"{name} reads {table}"


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column", "value"), IMPOSSIBLE)
def test_all_findings_end_in_that_line(out: Path, table: str, column: str, value: Any) -> None:
    put(out, table, changed(out, table, column, value))
    with pytest.raises(OutputError, match="which the plan does not have"):
        lcray.findings(out)


@pytest.mark.parametrize("size", [20 << 20, LONGEST_NAME + 1, 5000])
def test_a_name_that_the_plan_lacks_is_never_unfolded(out: Path, tmp_path: Path, size: int) -> None:
    """20 MB in each of 48 rows would be a gigabyte; the file has a few kilobytes."""
    rows = changed(out, "layers", "layer", "x" * size)
    rows = pa.concat_tables([rows] * 20)
    path = put(out, "layers", rows, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 100_000
    began = time.monotonic()
    for name, call in verbs(out, "layers", tmp_path).items():
        if name != "tensorboard":  # which begins with other tables
            with pytest.raises(CorruptionError, match="cannot be read") as caught:
                call()
            assert len(str(caught.value)) < 1000
    problems = lcray.verify(out).problems
    assert problems and all(len(problem) < 2100 for problem in problems)
    if size > 1 << 20:
        assert any(
            "bytes of names in column 'layer', more than the plan has" in p for p in problems
        )
    assert time.monotonic() - began < 30


def test_a_footer_that_lies_about_sizes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes: the names themselves are looked at before any row has its own."""
    monkeypatch.setattr("lcray.tables.reading.soundness._SLACK", 1 << 30)
    put(out, "layers", changed(out, "layers", "layer", "x" * (1 << 20)))
    with pytest.raises(CorruptionError, match=r"layer 'x{100}', which the plan does not have"):
        lcray.open(out).sql("SELECT * FROM layers")
    assert [p for p in lcray.verify(out).problems if "a layer of 1,048,576 bytes; a name may" in p]


def test_a_plan_has_no_name_of_that_size_either(tmp_path: Path) -> None:
    lc = {("train", "x" * (LONGEST_NAME + 1)): np.ones((2, 1))}
    out = planting.from_elements(tmp_path / "out", lc, window=2)
    with pytest.raises(CorruptionError, match="a layer of 65,537 bytes; a name may have 65,536"):
        lcray.open(out).layers()


def test_large_tables_are_judged_by_their_statistics(
    sound: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_ROWS", "_NAMED_ROWS"):
        monkeypatch.setattr(f"lcray.tables.reading.soundness.{limit}", 0)
    for table in lcray.open(out).tables:
        assert len(lcray.open(out).table(table)) > 0
    for value in (HUGE, -5):
        put(out, "layers", changed(out, "layers", "start_step", value))
        with pytest.raises(CorruptionError, match=f"start_step {value}, which"):
            lcray.open(out).sql("SELECT * FROM layers")
    for name in ("zzz", "z" * 10_000):  # Parquet has no statistics of names that long
        shutil.copy(sound / "tables" / "layers.parquet", out / "tables")
        put(out, "layers", changed(out, "layers", "layer", name))
        with pytest.raises(CorruptionError, match=f"layer '{name[:3]}.*', which"):
            lcray.open(out).layers()


def test_without_statistics_the_columns_are_read(out: Path) -> None:
    put(out, "units", changed(out, "units", "unit", HUGE), write_statistics=False)
    with pytest.raises(CorruptionError, match=f"unit {HUGE}, which"):
        lcray.open(out).units()


def test_what_was_checked_is_not_checked_again_until_it_changes(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, checked = lcray.open(out), list[str]()
    plain = Soundness.check_sizes

    def watched(self: Soundness, metadata: Any, table: str) -> None:
        checked.append(table)
        plain(self, metadata, table)

    monkeypatch.setattr(Soundness, "check_sizes", watched)
    results.layers()
    results.layers()
    assert checked == ["layers"]
    put(out, "layers", changed(out, "layers", "start_step", -5))
    with pytest.raises(CorruptionError):
        results.layers()
