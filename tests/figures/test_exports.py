"""Exports, read back with the tools they are for."""

from __future__ import annotations

import csv
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import lcray
from lcray.cli.app import app
from lcray.errors import LcrayError, UsageError
from lcray.figures.exports.tensorboard_events import buckets
from lcray.tables.reading.results import Results


def test_tensorboard_reads_scalars_and_histograms(results: Results, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = lcray.export(results.path, "tensorboard", tmp_path / "logs")
    assert file.name.endswith(".lcray")
    events = EventAccumulator(str(tmp_path / "logs"), {"scalars": 0, "histograms": 0})
    events.Reload()
    intervals, layers = results.intervals(), results.layers()
    for split in ("train", "val"):
        mine = intervals[intervals["split"] == split]
        for name, column in (("loss", "loss_end"), ("lc", "lc"), ("gap", "gap")):
            found = events.Scalars(f"lcray/{split}/{name}")
            assert [event.step for event in found] == mine["end_step"].tolist()
            values = [event.value for event in found]
            assert values == pytest.approx(mine[column].tolist(), rel=1e-6)  # float32
        here = layers[(layers["split"] == split) & (layers["layer"] == "a.weight")]
        found = events.Scalars(f"lcray/{split}/layers/a.weight")
        assert [e.value for e in found] == pytest.approx(here["lc"].tolist(), rel=1e-6)
    counted = results.sql("""SELECT "window", sum(count) AS n, sum(sign * sum) AS total
        FROM histograms WHERE split = 'val' AND layer = 'b.weight' GROUP BY ALL ORDER BY ALL""")
    found = events.Histograms("lcray/val/histograms/b.weight")
    assert [event.step for event in found] == [5, 10]
    for event, row in zip(found, counted.itertuples(), strict=True):
        value = event.histogram_value
        assert value.num == sum(value.bucket) == row.n
        assert value.sum == pytest.approx(row.total)
        assert value.bucket_limit == sorted(value.bucket_limit)


def test_every_bin_is_a_bucket(results: Results) -> None:
    rows = results.histograms(layers="a.weight", steps="0:5")
    rows = rows[rows["split"] == "train"]
    found = buckets(rows)
    edges = dict(zip(found["bucket_limit"], found["bucket"], strict=True))
    for row in rows.itertuples():
        right = -row.lower if row.sign < 0 else row.upper
        assert edges[right] == row.count
    assert sum(found["bucket"]) == rows["count"].sum()


def test_zeros_share_a_bucket_with_nothing_else() -> None:
    tiny = 2.0**-1022
    rows = pd.DataFrame(
        {
            "sign": [-1, 0, 1],
            "lower": [1.0, 0.0, 2.0],
            "upper": [1.125, tiny, 2.25],
            "count": [3, 4, 5],
            "sum": [3.1, 0.0, 10.5],
        }
    )
    found = buckets(rows)
    assert found["bucket_limit"] == [-1.125, -1.0, 0.0, tiny, 2.0, 2.25]
    assert found["bucket"] == [0, 3, 0, 4, 0, 5]
    assert (found["num"], found["min"], found["max"]) == (12, -1.125, 2.25)
    assert found["sum"] == pytest.approx(7.4)


def test_csv_has_every_row_and_its_units(results: Results, tmp_path: Path) -> None:
    written = lcray.export(results.path, "csv", tmp_path / "csv")
    assert {path.name for path in written} == {
        "columns.json",
        *(f"{table}.csv" for table in results.tables),
    }
    with (tmp_path / "csv" / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    frame = results.layers()
    assert [float(row["lc"]) for row in rows] == frame["lc"].tolist()
    assert [row["layer"] for row in rows] == frame["layer"].tolist()
    assert rows[0]["first_order_lc"] == ""
    about = json.loads((tmp_path / "csv" / "columns.json").read_text())
    assert about["layers"]["lc"]["unit"] == "loss"
    assert about["layers"]["layer"]["type"] == "string"


def test_the_command_writes_chosen_tables(results: Results, tmp_path: Path) -> None:
    args = ["export", str(results.path), "--to", "csv", "--out", str(tmp_path), "--table", "units"]
    found = CliRunner().invoke(app, args, catch_exceptions=False)
    assert found.output.split() == [str(tmp_path / "units.csv"), str(tmp_path / "columns.json")]
    with pytest.raises(UsageError, match="did you mean 'units'"):
        lcray.export(results.path, "csv", tmp_path, tables=["unit"])
    with pytest.raises(UsageError, match="chosen for csv"):
        lcray.export(results.path, "wandb", tmp_path, tables=["units"])
    with pytest.raises(UsageError, match="unknown export 'tensorbord': did you"):
        lcray.export(results.path, "tensorbord", tmp_path)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_without_its_package_an_export_names_the_extra(
    results: Results, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == kind]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(LcrayError, match=rf"lcray\[{kind}\]"):
        lcray.export(results.path, kind, tmp_path)


def records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log after a header of 7 bytes."""
    at, held = 7, b""
    while at + 7 <= len(data):
        left = (1 << 15) - at % (1 << 15)
        if left < 7:  # no header fits: the block is padded
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return  # the rest is not written yet
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_runs_offline(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name))
    (run,) = lcray.export(results.path, "wandb", tmp_path / "runs")
    assert run.name.startswith("offline-run-")
    (file,) = run.glob("*.wandb")
    deadline, found = time.monotonic() + 60, list[Record]()
    while not (found and found[-1].HasField("exit")):  # wandb's own process writes on for a while
        assert time.monotonic() < deadline
        found = [Record.FromString(data) for data in records(file.read_bytes())]
    history = [
        {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    intervals = results.intervals()
    mine = intervals[intervals["split"] == "val"].set_index("end_step")
    curve = {json.loads(r["step"]): json.loads(r["val/lc"]) for r in history if "val/lc" in r}
    assert curve == pytest.approx(mine["lc"].to_dict())
    keys = {key for row in history for key in row if not key.startswith("_")}
    assert len(keys) <= 1 + 2 * 4 + 3 + 2 * 2, "a few panels"
    (table,) = run.rglob("layer_totals*.table.json")
    stored = json.loads(table.read_text())
    lc = {tuple(row[:2]): row[stored["columns"].index("lc")] for row in stored["data"]}
    expected = results.layers().groupby(["split", "layer"], observed=True)["lc"].sum()
    assert lc == pytest.approx(expected.to_dict())
    assert np.isfinite(list(lc.values())).all()


def test_an_address_is_no_folder(results: Results, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="goes to a local folder"):
        lcray.export(results.path, "csv", "s3://bucket/tables")
    assert [*tmp_path.iterdir()] == []


def test_csv_replaces_links_and_leaves_no_halves(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "layers.csv").symlink_to(tmp_path / "victim")
    lcray.export(results.path, "csv", tmp_path / "csv", tables=["layers"])
    assert (tmp_path / "victim").read_text() == "mine"
    before = (tmp_path / "csv" / "layers.csv").read_bytes()
    assert before.startswith(b"split,")

    def full(table: object, file: Any) -> None:
        file.write("half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lcray.figures.exports.csv_files.write_csv", full)
    with pytest.raises((OSError, LcrayError)):
        lcray.export(results.path, "csv", tmp_path / "csv", tables=["layers"])
    assert (tmp_path / "csv" / "layers.csv").read_bytes() == before
    assert {p.name for p in (tmp_path / "csv").iterdir()} == {"layers.csv", "columns.json"}


def test_csv_does_not_go_among_the_tables_of_the_output(results: Results) -> None:
    with pytest.raises(UsageError, match="part of the output"):
        lcray.export(results.path, "csv", Path(str(results.path)) / "tables")
