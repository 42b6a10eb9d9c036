"""A model that is moved from point to point must equal a model that is newly built there.

The loss at θ is defined as the loss of a newly built model, after ``load_state_dict(θ)`` and
``.eval()``. An analysis builds its model once, and then writes points into its tensors. The two
differ, with LC that still adds up, if a model merges weights on ``.eval()``, keeps a copy or a
view of a weight, caches values derived from one, or derives buffers in a load hook. So a few
samples are evaluated both ways at the first and at a later checkpoint; and along the first interval
the gradient is compared with a central difference of losses of newly built models:

    L(θ + hΔ) − L(θ − hΔ)  =  2h · g(θ)·Δ + O(h³),        θ a point of the interval

If rounding hides this difference, the path to the later checkpoint is used instead. Losses that
differ in float32 are compared with new models in float64, which tell how much of it is rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcray.allocation.gradient import layer_dots
from lcray.allocation.partial_sums import Site
from lcray.allocation.path import Point, Segment
from lcray.errors import TaskError
from lcray.execution.worker.newly_built import Losses, NewModels, as_losses
from lcray.execution.worker.workbench import Workbench
from lcray.tasks.data.split import SplitData
from lcray.tasks.task import Task

_SAMPLES = 32  # compared samples of each split, at most
_MORE = 64  # this many times more samples tell whether a layer gets any gradient
_HALF_STEPS = (2.0**-5, 2.0**-8, 2.0**-11)  # h, as a part of the interval
_PLACES = (0.5, 0.37)  # positions in the interval; one of them may be at a kink
# Bounds on differences of losses, relative to the largest loss: in float32, in float64, and without
# a control in float64; then a factor on the rounding that the control finds, and a cap on that
# rounding.
_FLOAT32, _FLOAT64, _UNCONTROLLED = 1e-5, 1e-9, 1e-4
_ROUNDING, _MOST_ROUNDING = 30.0, 3e-5
_SLOPE = 0.02  # how far the central difference may be off, relative to Σ|g·Δ| over layers


@dataclass(frozen=True)
class Unexplained:
    """Layers that the run moves, but whose part of the loss change LC does not show.

    Attributes:
        unreached: layers that require gradients, but get none from the loss.
        frozen: layers that require no gradients in the task's model.
    """

    unreached: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages about these layers, one line each."""
        notes = []
        if self.frozen:
            notes.append(
                f"{_named(self.frozen)} moved during training, but the task's model freezes it: "
                "it gets no LC, and its effect on the loss is in the gap; unfreeze it in model(), "
                "and compute its part without no_grad() and detach()"
            )
        if self.unreached:
            notes.append(
                f"{_named(self.unreached)} moves, but the loss gives it no gradient: its LC is 0; "
                "weight decay may move it, or the model or loss detaches it"
            )
        return tuple(notes)


def _named(layers: Sequence[str]) -> str:
    more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    return f"layer {layers[0]!r}{more}"


def check_model(
    bench: Workbench, task: Task, first: Point, second: Point | None, later: Point | None
) -> Unexplained:
    """Compare the model at points of a run with models that are newly built there.

    Afterwards the model is at one of the points.

    Args:
        bench: the task's model and data.
        task: the task.
        first: the first checkpoint.
        second: the checkpoint after it; None leaves the gradient unchecked.
        later: another checkpoint, with a finite loss if possible; None leaves it out.

    Raises:
        TaskError: if a comparison fails; it says which.
    """
    check = _Check(bench, task, bench.few(_SAMPLES))
    for point in (first, later):
        if point is not None:
            check.losses_at(point)
    ends = [point for point in (second, later) if point is not None]
    moves = [Segment(*map(bench.placed, (first, end))) for end in ends]
    moves = [path for path in moves if path.is_finite]
    for path in moves:
        if check.slope_along(path):
            break
    return check.unexplained(moves)


@dataclass(frozen=True)
class _Slope:
    """The slope of a split's loss along an interval: Δ·g, and by central difference.

    Attributes:
        expected: Δ·g.
        measured: the central difference.
        apart: whether they differ by more than rounding.
        tells: whether rounding is small enough for `apart` to be reliable.
    """

    expected: float
    measured: float
    apart: bool
    tells: bool

    @property
    def miss(self) -> float:
        return self.measured - self.expected


