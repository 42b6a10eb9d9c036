"""Nothing in a run or an output executes: payloads that would leave a mark if unpickled."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import numpy as np
import planting
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attacks import Payload

import lcray
from lcray.errors import CheckpointError, CorruptionError, LcrayError
from lcray.storage import sha256_of
from lcray.storage.files import encode_json, read_sealed, seal
from lcray.tables.reading.results import open_output
from lcray.tables.reducing.reduce import reduce
from lcray.tables.verifying.verify import verify

WORLD = planting.make_world(spans=((0, 2, 4),))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def payload(mark: Path) -> bytes:
    """A pickle that works, as is shown here."""
    content = pickle.dumps(Payload(mark))
    pickle.loads(content)
    mark.rmdir()
    return content


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_a_run_of_pickles(tmp_path: Path, mark: Path, payload: bytes, suffix: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / f"step-1{suffix}").write_bytes(payload)
    torch.save({"weight": Payload(mark)}, run / f"step-2{suffix}")
    with pytest.raises(CheckpointError, match="pickled checkpoints, which are never opened"):
        lcray.inspect(run)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["step-1.safetensors", "model.safetensors.index.json", "run.json"])
def test_a_pickle_under_another_name(tmp_path: Path, mark: Path, payload: bytes, name: str) -> None:
    folder = tmp_path / "run" / ("checkpoint-1" if name.startswith("model") else "")
    folder.mkdir(parents=True)
    (folder / name).write_bytes(payload)
    torch.save({"weight": Payload(mark)}, folder / "optimizer.pt")
    for use in (
        lambda: lcray.inspect(tmp_path / "run"),
        lambda: lcray.Recorder(torch.nn.Linear(2, 2), tmp_path / "run", start=5).close(),
    ):
        with contextlib.suppress(LcrayError):
            use()
    assert not mark.exists()


def hostile_schema(payload: bytes, table: pa.Table) -> pa.Table:
    """The same columns, whose metadata ask for a pickled extension type and pandas objects."""
    fields = [
        field.with_metadata(
            {
                "ARROW:extension:name": "arrow.py_extension_type",
                "ARROW:extension:metadata": payload,
            }
        )
        for field in table.schema
    ]
    pandas = {
        "index_columns": ["lc"],
        "column_indexes": [{"name": None, "pandas_type": "object", "numpy_type": "object"}],
        "columns": [
            {"name": "lc", "pandas_type": "object", "numpy_type": "object", "metadata": None}
        ],
    }
    metadata = {**(table.schema.metadata or {}), b"pandas": encode_json(pandas)}
    return table.cast(pa.schema(fields, metadata=metadata))


@pytest.mark.parametrize("kind", ["extension", "object column"])
def test_a_table_with_python_objects(tmp_path: Path, mark: Path, payload: bytes, kind: str) -> None:
    out = planting.write_reduced(tmp_path / "out", WORLD)
    path = out / "tables" / "layers.parquet"
    table = pq.read_table(path)
    if kind == "extension":
        table = hostile_schema(payload, table)
    else:
        objects = np.array([payload] * table.num_rows, object)
        table = table.set_column(0, "split", pa.array(objects, pa.binary()))
    pq.write_table(table, path)
    _reseal(out, path, table.num_rows)
    results = open_output(out)
    for read in (results.layers, lambda: results.sql("SELECT * FROM layers")):
        try:
            frame = read()
            assert all(isinstance(value, float) for value in frame["lc"].dropna())
        except CorruptionError as error:
            assert "\n" not in str(error)
    assert isinstance(verify(out).problems, tuple)
    assert not mark.exists()


def test_a_shard_with_python_objects(tmp_path: Path, mark: Path, payload: bytes) -> None:
    out = planting.write_output(tmp_path / "out", WORLD)
    folder = out / "shards" / WORLD.plan.spans[0].name
    path = folder / "layers-a0.parquet"
    table = hostile_schema(payload, pq.read_table(path))
    pq.write_table(table, path)
    commit = read_sealed(folder / "commit.json")
    commit["files"]["layers"] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / "commit.json").write_bytes(encode_json(seal(commit)))
    with pytest.raises(CorruptionError):  # it also lacks the list of its partitions
        reduce(out)
    assert not mark.exists()


def _reseal(out: Path, path: Path, rows: int) -> None:
    manifest = read_sealed(out / "tables" / "manifest.json")
    entry = {"rows": rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["tables"]["layers"] |= entry
    (out / "tables" / "manifest.json").write_bytes(encode_json(seal(manifest)))


def test_an_array_of_objects_in_the_place_of_json(tmp_path: Path, mark: Path) -> None:
    out = planting.write_reduced(tmp_path / "out", WORLD)
    array = np.empty(1, object)
    array[0] = Payload(mark)
    for name in ("analysis.json", "tables/manifest.json"):
        before = (out / name).read_bytes()
        with open(out / name, "wb") as file:
            np.save(file, array, allow_pickle=True)
        with pytest.raises(CorruptionError, match="not valid JSON"):
            open_output(out)
        (out / name).write_bytes(before)
    assert not mark.exists()
