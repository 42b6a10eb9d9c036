"""The invariants of loss change allocation, as properties of random small nets and paths."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    FEW,
    ROUNDING,
    Bench,
    Case,
    State,
    abs_sum,
    cases,
    closeness,
    convnet,
    gap,
    gpt2,
    lc_sum,
    mlp,
    quadratic,
    random_states,
    seeds,
    transformer,
)
from torch import Tensor, nn
from twin import RULES as TWIN_RULES

from lcray.allocation.allocator import IntervalLC

MANY = settings(deadline=None, derandomize=True, max_examples=150)
SYMMETRIC = ["midpoint", "trapezoid", "simpson", "gauss-lobatto", "gauss-2", "gauss"]


def one(case: Case, **options: Any) -> IntervalLC:
    (result,) = Bench(case, **options).run(case.states[:2])
    assert result.status == "ok" and result.lc is not None
    return result


def interpolated(before: State, after: State, n: int) -> tuple[State, ...]:
    """The n + 1 states on the straight path; integers are the start's until the end."""
    states = [dict(before)]
    for i in range(1, n):
        states.append(
            {
                k: a + i / n * torch.where(a == after[k], 0.0, after[k] - a)
                if a.is_floating_point()
                else a
                for k, a in before.items()
            }
        )
    return (*states, dict(after))


# --- 1. closure -----------------------------------------------------------------------------


@FEW
@given(seed=seeds, rule=st.sampled_from([*SYMMETRIC, "simpson*2", "gauss*3"]))
def test_a_quadratic_loss_closes_for_every_rule_with_the_closed_form(seed: int, rule: str) -> None:
    case = quadratic(seed)
    curvature, slope, w = case.data
    result = one(case, rule=rule, batch_size=2)
    assert result.lc is not None
    a, b = (torch.cat([s["p"].reshape(-1), s["q"]]) for s in case.states)
    delta = b - a
    hessian = (w[:, None, None] * curvature).sum(0) / w.sum()
    gradient = hessian @ a + (w[:, None] * slope).sum(0) / w.sum()
    expected = delta * (gradient + 0.5 * hessian @ delta)
    assert (result.lc - expected).abs().max() <= ROUNDING * abs_sum(result)
    assert abs(gap(result)) <= ROUNDING * abs_sum(result)
    # Without the half of the second derivative the gradient at the start alone is left.
    first = one(case, rule="left", batch_size=2)
    assert first.lc is not None
    assert (first.lc - delta * gradient).abs().max() <= ROUNDING * abs_sum(result)
    curved = 0.5 * float(delta @ hessian @ delta)
    assert abs(gap(first) + curved) <= ROUNDING * abs_sum(result)


def _smooth(name: str) -> Case:
    make = {
        "mlp": lambda: mlp(1, "tanh", n=4),
        "transformer": lambda: transformer(1, n=2),
        "running": lambda: convnet(1, "gelu", "running"),
    }
    case = replace(make[name](), groups=None)
    # Long paths, so that the error of order 6 on 32 panels stays 100 times above rounding.
    return replace(case, states=random_states(case.make, 1, 2, step=0.4))


@cache
def _reference(name: str) -> IntervalLC:
    return one(_smooth(name), rule="gauss*64")


@pytest.mark.parametrize("name", ["mlp", "transformer", "running"])
@pytest.mark.parametrize(
    ("rule", "order"),
    [
        ("left", 1),
        ("midpoint", 2),
        ("trapezoid", 2),
        ("simpson", 4),
        ("gauss-lobatto", 6),
        ("gauss-2", 4),
        ("gauss", 6),
    ],
)
def test_gap_and_error_fall_at_the_order_of_the_rule(name: str, rule: str, order: int) -> None:
    case, reference = _smooth(name), _reference(name)
    assert reference.lc is not None
    gaps, errors = [], []
    for panels in (16, 32):
        result = one(case, rule=f"{rule}*{panels}")
        assert result.lc is not None
        gaps.append(abs(gap(result)))
        errors.append(float((result.lc - reference.lc).abs().sum()))
    # log2 of a ratio on 16 and 32 panels; the next term of the expansion is of relative size
    # 1/32 or less, which moves the slope by at most 0.07. Rounding (1e-16 of 1e-13) is below.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(order, abs=0.1)


def check_limit(case: Case, panels: int) -> None:
    """With a dense rule only rounding is left of the gap, buffers included.

    The path is a fortieth of the weights. Degree 5 on n panels: the error falls with the sixth
    power of 1/(40 n), far below the rounding of the two losses, 1e-15 of numbers of order one.
    Σ|LC| is about a tenth, so that 1e-12 of it leaves a factor of a hundred.
    """
    quarter = interpolated(*case.states, 4)[:2]
    result = one(replace(case, states=quarter, groups=None), rule=f"gauss*{panels}", batch_size=100)
    assert abs(gap(result)) <= 1e-12 * abs_sum(result)


