"""The full-batch loss and gradient against a plain double loop over items."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FEW,
    ROUNDING,
    Bench,
    Case,
    cases,
    classify,
    convnet,
    labels,
    mlp,
    random_states,
    token_groups,
    transformer,
)
from torch import Tensor, nn

from lcray.allocation.path import Point, Segment
from lcray.errors import TaskError
from lcray.execution.worker.workbench import Workbench
from lcray.settings import Settings
from lcray.tasks.task import Task


def evaluate(bench: Bench, state: dict[str, Tensor], directions: Any = ()) -> Any:
    """Loss and gradient at a state; float buffers do not move."""
    segment = bench.segments((state, state))[0]
    bench.flat.differentiate_buffers(frozenset())
    segment.set_point(bench.flat, 0.0)
    out = bench.engine.new_vector()
    return bench.engine.evaluate(bench.split, out, directions), out


@FEW
@given(case=cases(states=1), batch_size=st.integers(2, 5))
def test_loss_and_gradient_equal_a_loop_over_items(case: Case, batch_size: int) -> None:
    bench = Bench(case, batch_size=batch_size)
    found, gradient = evaluate(bench, case.states[0])
    expected = bench.twin(case).point(case.states[0], set())
    assert abs(found.loss - expected.loss) <= ROUNDING * abs(expected.loss)
    by_layer = bench.by_layer(gradient)
    size = max(float(g.abs().max()) for g in expected.gradient.values())
    for name, value in expected.gradient.items():
        assert (by_layer[name] - value).abs().max() <= ROUNDING * size, name


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 100])
def test_ragged_batches_change_nothing(batch_size: int) -> None:
    case = replace(mlp(1, "tanh", n=7, weighted=True, states=1), groups=None)
    bench = Bench(case, batch_size=batch_size)
    found, gradient = evaluate(bench, case.states[0])
    x, y, w = case.data
    model = case.make().double()
    model.load_state_dict(case.states[0])
    loss = (F.cross_entropy(model(x), y, reduction="none") * w).sum() / w.sum()
    loss.backward()
    assert sum(bench.split.batch_sizes) == 7 and found.n_items == 7
    assert abs(found.loss - float(loss.detach())) <= ROUNDING
    assert found.total_weight == pytest.approx(float(w.sum()), rel=1e-15)
    for name, parameter in model.named_parameters():
        assert (bench.by_layer(gradient)[name] - parameter.grad).abs().max() <= ROUNDING


def test_gradients_do_not_leak_from_one_evaluation_to_the_next() -> None:
    case = mlp(2, "gelu", states=2)
    bench = Bench(case)
    first, gradient = evaluate(bench, case.states[0])
    evaluate(bench, case.states[1])
    again, same = evaluate(bench, case.states[0])
    assert torch.equal(gradient, same) and first.loss == again.loss
    assert all(parameter.grad is None for parameter in bench.flat.model.parameters())


def test_weights_multiply_items_as_repetition_does() -> None:
    case = mlp(3, "tanh", n=4, states=1)
    x, y = case.data
    times = torch.tensor([0, 1, 2, 3])
    repeated = replace(case, data=(x.repeat_interleave(times, 0), y.repeat_interleave(times)))

    def weighted(net: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return classify(net, batch), batch[2]

    counted = replace(case, data=(x, y, times.double()), loss=weighted)
    a, grad_a = evaluate(Bench(repeated), case.states[0])
    b, grad_b = evaluate(Bench(counted), case.states[0])
    assert abs(a.loss - b.loss) <= ROUNDING
    assert (grad_a - grad_b).abs().max() <= ROUNDING
    assert b.total_weight == 6.0 and b.n_items == 4 and a.n_items == 6


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_items_of_weight_zero_may_have_any_loss(poison: float) -> None:
    case = mlp(4, "tanh", n=6, states=1)
    x, y = case.data
    keep = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)

    def loss(net: Any, batch: Any) -> tuple[Tensor, Tensor]:
        losses = classify(net, batch)
        return torch.where(batch[2] > 0, losses, poison + losses), batch[2]

    poisoned = replace(case, data=(x, y, keep), loss=loss)
    clean = replace(case, data=(x[keep > 0], y[keep > 0]))
    for groups in (None, labels):
        a, grad_a = evaluate(Bench(replace(poisoned, groups=groups)), case.states[0])
        b, grad_b = evaluate(Bench(replace(clean, groups=groups)), case.states[0])
        assert abs(a.loss - b.loss) <= ROUNDING
        assert bool(torch.isfinite(grad_a).all())
        assert (grad_a - grad_b).abs().max() <= ROUNDING


def plain_group_gradient(case: Case, group: int) -> tuple[float, dict[str, Tensor], float]:
    """The group's own mean loss, its gradient and its weight, in one plain pass."""
    model = case.make().double().eval()
    model.load_state_dict(case.states[0])
    found = case.loss(model, case.data)
    losses, weights = found if isinstance(found, tuple) else (found, torch.ones_like(found))
    assert case.groups is not None
    mine = (case.groups(case.data) == group) & (weights > 0)
    mass = weights[mine].sum()
    loss = (losses[mine] * weights[mine]).sum() / mass
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return float(loss.detach()), gradients, float(mass)


