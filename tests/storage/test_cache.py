from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path

import pytest

from lcray.errors import UsageError
from lcray.storage import Remote, open_binary, place, storage_of
from lcray.storage.cache import Cache, shared_cache

MIB = 1 << 20


def remote(name: str, size: int, stamp: str = "1") -> Remote:
    return Remote("s3", f"bucket/{name}", size, stamp)


class Origin:
    """Where objects come from; counts what was fetched."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def open(self, cache: Cache, file: Remote, fill: bytes = b"x") -> FileIO | None:
        def fetch(target: FileIO) -> None:
            self.fetched.append(file.name)
            target.write(fill * (file.size or 0))

        return cache.open(file, fetch)


def taken(cache: Cache) -> int:
    return sum(p.stat().st_size for p in cache.folder.iterdir() if not p.name.startswith("lock"))


def test_what_is_here_is_not_fetched_again(tmp_path: Path) -> None:
    cache, origin = Cache(tmp_path / "c", MIB), Origin()
    for _ in range(3):
        file = origin.open(cache, remote("a", 5))
        assert file is not None
        with file:
            assert file.read() == b"xxxxx"
    assert origin.fetched == ["a"]


def test_what_is_here_but_torn_is_fetched_again(tmp_path: Path) -> None:
    cache, origin = Cache(tmp_path / "c", MIB), Origin()
    for _ in range(2):
        file = origin.open(cache, remote("a", 5))
        assert file is not None
        with file:
            assert file.read() == b"xxxxx"
        (path,) = (p for p in cache.folder.iterdir() if not p.name.startswith("lock"))
        path.write_bytes(b"xxx")
    assert origin.fetched == ["a", "a"]


@pytest.mark.parametrize("other", [remote("b", 5), remote("a", 6), remote("a", 5, "2")])
def test_address_size_and_stamp_tell_objects_apart(tmp_path: Path, other: Remote) -> None:
    cache, origin = Cache(tmp_path / "c", MIB), Origin()
    for file in (remote("a", 5), other):
        opened = origin.open(cache, file)
        assert opened is not None
        opened.close()
    assert len(origin.fetched) == 2


def test_it_never_takes_more_than_its_limit_and_the_least_used_go_first(tmp_path: Path) -> None:
    cache, origin = Cache(tmp_path / "c", 1000), Origin()
    for number, name in enumerate(["a", "b", "c", "a", "d", "a", "b"]):
        opened = origin.open(cache, remote(name, 300))
        assert opened is not None
        opened.close()
        assert taken(cache) <= 1000
        for path in cache.folder.iterdir():  # the clock of a file system may be coarse
            age = path.stat().st_mtime_ns - 10**9 * (7 - number)
            if not path.name.startswith("lock"):
                os.utime(path, ns=(age, age))
    # a stayed, being used; b had to go for d, and c for b.
    assert origin.fetched == ["a", "b", "c", "d", "b"]


def test_an_open_file_outlives_its_eviction(tmp_path: Path) -> None:
    cache, origin = Cache(tmp_path / "c", 500), Origin()
    first = origin.open(cache, remote("a", 300))
    second = origin.open(cache, remote("b", 300))
    assert first is not None and second is not None
    with first, second:
        assert first.read() == b"x" * 300
    assert taken(cache) == 300


def test_what_is_larger_than_the_limit_or_has_no_stamp_is_not_kept(tmp_path: Path) -> None:
    cache, origin = Cache(tmp_path / "c", 100), Origin()
    assert origin.open(cache, remote("a", 101)) is None
    assert origin.open(cache, remote("a", 1, stamp="")) is None
    assert origin.fetched == []


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)

    def fails(target: FileIO) -> None:
        target.write(b"half")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.open(remote("a", 8), fails)
    assert taken(cache) == 0
    opened = Origin().open(cache, remote("a", 8))
    assert opened is not None
    with opened:
        assert opened.read() == b"x" * 8


def test_a_full_disk_is_no_reason_not_to_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1000)

    def full(target: FileIO) -> None:
        raise OSError(28, "No space left on device")

    assert cache.open(remote("a", 8), full) is None
    assert taken(cache) == 0


def test_a_part_whose_process_was_killed_makes_room_and_one_in_use_does_not(tmp_path: Path) -> None:
    cache, origin = Cache(tmp_path / "c", 1000), Origin()
    for name in ("dead", "alive"):
        (cache.folder / f"{name}.part").write_bytes(b"p" * 400)
    with open(cache.folder / "alive.part", "rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        opened = origin.open(cache, remote("a", 500))
        assert opened is not None
        opened.close()
        assert {p.name for p in cache.folder.iterdir() if p.suffix == ".part"} == {"alive.part"}
        assert origin.open(cache, remote("b", 700)) is None  # as long as that is on its way


def test_workers_of_a_machine_fetch_an_object_once(tmp_path: Path) -> None:
    cache, origin = Cache(tmp_path / "c", MIB), Origin()
    start, contents = threading.Barrier(6), []

    def work() -> None:
        start.wait()
        opened = origin.open(cache, remote("a", 100_000))
        assert opened is not None
        with opened:
            contents.append(opened.read() == b"x" * 100_000)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [True] * 6
    assert origin.fetched == ["a"]


CHURN = """
import random, sys
from pathlib import Path
from lcray.storage import Remote
from lcray.storage.cache import Cache
cache = Cache(Path(sys.argv[1]), 10_000)
draw = random.Random(int(sys.argv[2]))
for _ in range(400):
    number = draw.randrange(12)
    size = 700 + number
    opened = cache.open(
        Remote("s3", f"b/{number}", size, "1"), lambda target: target.write(bytes([number]) * size)
    )
    if opened is not None:
        with opened:
            assert opened.read() == bytes([number]) * size
        held = 0
        for path in cache.folder.iterdir():
            try:
                held += path.stat().st_size * (not path.name.startswith("lock"))
            except FileNotFoundError:
                pass
        assert held <= 11_000, held  # others go on while this one counts: one file of slack
"""


def test_processes_share_it(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", CHURN, str(tmp_path / "c")]
    workers = [subprocess.Popen([*command, str(seed)], env=environment) for seed in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="is not yours; set LCRAY_CACHE"):
        Cache(tmp_path / "c", MIB)


def test_only_this_user_can_look(tmp_path: Path) -> None:
    assert Cache(tmp_path / "c", MIB).folder.stat().st_mode & 0o777 == 0o700


def test_the_environment_says_where_and_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LCRAY_CACHE_GIB", raising=False)
    monkeypatch.setenv("LCRAY_CACHE", str(tmp_path / "there"))
    assert (shared_cache().folder, shared_cache().limit) == (tmp_path / "there", 10 * 2**30)
    monkeypatch.setenv("LCRAY_CACHE_GIB", "0.5")
    assert shared_cache().limit == 2**29
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("LCRAY_CACHE_GIB", wrong)
        with pytest.raises(UsageError, match="LCRAY_CACHE_GIB="):
            shared_cache()


def test_objects_come_through_it(private_cache: Path) -> None:
    file = place(f"memory://cache-{os.urandom(4).hex()}/x")
    storage_of(file).write(file, b"one")
    for _ in range(2):
        with open_binary(file, 64) as opened:
            assert opened.read() == b"one"
    assert len([p for p in private_cache.iterdir() if not p.name.startswith("lock")]) == 1
    storage_of(file).write(file, b"two")
    with open_binary(file, 64) as opened:
        assert opened.read() == b"two"
