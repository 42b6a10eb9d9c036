"""Intervals one after another: evaluations, refinement, convergence, and what is not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    ROUNDING,
    Bench,
    Case,
    Pair,
    abs_sum,
    cases,
    classify,
    convnet,
    gap,
    lc_sum,
    mlp,
    quadratic,
    random_states,
    seeds,
    transformer,
)
from torch import Tensor, nn

from lcray.allocation.allocator import Accuracy, SplitAllocator
from lcray.allocation.quadrature import get_rule
from lcray.allocation.sums import _mark
from lcray.errors import TaskError, UsageError
from lcray.planning.make import make_settings
from lcray.settings import Settings

FEWER = settings(deadline=None, derandomize=True, max_examples=15)


class Counter:
    """A loss that counts how often it is evaluated and differentiated, a batch each."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        self.losses = self.gradients = 0

    def __call__(self, net: Any, batch: Any) -> Any:
        self.losses += 1
        found = self._loss(net, batch)
        first = found[0] if isinstance(found, tuple) else found
        first.register_hook(self._count)
        return found

    def _count(self, gradient: Tensor) -> None:
        self.gradients += 1


def counted(case: Case) -> tuple[Case, Counter]:
    counter = Counter(case.loss)
    return replace(case, loss=counter, groups=None), counter


# --- evaluations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "gradients", "losses"),
    # Of a run of T intervals that meet: gradients, and further evaluations of the loss alone,
    # for T = 4. A shared endpoint counts once; the last endpoint of "left" needs no gradient;
    # rules without ends evaluate the loss at 5 endpoints.
    [
        ("left", 4, 1),
        ("midpoint", 4, 5),
        ("trapezoid", 5, 0),
        ("simpson", 9, 0),
        ("gauss-lobatto", 13, 0),
        ("gauss-2", 8, 5),
        ("gauss", 12, 5),
        ("simpson*2", 17, 0),
        ("left*2", 8, 1),
        ("midpoint*3", 12, 5),
    ],
)
def test_each_gradient_is_taken_once(rule: str, gradients: int, losses: int) -> None:
    case, counter = counted(mlp(1, "tanh", states=5))
    results = Bench(case, rule=rule, batch_size=100).run(case.states)
    assert counter.gradients == gradients
    assert counter.losses == gradients + losses
    # What is reported leaves the very first left endpoint out.
    shared = get_rule(rule).has_left and get_rule(rule).has_right
    assert sum(result.n_gradients for result in results) == gradients - shared
    assert all(result.panels == get_rule(rule).panels for result in results)


@pytest.mark.parametrize("panels", [1, 2, 4, 8, 16])
def test_refinement_to_n_panels_takes_2n_gradients(panels: int) -> None:
    case, counter = counted(mlp(2, "relu", states=3))
    # A tolerance that cannot be met, so that the cap decides.
    options = {"refine": True, "rtol": 1e-300, "max_panels": panels, "batch_size": 100}
    results = Bench(case, **options).run(case.states)
    assert [result.n_gradients for result in results] == [2 * panels] * 2
    assert counter.gradients == 2 * 2 * panels + 1 and counter.losses == counter.gradients
    assert [result.panels for result in results] == [panels] * 2
    assert not any(result.converged for result in results)


@pytest.mark.parametrize(("cap", "panels"), [(3, 2), (5, 4), (15, 8)])
def test_a_cap_between_powers_of_two_is_not_passed(cap: int, panels: int) -> None:
    case = mlp(2, "relu")
    (result,) = Bench(case, refine=True, rtol=1e-300, max_panels=cap).run(case.states)
    assert result.panels == panels and not result.converged


# --- refinement -----------------------------------------------------------------------------


