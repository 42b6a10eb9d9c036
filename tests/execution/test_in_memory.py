"""`allocate` on two states in memory, against the twin and closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    Bench,
    Case,
    cases,
    classify,
    convnet,
    frozen,
    gpt2,
    labels,
    mlp,
    quadratic,
    random_states,
    transformer,
    vectors,
)
from torch import Tensor, nn
from twin import Twin

from lcray.errors import CheckpointError, TaskError, UsageError
from lcray.execution.in_memory import Allocation, allocate
from lcray.tasks.task import Task

# Relative to Σ|LC|: sums of some hundred float64 terms.
CLOSE = 1e-10


def run(case: Case, **options: Any) -> Allocation:
    options = {"dtype": "float64", **case.options, **options}
    (found,) = allocate(case.task, *case.states[:2], **options).values()
    return found


def check_twin(case: Case, rule: str) -> None:
    found = run(case, rule=rule)
    bench = Bench(case)
    expected = bench.twin(case).interval(*case.states[:2], rule)
    scale = expected.scale
    assert found.split == "train" and list(found.elements) == list(expected.lc)
    for name, lc in expected.lc.items():
        assert found.elements[name].shape == lc.shape
        assert (found.elements[name] - lc).abs().max() <= CLOSE * scale
    assert abs(found.lc - expected.total) <= CLOSE * scale
    change = expected.loss_end - expected.loss_start
    assert abs(found.loss_change - change) <= CLOSE * expected.loss_start
    assert abs(found.gap - (expected.total - change)) <= CLOSE * max(scale, expected.loss_start)
    errors = expected.error or {}
    assert found.layer_error.keys() == errors.keys()
    assert all(abs(found.layer_error[n] - errors[n]) <= CLOSE * scale for n in errors)
    for group, rows in expected.groups.items():
        for name, value in rows.items():
            assert abs(found.groups[group][name] - value) <= CLOSE * max(scale, 1e-3)
    assert bool(found.groups) is (case.groups is not None)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    case=cases(heavy=False),
    rule=st.sampled_from(["simpson", "left", "gauss", "trapezoid", "midpoint", "gauss-lobatto"]),
)
def test_the_twin_agrees(case: Case, rule: str) -> None:
    check_twin(case, rule)


def test_the_twin_agrees_on_gpt2() -> None:
    check_twin(gpt2(1), "simpson")


def test_rows_of_layers() -> None:
    case = frozen(2, "tanh")
    found = run(case)
    table = found.layers()
    assert list(table.index) == list(found.elements) and table.index.name == "layer"
    expected = Bench(case).twin(case).interval(*case.states, "simpson")
    for name, row in table.iterrows():
        values = expected.lc[str(name)].reshape(-1).tolist()
        assert row.n_helping == sum(v < 0 for v in values)
        assert row.n_hurting == sum(v > 0 for v in values)
        assert row.n_zero == sum(v == 0 for v in values)
        assert row.lc == pytest.approx(math.fsum(values), abs=CLOSE * expected.scale)
        helping = math.fsum(v for v in values if v < 0)
        assert row.lc_helping == pytest.approx(helping, abs=CLOSE * expected.scale)
        assert row.lc_helping + row.lc_hurting == pytest.approx(row.lc, abs=1e-14)
    assert table.loc["body.0.weight", "n_zero"] == 12


def test_a_quadratic_closes() -> None:
    found = run(quadratic(3))
    assert abs(found.gap) <= 1e-12 * abs(found.loss_change)
    assert found.converged and found.panels == 1
    assert found.loss_change == found.loss_end - found.loss_start


def test_states_and_inputs_are_left_alone() -> None:
    case = convnet(4, "gelu", "batch")
    before = copy.deepcopy(case.states)
    data = tuple(part.clone() for part in case.data)
    first = run(case)
    second = run(case)
    for state, kept in zip(case.states, before, strict=True):
        assert all(torch.equal(state[k], kept[k]) for k in kept)
    assert all(torch.equal(a, b) for a, b in zip(case.data, data, strict=True))
    assert all(torch.equal(first.elements[k], second.elements[k]) for k in first.elements)


def test_splits_are_independent_of_each_other_and_of_their_order() -> None:
    case = mlp(5, "tanh")
    x, y = case.data
    parts = {"train": (x, y), "val": (x[:4] * 2, y[:4])}
    alone = {
        name: allocate(
            Task(case.make, {name: part}, case.loss, labels), *case.states, dtype="float64"
        )[name]
        for name, part in parts.items()
    }
    for order in (["train", "val"], ["val", "train"]):
        task = Task(case.make, {name: parts[name] for name in order}, case.loss, labels)
        together = allocate(task, *case.states, dtype="float64")
        assert list(together) == order
        for name in order:
            assert together[name].groups == alone[name].groups
            for layer, values in alone[name].elements.items():
                assert torch.equal(together[name].elements[layer], values)
        (chosen,) = allocate(task, *case.states, dtype="float64", splits=("val",)).values()
        assert chosen.split == "val" and chosen.lc == alone["val"].lc


def test_refinement_meets_its_tolerance_or_says_that_it_did_not() -> None:
    case = mlp(6, "tanh")
    case = replace(case, states=random_states(case.make, 6, 2, step=0.4))
    coarse = run(case)
    fine = run(case, refine=True, rtol=1e-6, max_panels=64)
    assert fine.converged and fine.panels > 1
    assert abs(fine.gap) <= 1e-6 * abs(fine.loss_change) < abs(coarse.gap)
    capped = run(case, refine=True, rtol=1e-15, max_panels=2)
    assert not capped.converged and capped.panels == 2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(prefix: str) -> None:
    case = transformer(7)
    wrapped = tuple({prefix + k: v for k, v in state.items()} for state in case.states)
    a, b = run(case), run(replace(case, states=wrapped))
    assert list(a.elements) == list(b.elements)
    assert all(torch.equal(a.elements[k], b.elements[k]) for k in a.elements)


def test_parameters_of_modules_can_be_passed_as_they_are() -> None:
    case = mlp(8, "gelu")
    models = []
    for state in case.states:
        model = case.make().double()
        model.load_state_dict(state)
        models.append(dict(model.state_dict(keep_vars=True)))
    a, b = run(case), run(replace(case, states=tuple(models)))
    assert all(torch.equal(a.elements[k], b.elements[k]) for k in a.elements)
    assert not any(v.requires_grad for v in b.elements.values())


def test_partial_states_move_on_a_fixed_base() -> None:
    torch.manual_seed(0)
    base = mlp(9, "tanh").make().state_dict()

    def make() -> nn.Module:
        model = mlp(9, "tanh").make()
        model.load_state_dict(base)
        return model

    case = replace(mlp(9, "tanh"), make=make)
    kept = ("body.2.weight", "body.2.bias")
    partial = tuple({k: state[k] for k in kept} for state in case.states)
    whole = tuple({**{k: v.double() for k, v in base.items()}, **p} for p in partial)
    with pytest.raises(CheckpointError, match=r"body\.0\.weight.*missing"):
        run(replace(case, states=partial))
    a = run(replace(case, states=partial), partial=True)
    b = run(replace(case, states=whole))
    for name, values in b.elements.items():
        assert torch.equal(a.elements[name], values)
        assert bool((values != 0).any()) is (name in kept)


def test_a_task_by_reference(tmp_path: Path) -> None:
    (tmp_path / "line.py").write_text(
        "import torch\n"
        "from lcray.tasks.task import Task\n"
        "x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)\n"
        "task = Task(lambda: torch.nn.Linear(2, 1, bias=False), {'all': (x,)},\n"
        "            lambda net, batch: net(batch[0]).squeeze(1))\n"
    )
    before = {"weight": torch.tensor([[1.0, 1.0]])}
    after = {"weight": torch.tensor([[1.5, 0.5]])}
    (found,) = allocate(f"{tmp_path}/line.py:task", before, after).values()
    # L = mean(x) · w with mean (2, 3): LC = (½ · 2, -½ · 3). The losses are exact; Simpson's
    # sixths are rounded.
    assert found.elements["weight"][0].tolist() == pytest.approx([1.0, -1.5], rel=4e-16)
    assert found.loss_change == -0.5 and abs(found.gap) <= 1e-15
    assert found.elements["weight"].dtype == torch.float64


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(value: float) -> None:
    case = mlp(10, "tanh")
    bad = dict(case.states[1])
    bad["body.0.bias"] = torch.full_like(bad["body.0.bias"], value)
    for states in ((case.states[0], bad), (bad, case.states[0])):
        with pytest.raises(CheckpointError, match="nonfinite_checkpoint") as caught:
            run(replace(case, states=states))
        assert "'train'" in str(caught.value)


def test_losses_that_are_not_finite_are_refused() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(1))

    def loss(net: Any, batch: Any) -> Tensor:
        return (batch[0] * net.p.log()).squeeze(1)

    states: tuple[Mapping[str, Tensor], ...] = (
        {"p": torch.tensor([-1.0])},
        {"p": torch.tensor([2.0])},
    )
    task = Task(Log, {"train": (torch.ones(2, 1),)}, loss)
    with pytest.raises(CheckpointError, match="nonfinite_loss"):
        allocate(task, *states)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rul": "simpson"}, "'rule'"),
        ({"rule": "simson"}, "'simpson'"),
        ({"rule": "gauss", "refine": True}, "cannot be refined"),
        ({"splits": ("trian",)}, "'train'"),
        ({"batch_norm": "runing"}, "'running'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run(mlp(11, "tanh"), **options)
    assert "\n" not in str(caught.value)


def test_states_that_share_their_memory_are_refused() -> None:
    model = nn.Linear(2, 1)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    task = Task(lambda: nn.Linear(2, 1), {"train": (x,)}, lambda net, b: net(b[0]).square()[:, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.state_dict()
    copied = {name: value.clone() for name, value in before.items()}
    model(x).square().mean().backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"are the same memory.*copy it first") as caught:
        allocate(task, before, model.state_dict())
    assert "\n" not in str(caught.value)
    (found,) = allocate(task, copied, model.state_dict()).values()
    assert found.loss_change < 0
    for states, name in (((model, copied), "before"), ((copied, model), "after")):
        with pytest.raises(UsageError, match=f"^{name}: needs a state dict, not a Linear$"):
            allocate(task, *states)
    with pytest.raises(UsageError, match=r"^after: 'bias' is a float, must be a tensor$"):
        allocate(task, copied, {**copied, "bias": 1.0})


def test_states_may_share_what_did_not_move() -> None:
    case = mlp(3, "tanh")
    before, after = case.states[:2]
    kept = next(iter(before))
    found = run(replace(case, states=(before, {**after, kept: before[kept]})))
    assert not found.elements[kept].any() and found.lc != 0


def test_the_repr_is_one_short_line() -> None:
    text = repr(run(mlp(0, "tanh")))
    assert "\n" not in text and len(text) < 120
    assert text.startswith("Allocation('train', loss_change=")


class Writing(nn.Module):
    """Writes something in its forward pass, whatever the mode."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how, self.calls = nn.Linear(3, 2), how, 0
        self.register_buffer("average", torch.zeros(2, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        getattr(self, f"_{self.how}")()
        scale = 1 + 0.1 * torch.tanh(self.count.to(x.dtype) + self.hidden + self.calls)
        return self.a(x) * scale + x @ self.average.T

    def _average(self) -> None:
        self.average.mul_(0.9).add_(self.a.weight.detach(), alpha=0.1)

    def _data(self) -> None:
        self.a.weight.data.clamp_(-0.1, 0.1)

    def _replaced(self) -> None:
        self.average = self.average + 1

    def _frozen(self) -> None:
        self.a.weight.requires_grad_(False)

    def _hidden(self) -> None:
        self.hidden += 1

    def _calls(self) -> None:
        self.calls += 1

    def _count(self) -> None:
        self.count += 1

    def _count_anew(self) -> None:
        self.count = self.count + 1

    def _nothing(self) -> None:
        pass


def writing(how: str) -> Case:
    x, y = vectors(2, 6, 3, 2, False)
    states = random_states(lambda: Writing(how), 3, 2)
    return Case(how, lambda: Writing(how), (x, y), classify, states)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("average", "model layer 'average': was written to while the loss was computed"),
        ("data", "model layer 'a.weight': was written to while the loss was computed"),
        ("replaced", "model layer 'average': was replaced while the loss was computed"),
        ("frozen", "model layer 'a.weight': its requires_grad was changed while the loss was"),
        ("hidden", "at the same weights; switch sampling"),
        ("calls", "at the same weights; switch sampling"),
    ],
)
def test_a_forward_pass_that_writes_is_refused(how: str, line: str) -> None:
    with pytest.raises(TaskError, match=line) as caught:
        run(writing(how), batch_size=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["count", "count_anew"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_counter_is_the_checkpoints_in_every_batch(how: str, batch_size: int) -> None:
    # As in a fresh model, the loss of any batch is that after one more count.
    case = writing(how)
    before, after = ({**s, "count": torch.tensor(0)} for s in case.states)
    counted = tuple({**s, "count": torch.tensor(1)} for s in (before, after))
    found = run(replace(case, states=(before, after)), batch_size=batch_size)
    still = writing("nothing")
    chunks = [tuple(part[i : i + 1] for part in case.data) for i in range(len(case.data[0]))]
    expected = Twin(still.make, still.loss, chunks).interval(*counted, "simpson")
    assert abs(found.loss_start - expected.loss_start) <= 1e-15
    for name, values in expected.lc.items():
        assert (found.elements[name] - values).abs().max() <= 1e-14 * expected.scale, name


def test_a_buffer_that_follows_a_weight_moves_along_the_path() -> None:
    # An exponential average that training wrote: one more thing that the loss depends on.
    case = writing("nothing")
    before, after = case.states
    after = {**after, "average": 0.9 * before["average"] + 0.1 * after["a.weight"]}
    found = run(replace(case, states=(before, after)))
    chunks = [tuple(part[i : i + 1] for part in case.data) for i in range(len(case.data[0]))]
    expected = Twin(case.make, case.loss, chunks).interval(before, after, "simpson")
    assert found.elements["average"].abs().sum() > 0.01 * expected.scale
    for name, values in expected.lc.items():
        assert (found.elements[name] - values).abs().max() <= 1e-14 * expected.scale, name


class Odd(nn.Module):
    """Odd parameters.

    Of no axis, of no element, unused, in a part that is in it twice, under two names, with sparse
    gradients, in a part without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(3, 4, sparse=True)
        part = nn.Linear(4, 4)
        self.first, self.again = part, nn.ModuleList([nn.Tanh(), part])
        self.scale = nn.Parameter(torch.ones(()))
        self.empty, self.unused = nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.ones(2))
        self.head, self.tail = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
        self.tail.weight = self.head.weight
        self.register_buffer("nothing", None)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.rows(ids))) * self.scale
        with torch.no_grad():
            fixed = self.again[0](self.unused).sum() * 0 + 1
        h = self.again[1](h) * fixed + self.empty.sum(0)
        return self.head(h) + self.tail(h**2)


def test_odd_parameters() -> None:
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    data = (ids, torch.tensor([0, 1, 2, 2, 1, 0]))
    case = Case("odd", Odd, data, classify, random_states(Odd, 4, 2))
    found = run(case, batch_size=4)
    chunks = [tuple(part[i : i + 1] for part in data) for i in range(len(ids))]
    expected = Twin(Odd, classify, chunks).interval(*case.states, "simpson")
    assert found.elements.keys() == expected.lc.keys()
    assert found.elements["scale"] != 0 and not found.elements["unused"].any()
    for name, values in expected.lc.items():
        difference = (found.elements[name] - values).abs().sum()
        assert difference <= 1e-14 * expected.scale, name


def test_a_parameter_that_only_one_split_uses() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

        def forward(self, x: Tensor, head: int) -> Tensor:
            return self.heads[head](x)

    def loss(net: Any, batch: Any) -> Tensor:
        return net(batch[0], int(batch[1][0])).square().sum(1)

    x = vectors(2, 6, 3, 2, False)[0]
    splits = {f"{head}": (x, torch.full((6,), head)) for head in range(2)}
    states = random_states(Heads, 4, 2)
    found = allocate(Task(Heads, splits, loss), *states, dtype="float64")
    for head in range(2):
        used = {name for name, lc in found[f"{head}"].elements.items() if lc.any()}
        assert used == {f"heads.{head}.weight", f"heads.{head}.bias"}
        assert abs(found[f"{head}"].gap) <= 1e-12  # a quadratic