class _Check:
    """The comparisons, on samples spread over each whole split."""

    def __init__(self, bench: Workbench, task: Task, count: int) -> None:
        self._bench, self._engine, self._flat = bench, bench.engine, bench.flat
        self._count = count
        self._splits = [bench.sample(n, count) for n in range(len(bench.sources))]
        self._new = NewModels(bench, task, count)
        self._reached: set[int] = set()  # layers that have had a gradient
        self._rounding = [0.0] * len(self._splits)  # of a loss in float32, as far as measured
        self._compared: list[Point] = []  # where it may still be measured

    def losses_at(self, point: Point) -> None:
        """Compare the losses of the items at a checkpoint."""
        at = self._bench.placed(point)
        Site(Segment(at, at), 0.0).enter(self._flat)
        here = [self._items(split) for split in self._splits]
        self._flat.check_unwritten(at.vector)
        new, control = self._new.losses(point)
        self._compared.append(point)
        tight = _FLOAT64 if self._flat.theta.dtype == torch.float64 else _FLOAT32
        numbers = range(len(self._splits))
        if any(_apart(here[n], new[n], tight * _largest(new[n])) for n in numbers):
            for number, bound in enumerate(self._bounds(new, control())):
                if _apart(here[number], new[number], bound):
                    raise self._differs(point, number, here[number], new[number], bound)

    def _items(self, split: SplitData) -> Losses:
        ((losses, weights),) = self._engine.items(split)
        return as_losses(losses if weights is None else (losses, weights))

    def _bounds(self, new: list[Losses], control: list[Losses] | None) -> list[float]:
        """How far losses may lie apart, by split, given the rounding that a control finds."""
        scales = [_largest(found) for found in new]
        if self._flat.theta.dtype == torch.float64:
            return [_FLOAT64 * scale for scale in scales]
        bounds = [_UNCONTROLLED * scale for scale in scales]
        for number, (one, other) in enumerate(zip(new, control or (), strict=False)):
            if len(one[0]) == len(other[0]):
                rounding, scale = _largest((one[0] - other[0], one[1])), scales[number]
                self._rounding[number] = max(self._rounding[number], rounding)
                believed = min(rounding, _MOST_ROUNDING * scale)
                bounds[number] = _FLOAT32 * scale + _ROUNDING * believed
        return bounds

    def _measure_rounding(self) -> None:
        """Measure how far float32 losses are from float64 losses, at the compared points."""
        for point in self._compared:
            new, control = self._new.losses(point)
            self._bounds(new, control())
        self._compared = []

    def _differs(
        self, point: Point, number: int, here: Losses, new: Losses, bound: float
    ) -> TaskError:
        """The cause, as far as evaluating both once more can tell."""
        split = self._splits[number]
        where = f"at step {point.step}, on {split.n_samples} samples of split {split.name!r}"
        again = self._items(split)
        if _apart(again, here, bound):
            return TaskError(
                f"task loss on split {split.name!r}: {_mean(here)!r} at first, then "
                f"{_mean(again)!r} at the same weights; switch sampling, dropout by hand and "
                "augmentation off, and leave the batch as it is"
            )
        other = self._new.losses(point)[0][number]
        if _apart(other, new, bound):
            return TaskError(
                f"model: built twice, it has losses of {_mean(new):.7g} and {_mean(other):.7g} "
                f"{where}; model() must build the same every time: seed what is random, or "
                "register it as a buffer"
            )
        return TaskError(
            f"model: a loss of {_mean(here):.7g} when its weights are set in place, but "
            f"{_mean(new):.7g} when it is built anew, loaded and put into eval() ({where}; the "
            "largest difference of an item counts); compute in forward() what derives from "
            "weights: nothing may be merged, copied or cached"
        )

    def slope_along(self, path: Segment) -> bool:
        """Compare the gradient in the middle of an interval with central differences.

        Returns:
            Whether the comparison is reliable.

        Raises:
            TaskError: if the gradient differs from the slope there and at a second position.
        """
        problem = None
        for place in _PLACES:
            problem, tells = self._slope_at(path, place)
            if problem is None:
                return tells
        assert problem is not None
        raise problem

    def _slope_at(self, path: Segment, place: float) -> tuple[TaskError | None, bool]:
        """The error of the gradient at a position of the path, and whether the test is reliable.

        If the first difference does not agree, smaller ones follow: a kink of a ReLU may lie in it.
        If their error stays the same, a gradient is missing; otherwise the error is rounding.
        """
        Site(path, place).enter(self._flat)
        moving = path.moving_buffers(self._flat)
        missed: list[dict[str, float]] = []
        for half_step in _HALF_STEPS:
            small = self._around(path, moving, half_step)
            if not bool((small.difference() != 0).any()):
                return None, False
            slopes = self._slopes(small, half_step)
            missed.append({name: slope.miss for name, slope in slopes.items() if slope.apart})
            if not missed[-1]:
                return None, all(slope.tells for slope in slopes.values())
        for name in (name for name in missed[-1] if name in missed[-2]):
            one, other = missed[-2][name], missed[-1][name]
            if abs(one - other) <= min(abs(one), abs(other)) / 2:
                problem = TaskError(
                    f"model: between steps {path.start.step} and {path.end.step} its gradient "
                    f"says that the loss changes by {slopes[name].expected:.4g}, but losses of "
                    f"models built anew say {slopes[name].measured:.4g} (central difference, on "
                    f"some samples of split {name!r}); part of the loss has no gradient: look for "
                    "detach(), no_grad(), .data, rounding or a reentrant checkpoint in model and "
                    "loss"
                )
                return problem, True
        return None, False

    def _slopes(self, small: Segment, half_step: float) -> dict[str, _Slope]:
        out = self._engine.new_vector()
        befores, afters = self._new.most_exact((small.start, small.end))
        found = {}
        for number, split in enumerate(self._splits):
            before, after = befores[number], afters[number]
            self._evaluate(split, out)
            by_layer = layer_dots(self._flat, out, small).cpu()
            change, expected = _mean(after) - _mean(before), float(by_layer.sum())
            grain = _grain(before) * max(map(_largest, (before, after)))
            scale = _SLOPE * float(by_layer.abs().sum())
            miss = abs(change - expected)
            if miss > scale + grain + self._rounding[number]:
                self._measure_rounding()
            noise = grain + self._rounding[number]
            found[split.name] = _Slope(
                expected=expected / (2 * half_step),
                measured=change / (2 * half_step),
                apart=miss > scale + noise,  # never if one is not finite
                tells=noise <= scale,
            )
        return found

    def _around(self, path: Segment, moving: frozenset[int], half_step: float) -> Segment:
        """From θ − hΔ to θ + hΔ, where the model is at θ; only layers with gradients move."""
        middle = self._flat.theta
        ends = [middle.clone(), middle.clone()]
        for number, (layer, where) in enumerate(
            zip(self._flat.layers, self._flat.slices, strict=True)
        ):
            if layer.trainable or number in moving:
                step = half_step * path.difference(where)
                for end, sign in zip(ends, (-1.0, 1.0), strict=True):
                    end[where] = torch.add(middle[where].double(), step, alpha=sign)
        return Segment(*(replace(path.start, vector=end) for end in ends))

    def unexplained(self, paths: Sequence[Segment]) -> Unexplained:
        """The layers that move but are frozen, or get no gradient on many samples."""
        flat = self._flat
        moved = {
            number: layer
            for number, (layer, where) in enumerate(zip(flat.layers, flat.slices, strict=True))
            if layer.kind == "parameter"
            and any(bool((path.difference(where) != 0).any()) for path in paths)
        }
        trainable = {number for number, layer in moved.items() if layer.trainable}
        if trainable - self._reached:
            Site(paths[-1], 0.5).enter(flat)
            out = self._engine.new_vector()
            for number in range(len(self._splits)):
                self._evaluate(self._bench.sample(number, self._count, _MORE), out)
        return Unexplained(
            unreached=tuple(moved[number].name for number in sorted(trainable - self._reached)),
            frozen=tuple(layer.name for layer in moved.values() if not layer.trainable),
        )

    def _evaluate(self, split: SplitData, out: Tensor) -> None:
        self._engine.evaluate_sample(split, out)
        for number, where in enumerate(self._flat.slices):
            if number not in self._reached and bool((out[where] != 0).any()):
                self._reached.add(number)


def _weighted(found: Losses) -> Tensor:
    losses, weights = found
    return losses[weights > 0]


def _apart(a: Losses, b: Losses, bound: float) -> bool:
    """Whether the losses of an item differ by more than `bound`, or the items differ."""
    one, other = _weighted(a), _weighted(b)
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return True
    finite = one.isfinite()
    return bool(((one - other)[finite].abs() > bound).any())


def _grain(found: Losses) -> float:
    """The resolution of losses, relative to the largest; it is coarse if they came from float32."""
    losses = _weighted(found)
    return 1e-6 if torch.equal(losses, losses.float().double()) else 1e-12


def _largest(found: Losses) -> float:
    values = _weighted(found)
    values = values[values.isfinite()].abs()
    return float(values.max()) if len(values) else 0.0


def _mean(found: Losses) -> float:
    losses, weights = found
    counted = torch.where(weights > 0, losses, 0.0) * weights
    return float(counted.sum() / weights.sum())