@FEWER
@given(case=cases(heavy=False), power=st.integers(0, 3))
def test_refinement_is_the_composite_rule_on_the_same_nodes(case: Case, power: int) -> None:
    panels = 2**power
    (refined,) = Bench(case, refine=True, rtol=1e-300, max_panels=panels).run(case.states)
    (fixed,) = Bench(case, rule=f"simpson*{panels}").run(case.states)
    assert refined.panels == panels == fixed.panels
    assert refined.lc is not None and fixed.lc is not None
    scale = abs_sum(fixed)
    assert (refined.lc - fixed.lc).abs().max() <= ROUNDING * scale
    assert refined.layer_error is not None and fixed.layer_error is not None
    assert (refined.layer_error - fixed.layer_error).abs().max() <= ROUNDING * scale
    assert refined.first_order is not None and fixed.first_order is not None
    assert torch.equal(refined.first_order, fixed.first_order)
    assert (refined.group_lc is None) == (fixed.group_lc is None)
    if refined.group_lc is not None and fixed.group_lc is not None:
        difference = (refined.group_lc - fixed.group_lc).abs().max()
        assert difference <= ROUNDING * max(scale, 1e-3)


def expected_panels(case: Case, rtol: float, atol: float, cap: int) -> tuple[int, bool]:
    """The definition word by word, on fixed composite rules."""

    def layers(panels: int) -> tuple[Tensor, float, float]:
        bench = Bench(case, rule=f"simpson*{panels}")
        (result,) = bench.run(case.states)
        assert result.lc is not None
        sums = torch.stack([result.lc[where].sum() for where in bench.flat.slices])
        return sums, gap(result), result.loss_end - result.loss_start

    panels = 1
    coarse, found, change = layers(1)
    bound = max(rtol * abs(change), atol)
    converged = abs(found) <= bound
    while not converged and 2 * panels <= cap:
        panels *= 2
        fine, found, _ = layers(panels)
        difference = float((fine - coarse).abs().sum())
        converged = abs(found) <= bound and difference <= 10 * bound
        coarse = fine
    return panels, converged


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-5, 1e-8, 1e-13])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_convergence_is_decided_as_defined(seed: int, rtol: float) -> None:
    activation = "relu" if seed == 4 else "tanh"
    case = replace(mlp(seed, activation, n=4), groups=None)
    case = replace(case, states=random_states(case.make, seed, 2, step=0.3))
    (result,) = Bench(case, refine=True, rtol=rtol, max_panels=16).run(case.states, first_loss=0.0)
    assert (result.panels, result.converged) == expected_panels(case, rtol, 0.0, 16)


def test_the_cases_above_stop_at_several_depths() -> None:
    found = set()
    for rtol in (1e-1, 1e-3, 1e-5, 1e-8, 1e-13):
        case = replace(mlp(3, "tanh", n=4), groups=None)
        case = replace(case, states=random_states(case.make, 3, 2, step=0.3))
        found.add(expected_panels(case, rtol, 0.0, 16))
    assert (16, False) in found and len(found) >= 3


def test_a_gap_that_crosses_zero_by_chance_is_no_convergence() -> None:
    # ℓ = p⁵ - q⁵ with p and q from 0 to 1: the errors of the two cancel at every n, while
    # S_2n - S_n of each layer does not. A hundredth of p⁵ more keeps the first gap above the
    # bound, so that the refinement starts.
    def loss(net: Any, batch: Any) -> Tensor:
        return (net.p**5 - net.q**5 + batch[0] * net.p**5).reshape(1)

    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    case = Case(
        "crossing",
        Pair,
        (torch.tensor([0.01], dtype=torch.float64),),
        loss,
        ({"p": zero, "q": zero}, {"p": one, "q": one}),
    )
    # Simpson on p⁴·5 is 5 (0 + 4/16 + 1)/6 = 25/24: an error of 1/24, of 1/24/16^k on 2^k panels.
    # Gaps: 0.01 (1/24) 16^-k = 4.2e-4, 2.6e-5, 1.6e-6; ΔL = 0.01.
    # Sum over layers of |S_2n - S_n|: 2.01 (1/24)(15/16) 16^-(k-1) = 7.9e-2, 4.9e-3, 3.1e-4.
    (result,) = Bench(case, refine=True, rtol=4e-3, max_panels=16).run(case.states, first_loss=0.0)
    # bound = 4e-5: the gap passes at n = 2, 10 bound = 4e-4 is passed at n = 8 only.
    assert result.panels == 8 and result.converged
    assert gap(result) == pytest.approx(0.01 / 24 / 16**3, rel=1e-6)
    assert result.layer_error is not None
    expected = [1.01 / 24 * 15 / 16**3, 1 / 24 * 15 / 16**3]
    # Rounding 1e-16 of differences of 1e-4: 1e-12.
    assert result.layer_error.tolist() == pytest.approx(expected, rel=1e-9)
    # Without refinement the gap alone decides.
    (fixed,) = Bench(case, rule="simpson*2", rtol=4e-3).run(case.states, first_loss=0.0)
    assert fixed.converged


