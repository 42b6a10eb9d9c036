"""Runs and outputs on object storage: the same bytes as on a disk, whatever the network does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import object_server
import pytest
import scenes
from attacks import ATTACKS
from click.testing import CliRunner
from object_server import KEY_ID, SECRET, Proxy, objects
from repository import TESTS
from safetensors.torch import load_file, save_file

import lcray
from lcray.checkpoints import open_series
from lcray.cli.app import app
from lcray.errors import (
    CheckpointError,
    CorruptionError,
    IncompleteError,
    LcrayError,
    OutputError,
    RecorderError,
    UsageError,
)
from lcray.storage import Place, place, storage_of
from lcray.storage.files import encode_json, read_sealed, seal
from lcray.tables.reading.results import open_output
from lcray.tables.reducing.reduce import reduce
from lcray.tables.shards.commit import each_commit
from lcray.tables.shards.writer import remove_strays
from lcray.tables.verifying.verify import verify

pytestmark = pytest.mark.usefixtures("inline")


def copy(folder: Path, to: str) -> str:
    """Every file of a local folder, as objects."""
    for path in folder.rglob("*"):
        if path.is_file():
            storage_of(place(to)).write(
                place(to) / path.relative_to(folder).as_posix(), path.read_bytes()
            )
    return to


def tables(out: Place | str) -> dict[str, bytes]:
    folder = place(out) / "tables"
    storage = storage_of(folder)
    return {item.name: storage.read(folder / item.name) for item in storage.find(folder)}


def edit(file: Place, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a sealed file, and seals it anew."""
    data = read_sealed(file)
    change(data)
    storage_of(file).write(file, encode_json(seal(data)))


