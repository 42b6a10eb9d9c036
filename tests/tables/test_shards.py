from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lcray.errors import CorruptionError, OutputError, UsageError
from lcray.planning.plan import Span
from lcray.storage import files, storage_of
from lcray.storage.files import encode_json, read_json, seal, write_json_atomic
from lcray.tables.arrow import make_table
from lcray.tables.output import Output
from lcray.tables.schema import TABLES
from lcray.tables.shards.commit import each_commit, read_commit
from lcray.tables.shards.reader import ShardFile, open_shard
from lcray.tables.shards.writer import ShardWriter, check_files, remove_strays

SPAN = Span((0, 1, 2))
DIGESTS = {0: "00", 1: "11", 2: "22"}


def units(lc: Any, layer: Any = "a", split: Any = "s") -> pa.Table:
    rows = {"start_step": 0, "unit": np.arange(len(lc)), "lc": np.asarray(lc, float)}
    return make_table("units", rows | {"layer": layer, "split": split})


def commit_one(out: Path, span: Span = SPAN, attempt: str = "a0", n: int = 3) -> bool:
    with ShardWriter(out, span, attempt) as writer:
        writer.write("units", units(np.arange(n)))
        return writer.commit(checkpoints={span.first: "00"}, info={"seconds": 1.5})