def test_what_meets_the_tolerance_is_not_refined() -> None:
    case = quadratic(6)
    (result,) = Bench(case, refine=True, rtol=1e-10).run(case.states)
    assert result.panels == 1 and result.converged and result.n_gradients == 2


def test_the_bound_is_the_larger_of_the_two() -> None:
    accuracy = Accuracy(rtol=1e-2, atol=1e-3, max_panels=4)
    assert accuracy.bound(-1.0) == 1e-2
    assert accuracy.bound(0.01) == 1e-3


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1e-6), ("float64", 1e-12)])
def test_atol_scales_with_the_first_loss(dtype: str, factor: float) -> None:
    made = make_settings({"dtype": dtype, "refine": True, "max_panels": 8, "rtol": 0.25})
    accuracy = Accuracy.of(made, 5.0)
    assert accuracy == Accuracy(0.25, pytest.approx(5 * factor, rel=1e-15), 8)
    assert Accuracy.of(made, None).atol == 0.0
    assert Accuracy.of(replace(made, refine=False), 5.0).max_panels == 1


def test_atol_alone_can_stop_an_interval() -> None:
    case = mlp(7, "tanh")
    options = {"refine": True, "rtol": 1e-300, "max_panels": 8}
    (strict,) = Bench(case, **options).run(case.states, first_loss=0.0)
    assert not strict.converged
    # atol = 1e-12 · 1e12 = 1.
    (loose,) = Bench(case, **options).run(case.states, first_loss=1e12)
    assert loose.converged and loose.panels == 1


@pytest.mark.parametrize("rule", ["left", "gauss", "simpson*2", "trapezoid"])
def test_only_simpson_can_be_refined(rule: str) -> None:
    case = mlp(8, "tanh")
    bench = Bench(case)
    with pytest.raises(UsageError, match="cannot be refined"):
        SplitAllocator(bench.engine, bench.split, get_rule(rule), Accuracy(max_panels=2))
    with pytest.raises(UsageError, match="cannot be refined"):
        Bench(case, rule=rule, refine=True)


# --- errors and first order -----------------------------------------------------------------


@FEWER
@given(seed=seeds)
def test_the_embedded_error_of_simpson_is_known_on_cubics(seed: int) -> None:
    # ℓ = c·θ³ along a line: the trapezoid errs by (h³/12) f'' = Δ³ c / 2 per element, with
    # f = 3 c θ² Δ, f'' = 6 c Δ³; Simpson is exact. The signed sum over a layer stays.
    random = torch.Generator().manual_seed(seed)
    c = torch.randn(1, 4, generator=random, dtype=torch.float64)

    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.q = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def loss(net: Any, batch: Any) -> Tensor:
        return (batch[0] * torch.cat([net.p, net.q]) ** 3).sum(1)

    case = Case("cubic", Cubic, (c,), loss, random_states(Cubic, seed, 2, step=1.0))
    bench = Bench(case)
    (result,) = bench.run(case.states)
    a, b = (torch.cat([s["p"], s["q"]]) for s in case.states)
    delta, k = b - a, c[0]
    exact = k * (b**3 - a**3)
    assert result.lc is not None and result.layer_error is not None
    scale = float(exact.abs().sum()) + float((k * delta**3).abs().sum())
    assert (result.lc - exact).abs().max() <= ROUNDING * scale
    excess = k * delta**3 / 2
    expected = [abs(float(excess[:3].sum())), abs(float(excess[3]))]
    for found, wanted in zip(result.layer_error.tolist(), expected, strict=True):
        assert abs(found - wanted) <= ROUNDING * scale
    assert result.first_order is not None
    first = 3 * k * a**2 * delta
    for found, where in zip(result.first_order.tolist(), bench.flat.slices, strict=True):
        assert abs(found - float(first[where].sum())) <= ROUNDING * scale


