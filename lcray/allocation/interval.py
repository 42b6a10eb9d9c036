"""Loss change allocation of one interval: LC_i = Δ_i · ∫₀¹ g_i(θ(s)) ds, by quadrature.

Legend: P elements, L layers, G groups, R replicates of a sample, K nodes, n panels.

Refinement halves all panels. With T_n the trapezoid and M_n the midpoint sum on n panels,
T_2n = (T_n + M_n)/2 and Simpson on n panels is S_n = (T_n + 2 M_n)/3, so two running sums hold
every gradient. LC is never rescaled to close: the gap is a measurement.

Memory: gradients are summed in one float64 vector. The vectors that must outlive it, which are the
gradients at both ends and M_1 or T_n, are kept in the compute dtype, one vector each. So an
interval takes 20 bytes per element in float32, whatever the rule and the refinement.

Source: [LCA] Lan, Liu, Zhou, Yosinski, NeurIPS 2019 (arXiv 1909.01440), eq. 1 and section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcray.allocation.gradient import GradientEngine, layer_dots
from lcray.allocation.path import Segment
from lcray.allocation.quadrature import QuadratureRule
from lcray.allocation.sampled import BatchSample
from lcray.settings import Settings

OK = "ok"
NONFINITE_CHECKPOINT = "nonfinite_checkpoint"
NONFINITE_LOSS = "nonfinite_loss"
NONFINITE_GRADIENT = "nonfinite_gradient"

_LAYERS = 10  # times the bound of the gap: allowed distance of layer sums to the coarser rule's


@dataclass(frozen=True)
class Accuracy:
    """When an interval counts as converged, and how far to refine it.

    Attributes:
        rtol: relative to |loss change|.
        atol: in units of the loss.
        max_panels: the largest number of panels; 1 does not refine.
    """

    rtol: float = 1e-3
    atol: float = 0.0
    max_panels: int = 1

    @classmethod
    def of(cls, settings: Settings, first_loss: float | None) -> Accuracy:
        """The accuracy in `settings`; atol is 1e-6 of the first loss, 1e-12 in float64."""
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
        loss_start: mean loss at the start; NaN if it was not evaluated.
        loss_end: mean loss at the end.
        rule: the name of the rule that was used.
        lc: LC by element, [P] float64; None unless the status is ok. Like `start_gradient`, it is
            valid until the next interval of any split that shares the scratch vectors.
        layer_lc: LC by layer, [L] float64; None unless the status is ok.
        layer_error: |Σ_i (rule_i − embedded_i)| by layer, [L]; None without an embedded rule.
        first_order: Δ·g(0) by layer, [L]; None if the rule has no node at 0.
        start_gradient: g(0), [P] in the compute dtype; None if the rule has no node at 0.
        group_lc: LC of each group's own mean loss, then of each replicate's, by layer, [G + R, L];
            None without groups and replicates.
        panels: the final number of panels.
        n_gradients: number of gradients, without the shared left endpoint.
        converged: whether the tolerance was met; None for a rule that takes samples of batches.
        replicate_losses: the mean loss of each replicate at the start and at the end, [2, R].
        sampled_gradients: the gradients of samples of batches, in full-batch gradients.
        layer_se: standard error of LC from sampling batches, by layer, [L]; NaN where it cannot be
            told; None for a rule that takes no samples.
        lc_se: the same of the sum over all layers.
    """

    start_step: int
    end_step: int
    status: str
    loss_start: float
    loss_end: float
    rule: str
    lc: Tensor | None = None
    layer_lc: Tensor | None = None
    layer_error: Tensor | None = None
    first_order: Tensor | None = None
    start_gradient: Tensor | None = None
    group_lc: Tensor | None = None
    panels: int = 1
    n_gradients: int = 0
    converged: bool | None = False
    replicate_losses: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    sampled_gradients: float = 0.0
    layer_se: Tensor | None = None
    lc_se: float | None = None


@dataclass(frozen=True)
class Node:
    """Loss and gradient at an end of the path.

    Attributes:
        loss: the mean loss.
        gradient: [P] in the compute dtype; None if no rule needs it.
        incoming: dot products of groups and replicates with the interval that ends here,
            [G + R, L]; None without groups and replicates.
        outgoing: the same with the interval that starts here.
        replicate_losses: the mean loss of each replicate, [R].
    """

    loss: float
    gradient: Tensor | None
    incoming: Tensor | None = None
    outgoing: Tensor | None = None
    replicate_losses: tuple[float, ...] = ()


