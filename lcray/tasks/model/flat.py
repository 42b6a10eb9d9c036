"""A model whose float tensors live in one flat vector, and whose gradients come layer by layer.

Legend: P the number of elements of all layers, parameters and float buffers alike.

The gradient is never stored as a whole: a backward pass passes each layer's gradient to a receiver
as soon as it is complete, and then drops it. So only one layer's gradient is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lcray.checkpoints.bits import same_bits
from lcray.errors import CheckpointError, TaskError, brief
from lcray.tasks.layer import Layer
from lcray.tasks.model.derivatives import use_derivatives
from lcray.tasks.model.layers import describe_layers, extra_owners
from lcray.tasks.model.layout import BLOCK, Layout
from lcray.tasks.model.vectors import zeros

#: Takes the number of a layer and its gradient [n], in memory order; it must not keep the gradient.
Receiver = Callable[[int, Tensor], None]


class FlatModel:
    """A model on flat storage: a point is set by one copy, gradients come layer by layer.

    Attributes:
        model: the model, in evaluation mode.
        layers: its layers; layer l occupies ``slices[l]`` of every flat vector.
        layout: the order of the elements in memory.
        theta: the current point, [P], in the compute dtype; the model's tensors are views of it.
        receiver: receives the gradients of backward passes; None while no pass is allowed.

    Args:
        model: the model; its tensors are replaced.
        device: where it computes.
        dtype: of the forward and backward pass.
        partial: whether checkpoints may lack tensors; these then keep the values of `model`.

    Raises:
        TaskError: if no parameter requires a gradient, or a layer cannot be used.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, *, partial: bool = False
    ) -> None:
        describe_layers(model)  # refuses tensors that the conversion would hide
        use_derivatives(model)
        # One by one: Module.to copies a shared buffer per name, and makes complex tensors real.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.to(device=device, dtype=_compute_dtype(tensor, dtype))
        self.model = _in_evaluation_mode(model)
        self.layers, self._tensors = describe_layers(self.model)
        if not any(layer.trainable for layer in self.layers):
            raise TaskError("model: no parameter requires a gradient, so there is nothing to learn")
        self.layout = Layout(self.layers)
        self.theta = zeros(self.layout.size, dtype, device)
        self.receiver: Receiver | None = None
        self._hooked: set[int] = set()
        self._written: dict[int, int] = {}
        for number in range(len(self.layers)):
            self._tie(number)
        self.base = self.theta.cpu().clone() if partial else None
        names = {name for layer in self.layers for name in (layer.name, *layer.aliases)}
        self._constants = {k: v for k, v in self._tensors.items() if k not in names}
        self._extra = {k: m for k, m in extra_owners(self.model).items() if k in self._constants}
        self._initial = {name: value.cpu().clone() for name, value in self._constants.items()}
        places = _places(self.model)
        self._places = {k: places.get(id(v), []) for k, v in self._tensors.items()}
        self.set_constants(self._initial)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The place of each layer in every flat vector."""
        return self.layout.slices

    def trained(self) -> dict[int, Tensor]:
        """The tensors of the parameters that require gradients, by the number of their layer."""
        return {n: self._tensors[la.name] for n, la in enumerate(self.layers) if la.trainable}

    @property
    def block(self) -> int:
        """Number of elements per block that suits the device."""
        return BLOCK if self.theta.device.type == "cpu" else BLOCK << 6

    def blocks(self) -> Iterator[slice]:
        """Slices that cover a flat vector."""
        return self.layout.blocks(self.block)

    def set_memory_format(self, memory_format: str) -> None:
        """Change the order of the elements, also of the current point.

        Args:
            memory_format: ``contiguous`` or ``channels_last``.
        """
        old, self.layout = self.layout, Layout(self.layers, memory_format)
        vectors = [self.theta] if self.base is None else [self.theta, self.base]
        for vector in vectors:
            before = vector.clone()
            for number in range(len(self.layers)):
                self.layout.shaped(vector, number).copy_(old.shaped(before, number))
        for number in range(len(self.layers)):
            self._view(number)

    def _tie(self, number: int) -> None:
        values = self._tensors[self.layers[number].name].detach()
        self.layout.shaped(self.theta, number).copy_(values)
        self._view(number)

    def _view(self, number: int) -> None:
        layer = self.layers[number]
        tensor = self._tensors[layer.name]
        tensor.grad = None
        if layer.kind == "buffer":
            tensor.requires_grad_(False)  # until it moves again
        tensor.data = self.layout.shaped(self.theta, number)
        self._written[number] = tensor._version
        if layer.trainable:
            self._hook(number, tensor)

    def _hook(self, number: int, tensor: Tensor) -> None:
        if number not in self._hooked:
            tensor.register_post_accumulate_grad_hook(partial(_arrived, ref(self), number))
            self._hooked.add(number)

    def hand_on(self, number: int, tensor: Tensor) -> None:
        """Pass the gradient of a layer's tensor to the receiver, and drop it.

        Raises:
            TaskError: if there is no receiver.
        """
        where = self.slices[number].start * self.theta.element_size()
        if tensor.data_ptr() != self.theta.data_ptr() + where:
            return  # the model belongs to another FlatModel by now
        gradient, tensor.grad = tensor.grad, None
        if self.receiver is None:
            raise TaskError(
                f"model layer {self.layers[number].name!r}: the loss ran a backward pass that "
                "reaches it; the loss must only compute losses"
            )
        assert gradient is not None
        if gradient.layout != torch.strided:  # of a sparse embedding
            gradient = gradient.to_dense()
        self.receiver(number, self.layout.in_order(gradient, number))

    def differentiate_buffers(self, moving: frozenset[int]) -> None:
        """Let gradients reach the float buffers that move along the path, and no others.

        Args:
            moving: indices of layers.
        """
        for number, layer in enumerate(self.layers):
            if layer.kind == "buffer":
                buffer = self._tensors[layer.name].requires_grad_(number in moving)
                if number in moving:
                    self._hook(number, buffer)

    def forget_gradients(self) -> None:
        """Drop gradients that a failed backward pass may have left with the tensors."""
        for layer in self.layers:
            self._tensors[layer.name].grad = None

    def new_vector(self) -> Tensor:
        """A vector of zeros, [P] in the compute dtype on the device."""
        return zeros(len(self.theta), self.theta.dtype, self.theta.device)

    def new_point(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Memory for a checkpoint: a vector [P] on the CPU, and each layer's part, by name."""
        vector = zeros(len(self.theta), self.theta.dtype)
        if self.theta.device.type == "cuda":
            vector = vector.pin_memory()
        if self.base is not None:
            vector.copy_(self.base)
        parts = {
            layer.name: self.layout.shaped(vector, number)
            for number, layer in enumerate(self.layers)
        }
        return vector, parts

    def flatten(
        self,
        tensors: Mapping[str, Tensor],
        step: int,
        vector: Tensor | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A checkpoint as one vector, and the integer tensors that go with it.

        Args:
            tensors: the stored tensors by canonical name.
            step: of the checkpoint, for messages.
            vector: from `new_point`; tensors that are parts of it are in place already.
            dtypes: the stored dtype of each tensor, if it differs from the tensor's own.

        Returns:
            The point [P] in the compute dtype, on the CPU, and the tensors that do not move.

        Raises:
            CheckpointError: for a tensor that is missing, unknown, or of the wrong shape or kind.
        """
        known = set(self._tensors)
        unknown = [name for name in tensors if name not in known]
        if unknown:
            raise CheckpointError(
                f"checkpoint at step {step}: tensor {unknown[0]!r} is not in the task's model "
                f"({len(unknown)} such); does the task build the model of this run?"
            )
        if vector is None:
            vector, _ = self.new_point()
        for number, layer in enumerate(self.layers):
            stored = _stored(layer, tensors, dtypes or {}, step)
            if stored is not None:
                part = self.layout.shaped(vector, number)
                if stored.data_ptr() != part.data_ptr():
                    part.copy_(stored)
            elif self.base is None:
                raise _missing(layer.name, step)
        constants = {name: tensors[name] for name in self._constants if name in tensors}
        missing = self._extra.keys() - constants.keys()
        if missing and self.base is None:
            raise _missing(min(missing), step)
        for name, value in constants.items():
            if name in self._extra:
                continue  # its module knows which shapes are valid
            _check_shape(name, value, tuple(self._constants[name].shape), step)
        return vector, {**self._initial, **constants}  # all, to replace those of an earlier point

    def set_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Set the tensors that do not move, such as counters, to a checkpoint's values."""
        self._values = constants
        with torch.no_grad():
            for name, value in constants.items():
                if name in self._extra:
                    self._set_extra(name, value)
                else:
                    self._constants[name].copy_(value)
        self._versions = {name: tensor._version for name, tensor in self._constants.items()}

    def _set_extra(self, name: str, value: Tensor) -> None:
        try:  # a copy, since the module may keep and change it
            self._extra[name].set_extra_state(value.to(self._constants[name].device, copy=True))
        except Exception as error:
            raise TaskError(f"model {name!r}: cannot be set ({brief(error)})") from error

    def restore_constants(self) -> None:
        """Undo what a forward pass has written into tensors that do not move, such as counters.

        So these tensors have the checkpoint's values for every batch.
        """
        for name, tensor in self._constants.items():
            if name in self._extra:
                self._set_extra(name, self._values[name])
                continue
            for held, key in self._places[name]:
                if held.get(key) is not tensor:
                    held[key] = tensor
            if tensor._version != self._versions[name]:
                with torch.no_grad():
                    tensor.copy_(self._values.get(name, self._initial[name]))
                self._versions[name] = tensor._version

    def check_tied(self) -> None:
        """Check that the model's tensors are still views of the flat vector.

        Raises:
            TaskError: if the loss has replaced a tensor, so that it would no longer follow the
                path, has written into one, or has frozen or unfrozen a parameter.
        """
        start, size = self.theta.data_ptr(), self.theta.element_size()
        for number, (layer, where) in enumerate(zip(self.layers, self.slices, strict=True)):
            tensor = self._tensors[layer.name]
            moved = layer.numel > 0 and tensor.data_ptr() != start + size * where.start
            if moved or any(held.get(key) is not tensor for held, key in self._places[layer.name]):
                raise TaskError(
                    f"model layer {layer.name!r}: was replaced while the loss was computed; in "
                    "evaluation mode a forward pass must not assign parameters or buffers"
                )
            if tensor._version != self._written[number]:
                raise _written(layer)
            if layer.kind == "parameter" and tensor.requires_grad is not layer.trainable:
                raise TaskError(
                    f"model layer {layer.name!r}: its requires_grad was changed while the loss was "
                    "computed; set it in model()"
                )

    def check_unwritten(self, vector: Tensor) -> None:
        """Check that the model is still at the point that was set, bit for bit.

        Args:
            vector: the point, [P] in the compute dtype.

        Raises:
            TaskError: if a forward pass has written into a parameter or a float buffer.
        """
        for layer, where in zip(self.layers, self.slices, strict=True):
            for first in range(where.start, where.stop, self.block):
                part = slice(first, min(first + self.block, where.stop))
                if not same_bits(self.theta[part], vector[part].to(self.theta.device)):
                    raise _written(layer)


def _written(layer: Layer) -> TaskError:
    return TaskError(
        f"model layer {layer.name!r}: was written to while the loss was computed; neither the loss "
        "nor a forward pass in evaluation mode may change parameters or float buffers (max_norm "
        "and observers of quantization do)"
    )


def _in_evaluation_mode(model: nn.Module) -> nn.Module:
    try:
        model.eval()
    except Exception as error:  # a module from torch.export
        raise TaskError(f"model: cannot be set to evaluation mode: {brief(error)}") from error
    return model


def _missing(name: str, step: int) -> CheckpointError:
    return CheckpointError(
        f"checkpoint at step {step}: tensor {name!r} of the task's model is missing; pass "
        "partial=True (--partial) if model() holds its fixed value"
    )


def _arrived(owner: ref[FlatModel], number: int, tensor: Tensor) -> None:
    # A weak reference: the model may live longer and must not keep vectors of its size.
    flat = owner()
    if flat is not None:
        flat.hand_on(number, tensor)


def _compute_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if tensor.is_complex():
        return torch.promote_types(dtype, torch.complex32)
    return dtype if tensor.is_floating_point() else tensor.dtype


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Where modules keep a tensor, by its id: the module's dictionary and the key in it."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                places.setdefault(id(tensor), []).append((held, key))
    return places


def _stored(
    layer: Layer, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], step: int
) -> Tensor | None:
    """The stored tensor of a layer, under any of its names; None if there is none."""
    names = [name for name in (layer.name, *layer.aliases) if name in tensors]
    for name in names:
        stored, where = tensors[name], f"checkpoint at step {step}: tensor {name!r}"
        _check_shape(name, stored, layer.shape, step)
        dtype = dtypes.get(name, stored.dtype)
        if not dtype.is_floating_point:
            raise CheckpointError(f"{where} is stored as {dtype}, but the model's is a float")
        if name != names[0] and not _same_values(stored.to(tensors[names[0]]), tensors[names[0]]):
            raise CheckpointError(
                f"{where} differs from {names[0]!r}, which the task's model ties to it; does the "
                "task build the model of this run?"
            )
    return tensors[names[0]] if names else None


def _same_values(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _check_shape(name: str, stored: Tensor, shape: tuple[int, ...], step: int) -> None:
    if tuple(stored.shape) != shape:
        raise CheckpointError(
            f"checkpoint at step {step}: tensor {name!r} has shape {list(stored.shape)}, but "
            f"{list(shape)} in the task's model; does the task build the model of this run?"
        )