@pytest.mark.parametrize("rule", ["midpoint", "gauss"])
def test_rules_without_a_node_at_0_give_no_first_order(rule: str) -> None:
    case = mlp(9, "tanh")
    (result,) = Bench(case, rule=rule).run(case.states)
    assert result.first_order is None and result.start_gradient is None


def test_first_order_is_the_left_rule() -> None:
    case = transformer(10)
    bench = Bench(case)
    (simpson,) = bench.run(case.states)
    (left,) = Bench(case, rule="left").run(case.states)
    assert left.lc is not None and simpson.first_order is not None
    for number, where in enumerate(bench.flat.slices):
        difference = abs(float(left.lc[where].sum()) - float(simpson.first_order[number]))
        assert difference <= ROUNDING * abs_sum(left)


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [mlp(11, "gelu"), convnet(12, "tanh", "running"), transformer(13)], ids=repr
)
def test_float32_differs_from_float64_by_its_rounding(case: Case) -> None:
    # The same float32 states in both, so that only the passes differ.
    states = tuple(
        {k: v.float().double() if v.is_floating_point() else v for k, v in s.items()}
        for s in case.states
    )
    data = tuple(part.float().double() if part.is_floating_point() else part for part in case.data)
    case = replace(case, states=states, data=data)
    (single,) = Bench(case, dtype="float32").run(states)
    (double,) = Bench(case, dtype="float64").run(states)
    assert single.lc is not None and double.lc is not None
    assert single.lc.dtype == torch.float64
    difference = float((single.lc - double.lc).abs().max()) / abs_sum(double)
    # Passes of some ten operations, each rounded to 2^-24 = 6e-8 of values of order one.
    assert 1e-10 < difference < 1e-5
    assert abs(single.loss_start - double.loss_start) < 1e-6 * double.loss_start
    # Δ is that of the stored numbers in both.
    a, b = Bench(case, dtype="float32"), Bench(case)
    assert torch.equal(a.segments(states)[0].difference(), b.segments(states)[0].difference())


def test_interior_points_are_rounded_once_and_the_end_is_the_stored_one() -> None:
    case = mlp(14, "tanh")
    bench = Bench(case, dtype="float32")
    (segment,) = bench.segments(case.states)
    a, b = segment.start.vector.double(), segment.end.vector.double()
    for s in (0.0, 0.3, 1.0):
        segment.set_point(bench.flat, s)
        expected = (a + s * (b - a)).float() if s < 1 else segment.end.vector
        assert torch.equal(bench.flat.theta, expected)


# --- what is not finite ---------------------------------------------------------------------

T = 6  # intervals


@pytest.mark.parametrize("rule", ["simpson", "left", "gauss", "trapezoid"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 2, T])
def test_a_bad_checkpoint_marks_its_intervals_and_no_others(
    rule: str, value: float, where: int
) -> None:
    case = mlp(15, "tanh", states=T + 1)
    clean = Bench(case, rule=rule).run(case.states)
    states = [dict(state) for state in case.states]
    states[where]["body.2.weight"] = states[where]["body.2.weight"].clone()
    states[where]["body.2.weight"][1, 1] = value
    results = Bench(case, rule=rule).run(tuple(states))
    for t, (result, expected) in enumerate(zip(results, clean, strict=True)):
        if where in (t, t + 1):
            assert result.status == "nonfinite_checkpoint"
            assert result.lc is None and result.layer_error is None and not result.converged
            assert result.n_gradients == 0
            # Neither loss, also where one was known: another span would not know it.
            assert math.isnan(result.loss_start) and math.isnan(result.loss_end)
            continue
        assert result.status == "ok"
        assert result.lc is not None and expected.lc is not None
        assert torch.equal(result.lc, expected.lc)
        assert (result.loss_start, result.loss_end) == (expected.loss_start, expected.loss_end)
        assert result.group_lc is not None and expected.group_lc is not None
        assert torch.equal(result.group_lc, expected.group_lc)


