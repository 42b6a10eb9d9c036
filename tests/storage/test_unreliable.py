"""A network that fails: over real sockets, through a proxy that misbehaves to order."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import object_server
import pytest
import torch
from object_server import KEY_ID, SECRET, Proxy
from safetensors.torch import save_file

from lcray.checkpoints import open_series
from lcray.errors import CheckpointError, LcrayError, OutputError
from lcray.storage import Place, Remote, open_binary, place, sha256_of, storage_of
from lcray.storage.base import Storage
from lcray.storage.files import read_json, write_json_atomic


@dataclass
class Net:
    """A folder on S3 behind a proxy."""

    proxy: Proxy
    folder: Place
    storage: Storage
    direct: Any  # a client of the server itself
    bucket: str

    def put(self, name: str, data: bytes) -> Place:
        self.direct.put_object(Bucket=self.bucket, Key=f"folder/{name}", Body=data)
        return self.folder / name


@pytest.fixture
def net(s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    with Proxy(s3_endpoint).running() as proxy, object_server.using(proxy.address):
        folder = place(f"{bucket}/folder")
        name = bucket.removeprefix("s3://")
        direct = object_server.client(s3_endpoint)
        yield Net(proxy, folder, storage_of(folder), direct, name)


@pytest.mark.slow
def test_throttling_for_seconds_is_survived_by_every_operation(net: Net) -> None:
    file = net.put("x", b"data")
    for operation, expected in (
        (lambda: net.storage.read(file), b"data"),
        (lambda: [item.name for item in net.storage.find(net.folder)], ["x"]),
        (lambda: net.storage.create(net.folder / "new", b"n"), True),
        (lambda: net.storage.write(net.folder / "w", b"w"), None),
        (lambda: net.storage.delete([net.folder / "w"]), None),
    ):
        before = net.proxy.fates("throttle")
        net.proxy.throttle_for(0.6)
        start = time.monotonic()
        assert operation() == expected
        assert time.monotonic() - start >= 0.6
        # Backed off: at 0.2 s, doubling, no more than a handful of requests in that time.
        assert 2 <= net.proxy.fates("throttle") - before <= 12


@pytest.mark.slow
def test_seconds_of_throttling_are_survived(net: Net) -> None:
    file = net.put("x", b"data")
    net.proxy.throttle_for(3)
    assert net.storage.read(file) == b"data"


@pytest.mark.parametrize("fate", ["drop", "truncate"])
def test_a_body_that_ends_early_is_asked_for_again(net: Net, fate: str) -> None:
    data = os.urandom(300_000)
    file = net.put("x", data)
    net.proxy.fail(fate, method="GET", ending="/x", times=2)
    with open_binary(file, 1 << 16) as opened:
        assert opened.read() == data
    assert net.proxy.fates(fate) == 2
    net.proxy.fail(fate, method="GET", ending="/x", times=1)
    assert net.storage.read(file, 10, 1000) == data[10:1000]


@pytest.mark.parametrize("fate", ["drop", "truncate", "throttle"])
@pytest.mark.slow
def test_an_object_that_stays_unavailable_is_one_typed_line(
    net: Net, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "1")
    net.put("analysis.json", b'{"a": 1}')
    net.proxy.fail(fate, method="GET", ending="analysis.json")
    with pytest.raises(OutputError) as caught:
        read_json(net.folder / "analysis.json")
    message = str(caught.value)
    assert message.startswith(f"{net.folder}/analysis.json: cannot be read (")
    assert "\n" not in message and KEY_ID not in message and SECRET not in message


def test_a_server_that_is_gone_is_one_typed_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "0.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be listed") as caught:
        open_series(f"{bucket}/run")
    assert "\n" not in str(caught.value)


def test_no_credentials_are_no_reason_to_wait(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in object_server.environment(""):
        if "KEY" in name:
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    start = time.monotonic()
    with pytest.raises(OutputError, match="no credentials"):
        write_json_atomic(place(f"{bucket}/out/analysis.json"), {})
    assert time.monotonic() - start < 10


def test_a_bucket_that_does_not_exist_is_said_at_once(bucket: str) -> None:
    start = time.monotonic()
    with pytest.raises(OutputError, match="no such object or bucket") as caught:
        write_json_atomic(place("s3://no-such-bucket-of-lcray/out/analysis.json"), {})
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such run"):
        open_series("s3://no-such-bucket-of-lcray/run")


def test_a_create_whose_answer_was_lost_has_succeeded(net: Net) -> None:
    net.proxy.fail("lose", method="PUT", times=1)
    assert net.storage.create(net.folder / "commit.json", b"mine")
    assert net.proxy.fates("lose") == 1
    assert net.storage.read(net.folder / "commit.json") == b"mine"


def test_a_create_after_a_lost_request_does_not_take_what_is_anothers(net: Net) -> None:
    net.put("commit.json", b"theirs")
    net.proxy.fail("throttle", method="PUT", times=1)
    assert not net.storage.create(net.folder / "commit.json", b"mine")
    assert net.storage.read(net.folder / "commit.json") == b"theirs"


@pytest.mark.parametrize("fate", ["lose", "throttle"])
def test_an_upload_is_repeated_from_its_start(
    net: Net, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    monkeypatch.setattr("lcray.storage.objects._BUFFER", 1000)
    data = os.urandom(50_000)
    with tempfile.TemporaryFile() as source:
        source.write(data)
        source.flush()
        net.proxy.fail(fate, method="PUT", times=2)
        net.storage.upload(source.fileno(), net.folder / "up")
    assert net.proxy.fates(fate) == 2
    assert net.storage.read(net.folder / "up") == data


def _checkpoints(net: Net, tmp_path: Any, steps: int = 3) -> dict[int, torch.Tensor]:
    values = {step: torch.randn(200, 300) for step in range(steps)}
    for step, value in values.items():
        save_file({"w": value}, tmp_path / "x")
        net.put(f"step-{step}.safetensors", (tmp_path / "x").read_bytes())
    return values


def test_checkpoints_are_listed_once_and_read_whole_whatever_happens(
    net: Net, tmp_path: Any
) -> None:
    values = _checkpoints(net, tmp_path)
    series = open_series(str(net.folder))
    listings = [seen for seen in net.proxy.seen if seen[0] == "GET" and "step" not in seen[1]]
    assert len(listings) == 1
    net.proxy.fail("drop", method="GET", times=1)
    for step, value in values.items():
        assert torch.equal(series.read(step).tensors["w"], value)
    net.proxy.fail("throttle")  # all are in the cache: the network is not needed again
    for step, value in values.items():
        assert torch.equal(series.read(step).tensors["w"], value)


def test_a_checkpoint_that_stays_unavailable_is_one_typed_line(
    net: Net, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _checkpoints(net, tmp_path)
    series = open_series(str(net.folder))
    monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "1")
    net.proxy.fail("drop", method="GET", ending="step-1.safetensors")
    series.read(0)
    with pytest.raises(
        CheckpointError, match=r"step 1, s3://.*/step-1.safetensors: cannot be"
    ) as e:
        series.read(1)
    assert "\n" not in str(e.value)
    series.read(2)


@pytest.mark.parametrize("size", ["longer", "shorter", "as long"])
def test_a_checkpoint_that_changes_after_the_listing_is_noticed(
    net: Net, tmp_path: Any, size: str
) -> None:
    _checkpoints(net, tmp_path)
    series = open_series(str(net.folder))
    shape = {"longer": (300, 300), "shorter": (100, 300), "as long": (200, 300)}[size]
    save_file({"w": torch.randn(*shape)}, tmp_path / "x")
    net.put("step-1.safetensors", (tmp_path / "x").read_bytes())
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="it changed while it was read"):
        series.read(1)
    assert time.monotonic() - start < 10


def test_what_is_too_large_for_the_cache_is_read_piece_by_piece(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCRAY_CACHE_GIB", "0.00001")
    monkeypatch.setattr("lcray.storage.streams.PIECE", 10_000)
    data = os.urandom(55_555)
    file = net.put("x", data)
    net.proxy.fail("truncate", method="GET", times=3)
    with open_binary(file, 1 << 10) as opened:
        assert opened.read() == data
    assert sha256_of(file) == hashlib.sha256(data).hexdigest()


def test_no_error_is_anything_but_typed(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCRAY_STORAGE_PATIENCE", "0")
    for fate in ("throttle", "drop", "lose"):
        net.proxy.fail(fate)
        with pytest.raises(LcrayError):
            read_json(net.folder / "analysis.json")
        if fate == "drop":
            continue  # of an answer without a body, nothing can be dropped
        with pytest.raises(LcrayError):
            write_json_atomic(net.folder / "analysis.json", {}, exclusive=True)
    assert isinstance(net.folder, Remote)
