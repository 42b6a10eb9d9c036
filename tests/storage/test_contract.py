"""What every storage must do: a file system, fsspec's memory, and S3 over HTTP."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcray.storage import Place, Remote, open_binary, open_uncached, place, sha256_of, storage_of
from lcray.storage.objects import object_storage


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty folder of each kind."""
    if request.param == "local":
        yield tmp_path / "folder"
    elif request.param == "memory":
        yield place(f"memory://{tmp_path.name}-{os.urandom(4).hex()}/folder")
    else:
        yield place(f"{request.getfixturevalue('bucket')}/folder")


def test_a_folder_without_files_is_empty(root: Place) -> None:
    assert storage_of(root).find(root) == []


def test_what_cannot_be_listed_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        storage_of(tmp_path).find(tmp_path / "file")


def test_what_was_written_is_read(root: Place) -> None:
    storage, file = storage_of(root), root / "a/b.bin"
    data = bytes(range(256)) * 11
    storage.write(file, data)
    assert storage.read(file) == data
    assert storage.read(file, 5, 300) == data[5:300]
    assert storage.read(file, 7, 7) == b""
    assert storage.size(file) == len(data)
    assert storage.exists(file)
    storage.write(file, b"shorter")
    assert storage.read(file) == b"shorter"


def test_an_empty_file_is_a_file(root: Place) -> None:
    storage, file = storage_of(root), root / "empty"
    storage.write(file, b"")
    assert storage.exists(file)
    assert (storage.size(file), storage.read(file)) == (0, b"")


def test_a_listing_names_every_file_below_in_order(root: Place) -> None:
    storage = storage_of(root)
    for name in ("z", "a/2", "a/10", "a/b/c"):
        storage.write(root / name, name.encode())
    storage.write(root.parent / f"{root.name}-neighbour" / "x", b"not below")
    found = storage.find(root)
    assert [(item.name, item.size) for item in found] == [
        ("a/10", 4),
        ("a/2", 3),
        ("a/b/c", 5),
        ("z", 1),
    ]


def test_the_stamp_tells_contents_apart(root: Place) -> None:
    storage = storage_of(root)
    storage.write(root / "x", b"one")
    (before,) = storage.find(root)
    storage.write(root / "x", b"two")
    (after,) = storage.find(root)
    if isinstance(root, Remote):  # what is asked for by itself is what was listed
        assert object_storage(root).stamped(root / "x").stamp == after.stamp
    assert before.stamp and after.stamp and before.stamp != after.stamp


def test_what_is_not_there(root: Place) -> None:
    storage = storage_of(root)
    storage.write(root / "folder/file", b"x")
    for name in ("gone", "folder"):
        assert name == "folder" or not storage.exists(root / name)
        with pytest.raises(OSError) as caught:
            storage.read(root / name)
        assert caught.value.strerror and "\n" not in caught.value.strerror
    with pytest.raises(FileNotFoundError):
        storage.size(root / "gone")
    storage.delete([root / "gone"])


def test_bytes_beyond_the_end_are_an_error(root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "0")
    storage = storage_of(root)
    storage.write(root / "x", b"12345")
    with pytest.raises(OSError):
        storage.read(root / "x", 0, 6)


def test_only_the_first_creates(root: Place) -> None:
    storage, file = storage_of(root), root / "c.json"
    assert storage.create(file, b"first")
    assert not storage.create(file, b"second")
    assert storage.read(file) == b"first"


def test_of_many_who_create_at_once_one_succeeds(root: Place) -> None:
    storage, file = storage_of(root), root / "c.json"
    start, won = threading.Barrier(8), []

    def attempt(number: int) -> None:
        start.wait()
        if storage.create(file, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read(file) == b"%d" % won[0]


@pytest.mark.parametrize("size", [0, 1000, 3 << 20])
def test_an_open_file_is_uploaded_from_its_start(root: Place, size: int) -> None:
    data = os.urandom(size)
    with tempfile.TemporaryFile() as source:
        source.write(data)
        source.flush()
        storage_of(root).upload(source.fileno(), root / "up")
    assert storage_of(root).read(root / "up") == data


def test_a_large_file_is_uploaded_in_parts(root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcray.storage.objects._BUFFER", 1 << 20)
    data = os.urandom((2 << 20) + 3)
    with tempfile.TemporaryFile() as source:
        source.write(data)
        source.flush()
        storage_of(root).upload(source.fileno(), root / "up")
    assert storage_of(root).read(root / "up") == data


def test_deleted_is_gone(root: Place) -> None:
    storage = storage_of(root)
    files = [root / name for name in ("1", "2", "d/3")]
    for file in files:
        storage.write(file, b"x")
    storage.delete(files[:2])
    assert [item.name for item in storage.find(root)] == ["d/3"]


def test_no_other_file_is_left(root: Place) -> None:
    storage = storage_of(root)
    storage.write(root / "x", b"1")
    storage.create(root / "y", b"2")
    storage.create(root / "y", b"3")
    assert [item.name for item in storage.find(root)] == ["x", "y"]


def test_streams_give_the_file(root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcray.storage.streams.PIECE", 1000)
    data = os.urandom(12_345)
    storage_of(root).write(root / "x", data)
    for opening in (lambda: open_binary(root / "x", 64), lambda: open_uncached(root / "x")):
        with opening() as file:
            assert file.read(100) + file.read() == data
        with opening() as file:
            file.seek(-345, os.SEEK_END)
            assert file.read() == data[-345:]
            file.seek(10)
            assert file.read(20) == data[10:30]
    # The digest of the empty string is in FIPS 180-4's examples.
    storage_of(root).write(root / "empty", b"")
    assert sha256_of(root / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")
