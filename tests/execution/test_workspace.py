from __future__ import annotations

import hashlib
import math
import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scenes import by_one_worker, checkpoint
from torch import Tensor, nn

from lcray.checkpoints import State
from lcray.errors import CheckpointError, TaskError
from lcray.execution.worker.workspace import Workspace
from lcray.planning.costs import estimate
from lcray.planning.make import make_plan, make_settings
from lcray.planning.plan import Plan, Span
from lcray.storage import Place, place, storage_of
from lcray.tables.output import Output
from lcray.tables.shards.writer import check_files, read_commit
from lcray.tasks.task import Task

STEPS = tuple(range(13))


def workspace(task: Task, run: Place, **options: Any) -> Workspace:
    return Workspace(task, str(run), make_settings(options))


def draft(work: Workspace, length: int | None = None) -> Plan:
    splits = work.probe().splits
    return make_plan(work.series.steps, work.settings, work.flat.layers, splits, span_length=length)


def change(run: Path, step: int, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(checkpoint(run, step))
    edit(tensors)
    save_file(tensors, checkpoint(run, step))


def files_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*") if path.is_file())


class Reads:
    """A series that notes which steps are read."""

    def __init__(self, series: Any) -> None:
        self.series, self.steps, self.read_steps = series, series.steps, []

    def read(self, step: int, into: Any = None) -> State:
        self.read_steps.append(step)
        return self.series.read(step, into=into)


class TestCommit:
    def test_a_span_counts_once(self, plain_task: Task, plain_run: Path, tmp_path: Path) -> None:
        work = workspace(plain_task, plain_run)
        plan = draft(work, 4)
        span = plan.spans[1]
        assert work.run(plan, span, tmp_path, "first").committed
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert not work.run(plan, span, tmp_path, "second").committed
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before, "the second attempt leaves nothing behind"
        commit = read_commit(tmp_path, span)
        assert commit is not None and commit.attempt == "first"
        assert (
            set(commit.files) == {*plan.tables, "borders"} and check_files(tmp_path, commit) == []
        )

    def test_it_names_the_bytes_that_were_read(self, plain_task, plain_run, tmp_path) -> None:
        work = workspace(plain_task, plain_run)
        plan = draft(work, 5)
        for span in plan.spans:
            work.run(plan, span, tmp_path, "a")
            commit = read_commit(tmp_path, span)
            assert commit is not None
            assert commit.checkpoints == {
                step: hashlib.sha256(checkpoint(plain_run, step).read_bytes()).hexdigest()
                for step in span.steps
            }

    def test_the_report_counts_gradients(self, plain_task, plain_run, tmp_path) -> None:
        plan = draft(work := workspace(plain_task, plain_run), 4)
        report = work.run(plan, plan.spans[0], tmp_path, "a")
        assert report.n_gradients == 2 * 4 * 2, "two an interval, in each of two splits"
        commit = read_commit(tmp_path, plan.spans[0])
        assert commit is not None and commit.info["n_gradients"] == report.n_gradients
        assert commit.info["seconds"] > 0

    def test_two_workers_write_the_same_bytes(self, plain_task, plain_run, tmp_path) -> None:
        plan = draft(workspace(plain_task, plain_run), 4)
        for name in ("one", "two"):
            work = workspace(plain_task, plain_run)
            order = plan.spans if name == "one" else plan.spans[::-1]
            for span in order:
                work.run(plan, span, tmp_path / name, "a")
        for path in (tmp_path / "one").rglob("*.parquet"):
            other = tmp_path / "two" / path.relative_to(tmp_path / "one")
            assert path.read_bytes() == other.read_bytes(), path.name


class TestNumbers:
    def test_losses_are_those_of_the_stored_weights(self, plain_task, plain_run, tmp_path) -> None:
        found = by_one_worker(plain_task, plain_run, tmp_path, 5).intervals()
        for split, (x, y) in plain_task.splits.items():
            rows = found[found["split"] == split]
            losses = []
            for step in STEPS:
                w = {k: v.double() for k, v in load_file(checkpoint(plain_run, step)).items()}
                hidden = torch.tanh(x.double() @ w["0.weight"].T + w["0.bias"])
                logits = hidden @ w["2.weight"].T + w["2.bias"]
                losses.append(float(-torch.log_softmax(logits, 1)[torch.arange(len(y)), y].mean()))
            np.testing.assert_allclose(rows["loss_start"], losses[:-1], rtol=1e-6)
            np.testing.assert_allclose(rows["loss_end"], losses[1:], rtol=1e-6)
            assert rows["gap"].abs().max() < 1e-3 * np.abs(np.diff(losses)).max()
            assert (rows["status"] == "ok").all()

    @pytest.mark.parametrize("options", [{}, {"dtype": "float64", "rule": "gauss-lobatto"}])
    @pytest.mark.slow
    def test_the_length_of_spans_does_not_matter(self, plain_task, plain_run, tmp_path, options):
        options = {**options, "elements": True, "window": 5}
        a = by_one_worker(plain_task, plain_run, tmp_path / "a", 12, **options)
        b = by_one_worker(plain_task, plain_run, tmp_path / "b", 5, **options)
        assert len(b.plan.spans) == 3
        total = a.parameters()["abs_lc"].sum()
        assert total > 0
        for name in a.tables:
            if name != "fits":
                assert_close(a.table(name), b.table(name), 1e-12 * total, name)

    @pytest.mark.parametrize(
        "rule",
        [
            "left",
            "midpoint",
            "trapezoid",
            "simpson",
            "simpson*2",
            "gauss-2",
            "gauss",
            "gauss-lobatto",
        ],
    )
    def test_estimates_count_the_gradients_exactly(self, plain_task, plain_run, tmp_path, rule):
        work = workspace(plain_task, plain_run, rule=rule)
        plan = draft(work, 5)
        calls = count_gradients(work)
        for span in plan.spans:
            work.run(plan, span, tmp_path, "a")
        assert sum(calls) == estimate(plan, 1).n_gradients


def count_gradients(work: Workspace) -> list[bool]:
    """Whether each evaluation from now on asks for a gradient."""
    calls: list[bool] = []
    evaluate = work.bench.engine.evaluate

    def counted(split: Any, out: Any, directions: Any = (), **more: Any) -> Any:
        calls.append(out is not None)
        return evaluate(split, out, directions, **more)

    work.bench.engine.evaluate = counted  # type: ignore[method-assign]
    return calls


def assert_close(a: pd.DataFrame, b: pd.DataFrame, atol: float, name: str) -> None:
    assert list(a.columns) == list(b.columns) and len(a) == len(b) > 0, name
    for column in a:
        left, right = a[column], b[column]
        if left.dtype.kind == "f":
            assert (left.isna() == right.isna()).all(), (name, column)
            off = (left - right).abs().max()
            assert not off > atol, (name, column, off)
        else:
            assert left.astype(object).equals(right.astype(object)), (name, column)


class TestReading:
    @pytest.mark.parametrize("length", [1, 2, 3, 12])
    def test_each_checkpoint_is_read_once_a_span(
        self, plain_task, plain_run, tmp_path, length, monkeypatch
    ):
        work = workspace(plain_task, plain_run)
        plan = draft(work, length)
        work.series = reads = Reads(work.series)
        monkeypatch.setattr("lcray.execution.worker.workspace.open_series", lambda *where: reads)
        for span in plan.spans[:4]:
            reads.read_steps.clear()
            work.run(plan, span, tmp_path, "a")
            assert reads.read_steps == list(span.steps)

    def test_reading_runs_ahead_but_not_away(
        self, plain_task, plain_run, tmp_path, monkeypatch
    ) -> None:
        """While interval k computes, at most two checkpoints beyond the next are in memory."""
        work = workspace(
            replace(plain_task, splits={"train": plain_task.splits["train"]}), plain_run
        )
        plan = draft(work, 12)
        work.series = reads = Reads(work.series)
        monkeypatch.setattr("lcray.execution.worker.workspace.open_series", lambda *where: reads)
        seen: list[int] = []
        evaluate = work.bench.engine.evaluate

        def noting(*given: Any, **more: Any) -> Any:
            seen.append(len(reads.read_steps))
            return evaluate(*given, **more)

        work.bench.engine.evaluate = noting  # type: ignore[method-assign]
        work.run(plan, plan.spans[0], tmp_path, "a")
        # Interval 0 takes three evaluations, every later one two.
        interval = [0, *(k for k in range(12) for _ in range(2))]
        assert len(seen) == len(interval)
        assert all(read <= k + 4 for read, k in zip(seen, interval, strict=True))
        assert all(read >= k + 2 for read, k in zip(seen, interval, strict=True))


class TestWhileTrainingWrites:
    @pytest.fixture
    def remote(self, plain_run: Path) -> Place:
        """The run on a storage where files grow visibly; the newest is not whole yet."""
        folder = place(f"memory://{uuid.uuid4().hex}/run")
        for step in range(8):
            content = checkpoint(plain_run, step).read_bytes()
            storage_of(folder).write(folder / checkpoint(plain_run, step).name, content)
        storage_of(folder).write(
            folder / checkpoint(plain_run, 7).name, content[: len(content) // 2]
        )
        return folder

    def test_a_checkpoint_that_was_not_whole_when_it_was_listed(
        self, plain_task: Task, plain_run: Path, remote: Place, tmp_path: Path
    ) -> None:
        work = workspace(plain_task, remote)
        plan = draft(work, 1)
        for step in (7, 8):
            content = checkpoint(plain_run, step).read_bytes()
            storage_of(remote).write(remote / checkpoint(plain_run, step).name, content)
        assert work.run(plan, plan.spans[-1], tmp_path / "out", "a").committed
        local = workspace(plain_task, plain_run)
        assert local.run(plan, plan.spans[-1], tmp_path / "local", "a").committed
        found, expected = (read_commit(tmp_path / o, plan.spans[-1]) for o in ("out", "local"))
        assert found is not None and expected is not None
        assert found.files == expected.files

    def test_it_is_listed_again_only_where_it_may_have_changed(
        self, plain_task: Task, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = workspace(plain_task, plain_run)
        plan, listings = draft(work, 1), []
        monkeypatch.setattr(
            "lcray.execution.worker.workspace.open_series",
            lambda *where: listings.append(where) or work.series,
        )
        for number, span in enumerate((*plan.spans, plan.spans[-1])):
            work.run(plan, span, tmp_path / "out", str(number))
        assert len(listings) == 1


class TestDamage:
    def test_a_torn_checkpoint_fails_its_span_and_no_other(self, plain_task, run, tmp_path) -> None:
        torn = checkpoint(run, 6)
        torn.write_bytes(torn.read_bytes()[:-10])
        work = workspace(plain_task, run)
        plan = draft(work, 4)
        out = tmp_path / "out"
        for span in plan.spans:
            if 6 not in span.steps:
                assert work.run(plan, span, out, "a").committed
                continue
            with pytest.raises(CheckpointError) as caught:
                work.run(plan, span, out, "a")
            message = str(caught.value)
            assert "step 6" in message and str(torn) in message and "\n" not in message
            assert files_in(Output(out).span(span)) == []
        assert [span.name for span in plan.spans if read_commit(out, span)] == [
            "00000000-00000004",
            "00000008-00000012",
        ]

    def test_a_checkpoint_that_is_gone(self, plain_task: Task, run: Path, tmp_path: Path) -> None:
        work = workspace(plain_task, run)
        plan = draft(work, 12)
        checkpoint(run, 12).unlink()
        with pytest.raises(CheckpointError, match="step 12"):
            work.run(plan, plan.spans[0], tmp_path / "out", "a")
        assert files_in(tmp_path / "out") == []

    def test_a_nan_marks_its_two_intervals_and_the_rest_is_done(self, plain_task, run, tmp_path):
        whole = by_one_worker(plain_task, run, tmp_path / "whole", 12)

        def damage(tensors: dict[str, Tensor]) -> None:
            tensors["2.bias"][1] = torch.nan

        change(run, 6, damage)
        found = by_one_worker(plain_task, run, tmp_path / "out", 12)
        rows = found.intervals()
        marked = rows["status"] == "nonfinite_checkpoint"
        assert set(rows["start_step"][marked]) == {5, 6} and marked.sum() == 4
        assert (rows["status"][~marked] == "ok").all()
        assert rows.loc[marked, ["lc", "gap", "loss_change"]].isna().all(axis=None)
        good = whole.intervals()
        for column in ("lc", "loss_start", "loss_end", "gap", "n_helping"):
            assert rows[column][~marked].tolist() == good[column][~marked].tolist(), column
        layers, before = found.layers(), whole.layers()
        ok = ~layers["start_step"].isin([5, 6])
        assert layers["lc"][ok].tolist() == before["lc"][ok].tolist()
        assert layers["lc"][~ok].isna().all()
        counts = found.parameters()[["n_helping", "n_hurting", "n_zero"]].sum(axis=1)
        assert (counts == 10).all(), "12 intervals, less the two that are marked"

    @pytest.mark.parametrize("step", [0, 4, 5, 12])
    def test_a_nan_at_the_border_of_spans_is_the_same(self, plain_task, run, tmp_path, step):
        def damage(tensors: dict[str, Tensor]) -> None:
            tensors["0.weight"][0, 0] = torch.inf

        change(run, step, damage)
        a = by_one_worker(plain_task, run, tmp_path / "a", 12)
        b = by_one_worker(plain_task, run, tmp_path / "b", 4)
        touched = (a.intervals()["start_step"] == step) | (a.intervals()["end_step"] == step)
        assert (a.intervals()["status"] != "ok").equals(touched)
        for name in ("intervals", "layers", "units", "parameters"):
            assert_close(a.table(name), b.table(name), 1e-12, name)

    def test_a_dtype_that_changes_in_the_middle(self, plain_task, run, tmp_path) -> None:
        def halve(tensors: dict[str, Tensor]) -> None:
            tensors["0.weight"] = tensors["0.weight"].half()

        change(run, 3, halve)
        work = workspace(plain_task, run)
        plan = draft(work, 12)
        wanted = (
            r"^checkpoint at step 3: tensor '0\.weight' is torch\.float16, but torch\.float32 at "
            r"the run's first step; narrow the run with --steps$"
        )
        with pytest.raises(CheckpointError, match=wanted):
            work.run(plan, plan.spans[0], tmp_path / "out", "a")
        assert files_in(tmp_path / "out") == []

    def test_narrowing_the_steps_leaves_the_change_out(self, plain_task, run, tmp_path) -> None:
        for step in range(3):
            change(
                run, step, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()})
            )
        work = Workspace(plain_task, str(run), make_settings({}), steps="3:")
        plan = draft(work, 12)
        assert plan.steps == STEPS[3:]
        assert work.run(plan, plan.spans[0], tmp_path / "out", "a").committed

    def test_another_model(self, plain_task: Task, plain_run: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

        with pytest.raises(CheckpointError, match=r"step 0: tensor '0.weight' has shape \[5, 4\]"):
            workspace(replace(plain_task, model=build), plain_run).probe()

    def test_a_loss_that_fails_in_the_middle(self, plain_task, plain_run, tmp_path) -> None:
        calls: list[int] = []
        most = math.inf

        def loss(net: nn.Module, batch: Any) -> Tensor:
            calls.append(1)
            if len(calls) > most:
                raise RuntimeError("out of luck")
            return F.cross_entropy(net(batch[0]), batch[1], reduction="none")

        work = workspace(replace(plain_task, loss=loss, groups=None), plain_run)
        plan = draft(work, 12)
        most = len(calls) + 5
        with pytest.raises(TaskError, match="failed: RuntimeError: out of luck"):
            work.run(plan, plan.spans[0], tmp_path, "a")
        assert files_in(tmp_path) == []


class TestPlanAndTask:
    """The plan was made by a probe elsewhere: a worker's task must be the same."""

    def test_other_groups_than_in_the_plan(self, plain_task, plain_run, tmp_path) -> None:
        plan = draft(workspace(plain_task, plain_run), 4)
        other = workspace(replace(plain_task, groups=lambda b: b[1] + 1), plain_run)
        with pytest.raises(TaskError, match=r"^task split 'train': groups differ from the plan"):
            other.run(plan, plan.spans[0], tmp_path, "a")
        assert files_in(tmp_path) == []

    def test_other_items_than_in_the_plan(self, plain_task, plain_run, tmp_path) -> None:
        task = replace(plain_task, groups=None)
        plan = draft(workspace(task, plain_run), 4)

        def fewer(net: nn.Module, batch: Any) -> Tensor:
            losses = plain_task.loss(net, batch)
            assert isinstance(losses, Tensor)
            return losses[1:] if len(losses) > 16 else losses  # not in what workers compare

        other = workspace(replace(task, loss=fewer), plain_run)
        with pytest.raises(TaskError, match="16 items of weight 16") as caught:
            other.run(plan, plan.spans[0], tmp_path, "a")
        assert "number and weights must not change" in str(caught.value)
        assert files_in(tmp_path) == []


class TestProbe:
    def test_what_it_finds(self, plain_task: Task, plain_run: Path) -> None:
        work = workspace(plain_task, plain_run, batch_size=4)
        found = work.probe()
        train, val = found.splits
        classes = plain_task.splits["train"][1]
        counts = torch.bincount(classes).tolist()
        assert (train.name, train.n_samples, train.n_items, train.total_weight) == (
            *("train", 17, 17),
            17.0,
        )
        assert train.groups == tuple(sorted(set(classes.tolist())))
        assert train.group_weights == tuple(float(counts[g]) for g in train.groups)
        assert train.sorted_by_group
        assert train.n_batches == sum(-(-counts[g] // 4) for g in train.groups)
        assert (val.name, val.n_items) == ("val", 6)
        w = load_file(checkpoint(plain_run, 0))
        x, y = plain_task.splits["train"]
        logits = torch.tanh(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        assert train.first_loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-6)
        assert set(found.seconds) == {"train", "val"}

    @pytest.mark.parametrize(
        "disturb",
        [
            lambda logits: F.dropout(logits, 0.5, training=True),
            lambda logits: logits + torch.randn(len(logits), 1) * torch.arange(3),
            lambda logits: logits * float(np.random.rand()),
        ],
    )
    def test_a_random_loss_is_refused(self, plain_task, plain_run, disturb) -> None:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(disturb(net(batch[0])), batch[1], reduction="none")

        message = self.refusal(replace(plain_task, loss=loss), plain_run)
        assert (
            "at the same weights; switch sampling, dropout by hand and augmentation off" in message
        )

    def test_a_loss_that_writes_into_the_weights_is_refused(self, plain_task, plain_run) -> None:
        def loss(net: Any, batch: Any) -> Tensor:
            net[0].weight.data.round_(decimals=2)  # does nothing the second time
            return plain_task.loss(net, batch)

        with pytest.raises(TaskError, match=r"^model layer '0.weight': was written to while the"):
            workspace(replace(plain_task, loss=loss), plain_run).probe()

    def test_a_random_gradient_under_a_fixed_loss_is_refused(self, plain_task, plain_run) -> None:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            logits = net(batch[0])
            noise = torch.rand(())
            logits = logits * noise + (logits * (1 - noise)).detach()
            fixed = F.cross_entropy(net(batch[0]).detach(), batch[1], reduction="none")
            return fixed + (logits - logits.detach()).sum(1)

        assert "at the same weights" in self.refusal(replace(plain_task, loss=loss), plain_run)

    @pytest.mark.parametrize("grouped", [False, True])
    def test_batches_without_weight_are_no_reason_to_refuse(
        self, plain_task: Task, plain_run: Path, grouped: bool
    ) -> None:
        """Unlabelled samples come first; sorted by group they do so wherever they were."""

        def splits() -> dict[str, Any]:
            x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
            return {"train": (x, torch.tensor([-1] * 6 + [0, 1, 2] * 2))}

        def loss(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            losses = F.cross_entropy(net(batch[0]), batch[1].clamp(min=0), reduction="none")
            return losses, (batch[1] >= 0).float()

        groups = (lambda batch: batch[1]) if grouped else None
        task = Task(plain_task.model, splits, loss, groups=groups)
        (found,) = workspace(task, plain_run, batch_size=3).probe().splits
        assert found.total_weight == 6 and found.n_batches == (5 if grouped else 4)

    def test_a_random_gradient_after_batches_without_weight(self, plain_task, plain_run) -> None:
        def splits() -> dict[str, Any]:
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
            return {"train": (x, torch.tensor([0.0, 0, 0, 1, 1, 1]))}

        def loss(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            logits = net(batch[0])
            return ((logits - logits.detach()) * torch.rand(())).sum(1) + 1, batch[1]

        task = Task(plain_task.model, splits, loss)
        with pytest.raises(TaskError, match="at the same weights"):
            workspace(task, plain_run, batch_size=3).probe()

    def test_dropout_modules_are_off(self, plain_task: Task, plain_run: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Dropout(0.9))

        with_dropout = workspace(replace(plain_task, model=build), plain_run).probe().splits
        assert with_dropout == workspace(plain_task, plain_run).probe().splits

    def test_a_number_of_items_that_changes(self, plain_task: Task, plain_run: Path) -> None:
        calls = []

        def loss(net: nn.Module, batch: Any) -> Tensor:
            calls.append(1)
            values = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
            return values[len(calls) - 1 :]

        task = replace(plain_task, loss=loss, groups=None)
        message = self.refusal(task, plain_run)
        assert re.search(r"\d+ items at first, then \d+; their number", message)

    def test_weights_that_change(self, plain_task: Task, plain_run: Path) -> None:
        calls = []

        def loss(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            calls.append(1)
            values = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
            return values, torch.full_like(values, len(calls))

        task = replace(plain_task, loss=loss, groups=None)
        assert "weights must not change" in self.refusal(task, plain_run)

    def test_a_loss_that_is_nan_at_first_is_no_random_one(self, plain_task, plain_run) -> None:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(net(batch[0]), batch[1], reduction="none") * torch.nan

        found = workspace(replace(plain_task, loss=loss), plain_run).probe()
        assert [split.first_loss for split in found.splits] == [None, None]

    def refusal(self, task: Task, run: Path) -> str:
        with pytest.raises(TaskError) as caught:
            workspace(task, run).probe()
        message = str(caught.value)
        assert message.startswith("task loss on split 'train': ") and "\n" not in message
        return message


class TestDescription:
    def test_hashes_follow_what_they_are_of(self, plain_task: Task, run: Path) -> None:
        before = workspace(plain_task, run).describe()
        assert before == workspace(plain_task, run).describe()
        first = checkpoint(run, 0).read_bytes()
        assert before.first_hash == hashlib.sha256(first).hexdigest()
        assert (before.base_hash, before.device_kind) == ("", "cpu")
        x, y = plain_task.splits["val"]
        data = {"train": plain_task.splits["train"], "val": (x, y.flip(0))}
        after = workspace(replace(plain_task, splits=data), run).describe()
        assert after.split_hashes["train"] == before.split_hashes["train"]
        assert after.split_hashes["val"] != before.split_hashes["val"]
        assert replace(after, split_hashes=before.split_hashes) == before
        assert [layer.name for layer in before.layers] == [
            *("0.weight", "0.bias", "2.weight", "2.bias")
        ]

    def test_the_base_of_partial_checkpoints_stays_what_it_was(self, plain_task, run) -> None:
        def build(value: float) -> nn.Module:
            model = plain_task.model()
            nn.init.constant_(model[0].bias, value)
            nn.init.constant_(model[0].weight, value)
            nn.init.constant_(model[2].weight, value)
            nn.init.constant_(model[2].bias, value)
            return model

        def workspace_of(value: float) -> Workspace:
            task = replace(plain_task, model=lambda: build(value))
            return workspace(task, run, partial=True)

        work = workspace_of(0.5)
        before = work.describe().base_hash
        work.probe()
        assert work.describe().base_hash == before != ""
        assert workspace_of(0.25).describe().base_hash != before


def test_spans_of_one_interval_and_of_uneven_steps(plain_task, run, tmp_path) -> None:
    for step in (1, 2, 5):
        checkpoint(run, step).unlink()
    work = workspace(plain_task, run)
    plan = draft(work, 1)
    assert plan.spans[0] == Span((0, 3))
    work.run(plan, plan.spans[0], tmp_path, "a")
    shards = Output(tmp_path).span(plan.spans[0])
    rows = pq.read_table(shards / "intervals-a.parquet").to_pylist()
    assert [(row["start_step"], row["end_step"]) for row in rows] == [(0, 3), (0, 3)]
