"""Models that are built for one point each, and the losses of their items: the reference there.

They are on the CPU, one at a time, or on the device of the analysis if they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcray.allocation.path import Point
from lcray.checkpoints.naming import canonical_names
from lcray.errors import TaskError, brief
from lcray.execution.worker.workbench import CHECK_SEED, Workbench
from lcray.tasks.data.pytree import map_tensors
from lcray.tasks.model.batch_norm import Normalization
from lcray.tasks.model.flat import FlatModel
from lcray.tasks.model.precision import exact_float32
from lcray.tasks.task import Task, call_model

Losses = tuple[Tensor, Tensor]  # of the items of a batch, and their weights, [n] float64
Control = Callable[[], list[Losses] | None]  # the losses of a model once more, in float64


class NewModels:
    """Losses of models that are built for one point each.

    Args:
        bench: the task's model and data.
        task: the task.
        count: the most samples per split.
    """

    def __init__(self, bench: Workbench, task: Task, count: int) -> None:
        self._flat, self._task = bench.flat, task
        self._exact = True  # whether the task works in float64, as far as is known
        self._device = torch.device("cpu")
        mode, fixed = bench.settings.batch_norm, bench.fixed_batches
        # Otherwise torch's own kernels, so that lcray's formula for them is checked as well.
        self._normalization: Callable[[], Any] = (
            partial(Normalization, mode, fixed_batches=True) if fixed else nullcontext
        )
        self._dtype = self._flat.theta.dtype
        self._batches = {
            dtype: [
                list(source.pick(count, CHECK_SEED, count, place=partial(_placed, dtype)).batches)
                for source in bench.sources
            ]
            for dtype in dict.fromkeys((self._dtype, torch.float64))
        }

    def losses(self, point: Point) -> tuple[list[Losses], Control]:
        """Losses at `point`, by split; and a function for the same model's losses in float64.

        Raises:
            TaskError: if the model cannot be built or loaded, or its loss fails.
        """
        model = self._built(point)
        new = self._losses(model, self._dtype, point)
        return new, partial(self._control, model, point, new)

    def _control(self, model: nn.Module, point: Point, new: list[Losses]) -> list[Losses] | None:
        """The losses of a model in float64; None if the task does not work in float64."""
        if self._dtype == torch.float64:
            return new
        try:
            return self._losses(model, torch.float64, point)
        except TaskError:  # a table in float32, say
            self._exact = False
            return None

    def most_exact(self, points: Sequence[Point]) -> list[list[Losses]]:
        """Losses at each of `points`, by split: in float64, if the task works in it.

        Raises:
            TaskError: if the model cannot be built or loaded, or its loss fails.
        """
        if self._exact and self._dtype != torch.float64:
            try:
                return [self._losses(self._built(p), torch.float64, p) for p in points]
            except TaskError:
                self._exact = False
        return [self._losses(self._built(point), self._dtype, point) for point in points]

    def _built(self, point: Point) -> nn.Module:
        model = call_model(self._task)
        exact_float32()  # building it may have undone that
        self._check_unshared(model)
        state = _state(self._flat, point)
        try:
            stored = model.state_dict()
            names = canonical_names(stored)
            values = {key: state[name] for key, name in names.items() if name in state}
            narrow = any(_loses(value, stored[key]) for key, value in values.items())
            _convert(model, self._device, self._dtype if narrow else None)
            # A module's own load_state_dict may not know the word.
            options = {} if values.keys() == stored.keys() else {"strict": False}
            model.load_state_dict(values, **options)
            model.eval()
        except Exception as error:
            raise TaskError(
                f"model: load_state_dict() or eval() failed at step {point.step}: {brief(error)}"
            ) from error
        return model

    def _check_unshared(self, model: nn.Module) -> None:
        """Refuse a model that shares tensors with the moved model: loading would change both."""
        own = self._flat.theta.untyped_storage().data_ptr()
        for name, tensor in model.named_parameters():
            if tensor.untyped_storage().data_ptr() == own:
                raise TaskError(
                    f"model layer {name!r}: is the same tensor each time that model() is called; "
                    "it must build its layers anew: copy.deepcopy modules from elsewhere"
                )

    def _losses(self, model: nn.Module, dtype: torch.dtype, point: Point) -> list[Losses]:
        try:
            _convert(model, self._device, dtype)
            return self._evaluate(model, dtype)
        except TaskError:
            raise
        except Exception as error:
            if self._device != self._flat.theta.device:  # the task works on a GPU only
                self._device = self._flat.theta.device
                return self._losses(model, dtype, point)
            raise TaskError(
                f"model: built anew and loaded at step {point.step}, its loss failed: "
                f"{brief(error)}"
            ) from error

    def _evaluate(self, model: nn.Module, dtype: torch.dtype) -> list[Losses]:
        def copied(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, copy=True)

        with self._normalization(), torch.enable_grad():
            found = [
                [self._task.loss(model, map_tensors(copied, batch)) for batch in batches]
                for batches in self._batches[dtype]
            ]
        return [as_losses(*results) for results in found]


def as_losses(result: Any) -> Losses:
    """The result of a task's loss: losses of the items and weights, float64 on the CPU."""
    losses, weights = result if isinstance(result, tuple) else (result, None)
    exact = losses.detach().double().cpu()
    return exact, torch.ones_like(exact) if weights is None else weights.detach().double().cpu()


def _placed(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()


def _convert(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a model, and its floats to `dtype`; without a change, views of a tensor stay views."""
    for tensor in (*model.parameters(), *model.buffers()):
        floating = dtype is not None and tensor.is_floating_point()
        tensor.data = tensor.data.to(device=device, dtype=dtype if floating else None)


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
