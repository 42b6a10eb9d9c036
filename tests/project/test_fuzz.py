"""Whatever a run, an output or a plan holds: it works, or an lcray error of one line says why.

In bounded time and memory, and without touching anything outside; see docs/security.md. Inputs
that found something are examples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import planting
import pytest
import torch
from benchmarks.peaks import forget_peak, peak_bytes
from fuzzing import (
    LONGEST,
    damaged,
    documents,
    inputs,
    is_line,
    json_files,
    nothing_outside,
    replaced,
    survives,
    text_of,
)
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

import lcray
from lcray.checkpoints import Recorder, open_series
from lcray.cli.status import status_text
from lcray.errors import CheckpointError
from lcray.execution.driver.analyze import load_plan
from lcray.storage import lock
from lcray.storage.files import encode_json, read_json, read_sealed, seal
from lcray.storage.lock import LOCK, Holder
from lcray.tables.output import Output
from lcray.tables.reading.results import open_output
from lcray.tables.reducing.reduce import reduce
from lcray.tables.verifying.verify import verify

pytestmark = pytest.mark.slow

PEAK = 400 << 20  # bytes of memory that all inputs of a target may add
WORLD = planting.make_world(spans=((0, 2, 4), (4, 6)))
TENSORS = {
    "fc.weight": torch.arange(6.0).view(2, 3),
    "fc.bias": torch.zeros(2, dtype=torch.float16),
    "n": torch.tensor(3),
    "mask": torch.tensor([True, False]),
}
FILE = save(TENSORS, {"lcray_names": "canonical"})
LENGTH = int.from_bytes(FILE[:8], "little")
HEADER, DATA = json.loads(FILE[8 : 8 + LENGTH]), FILE[8 + LENGTH :]
INDEX = {
    "metadata": {"total_size": 30},
    "weight_map": dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `run`, `sharded`, `out` and `plan.json` are, beside files that are no business."""
    home = tmp_path_factory.mktemp("fuzz")
    outside = home / "outside"
    outside.mkdir()
    (outside / "x.safetensors").write_bytes(FILE)
    (home / "run").mkdir()
    for step in (1, 2):
        (home / "run" / f"step-{step}.safetensors").write_bytes(FILE)
    sharded = home / "sharded" / "checkpoint-1"
    sharded.mkdir(parents=True)
    (sharded / "model-00001-of-00001.safetensors").write_bytes(FILE)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    out = home / "out"
    planting.write_output(out, WORLD)
    data = read_json(out / "analysis.json")
    data |= {"run": "run", "task": "m:t", "fingerprint": {"a": 1}, "versions": {"b": "2"}}
    (out / "analysis.json").write_bytes(encode_json(data | {"notes": ["a note"]}))
    reduce(out)
    (home / "plan.json").write_bytes(encode_json({"format_version": 2, "plan": data["plan"]}))
    with Recorder(torch.nn.Linear(3, 2), home / "recorded"):
        pass
    return home


@pytest.fixture(autouse=True)
def bounded(home: Path) -> Iterator[None]:
    """The memory of all inputs of a test, and what they may touch."""
    forget_peak()
    before = peak_bytes()
    with nothing_outside(home / "outside"):
        yield
    assert peak_bytes() - before <= PEAK


def framed(header: bytes, data: bytes = DATA) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.binary(max_size=80))
    if kind == 1:
        return draw(damaged(FILE))
    if kind == 2:
        length = draw(st.sampled_from([0, 1, 2, LENGTH - 1, LENGTH + 1, 2**31, 2**60, 2**64 - 1]))
        return length.to_bytes(8, "little") + FILE[8:]
    header = text_of(draw(documents(HEADER))).encode("utf-8", "surrogatepass")
    return framed(header + b" " * draw(st.integers(0, 3)))


CLAIM = {"w": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}}
AXES = {"w": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}
LONG = {"w": {"dtype": "F32", "shape": [2**63 - 1] * 300_000, "data_offsets": [0, 4]}}


def test_what_decides_here_can_fail() -> None:
    def fails(error: Exception) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    assert survives(lambda: None)
    assert not survives(fails(CheckpointError("torn")))
    for error in (KeyError("x"), RecursionError(), MemoryError()):
        with pytest.raises(type(error)):
            survives(fails(error))
    for message in ("", "a\nb", "\x1b[31m", "x" * (LONGEST + 1)):
        with pytest.raises(AssertionError):
            is_line(message)


@inputs(0.36)
@example(framed(json.dumps(CLAIM).encode()))
@example(framed(json.dumps(AXES).encode(), b"\0" * 4))
@example(framed(json.dumps(LONG).encode(), b"\0" * 4))
@given(safetensors_files())
def test_checkpoints(home: Path, content: bytes) -> None:
    with replaced(home / "run" / "step-2.safetensors", content):
        works = survives(lambda: open_series(home / "run").read(2))
        found = lcray.inspect(home / "run")
    assert works == (found.n_readable == 2)
    for finding in found.findings:
        is_line(finding.message)


