"""Loss change allocation of one split, interval by interval.

The loss and gradient at an endpoint are computed once and serve both intervals that meet there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lcray.allocation.gradient import GradientEngine
from lcray.allocation.interval import (
    NONFINITE_CHECKPOINT,
    OK,
    Accuracy,
    Interval,
    IntervalLC,
    Node,
    Scratch,
)
from lcray.allocation.partial_sums import Site
from lcray.allocation.path import Segment
from lcray.allocation.quadrature import QuadratureRule
from lcray.allocation.sums import Evaluation
from lcray.errors import TaskError, UsageError
from lcray.tasks.data.split import SplitData

__all__ = ["OK", "Accuracy", "IntervalLC", "Scratch", "SplitAllocator"]

_ROUNDING = 1e-9  # of Σ w: the difference allowed between machines

Following = Callable[[], Segment | None]


class SplitAllocator:
    """Allocates the loss changes of one split.

    A rule that may use its embedded rule alone (`probe_every`) uses all its nodes in the first
    interval of every block. In the next interval, the embedded rule is trusted if it was used alone
    in this one, or if both were computed here and their sums by layer agreed.

    Args:
        engine: evaluates gradients.
        split: the batches.
        rule: the quadrature rule.
        accuracy: the tolerance and the cap of the refinement.
        expected: items and Σ w that every evaluation must have; None takes them from the first.
        scratch: vectors to share with other splits; None makes new ones.

    Raises:
        UsageError: if a rule that cannot be refined is to be refined.
    """

    def __init__(
        self,
        engine: GradientEngine,
        split: SplitData,
        rule: QuadratureRule,
        accuracy: Accuracy,
        expected: tuple[int, float] | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        refines = accuracy.max_panels > 1
        if refines and not (rule.refinable and rule.panels == 1):
            raise UsageError(f"rule {rule.name!r}: cannot be refined; use simpson, or no --refine")
        self._rule, self._accuracy, self._adapts = rule, accuracy, refines or rule.probe_every > 0
        self._engine, self._flat, self._split = engine, engine.flat, split
        self._expected = expected
        self._marks: tuple[int, ...] | None = None  # hashes of the weights at the first point
        self._scratch = scratch or Scratch(engine)
        self._left: Node | None = None
        self._left_gradient = engine.flat.new_vector()
        self._trusted = False  # whether the embedded rule may stand alone
        self._seen = 0  # intervals

    def advance(self, segment: Segment, following: Following = lambda: None) -> IntervalLC:
        """LC over `segment`.

        Args:
            segment: the interval.
            following: gives the interval after it, if there is one. It is called as late as
                possible, so that the next checkpoint can be read meanwhile.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        probing = self._rule.probe_every > 0 and self._seen % self._rule.probe_every == 0
        trusted, self._trusted = self._trusted and not probing, False
        self._seen += 1
        if not segment.is_finite:
            # Report no loss: whether one end was evaluated before depends on where spans begin.
            self._left = None
            steps = segment.start.step, segment.end.step
            return IntervalLC(
                *steps, NONFINITE_CHECKPOINT, math.nan, math.nan, self._rule.shown_name
            )
        if self._left is None:
            self._left = self._endpoint(segment, 0.0, self._left_gradient, None)
        self._forget_unmoved_buffers(segment, self._left)
        interval = self._interval(segment, self._left, following)
        found = interval.adapted(trusted) if self._adapts else interval.fixed()
        if found.status == OK:
            self._trusted = interval.agrees or found.rule == self._rule.embedded_name
        self._left = interval.right
        # The gradients swap buffers; `found` stays valid until the next evaluation.
        self._left_gradient, self._scratch.right = self._scratch.right, self._left_gradient
        return found

    def _interval(self, segment: Segment, left: Node, following: Following) -> Interval:
        def at_end() -> Node:
            after = following()
            finite = after if after is not None and after.is_finite else None
            return self._endpoint(segment, 1.0, self._scratch.right, finite)

        def inside(s: float, factor: float) -> Tensor | None:
            dots = self._evaluate(segment, s, True, None, factor).group_dots
            return None if dots is None else dots[0]

        return Interval(
            self._rule,
            self._accuracy,
            self._engine,
            self._scratch,
            segment,
            left,
            at_end,
            inside,
        )

    def _forget_unmoved_buffers(self, segment: Segment, left: Node) -> None:
        """Drop gradients of buffers that moved only in the previous interval.

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

    def _endpoint(self, segment: Segment, s: float, out: Tensor, following: Segment | None) -> Node:
        """Loss at an end of the path, and its gradient if this or the next interval needs it."""
        rule = self._rule
        wanted = rule.has_left if s == 0.0 else rule.has_right
        wanted |= rule.has_left and following is not None
        found = self._evaluate(segment, s, wanted, following, None)
        if wanted:
            out.copy_(self._scratch.total)
        dots = found.group_dots
        incoming, outgoing = (None, None) if dots is None else (dots[0], dots[-1])
        gradient = out if wanted else None
        return Node(found.loss, gradient, incoming, outgoing, found.replicate_losses)

    def _evaluate(
        self,
        segment: Segment,
        s: float,
        gradient: bool,
        following: Segment | None,
        factor: float | None,
    ) -> Evaluation:
        """Loss at θ(s). The gradient goes into the shared total; `factor` times it if given."""
        site = Site(segment, s, following)
        directions = site.enter(self._flat)
        out = self._scratch.total if gradient else None
        share = None if factor is None or self._expected is None else factor / self._expected[1]
        found = self._engine.evaluate(self._split, out, directions, share=share, site=site)
        self._check_items(found, segment)
        return found

    def _check_items(self, found: Evaluation, segment: Segment) -> None:
        """Refuse items or weights that differ from earlier points.

        Within a worker, each weight must be the same, bit for bit. The plan only has their sum,
        which another machine may have rounded differently.
        """
        n_items, weight = self._expected = self._expected or (found.n_items, found.total_weight)
        where = f"task loss on split {self._split.name!r}"
        same = math.isclose(found.total_weight, weight, rel_tol=_ROUNDING)
        if found.n_items != n_items or not same:
            raise TaskError(
                f"{where}: {found.n_items} items of weight {found.total_weight:g} at step "
                f"{segment.start.step}, but {n_items} of {weight:g} before; number and weights "
                "must not change"
            )
        if self._marks is None:
            self._marks = found.weight_marks
        if found.weight_marks != self._marks:
            raise TaskError(
                f"{where}: weights of items change between steps {segment.start.step} and "
                f"{segment.end.step}; weights must come from the data alone, not from the model; "
                "multiply the losses by factors that depend on it"
            )