@pytest.mark.parametrize(
    "case",
    [
        mlp(5, "tanh", states=1),
        mlp(6, "relu", weighted=True, states=1),
        transformer(7, states=1),
        convnet(8, "gelu", "running", states=1),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("batch_size", [2, 100])
def test_group_dots_are_directional_derivatives_of_the_groups_losses(
    case: Case, batch_size: int
) -> None:
    bench = Bench(case, batch_size=batch_size)
    random = torch.Generator().manual_seed(0)
    size = len(bench.flat.theta)
    directions = [torch.randn(size, generator=random, dtype=torch.float64) for _ in range(2)]
    origin = Point(0, torch.zeros(size, dtype=torch.float64), {})
    segments = [Segment(origin, Point(1, direction, {})) for direction in directions]
    found, gradient = evaluate(bench, case.states[0], segments)
    plain, same = evaluate(bench, case.states[0])
    # The extra passes of groups only reorder the sum.
    assert (gradient - same).abs().max() <= ROUNDING and found.loss == plain.loss
    for g, group in enumerate(bench.split.groups):
        _, gradients, mass = plain_group_gradient(case, group)
        assert found.group_weights[g] == pytest.approx(mass, rel=1e-14)
        for d, direction in enumerate(directions):
            along = bench.by_layer(direction)
            for number, layer in enumerate(bench.layers):
                expected = 0.0
                if layer.name in gradients:
                    expected = float((gradients[layer.name] * along[layer.name]).sum())
                assert abs(float(found.group_dots[d, g, number]) - expected) <= ROUNDING


def test_batches_hold_one_group_where_that_is_free() -> None:
    case = mlp(9, "tanh", n=7, states=1)
    split = Bench(case, batch_size=2).split
    assert split.sorted_by_group
    assert all(len(set(batch[1].tolist())) == 1 for batch in split.batches)
    assert sum(split.batch_sizes) == 7
    # Tokens of a sample differ in their group: nothing can be sorted.
    assert not Bench(transformer(9, states=1)).split.sorted_by_group


def test_float32_passes_are_summed_in_float64() -> None:
    # 4,096 losses of exactly 2^-24 beside one of 1: a float32 sum of the batches would lose them.
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

    n = 4097
    x = torch.full((n,), 2.0**-24)
    x[0] = 1.0
    case = Case("sum", One, (x,), lambda net, b: b[0] * net.w, ({"w": torch.ones(1)},))
    found, gradient = evaluate(Bench(case, dtype="float32", batch_size=1), case.states[0])
    exact = (1 + 4096 * 2.0**-24) / n  # a power of two away from 1 + 2^-12: two roundings
    assert found.loss == pytest.approx(exact, rel=1e-15)
    assert float(gradient) == pytest.approx(exact, rel=1e-15)


def test_dropout_is_off_even_if_the_model_was_built_in_training_mode() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.9), nn.Linear(50, 3)).train()

    case = replace(mlp(10, "tanh", states=1), make=make, states=random_states(make, 0, 1))
    bench = Bench(case)
    first, gradient = evaluate(bench, case.states[0])
    second, again = evaluate(bench, case.states[0])
    assert first.loss == second.loss and torch.equal(gradient, again)
    expected = bench.twin(case).point(case.states[0], set())
    assert abs(first.loss - expected.loss) <= ROUNDING * expected.loss
    assert not any(module.training for module in bench.flat.model.modules())


def test_loss_alone_needs_no_gradient() -> None:
    case = mlp(11, "tanh", states=1)
    bench = Bench(case)
    with_gradient, _ = evaluate(bench, case.states[0])
    alone = bench.engine.evaluate(bench.split, None)
    assert alone.loss == with_gradient.loss and alone.group_dots is None


def test_callers_without_gradients_do_not_switch_them_off() -> None:
    case = mlp(12, "tanh", states=1)
    bench = Bench(case)
    _, expected = evaluate(bench, case.states[0])
    with torch.no_grad():
        _, found = evaluate(bench, case.states[0])
    assert torch.equal(found, expected)