class Scratch:
    """The vectors [P] that the splits of a pass share.

    Attributes:
        total: sums of gradients, float64; LC at the end.
        middle: the sum over interior nodes, or T_n, in the compute dtype.
        right: the gradient at the right end, in the compute dtype.
    """

    def __init__(self, engine: GradientEngine) -> None:
        self.total = engine.new_vector()
        self.middle = engine.flat.new_vector()
        self.right = engine.flat.new_vector()


class Interval:
    """The computation of one interval of one split.

    Args:
        rule: the quadrature rule.
        accuracy: the tolerance and the cap of the refinement.
        engine: of the model.
        scratch: the vectors to work in.
        segment: the path.
        left: loss and gradient at its start.
        at_end: evaluates loss and gradient at its end.
        inside: adds the gradient at θ(s), times a factor, to ``scratch.total``; returns the dot
            products of groups.
    """

    def __init__(
        self,
        rule: QuadratureRule,
        accuracy: Accuracy,
        engine: GradientEngine,
        scratch: Scratch,
        segment: Segment,
        left: Node,
        at_end: Callable[[], Node],
        inside: Callable[[float, float], Tensor | None],
    ) -> None:
        self._rule, self._accuracy, self._flat = rule, accuracy, engine.flat
        self._scratch, self._segment, self._left = scratch, segment, left
        self._at_end, self._inside = at_end, inside

    @cached_property
    def right(self) -> Node:
        """Loss and gradient at the end; evaluated at first use."""
        return self._at_end()

    @cached_property
    def _left_dots(self) -> Tensor:
        assert self._left.gradient is not None
        return self._dots(self._left.gradient)

    @cached_property
    def _right_dots(self) -> Tensor:
        assert self.right.gradient is not None
        return self._dots(self.right.gradient)

    def fixed(self) -> IntervalLC:
        """The rule without refinement. The end comes last: its checkpoint may still be loading."""
        rule, scratch = self._rule, self._scratch
        embedded = rule.embedded or (0.0,) * len(rule.weights)
        nodes = list(zip(rule.nodes, rule.weights, embedded, strict=True))
        layers = coarse = scratch.total.new_zeros(len(self._flat.layers))
        inside = math.fsum(weight for s, weight, _ in nodes if 0.0 < s < 1.0)
        one_by_one = any(lower for s, _, lower in nodes if 0.0 < s < 1.0)
        groups, terms = None, []
        scratch.total.zero_()
        for s, weight, lower in nodes:
            if 0.0 < s < 1.0:
                groups = _plus(groups, weight, self._inside(s, weight / inside))
                if one_by_one:
                    found = inside * self._dots(scratch.total)
                    coarse = coarse + (found - layers) * (lower / weight)
                    layers = found
                terms = [(scratch.middle, inside)]
        if terms:
            scratch.middle.copy_(scratch.total)
            layers = inside * self._dots(scratch.middle)
        if not self._losses_are_finite:
            return self.without(NONFINITE_LOSS)
        for s, weight, lower in nodes:
            if s in (0.0, 1.0):
                gradient, dots, by_group = self._end(s)
                terms.append((gradient, weight))
                layers, coarse = layers + weight * dots, coarse + lower * dots
                groups = _plus(groups, weight, by_group)
        error = None if rule.embedded is None else (layers - coarse).abs()
        converged = abs(self._gap(layers)) <= self._bound
        return self._result(terms, layers, error, groups, rule.panels, rule.n_gradients, converged)

    def refined(self) -> IntervalLC:
        """Simpson's rule, its panels halved until it has converged or the cap is reached."""
        middle, middle_groups = self._midpoints(1)
        if not self._losses_are_finite:
            return self.without(NONFINITE_LOSS)
        scratch, bound, panels = self._scratch, self._bound, 1
        left, right, trapezoid, groups = self._trapezoid()
        terms = [(left, 1 / 6), (right, 1 / 6), (scratch.middle, 2 / 3)]
        layers = (trapezoid + 2 * middle) / 3
        error = (layers - trapezoid).abs()
        converged = abs(self._gap(layers)) <= bound
        while not converged and 2 * panels <= self._accuracy.max_panels:
            panels *= 2
            ends = [(left, 0.25), (right, 0.25)] if panels == 2 else [(scratch.total, 0.5)]
            self._combine([(scratch.middle, 0.5), *ends], scratch.middle)  # T_n
            groups = _plus(_plus(None, 0.5, groups), 0.5, middle_groups)
            trapezoid = self._dots(scratch.middle)
            middle, middle_groups = self._midpoints(panels)
            terms = [(scratch.middle, 1 / 3), (scratch.total, 2 / 3)]
            coarse, layers = layers, (trapezoid + 2 * middle) / 3
            error = (layers - coarse).abs()
            if not math.isfinite(float(error.sum())):
                break
            close = float(error.sum()) <= _LAYERS * bound
            converged = close and abs(self._gap(layers)) <= bound
        groups = _plus(_plus(None, 1 / 3, groups), 2 / 3, middle_groups)
        return self._result(terms, layers, error, groups, panels, 2 * panels, converged)

    def corrected(self, sample: BatchSample) -> IntervalLC:
        """The trapezoid, corrected towards Simpson's rule by a sample of the batches.

        Args:
            sample: whose vector holds the correction, once both ends have been evaluated.
        """
        self._inside(0.5, 1.0)
        if not self._losses_are_finite:
            return self.without(NONFINITE_LOSS)
        left, right, trapezoid, groups = self._trapezoid()
        correction = sample.scale * self._dots(sample.vector)
        groups = _plus(groups, 1.0, sample.group_correction())
        terms = [(left, 0.5), (right, 0.5), (sample.vector, sample.scale)]
        layers = trapezoid + correction
        return self._result(terms, layers, correction.abs(), groups, 1, 1, False)

    def _trapezoid(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients at both ends [P], and T_1 by layer [L] and by group [G, L]."""
        (left, a, left_groups), (right, b, right_groups) = self._end(0.0), self._end(1.0)
        return left, right, (a + b) / 2, _plus(_plus(None, 0.5, left_groups), 0.5, right_groups)

    def _midpoints(self, panels: int) -> tuple[Tensor, Tensor | None]:
        """M_n by layer [L] and group [G, L]; the vector is in ``total``, M_1 also in ``middle``."""
        scratch, groups = self._scratch, None
        scratch.total.zero_()
        for panel in range(panels):
            found = self._inside((panel + 0.5) / panels, 1 / panels)
            groups = _plus(groups, 1 / panels, found)
        if panels > 1:
            return self._dots(scratch.total), groups
        scratch.middle.copy_(scratch.total)
        return self._dots(scratch.middle), groups

    def without(self, status: str) -> IntervalLC:
        """A result without LC, and the reason."""
        steps = self._segment.start.step, self._segment.end.step
        return IntervalLC(*steps, status, self._left.loss, self.right.loss, self._rule.name)

    @property
    def _losses_are_finite(self) -> bool:
        return math.isfinite(self._left.loss) and math.isfinite(self.right.loss)

    @property
    def _change(self) -> float:
        return self.right.loss - self._left.loss

    @property
    def _bound(self) -> float:
        return self._accuracy.bound(self._change)

    def _end(self, s: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient [P], its product with Δ by layer [L], and by group [G, L], at s = 0 or 1."""
        if s == 0.0:
            gradient, dots, groups = self._left.gradient, self._left_dots, self._left.outgoing
        else:
            gradient, dots, groups = self.right.gradient, self._right_dots, self.right.incoming
        assert gradient is not None
        return gradient, dots, groups

    def _dots(self, gradient: Tensor) -> Tensor:
        return layer_dots(self._flat, gradient, self._segment)

    def _gap(self, layers: Tensor) -> float:
        return math.fsum(layers.tolist()) - self._change

    def _combine(
        self, terms: Sequence[tuple[Tensor, float]], out: Tensor, along: Segment | None = None
    ) -> None:
        """Σ weight · vector into `out`, times Δ if `along` a path; summed in float64."""
        for where in self._flat.blocks():
            (first, weight), *rest = terms
            total = first[where].double() * weight
            for vector, weight in rest:
                total.add_(vector[where], alpha=weight)
            out[where] = total if along is None else total.mul_(along.difference(where))

    def _result(
        self,
        terms: Sequence[tuple[Tensor, float]],
        layers: Tensor,
        error: Tensor | None,
        groups: Tensor | None,
        panels: int,
        n_gradients: int,
        converged: bool,
    ) -> IntervalLC:
        if not bool(torch.isfinite(layers).all()):
            return self.without(NONFINITE_GRADIENT)
        total, start = self._scratch.total, self._left.gradient
        self._combine(terms, total, self._segment)
        return IntervalLC(
            start_step=self._segment.start.step,
            end_step=self._segment.end.step,
            status=OK,
            loss_start=self._left.loss,
            loss_end=self.right.loss,
            rule=self._rule.name,
            lc=total,
            layer_lc=layers,
            layer_error=error,
            first_order=None if start is None else self._left_dots,
            start_gradient=start,
            group_lc=groups,
            panels=panels,
            n_gradients=n_gradients,
            converged=converged,
            replicate_losses=(self._left.replicate_losses, self.right.replicate_losses),
        )


def _plus(total: Tensor | None, weight: float, part: Tensor | None) -> Tensor | None:
    """`total` + `weight`·`part`, where None means zero."""
    if part is None:
        return total
    return weight * part if total is None else total + weight * part