class Log(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(2, dtype=torch.float64))


def log_loss(net: Any, batch: Any) -> Tensor:
    return -(batch[0] * net.p.log()).sum(1)


def log_case(values: list[list[float]]) -> Case:
    states = tuple({"p": torch.tensor(v, dtype=torch.float64)} for v in values)
    return Case("log", Log, (torch.ones(3, 2, dtype=torch.float64),), log_loss, states)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(("bad", "loss"), [(-1.0, math.nan), (0.0, math.inf)])
def test_a_loss_that_is_not_finite_marks_its_intervals(
    bad: float, loss: float, refine: bool
) -> None:
    case = log_case([[1, 1], [2, 1], [bad, 1], [2, 2], [3, 2]])
    results = Bench(case, refine=refine).run(case.states)
    status = ["ok", "nonfinite_loss", "nonfinite_loss", "ok"]
    assert [result.status for result in results] == status
    assert [result.lc is None for result in results] == [False, True, True, False]
    assert results[1].loss_start == pytest.approx(-math.log(2), rel=1e-15)
    assert str(results[1].loss_end) == str(loss) == str(results[2].loss_start)
    # The interval after recovers: Simpson of 1/p between 2 and 3 in the first parameter.
    expected = -(1 / 2 + 4 / 2.5 + 1 / 3) / 6
    if not refine:
        assert lc_sum(results[3]) == pytest.approx(expected, rel=1e-14)
    assert results[3].loss_start == pytest.approx(-math.log(4), rel=1e-15)


@pytest.mark.parametrize("refine", [False, True])
def test_a_gradient_that_is_not_finite_marks_its_interval(refine: bool) -> None:
    # The square root has an infinite slope at 0, and a finite value.
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(1, dtype=torch.float64))

    states = tuple({"p": torch.tensor([v], dtype=torch.float64)} for v in (4.0, 0.0, 1.0, 4.0))
    data = (torch.ones(2, 1, dtype=torch.float64),)
    case = Case("root", Root, data, lambda net, b: (b[0] * net.p.sqrt()).sum(1), states)
    results = Bench(case, refine=refine).run(states)
    bad = "nonfinite_gradient"
    assert [result.status for result in results] == [bad, bad, "ok"]
    assert (results[0].loss_start, results[0].loss_end) == (2.0, 0.0)
    assert results[0].lc is None and not results[0].converged
    if not refine:
        # Simpson of 1/(2√p) from 1 to 4, times 3.
        expected = 3 * (1 / 2 + 4 / (2 * math.sqrt(2.5)) + 1 / 4) / 6
        assert lc_sum(results[2]) == pytest.approx(expected, rel=1e-14)
    # A rule that does not look there does not mind.
    good = Bench(case, rule="gauss").run(states)
    assert [result.status for result in good] == ["ok"] * 3


def test_a_loss_that_overflows_in_float32_only() -> None:
    def loss(net: Any, batch: Any) -> Tensor:
        return (batch[0] * net.p).sum(1) * 1e30 * 1e9

    case = replace(log_case([[1, 1], [2, 1]]), loss=loss)
    (single,) = Bench(case, dtype="float32").run(case.states)
    (double,) = Bench(case).run(case.states)
    assert single.status == "nonfinite_loss" and double.status == "ok"


