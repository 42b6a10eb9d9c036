"""Checkpoints of committed spans that are no longer those that were read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import scenes

import lcray
from lcray.checkpoints import open_series
from lcray.errors import CorruptionError, OutputError
from lcray.execution.driver.revisit import Revisit, revisit_last, sha256_of_checkpoint
from lcray.storage import place, storage_of
from lcray.storage.files import encode_json, read_sealed, seal
from lcray.tables.shards.commit import each_commit, read_commit

pytestmark = pytest.mark.usefixtures("inline")


def analyze(run: Path, out: Path, **more: Any) -> lcray.Results:
    return lcray.analyze(run, "scenes:plain", out, **scenes.OPTIONS, **more)


def swap(run: Path, step: int, other: int) -> Path:
    """Puts another checkpoint in the place of one, which is kept with its times."""
    kept = scenes.checkpoint(run, step).rename(run.parent / f"kept-{step}")
    shutil.copy(scenes.checkpoint(run, other), scenes.checkpoint(run, step))
    return kept


def test_a_checkpoint_that_was_swapped_and_put_back_is_named_and_repaired(
    run: Path, plain_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kept = [swap(run, 4, 9), swap(run, 5, 9)]
    analyze(run, out)
    assert scenes.tables(out) != scenes.tables(plain_out)
    for path, step in zip(kept, (4, 5), strict=True):
        path.replace(scenes.checkpoint(run, step))  # with the times that it had
    with pytest.raises(OutputError, match=r"other checkpoints of steps 4, 5 than .*run has") as bad:
        analyze(run, out)
    assert "--repair" in str(bad.value) and "\n" not in str(bad.value)
    before = scenes.commits(out)
    analyze(run, out, repair=True)
    assert scenes.tables(out) == scenes.tables(plain_out)
    after = scenes.commits(out)
    same = {name for name in before if before[name] == after.get(name)}
    assert {name.split("/")[1] for name in before.keys() - same} == {"00000003-00000006"}
    analyze(run, out)


@pytest.mark.slow
def test_a_checkpoint_that_two_spans_share(run: Path, tmp_path: Path) -> None:
    analyze(run, tmp_path / "out")
    swap(run, 6, 9)
    with pytest.raises(OutputError, match="checkpoints of steps 6 than"):
        analyze(run, tmp_path / "out")
    analyze(run, tmp_path / "out", repair=True)
    analyze(run, tmp_path / "other")
    assert scenes.tables(tmp_path / "out") == scenes.tables(tmp_path / "other")


def test_another_run_from_the_same_start(run: Path, tmp_path: Path) -> None:
    analyze(run, tmp_path / "out")
    before = scenes.commits(tmp_path / "out")
    for step in range(1, 13):
        swap(run, step, 12 if step < 12 else 0)
    with pytest.raises(OutputError, match="of steps 1, 2, 3, 4, 5, 6 and 6 more than"):
        analyze(run, tmp_path / "out")
    swap(run, 0, 1)
    for repair in (False, True):  # a run that has another first checkpoint costs nothing
        with pytest.raises(OutputError, match="the analysis of another run"):
            analyze(run, tmp_path / "out", repair=repair)
    assert scenes.commits(tmp_path / "out") == before


def test_checkpoints_are_read_only_where_their_listing_differs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read = tmp_path / "out", []
    analyze(run, out)
    whole = sha256_of_checkpoint
    monkeypatch.setattr(
        "lcray.execution.driver.revisit.sha256_of_checkpoint",
        lambda c: (read.append(c.step), whole(c))[1],
    )
    analyze(run, out)
    assert read == []
    for step in (4, 6):
        os.utime(scenes.checkpoint(run, step))  # as after a copy: the same bytes
    analyze(run, out)
    assert read == [4, 6]
    scenes.checkpoint(run, 8).write_bytes(b"torn")
    with pytest.raises(OutputError, match="of steps 8 than"):
        analyze(run, out)


def test_outputs_of_an_older_lcray_resume(run: Path, plain_out: Path, tmp_path: Path) -> None:
    """Their commits say nothing of size and time."""
    out = tmp_path / "out"
    analyze(run, out)
    for path in out.glob("shards/*/commit.json"):
        data = read_sealed(path)
        assert set(data.pop("stamps")) == set(data["checkpoints"])
        path.write_bytes(encode_json(seal(data)))
    shutil.rmtree(out / "shards" / scenes.spans_of(out)[2])
    swap(run, 1, 2)
    analyze(run, out)
    assert scenes.tables(out) == scenes.tables(plain_out)


@pytest.mark.parametrize("stamps", [[], {"1": 2}, {"99": "1-2"}, {"x": "1-2"}])
@pytest.mark.slow
def test_stamps_are_what_is_written(run: Path, tmp_path: Path, stamps: Any) -> None:
    out = tmp_path / "out"
    analyze(run, out)
    path = next(out.glob("shards/*/commit.json"))
    path.write_bytes(encode_json(seal({**read_sealed(path), "stamps": stamps})))
    with pytest.raises(CorruptionError, match="not a valid commit"):
        analyze(run, out)


def test_while_a_run_is_followed_its_last_checkpoint_is_looked_at_again(
    run: Path, tmp_path: Path
) -> None:
    plan = analyze(run, tmp_path / "out", steps="0:9").plan
    revisit_last(tmp_path / "out", open_series(run), plan)
    swap(run, 9, 2)
    with pytest.raises(OutputError, match="of steps 9 than"):
        revisit_last(tmp_path / "out", open_series(run), plan)


@pytest.mark.slow
def test_the_listing_of_an_object_store_is_enough(
    run: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = place(f"{bucket}/run")
    for path in run.iterdir():
        storage_of(remote).write(remote / path.name, path.read_bytes())
    out = tmp_path / "out"
    plan = analyze(remote, out).plan
    span = plan.spans[1]
    commit = read_commit(out, span)
    assert commit is not None and set(commit.stamps) == set(span.steps)
    series, asked = open_series(remote), []
    storage = type(storage_of(remote))
    for name in ("_info", "_read"):
        whole = getattr(storage, name)
        monkeypatch.setattr(
            storage, name, lambda self, *a, whole=whole: (asked.append(a), whole(self, *a))[1]
        )
    revisit = Revisit(out, series)
    assert all(revisit.counts(commit) for _, commit in each_commit(out, plan.spans))
    revisit.check()
    assert asked == []
    name = scenes.checkpoint(Path(), 4).name
    storage_of(remote).write(remote / name, scenes.checkpoint(run, 9).read_bytes())
    revisit = Revisit(out, open_series(remote))
    assert all(revisit.counts(commit) for _, commit in each_commit(out, plan.spans))
    with pytest.raises(OutputError, match=f"of steps 4 than {remote} has now"):
        revisit.check()


def test_sharded_checkpoints_have_one_stamp(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file
    from torch import ones

    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        for key, name in names.items():
            save_file({key: ones(2) * step}, folder / name)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))
    series = open_series(tmp_path)
    state = series.read(2)
    assert state.stamp == series.checkpoint(2).stamp != ""
    assert sha256_of_checkpoint(series.checkpoint(2)) == state.sha256
    os.utime(tmp_path / "checkpoint-2" / names["b"], ns=(0, 0))
    assert open_series(tmp_path).checkpoint(2).stamp not in ("", state.stamp)
