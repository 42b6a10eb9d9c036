"""The layers of a model: its named tensors, each described once, in the model's order.

See `lcray.tasks.layer` for the terms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lcray.checkpoints.naming import canonical_names
from lcray.checkpoints.snapshot import EXTRA, NO_SETTER, extra_states, has_setter
from lcray.errors import TaskError
from lcray.tasks.layer import Layer


def describe_layers(model: nn.Module) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
    """The layers of `model`, in its order: parameters first, then the float buffers it saves.

    Returns:
        The layers, and the tensor behind each name. Integer tensors do not move and are not
        layers; extra states (`torch.nn.Module.get_extra_state`) are not layers either.

    Raises:
        TaskError: for TorchScript, and for parameters that have no shape yet (lazy modules), have
            no values (meta tensors, inference mode), or are complex.
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
    """The modules whose extra states are tensors, by the canonical names of these states.

    Raises:
        TaskError: for an extra state that nothing can be loaded into.
    """
    names, found = canonical_names(_state_tensors(model)), {}
    for key, module in extra_states(model).items():
        if key not in names:  # not a tensor, so no file holds it
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
    """The axis of the units, and the number of groups of units."""
    if tensor.dim() < 2:
        return (0 if tensor.dim() else None), 1
    kinds = {kind.__name__ for kind in type(owner).__mro__}
    if "_ConvTransposeNd" in kinds:
        groups = int(getattr(owner, "groups", 1))
        whole = tensor.shape[0] == owner.in_channels  # false for a low-rank factor, e.g.
        whole = whole and tensor.shape[1] * groups == owner.out_channels
        return 1, groups if whole else 1
    return (1 if "Conv1D" in kinds else 0), 1  # Conv1D is from transformers


def _check_modules(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TaskError(
                f"model: has a TorchScript module ({module.original_name}), which cannot be "
                "changed; build the original Python module in model()"
            )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise TaskError(f"model layer {name!r}: has no shape yet; run one batch in model()")
    if tensor.is_meta:
        raise TaskError(f"model layer {name!r}: is a meta tensor, without values; build it on cpu")
    if tensor.is_inference():
        raise TaskError(
            f"model layer {name!r}: was made in inference mode; build the model outside it"
        )
    if tensor.is_complex():
        raise TaskError(
            f"model layer {name!r}: complex numbers are not supported; keep real numbers, and use "
            "torch.view_as_complex in the forward pass"
        )