def test_several_splits_in_any_order_are_independent() -> None:
    case = mlp(16, "tanh", states=3)
    bench = Bench(case)
    x, y = case.data
    other = Bench(replace(case, data=(x[:3], y[:3])))
    alone, alone_other = bench.run(case.states), other.run(case.states)
    for order in ((0, 1), (1, 0)):
        fresh = Bench(case)
        splits = (fresh.split, other.split)
        accuracy = Accuracy.of(Settings(dtype="float64"), None)
        allocators = [
            SplitAllocator(fresh.engine, split, get_rule("simpson"), accuracy) for split in splits
        ]
        segments = fresh.segments(case.states)
        for t, segment in enumerate(segments):
            following = segments[t + 1] if t + 1 < len(segments) else None
            for index in order:
                result = allocators[index].advance(segment, lambda after=following: after)
                expected = (alone, alone_other)[index][t]
                assert result.lc is not None and expected.lc is not None
                assert torch.equal(result.lc, expected.lc)


class TestWeights:
    """Weights come from the data: each is the same at every point, which their sum cannot tell."""

    def case(self, weights_of: Any, points: tuple[float, float]) -> Case:
        """Its first bias goes from one of two points to the other; weights are a function of it."""

        def loss(net: Any, batch: Any) -> tuple[Tensor, Tensor]:
            here = float(next(net.children())[0].bias[0].detach())
            return classify(net, batch), weights_of(here, batch[2])

        case = replace(mlp(3, "tanh", 5), loss=loss, groups=None)
        weights = torch.arange(1.0, 6.0, dtype=torch.float64)
        case = replace(case, data=(*case.data, weights))
        for state, value in zip(case.states, points, strict=True):
            state["body.0.bias"][0] = value
        return case

    def test_weights_that_trade_places(self) -> None:
        """At the end two items swap theirs: Σw stays what it was, to the bit."""

        def swapped(here: float, weights: Tensor) -> Tensor:
            return weights if here <= 0 else weights[[0, 2, 1, 3, 4]]

        case = self.case(swapped, (-1.0, 1.0))
        found = []
        bench = Bench(case)
        (segment,) = bench.segments(case.states)
        for s in (0.0, 1.0):
            segment.set_point(bench.flat, s)
            found.append(bench.engine.evaluate(bench.split, None).total_weight)
        assert found[0] == found[1]
        wanted = (
            r"^task loss on split 'train': weights of items change between steps 0 and 1; weights "
            r"must come from the data alone, not from the model; multiply the losses by "
            r"factors that depend on it$"
        )
        with pytest.raises(TaskError, match=wanted):
            bench.run(case.states)

    def test_weights_of_the_data_alone(self) -> None:
        case = self.case(lambda here, weights: weights, (-1.0, 1.0))
        (found,) = Bench(case).run(case.states)
        assert found.status == "ok"

    @pytest.mark.parametrize(("factor", "fits"), [(1 + 1e-13, True), (1 + 1e-6, False)])
    def test_the_sum_in_the_plan_may_be_rounded_elsewhere(self, factor: float, fits: bool) -> None:
        case = self.case(lambda here, weights: weights, (-1.0, 1.0))
        bench = Bench(case)
        expected = 5, math.fsum(case.data[2].tolist()) * factor
        rule, accuracy = get_rule("simpson"), Accuracy()
        allocator = SplitAllocator(bench.engine, bench.split, rule, accuracy, expected)
        (segment,) = bench.segments(case.states)
        if fits:
            assert allocator.advance(segment).status == "ok"
        else:
            with pytest.raises(TaskError, match="number and weights must not change"):
                allocator.advance(segment)

    def test_every_set_of_items_has_a_mark_of_its_own(self) -> None:
        """All 2^12 ways to choose among 12 items, and zeros of both signs."""
        every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12).double()
        assert len({int(_mark(weights)) for weights in every}) == 2**12
        assert _mark(torch.tensor([0.0, -0.0]).double()) == _mark(torch.zeros(2).double())
        assert _mark(torch.zeros(2).double()) != _mark(
            torch.tensor([0.0, 5e-324], dtype=torch.float64)
        )