def names(out: Path, span: Span = SPAN) -> set[str]:
    return {path.name for path in Output(out).span(span).iterdir()}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails as on a full disk (EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_committed_is_read_back(tmp_path: Path) -> None:
    first, second = units([1.0, 2.0]), units([3.0])
    with ShardWriter(tmp_path, SPAN, "host-7.x_1") as writer:
        writer.write("units", first)
        writer.write("units", second)
        assert read_commit(tmp_path, SPAN) is None
        assert writer.commit(checkpoints=DIGESTS, info={"seconds": 1.5, "host": "ü"})
    commit = read_commit(tmp_path, SPAN)
    assert commit is not None
    assert (commit.span, commit.attempt) == (SPAN, "host-7.x_1")
    assert commit.checkpoints == DIGESTS
    assert commit.info == {"seconds": 1.5, "host": "ü"}
    assert commit.files["units"].rows == 3
    assert check_files(tmp_path, commit) == []
    assert dict(each_commit(tmp_path, [Span((2, 3)), SPAN])) == {SPAN: commit}
    assert names(tmp_path) == {"commit.json", "units-host-7.x_1.parquet"}
    path = tmp_path / "shards" / "00000000-00000002" / commit.files["units"].name
    assert pq.ParquetFile(path).read().equals(pa.concat_tables([first, second]))


@pytest.mark.parametrize("fail", [True, False])
def test_nothing_counts_without_a_commit(tmp_path: Path, fail: bool) -> None:
    def attempt() -> None:
        with ShardWriter(tmp_path, SPAN, "a0") as writer:
            writer.write("units", units([1.0]))
            assert names(tmp_path) == {"units-a0.parquet"}
            if fail:
                raise RuntimeError("the worker's own")

    if fail:
        with pytest.raises(RuntimeError, match="the worker's own"):
            attempt()
    else:
        attempt()
    assert names(tmp_path) == set()
    assert dict(each_commit(tmp_path, [SPAN])) == {}


def test_the_second_attempt_removes_its_files(tmp_path: Path) -> None:
    assert commit_one(tmp_path, attempt="winner")
    before = read_commit(tmp_path, SPAN)
    assert not commit_one(tmp_path, attempt="loser", n=5)
    assert names(tmp_path) == {"commit.json", "units-winner.parquet"}
    assert read_commit(tmp_path, SPAN) == before


def test_an_attempt_id_is_used_once(tmp_path: Path) -> None:
    assert commit_one(tmp_path)
    commit = read_commit(tmp_path, SPAN)
    with pytest.raises(OutputError, match="File exists"):
        commit_one(tmp_path)
    assert commit is not None
    assert check_files(tmp_path, commit) == []


@pytest.mark.parametrize("attempt", ["", "a/b", "../a", "a b", "a\n"])
def test_an_attempt_id_stays_in_the_folder(tmp_path: Path, attempt: str) -> None:
    with pytest.raises(UsageError, match="attempt"):
        ShardWriter(tmp_path, SPAN, attempt)


def test_many_threads_one_winner(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)
    won: list[str] = []

    def run(attempt: str) -> None:
        with ShardWriter(tmp_path, SPAN, attempt) as writer:
            writer.write("units", units([1.0]))
            barrier.wait()
            if writer.commit(checkpoints={}, info={}):
                won.append(attempt)

    threads = [threading.Thread(target=run, args=(f"t{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert names(tmp_path) == {"commit.json", f"units-{won[0]}.parquet"}
    commit = read_commit(tmp_path, SPAN)
    assert commit is not None
    assert commit.attempt == won[0]


def _race(path: Path, processes: int) -> list[int]:
    """Exit codes of processes that create `path` at the same time: 0 for the winner."""
    read, write = os.pipe()
    children = []
    for number in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                os.close(write)
                os.read(read, 1)  # returns when the parent closes its end
                code = int(not write_json_atomic(path, {"by": number}, exclusive=True))
            finally:
                os._exit(code)
        children.append(pid)
    os.close(write)
    os.close(read)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_many_processes_one_winner(tmp_path: Path) -> None:
    for turn in range(5):
        path = tmp_path / f"commit-{turn}.json"
        codes = _race(path, 4)
        assert sorted(codes) == [0, 1, 1, 1]
        assert read_json(path) == {"by": codes.index(0)}
    assert len(list(tmp_path.iterdir())) == 5


_KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_shards import commit_one, units
from lcray.planning.plan import Span
from lcray.tables.shards.writer import ShardWriter
out = Path({out!r})
for i in range(3):
    commit_one(out, Span((i, i + 1)))
writer = ShardWriter(out, Span((3, 4)), "a0")
writer.write("units", units([1.0] * 1000))
print("writing", flush=True)
time.sleep(60)
"""


def test_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    spans = [Span((i, i + 1)) for i in range(4)]
    script = _KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert names(tmp_path, spans[3]) == {"units-a0.parquet"}  # it was in the middle
    commits = dict(each_commit(tmp_path, spans))
    assert list(commits) == spans[:3]
    assert [p for c in commits.values() for p in check_files(tmp_path, c)] == []
    assert remove_strays(tmp_path, spans) == []  # an attempt may be at work in the fourth
    assert commit_one(tmp_path, spans[3], "a1")
    stray = Output(tmp_path).span(spans[3]) / "units-a0.parquet"
    assert remove_strays(tmp_path, spans) == [stray]
    assert names(tmp_path, spans[3]) == {"commit.json", "units-a1.parquet"}


def test_full_disk_while_writing(tmp_path: Path) -> None:
    assert commit_one(tmp_path, Span((5, 6)))
    rng = np.random.default_rng(0)
    with (
        file_size_limit(100_000),
        pytest.raises(OutputError) as caught,
        ShardWriter(tmp_path, SPAN, "a0") as writer,
    ):
        writer.write("units", units(rng.normal(size=50_000)))
        writer.commit(checkpoints={}, info={})
    message = str(caught.value)
    assert "units-a0.parquet: cannot be written (File too large)" in message
    assert "\n" not in message
    assert names(tmp_path) == set()
    commit = read_commit(tmp_path, Span((5, 6)))
    assert commit is not None
    assert check_files(tmp_path, commit) == []


def test_full_disk_while_committing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, SPAN, "a0") as writer:
        writer.write("units", units([1.0]))
        size = 20_000
        with file_size_limit(size), pytest.raises(OutputError, match=r"commit\.json"):
            writer.commit(checkpoints={}, info={"log": "x" * size})
    assert names(tmp_path) == set()


def test_a_commit_whose_answer_was_lost_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_answer(path: Path, data: Any, *, exclusive: bool = False) -> bool:
        assert write_json_atomic(path, data, exclusive=exclusive)
        raise OutputError("no answer")

    monkeypatch.setattr("lcray.tables.shards.writer.write_json_atomic", lose_the_answer)
    with pytest.raises(OutputError, match="no answer"):
        commit_one(tmp_path)
    commit = read_commit(tmp_path, SPAN)
    assert commit is not None and check_files(tmp_path, commit) == []


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\)"):
        ShardWriter(tmp_path, SPAN, "a0")


@pytest.mark.parametrize("taken", [True, False])
def test_where_links_are_not_supported(
    tmp_path: Path, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    if taken:
        assert commit_one(tmp_path, attempt="first")
        assert not commit_one(tmp_path, attempt="second")
    else:
        assert commit_one(tmp_path, attempt="first")
    assert names(tmp_path) == {"commit.json", "units-first.parquet"}
    assert read_commit(tmp_path, SPAN) is not None


def test_a_link_that_fails_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="Input/output error"):
        commit_one(tmp_path)
    assert names(tmp_path) == set()


def test_a_link_reported_twice_is_a_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeat(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # as a repeated NFS request: FileExistsError

    monkeypatch.setattr(os, "link", repeat)
    assert commit_one(tmp_path)
    assert read_commit(tmp_path, SPAN) is not None


def test_every_bit_of_a_commit_is_covered(tmp_path: Path) -> None:
    assert commit_one(tmp_path)
    path = Output(tmp_path).span(SPAN) / "commit.json"
    text = path.read_bytes()
    for at in range(len(text)):
        path.write_bytes(text[:at] + bytes([text[at] ^ (1 << at % 7)]) + text[at + 1 :])
        with pytest.raises(OutputError):
            read_commit(tmp_path, SPAN)
    for length in range(0, len(text), 7):
        path.write_bytes(text[:length])
        with pytest.raises(CorruptionError):
            read_commit(tmp_path, SPAN)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for name in parents:
            data = data[name]
        if value is KeyError:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("attempt", 3),
        _set("attempt", "../x"),
        _set("attempt", KeyError),
        _set("files", []),
        _set("files/units", {}),
        _set("files/units", 3),
        _set("files/units/name", "../units-a0.parquet"),
        _set("files/units/name", "/etc/passwd"),
        _set("files/units/name", "layers-a0.parquet"),
        _set("files/units/rows", True),
        _set("files/units/rows", -1),
        _set("files/units/bytes", "12"),
        _set("files/units/sha256", "0" * 63),
        _set("files/nonsense", {"name": "nonsense-a0.parquet", "rows": 0, "bytes": 0}),
        _set("checkpoints", {"x": "00"}),
        _set("checkpoints", {"0": 5}),
        _set("checkpoints", {"77": "00"}),
        _set("info", None),
    ],
)
def test_a_commit_is_read_strictly(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    assert commit_one(tmp_path)
    path = Output(tmp_path).span(SPAN) / "commit.json"
    data = json.loads(path.read_text())
    del data["checksum"]
    path.write_bytes(encode_json(seal(data)))
    assert read_commit(tmp_path, SPAN) is not None
    change(data)
    path.write_bytes(encode_json(seal(data)))
    with pytest.raises(CorruptionError, match="not a valid commit") as caught:
        read_commit(tmp_path, SPAN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", 1), "format version 1"),
        (_set("span", [0, 2]), "not those of the plan"),
    ],
)
def test_a_commit_of_something_else(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    assert commit_one(tmp_path)
    path = Output(tmp_path).span(SPAN) / "commit.json"
    data = json.loads(path.read_text())
    del data["checksum"]
    change(data)
    path.write_bytes(encode_json(seal(data)))
    with pytest.raises(OutputError, match=message):
        read_commit(tmp_path, SPAN)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_json_of_others(tmp_path: Path, text: bytes, error: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(CorruptionError, match=error):
        read_json(path)


def test_json_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    assert write_json_atomic(path, {"a": "x" * 100})
    assert read_json(path) == {"a": "x" * 100}
    monkeypatch.setattr(files, "_JSON_LIMIT", 100)
    monkeypatch.setattr(type(storage_of(path)), "read", None)  # not a byte of it is read
    with pytest.raises(CorruptionError, match="larger than 100 bytes"):
        read_json(path)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(OutputError, match="cannot be read"):
        read_json(tmp_path)


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": 1})
    with file_size_limit(1000), pytest.raises(OutputError):
        write_json_atomic(path, {"a": "x" * 2000})
    assert read_json(path) == {"a": 1}
    assert write_json_atomic(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("plan", [{}, {"plan": None}, {"plan": {"settings": {}}}])
def test_an_analysis_without_a_plan(tmp_path: Path, plan: dict[str, Any]) -> None:
    write_json_atomic(tmp_path / "analysis.json", plan)
    with pytest.raises(CorruptionError, match="no valid plan"):
        Output(tmp_path).record()


def test_an_analysis_of_another_version(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "analysis.json", {"format_version": 9})
    with pytest.raises(OutputError, match="format version 9"):
        Output(tmp_path).record()


def test_row_groups_never_mix_partitions_nor_calls(tmp_path: Path) -> None:
    size = TABLES["borders"].row_group_size
    n = size + 10
    zero = np.zeros(n, int)
    signs = ("lc_first", "lc_last", "displacement_first", "displacement_last")
    rows = {name: zero for name in signs} | {"index": np.arange(n)}
    with ShardWriter(tmp_path, SPAN, "a0") as writer:
        for layer in ((np.arange(n) >= 5) + 0, zero + 2):
            split = (zero, ["s"])
            table = make_table(
                "borders", rows | {"layer": (layer, ["a", "b", "c"]), "split": split}
            )
            writer.write("borders", table)
        writer.write("borders", table.slice(0, 0))
        assert writer.commit(checkpoints={}, info={})
    commit = read_commit(tmp_path, SPAN)
    assert commit is not None
    file = open_shard(tmp_path, commit, "borders")
    assert file is not None
    with file:
        assert file.rows == [5, size, 5, size, 10]
        layers = ["a", "b", "b", "c", "c"]
        assert file.partitions == [("s", layer) for layer in layers]
        assert file.extents == {("s", "a"): 5, ("s", "b"): n - 5, ("s", "c"): n}
        for group, layer in enumerate(layers):
            assert set(file.read([group]).column("layer").to_pylist()) == {layer}
        ranges = [(("s", "c"), size - 2, size + 3), (("s", "a"), 1, 3)]
        found = file.read_ranges(ranges, ["index", "layer"])
        assert found.column("index").to_pylist() == [*range(size - 2, size + 3), 1, 2]
        assert found.column("layer").to_pylist() == ["c"] * 5 + ["a"] * 2
        with pytest.raises(CorruptionError, match="lacks rows 3:6"):
            file.read_ranges([(("s", "a"), 3, 6)])
    assert open_shard(tmp_path, commit, "units") is None


def test_an_empty_table_has_a_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, SPAN, "a0") as writer:
        writer.write("units", units([]))
        assert writer.commit(checkpoints={}, info={})
    commit = read_commit(tmp_path, SPAN)
    assert commit is not None
    assert commit.files["units"].rows == 0
    assert check_files(tmp_path, commit) == []
    file = open_shard(tmp_path, commit, "units")
    assert file is not None
    with file:
        assert file.partitions == []


def test_other_columns_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, SPAN, "a0") as writer:
        with pytest.raises(ValueError, match="other columns"):
            writer.write("units", make_table("groups", {"group": 1} | _GROUP))
        with pytest.raises(UsageError, match="unknown table"):
            writer.write("unit", units([1.0]))


_GROUP = {"split": "s", "layer": "a", "start_step": 0, "lc": 0.0, "weight": 1.0}


def test_problems_of_files_are_told_apart(tmp_path: Path) -> None:
    assert commit_one(tmp_path)
    commit = read_commit(tmp_path, SPAN)
    assert commit is not None
    path = Output(tmp_path).span(SPAN) / "units-a0.parquet"
    whole = path.read_bytes()
    middle = len(whole) // 2
    cases = {
        "bytes, should be": whole[:-1],
        "differs from its checksum": whole[:middle]
        + bytes([whole[middle] ^ 1])
        + whole[middle + 1 :],
    }
    for message, content in cases.items():
        path.write_bytes(content)
        (problem,) = check_files(tmp_path, commit)
        assert message in problem
        assert str(path) in problem
    path.unlink()
    (problem,) = check_files(tmp_path, commit)
    assert "missing" in problem


def _replace(tmp_path: Path, content: bytes, rows: int) -> list[str]:
    """What is said of a commit whose checksum is right and whose file is not."""
    assert commit_one(tmp_path)
    folder = Output(tmp_path).span(SPAN)
    (folder / "units-a0.parquet").write_bytes(content)
    data = json.loads((folder / "commit.json").read_text())
    del data["checksum"]
    data["files"]["units"] |= {
        "rows": rows,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "commit.json").write_bytes(encode_json(seal(data)))
    commit = read_commit(tmp_path, SPAN)
    assert commit is not None
    return check_files(tmp_path, commit)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def test_a_file_of_another_version_or_table(tmp_path: Path) -> None:
    table = units([1.0])
    metadata = table.schema.metadata | {b"lcray.format_version": b"7"}
    other = _parquet(table.replace_schema_metadata(metadata))
    (problem,) = _replace(tmp_path / "a", other, 1)
    assert "format version '7'" in problem
    (problem,) = _replace(tmp_path / "b", _parquet(table), 2)
    assert "1 rows, should be 2" in problem
    (problem,) = _replace(tmp_path / "c", _parquet(make_table("groups", _GROUP | {"group": 1})), 1)
    assert "other columns" in problem
    (problem,) = _replace(tmp_path / "d", b"PAR1 no table", 1)
    assert "cannot be read" in problem
    assert "\n" not in problem


def test_files_without_partitions_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for metadata in ({}, {"lcray.partitions": "3"}, {"lcray.partitions": "[]"}):
        with pq.ParquetWriter(path, units([1.0]).schema) as writer:
            writer.write_table(units([1.0]))
            writer.add_key_value_metadata(metadata)
        with (
            ShardFile(path, TABLES["units"]) as file,
            pytest.raises(CorruptionError, match="partitions"),
        ):
            _ = file.partitions
    path.write_bytes(b"no")
    with pytest.raises(CorruptionError, match="cannot be read"):
        ShardFile(path, TABLES["units"])


def test_a_commit_whose_place_a_dead_link_has_says_so(tmp_path: Path) -> None:
    folder = Output(tmp_path).span(SPAN)
    folder.mkdir(parents=True)
    (folder / "commit.json").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"commit\.json: .*a link that leads nowhere"):
        commit_one(tmp_path)
    assert names(tmp_path) == {"commit.json"}
