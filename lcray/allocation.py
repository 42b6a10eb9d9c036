"""One interval to loss change allocation: LC_i = Δ_i · ∫₀¹ g_i(θ(s)) ds, by quadrature.

Legend: P elements, L layers, G groups, K nodes, n panels.

Refinement halves uniformly. With T_n the trapezoid and M_n the midpoint sum on n panels,
T_2n = (T_n + M_n)/2 and Simpson on n panels is S_n = (T_n + 2 M_n)/3, so two running sums hold
every gradient. LC is never rescaled to close: the gap is a measurement.

Source: [LCA] Lan, Liu, Zhou, Yosinski, NeurIPS 2019 (arXiv 1909.01440), eq. 1 and section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcray.data import SplitData
from lcray.errors import TaskError, UsageError
from lcray.gradient import Evaluation, GradientEngine, layer_dots
from lcray.path import Segment
from lcray.planning import Settings
from lcray.quadrature import QuadratureRule

OK = "ok"
NONFINITE_CHECKPOINT = "nonfinite_checkpoint"
NONFINITE_LOSS = "nonfinite_loss"
NONFINITE_GRADIENT = "nonfinite_gradient"


@dataclass(frozen=True)
class Accuracy:
    """When an interval has converged, and how far to refine it.

    Attributes:
        rtol: of |loss change|.
        atol: in units of the loss.
        max_panels: the cap of the halving; 1 does not refine.
    """

    rtol: float = 1e-3
    atol: float = 0.0
    max_panels: int = 1

    @classmethod
    def of(cls, settings: Settings, first_loss: float | None) -> Accuracy:
        """What `settings` ask for; atol is 1e-6 of the first loss, 1e-12 in float64."""
        atol = (1e-6 if settings.dtype == "float32" else 1e-12) * abs(first_loss or 0.0)
        return cls(settings.rtol, atol, settings.max_panels if settings.refine else 1)

    def bound(self, loss_change: float) -> float:
        """The largest |gap| that counts as converged."""
        return max(self.rtol * abs(loss_change), self.atol)


@dataclass(frozen=True)
class IntervalLC:
    """Loss change allocation of one split over one interval.

    Attributes:
        start_step: of the interval.
        end_step: of the interval.
        status: ``ok``, or why there is no LC.
        loss_start: mean loss at the start; NaN where it was not evaluated.
        loss_end: mean loss at the end.
        lc: LC by element, [P] float64; None unless the status is ok.
        layer_error: |Σ_i (rule_i − embedded_i)| by layer, [L]; None without an embedded rule.
        first_order: Δ·g(0) by layer, [L]; None where the rule has no node at 0.
        start_gradient: g(0), [P]; None likewise. Valid until the next interval.
        group_lc: LC of each group's own mean loss by layer, [G, L]; None without groups.
        panels: of the rule in the end.
        n_gradients: without the left endpoint that is shared.
        converged: whether the tolerance was met.
    """

    start_step: int
    end_step: int
    status: str
    loss_start: float
    loss_end: float
    lc: Tensor | None = None
    layer_error: Tensor | None = None
    first_order: Tensor | None = None
    start_gradient: Tensor | None = None
    group_lc: Tensor | None = None
    panels: int = 1
    n_gradients: int = 0
    converged: bool = False


@dataclass(frozen=True)
class _Node:
    """Loss, gradient and group dots at one node; `outgoing` are the dots along the next segment."""

    loss: float
    gradient: Tensor | None
    incoming: Tensor | None = None
    outgoing: Tensor | None = None


class SplitAllocator:
    """Allocates the loss changes of one split, interval after interval.

    The loss and gradient at an endpoint are computed once and serve both intervals that meet there.

    Args:
        engine: evaluates gradients.
        split: the batches.
        rule: the quadrature rule.
        accuracy: the tolerance and the cap of the refinement.
        expected: items and Σ w that every evaluation must have; None for whatever comes.

    Raises:
        UsageError: if a rule that cannot be refined is to be.
    """

    def __init__(
        self,
        engine: GradientEngine,
        split: SplitData,
        rule: QuadratureRule,
        accuracy: Accuracy,
        expected: tuple[int, float] | None = None,
    ) -> None:
        refines = accuracy.max_panels > 1
        if refines and not (rule.refinable and rule.panels == 1):
            raise UsageError(f"rule {rule.name!r}: cannot be refined; use simpson, or no --refine")
        self._engine, self._flat, self._split = engine, engine.flat, split
        self._rule, self._accuracy, self._refines = rule, accuracy, refines
        self._expected = expected
        self._left: _Node | None = None
        self._buffers = [engine.new_vector() for _ in range(2)]
        self._scratch = engine.new_vector()
        self._sum = engine.new_vector()
        self._midpoints = engine.new_vector() if refines else self._scratch

    def advance(self, segment: Segment, following: Segment | None) -> IntervalLC:
        """LC over `segment`; its end is shared with `following`, if that comes next.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        if not segment.is_finite:
            # No loss at all: whether one end was evaluated before depends on where spans begin.
            self._left = None
            return self._marked(segment, NONFINITE_CHECKPOINT, math.nan, math.nan)
        if following is not None and not following.is_finite:
            following = None
        left = self._left or self._evaluate(segment, 0.0, self._rule.has_left, None)
        self._forget_unmoved_buffers(segment, left)
        needs_right = self._rule.has_right or (self._rule.has_left and following is not None)
        right = self._evaluate(segment, 1.0, needs_right, following)
        result = self._integrate(segment, left, right)
        self._left = right
        self._buffers.reverse()
        return result

    def _forget_unmoved_buffers(self, segment: Segment, left: _Node) -> None:
        """Drop gradients of buffers that only the interval before moved.

        So a result depends on its interval alone, whether or not its left end was shared.
        """
        if left.gradient is None:
            return
        moving = segment.moving_buffers(self._flat)
        for number, (layer, where) in enumerate(
            zip(self._flat.layers, self._flat.slices, strict=True)
        ):
            if layer.kind == "buffer" and number not in moving:
                left.gradient[where] = 0.0

    def _integrate(self, segment: Segment, left: _Node, right: _Node) -> IntervalLC:
        if not (math.isfinite(left.loss) and math.isfinite(right.loss)):
            return self._marked(segment, NONFINITE_LOSS, left.loss, right.loss)
        sums = _RunningSums(self, segment, left, right)
        result = sums.refined() if self._refines else sums.fixed()
        if result is None:
            return self._marked(segment, NONFINITE_GRADIENT, left.loss, right.loss)
        return result

    def _evaluate(
        self, segment: Segment, s: float, gradient: bool, following: Segment | None
    ) -> _Node:
        """Loss at θ(s), and the gradient: an endpoint's in its own buffer, others in scratch."""
        moving = segment.moving_buffers(self._flat)
        directions = [segment.delta]
        if following is not None:
            moving |= following.moving_buffers(self._flat)
            directions.append(following.delta)
        self._flat.differentiate_buffers(moving)
        segment.set_point(self._flat, s)
        out = {0.0: self._buffers[0], 1.0: self._buffers[1]}.get(s, self._scratch)
        found: Evaluation = self._engine.evaluate(
            self._split, out if gradient else None, directions
        )
        items = (found.n_items, found.total_weight)
        if self._expected is not None and items != self._expected:
            raise TaskError(
                f"task loss on split {self._split.name!r}: {items[0]} items of weight {items[1]:g} "
                f"at step {segment.start.step}, but {self._expected[0]} of {self._expected[1]:g} "
                "in the plan; number and weights must not change"
            )
        dots = found.group_dots
        return _Node(
            found.loss,
            out if gradient else None,
            None if dots is None else dots[0],
            None if dots is None else dots[-1],
        )

    def _marked(
        self, segment: Segment, status: str, loss_start: float, loss_end: float
    ) -> IntervalLC:
        return IntervalLC(segment.start.step, segment.end.step, status, loss_start, loss_end)


