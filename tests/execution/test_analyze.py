"""The verbs `analyze` and `plan`: resumption, extension, plans, and what is refused.

Where no fault of a worker is involved the worker is in this process (`inline`); what Ray does to
the same calls stands in test_cluster.py and test_cli.py.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scenes
import torch
from disks import small_disk
from safetensors.torch import load_file, save_file
from scenes import OPTIONS

import lcray
from lcray.errors import (
    CheckpointError,
    CorruptionError,
    IncompleteError,
    OutputError,
    TaskError,
    UsageError,
)
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.analyze import load_plan
from lcray.execution.worker.tuning import Tuning, tune
from lcray.execution.worker.workbench import Workbench
from lcray.tasks.task import Task


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.usefixtures("inline")
class TestSpans:
    @pytest.mark.parametrize("length", [1, 5, 12])
    @pytest.mark.slow
    def test_the_length_of_spans_moves_sums_by_rounding_only(
        self, length: int, plain_run: Path, plain_out: Path, tmp_path: Path
    ) -> None:
        there = lcray.open(plain_out)
        here = lcray.analyze(
            plain_run, "scenes:plain", tmp_path / "out", span_length=length, elements=True
        )
        assert len(here.plan.spans) == -(-12 // length)
        assert_same_but_rounding(there, here)

    @pytest.mark.parametrize("net", ["batchnorm", "tied"])
    @pytest.mark.slow
    def test_the_length_of_spans_with_buffers_and_tied_weights(
        self, net: str, tmp_path: Path
    ) -> None:
        run = scenes.record(getattr(scenes, net), tmp_path / "run", steps=7)
        task = f"scenes:{net}"
        there = lcray.analyze(run, task, tmp_path / "a", span_length=7, elements=True)
        here = lcray.analyze(run, task, tmp_path / "b", span_length=2, elements=True)
        assert_same_but_rounding(there, here)

    def test_the_sum_closes(self, plain_out: Path) -> None:
        frame = lcray.open(plain_out).intervals()
        change = frame.groupby("split", observed=True)["loss_change"].sum()
        lc = frame.groupby("split", observed=True)["lc"].sum()
        assert change["train"] < -0.1
        assert ((lc - change).abs() < 0.003 * change.abs()).all()


def assert_same_but_rounding(there: lcray.Results, here: lcray.Results) -> None:
    """Counts and labels exactly; sums of LC to 1e-12 of Σ|LC| of the split."""
    assert set(there.tables) == set(here.tables)
    elements = there.elements()
    total = elements["lc"].abs().groupby(elements["split"], observed=True).sum()
    for name in there.tables:
        left, right = there.table(name), here.table(name)
        floats = [c for c in left if pd.api.types.is_float_dtype(left[c])]
        exact = left.columns.difference(floats)
        pd.testing.assert_frame_equal(left[exact], right[exact])
        scale = left["split"].astype(str).map(total)
        for column in floats:
            a, b = left[column].to_numpy(float), right[column].to_numpy(float)
            unit = scale.to_numpy(float)
            if name == "fits":  # iterated to a tolerance of their own
                unit = 1e3 * np.maximum(np.abs(a), 1)
            elif not column.startswith(("lc", "abs_lc", "first_order", "gap", "sum")):
                unit = np.maximum(np.abs(a), 1)  # losses, norms, bin edges, paths
            assert (np.isnan(a) == np.isnan(b)).all()
            far = np.nan_to_num(np.abs(a - b)) > 1e-12 * unit
            assert not far.any(), (name, column, a[far], b[far])


@pytest.mark.usefixtures("inline")
class TestResume:
    @pytest.mark.parametrize("step", [0, 6, 7])
    def test_a_torn_checkpoint_costs_its_spans_only(
        self, step: int, run: Path, plain_out: Path, tmp_path: Path
    ) -> None:
        out, path = tmp_path / "resumed", scenes.checkpoint(run, step)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        if step == 0:  # nothing can begin, nothing is left
            with pytest.raises(CheckpointError) as torn:
                lcray.analyze(run, "scenes:plain", out, **OPTIONS)
            assert f"step-{step:08d}" in one_line(torn)
            assert [path.name for path in out.iterdir()] == [".locks"]
        else:
            with pytest.raises(IncompleteError) as caught:
                lcray.analyze(run, "scenes:plain", out, **OPTIONS)
            lost = ["3-6", "6-9"] if step == 6 else ["6-9"]
            message = one_line(caught)
            assert f"{3 * len(lost)} intervals are missing (steps {', '.join(lost)})" in message
            assert f"step-{step:08d}" in message and "; the rest is committed: run" in message
            assert len(scenes.spans_of(out)) == 4 - len(lost)
            with pytest.raises(IncompleteError, match=f"{3 * len(lost)} of 12 intervals"):
                lcray.reduce(out)
        kept = scenes.commits(out)
        path.write_bytes(whole)
        told = scenes.Told()
        lcray.analyze(run, "scenes:plain", out, on_progress=told, **OPTIONS)
        assert kept.items() <= scenes.commits(out).items()
        done = 0 if step == 0 else 12 - 3 * len(lost)
        assert told.counts == list(range(done, 13, 3))
        assert scenes.tables(out) == scenes.tables(plain_out)

    def test_where_every_span_fails_nothing_is_said_to_be_committed(
        self, run: Path, tmp_path: Path
    ) -> None:
        for step in range(1, 13):
            scenes.checkpoint(run, step).write_bytes(b"torn")
        with pytest.raises(IncompleteError) as caught:
            lcray.analyze(run, "scenes:plain", tmp_path / "out", **OPTIONS)
        message = one_line(caught)
        assert message.endswith("; nothing is committed: run the same command again to retry")
        assert "12 intervals are missing" in message and "--allow-missing" not in message

    def test_a_finished_analysis_is_left_as_it_is(
        self, run: Path, out: Path, plain_out: Path
    ) -> None:
        kept = scenes.commits(out)
        told = scenes.Told()
        lcray.analyze(run, "scenes:plain", out, on_progress=told, **OPTIONS)
        assert told.counts == [12]
        assert scenes.commits(out) == kept
        assert scenes.tables(out) == scenes.tables(plain_out)

    def test_what_attempts_left_behind_is_removed(self, run: Path, out: Path) -> None:
        folder = out / "shards" / scenes.spans_of(out)[0]
        (folder / "layers-9-dead.parquet").write_bytes(b"half")
        lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        assert not (folder / "layers-9-dead.parquet").exists()
        assert lcray.verify(out).ok

    def test_the_length_of_spans_belongs_to_the_first_plan(self, run: Path, out: Path) -> None:
        before = scenes.tables(out)
        lcray.analyze(run, "scenes:plain", out, span_length=5, elements=True)
        assert scenes.tables(out) == before

    def test_a_damaged_commit_is_never_overwritten(self, run: Path, out: Path) -> None:
        path = next(out.glob("shards/*/commit.json"))
        path.write_text(path.read_text().replace('"rows"', '"rosw"', 1))
        damaged = path.read_bytes()
        with pytest.raises(CorruptionError) as caught:
            lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        assert str(path) in one_line(caught)
        assert path.read_bytes() == damaged

    def test_progress_is_told_in_order(self, run: Path, tmp_path: Path) -> None:
        told = scenes.Told()
        lcray.analyze(run, "scenes:plain", tmp_path / "new", on_progress=told, **OPTIONS)
        assert [(s.phase, s.done, s.total) for s in told.states] == [
            ("start", 0, 0),
            ("probe", 0, 0),
            *(("spans", done, 12) for done in (0, 3, 6, 9, 12)),
            ("reduce", 12, 12),
        ]

    def test_another_one_that_ended_between_reading_and_locking_is_noticed(
        self, run: Path, tmp_path: Path
    ) -> None:
        """It takes place while the task is loaded, and has another plan."""
        out = tmp_path / "out"
        (tmp_path / "task.py").write_text(
            "import os, lcray\n"
            "from scenes import plain as task\n"
            f"if not os.path.exists({str(out)!r}):\n"
            f"    lcray.analyze({str(run)!r}, 'scenes:plain', {str(out)!r}, span_length=4)\n"
        )
        task = f"{tmp_path}/task.py:task"
        with pytest.raises(OutputError, match="has just changed; run the same command again"):
            lcray.analyze(run, task, out, span_length=6)
        before = scenes.commits(out)
        assert [span.steps[-1] for span in lcray.open(out).plan.spans] == [4, 8, 12]
        assert len(lcray.analyze(run, task, out, span_length=6).plan.spans) == 3
        assert scenes.commits(out) == before
        assert lcray.verify(out).ok


@pytest.mark.usefixtures("inline")
class TestExtension:
    def test_steps_that_the_run_gained_are_added(self, run: Path, out: Path) -> None:
        kept, before = scenes.commits(out), lcray.open(out).intervals()
        scenes.record(scenes.plain, run, steps=4, start=12)
        results = lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        assert kept.items() <= scenes.commits(out).items()
        assert scenes.spans_of(out)[4:] == ["00000012-00000015", "00000015-00000016"]
        after = results.intervals()
        pd.testing.assert_frame_equal(results.intervals(steps=":12"), before)
        assert sorted(set(after["end_step"])) == list(range(1, 17))
        assert lcray.verify(out).ok

    def test_an_earlier_checkpoint_that_is_gone_is_missed(self, run: Path, out: Path) -> None:
        scenes.checkpoint(run, 5).unlink()
        before = scenes.tables(out)
        with pytest.raises(CheckpointError) as caught:
            lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        assert "1 planned checkpoints are missing, the first at step 5" in one_line(caught)
        assert scenes.tables(out) == before

    def test_a_range_of_steps(self, run: Path, plain_out: Path, tmp_path: Path) -> None:
        results = lcray.analyze(run, "scenes:plain", tmp_path / "part", steps="3:9", **OPTIONS)
        assert results.plan.steps == tuple(range(3, 10))
        there = lcray.open(plain_out).layers(steps="3:9")
        same = there.columns.difference(["n_flips"])  # the first interval has no neighbour here
        pd.testing.assert_frame_equal(
            results.layers()[same], there[same].reset_index(drop=True), check_exact=True
        )


def parquet(out: Path) -> dict[str, bytes]:
    """The tables alone: their manifest knows the settings as well."""
    return {k: v for k, v in scenes.tables(out).items() if k != "manifest.json"}


def never(bench: Workbench) -> Tuning:
    raise AssertionError("tuned")


@pytest.mark.usefixtures("inline")
class TestTuning:
    """The probe chooses once; its choice is recorded, and followed ever after."""

    @pytest.fixture
    def chosen(self, monkeypatch: pytest.MonkeyPatch) -> Tuning:
        tuning = Tuning(5, "channels_last", sample_bytes=1e6)
        monkeypatch.setattr("lcray.execution.worker.workspace.tune", lambda bench: tuning)
        return tuning

    def test_the_choice_is_recorded_beside_what_was_asked_for(
        self, chosen: Tuning, run: Path, tmp_path: Path
    ) -> None:
        plan = lcray.analyze(run, "scenes:plain", tmp_path / "new", **OPTIONS).plan
        assert (plan.settings.batch_size, plan.settings.memory_format) == (None, "auto")
        assert (plan.batch_size, plan.memory_format) == (5, "channels_last")
        # 17 samples of three groups, in batches of up to 5 each.
        counts = torch.unique(scenes.points()["train"][1], return_counts=True)[1].tolist()
        assert plan.splits[0].n_batches == sum(-(-count // 5) for count in counts)
        asked = {"batch_size": 5, "memory_format": "channels_last"}
        lcray.analyze(run, "scenes:plain", tmp_path / "asked", **OPTIONS, **asked)
        assert parquet(tmp_path / "new") == parquet(tmp_path / "asked")

    def test_who_resumes_follows_it(
        self, chosen: Tuning, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "new"
        lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        before = scenes.tables(out)
        shutil.rmtree(out / "shards" / scenes.spans_of(out)[1])
        monkeypatch.setattr("lcray.execution.worker.workspace.tune", never)
        found = lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        assert scenes.tables(out) == before
        assert (found.plan.batch_size, found.plan.memory_format) == (5, "channels_last")

    def test_the_loss_on_resumption_is_of_the_same_batches(
        self, chosen: Tuning, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lcray.analyze(run, "scenes:plain", tmp_path / "new", **OPTIONS)
        adopted: list[tuple[int, str]] = []
        original = Workbench.adopt

        def adopt(self: Workbench, batch_size: int, memory_format: str, *rest: Any) -> None:
            adopted.append((batch_size, memory_format))
            original(self, batch_size, memory_format, *rest)

        monkeypatch.setattr(Workbench, "adopt", adopt)
        lcray.analyze(run, "scenes:plain", tmp_path / "new", **OPTIONS)
        assert adopted == [(5, "channels_last")]

    def test_a_plan_that_was_given_is_followed(
        self, run: Path, plain_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = replace(lcray.open(plain_out).plan, batch_size=4)
        monkeypatch.setattr("lcray.execution.worker.workspace.tune", never)
        found = lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=plan)
        assert found.plan.batch_size == 4
        monkeypatch.setattr("lcray.execution.worker.workspace.tune", tune)
        lcray.analyze(run, "scenes:plain", tmp_path / "asked", batch_size=4, **OPTIONS)
        assert parquet(tmp_path / "new") == parquet(tmp_path / "asked") != parquet(plain_out)

    def test_what_a_worker_takes_is_estimated_for_its_batches(
        self, chosen: Tuning, run: Path
    ) -> None:
        found = lcray.plan(run, "scenes:plain", **OPTIONS).estimate.memory_bytes
        chosen_larger = replace(chosen, sample_bytes=3e6)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lcray.execution.worker.workspace.tune", lambda bench: chosen_larger)
            more = lcray.plan(run, "scenes:plain", **OPTIONS).estimate.memory_bytes
        assert found is not None and more is not None
        # Batches of up to 5 samples; the process itself may have grown a little meanwhile.
        assert more - found == pytest.approx(5 * 2e6, abs=5e6)

    def test_batch_statistics_are_never_tuned(self, tmp_path: Path) -> None:
        run = scenes.record(scenes.batchnorm, tmp_path / "run", steps=2)
        report = lcray.plan(run, "scenes:batchnorm", batch_norm="batch")
        assert report.plan.batch_size == 256
        assert any("is not tuned; --batch-size sets it" in note for note in report.notes)
        assert lcray.plan(run, "scenes:batchnorm").notes == ()
        out = tmp_path / "out"
        assert lcray.analyze(run, "scenes:batchnorm", out, batch_norm="batch").notes == report.notes


@pytest.mark.usefixtures("inline")
class TestMemory:
    TIGHT = Resources(memory=0.001)  # GiB: less than Python takes

    def test_streamed_data_give_the_same_tables(
        self, run: Path, plain_out: Path, tmp_path: Path
    ) -> None:
        options = {**OPTIONS, "batch_size": 4, "steps": "0:4"}
        plans = [
            lcray.plan(run, "scenes:plain", resources=resources, **options)
            for resources in (self.TIGHT, Resources())
        ]
        assert [plan.resident for plan in plans] == [
            {"train": False, "val": False},
            {"train": True, "val": True},
        ]
        assert plans[0].plan == plans[1].plan
        lcray.analyze(run, "scenes:plain", tmp_path / "tight", resources=self.TIGHT, **options)
        lcray.analyze(run, "scenes:plain", tmp_path / "wide", **options)
        assert scenes.tables(tmp_path / "tight") == scenes.tables(tmp_path / "wide")

    def test_batches_are_as_small_as_they_must_be(self, run: Path) -> None:
        tight = lcray.plan(run, "scenes:plain", resources=self.TIGHT).plan
        assert tight.batch_size == 1
        assert lcray.plan(run, "scenes:plain").plan.batch_size == 256


def other_loss(model: torch.nn.Module, batch: scenes.Pair) -> torch.Tensor:
    return scenes.cross_entropy(model, batch) * 2


def other_points() -> dict[str, scenes.Pair]:
    splits = scenes.points()
    x, y = splits["train"]
    x = x.clone()
    x[-1, -1] += 1e-3
    return {**splits, "train": (x, y)}


def other_model() -> torch.nn.Module:
    net = scenes.build_plain()
    net.add_module("more", torch.nn.Linear(3, 3))
    return net


@pytest.mark.usefixtures("inline")
class TestAnotherAnalysis:
    @pytest.mark.parametrize(
        ("options", "difference"),
        [
            ({"rule": "midpoint"}, "rule: 'simpson' there, 'midpoint' now"),
            ({"batch_size": 5}, "batch_size: not set there, 5 now"),
            ({"dtype": "float64"}, "dtype: 'float32' there, 'float64' now"),
            ({"splits": ["val"]}, "splits: not set there, \\('val',\\) now"),
            ({"elements": False}, "elements: on there, off now"),
            (
                {"rule": "left", "window": 3},
                "rule: 'simpson' there, 'left' now; window: not set there, 3 now",
            ),
        ],
    )
    def test_other_settings_are_refused_by_name(
        self, options: dict[str, Any], difference: str, run: Path, out: Path
    ) -> None:
        before = files(out)
        with pytest.raises(OutputError, match=rf"another analysis \({difference}\)") as caught:
            lcray.analyze(run, "scenes:plain", out, **OPTIONS | options)
        assert "choose another --out" in one_line(caught)
        assert files(out) == before

    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"loss": other_loss}, "task source: "),
            ({"splits": other_points}, "data: "),
            ({"model": other_model}, "; the model's layers"),
        ],
    )
    def test_another_task_is_refused(
        self, change: dict[str, Any], difference: str, run: Path, out: Path
    ) -> None:
        before = files(out)
        with pytest.raises(OutputError) as caught:
            lcray.analyze(run, replace(scenes.plain, **change), out, **OPTIONS)
        assert difference in one_line(caught)
        assert files(out) == before

    def test_another_model_with_a_checkpoint_to_match(self, run: Path, out: Path) -> None:
        for path in run.glob("step-*.safetensors"):
            tensors = load_file(path)
            save_file({**tensors, "more.weight": torch.eye(3), "more.bias": torch.ones(3)}, path)
        with pytest.raises(OutputError) as caught:
            lcray.analyze(run, replace(scenes.plain, model=other_model), out, **OPTIONS)
        assert "the model's layers" in one_line(caught)
        assert "another run" in one_line(caught)

    def test_another_first_checkpoint_is_refused(self, run: Path, out: Path) -> None:
        path = scenes.checkpoint(run, 0)
        tensors = load_file(path)
        tensors["0.bias"][0] += 1
        save_file(tensors, path)
        with pytest.raises(OutputError) as caught:
            lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        message = one_line(caught)
        assert "holds the analysis of another run, " in message
        assert "data" not in message.split(str(out))[1]

    def test_another_version_of_a_library_is_refused(self, run: Path, out: Path) -> None:
        edit_record(out, lambda data: data["fingerprint"].update(torch="1.0"))
        with pytest.raises(OutputError, match=r"\(torch: '1.0' there, '2.*' now\)"):
            lcray.analyze(run, "scenes:plain", out, **OPTIONS)

    def test_other_threads_are_refused(self, run: Path, out: Path) -> None:
        with pytest.raises(UsageError, match="threads 2: the plan says 1"):
            lcray.analyze(run, "scenes:plain", out, resources=Resources(threads=2), **OPTIONS)


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    """Every file but those of the lock, which say who was there last."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in out.rglob("*")
        if path.is_file() and path.parent.name != ".locks"
    }