@settings(deadline=None, derandomize=True, max_examples=8)
@given(case=cases(smooth=True, heavy=False))
def test_smooth_losses_close_in_the_limit(case: Case) -> None:
    # Frozen parts do not move here: everything that moves is allocated.
    check_limit(case, 16)


@pytest.mark.slow
@MANY
@given(case=cases(smooth=True))
def test_smooth_losses_close_in_the_limit_many(case: Case) -> None:
    # LayerNorm of four numbers may be nearly singular along a path.
    check_limit(case, 64)


def test_without_rows_for_buffers_running_statistics_would_not_close() -> None:
    case = replace(convnet(21, "tanh", "running"), groups=None)
    bench = Bench(case, rule="gauss*24", batch_size=100)
    (result,) = bench.run(case.states)
    change = result.loss_end - result.loss_start
    assert result.lc is not None
    parts = bench.by_layer(result.lc)
    buffers = [la.name for la in bench.layers if la.kind == "buffer"]
    assert len(buffers) == 4
    share = sum(float(parts[name].sum()) for name in buffers)
    assert abs(share) > 1e-3 * abs(change)
    assert abs(gap(result)) <= 1e-12 * abs_sum(result)


def test_dense_rules_agree_on_smooth_nets() -> None:
    # Two different rules, both far beyond their asymptotic range: per parameter to rounding.
    for case in (mlp(3, "gelu"), transformer(4, n=2)):
        a, b = one(case, rule="simpson*96"), one(case, rule="gauss*16")
        assert a.lc is not None and b.lc is not None
        # Simpson: step 1/192, so the error is about 96^-4 · 1e-3 < 1e-10 of Σ|LC|.
        assert (a.lc - b.lc).abs().max() <= 1e-9 * abs_sum(b)
        coarse = one(case, rule="simpson")
        assert coarse.lc is not None
        difference = float((coarse.lc - b.lc).abs().max()) / abs_sum(b)
        assert 1e-9 < difference < 0.05  # close, yet distinguishable


# --- 2. additivity --------------------------------------------------------------------------


def check_panels(case: Case, rule: str, n: int) -> None:
    """A composite rule is the rule on each of n intervals of the same path."""
    whole = one(case, rule=f"{rule}*{n}")
    bench = Bench(case, rule=rule)
    parts = bench.run(interpolated(*case.states[:2], n))
    assert len(parts) == n and whole.lc is not None
    total = sum(part.lc for part in parts if part.lc is not None)
    assert isinstance(total, Tensor)
    assert (total - whole.lc).abs().max() <= ROUNDING * abs_sum(whole)
    assert parts[0].loss_start == whole.loss_start and parts[-1].loss_end == whole.loss_end


@FEW
@given(
    case=cases(heavy=False),
    rule=st.sampled_from(["left", *SYMMETRIC]),
    n=st.integers(2, 3),
)
def test_panels_add_up_to_the_interval(case: Case, rule: str, n: int) -> None:
    check_panels(case, rule, n)


@pytest.mark.slow
@MANY
@given(case=cases(), rule=st.sampled_from(["left", *SYMMETRIC]), n=st.integers(2, 4))
def test_panels_add_up_to_the_interval_many(case: Case, rule: str, n: int) -> None:
    check_panels(case, rule, n)


@FEW
@given(case=cases(heavy=False), rule=st.sampled_from(["left", "simpson", "gauss"]))
def test_groups_weighted_by_their_share_add_up_to_the_split(case: Case, rule: str) -> None:
    if case.groups is None:
        return
    bench = Bench(case, rule=rule, batch_size=3)
    (result,) = bench.run(case.states)
    assert result.lc is not None and result.group_lc is not None
    segment = bench.segments(case.states)[0]
    segment.set_point(bench.flat, 0.0)
    found = bench.engine.evaluate(bench.split, None)
    shares = torch.tensor(found.group_weights, dtype=torch.float64) / found.total_weight
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-14)
    total = (shares[:, None] * result.group_lc).sum(0)
    for number, where in enumerate(bench.flat.slices):
        difference = abs(float(total[number]) - float(result.lc[where].sum()))
        assert difference <= ROUNDING * abs_sum(result)


# --- 3. rescaling ---------------------------------------------------------------------------


def relu_case(seed: int) -> Case:
    return mlp(seed, "relu", n=6)


