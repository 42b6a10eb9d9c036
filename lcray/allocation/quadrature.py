"""Quadrature rules on [0, 1], as data that checks itself.

Legend: K nodes, n panels. A rule approximates ∫₀¹ f(s) ds by Σ_k w_k f(s_k). Its *embedded* rule
uses the same nodes with other weights and has a lower degree. The difference of the two needs no
further evaluation and indicates the error.

Source: Davis & Rabinowitz, *Methods of Numerical Integration*, 2nd ed., ch. 2. Runge-Kutta of
order 4 along a known straight path is Simpson's rule: the integrand does not depend on the
solution, so the two middle stages coincide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lcray.errors import UsageError, suggest
from lcray.storage.numbers import brief, whole_number

#: The most panels of a composite, and of any refinement: more would take too much memory and time.
MAX_PANELS = 4096
_TOLERANCE = 1e-14


@dataclass(frozen=True)
class QuadratureRule:
    """A quadrature rule on [0, 1].

    Attributes:
        name: the name for users; a composite is ``name*n``.
        nodes: K increasing points of [0, 1].
        weights: K weights; they sum to 1.
        degree: the highest degree of polynomials that the rule integrates exactly.
        embedded: K weights of a lower rule on the same nodes, or None.
        panels: the number of equal panels that the rule consists of.
        refinable: whether uniform halving reuses every node (Simpson's family).
        block: if positive, gradients between the endpoints are of a sample of the batches, whose
            size follows from earlier intervals of a block of so many intervals.

    Raises:
        UsageError: if nodes and weights are not a rule of this degree.
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    degree: int
    embedded: tuple[float, ...] | None = None
    panels: int = 1
    refinable: bool = False
    block: int = 0

    def __post_init__(self) -> None:
        _check_nodes(self)
        _check_moments(self, self.weights, self.degree)
        if self.embedded is not None:
            _check_moments(self, self.embedded, 0)

    @property
    def has_left(self) -> bool:
        """Whether 0 is a node, so that the gradient at the interval's start is known."""
        return self.nodes[0] == 0.0

    @property
    def has_right(self) -> bool:
        """Whether 1 is a node, so that the gradient at the interval's end is known."""
        return self.nodes[-1] == 1.0

    @property
    def n_gradients(self) -> int:
        """Gradients per interval, without the left endpoint shared with the previous interval."""
        return len(self.nodes) - (self.has_left and self.has_right)

    def composite(self, panels: int) -> QuadratureRule:
        """This rule on each of `panels` equal panels, with shared nodes merged.

        The embedded rule is this rule on half as many panels, if those nodes are among the new
        ones, else the composite of the embedded rule.

        Raises:
            UsageError: if `panels` is below 1 or above `MAX_PANELS`, or if the rule is already a
                composite or takes samples of the batches.
        """
        if panels > MAX_PANELS:
            raise UsageError(f"rule {self.name!r}: at most {MAX_PANELS} panels, as {self.name}*64")
        if panels < 1 or self.panels != 1 or self.block:
            raise UsageError(f"rule {self.name!r}: cannot be split into {panels} panels")
        if panels == 1:
            return self
        nodes, weights = _spread(self.nodes, self.weights, panels)
        embedded = None
        if self.refinable and panels % 2 == 0:
            coarse = dict(zip(*_spread(self.nodes, self.weights, panels // 2), strict=True))
            embedded = tuple(coarse.get(node, 0.0) for node in nodes)
        elif self.embedded is not None:
            embedded = _spread(self.nodes, self.embedded, panels)[1]
        name = f"{self.name}*{panels}"
        return QuadratureRule(name, nodes, weights, self.degree, embedded, panels, self.refinable)


def _check_nodes(rule: QuadratureRule) -> None:
    lengths = {len(rule.nodes), len(rule.weights), len(rule.embedded or rule.weights)}
    if len(lengths) != 1 or not rule.nodes:
        raise UsageError(f"rule {rule.name!r}: needs one weight per node, got {sorted(lengths)}")
    increasing = all(a < b for a, b in zip(rule.nodes, rule.nodes[1:], strict=False))
    if not increasing or rule.nodes[0] < 0 or rule.nodes[-1] > 1:
        raise UsageError(f"rule {rule.name!r}: nodes must increase within [0, 1]: {rule.nodes}")


def _check_moments(rule: QuadratureRule, weights: tuple[float, ...], degree: int) -> None:
    for power in range(degree + 1):
        moment = math.fsum(w * s**power for w, s in zip(weights, rule.nodes, strict=True))
        if abs(moment - 1 / (power + 1)) > _TOLERANCE:
            raise UsageError(
                f"rule {rule.name!r}: not exact on degree {power} (Σ w s^{power} = {moment!r}, "
                f"must be 1/{power + 1}); correct the weights or the degree"
            )


def _spread(
    nodes: tuple[float, ...], weights: tuple[float, ...], panels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    merged: dict[float, float] = {}
    for panel in range(panels):
        for node, weight in zip(nodes, weights, strict=True):
            point = (panel + node) / panels
            merged[point] = merged.get(point, 0.0) + weight / panels
    return tuple(merged), tuple(merged.values())


LEFT = QuadratureRule("left", (0.0,), (1.0,), 0)
MIDPOINT = QuadratureRule("midpoint", (0.5,), (1.0,), 1)
TRAPEZOID = QuadratureRule("trapezoid", (0.0, 1.0), (0.5, 0.5), 1, (1.0, 0.0))
SIMPSON = QuadratureRule(
    "simpson", (0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6), 3, (0.5, 0.0, 0.5), refinable=True
)
_LOBATTO = (1 - 1 / math.sqrt(5)) / 2
GAUSS_LOBATTO = QuadratureRule(
    "gauss-lobatto",
    (0.0, _LOBATTO, 1 - _LOBATTO, 1.0),
    (1 / 12, 5 / 12, 5 / 12, 1 / 12),
    5,
    (0.5, 0.0, 0.0, 0.5),
)
_GAUSS_2 = (1 - 1 / math.sqrt(3)) / 2
GAUSS_2 = QuadratureRule("gauss-2", (_GAUSS_2, 1 - _GAUSS_2), (0.5, 0.5), 3)
_GAUSS = (1 - math.sqrt(3 / 5)) / 2
GAUSS = QuadratureRule(
    "gauss", (_GAUSS, 0.5, 1 - _GAUSS), (5 / 18, 8 / 18, 5 / 18), 5, (0.0, 1.0, 0.0)
)

#: Simpson's rule with the midpoint on a sample of the batches: see `lcray.allocation.sampled`.
SIMPSON_SAMPLED = replace(SIMPSON, name="simpson-sampled", refinable=False, block=16)

#: The named rules. ``left`` is the first-order variant of [LCA]; ``simpson`` is RK4, the default.
RULES = {
    rule.name: rule
    for rule in (
        LEFT,
        MIDPOINT,
        TRAPEZOID,
        SIMPSON,
        SIMPSON_SAMPLED,
        GAUSS_LOBATTO,
        GAUSS_2,
        GAUSS,
    )
}
#: Batches in a sample, at least, and in each stratum, so that they show how they differ.
FEWEST_BATCHES, FEWEST_IN_STRATUM = 12, 2
#: What analyses of earlier versions may have used; new ones cannot.
RETIRED = {"auto": replace(SIMPSON, name="auto", refinable=False)}
_ALIASES = {"first-order": "left", "rk4": "simpson"}


def fewest_batches(n_batches: int, n_strata: int) -> int:
    """The size of the smallest sample that a rule may take of `n_batches` in so many strata."""
    return min(n_batches, max(FEWEST_BATCHES, FEWEST_IN_STRATUM * n_strata))


def get_rule(name: str) -> QuadratureRule:
    """The rule called `name`, with ``name*n`` for its composite on n panels.

    This includes `RETIRED` rules, since plans and outputs of earlier versions name them.

    Raises:
        UsageError: if there is no such rule (the message names the nearest one), or if the number
            of panels is not valid or is above `MAX_PANELS`.
    """
    base, star, panels = name.partition("*")
    base = _ALIASES.get(base, base)
    if base not in RULES | RETIRED:
        raise UsageError(suggest(name, [*RULES, *_ALIASES], "rule"))
    rule = (RULES | RETIRED)[base]
    if not star:
        return rule
    count = whole_number(panels)
    if count is None:
        raise UsageError(f"rule {brief(name)}: panels must be a positive integer: 'simpson*2'")
    return rule.composite(count)