def edit_record(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = out / "analysis.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.usefixtures("inline")
class TestPlans:
    @pytest.fixture
    def saved(self, plain_run: Path, tmp_path: Path) -> Path:
        lcray.plan(plain_run, "scenes:plain", **OPTIONS).save(tmp_path / "plan.json")
        return tmp_path / "plan.json"

    def test_a_saved_plan_gives_the_same_tables_elsewhere(
        self, saved: Path, run: Path, plain_out: Path, tmp_path: Path
    ) -> None:
        results = lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=saved)
        assert results.plan == load_plan(saved) == lcray.open(plain_out).plan
        assert scenes.tables(tmp_path / "new") == scenes.tables(plain_out)

    def test_a_plan_object_resumes(self, saved: Path, run: Path, out: Path) -> None:
        kept = scenes.commits(out)
        lcray.analyze(run, "scenes:plain", out, plan=load_plan(saved))
        assert scenes.commits(out) == kept

    def test_a_plan_is_not_extended(self, saved: Path, run: Path, tmp_path: Path) -> None:
        scenes.record(scenes.plain, run, steps=2, start=12)
        for _ in range(2):
            results = lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=saved)
            assert results.plan.steps[-1] == 12

    def test_planning_writes_nothing(self, run: Path) -> None:
        before = files(run)
        report = lcray.plan(run, "scenes:plain", **OPTIONS)
        assert files(run) == before
        assert report.workers == scenes.InlinePool.size
        # Simpson: two gradients an interval and one a span; two splits.
        assert report.estimate.n_intervals == 12
        assert report.estimate.n_gradients == 2 * (2 * 12 + 4)
        assert report.estimate.rows["intervals"] == 2 * 12
        assert report.estimate.rows["parameters"] == 2 * 43
        assert report.estimate.rows["elements"] == 2 * 12 * 43
        assert report.estimate.seconds is not None
        assert report.estimate.memory_bytes is not None

    @pytest.mark.parametrize(
        "options", [{"rule": "left"}, {"steps": "0:5"}, {"span_length": 2}, {"elements": True}]
    )
    def test_options_beside_a_plan_are_refused(
        self, options: dict[str, Any], saved: Path, run: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="leave the other options out"):
            lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=saved, **options)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("text", "kind", "message"),
        [
            ("{", CorruptionError, "not valid JSON"),
            ("[]", CorruptionError, "not a JSON object"),
            ("{}", UsageError, "not a plan.*make one with lcray plan --save"),
            ('{"format_version": 99, "plan": {}}', UsageError, "format version 99"),
            ('{"format_version": 2, "plan": {"settings": {}}}', UsageError, "not a plan"),
            ('{"format_version": 2, "plan": []}', UsageError, "not a plan"),
        ],
    )
    def test_a_damaged_plan(
        self, text: str, kind: type[Exception], message: str, run: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(kind, match=message) as caught:
            lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=path)
        assert str(path) in one_line(caught)

    def test_no_plan_file(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"none\.json: no such file"):
            lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=tmp_path / "none.json")

    def test_a_plan_for_another_model_or_splits(self, saved: Path, tmp_path: Path) -> None:
        run = scenes.record(scenes.batchnorm, tmp_path / "other", steps=12)
        with pytest.raises(UsageError, match="plan: made for other layers"):
            lcray.analyze(run, "scenes:batchnorm", tmp_path / "new", plan=saved)
        assert not (tmp_path / "new" / "analysis.json").exists()

    def test_a_plan_for_other_splits_or_another_device(self, run: Path, tmp_path: Path) -> None:
        made = lcray.plan(run, "scenes:plain", splits=["val"]).plan
        both = replace(made, settings=replace(made.settings, splits=None))
        with pytest.raises(UsageError, match="plan: made for other splits"):
            lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=both)
        with pytest.raises(UsageError, match="plan: made for other device"):
            cuda = replace(made, device_kind="cuda")
            lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=cuda)
        with pytest.raises(UsageError, match="plan: made for another run"):
            other = replace(made, splits=(replace(made.splits[0], first_loss=9.0),))
            lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=other)

    def test_a_plan_for_a_longer_run(self, saved: Path, run: Path, tmp_path: Path) -> None:
        scenes.checkpoint(run, 12).unlink()
        with pytest.raises(CheckpointError, match=r"1 planned checkpoints are missing.*step 12"):
            lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=saved)

    def test_another_plan_in_the_same_output(self, saved: Path, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "new"
        lcray.analyze(run, "scenes:plain", out, span_length=4, elements=True)
        with pytest.raises(OutputError, match="was made by another plan"):
            lcray.analyze(run, "scenes:plain", out, plan=saved)

    def test_the_length_of_spans_is_checked(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="span-length 0: must be at least 1"):
            lcray.analyze(run, "scenes:plain", tmp_path / "new", span_length=0)


@pytest.mark.usefixtures("inline")
class TestOtherRuns:
    def test_weights_that_are_not_finite_are_marked(self, run: Path, tmp_path: Path) -> None:
        path = scenes.checkpoint(run, 5)
        tensors = load_file(path)
        tensors["2.weight"][1, 2] = float("nan")
        save_file(tensors, path)
        results = lcray.analyze(run, "scenes:plain", tmp_path / "new", **OPTIONS)
        frame = results.intervals().set_index(["split", "start_step"])
        bad = frame[frame["status"] != "ok"]
        assert sorted(bad.index) == [("train", 4), ("train", 5), ("val", 4), ("val", 5)]
        assert bad["lc"].isna().all()
        assert frame.drop(bad.index)["lc"].notna().all()
        assert lcray.verify(tmp_path / "new").ok

    def test_low_precision_is_noted(self, tmp_path: Path) -> None:
        run = scenes.record(scenes.plain, tmp_path / "half", steps=3, dtype=torch.bfloat16)
        results = lcray.analyze(run, "scenes:plain", tmp_path / "new")
        (note,) = results.notes
        assert note.startswith("4 of 4 layers are stored in 16 bits or fewer")
        assert "(0.weight, …)" in note

    def test_full_precision_is_not(self, plain_out: Path) -> None:
        assert lcray.open(plain_out).notes == ()

    def test_a_loss_that_changes_is_refused_before_anything_is_written(
        self, run: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(TaskError, match=r"then .* at the same weights; switch sampling"):
            lcray.analyze(run, "scenes:noisy", tmp_path / "new")
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".locks"]

    def test_unknown_names_come_with_the_nearest(self, run: Path, tmp_path: Path) -> None:
        for options, message in (
            ({"rule": "simson"}, "unknown rule 'simson': did you mean 'simpson'?"),
            ({"splits": ["trian"]}, "unknown split 'trian': did you mean 'train'?"),
            ({"layers": "0.wieght"}, "unknown layer '0.wieght': did you mean '0.weight'?"),
            ({"trace": ["2.bais:1"]}, "unknown layer '2.bais': did you mean '2.bias'?"),
            ({"batchsize": 3}, "unknown option 'batchsize': did you mean 'batch_size'?"),
            ({"dtype": "float46"}, "unknown dtype 'float46': did you mean 'float64'?"),
        ):
            with pytest.raises(UsageError) as caught:
                lcray.analyze(run, "scenes:plain", tmp_path / "new", **options)
            assert one_line(caught).startswith(message)

    def test_an_object_that_is_no_task(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="needs a Task or"):
            lcray.analyze(run, object(), tmp_path / "new")  # type: ignore[arg-type]

    def test_a_task_that_is_an_object(self, run: Path, plain_out: Path, tmp_path: Path) -> None:
        task = Task(scenes.build_plain, scenes.points, scenes.cross_entropy, groups=scenes.classes)
        lcray.analyze(run, task, tmp_path / "new", **OPTIONS)
        assert scenes.tables(tmp_path / "new") == scenes.tables(plain_out)
        record = json.loads((tmp_path / "new" / "analysis.json").read_text())
        assert record["task"] == "<Task object>"


@pytest.mark.usefixtures("inline")
class TestOutputs:
    """Root may write whatever the mode says: so /proc and a full disk, not a closed folder."""

    def test_a_file(self, run: Path, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("precious")
        with pytest.raises(OutputError, match="file: is a file; choose another --out"):
            lcray.analyze(run, "scenes:plain", path)
        assert path.read_text() == "precious"

    def test_a_folder_of_something_else(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="run: not empty, and no output of lcray"):
            lcray.analyze(run, "scenes:plain", run)

    def test_below_a_file(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=r"file/out: .*\(Not a directory\); move away"):
            lcray.analyze(run, "scenes:plain", tmp_path / "file" / "out")

    def test_where_nothing_can_be_written(self, run: Path) -> None:
        with pytest.raises(OutputError, match=r"^/proc/lcray-out: cannot be written") as caught:
            lcray.analyze(run, "scenes:plain", "/proc/lcray-out")
        assert "run the same command again" in one_line(caught)

    def test_an_empty_folder_is_welcome(self, run: Path, plain_out: Path, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        lcray.analyze(run, "scenes:plain", tmp_path / "new", **OPTIONS)
        assert scenes.tables(tmp_path / "new") == scenes.tables(plain_out)

    def test_another_version_of_the_format(self, run: Path, out: Path) -> None:
        edit_record(out, lambda data: data.update(format_version=99))
        with pytest.raises(OutputError, match=r"format version 99, this lcray reads \d"):
            lcray.analyze(run, "scenes:plain", out, **OPTIONS)

    @pytest.mark.parametrize("key", ["run", "plan", "fingerprint", "versions", "notes"])
    def test_a_damaged_record(self, key: str, run: Path, out: Path) -> None:
        edit_record(out, lambda data: data.pop(key))
        before = files(out)
        with pytest.raises(CorruptionError, match=r"analysis\.json: not valid") as caught:
            lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        assert key in one_line(caught)
        assert files(out) == before

    @pytest.mark.parametrize("spans", [pytest.param(0, marks=pytest.mark.slow), 2])
    def test_a_disk_that_fills_up_loses_nothing(
        self, spans: int, disk: Path, run: Path, plain_out: Path, tmp_path: Path
    ) -> None:
        out, ballast = disk / "out", disk / "ballast"
        fill = scenes.Told(done=3 * spans, then=lambda: fill_up(ballast))
        with pytest.raises(IncompleteError) as caught:
            lcray.analyze(run, "scenes:plain", out, on_progress=fill, **OPTIONS)
        message = one_line(caught)
        assert f"{12 - 3 * spans} intervals are missing" in message
        assert ("the rest is committed" in message) == (spans > 0)
        assert ("nothing is committed" in message) == (spans == 0)
        found = lcray.status(out)
        assert (found.state, found.intervals_done, found.silent) == ("interrupted", 3 * spans, True)
        assert "cannot be written (No space left on device); make room" in message
        kept = scenes.commits(out)
        assert len(scenes.spans_of(out)) == spans
        left = [
            p.name
            for p in out.rglob("*")
            if p.is_file() and p.parent.name != ".locks" and p.name != "status.json"
        ]
        assert len(left) == len(kept) + 1  # nothing torn beside what is committed and the record
        ballast.unlink()
        lcray.analyze(run, "scenes:plain", out, **OPTIONS)
        assert kept.items() <= scenes.commits(out).items()
        assert scenes.tables(out) == scenes.tables(plain_out)

    def test_a_disk_that_is_full_when_tables_are_merged(
        self, disk: Path, run: Path, plain_out: Path
    ) -> None:
        out, ballast = disk / "out", disk / "ballast"
        fill = scenes.Told(done=12, then=lambda: fill_up(ballast))
        with pytest.raises(OutputError, match=r"No space left on device") as caught:
            lcray.analyze(run, "scenes:plain", out, on_progress=fill, **OPTIONS)
        one_line(caught)
        assert len(scenes.spans_of(out)) == 4
        ballast.unlink()
        lcray.reduce(out)
        assert scenes.tables(out) == scenes.tables(plain_out)


def fill_up(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8m") as folder:
        yield folder


@pytest.mark.usefixtures("inline")
def test_the_repr_of_a_plan_is_one_short_line(plain_run: Path) -> None:
    text = repr(lcray.plan(plain_run, "scenes:plain"))
    assert text.startswith("PlanReport(12 intervals, ")
    assert "\n" not in text and len(text) < 80


@pytest.mark.usefixtures("inline")
def test_verify_tells_whether_the_run_is_the_same(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lcray.analyze(run, "scenes:plain", out, **OPTIONS)
    assert lcray.verify(out, run=run).ok
    path = scenes.checkpoint(run, 5)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert lcray.verify(out).ok  # the output itself is sound
    assert lcray.verify(out, run=run).problems == (
        f"{run}: step 5 has changed since it was analyzed; use a new output",
    )
    scenes.checkpoint(run, 7).unlink()
    changed, gone = lcray.verify(out, run=run).problems
    assert "step 5" in changed and "no checkpoint of step 7" in gone


@pytest.mark.usefixtures("inline")
def test_a_plan_of_a_part_of_the_run_can_be_resumed(run: Path, tmp_path: Path) -> None:
    """What the plan says of the first checkpoint is of the plan's first, not of the run's."""
    out, saved = tmp_path / "out", tmp_path / "plan.json"
    lcray.plan(run, "scenes:plain", steps="6:", span_length=3).save(saved)
    first = lcray.analyze(run, "scenes:plain", out, plan=saved)
    assert first.intervals()["start_step"].min() == 6
    kept = scenes.tables(out)
    lcray.analyze(run, "scenes:plain", out, plan=saved)
    assert scenes.tables(out) == kept
