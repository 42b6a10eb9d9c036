"""`--rule auto`: the trapezoid where its gap and the probes allow, else Simpson, else halving."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies import Bench, Case, Pair, gap, mlp, random_states
from torch import Tensor

from lcray.allocation.interval import OK, Accuracy
from lcray.allocation.quadrature import ADAPTIVE, RULES, get_rule
from lcray.errors import UsageError
from lcray.planning.make import make_settings

EVERY = get_rule("auto").probe_every


def polynomial(power: int, other: float, steps: list[float]) -> Case:
    """ℓ = p^power + other · q^power + p along p = q = steps: an integrand of degree power - 1."""

    def loss(net: Any, batch: Any) -> Tensor:
        return (net.p**power + other * net.q**power + net.p).reshape(1) * batch[0]

    states = tuple(
        {name: torch.tensor([value], dtype=torch.float64) for name in ("p", "q")} for value in steps
    )
    return Case("polynomial", Pair, (torch.ones(1, dtype=torch.float64),), loss, states)


def auto(case: Case, **options: Any) -> list[Any]:
    return Bench(case, rule="auto", **options).run(case.states, first_loss=0.0)


def test_auto_is_simpson_with_leave_to_use_the_trapezoid() -> None:
    rule, simpson = get_rule("auto"), get_rule("simpson")
    assert (rule.nodes, rule.weights, rule.embedded) == (
        simpson.nodes,
        simpson.weights,
        simpson.embedded,
    )
    assert rule.embedded == tuple(
        dict(zip(*(getattr(RULES["trapezoid"], n) for n in ("nodes", "weights")), strict=True)).get(
            node, 0.0
        )
        for node in rule.nodes
    )
    assert (rule.embedded_name, rule.shown_name) == ("trapezoid", "simpson")
    assert set(ADAPTIVE) == {"auto"} and not set(ADAPTIVE) & set(RULES)
    assert all(r.probe_every == 0 and r.shown_name == r.name for r in RULES.values())
    with pytest.raises(UsageError, match="chooses the panels itself"):
        get_rule("auto*2")
    assert make_settings({"rule": "auto", "refine": True}).rule == "auto"


def test_where_the_trapezoid_is_exact_only_probes_take_the_midpoint() -> None:
    # A linear integrand: the trapezoid is exact, S - T = 0.
    case = polynomial(2, 3.0, [0.1 * n for n in range(2 * EVERY + 4)])
    results = auto(case, rtol=1e-9)
    names = ["simpson" if n % EVERY == 0 else "trapezoid" for n in range(len(results))]
    assert [r.rule for r in results] == names
    assert [r.n_gradients for r in results] == [2 if name == "simpson" else 1 for name in names]
    assert all(r.converged and r.panels == 1 for r in results)
    for n, result in enumerate(results):
        a, b = 0.1 * n, 0.1 * (n + 1)
        assert result.lc.tolist() == pytest.approx([b**2 - a**2 + b - a, 3 * (b**2 - a**2)])


def test_where_the_gap_fails_the_midpoint_is_taken() -> None:
    # A cubic integrand: Simpson is exact, the trapezoid is not.
    case = polynomial(4, 1.0, [0.5 * n for n in range(EVERY + 3)])
    results = auto(case, rtol=1e-6)
    assert [r.rule for r in results] == ["simpson"] * (EVERY + 2)
    assert [r.n_gradients for r in results] == [2] * (EVERY + 2)
    assert all(r.converged and r.panels == 1 for r in results)


def test_it_halves_only_where_that_is_needed_and_says_where_it_missed() -> None:
    # Degree 5: Simpson's error on [a, a + h] falls as h⁴. The large step needs panels.
    case = polynomial(6, 1.0, [1.0, 1.01, 1.02, 1.62, 1.63])
    results = auto(case, rtol=1e-6, max_panels=16)
    panels = [r.panels for r in results]
    assert panels[2] > 1 and panels[0] == panels[1] == panels[3] == 1
    assert results[2].n_gradients == 2 * panels[2]
    assert all(r.converged for r in results)
    capped = auto(case, rtol=1e-6, max_panels=1)
    assert capped[2].panels == 1 and not capped[2].converged
    missed = auto(case, rtol=1e-14, max_panels=2)
    assert missed[2].panels == 2 and not missed[2].converged


def test_a_gap_that_cancels_between_layers_is_noticed_by_the_probe() -> None:
    # q = -p at degree 4: layers are wrong by the trapezoid and their errors cancel, so that the gap
    # is zero in every interval. Only the probe can tell.
    case = polynomial(4, -1.0, [0.5 * n for n in range(2 * EVERY + 1)])
    results = auto(case, rtol=1e-6)
    assert all(abs(gap(r)) < 1e-12 for r in results)
    assert [r.rule for r in results] == ["simpson"] * (2 * EVERY)


def test_trust_ends_with_the_block_and_with_a_layer_that_disagrees() -> None:
    # Small steps, in which the layers' errors are far below the tolerance; then, within the block,
    # larger ones whose gap does not pass. There both rules are known, and disagree.
    small, large = 1e-4, 0.5
    steps = [1.0]
    for width in [small] * 3 + [large] * 2 + [small] * 4:
        steps.append(steps[-1] + width)
    results = auto(polynomial(4, 2.0, steps), rtol=1e-6)
    names = [r.rule for r in results]
    assert names[:3] == ["simpson", "trapezoid", "trapezoid"]
    assert names[3] == names[4] == "simpson"
    assert names[5] == "simpson"  # not trusted at first: it takes both, and they agree
    assert names[6:8] == ["trapezoid"] * 2
    assert names[EVERY] == "simpson"  # a new block


def test_an_interval_without_lc_withdraws_the_trust() -> None:
    steps = [0.1 * n for n in range(7)]
    case = polynomial(2, 3.0, steps)
    states = list(case.states)
    states[3] = {**states[3], "p": torch.tensor([math.nan], dtype=torch.float64)}
    results = auto(replace(case, states=tuple(states)))
    assert [r.status == OK for r in results] == [True, True, False, False, True, True]
    assert [r.rule for r in results if r.status == OK] == [
        "simpson",
        "trapezoid",
        "simpson",
        "trapezoid",
    ]


def test_the_values_are_those_of_the_fixed_rules() -> None:
    case = mlp(3, "tanh", states=EVERY + 5)
    # Short steps from the first state on, so that both rules occur.
    first = case.states[0]
    case = replace(
        case,
        states=tuple(
            {k: first[k] + 0.02 * n * (v - first[k]) for k, v in case.states[1].items()}
            for n in range(EVERY + 5)
        ),
    )
    found = auto(case, rtol=1e-3)
    assert {r.rule for r in found} == {"simpson", "trapezoid"}
    for name in ("simpson", "trapezoid"):
        fixed = Bench(case, rule=name).run(case.states)
        for a, b in zip(found, fixed, strict=True):
            if a.rule == name and a.panels == 1:
                scale = float(b.lc.abs().sum())
                assert float((a.lc - b.lc).abs().max()) <= 1e-14 * scale
                assert float((a.layer_error - b.layer_error).abs().max()) <= 1e-14 * scale
                assert float((a.first_order - b.first_order).abs().max()) <= 1e-14 * scale
                assert (a.group_lc - b.group_lc).abs().max() <= 1e-13


def test_settings_and_accuracy_refine_by_themselves() -> None:
    made = make_settings({"rule": "auto", "max_panels": 4})
    assert Accuracy.of(made, 1.0).max_panels == 4
    assert Accuracy.of(replace(made, rule="simpson"), 1.0).max_panels == 1


def test_a_single_interval_is_a_probe() -> None:
    case = mlp(1, "tanh")
    case = replace(case, states=random_states(case.make, 1, 2, step=1e-3))
    (result,) = auto(case)
    assert result.rule == "simpson" and result.n_gradients == 2
