"""What holds whatever files say: memory, links, pipes; and where a Ray of one's own listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import planting
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scenes
from repository import TESTS
from safetensors.torch import save_file
from torch import zeros

import lcray
from lcray.checkpoints import header, open_series, runfile
from lcray.errors import CheckpointError, CorruptionError, LcrayError, OutputError, RecorderError
from lcray.storage import sha256_of
from lcray.storage.files import encode_json, read_json, read_sealed, seal
from lcray.storage.lock import LOCK, locked
from lcray.tables.reading.results import open_output
from lcray.tables.reducing.reduce import reduce
from lcray.tables.verifying.verify import verify

WORLD = planting.make_world(spans=((0, 2, 4),))

CLAIMS = """
import resource, sys
import lcray
from lcray.errors import LcrayError

inspect = lcray.inspect  # imports torch, before the limit
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
found = inspect(sys.argv[1])
print([finding.kind for finding in found.findings])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_headers_that_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    """With 64 MiB to spare, sizes of 2^60 bytes are refused before anything is allocated."""
    run = tmp_path / "run"
    run.mkdir()
    save_file({"w": zeros(3)}, run / "step-0.safetensors")
    claims = [(2**58, 2**60), (2**40, 2**42), (2**62, 2**64), (2**28, 2**30)]
    for step, (count, size) in enumerate(claims, 1):
        entry = {"dtype": "F32", "shape": [count], "data_offsets": [0, size]}
        text = json.dumps({"w": entry}).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(64)
        (run / f"step-{step}.safetensors").write_bytes(content)
    for step, length in enumerate([2**60, 2**64 - 1, 2**27], 5):
        (run / f"step-{step}.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(64))
    command = [sys.executable, "-c", CLAIMS, str(run)]
    done = subprocess.run(command, env=scenes.python_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == str(["unreadable"] * 7), done.stderr


def test_a_million_axes_take_no_time() -> None:
    """Their product alone would be a number of 19 million digits."""
    entry = {"dtype": "F32", "shape": [2**62] * 1_000_000, "data_offsets": [0, 4]}
    with pytest.raises(ValueError, match="impossible shape"):
        header.parse(json.dumps({"w": entry}).encode(), 4)


@pytest.mark.parametrize(("shape", "stop"), [([4], 8), ([1], 8), ([2, 2], 12), ([], 8)])
def test_shape_and_byte_range_agree(shape: list[int], stop: int) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}
    with pytest.raises(ValueError, match=r"shape .* and byte range .* disagree"):
        header.parse(json.dumps({"w": entry}).encode(), stop)


def test_a_header_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": zeros(3)}, tmp_path / "step-1.safetensors")
    open_series(tmp_path, minimum=1).read(1)
    monkeypatch.setattr(header, "MAX_HEADER", 40)
    with pytest.raises(CheckpointError, match=r"a header of \d+ bytes does not fit"):
        open_series(tmp_path, minimum=1).read(1)


def test_an_index_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_HEADER", 1000)
    (tmp_path / "model-1.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "a.safetensors"}, "x": "x" * 1000})
    )
    with pytest.raises(CheckpointError, match="the index is larger than 1000 bytes"):
        open_series(tmp_path, minimum=1).read(1)


@pytest.mark.parametrize("rule", ["simpson*1000000000", "gauss*" + "9" * 5000])
def test_an_output_that_names_a_rule_of_a_billion_panels(tmp_path: Path, rule: str) -> None:
    out = planting.write_output(tmp_path / "out", WORLD)
    data = read_json(out / "analysis.json")
    data["plan"]["settings"]["rule"] = rule
    (out / "analysis.json").write_bytes(encode_json(data))
    with pytest.raises(CorruptionError, match="at most 4096 panels"):
        reduce(out)


def test_row_groups_are_no_larger_than_are_ever_written(tmp_path: Path) -> None:
    """Memory is reserved for as many rows as a group claims, and zeros take no room in a file."""
    out = planting.write_reduced(tmp_path / "out", WORLD)
    path = out / "tables" / "units.parquet"
    rows = pq.read_table(path)
    many = pa.concat_tables([rows.slice(0, 1)] * ((1 << 17) + 1)).combine_chunks()
    pq.write_table(many, path, row_group_size=1 << 20)
    with pytest.raises(CorruptionError, match=r"units\.parquet: .*larger row groups"):
        open_output(out).units()
    manifest = read_sealed(out / "tables" / "manifest.json")
    entry = {"rows": len(many), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["tables"]["units"] |= entry
    (out / "tables" / "manifest.json").write_bytes(encode_json(seal(manifest)))
    assert any("more than are ever written" in problem for problem in verify(out).problems)


@pytest.mark.parametrize("linked", ["shards", "shards/{span}", "shards/{span}/layers-a0.parquet"])
def test_shards_that_are_links_to_elsewhere(tmp_path: Path, linked: str) -> None:
    out = planting.write_output(tmp_path / "out", WORLD)
    place = out / linked.format(span=WORLD.plan.spans[0].name)
    place.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", place)
    with pytest.raises(CorruptionError, match="a link leads out of"):
        reduce(out)
    assert any("a link leads out of" in problem for problem in verify(out).problems)


def test_an_output_may_itself_be_a_link(tmp_path: Path) -> None:
    planting.write_output(tmp_path / "elsewhere", WORLD)
    os.symlink(tmp_path / "elsewhere", tmp_path / "out")
    reduce(tmp_path / "out")
    assert len(open_output(tmp_path / "out").layers()) and verify(tmp_path / "out").ok


def test_a_lock_that_is_a_link_or_a_pipe(tmp_path: Path) -> None:
    out, lock = tmp_path / "out", tmp_path / "out" / LOCK / "local"
    lock.parent.mkdir(parents=True)
    os.symlink(tmp_path / "made", lock)
    with pytest.raises(OutputError), locked(out):
        pass
    assert not (tmp_path / "made").exists()
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(OutputError), locked(out):
        pass
    lock.unlink()
    lock.parent.rmdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", lock.parent)
    with pytest.raises(CorruptionError, match="a link leads out of"), locked(out):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "analysis.json")
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(OutputError, match="not a regular file"):
        read_json(tmp_path / "analysis.json")
    with pytest.raises(RecorderError, match="cannot be read"):
        runfile.load(tmp_path)
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "step-1.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_series(tmp_path / "run", minimum=1).read(1)
    out = planting.write_output(tmp_path / "out", WORLD)
    path = out / "shards" / WORLD.plan.spans[0].name / "layers-a0.parquet"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptionError, match="not a regular file"):
        reduce(out)