@inputs(0.12)
@example(json.dumps({"weight_map": {"n": "../outside/x.safetensors"}}).encode())
@example(json.dumps({"weight_map": {"n": "a\nb.safetensors"}}).encode())
@given(json_files(INDEX))
def test_the_index_of_a_sharded_checkpoint(home: Path, content: bytes) -> None:
    run = home / "sharded"
    with replaced(run / "checkpoint-1" / "model.safetensors.index.json", content):
        survives(lambda: open_series(run, minimum=1).read(1))
        for finding in lcray.inspect(run).findings:
            is_line(finding.message)


RUN = {
    "format_version": 1,
    "ended": True,
    "every": 1,
    "layers": [
        {
            "name": "weight",
            "shape": [2, 3],
            "dtype": "float32",
            "kind": "parameter",
            "requires_grad": True,
        },
        {
            "name": "bias",
            "shape": [2],
            "dtype": "float32",
            "kind": "parameter",
            "requires_grad": True,
        },
    ],
    "aliases": {},
    "sessions": [{"start": 0, "every": 1, "versions": {}}],
    "last_step": 0,
}


@inputs(0.1)
@example(b"[" * 100_000)
@example(text_of(RUN | {"sessions": 3}).encode())
@given(json_files(RUN))
def test_the_description_of_a_run(home: Path, content: bytes) -> None:
    def resume() -> None:
        Recorder(torch.nn.Linear(3, 2), home / "recorded", start=0, overwrite=True).close()

    with replaced(home / "recorded" / "run.json", content):
        survives(resume)


@inputs(0.12)
@example(encode_json({"format_version": 2, "plan": WORLD.plan.to_dict() | {"x\ny": 1}}))
@given(json_files({"format_version": 2, "plan": WORLD.plan.to_dict()}))
def test_plan_files(home: Path, content: bytes) -> None:
    (home / "plan.json").write_bytes(content)
    survives(lambda: load_plan(home / "plan.json"))


ANALYSIS = {
    "format_version": 2,
    "run": "run",
    "task": "m:t",
    "fingerprint": {"a": 1},
    "versions": {"b": "2"},
    "notes": ["a note"],
    "plan": WORLD.plan.to_dict(),
}


def edited(**changes: Any) -> bytes:
    return text_of(ANALYSIS | {"plan": ANALYSIS["plan"] | changes}).encode()


@inputs(0.128)
@example(edited(spans=[["0", "2"]]))
@example(edited(spans=[[-4, 2]]))
@example(edited(spans=[]))
@example(text_of(ANALYSIS | {"notes": 3}).encode())
@given(json_files(ANALYSIS))
def test_analysis_json(home: Path, content: bytes) -> None:
    out = home / "out"
    with replaced(out / "analysis.json", content):
        survives(lambda: Output(out).existing())
        survives(lambda: repr(open_output(out)) + str(open_output(out).notes))


@inputs(0.006)
@example(edited(window="4); SELECT 1 --"))
@example(edited(trace_sample="1, (SELECT max(content) FROM read_text('/etc/passwd'))"))
@given(json_files(ANALYSIS))
def test_verifying_and_reducing_by_any_plan(home: Path, content: bytes) -> None:
    with replaced(home / "out" / "analysis.json", content), kept_tables(home / "out"):
        checked(home / "out")
        survives(lambda: reduce(home / "out", allow_missing=True))


@contextlib.contextmanager
def kept_tables(out: Path) -> Iterator[None]:
    before = {path: path.read_bytes() for path in (out / "tables").iterdir()}
    try:
        yield
    finally:
        for path in (out / "tables").iterdir():
            if path not in before:
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)


def checked(out: Path) -> bool:
    """`verify` raises nothing at all."""
    found = verify(out)
    for problem in found.problems:
        is_line(problem)
    return found.ok


STATUS = {
    "state": "running",
    **{"spans": 2, "spans_done": 1, "intervals": 3, "intervals_done": 2, "workers": 1},
    "running": [{"first": 4, "last": 6, "attempt": 2, "done": 0.5, "intervals": 1, "seconds": 2.5}],
    "failed": [{"first": 0, "last": 4, "reason": "why"}],
    **{"rate": 0.5, "seconds_left": 2.0},
    "gaps": {"train": {"loss_change": -1.0, "lc": -1.25}},
    **{"error": "", "written": "2026-01-01T00:00:00+00:00", "silent": False},
}


