"""Sums in parts: how batches are cut and dealt out, and that only the number of parts counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scenes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Bench, Case, closeness, convnet, mlp, transformer
from torch import Tensor

import lcray
from lcray.allocation.partial_sums import Answer, Request, Seat, batches_of, cut_parts, deal
from lcray.allocation.path import Point
from lcray.errors import TaskError, UsageError
from lcray.execution.cluster.resources import Resources
from lcray.execution.worker.data_parallel import Colleague, Cut, Order, SentPoint, points_of
from lcray.execution.worker.workbench import Workbench
from lcray.execution.worker.workspace import Workspace
from lcray.planning.costs import largest_share
from lcray.planning.make import make_plan, make_settings
from lcray.planning.plan import Plan
from lcray.tasks.task import Task


@settings(deadline=None)
@given(n=st.integers(0, 50), k=st.integers(1, 60), team=st.integers(1, 8))
def test_every_batch_is_in_one_part_and_every_part_with_one_worker(
    n: int, k: int, team: int
) -> None:
    parts = cut_parts(n, k)
    assert [i for part in parts for i in part] == list(range(n))
    assert len(parts) == min(n, k) and all(parts)
    sizes = [len(part) for part in parts]
    assert (
        sizes == sorted(sizes, reverse=True) and max(sizes, default=0) - min(sizes, default=0) < 2
    )
    dealt = deal(len(parts), team)
    assert [i for own in dealt for i in own] == list(range(len(parts)))
    assert len(dealt) == team and max(map(len, dealt)) == math.ceil(len(parts) / team)
    batches = [batches_of(Seat(index, team), k, n) for index in range(team)]
    assert [i for own in batches for i in own] == list(range(n))


@pytest.mark.parametrize(("k", "team", "share"), [(1, 1, 1), (4, 2, 0.5), (3, 2, 2 / 3), (4, 1, 1)])
def test_the_busiest_worker_sets_the_pace(k: int, team: int, share: float) -> None:
    assert largest_share(k, team) == pytest.approx(share)


class Neighbours:
    """The members of a team in this process: `lcray.execution.cluster.team.Team` without Ray."""

    def __init__(self, task: Task, settings: Any, team: int) -> None:
        self.members = [
            Colleague(Workbench(task, settings, seat=Seat(index, team))) for index in range(1, team)
        ]
        self.computed: list[int] = []
        self._cut: Cut | None = None

    def start(self, plan: Plan) -> None:
        self._cut = Cut.of(plan)

    def cut(self, cut: Cut) -> None:
        self._cut = cut

    def measure(self, point: Point) -> Iterator[Any]:
        return (member.measure(SentPoint.of(point)) for member in self.members)

    def share_out(self, request: Request, n_parts: int) -> tuple[range, Iterator[Answer]]:
        own, *others = deal(n_parts, len(self.members) + 1)
        return own, self._answers(request, others)

    def _answers(self, request: Request, others: list[range]) -> Iterator[Answer]:
        assert self._cut is not None
        points = points_of(request)
        sent = [SentPoint.of(point) for point in points.values()]
        for member, numbers in zip(self.members, others, strict=True):
            for number in numbers:
                order = Order(
                    self._cut, request.split, number, tuple(points),
                    request.site.s, request.share, request.gradient,
                )  # fmt: skip
                sums, array = member.answer(order, sent)
                self.computed.append(number)
                if array is None:
                    yield Answer(sums, None)
                else:
                    yield Answer(sums, partial(_block, array))


def _block(array: Any, where: slice) -> Tensor:
    return torch.from_numpy(array[where])


def work(run: Path, task: Task, out: Path, k: int, team: int, **options: Any) -> Any:
    """Analyze in this process, with a team."""
    settings = make_settings({"partial_sums": k, **options})
    lead = Workspace(task, str(run), settings, seat=Seat(0, team))
    probe = lead.probe()
    plan = make_plan(lead.series.steps, settings, lead.flat.layers, probe.splits, span_length=2)
    neighbours = Neighbours(task, settings, team)
    if team > 1:
        lead.lead(neighbours)
    found = []
    for span in plan.spans:
        lead.run(plan, span, out, "only")
        folder = out / "shards" / span.name
        found += [(p.name, p.read_bytes()) for p in sorted(folder.glob("*.parquet"))]
    return found, neighbours.computed, plan


MIXED = replace(scenes.tied, groups=lambda batch: batch[0][:, 1:].flatten() % 3)
POINTS = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
MANY = replace(scenes.plain, splits={"train": (POINTS, POINTS[:, :3].argmax(1))})
CASES = [
    (scenes.plain, {"batch_size": 2}),
    (scenes.batchnorm, {"batch_norm": "batch", "batch_size": 4}),
    (scenes.batchnorm, {"batch_size": 3, "refine": True}),
    (MIXED, {"batch_size": 2, "rule": "gauss-lobatto"}),
    (MANY, {"batch_size": 1, "samples": 41}),
    (MIXED, {"batch_size": 1, "samples": 7}),
]
IDS = [
    "groups", "batch statistics", "buffers, refined", "mixed groups, lobatto",
    "replicates in groups", "replicates, mixed groups",
]  # fmt: skip


@pytest.mark.parametrize(("task", "options"), CASES, ids=IDS)
@pytest.mark.slow
def test_who_takes_which_part_does_not_change_a_bit(
    task: Task, options: dict[str, Any], tmp_path: Path
) -> None:
    run = scenes.record(task, tmp_path / "run", steps=3)
    for k, teams in ((3, (2, 3)), (2, (2,))):
        alone, nobody, plan = work(run, task, tmp_path / f"{k}-1", k, 1, **options)
        assert nobody == [] and plan.partial_sums == k
        assert any(name.startswith("replicates-") for name, _ in alone) == ("samples" in options)
        for team in teams:
            shared, computed, _ = work(run, task, tmp_path / f"{k}-{team}", k, team, **options)
            assert computed and max(computed) == k - 1, "others took the last parts"
            assert shared == alone


def evaluate(case: Case, state: Any, k: int, **options: Any) -> tuple[Any, Tensor]:
    bench = Bench(case, partial_sums=k, batch_size=2, **options)
    bench.segments((state, state))[0].set_point(bench.flat, 0.0)
    out = bench.engine.new_vector()
    return bench.engine.evaluate(bench.split, out), out


NETS = [
    mlp(1, "tanh", n=11, states=3),
    transformer(2, states=3),
    convnet(3, "gelu", "batch", states=3),
]


@pytest.mark.parametrize("case", NETS, ids=lambda case: case.name)
@pytest.mark.parametrize("k", [2, 3, 100])
def test_parts_agree_with_the_twin(case: Case, k: int) -> None:
    bench = Bench(case, partial_sums=k, batch_size=2, rule="simpson")
    twin = bench.twin(case)
    for number, result in enumerate(bench.run(case.states)):
        expected = twin.interval(case.states[number], case.states[number + 1], "simpson")
        assert closeness(result, expected, bench) <= 1e-10
        assert abs(result.loss_end - expected.loss_end) <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_change_gradients_by_rounding_and_losses_not_at_all(dtype: str) -> None:
    case = mlp(4, "gelu", n=13, states=1)
    whole, one = evaluate(case, case.states[0], 1, dtype=dtype)
    changed = False
    for k in (2, 3, 7):
        found, gradient = evaluate(case, case.states[0], k, dtype=dtype)
        assert found.loss == whole.loss and found.n_items == 13
        # Batches are the same, so only float64 additions are in another order.
        assert (gradient - one).abs().max() <= 1e-14 * one.abs().max()
        changed |= not torch.equal(gradient, one)
    # Sums of a few float32 values of like size are exact in float64.
    assert changed or dtype == "float32", "the order of sums is another one"


def test_one_sum_is_a_plain_loop_over_batches() -> None:
    """What `partial_sums = 1` gives, bit for bit: float64 additions in the order of batches."""
    case = mlp(5, "tanh", n=9, states=1)
    case = replace(case, groups=None)
    found, gradient = evaluate(case, case.states[0], 1, dtype="float32")
    model = case.make().float()
    model.load_state_dict({name: value.float() for name, value in case.states[0].items()})
    total: dict[str, Tensor] = {
        name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()
    }
    bench = Bench(case, batch_size=2, dtype="float32")
    losses = []
    for batch in bench.split.batches:
        model.zero_grad()
        loss = case.loss(model, batch)
        losses.append(float(loss.detach().double().sum()))
        loss.sum().backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad
    for name, value in bench.by_layer(gradient).items():
        assert torch.equal(value, total[name] / 9)
    assert found.loss == math.fsum(losses) / 9


def test_members_keep_their_part_of_the_data_alone() -> None:
    x = torch.arange(20.0)[:, None].expand(20, 4).clone()
    task = Task(scenes.build_plain, {"train": (x, torch.zeros(20).long())}, scenes.cross_entropy)
    settings = make_settings({"batch_size": 2})
    whole = Workbench(task, settings).splits[0].batches.nbytes
    seen: list[float] = []
    for index in range(3):
        bench = Workbench(task, settings, seat=Seat(index, 3))
        bench.adopt(2, "contiguous", 3, whole=False)
        (split,) = bench.splits
        own = batches_of(Seat(index, 3), 3, 10)
        seen += [float(v) for batch in split.batches.only(own) for v in batch[0][:, 0]]
        assert split.batches.nbytes == pytest.approx(whole * len(own) / 10)
        outside = next(i for i in range(10) if i not in own)
        with pytest.raises(KeyError):
            split.batches[outside]
    assert seen == list(map(float, range(20)))


def test_streamed_parts_are_those_that_are_resident(tmp_path: Path) -> None:
    run = scenes.record(scenes.plain, tmp_path / "run", steps=3)
    options = {"batch_size": 2}
    resident, _, _ = work(run, scenes.plain, tmp_path / "a", 3, 2, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workbench, "_measure_room", lambda self, share: 0)
        streamed, computed, _ = work(run, scenes.plain, tmp_path / "b", 3, 2, **options)
    assert computed and streamed == resident


def test_a_broken_loss_on_another_worker_is_the_tasks(tmp_path: Path) -> None:
    def loss(model: Any, batch: Any) -> Any:
        losses = scenes.cross_entropy(model, batch)
        planned = len(losses) <= 2  # not what workers compare before a span
        return losses, torch.where((batch[0][:, 0] == worst) & planned, -1.0, 1.0)

    x, y = scenes.points()["train"]
    worst = math.nan
    task = Task(scenes.build_plain, {"train": (x, y)}, loss)
    run = scenes.record(scenes.plain, tmp_path / "run", steps=2)
    settings = make_settings({"batch_size": 2})
    lead = Workspace(task, str(run), settings, seat=Seat(0, 2), partial_sums=2)
    probe = lead.probe()
    plan = make_plan(lead.series.steps, settings, lead.flat.layers, probe.splits, partial_sums=2)
    lead.lead(Neighbours(task, settings, 2))
    worst = float(x[-1, 0])  # of the last part
    with pytest.raises(TaskError, match="weights must be finite and not negative"):
        lead.run(plan, plan.spans[0], tmp_path / "out", "only")


@pytest.mark.usefixtures("inline")
def test_the_plan_keeps_the_number_of_sums(tmp_path: Path) -> None:
    run = scenes.record(scenes.plain, tmp_path / "run", steps=4)
    options: dict[str, Any] = {"batch_size": 3, "span_length": 2}
    one = lcray.analyze(run, "scenes:plain", tmp_path / "1", **options)
    three = lcray.analyze(run, "scenes:plain", tmp_path / "3", partial_sums=3, **options)
    assert (one.plan.partial_sums, three.plan.partial_sums) == (1, 3)
    assert Plan.from_dict(three.plan.to_dict()) == three.plan
    a, b = (
        found.layers().set_index(["split", "start_step", "layer"])["lc"] for found in (one, three)
    )
    assert (a - b).abs().max() <= 1e-6 * a.abs().max()
    assert lcray.verify(tmp_path / "3").ok
    with pytest.raises(UsageError, match="data-parallel 4: there are 3 partial sums to share"):
        lcray.analyze(
            run, "scenes:plain", tmp_path / "3", partial_sums=3,
            resources=Resources(data_parallel=4), **options,
        )  # fmt: skip
    team = Resources(data_parallel=4)
    by_plan = r"there are 3 partial sums to share \(the plan says so\)"
    with pytest.raises(UsageError, match=by_plan):
        lcray.analyze(run, "scenes:plain", tmp_path / "new", plan=three.plan, resources=team)
    assert not (tmp_path / "new").exists()
    by_record = r"there are 1 partial sums to share \(the plan says so\)"
    with pytest.raises(UsageError, match=by_record):
        lcray.analyze(run, "scenes:plain", tmp_path / "1", resources=team, **options)
