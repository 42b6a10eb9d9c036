from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fsspec.registry import _registry as _loaded
from hypothesis import given
from hypothesis import strategies as st

from lcray.errors import LcrayError, OutputError, UsageError
from lcray.storage import Remote, place, storage_of
from lcray.storage.retries import persistently, without_secrets


@pytest.mark.parametrize(
    ("given", "path"),
    [("a/b", "a/b"), ("/a/b", "/a/b"), ("file:///a/b", "/a/b"), ("C:x", "C:x"), ("a:b/c", "a:b/c")],
)
def test_local_paths(given: str, path: str) -> None:
    assert place(given) == Path(path)
    assert place(Path(given)) == Path(given) or given.startswith("file")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://Bucket/A", "s3://Bucket/A"),
        ("gs://bucket", "gs://bucket"),
        ("abfs://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
        ("memory:///a/b", "memory://a/b"),
    ],
)
def test_addresses(given: str, shown: str) -> None:
    found = place(given)
    assert isinstance(found, Remote)
    assert str(found) == shown
    assert place(found) is found
    assert place(str(found)) == found


def test_a_remote_behaves_as_a_path() -> None:
    root = place("s3://bucket/out")
    file = root / "tables" / "layers.parquet"
    assert str(file) == "s3://bucket/out/tables/layers.parquet"
    assert (file.name, file.suffix) == ("layers.parquet", ".parquet")
    assert file.parent == root / "tables" == root / "tables"
    assert str(file.with_suffix(".txt")) == "s3://bucket/out/tables/layers.txt"
    assert file.resolve() == file
    assert {file: 1}[root / "tables/layers.parquet"] == 1
    top = place("s3://bucket")
    assert top.parent == top
    assert sorted([file, top]) == [top, file]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", ".", "", "a//b", "a/."])
def test_nothing_leads_out_of_a_remote_folder(name: str) -> None:
    with pytest.raises(ValueError, match="not a name below"):
        place("s3://bucket/out") / name


@given(st.text(max_size=30))
def test_what_is_below_stays_below(name: str) -> None:
    root = place("s3://bucket/out")
    try:
        below = root / name
    except ValueError:
        return
    assert str(below).startswith("s3://bucket/out/")
    assert not {"", ".", ".."} & {*str(below).removeprefix("s3://").split("/")}


@pytest.mark.parametrize(
    "given",
    [
        "s3://me:hunter2secret@bucket/out",
        "s3://me:pass/hunter2secret+/@bucket/out",
        "https://host/run?X-Amz-Signature=hunter2secret",
        "az://box/out?sig=hunter2secret&se=2030",
        "sftp://me:hunter2secret@host/out#x",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(given: str) -> None:
    with pytest.raises(UsageError, match="credentials in the environment") as caught:
        place(given)
    assert "hunter2secret" not in str(caught.value)
    assert str(caught.value).startswith(given.partition("://")[0] + "://")


@pytest.mark.parametrize(
    "given",
    ["s3://", "s3:///", "s3://bucket/../other", "s3://bucket//out", "simplecache::s3://b/c"],
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(UsageError):
        place(given)


@given(st.text(max_size=40).map(lambda rest: f"s3://{rest}"))
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    try:
        assert str(place(text)).startswith("s3://")
    except LcrayError as error:
        assert "\n" not in str(error) or "\n" in text


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol in ("s3", "gs"):
        monkeypatch.delitem(_loaded, protocol, raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(OutputError, match=r"needs the extra 's3'; pip install 'lcray\[s3\]'") as e:
        storage_of(place("s3://absent-package/out"))
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(OutputError, match="pip install gcsfs"):
        storage_of(place("gs://absent-package/out"))


def test_an_unknown_protocol_is_said_to_be() -> None:
    with pytest.raises(OutputError, match="unknown kind of storage"):
        storage_of(place("nonsense://a/b"))


def test_secrets_are_cut_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2020&sig=zzz")
    text = "PUT https://a.b/c?X=1&sig=zzz with abc/def+ghi, ftp://u:p@host/x: sv=2020&sig=zzz"
    assert without_secrets(text) == "PUT https://a.b/c with ***, ftp://host/x: ***"


def test_errors_of_a_storage_show_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")

    def refused() -> None:
        raise PermissionError("signature of https://a.b/c?sig=zzz with abc/def+ghi is wrong")

    with pytest.raises(PermissionError, match=r"with [*]{3} is wrong") as caught:
        persistently(refused)
    assert "abc/def" not in str(caught.value) and "zzz" not in str(caught.value)