@inputs(0.02)
@example(text_of(STATUS | {"rate": 1e308, "seconds_left": 1e308}).encode())
@example(text_of(STATUS | {"written": "9999-12-31T23:59:59-23:59"}).encode())
@given(json_files(STATUS))
def test_what_a_driver_said(home: Path, content: bytes) -> None:
    path = home / "out" / "status.json"
    path.touch()
    with replaced(path, content):
        for line in status_text(lcray.status(home / "out")).splitlines():
            is_line(line)
    path.unlink()


@inputs(0.02)
@example(text_of(vars(Holder.this()) | {"pid": float("inf")}).encode())
@example(text_of(vars(Holder.this()) | {"pid": -1}).encode())
@given(json_files(vars(Holder.this())))
def test_locks(home: Path, content: bytes) -> None:
    folder = home / "locked"
    (folder / LOCK).mkdir(parents=True, exist_ok=True)
    path = folder / LOCK / "00000001.json"
    path.write_bytes(content)
    holder = lock._read(folder, 1)
    assert holder is not None and holder.is_dead in (True, False)
    is_line(str(lock._refusal(folder, holder)))


ENTRY = {"name": "layers-a0.parquet", "rows": 1, "bytes": 1, "sha256": "0" * 64}
COMMIT = {
    "format_version": 2,
    "span": [0, 2, 4],
    "attempt": "a0",
    "files": {"layers": ENTRY, "units": ENTRY | {"name": "units-a0.parquet"}},
    "checkpoints": {"0": "0" * 64},
    "info": {"seconds": 0.5},
}


@inputs(0.12)
@example(b'{"checksum": "", "info": NaN}')
@example(b'{"checksum": "", "info": "\\ud800"}')
@example(b'{"info": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(encode_json(seal(COMMIT | {"files": {"layers": ENTRY | {"name": "../x"}}})))
@given(json_files(COMMIT, sealed=True))
def test_commits(home: Path, content: bytes) -> None:
    from lcray.tables.shards.writer import check_files, read_commit

    out, span = home / "out", WORLD.plan.spans[0]

    def read() -> None:
        commit = read_commit(out, span)
        assert commit is not None
        for problem in check_files(out, commit):
            is_line(problem)

    with replaced(out / "shards" / span.name / "commit.json", content):
        survives(read)


MANIFEST = {
    "format_version": 2,
    "plan": "0" * 64,
    "spans": [span.name for span in WORLD.plan.spans],
    "tables": {
        "layers": {"name": "layers.parquet", "rows": 1, "bytes": 1, "sha256": "0" * 64},
        "intervals": {"name": "intervals.parquet", "rows": 1, "bytes": 1, "sha256": "0" * 64},
    },
}


@inputs(0.02)
@example(encode_json(seal(MANIFEST | {"spans": [[]]})))
@given(json_files(MANIFEST, sealed=True))
def test_manifests(home: Path, content: bytes) -> None:
    with replaced(home / "out" / "tables" / "manifest.json", content):
        survives(lambda: open_output(home / "out"))
        checked(home / "out")


TABLES = ("intervals", "layers", "histograms", "traces", "fits")


@inputs(0.02)
@given(st.data(), st.sampled_from(TABLES))
def test_tables(home: Path, data: st.DataObject, table: str) -> None:
    path = home / "out" / "tables" / f"{table}.parquet"
    content = data.draw(damaged(path.read_bytes()))
    results = open_output(home / "out")
    with replaced(path, content):
        survives(lambda: results.table(table))
        survives(lambda: results.sql(f"SELECT * FROM {table}"))


@inputs(0.003)
@given(st.data(), st.sampled_from(TABLES))
def test_tables_whose_checksum_is_right(home: Path, data: st.DataObject, table: str) -> None:
    tables = home / "out" / "tables"
    path = tables / f"{table}.parquet"
    content = data.draw(damaged(path.read_bytes()))
    manifest = read_sealed(tables / "manifest.json")
    manifest["tables"][table] |= entry_of(content)
    with replaced(tables / "manifest.json", encode_json(seal(manifest))), replaced(path, content):
        checked(home / "out")


@inputs(0.003)
@given(st.data(), st.sampled_from(planting.ALL))
def test_shards_whose_checksum_is_right(home: Path, data: st.DataObject, table: str) -> None:
    folder = home / "out" / "shards" / WORLD.plan.spans[0].name
    path = folder / f"{table}-a0.parquet"
    content = data.draw(damaged(path.read_bytes()))
    commit = read_sealed(folder / "commit.json")
    commit["files"][table] |= entry_of(content)
    with replaced(folder / "commit.json", encode_json(seal(commit))), replaced(path, content):
        with kept_tables(home / "out"):
            survives(lambda: reduce(home / "out"))
        checked(home / "out")


def entry_of(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
