"""Workers whose models or losses differ are refused, before they add to a table."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scenes
import torch
from torch import Tensor, nn

import lcray
from lcray.errors import DisagreementError
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.analyze import Progress
from lcray.execution.worker.agreement import check_agreement, digest
from lcray.execution.worker.workspace import Workspace
from lcray.planning.make import make_plan, make_settings
from lcray.planning.plan import Plan, Reference, SplitPlan
from lcray.tables.shards.writer import read_commit
from lcray.tasks.task import Task


class Features(nn.Module):
    """Adds features of its input that are in no state dict."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = scenes.build_plain()
        generator = torch.Generator().manual_seed(seed)
        self.features = 0.1 * torch.randn(4, 3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) + x @ self.features
        return y


def by_process() -> nn.Module:
    """The same within a process, so that building it twice does not tell."""
    return Features(os.getpid())


def met_loss(folder: str, model: nn.Module, batch: Any) -> Tensor:
    """Once there is a plan, waits for a second worker."""
    Path(folder, f"at-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while Path(folder, "planned").exists() and len([*Path(folder).glob("at-*")]) < 2:
        assert time.monotonic() < deadline, "nobody came"
        time.sleep(0.02)
    return scenes.cross_entropy(model, batch)


differing = Task(by_process, scenes.points, scenes.cross_entropy)
alike = Task(partial(Features, 0), scenes.points, scenes.cross_entropy)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.record(alike, tmp_path_factory.mktemp("features") / "run")


def split(loss: float, *norms: float) -> SplitPlan:
    return SplitPlan("train", 8, 8, 8.0, 1.0, 1, reference=Reference(loss, norms))


def layers(run: Path) -> Any:
    return Workspace(alike, str(run), make_settings({})).flat.layers


@pytest.mark.parametrize(
    ("loss", "norms", "what"),
    [
        (2.0 * (1 + 0.9e-5), (1.0, 0.0, 1e-7, 3.0), None),
        (2.0 * (1 + 1.1e-5), (1.0, 0.0, 0.0, 3.0), "a loss of 2.000022, not 2"),
        (2.0, (1.0, 0.0, 1e-7, 3.0 * (1 + 0.9e-4)), None),
        (2.0, (1.0, 0.0, 1e-7, 3.0 * (1 + 1.2e-4)), "a gradient of norm 3.00036, not 3"),
        (2.0, (1.0, 0.0, 1e-3, 3.0), "a gradient of norm 0.001, not 0"),
        (float("nan"), (1.0, 0.0, 0.0, 3.0), "a loss of nan, not 2"),
    ],
)
def test_how_much_may_be_rounding(
    run: Path, loss: float, norms: tuple[float, ...], what: str | None
) -> None:
    """1e-5 of the loss, 1e-4 of a norm; a layer whose gradient is rounding has no norm."""
    planned, found = [split(2.0, 1.0, 0.0, 0.0, 3.0)], {"train": Reference(loss, norms)}
    if what is None:
        check_agreement(planned, layers(run), found)
        return
    with pytest.raises(DisagreementError, match=what):
        check_agreement(planned, layers(run), found)


def test_a_digest_tells_bits_apart() -> None:
    one = {"train": Reference(2.0, (1.0, 3.0))}
    assert digest(one) == digest({"train": Reference(2.0, (1.0, 3.0))})
    assert digest(one) != digest({"train": Reference(2.0, (1.0, 3.0000000000000004))})


def drafted(work: Workspace) -> Plan:
    splits = work.probe().splits
    return make_plan(work.series.steps, work.settings, work.flat.layers, splits, span_length=4)


def test_a_worker_that_differs_from_the_plan_commits_nothing(run: Path, tmp_path: Path) -> None:
    plan = drafted(Workspace(alike, str(run), make_settings({})))
    same = Workspace(alike, str(run), make_settings({}))
    assert same.run(plan, plan.spans[0], tmp_path, "a").committed
    commit = read_commit(tmp_path, plan.spans[0])
    assert commit is not None and len(commit.info["reference"]) == 16
    other = Workspace(replace(alike, model=partial(Features, 1)), str(run), make_settings({}))
    with pytest.raises(DisagreementError, match="a worker differs from the worker that planned"):
        other.run(plan, plan.spans[1], tmp_path, "b")
    assert read_commit(tmp_path, plan.spans[1]) is None


def test_plans_keep_what_workers_must_find_and_old_ones_have_nothing(run: Path) -> None:
    work = Workspace(alike, str(run), make_settings({}))
    plan = drafted(work)
    data = json.loads(json.dumps(plan.to_dict()))
    again = Plan.from_dict(data)
    assert [s.reference for s in again.splits] == [s.reference for s in plan.splits]
    assert all(s.reference is not None for s in again.splits)
    for part in data["splits"]:
        del part["reference"]
    old = Plan.from_dict(data)
    assert old == plan and [s.reference for s in old.splits] == [None, None]
    work.run(old, old.spans[0], run.parent / "old", "a")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    @pytest.mark.slow
    def test_workers_that_differ_end_the_analysis(self, run: Path, tmp_path: Path) -> None:
        def tell(progress: Progress) -> None:
            if progress.phase == "spans":
                (tmp_path / "planned").touch()

        task = replace(differing, loss=partial(met_loss, str(tmp_path)))
        with pytest.raises(DisagreementError, match="seed what is random"):
            lcray.analyze(
                run,
                task,
                tmp_path / "out",
                resources=Resources(workers=2),
                span_length=1,
                on_progress=tell,
            )
        assert not (tmp_path / "out" / "tables").exists()

    @pytest.mark.slow
    def test_members_of_a_team_that_differ_do_so_too(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(DisagreementError, match="seed what is random"):
            lcray.analyze(
                run,
                "test_agreement:differing",
                tmp_path / "out",
                resources=Resources(workers=2, data_parallel=2),
                batch_size=3,
            )
        assert not (tmp_path / "out" / "tables").exists()