class _RunningSums:
    """Σ_k w_k g_k by element, and the directional derivatives at the nodes by layer and group."""

    def __init__(self, owner: SplitAllocator, segment: Segment, left: _Node, right: _Node) -> None:
        self._owner, self._segment, self._left, self._right = owner, segment, left, right
        self._change = right.loss - left.loss

    def _dots(self, gradient: Tensor) -> Tensor:
        return layer_dots(self._owner._flat, gradient, self._segment.delta)

    def _interior(self, s: float) -> _Node:
        return self._owner._evaluate(self._segment, s, True, None)

    def fixed(self) -> IntervalLC | None:
        """The rule as it is."""
        owner, rule = self._owner, self._owner._rule
        total = owner._sum.zero_()
        dots, groups = [], []
        for s, weight in zip(rule.nodes, rule.weights, strict=True):
            node = self._left if s == 0.0 else self._right if s == 1.0 else self._interior(s)
            assert node.gradient is not None
            total.add_(node.gradient, alpha=weight)
            dots.append(self._dots(node.gradient))
            groups.append(node.outgoing if s == 0.0 else node.incoming)
        layers = _combine(rule.weights, dots)
        error = None
        if rule.embedded is not None:
            error = (layers - _combine(rule.embedded, dots)).abs()
        converged = abs(self._gap(layers)) <= owner._accuracy.bound(self._change)
        group_lc = None if groups[0] is None else _combine(rule.weights, groups)  # type: ignore[arg-type]
        return self._result(
            total, layers, error, group_lc, rule.panels, rule.n_gradients, converged
        )

    def refined(self) -> IntervalLC | None:
        """Simpson's rule, its panels halved until it has converged or the cap is reached."""
        owner, accuracy = self._owner, self._owner._accuracy
        assert self._left.gradient is not None and self._right.gradient is not None
        total = torch.add(self._left.gradient, self._right.gradient, out=owner._sum).mul_(0.5)
        trapezoid = self._dots(total)
        groups = _mean(self._left.outgoing, self._right.incoming)
        panels = 1
        middle, middle_groups = self._midpoint_sum(panels)
        layers = (trapezoid + 2 * middle) / 3
        error = (layers - trapezoid).abs()
        bound = accuracy.bound(self._change)
        converged = abs(self._gap(layers)) <= bound
        while not converged and 2 * panels <= accuracy.max_panels:
            panels *= 2
            total.add_(owner._midpoints).mul_(0.5)
            trapezoid = (trapezoid + middle) / 2
            groups = _mean(groups, middle_groups)
            middle, middle_groups = self._midpoint_sum(panels)
            coarse, layers = layers, (trapezoid + 2 * middle) / 3
            error = (layers - coarse).abs()
            if not math.isfinite(float(error.sum())):
                break
            converged = abs(self._gap(layers)) <= bound and float(error.sum()) <= 10 * bound
        total.add_(owner._midpoints, alpha=2.0).div_(3.0)
        group_lc = None
        if groups is not None and middle_groups is not None:
            group_lc = (groups + 2 * middle_groups) / 3
        return self._result(total, layers, error, group_lc, panels, 2 * panels, converged)

    def _midpoint_sum(self, panels: int) -> tuple[Tensor, Tensor | None]:
        """M_n: gradients into the owner's buffer; the sums by layer [L] and by group [G, L]."""
        middles = self._owner._midpoints.zero_()
        groups = None
        for panel in range(panels):
            node = self._interior((panel + 0.5) / panels)
            assert node.gradient is not None
            middles.add_(node.gradient, alpha=1 / panels)
            if node.incoming is not None:
                part = node.incoming / panels
                groups = part if groups is None else groups + part
        return self._dots(middles), groups

    def _gap(self, layers: Tensor) -> float:
        return math.fsum(layers.tolist()) - self._change

    def _result(
        self,
        total: Tensor,
        layers: Tensor,
        error: Tensor | None,
        group_lc: Tensor | None,
        panels: int,
        n_gradients: int,
        converged: bool,
    ) -> IntervalLC | None:
        if not bool(torch.isfinite(layers).all()):
            return None
        start = self._left.gradient
        return IntervalLC(
            start_step=self._segment.start.step,
            end_step=self._segment.end.step,
            status=OK,
            loss_start=self._left.loss,
            loss_end=self._right.loss,
            lc=total.mul_(self._segment.delta),
            layer_error=error,
            first_order=None if start is None else self._dots(start),
            start_gradient=start,
            group_lc=group_lc,
            panels=panels,
            n_gradients=n_gradients,
            converged=converged,
        )


def _combine(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)


def _mean(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else (a + b) / 2
