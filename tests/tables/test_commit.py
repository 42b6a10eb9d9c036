"""Commits are read one by one; there may be 100,000 of them."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import simulation

from lcray.errors import CorruptionError
from lcray.execution.driver.status import StatusFile
from lcray.execution.worker.reports import SpanReport
from lcray.planning.plan import Plan, Span
from lcray.tables.output import Output
from lcray.tables.reducing import reduce
from lcray.tables.shards.commit import each_commit
from lcray.tables.shards.writer import ShardWriter, read_commit, remove_strays


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Sixty spans of a hundred intervals, all committed."""
    out = tmp_path_factory.mktemp("commits") / "out"
    plan = simulation.make(out, 6000, 100, 2, ("intervals",))
    simulation.plant(plan, out)
    return plan, out


def test_they_come_in_the_order_that_was_asked_for(planted: tuple[Plan, Path]) -> None:
    plan, out = planted
    asked = plan.spans[::-7]
    assert [span for span, _ in each_commit(out, asked)] == list(asked)
    assert all(commit.span == span for span, commit in each_commit(out, asked))


def test_whoever_takes_them_one_by_one_holds_one(planted: tuple[Plan, Path]) -> None:
    plan, out = planted

    def most(commits: Any) -> int:
        tracemalloc.start()
        try:
            for _ in commits:
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = most(each_commit(out, plan.spans[:6]))
    assert most(each_commit(out, plan.spans)) < 1.5 * few


def test_the_reducer_keeps_no_checksums(planted: tuple[Plan, Path]) -> None:
    """A commit of 100 intervals takes more than 10,000 bytes, its outline some hundred."""
    plan, out = planted
    reduce._survey(out, plan)  # what is made once
    tracemalloc.start()
    try:
        outlines, problems = reduce._survey(out, plan)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (len(outlines), problems) == (60, [])
    assert held < 60 * 500


def test_neighbours_that_disagree_are_found_in_one_pass(tmp_path: Path) -> None:
    plan = simulation.make(tmp_path / "out", 12, 4, 1, ("intervals",))
    for span in plan.spans:
        simulation.write_span(plan, span, tmp_path / "out", "a")
    other = Span(plan.spans[1].steps)
    (Output(tmp_path / "out").span(other) / "commit.json").unlink()
    with ShardWriter(tmp_path / "out", other, "b") as writer:
        writer.commit(checkpoints={step: f"{step + 1:064x}" for step in other.steps}, info={})
    _, problems = reduce._survey(tmp_path / "out", plan)
    assert ["step 4" in problems[0], "step 8" in problems[1]] == [True, True]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_link_out_of_the_output_is_refused(tmp_path: Path, what: str) -> None:
    plan = simulation.make(tmp_path / "out", 8, 4, 1, ("intervals",))
    simulation.plant(plan, tmp_path / "out")
    folder = tmp_path / "out" / "shards" / plan.spans[1].name
    inside = folder if what == "folder" else folder / "commit.json"
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match="leads out of"):
        dict(each_commit(tmp_path / "out", plan.spans))


@pytest.mark.parametrize("text", [b"", b"{}", b"[]"])
def test_what_is_there_but_no_commit_is_damage_not_absence(tmp_path: Path, text: bytes) -> None:
    plan = simulation.make(tmp_path / "out", 4, 4, 1, ("intervals",))
    folder = tmp_path / "out" / "shards" / plan.spans[0].name
    folder.mkdir(parents=True)
    assert dict(each_commit(tmp_path / "out", plan.spans)) == {}
    (folder / "commit.json").write_bytes(text)
    with pytest.raises(CorruptionError):
        dict(each_commit(tmp_path / "out", plan.spans))


def test_a_changed_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    plan = simulation.make(tmp_path / "out", 4, 4, 1, ("intervals",))
    simulation.plant(plan, tmp_path / "out")
    path = tmp_path / "out" / "shards" / plan.spans[0].name / "commit.json"
    sound = path.read_bytes()
    for at in range(0, len(sound), 7):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(CorruptionError):
            dict(each_commit(tmp_path / "out", plan.spans))


def test_strays_are_found_without_reading_commits_beside_which_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    plan = simulation.make(out, 12, 4, 1, ("intervals",))
    simulation.plant(plan, out)
    folder = Output(out).span(plan.spans[1])
    stray = folder / "intervals-2-fedcba987654.parquet"
    stray.write_bytes(b"lost")
    (folder / "commit.json-1.tmp").write_bytes(b"torn")
    read = []
    whole = read_commit

    def noted(where: Any, span: Any) -> Any:
        read.append(span)
        return whole(where, span)

    monkeypatch.setattr("lcray.tables.shards.writer.read_commit", noted)
    assert remove_strays(out, plan.spans) == [folder / "commit.json-1.tmp", stray]
    assert read == [plan.spans[1]]
    assert len(dict(each_commit(out, plan.spans))) == 3
    assert len(os.listdir(folder)) == 2


def test_what_goes_to_workers_with_each_span_does_not_grow_with_the_run(tmp_path: Path) -> None:
    plans = [simulation.make(tmp_path / str(n), n, 8, 2, ("intervals",)) for n in (80, 8000)]
    sizes = [len(pickle.dumps(plan.without_spans())) for plan in plans]
    assert sizes[1] <= sizes[0] + 8


def test_counting_a_span_does_not_go_through_all_spans(planted: tuple[Plan, Path]) -> None:
    class Counted(tuple):  # type: ignore[type-arg]
        walks = 0

        def __iter__(self) -> Any:
            Counted.walks += 1
            return super().__iter__()

    plan = replace(planted[0], spans=Counted(planted[0].spans))
    file, report = StatusFile(planted[1], plan), SpanReport(True, 1, 0.0)
    for span in planted[0].spans[:5]:
        file.done(span, report)
    assert (file.latest.intervals, file.latest.spans_done) == (6000, 5)
    assert Counted.walks == 1
