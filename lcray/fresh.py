"""A model that is moved from point to point must be the model that would be built there.

The loss at θ is defined as that of a model newly built, after ``load_state_dict(θ)`` and
``.eval()``. An analysis builds its model once, and then writes points into its tensors. The two
differ, with LC that still adds up, where a model merges weights on ``.eval()``, keeps a copy or a
view of a weight, caches what it derives from one, or derives buffers in a load hook. So a few
samples are evaluated both ways at the first and at a later checkpoint; and along the first interval
the gradient is compared with a central difference of losses of models newly built:

    L(θ + hΔ) − L(θ − hΔ)  =  2h · g(θ)·Δ + O(h³),        θ the interval's midpoint

New models are on the CPU, one at a time. In float32 they are evaluated in float64 as well, which
tells how much of a difference is rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcray.checkpoints.naming import canonical_names
from lcray.data import SplitData
from lcray.errors import TaskError, brief
from lcray.flat import FlatModel
from lcray.gradient import layer_dots
from lcray.nested import map_tensors
from lcray.normalization import Normalization
from lcray.parts import Site
from lcray.path import Point, Segment
from lcray.precision import exact_float32
from lcray.task import Task, call_model
from lcray.workbench import Workbench

_SAMPLES = 32  # of each split that are compared, at most
_MORE = 64  # times as many, to tell whether a layer gets a gradient at all
# h, of the interval; in float32 small ones are lost in rounding.
_HALF_STEPS, _FLOAT32_HALF_STEPS = (2.0**-5, 2.0**-11, 2.0**-17), (2.0**-5, 2.0**-8)
# How far losses may lie apart: of the largest loss in float32 and in float64, and without a
# control in float64; and times what the control says is rounding, of which so much is believed.
_FLOAT32, _FLOAT64, _UNCONTROLLED = 1e-5, 1e-9, 1e-4
_ROUNDING, _MOST_ROUNDING = 30.0, 1e-3
_SLOPE = 0.02  # of Σ|g·Δ| over layers: how far the central difference may be from it

Losses = tuple[Tensor, Tensor]  # of the items of a batch, and their weights, [n] float64


@dataclass(frozen=True)
class Soundness:
    """Layers that the run moves and whose part of the loss change LC cannot tell.

    Attributes:
        unreached: that require gradients, and that the loss gives none.
        frozen: that require no gradients in the task's model.
    """

    unreached: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


def check_model(
    bench: Workbench, task: Task, first: Point, second: Point | None, later: Point | None
) -> Soundness:
    """Compare the model at points of a run with models that are newly built there.

    The model is at one of the points afterwards.

    Args:
        bench: the task's model and data.
        task: the task.
        first: the first checkpoint.
        second: the one after it; None leaves the gradient unchecked.
        later: another one, with a finite loss if there is one; None leaves it out.

    Raises:
        TaskError: saying which comparison failed.
    """
    check = _Check(bench, task, bench.few(_SAMPLES))
    for point in (first, later):
        if point is not None:
            check.losses_at(point)
    ends = [point for point in (second, later) if point is not None]
    moves = [Segment(*map(bench.placed, (first, end))) for end in ends]
    moves = [path for path in moves if path.is_finite]
    if moves:
        check.slope_along(moves[0])
    return check.soundness(moves)


class _Check:
    """The comparisons, on the first samples of every split."""

    def __init__(self, bench: Workbench, task: Task, count: int) -> None:
        self._bench, self._engine, self._flat = bench, bench.engine, bench.flat
        self._count = count
        self._splits = [bench.excerpt(n, count) for n in range(len(bench.sources))]
        self._new = _NewModels(bench, task, count)
        self._reached: set[int] = set()  # layers that have had a gradient

    def losses_at(self, point: Point) -> None:
        """Compare the losses of the items at a checkpoint."""
        at = self._bench.placed(point)
        Site(Segment(at, at), 0.0).enter(self._flat)
        here = [self._items(split) for split in self._splits]
        self._flat.check_unwritten(at.vector)
        new, control = self._new.losses(point)
        for number in range(len(self._splits)):
            bound = self._bound(new[number], None if control is None else control[number])
            if _apart(here[number], new[number], bound):
                raise self._differs(point, number, here[number], new[number], bound)

    def _items(self, split: SplitData) -> Losses:
        ((losses, weights),) = self._engine.items(split)
        return as_losses(losses if weights is None else (losses, weights))

    def _bound(self, new: Losses, control: Losses | None) -> float:
        scale = _largest(new)
        if self._flat.theta.dtype == torch.float64:
            return _FLOAT64 * scale
        if control is None or len(control[0]) != len(new[0]):
            return _UNCONTROLLED * scale
        rounding = _ROUNDING * _largest((new[0] - control[0], new[1]))
        return _FLOAT32 * scale + min(rounding, _MOST_ROUNDING * scale)

    def _differs(
        self, point: Point, number: int, here: Losses, new: Losses, bound: float
    ) -> TaskError:
        """Why, as far as evaluating both once more can tell."""
        split = self._splits[number]
        where = f"at step {point.step}, on {split.n_samples} samples of split {split.name!r}"
        again = self._items(split)
        if _apart(again, here, bound):
            return TaskError(
                f"task loss on split {split.name!r}: {_mean(here)!r} at first, then "
                f"{_mean(again)!r} at the same weights; switch sampling, dropout by hand and "
                "augmentation off"
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

    def slope_along(self, path: Segment) -> None:
        """Compare the gradient at the middle of an interval with central differences.

        Smaller ones where the first does not agree: it may have had a kink of a ReLU in it.
        """
        Site(path, 0.5).enter(self._flat)
        moving = path.moving_buffers(self._flat)
        problem = None
        for half_step in _HALF_STEPS if self._new.exact else _FLOAT32_HALF_STEPS:
            small = self._around(path, moving, half_step)
            if not bool((small.difference() != 0).any()):
                return
            problem = self._slope_differs(path, small)
            if problem is None:
                return
        if problem is not None:
            raise problem

    def _slope_differs(self, path: Segment, small: Segment) -> TaskError | None:
        """What is wrong if Σ g·Δ is not the difference of the losses at the ends of `small`."""
        exact, out = self._new.exact, self._engine.new_vector()
        ends = [self._new.most_exact(end) for end in (small.start, small.end)]
        for number, split in enumerate(self._splits):
            self._evaluate(split, out)
            by_layer = layer_dots(self._flat, out, small).cpu()
            before, after = (losses[number] for losses in ends)
            change, slope = _mean(after) - _mean(before), float(by_layer.sum())
            bound = _SLOPE * float(by_layer.abs().sum())
            bound += (1e-12 if exact else 1e-6) * max(_largest(before), _largest(after))
            if abs(change - slope) > bound:  # never so where either is not finite
                return TaskError(
                    f"model: between steps {path.start.step} and {path.end.step} its gradient "
                    f"says that the loss changes by {slope:.4g}, but losses of models built anew "
                    f"differ by {change:.4g} (central difference, on {split.n_samples} samples of "
                    f"split {split.name!r}); part of the loss has no gradient: look for detach(), "
                    "no_grad(), .data or rounding in model and loss"
                )
        return None

    def _around(self, path: Segment, moving: frozenset[int], half_step: float) -> Segment:
        """From θ − hΔ to θ + hΔ, θ being where the model is; only what gets gradients moves."""
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

    def soundness(self, paths: Sequence[Segment]) -> Soundness:
        """The layers that move and are frozen, or get no gradient on many samples."""
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
                self._evaluate(self._bench.excerpt(number, self._count, _MORE), out)
        return Soundness(
            unreached=tuple(moved[number].name for number in sorted(trainable - self._reached)),
            frozen=tuple(layer.name for layer in moved.values() if not layer.trainable),
        )

    def _evaluate(self, split: SplitData, out: Tensor) -> None:
        self._engine.evaluate_sample(split, out)
        for number, where in enumerate(self._flat.slices):
            if number not in self._reached and bool((out[where] != 0).any()):
                self._reached.add(number)


class _NewModels:
    """Losses of models that are built for one point each."""

    def __init__(self, bench: Workbench, task: Task, count: int) -> None:
        self._flat, self._task = bench.flat, task
        self.exact = True  # whether the task works in float64, as far as is known
        mode, fixed = bench.settings.batch_norm, bench.fixed_batches
        # Else torch's own kernels: the formula that stands in for them is checked as well.
        self._normalization: Callable[[], Any] = (
            partial(Normalization, mode, fixed_batches=True) if fixed else nullcontext
        )
        self._dtype = self._flat.theta.dtype
        self._batches = {
            dtype: [
                list(source.excerpt(count, 1, place=partial(_placed, dtype)).batches)
                for source in bench.sources
            ]
            for dtype in dict.fromkeys((self._dtype, torch.float64))
        }

    def losses(self, point: Point) -> tuple[list[Losses], list[Losses] | None]:
        """Losses at `point`, by split; and in float64, where the task works in that.

        Raises:
            TaskError: if the model cannot be built or loaded, or its loss fails.
        """
        model = self._built(point)
        _convert(model, self._dtype)
        try:
            new = self._evaluate(model, self._dtype)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(
                f"model: built anew and loaded at step {point.step}, its loss failed: "
                f"{brief(error)}"
            ) from error
        if self._dtype == torch.float64:
            return new, new
        try:
            _convert(model, torch.float64)
            return new, self._evaluate(model, torch.float64)
        except Exception:  # a table in float32, say: then there is no control
            self.exact = False
            return new, None

    def most_exact(self, point: Point) -> list[Losses]:
        """Losses at `point`, by split: in float64, where the task works in that.

        Raises:
            TaskError: if the model cannot be built or loaded.
        """
        dtype = torch.float64 if self.exact else self._dtype
        model = self._built(point)
        _convert(model, dtype)
        return self._evaluate(model, dtype)

    def _built(self, point: Point) -> nn.Module:
        model = call_model(self._task)
        exact_float32()  # building it may have undone that
        names = canonical_names(model.state_dict())
        state = _state(self._flat, point)
        values = {key: state[name] for key, name in names.items() if name in state}
        stored = model.state_dict()
        if any(_loses(value, stored[key]) for key, value in values.items()):
            _convert(model, self._dtype)
        try:
            model.load_state_dict(values, strict=False)
            return model.eval()
        except Exception as error:
            raise TaskError(
                f"model: load_state_dict() or eval() failed at step {point.step}: {brief(error)}"
            ) from error

    def _evaluate(self, model: nn.Module, dtype: torch.dtype) -> list[Losses]:
        with self._normalization(), torch.enable_grad():
            found = [
                [self._task.loss(model, map_tensors(torch.clone, batch)) for batch in batches]
                for batches in self._batches[dtype]
            ]
        return [as_losses(*results) for results in found]


def as_losses(result: Any) -> Losses:
    """What a task's loss gave: the losses of the items and their weights, float64 on the CPU."""
    losses, weights = result if isinstance(result, tuple) else (result, None)
    exact = losses.detach().double().cpu()
    return exact, torch.ones_like(exact) if weights is None else weights.detach().double().cpu()