def test_a_split_without_weight_is_refused() -> None:
    case = transformer(13, states=1)
    tokens, _, weights = case.data
    empty = replace(case, data=(tokens, torch.zeros_like(tokens), weights), groups=None)
    with pytest.raises(TaskError, match=r"weights of split 'train' add up to 0"):
        evaluate(Bench(empty), case.states[0])


def test_negative_labels_need_weight_zero() -> None:
    case = transformer(14, states=1)
    evaluate(Bench(case), case.states[0])  # padding is labelled -1 and has weight 0
    wrong = replace(case, groups=lambda batch: -torch.ones_like(token_groups(batch)))
    with pytest.raises(TaskError, match="negative label"):
        evaluate(Bench(wrong), case.states[0])


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(value: float) -> None:
    case = mlp(15, "tanh", n=5, weighted=True, states=1)
    case.data[2][3] = value
    with pytest.raises(TaskError, match="finite and not negative"):
        evaluate(Bench(replace(case, groups=None)), case.states[0])


def test_tied_parameters_have_one_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    w = torch.tensor([[1.0, 2], [3, 5]], dtype=torch.float64)
    x = torch.tensor([[1.0, -1]], dtype=torch.float64)
    case = Case("tied", Tied, (x,), lambda net, b: net(b[0]).sum(1), ({"a.weight": w},))
    bench = Bench(case)
    _, gradient = evaluate(bench, case.states[0])
    # L = 1ᵀ W W x:  dL/dW = 1 (W x)ᵀ + (Wᵀ 1) xᵀ, small integers, so exact.
    one = torch.ones(2, 1, dtype=torch.float64)
    expected = one @ (w @ x.T).T + w.T @ one @ x
    assert [layer.name for layer in bench.layers] == ["a.weight"]
    assert torch.equal(gradient.view(2, 2), expected)


def test_an_mlp_of_a_dict_and_mixed_types_in_batches() -> None:
    case = mlp(16, "tanh", n=5, states=1)
    x, y = case.data
    samples = [{"x": x[i].float(), "y": y[i]} for i in range(5)]

    class Samples(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> Any:
            return samples[i]

    def loss(net: Any, batch: Any) -> Tensor:
        return classify(net, (batch["x"], batch["y"]))

    named = Case("named", case.make, Samples(), loss, case.states)  # type: ignore[arg-type]
    found, gradient = evaluate(Bench(named, batch_size=2), case.states[0])
    # Floats of the data arrive in the compute dtype, having been rounded to float32 once.
    rounded = replace(case, data=(x.float().double(), y))
    expected, same = evaluate(Bench(rounded), case.states[0])
    assert abs(found.loss - expected.loss) <= ROUNDING
    assert (gradient - same).abs().max() <= ROUNDING


class _FailsOnce(torch.autograd.Function):
    """The identity; its first backward pass fails."""

    failed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if not _FailsOnce.failed:
            _FailsOnce.failed = True
            raise RuntimeError("out of something")
        return gradient


def test_a_backward_pass_that_failed_half_way_leaves_nothing_behind() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.near(_FailsOnce.apply(self.far(x)))

    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    task = Task(
        Net, {"train": (x, y)}, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    )
    bench = Workbench(task, Settings(dtype="float64"))
    out = bench.engine.new_vector()
    with pytest.raises(TaskError, match="backward pass failed: RuntimeError: out of something"):
        bench.engine.evaluate(bench.splits[0], out)
    model = bench.flat.model
    assert bool(out.any())  # the failure came late enough: near's gradient had arrived
    for parameter in model.parameters():  # what a pass that is broken off may leave
        parameter.grad = torch.ones_like(parameter)
    bench.engine.evaluate(bench.splits[0], out)
    loss = F.cross_entropy(model(x.double()), y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.allclose(out, torch.cat([g.reshape(-1) for g in expected]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bit_losses_are_not_rounded(dtype: torch.dtype) -> None:
    """257 has nine significant bits, bfloat16 eight; 2049 has twelve, float16 eleven."""

    def loss(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return net(batch[0]).flatten().to(dtype), batch[1]

    x, odd = torch.tensor([[1.0], [3.0]]), 257.0 if dtype is torch.bfloat16 else 2049.0
    data = x, torch.tensor([1.0, odd])
    work = Workbench(Task(lambda: nn.Linear(1, 1, bias=False), {"train": data}, loss), Settings())
    work.flat.theta.fill_(1.0)
    out = work.engine.new_vector()
    found = work.engine.evaluate(work.splits[0], out)
    assert found.total_weight == 1 + odd
    assert found.loss == pytest.approx((1 + 3 * odd) / (1 + odd), rel=1e-6)
    assert float(out[0]) == pytest.approx((1 + 3 * odd) / (1 + odd), rel=4e-3)  # a 16-bit pass