def scaled(state: State, powers: Tensor) -> State:
    """Unit j of the first layer times 2^k_j, what the second layer reads of it by 2^-k_j."""
    factor = 2.0 ** powers.double()
    return {
        **state,
        "body.0.weight": state["body.0.weight"] * factor[:, None],
        "body.0.bias": state["body.0.bias"] * factor,
        "body.2.weight": state["body.2.weight"] / factor,
    }


@FEW
@given(
    seed=seeds,
    powers=st.lists(st.integers(-6, 6), min_size=4, max_size=4),
    rule=st.sampled_from(["left", "simpson", "gauss", "gauss-lobatto"]),
)
def test_rescaled_relu_layers_have_the_same_lc(seed: int, powers: list[int], rule: str) -> None:
    case = relu_case(seed)
    k = torch.tensor(powers)
    other = replace(case, states=tuple(scaled(state, k) for state in case.states))
    a, b = one(case, rule=rule), one(other, rule=rule)
    # Powers of two commute with rounding: bit for bit, here and in the loss.
    assert a.loss_start == b.loss_start and a.loss_end == b.loss_end
    assert a.lc is not None and b.lc is not None
    assert torch.equal(a.lc, b.lc)
    assert a.group_lc is not None and b.group_lc is not None
    assert torch.equal(a.group_lc, b.group_lc)


def test_rescaling_a_layer_by_two_halves_its_gradient_but_not_its_lc() -> None:
    case = relu_case(11)
    two = torch.ones(4)
    other = replace(case, states=tuple(scaled(state, two) for state in case.states))
    a, b = one(case), one(other)
    bench = Bench(case)
    assert a.start_gradient is not None and b.start_gradient is not None
    one_side, other_side = bench.by_layer(a.start_gradient), bench.by_layer(b.start_gradient)
    assert torch.equal(other_side["body.0.weight"], one_side["body.0.weight"] / 2)
    assert torch.equal(other_side["body.2.weight"], one_side["body.2.weight"] * 2)
    assert a.lc is not None and b.lc is not None and torch.equal(a.lc, b.lc)


@FEW
@given(seed=seeds, factor=st.floats(0.3, 3.0))
def test_any_factor_rescales_to_rounding(seed: int, factor: float) -> None:
    case = relu_case(seed)
    exponent = torch.full((4,), math.log2(factor), dtype=torch.float64)
    other = replace(case, states=tuple(scaled(state, exponent) for state in case.states))
    a, b = one(case), one(other)
    assert a.lc is not None and b.lc is not None
    assert (a.lc - b.lc).abs().max() <= ROUNDING * abs_sum(a)


# --- 4. zeros and signs ---------------------------------------------------------------------


def check_reversal(case: Case, rule: str) -> None:
    forward = one(case, rule=rule)
    backward = one(replace(case, states=tuple(reversed(case.states))), rule=rule)
    assert forward.lc is not None and backward.lc is not None
    assert (forward.lc + backward.lc).abs().max() <= ROUNDING * abs_sum(forward)
    assert forward.loss_start == backward.loss_end and forward.loss_end == backward.loss_start


@FEW
@given(case=cases(heavy=False), rule=st.sampled_from([*SYMMETRIC, "simpson*2"]))
def test_reversing_an_interval_flips_every_sign(case: Case, rule: str) -> None:
    check_reversal(case, rule)


@pytest.mark.slow
@MANY
@given(case=cases(), rule=st.sampled_from([*SYMMETRIC, "simpson*2", "gauss*3"]))
def test_reversing_an_interval_flips_every_sign_many(case: Case, rule: str) -> None:
    check_reversal(case, rule)


def test_the_left_rule_is_not_symmetric() -> None:
    case = mlp(5, "tanh")
    forward = one(case, rule="left")
    backward = one(replace(case, states=tuple(reversed(case.states))), rule="left")
    assert forward.lc is not None and backward.lc is not None
    assert (forward.lc + backward.lc).abs().max() > 1e-3 * abs_sum(forward)


@FEW
@given(seed=seeds, rule=st.sampled_from(["left", "simpson", "gauss"]))
def test_frozen_and_unmoved_parameters_get_exactly_zero(seed: int, rule: str) -> None:
    case = mlp(seed, "tanh", frozen=True)
    before, after = (dict(state) for state in case.states)
    # Even frozen parameters that were moved by hand count 0, since no gradient is asked of them.
    after["body.0.weight"] = before["body.0.weight"] + 0.25
    after["body.2.bias"] = before["body.2.bias"].clone()
    after["body.4.weight"] = after["body.4.weight"].clone()
    after["body.4.weight"][1, 2] = before["body.4.weight"][1, 2]
    bench = Bench(case, rule=rule)
    (result,) = bench.run((before, after))
    assert result.lc is not None and result.status == "ok"
    parts = bench.by_layer(result.lc)
    for name in ("body.0.weight", "body.0.bias", "body.2.bias"):
        assert torch.equal(parts[name], torch.zeros_like(parts[name]))
    zeros = (parts["body.4.weight"] == 0).nonzero().tolist()
    assert zeros == [[1, 2]]
    assert bool((parts["body.2.weight"] != 0).any())