def _placed(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _loses(value: Tensor, own: Any) -> bool:
    """Whether the model's own tensor is too narrow for a value."""
    if not isinstance(own, Tensor) or not own.is_floating_point() or own.dtype == value.dtype:
        return False
    return not torch.equal(value.to(own.dtype).to(value.dtype), value)


def _state(flat: FlatModel, point: Point) -> Mapping[str, Tensor]:
    """The tensors of a point by canonical name, aliases included; on the CPU."""
    vector = point.vector.cpu()
    state = dict(point.constants)
    for number, layer in enumerate(flat.layers):
        part = flat.layout.shaped(vector, number)
        state |= dict.fromkeys((layer.name, *layer.aliases), part)
    return state


def _weighted(found: Losses) -> Tensor:
    losses, weights = found
    return losses[weights > 0]


def _apart(a: Losses, b: Losses, bound: float) -> bool:
    """Whether the losses of some item differ by more than `bound`, or the items themselves."""
    one, other = _weighted(a), _weighted(b)
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return True
    finite = one.isfinite()
    return bool(((one - other)[finite].abs() > bound).any())


def _largest(found: Losses) -> float:
    values = _weighted(found)
    values = values[values.isfinite()].abs()
    return float(values.max()) if len(values) else 0.0


def _mean(found: Losses) -> float:
    losses, weights = found
    counted = torch.where(weights > 0, losses, 0.0) * weights
    return float(counted.sum() / weights.sum())
