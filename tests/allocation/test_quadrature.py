"""Quadrature rules against polynomials, textbooks and each other."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcray.allocation.quadrature import (
    MAX_PANELS,
    RULES,
    SIMPSON,
    TRAPEZOID,
    QuadratureRule,
    get_rule,
)
from lcray.errors import UsageError


def integrate(rule: QuadratureRule, values: list[float]) -> float:
    """Σ_k w_k f_k for `values` f_k at the nodes, [K]."""
    return math.fsum(w * v for w, v in zip(rule.weights, values, strict=True))


# Davis & Rabinowitz: the degrees of precision.
DEGREES = {
    "left": 0,
    "midpoint": 1,
    "trapezoid": 1,
    "simpson": 3,
    "gauss-lobatto": 5,
    "gauss-2": 3,
    "gauss": 5,
}
EMBEDDED_DEGREES = {"trapezoid": 0, "simpson": 1, "gauss-lobatto": 1, "gauss": 1}
# Sums of at most 17 products below 1, each rounded once or twice: a few units of 2^-53.
ROUNDING = 1e-15


def moment(rule: QuadratureRule, weights: tuple[float, ...], power: int) -> float:
    return math.fsum(w * s**power for w, s in zip(weights, rule.nodes, strict=True))


def test_the_named_rules_are_those_of_the_table() -> None:
    plain = {name: rule for name, rule in RULES.items() if not rule.block}
    assert {name: rule.degree for name, rule in plain.items()} == DEGREES
    (sampled,) = RULES.keys() - plain.keys()
    simpson, found = get_rule("simpson"), get_rule(sampled)
    assert sampled == "simpson-sampled" and found.block == 16
    assert (found.nodes, found.weights) == (simpson.nodes, simpson.weights)
    assert all(rule.name == name for name, rule in RULES.items())


@pytest.mark.parametrize("name", DEGREES)
@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_exact_up_to_the_degree_and_wrong_one_above(name: str, panels: int) -> None:
    rule = get_rule(f"{name}*{panels}")
    for power in range(DEGREES[name] + 1):
        assert abs(moment(rule, rule.weights, power) - 1 / (power + 1)) <= ROUNDING
    wrong = DEGREES[name] + 1
    # The error on s^(degree+1) is the Peano constant over panels^(degree+1): the smallest one
    # here, of Gauss with 5 panels, is 1/2800/5^6 = 2e-8.
    assert abs(moment(rule, rule.weights, wrong) - 1 / (wrong + 1)) > 1e-8


@pytest.mark.parametrize("name", EMBEDDED_DEGREES)
@pytest.mark.parametrize("panels", [1, 3])
def test_embedded_rules_have_the_lower_degree(name: str, panels: int) -> None:
    rule = get_rule(f"{name}*{panels}")
    assert rule.embedded is not None
    degree = EMBEDDED_DEGREES[name]
    for power in range(degree + 1):
        assert abs(moment(rule, rule.embedded, power) - 1 / (power + 1)) <= ROUNDING
    wrong = degree + 1
    assert abs(moment(rule, rule.embedded, wrong) - 1 / (wrong + 1)) > 1e-3


@pytest.mark.parametrize("name", ["left", "midpoint", "gauss-2"])
def test_rules_whose_nodes_leave_no_lower_rule_have_none(name: str) -> None:
    assert RULES[name].embedded is None
    assert get_rule(f"{name}*4").embedded is None


@pytest.mark.parametrize(("name", "count"), [("gauss-2", 2), ("gauss", 3)])
def test_gauss_is_legendre(name: str, count: int) -> None:
    x, w = np.polynomial.legendre.leggauss(count)
    # numpy finds the nodes by Newton's method: a few roundings of numbers of order one.
    assert np.allclose(RULES[name].nodes, (x + 1) / 2, rtol=0, atol=4e-16)
    assert np.allclose(RULES[name].weights, w / 2, rtol=0, atol=4e-16)


def test_gauss_lobatto_has_the_ends_and_the_zeros_of_the_derivative() -> None:
    # Interior Lobatto nodes are the zeros of P3'(x) = (15 x² - 3) / 2, its weights
    # 2 / (n (n-1) P3(x)²) with n = 4.
    rule = RULES["gauss-lobatto"]
    for s, w in zip(rule.nodes, rule.weights, strict=True):
        x = 2 * s - 1
        if 0 < s < 1:
            assert abs((15 * x * x - 3) / 2) <= 1e-14  # slope 15x: rounding of x times 7
        legendre = (5 * x**3 - 3 * x) / 2
        assert abs(w - 1 / (12 * legendre**2)) <= 1e-14
    assert rule.nodes[0] == 0.0 and rule.nodes[-1] == 1.0


@pytest.mark.parametrize("panels", [2, 3, 4, 6, 16])
def test_composite_simpson_is_1_4_2_4_1(panels: int) -> None:
    rule = SIMPSON.composite(panels)
    points = 2 * panels + 1
    nodes = [Fraction(i, 2 * panels) for i in range(points)]
    weights = [4 if i % 2 else 2 for i in range(points)]
    weights[0] = weights[-1] = 1
    assert rule.nodes == tuple(float(x) for x in nodes)
    expected = [float(Fraction(w, 6 * panels)) for w in weights]
    assert np.allclose(rule.weights, expected, rtol=4e-16, atol=0)  # two roundings a weight
    assert rule.panels == panels and rule.degree == 3 and rule.refinable
    assert rule.name == f"simpson*{panels}"


@pytest.mark.parametrize("panels", [2, 4, 6])
def test_embedded_in_an_even_composite_is_simpson_on_half_as_many_panels(panels: int) -> None:
    rule = SIMPSON.composite(panels)
    assert rule.embedded is not None
    coarse = dict(zip(rule.nodes[::2], [0] * (panels + 1), strict=True))
    for i, node in enumerate(rule.nodes[::2]):
        coarse[node] = 1 if i in (0, panels) else 4 if i % 2 else 2
    for node, weight in zip(rule.nodes, rule.embedded, strict=True):
        assert weight == pytest.approx(coarse.get(node, 0) / (3 * panels), rel=4e-16)


def test_embedded_in_an_odd_composite_is_the_composite_of_the_embedded() -> None:
    rule = SIMPSON.composite(3)
    assert rule.embedded is not None
    # The trapezoid on three panels: 1 2 2 1 over 6, nothing at the midpoints.
    assert np.allclose(rule.embedded, np.array([1, 0, 2, 0, 2, 0, 1]) / 6, rtol=4e-16)


def test_composite_trapezoid_merges_its_nodes() -> None:
    rule = get_rule("trapezoid*4")
    assert rule.nodes == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert rule.weights == (0.125, 0.25, 0.25, 0.25, 0.125)  # powers of two: exact


def test_open_rules_keep_every_node_of_a_composite() -> None:
    rule = get_rule("gauss*3")
    assert len(rule.nodes) == 9
    x, w = np.polynomial.legendre.leggauss(3)
    nodes = np.concatenate([(x + 1) / 2 + i for i in range(3)]) / 3
    assert np.allclose(rule.nodes, nodes, rtol=0, atol=4e-16)
    assert np.allclose(rule.weights, np.tile(w / 6, 3), rtol=0, atol=4e-16)


@pytest.mark.parametrize(
    ("name", "count"),
    # Evaluations an interval in the limit of many: a left endpoint comes from the one before
    # only if the rule has a node at the right end as well.
    [
        ("left", 1),
        ("midpoint", 1),
        ("trapezoid", 1),
        ("simpson", 2),
        ("gauss-lobatto", 3),
        ("gauss-2", 2),
        ("gauss", 3),
        ("left*3", 3),
        ("midpoint*3", 3),
        ("trapezoid*3", 3),
        ("simpson*3", 6),
        ("gauss-lobatto*3", 9),
        ("gauss-2*3", 6),
        ("gauss*3", 9),
    ],
)
def test_n_gradients(name: str, count: int) -> None:
    assert get_rule(name).n_gradients == count


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("left", True, False),
        ("midpoint", False, False),
        ("trapezoid", True, True),
        ("simpson", True, True),
        ("gauss-lobatto", True, True),
        ("gauss-2", False, False),
        ("gauss", False, False),
    ],
)
def test_endpoints(name: str, left: bool, right: bool) -> None:
    rule = get_rule(name)
    assert (rule.has_left, rule.has_right) == (left, right)


def test_aliases() -> None:
    assert get_rule("rk4") is SIMPSON
    assert get_rule("first-order") is RULES["left"]
    assert get_rule("rk4*2") == SIMPSON.composite(2)
    assert get_rule("simpson*1") is SIMPSON


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    name=st.sampled_from(sorted(DEGREES)),
    panels=st.integers(1, 9),
    coefficients=st.lists(st.integers(-9, 9), min_size=1, max_size=6),
)
def test_polynomials_of_any_coefficients(name: str, panels: int, coefficients: list[int]) -> None:
    rule = get_rule(f"{name}*{panels}")
    kept = coefficients[: rule.degree + 1]
    exact = sum(Fraction(c, k + 1) for k, c in enumerate(kept))
    values = [sum(c * s**k for k, c in enumerate(kept)) for s in rule.nodes]
    # At most 6 terms of at most 9: rounding is a few times 54 · 2^-53.
    assert abs(integrate(rule, values) - float(exact)) <= 5e-14


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": (0.25, 0.5, 0.5)}, "degree 0"),
        ({"weights": (0.2, 0.6, 0.2)}, "degree 2"),
        ({"weights": (0.2, 0.5, 0.3)}, "degree 1"),
        ({"degree": 4}, "degree 4"),
        ({"nodes": (0.0, 0.5)}, "one weight per node"),
        ({"nodes": (), "weights": (), "embedded": None}, "one weight per node"),
        ({"nodes": (0.5, 0.0, 1.0)}, "increase"),
        ({"nodes": (0.0, 0.0, 1.0)}, "increase"),
        ({"nodes": (-0.5, 0.5, 1.5)}, "increase"),
        ({"embedded": (0.5, 0.0, 0.4)}, "degree 0"),
        ({"embedded": (0.5, 0.5)}, "one weight per node"),
    ],
)
def test_what_is_no_rule_is_refused(change: dict[str, object], words: str) -> None:
    valid: dict[str, object] = {
        "name": "mine",
        "nodes": (0.0, 0.5, 1.0),
        "weights": (1 / 6, 2 / 3, 1 / 6),
        "degree": 3,
        "embedded": (0.5, 0.0, 0.5),
    }
    QuadratureRule(**valid)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words) as caught:
        QuadratureRule(**{**valid, **change})  # type: ignore[arg-type]
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["simpso", "simpson*x", "simpson*0", "simpson*-1", "", "rk5", "simpson*", "simpson*٤"]
)
def test_unknown_rules_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        get_rule(name)


def test_the_nearest_rule_is_named() -> None:
    with pytest.raises(UsageError, match="'trapezoid'"):
        get_rule("trapezoidal")


def test_a_composite_is_not_split_again() -> None:
    with pytest.raises(UsageError, match="cannot be split"):
        TRAPEZOID.composite(2).composite(2)


@pytest.mark.parametrize("panels", [str(MAX_PANELS + 1), "1000000000", "9" * 5000])
@pytest.mark.parametrize("base", sorted(DEGREES))
def test_no_rule_has_more_panels_than_memory_and_time_bear(base: str, panels: str) -> None:
    with pytest.raises(UsageError, match=r"at most 4096 panels") as caught:
        get_rule(f"{base}*{panels}")
    assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match=r"at most 4096 panels"):
        RULES[base].composite(10**9)


@pytest.mark.parametrize("base", sorted(DEGREES))
def test_the_most_panels_are_still_a_rule(base: str) -> None:
    rule = get_rule(f"{base}*4096")
    for power in range(rule.degree + 1):
        assert abs(integrate(rule, [s**power for s in rule.nodes]) - 1 / (power + 1)) <= 1e-14


@pytest.mark.parametrize("panels", ["x" * 5000, "9" * 5000, "2"])
def test_samples_of_batches_take_no_panels(panels: str) -> None:
    with pytest.raises(UsageError, match="rule 'simpson-sampled") as caught:
        get_rule(f"simpson-sampled*{panels}")
    assert len(str(caught.value)) < 200