def test_an_interval_without_movement_is_all_zero() -> None:
    case = convnet(6, "relu", "running")
    result = one(replace(case, states=(case.states[0], case.states[0])))
    assert result.lc is not None
    assert torch.equal(result.lc, torch.zeros_like(result.lc))
    assert result.loss_start == result.loss_end and result.converged


def test_buffers_that_a_loss_does_not_see_get_exactly_zero() -> None:
    # Batch statistics: the running ones move, but nothing depends on them.
    case = convnet(7, "tanh", "batch")
    bench = Bench(case)
    (result,) = bench.run(case.states)
    assert result.lc is not None
    for layer, where in zip(bench.layers, bench.flat.slices, strict=True):
        assert bool((result.lc[where] == 0).all()) is (layer.kind == "buffer"), layer.name


# --- 5. independence ------------------------------------------------------------------------


@FEW
@given(case=cases(heavy=False), sizes=st.lists(st.integers(1, 8), min_size=2, max_size=2))
def test_batch_sizes_and_sorting_do_not_matter(case: Case, sizes: list[int]) -> None:
    if case.options.get("batch_norm") == "batch":
        return  # there the batches are part of the loss
    reference = one(case, batch_size=100)
    for size in sizes:
        result = one(case, batch_size=size)
        plain = one(replace(case, groups=None), batch_size=size)
        assert result.lc is not None and plain.lc is not None and reference.lc is not None
        for other in (result.lc, plain.lc):
            assert (other - reference.lc).abs().max() <= 1e-10 * abs_sum(reference)
        if reference.group_lc is not None and result.group_lc is not None:
            difference = (result.group_lc - reference.group_lc).abs().max()
            assert difference <= 1e-10 * max(abs_sum(reference), 1e-3)


def check_shared(case: Case, rule: str) -> None:
    """A run of intervals equals each of them on its own, bit for bit."""
    shared = Bench(case, rule=rule).run(case.states)
    for t, result in enumerate(shared):
        (fresh,) = Bench(case, rule=rule).run(case.states[t : t + 2])
        assert (result.loss_start, result.loss_end) == (fresh.loss_start, fresh.loss_end)
        assert result.status == fresh.status == "ok"
        assert (result.n_gradients, result.converged) == (fresh.n_gradients, fresh.converged)
        for name in ("lc", "layer_error", "first_order", "start_gradient", "group_lc"):
            one_side, other_side = getattr(result, name), getattr(fresh, name)
            assert (one_side is None) == (other_side is None), name
            if one_side is not None:
                assert torch.equal(one_side, other_side), (t, name)


@FEW
@given(case=cases(states=4, heavy=False), rule=st.sampled_from(["left", *SYMMETRIC]))
def test_sharing_endpoints_changes_no_bit(case: Case, rule: str) -> None:
    check_shared(case, rule)


@pytest.mark.slow
@MANY
@given(case=cases(states=4), rule=st.sampled_from(["left", *SYMMETRIC]))
def test_sharing_endpoints_changes_no_bit_many(case: Case, rule: str) -> None:
    check_shared(case, rule)


def test_sharing_changes_no_bit_where_buffers_stop_and_start_to_move() -> None:
    case = convnet(8, "tanh", "running", states=5)
    states = [dict(state) for state in case.states]
    for name in ("bn1.running_mean", "bn1.running_var"):
        states[2][name] = states[1][name]  # still in the second interval
        states[4][name] = states[3][name]  # and in the last
    for rule in ("simpson", "left", "gauss"):
        check_shared(replace(case, states=tuple(states)), rule)


def test_refined_intervals_share_endpoints_too() -> None:
    case = mlp(9, "relu", states=4)
    shared = Bench(case, refine=True, rtol=1e-6, max_panels=8).run(case.states)
    for t, result in enumerate(shared):
        bench = Bench(case, refine=True, rtol=1e-6, max_panels=8)
        (fresh,) = bench.run(case.states[t : t + 2])
        assert result.panels == fresh.panels > 1
        assert result.lc is not None and fresh.lc is not None
        assert torch.equal(result.lc, fresh.lc)