@pytest.fixture
def base() -> str:
    """Where a run and an output may go: fsspec's memory, which keeps the contract as S3 does."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def out(plain_out: Path) -> str:
    """The undisturbed analysis of the plain run. Read only."""
    return copy(plain_out, f"memory://{uuid.uuid4().hex}/out")


@pytest.mark.slow
def test_an_analysis_gives_the_tables_of_a_local_one(
    plain_run: Path, plain_out: Path, bucket: str
) -> None:
    run, out = copy(plain_run, f"{bucket}/run"), f"{bucket}/out"
    plan = lcray.open(plain_out).plan
    results = lcray.analyze(run, "scenes:plain", out, plan=plan)
    assert tables(out) == scenes.tables(plain_out)
    assert str(results.path) == out
    assert verify(out, run=run).problems == ()
    # Again: nothing is left to do, and nothing changes.
    lcray.analyze(run, "scenes:plain", out, plan=plan)
    assert tables(out) == scenes.tables(plain_out)


@pytest.mark.slow
def test_a_network_that_throttles_and_drops_changes_nothing(
    plain_run: Path, plain_out: Path, s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(plain_run, f"{bucket}/run")
    count = 0

    def fate(method: str, path: str) -> str:
        nonlocal count
        count += 1
        if path.endswith("commit.json") and method == "PUT" and count % 2:
            return "lose"
        return {7: "throttle", 3: "drop" if method == "GET" else "throttle"}.get(count % 23, "pass")

    monkeypatch.setattr("lcray.storage.retries._FIRST", 0.01)
    with Proxy(s3_endpoint, fate).running() as proxy, object_server.using(proxy.address):
        plan = lcray.open(plain_out).plan
        lcray.analyze(run, "scenes:plain", f"{bucket}/out", plan=plan)
        assert min(proxy.fates(what) for what in ("throttle", "drop", "lose")) >= 1
    assert tables(f"{bucket}/out") == scenes.tables(plain_out)
    assert verify(f"{bucket}/out").ok


def test_what_is_committed_is_not_computed_again_and_strays_go(
    plain_run: Path, plain_out: Path, base: str
) -> None:
    run, out = copy(plain_run, f"{base}/run"), place(copy(plain_out, f"{base}/out"))
    spans = lcray.open(plain_out).plan.spans
    storage, shards = storage_of(out), out / "shards"
    storage.delete([shards / spans[1].name / "commit.json"])
    for span in spans[:2]:
        storage.write(shards / span.name / "layers-killed.parquet", b"of a killed attempt")
    with pytest.raises(IncompleteError, match="3 of 12 intervals are missing: steps 3-6"):
        reduce(out)
    told = scenes.Told()
    lcray.analyze(run, "scenes:plain", out, span_length=3, elements=True, on_progress=told)
    assert told.counts == [9, 12]
    assert tables(out) == scenes.tables(plain_out)
    commits = dict(each_commit(out, spans))
    named = {f"shards/{s.name}/{e.name}" for s, c in commits.items() for e in c.files.values()}
    there = {item.name for item in storage.find(out) if item.name.endswith(".parquet")}
    assert {name for name in there if name.startswith("shards/")} == named
    assert remove_strays(out, spans) == []


def test_the_loser_of_a_race_removes_its_own_files(plain_out: Path, base: str) -> None:
    from lcray.tables.schema import TABLES
    from lcray.tables.shards.writer import ShardWriter

    out, span = place(f"{base}/out"), lcray.open(plain_out).plan.spans[0]
    writers = [ShardWriter(out, span, attempt) for attempt in ("a", "b")]
    for writer in writers:
        writer.write("layers", TABLES["layers"].schema.empty_table())
    won = [writer.commit(checkpoints={}, info={"who": w}) for w, writer in enumerate(writers)]
    assert won == [True, False]
    names = [item.name for item in storage_of(out).find(out)]
    assert names == [f"shards/{span.name}/commit.json", f"shards/{span.name}/layers-a.parquet"]


def test_results_are_those_of_a_local_output(out: str, plain_out: Path) -> None:
    here, there = open_output(plain_out), open_output(out)
    assert there.tables == here.tables
    for table in here.tables:
        assert there.arrow(table).equals(here.arrow(table))
    steps = {"steps": "3:6", "layers": "0.*"}
    assert there.layers(**steps).equals(here.layers(**steps))
    sql = "SELECT layer, sum(lc) AS lc FROM layers GROUP BY layer ORDER BY layer"
    assert there.sql(sql).equals(here.sql(sql))
    assert verify(out).ok


@pytest.mark.parametrize("attack", [*ATTACKS, "SELECT * FROM read_parquet('{remote}/*.parquet')"])
def test_sql_reaches_nothing_else(out: str, tmp_path: Path, attack: str) -> None:
    query = attack.replace("{out}", str(tmp_path)).replace("{remote}", f"{out}/tables")
    with pytest.raises(UsageError, match=r"^SQL: ") as caught:
        open_output(out).sql(query)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_sql_on_more_than_the_cache_holds_is_refused_and_frames_are_not(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCRAY_CACHE_GIB", "0.000001")
    with pytest.raises(OutputError, match="set LCRAY_CACHE_GIB higher"):
        open_output(out).sql("SELECT * FROM layers")
    assert len(open_output(out).layers()) > 0


@pytest.mark.parametrize(
    "name", ["../x.parquet", "/etc/passwd", "s3://other/x", "layers-b.parquet"]
)
@pytest.mark.parametrize("where", ["local", "memory"])
def test_paths_in_manifests_are_confined(
    plain_out: Path, tmp_path: Path, where: str, name: str
) -> None:
    to = str(tmp_path / "out") if where == "local" else f"memory://{uuid.uuid4().hex}"
    out = place(copy(plain_out, to))
    span = lcray.open(plain_out).plan.spans[0]
    commit, manifest = out / "shards" / span.name / "commit.json", out / "tables" / "manifest.json"
    edit(commit, lambda data: data["files"]["layers"].update(name=name))
    with pytest.raises(CorruptionError, match="not a valid commit"):
        dict(each_commit(out, [span]))
    with pytest.raises(CorruptionError):
        reduce(out)
    edit(manifest, lambda data: data["tables"]["layers"].update(name=name))
    with pytest.raises(CorruptionError, match="unknown tables"):
        open_output(out)
    assert not verify(out).ok


def test_an_index_cannot_name_files_elsewhere(plain_run: Path, base: str) -> None:
    tensors = load_file(plain_run / "step-00000000.safetensors")
    for step in (0, 1):
        folder = f"{base}/run/checkpoint-{step}"
        text = json.dumps({"weight_map": dict.fromkeys(tensors, "../../secret.safetensors")})
        file = place(folder) / "model.safetensors.index.json"
        storage_of(file).write(file, text.encode())
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_series(f"{base}/run").read(0)


def test_series_of_every_layout(plain_run: Path, base: str, tmp_path: Path) -> None:
    """Single files, folders, shards with an index; logs beside them are no checkpoints."""
    tensors = load_file(plain_run / "step-00000000.safetensors")
    names = list(tensors)
    folder = tmp_path / "run"
    for step in (9, 10):
        own = folder / f"checkpoint-{step}"
        (own / "logs" / "deep").mkdir(parents=True)
        (own / "logs" / "deep" / "x-1.safetensors").write_bytes(b"no checkpoint")
        parts = {1: names[:2], 2: names[2:]}
        for i, part in parts.items():
            shard = own / f"model-0000{i}-of-00002.safetensors"
            save_file({n: tensors[n] + step for n in part}, shard)
        index = {
            n: f"model-0000{i}-of-00002.safetensors" for i, part in parts.items() for n in part
        }
        (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file(tensors, folder / "step-8.safetensors")
    here = open_series(folder)
    there = open_series(copy(folder, f"{base}/run"))
    assert there.steps == here.steps == (8, 9, 10)
    for step in here.steps:
        a, b = here.read(step), there.read(step)
        assert (a.sha256, a.nbytes) == (b.sha256, b.nbytes)
        assert all(a.tensors[n].equal(b.tensors[n]) for n in names)
        sizes = [series.checkpoint(step).nbytes for series in (here, there)]
        assert sizes[0] == sizes[1] > 0
    assert str(lcray.inspect(f"{base}/run").root) == f"{base}/run"


def test_what_is_no_run(base: str) -> None:
    root = place(base)
    storage_of(root).write(root / "file", b"x")
    with pytest.raises(CheckpointError, match="no such run"):
        lcray.inspect(f"{base}/nothing")
    with pytest.raises(CheckpointError, match="this is a file"):
        lcray.inspect(f"{base}/file")
    storage_of(root).write(root / "old/model-5.pt", b"x")
    with pytest.raises(CheckpointError, match="pickled checkpoints, which are never opened"):
        lcray.inspect(f"{base}/old")


def test_what_is_no_output(plain_run: Path, base: str) -> None:
    root = place(base)
    storage_of(root).write(root / "taken/precious.txt", b"x")
    for out in (f"{base}/taken", f"{base}/taken/precious.txt"):
        with pytest.raises(OutputError, match=r"no output of lcray|is a file"):
            lcray.analyze(plain_run, "scenes:plain", out)
    with pytest.raises(OutputError, match="no such file"):
        open_output(f"{base}/nothing")
    assert [item.name for item in storage_of(root).find(root)] == ["taken/precious.txt"]


def test_damage_is_found(plain_out: Path, base: str) -> None:
    out = place(copy(plain_out, f"{base}/out"))
    span, storage = lcray.open(plain_out).plan.spans[0], storage_of(out)
    (entry,) = [c.files["layers"] for c in dict(each_commit(out, [span])).values()]
    file = out / "shards" / span.name / entry.name
    data = bytearray(storage.read(file))
    open_output(out).sql("SELECT * FROM layers")  # fills the cache with what is still good
    verify(out)
    data[len(data) // 2] ^= 1
    storage.write(file, bytes(data))
    assert [p for p in verify(out).problems if "differs from its checksum" in p]
    with pytest.raises(CorruptionError, match="differs from its checksum"):
        reduce(out)
    storage.delete([file])
    assert [p for p in verify(out).problems if f"{file}: missing" in p]


def test_a_reduction_that_fails_leaves_the_tables_as_they_are(
    plain_out: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place(copy(plain_out, f"{base}/out"))
    before = tables(out)

    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OutputError, match="No space left"):
        reduce(out)
    monkeypatch.undo()
    assert tables(out) == before


@pytest.mark.slow
def test_credentials_reach_nothing_that_is_written_or_said(
    plain_run: Path,
    s3_endpoint: str,
    bucket: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = copy(plain_run, f"{bucket}/run"), f"{bucket}/out"
    results = lcray.analyze(run, "scenes:plain", out, span_length=6)
    said = [repr(results), str(lcray.inspect(run)), str(verify(out, run=run))]
    monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "0.2")
    for attempt in (lambda: lcray.inspect(run), lambda: lcray.analyze(run, "scenes:plain", out)):
        with object_server.using("http://127.0.0.1:9"), pytest.raises(LcrayError) as caught:
            attempt()
        said.append(str(caught.value))
    with pytest.raises(UsageError) as refused:
        lcray.open(f"s3://{KEY_ID}:{SECRET}@bucket/out")
    written = objects(s3_endpoint, bucket.removeprefix("s3://"))
    assert any(name.endswith("analysis.json") for name in written)
    everything = [*said, str(refused.value), *capfd.readouterr(), caplog.text]
    for secret in (KEY_ID, SECRET):
        assert not [text for text in everything if secret in text]
        assert not [name for name, data in written.items() if secret.encode() in data]


def test_the_command_line_takes_addresses(out: str, plain_run: Path, base: str) -> None:
    run = copy(plain_run, f"{base}/run")
    for arguments, expected in (
        (["inspect", run, "--json"], run),
        (["verify", out], "no problems"),
        (["query", out, "SELECT count(*) AS n FROM intervals", "--format", "csv"], "n\n24"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert expected in done.output


@pytest.mark.slow
class TestReadersOfAnOutputOnS3:
    """Views, report and exports say of an output in S3 what they say of the same on a disk."""

    @pytest.fixture
    def there(self, plain_out: Path, bucket: str) -> str:
        return copy(plain_out, f"{bucket}/out")

    def run(self, *arguments: object) -> str:
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.output

    def test_tables_and_views(self, plain_out: Path, there: str) -> None:
        here, results = lcray.open(plain_out), lcray.open(there)
        names = [*here.contents()["name"]]
        assert {"layers", "elements", "layer_totals", "class_layers"} < {*names}
        assert [*results.contents()["name"]] == names
        for name in names:
            query = f"SELECT * FROM {name} ORDER BY ALL"
            assert results.sql(query).equals(here.sql(query)), name
        query = (
            "SELECT split, layer, any_value(v.lc) - sum(l.lc) AS difference "
            "FROM layer_totals v JOIN layers l USING (split, layer) GROUP BY ALL ORDER BY ALL"
        )
        assert results.sql(query).equals(here.sql(query)) and len(here.sql(query)) == 8

    def test_the_report(self, plain_out: Path, there: str, tmp_path: Path) -> None:
        def page(file: Path, *arguments: object) -> str:
            assert self.run("report", *arguments, "--out", file) == f"{file.as_uri()}\n"
            return file.read_text("utf-8")

        def without_links(text: str) -> str:
            text = re.sub(r'<a href="[^"]*\.parquet">(<code>[^<]*</code>)</a>', r"\1", text)
            return text.replace(there, str(plain_out))

        text = page(tmp_path / "there.html", there)
        assert without_links(text) == without_links(page(tmp_path / "here.html", plain_out))
        assert "<code>tables/layers.parquet</code>" in text and '.parquet">' not in text
        assert self.run("report", there) == f"{there}/report.html\n"
        stored = place(there) / "report.html"
        assert storage_of(stored).read(stored) == text.encode()
        assert verify(there).ok  # a page among its files is no stray
        both = page(tmp_path / "both.html", "--compare", there, plain_out)
        assert both.count("<section") > 3

    def test_a_page_that_no_browser_can_open_is_not_promised(self, there: str) -> None:
        done = CliRunner().invoke(app, ["report", there, "--open"])
        assert done.exit_code == 2
        assert "name it with --out FILE" in done.output
        assert not storage_of(place(there)).exists(place(there) / "report.html")

    def test_exports(self, plain_out: Path, there: str, tmp_path: Path) -> None:
        for out, folder in ((plain_out, "here"), (there, "there")):
            self.run("export", out, "--to", "csv", "--out", tmp_path / folder)
        files = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
        assert len(files) == len(lcray.open(plain_out).tables) + 1  # columns.json
        assert {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()} == files
        rows = files["layers.csv"].decode().splitlines()
        assert len(rows) == 1 + len(lcray.open(plain_out).layers())
        self.run("export", there, "--to", "csv", "--table", "fits", "--out", tmp_path / "one")
        assert (tmp_path / "one" / "fits.csv").read_bytes() == files["fits.csv"]
        events = self.run("export", there, "--to", "tensorboard", "--out", tmp_path / "events")
        assert Path(events.strip()).stat().st_size > 1000
        done = CliRunner().invoke(app, ["export", there, "--to", "csv", "--out", f"{there}/csv"])
        assert done.exit_code == 1
        assert "goes to a local folder; copy it afterwards" in str(done.exception)


def test_a_recorder_takes_local_paths_only() -> None:
    import torch

    with pytest.raises(RecorderError, match="recorded on a local path"):
        lcray.Recorder(torch.nn.Linear(2, 2), "s3://bucket/run")
    assert not Path("s3:").exists()


DRIVER = """
import sys
import lcray
run, out, plan = sys.argv[1:]
lcray.analyze(run, "scenes:plain", out, plan=plan, resources=lcray.Resources(workers=2))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_an_analysis_on_ray_from_s3_to_s3(plain_run: Path, bucket: str, tmp_path: Path) -> None:
    run, plan = copy(plain_run, f"{bucket}/run"), tmp_path / "plan.json"
    lcray.plan(plain_run, "scenes:plain", span_length=3, elements=True).save(plan)
    places = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = scenes.python_environment() | {"PYTHONPATH": os.pathsep.join(places)}
    for source, out in ((str(plain_run), str(tmp_path / "out")), (run, f"{bucket}/out")):
        command = [sys.executable, "-c", DRIVER, source, out, str(plan)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    assert tables(f"{bucket}/out") == scenes.tables(tmp_path / "out")
    assert verify(f"{bucket}/out", run=run).problems == ()
