"""The layers of a model: its named tensors, each described once, in the model's order.

A *layer* is one named tensor (``conv1.weight``), its *module* the owner, a *unit* the elements of
one output: a slice along the output axis. Where a transposed convolution has groups, its weight
[in, out/groups, …] has outputs of every group along one axis: unit group·(out/groups) + j is slice
j of the rows of that group's inputs. Tied parameters are one layer, under the first name that the
model gives them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcray.checkpoints.naming import canonical_names
from lcray.checkpoints.snapshot import EXTRA, NO_SETTER, extra_states, has_setter
from lcray.errors import TaskError
from lcray.storage.json_types import build


@dataclass(frozen=True)
class Layer:
    """One named tensor of a model.

    Attributes:
        name: its canonical name, without the prefixes that wrappers add.
        module: the name of the module that owns it (empty for the root).
        kind: ``parameter`` or ``buffer``.
        shape: its shape.
        unit_axis: the axis whose slices are the units, None for a scalar.
        trainable: whether it requires gradients; buffers count as not trainable.
        aliases: further names of the same tensor (tied parameters).
        unit_groups: blocks of the first axis whose slices along `unit_axis` are units of their own.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    unit_axis: int | None
    trainable: bool
    aliases: tuple[str, ...] = ()
    unit_groups: int = 1

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def n_units(self) -> int:
        """The number of units; 1 for a scalar."""
        return 1 if self.unit_axis is None else self.shape[self.unit_axis] * self.unit_groups

    def to_dict(self) -> dict[str, Any]:
        """The layer as JSON-ready values; without groups of units as before there were any."""
        data = asdict(self)
        if self.unit_groups == 1:
            del data["unit_groups"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layer:
        """The layer that `to_dict` described; raises as `lcray.storage.json_types.build`."""
        return build(cls, data)


def describe_layers(model: nn.Module) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
    """The layers of `model`, in its order: parameters first, then the float buffers it saves.

    Returns:
        The layers, and the tensor behind each name. Integer tensors do not move and are no layers,
        and neither are extra states (`torch.nn.Module.get_extra_state`).

    Raises:
        TaskError: for TorchScript, parameters without a shape (lazy modules), without values (meta
            tensors, inference mode) or of complex numbers.
    """
    _check_modules(model)
    tensors = _state_tensors(model)
    names = canonical_names(tensors)
    owners = _owners(model)
    found: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        found.setdefault(id(tensor), []).append(key)
    parameters = {id(parameter) for parameter in model.parameters()}
    ordered = sorted(found.values(), key=lambda keys: id(tensors[keys[0]]) not in parameters)
    layers = []
    for keys in ordered:
        tensor = tensors[keys[0]]
        if all(key.rpartition(".")[2] == EXTRA for key in keys):
            continue
        _check_tensor(names[keys[0]], tensor)
        if not tensor.is_floating_point():
            continue
        owner = owners.get(keys[0], model)
        axis, groups = _units(owner, tensor)
        layers.append(
            Layer(
                name=names[keys[0]],
                module=names[keys[0]].rpartition(".")[0],
                kind="parameter" if id(tensor) in parameters else "buffer",
                shape=tuple(tensor.shape),
                unit_axis=axis,
                trainable=id(tensor) in parameters and tensor.requires_grad,
                aliases=tuple(names[key] for key in keys[1:]),
                unit_groups=groups,
            )
        )
    return tuple(layers), {names[key]: tensor for key, tensor in tensors.items()}


def _state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, aliases included: the keys of the state dict."""
    saved = model.state_dict(keep_vars=True)
    return {key: value for key, value in saved.items() if isinstance(value, Tensor)}


def extra_owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose extra states are tensors, by the canonical names of those.

    Raises:
        TaskError: for one that nothing can be loaded into.
    """
    names, found = canonical_names(_state_tensors(model)), {}
    for key, module in extra_states(model).items():
        if key not in names:  # no tensor: no file holds it
            continue
        if not has_setter(module):
            raise TaskError(f"model {names[key]!r}: {NO_SETTER}")
        found[names[key]] = module
    return found


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    owners = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in (*module._parameters, *module._buffers):
            owners[f"{prefix}.{name}" if prefix else name] = module
    return owners


def _units(owner: nn.Module, tensor: Tensor) -> tuple[int | None, int]:
    """The axis of the units, and the groups that they are in."""
    if tensor.dim() < 2:
        return (0 if tensor.dim() else None), 1
    kinds = {kind.__name__ for kind in type(owner).__mro__}
    if "_ConvTransposeNd" in kinds:
        groups = int(getattr(owner, "groups", 1))
        whole = tensor.shape[0] == owner.in_channels  # unlike a factor of a decomposition, say
        whole = whole and tensor.shape[1] * groups == owner.out_channels
        return 1, groups if whole else 1
    return (1 if "Conv1D" in kinds else 0), 1  # Conv1D: of transformers


def _check_modules(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TaskError(
                f"model: has a TorchScript module ({module.original_name}), which nothing can be "
                "changed in; build the Python module that it was made from in model()"
            )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise TaskError(f"model layer {name!r}: has no shape yet; run one batch in model()")
    if tensor.is_meta:
        raise TaskError(f"model layer {name!r}: is a meta tensor, without values; build it on cpu")
    if tensor.is_inference():
        raise TaskError(
            f"model layer {name!r}: was made in inference mode; build the model outside of it"
        )
    if tensor.is_complex():
        raise TaskError(
            f"model layer {name!r}: complex numbers are not supported; keep real "
            "ones, and use torch.view_as_complex in the forward pass"
        )
