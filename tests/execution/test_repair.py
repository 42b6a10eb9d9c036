"""Damage to what was committed: found by `verify`, computed anew by ``analyze --repair``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import scenes

import lcray
from lcray.errors import CorruptionError, OutputError
from lcray.execution.driver.repair import take_back


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a shard truncated": ("layers-*.parquet", truncate),
    "a bit of a shard flipped": ("parameters-*.parquet", flip),
    "a shard emptied": ("units-*.parquet", lambda path: path.write_bytes(b"")),
    "a shard gone": ("intervals-*.parquet", Path.unlink),
    "a bit of the commit flipped": ("commit.json", flip),
    "a commit truncated": ("commit.json", truncate),
}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow
def test_it_is_found_and_only_what_is_damaged_is_computed_anew(
    damage: str, plain_run: Path, plain_out: Path, out: Path
) -> None:
    pattern, harm = DAMAGES[damage]
    bad = scenes.spans_of(out)[1]
    (path,) = (out / "shards" / bad).glob(pattern)
    harm(path)
    (problem, *_) = lcray.verify(out).problems
    assert str(path) in problem
    with pytest.raises((CorruptionError, OutputError)):
        lcray.analyze(plain_run, "scenes:plain", out, **scenes.OPTIONS)
    sound = {k: v for k, v in scenes.commits(out).items() if bad not in k}
    told = scenes.Told()
    lcray.analyze(plain_run, "scenes:plain", out, repair=True, on_progress=told, **scenes.OPTIONS)
    assert told.counts == [9, 12]
    assert sound.items() <= scenes.commits(out).items()
    assert lcray.verify(out).problems == ()
    assert scenes.tables(out) == scenes.tables(plain_out)


@pytest.mark.usefixtures("inline")
def test_nothing_is_computed_anew_where_nothing_is_damaged(plain_run: Path, out: Path) -> None:
    kept = scenes.commits(out)
    lcray.analyze(plain_run, "scenes:plain", out, repair=True, **scenes.OPTIONS)
    assert scenes.commits(out) == kept


@pytest.mark.usefixtures("inline")
def test_repairing_what_does_not_exist_yet_makes_it(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    lcray.analyze(plain_run, "scenes:plain", tmp_path / "new", repair=True, **scenes.OPTIONS)
    assert scenes.tables(tmp_path / "new") == scenes.tables(plain_out)


def test_what_cannot_be_looked_at_is_left_alone(out: Path) -> None:
    """Storage that fails for a moment must not cost what it holds."""
    path = next((out / "shards" / scenes.spans_of(out)[0]).glob("layers-*.parquet"))
    path.unlink()
    path.symlink_to(path.name)  # opening it is an error of the file system
    plan = lcray.open(out).plan
    with pytest.raises(OutputError, match=r"cannot be read .*check access"):
        take_back(out, plan.spans)
    assert (path.parent / "commit.json").exists()


def test_what_a_link_leads_to_is_left_alone(out: Path, tmp_path: Path) -> None:
    folder = out / "shards" / scenes.spans_of(out)[0]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    with pytest.raises(CorruptionError, match="a link leads out of"):
        take_back(out, lcray.open(out).plan.spans)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == before


def test_a_commit_that_is_a_link_out_of_the_output_is_left_alone(out: Path, tmp_path: Path) -> None:
    """Nobody knows what it says: its span is not taken to be damaged."""
    folder = out / "shards" / scenes.spans_of(out)[0]
    (folder / "commit.json").rename(tmp_path / "elsewhere.json")
    (folder / "commit.json").symlink_to(tmp_path / "elsewhere.json")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CorruptionError, match="a link leads out of"):
        take_back(out, lcray.open(out).plan.spans)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (tmp_path / "elsewhere.json").is_file()


def test_an_interruption_leaves_a_span_that_does_not_count(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = out / "shards" / scenes.spans_of(out)[0]
    truncate(next(folder.glob("layers-*.parquet")))

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lcray.execution.driver.repair.sync_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        take_back(out, lcray.open(out).plan.spans)
    assert not (folder / "commit.json").exists()
    assert len(list(folder.glob("*.parquet"))) > 3