# --- 6. the twin ----------------------------------------------------------------------------


def check_twin(case: Case, rule: str) -> None:
    bench = Bench(case, rule=rule)
    results = bench.run(case.states)
    twin = bench.twin(case)
    for t, result in enumerate(results):
        expected = twin.interval(*case.states[t : t + 2], rule)
        scale = expected.scale
        assert [layer.name for layer in bench.layers] == twin.layers
        assert closeness(result, expected, bench) <= 1e-10
        assert abs(lc_sum(result) - expected.total) <= 1e-10 * scale
        assert abs(result.loss_start - expected.loss_start) <= 1e-10 * expected.loss_start
        assert abs(result.loss_end - expected.loss_end) <= 1e-10 * expected.loss_end
        names = twin.layers
        for found, wanted in (
            (result.layer_error, expected.error),
            (result.first_order, expected.first_order),
        ):
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                for name, value in zip(names, found.tolist(), strict=True):
                    assert abs(value - wanted[name]) <= 1e-10 * scale, name
        if case.groups is None:
            assert result.group_lc is None
            continue
        assert result.group_lc is not None
        for group, row in zip(bench.split.groups, result.group_lc.tolist(), strict=True):
            if group not in expected.groups:  # only items of weight 0
                assert not any(row)
                continue
            for name, value in zip(names, row, strict=True):
                assert abs(value - expected.groups[group][name]) <= 1e-10 * max(scale, 1e-3)


@settings(deadline=None, derandomize=True, max_examples=16)
@given(case=cases(states=3, heavy=False), rule=st.sampled_from(sorted(TWIN_RULES)))
def test_the_twin_agrees(case: Case, rule: str) -> None:
    check_twin(case, rule)


@pytest.mark.slow
@MANY
@given(case=cases(states=3), rule=st.sampled_from(sorted(TWIN_RULES)))
def test_the_twin_agrees_many(case: Case, rule: str) -> None:
    check_twin(case, rule)


@pytest.mark.parametrize("rule", sorted(TWIN_RULES))
def test_the_twin_agrees_for_every_rule(rule: str) -> None:
    check_twin(mlp(31, "tanh", weighted=True, states=3), rule)


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_the_twin_agrees_in_both_modes_of_batch_norm(mode: str) -> None:
    check_twin(convnet(32, "gelu", mode, n=7, states=3), "simpson")


def test_the_twin_agrees_on_transformers() -> None:
    check_twin(transformer(33, states=3), "simpson")
    check_twin(gpt2(34, states=2), "simpson")


def test_tied_parameters_count_once_and_masks_stay() -> None:
    for case, tied in ((transformer(35), "head.weight"), (gpt2(36), "lm_head.weight")):
        bench = Bench(case)
        (result,) = bench.run(case.states)
        names = {layer.name: layer for layer in bench.layers}
        assert tied not in names
        assert sum(tied in layer.aliases for layer in bench.layers) == 1
        assert result.lc is not None
        assert bool(torch.isfinite(result.lc).all())
        unique = {id(p): p.numel() for p in bench.flat.model.parameters()}
        counted = sum(la.numel for la in bench.layers if la.kind == "parameter")
        assert counted == sum(unique.values())
    mask = bench_of_mask()
    assert bool(torch.isinf(mask).any())


def bench_of_mask() -> Tensor:
    """The mask of -inf, after an interval; its LC is exactly 0."""
    case = transformer(37)
    bench = Bench(case)
    (result,) = bench.run(case.states)
    assert result.lc is not None
    part = bench.by_layer(result.lc)["mask"]
    assert torch.equal(part, torch.zeros_like(part))
    found: Tensor = bench.flat.model.state_dict()["mask"]
    assert torch.equal(found, case.states[0]["mask"])
    return found


def test_integer_buffers_are_those_of_the_checkpoint() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.register_buffer("column", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, self.column] * self.w[self.column]).exp()

    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)
    w = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    states = tuple({"w": w + i / 8, "column": torch.tensor(2)} for i in range(2))
    case = Case("shifted", Shifted, (x,), lambda net, b: net(b[0]), states)
    result = one(case, rule="gauss*8")
    assert result.lc is not None
    # Only column 2 is read: L = mean exp(x_2 w_2), integrated exactly.
    exact = float((x[:, 2] * (w[2] + 0.125)).exp().mean() - (x[:, 2] * w[2]).exp().mean())
    assert result.lc.tolist()[:2] == [0.0, 0.0]
    assert float(result.lc[2]) == pytest.approx(exact, rel=1e-12)