def test_messages_are_one_line_whatever_they_name() -> None:
    message = str(LcrayError("a\nb\x1b[2J\u202e\ud800 é 文 …"))
    assert message == r"a\nb\x1b[2J\u202e\ud800 é 文 …"
    assert len(str(LcrayError("x" * 10**6))) < 2100


LISTENING = """
import contextlib, psutil, sys
import lcray
from lcray.execution.cluster.resources import Resources

def listening():
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    print(process.name(), socket.laddr.ip)

lcray.analyze(sys.argv[1], "scenes:plain", sys.argv[2], resources=Resources(workers=2),
              on_progress=lambda progress: progress.phase == "reduce" and listening())
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_of_ones_own_listens_on_loopback_alone(plain_run: Path, tmp_path: Path) -> None:
    """The head, the raylet, their agents and the workers at work, in a real analysis."""
    command = [sys.executable, "-c", LISTENING, str(plain_run), str(tmp_path / "out")]
    environment = scenes.python_environment() | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = {tuple(line.rsplit(maxsplit=1)) for line in done.stdout.splitlines()}
    names = " ".join(name for name, _ in found)
    assert all(part in names for part in ("gcs_server", "raylet", "ray::", "python"))
    assert {address for _, address in found} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert len(lcray.open(tmp_path / "out").intervals())
