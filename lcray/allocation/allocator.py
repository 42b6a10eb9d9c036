"""Loss change allocation of one split, interval by interval.

The loss and gradient at an endpoint are computed once and serve both intervals that meet there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

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
from lcray.allocation.sampled import BatchSample, Sampler, Sampling, merged
from lcray.allocation.sums import Evaluation, Tap
from lcray.errors import TaskError, UsageError
from lcray.tasks.data.split import SplitData

__all__ = ["OK", "Accuracy", "IntervalLC", "Sampling", "Scratch", "SplitAllocator"]

_ROUNDING = 1e-9  # of Σ w: the difference allowed between machines

Following = Callable[[], Segment | None]
Taps = Mapping[int, Sequence[Tap]]


class SplitAllocator:
    """Allocates the loss changes of one split.

    A rule that takes samples of the batches takes all of them in the first interval of every block
    (`QuadratureRule.block`), and where no interval of the block has shown yet how they differ.

    Args:
        engine: evaluates gradients.
        split: the batches.
        rule: the quadrature rule.
        accuracy: the tolerance and the cap of the refinement.
        expected: items and Σ w that every evaluation must have; None takes them from the first.
        scratch: vectors to share with other splits; None makes new ones.
        sampling: what decides the samples of batches, for a rule that takes them.

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
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ) -> None:
        self._refines = accuracy.max_panels > 1
        if self._refines and not (rule.refinable and rule.panels == 1):
            raise UsageError(f"rule {rule.name!r}: cannot be refined; use simpson, or no --refine")
        self._rule, self._accuracy = rule, accuracy
        self._engine, self._flat, self._split = engine, engine.flat, split
        self._expected = expected
        self._marks: tuple[int, ...] | None = None  # hashes of the weights at the first point
        self._scratch = scratch or Scratch(engine)
        self._left: Node | None = None
        self._left_gradient = engine.flat.new_vector()
        self._group_weights: tuple[float, ...] = ()
        self._sampler = Sampler(engine.flat, split, sampling) if rule.block else None
        self._next: BatchSample | None = None  # of the next interval, with what its start gave
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
        begins = self._begins_block
        self._seen += 1
        if begins and self._sampler is not None:
            self._sampler.forget()
        if not segment.is_finite:
            # Report no loss: whether one end was evaluated before depends on where spans begin.
            self._left = self._next = None
            steps = segment.start.step, segment.end.step
            return IntervalLC(*steps, NONFINITE_CHECKPOINT, math.nan, math.nan, self._rule.name)
        sample, cost = self._sample(segment, begins)
        if self._left is None:
            taps = {} if sample is None else merged(sample.taps(0.0))
            self._left = self._endpoint(segment, 0.0, self._left_gradient, None, taps)
        self._forget_unmoved_buffers(segment, self._left)
        interval = self._interval(segment, self._left, following, sample)
        if sample is None:
            found = interval.refined() if self._refines else interval.fixed()
        else:
            found = self._sampled(interval, sample, cost)
        self._left = interval.right
        # The gradients swap buffers; `found` stays valid until the next evaluation.
        self._left_gradient, self._scratch.right = self._scratch.right, self._left_gradient
        return found

    @property
    def _begins_block(self) -> bool:
        return self._rule.block > 0 and self._seen % self._rule.block == 0

    def _sample(self, segment: Segment, begins: bool) -> tuple[BatchSample | None, float]:
        """The sample of batches for `segment`, and what it has cost, in full-batch gradients.

        It has been evaluated at the start, unless an evaluation of the whole split there is due.
        """
        sample, self._next = self._next, None
        if sample is not None or self._sampler is None:
            return sample, 0.0
        late = self._left is not None
        sample = self._sampler.draw(segment, whole=begins or not self._sampler.knows, late=late)
        if not late or not sample.numbers:
            return sample, 0.0
        self._evaluate_sample(sample, segment, 0.0)  # its size was not known at that end before
        return sample, sample.share

    def _evaluate_sample(self, sample: BatchSample, segment: Segment, s: float) -> None:
        Site(segment, s).enter(self._flat)
        self._engine.sum_part(self._split, sample.numbers, None, (), 1.0, merged(sample.taps(s)))

    def _sampled(self, interval: Interval, sample: BatchSample, cost: float) -> IntervalLC:
        """LC by the sample, with its standard error."""
        assert self._sampler is not None and self._expected is not None
        sample.normalize(self._expected[1], self._group_weights)
        found = interval.fixed() if sample.whole else interval.corrected(sample)
        if found.layer_lc is None:
            return found
        layer_se, lc_se = self._sampler.learn(sample, found.layer_lc)
        return replace(
            found,
            converged=None,
            sampled_gradients=cost if sample.whole else cost + sample.share,
            layer_se=layer_se,
            lc_se=lc_se,
        )

    def _interval(
        self, segment: Segment, left: Node, following: Following, sample: BatchSample | None
    ) -> Interval:
        def at_end() -> Node:
            after = following()
            finite = after if after is not None and after.is_finite else None
            taps = {} if sample is None else self._taps(sample, finite)
            return self._endpoint(segment, 1.0, self._scratch.right, finite, taps)

        def inside(s: float, factor: float) -> Tensor | None:
            if sample is not None and not sample.whole:
                self._evaluate_sample(sample, segment, s)
                return None
            taps = {} if sample is None else merged(sample.taps(s))
            dots = self._evaluate(segment, s, True, None, factor, taps).group_dots
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

    def _taps(self, sample: BatchSample, after: Segment | None) -> dict[int, tuple[Tap, ...]]:
        """The taps at the end of an interval: of its sample, and of the next one if it is known."""
        assert self._sampler is not None
        if after is not None and (self._begins_block or self._sampler.knows):
            self._next = self._sampler.draw(after, whole=self._begins_block)
        following = {} if self._next is None else self._next.taps(0.0)
        return merged(sample.taps(1.0), following)

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

    def _endpoint(
        self,
        segment: Segment,
        s: float,
        out: Tensor,
        following: Segment | None,
        taps: Taps,
    ) -> Node:
        """Loss at an end of the path, and its gradient if this or the next interval needs it."""
        rule = self._rule
        wanted = rule.has_left if s == 0.0 else rule.has_right
        wanted |= rule.has_left and following is not None
        found = self._evaluate(segment, s, wanted, following, None, taps)
        self._group_weights = found.group_weights
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
        taps: Taps,
    ) -> Evaluation:
        """Loss at θ(s). The gradient goes into the shared total; `factor` times it if given."""
        site = Site(segment, s, following)
        directions = site.enter(self._flat)
        out = self._scratch.total if gradient else None
        share = None if factor is None or self._expected is None else factor / self._expected[1]
        found = self._engine.evaluate(
            self._split, out, directions, share=share, site=site, taps=taps
        )
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
