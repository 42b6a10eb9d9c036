"""Snapshots of a model: the tensors to store, their place in the file, and copying them.

Names, shapes and dtypes of a run never change, so the head of its files is built once. A snapshot
copies each tensor to its place in a flat buffer: the writer then has nothing to serialise, and a
buffer that is used again causes no page faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lcray.checkpoints import header, naming
from lcray.errors import RecorderError

EXTRA = "_extra_state"  # torch's name for extra states


@dataclass(frozen=True)
class Layer:
    """One stored tensor: its canonical name and what `run.json` says about it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    requires_grad: bool


@dataclass(frozen=True)
class Layout:
    """The place of every tensor in the files of a run.

    Attributes:
        keys: stored name to the model's own name, in the model's order.
        aliases: canonical name of a tied tensor to the name it is stored under.
        tied: the same with the names in the model.
        seen: every tensor name of the model, stored or not.
        layers: one description per stored tensor.
        entries: stored name to type, shape and byte range.
        head: the first bytes of every file.
        nbytes: size of the data that follows `head`.
    """

    keys: Mapping[str, str]
    aliases: Mapping[str, str]
    tied: Mapping[str, str]
    seen: frozenset[str]
    layers: tuple[Layer, ...]
    entries: Mapping[str, header.Entry]
    head: bytes
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """The tensors of a model at one moment.

    Attributes:
        tensors: every tensor by its own name; a tied one is the same object under each name.
        parameters: the names of the parameters; all others are buffers or extra states.
        persistent: canonical names in the state dict.
    """

    tensors: Mapping[str, torch.Tensor]
    parameters: frozenset[str]
    persistent: frozenset[str]


class Slot:
    """Memory for one snapshot: a flat buffer and a view of it for each stored tensor."""

    def __init__(self, layout: Layout, *, pinned: bool = False):
        self.data = torch.empty(layout.nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.views = {
            name: self.data[entry.start : entry.stop].view(entry.dtype).view(entry.shape)
            for name, entry in layout.entries.items()
        }
        raw = self.data.numpy()
        self.bytes = {name: raw[e.start : e.stop] for name, e in layout.entries.items()}
        self.memory = raw.data


def contents_of(model: nn.Module) -> Contents:
    """The tensors of a model, wrapped or not, without copies.

    Raises:
        RecorderError: a tensor could be stored, but never loaded again.
    """
    persistent = frozenset(naming.canonical_names(model.state_dict(keep_vars=True)).values())
    tensors = tensors_of(model)
    for name, module in extra_states(model).items():
        if name in tensors and not has_setter(module):
            raise RecorderError(f"tensor {name!r}: {NO_SETTER}")
    parameters = frozenset(key for key, _ in model.named_parameters(remove_duplicate=False))
    return Contents(tensors, parameters, persistent)


def layout_of(contents: Contents, *, trainable_only: bool = False) -> Layout:
    """Plan the files of a model's run.

    The files store parameters, persistent buffers and extra states that are tensors. A tied tensor
    is stored once, under the first of its names.

    Args:
        contents: the tensors of the model.
        trainable_only: leave out the parameters that do not require gradients.

    Raises:
        RecorderError: there is nothing to store, or a tensor that a file cannot hold.
    """
    tensors, parameters = contents.tensors, contents.parameters
    names = naming.canonical_names(tensors)
    keys: dict[str, str] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    layers: list[Layer] = []
    for key, tensor in tensors.items():
        is_parameter = key in parameters
        if (is_parameter and trainable_only and not tensor.requires_grad) or (
            not is_parameter and names[key] not in contents.persistent
        ):
            continue
        if id(tensor) in first:
            tied[key] = first[id(tensor)]
            continue
        _check_storable(names[key], tensor)
        first[id(tensor)] = key
        keys[names[key]] = key
        kind = "parameter" if is_parameter else "buffer"
        layers.append(_layer(names[key], tensor, kind))
    if not keys:
        raise RecorderError(
            "the model has nothing to record; pass a model with parameters"
            + (" that require gradients, or trainable_only=False" if trainable_only else "")
        )
    entries, nbytes = _place({name: tensors[key] for name, key in keys.items()})
    head = header.build(entries, {"format": "pt", header.CANONICAL_KEY: "canonical"})
    aliases = {names[alias]: names[key] for alias, key in tied.items()}
    return Layout(keys, aliases, tied, frozenset(tensors), tuple(layers), entries, head, nbytes)


def snapshot(layout: Layout, tensors: Mapping[str, torch.Tensor], slot: Slot) -> None:
    """Copy the model's tensors into `slot`: a consistent state of one moment.

    Raises:
        RecorderError: the tensors no longer match `layout`.
    """
    _check_unchanged(layout, tensors)
    with torch.no_grad():
        for name, key in layout.keys.items():
            tensor = tensors[key].detach()
            if _is_plain(tensor):
                # One thread, on purpose: torch's copy would start its thread team for a memcpy,
                # and on a busy machine waiting for the team costs more than the copy.
                np.copyto(slot.bytes[name], tensor.reshape(-1).view(torch.uint8).numpy())
            else:
                slot.views[name].copy_(tensor, non_blocking=slot.data.is_pinned())
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the elements are in main memory, in the same order as in the file."""
    bits = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not bits


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and extra states by name, a tied tensor under each of its names."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    for name, owner in extra_states(model).items():
        value = owner.get_extra_state()
        if isinstance(value, torch.Tensor):
            found[name] = value
    return found


NO_SETTER = "its module has get_extra_state but no set_extra_state to load it with; define both"


def has_setter(module: nn.Module) -> bool:
    """Whether an extra state can be loaded into a module."""
    return type(module).set_extra_state is not nn.Module.set_extra_state


def extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with a state of their own (`torch.nn.Module.get_extra_state`).

    The key is the name of that state in a state dict.
    """
    own = nn.Module.get_extra_state
    return {
        f"{prefix}.{EXTRA}" if prefix else EXTRA: module
        for prefix, module in model.named_modules(remove_duplicate=False)
        if type(module).get_extra_state is not own
    }


def _layer(name: str, tensor: torch.Tensor, kind: str) -> Layer:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Layer(name, tuple(tensor.shape), dtype, kind, tensor.requires_grad)


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    problem = None
    if not header.can_name(name):
        problem = "has a name that safetensors cannot hold; rename it"
    elif is_lazy(tensor):
        problem = "is not initialised yet; run one forward pass first"
    elif tensor.is_meta:
        problem = "is on the meta device; load its values first"
    elif tensor.layout != torch.strided or tensor.dtype not in header.CODES:
        problem = f"is {tensor.layout}, {tensor.dtype}, which safetensors cannot hold"
    elif type(tensor.data) is not torch.Tensor:
        problem = f"is a {type(tensor.data).__name__}; record the unsharded, plain model"
    if problem is not None:
        raise RecorderError(f"tensor {name!r} {problem}")


def _place(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, header.Entry], int]:
    """Byte ranges without holes; wide types first, so that every tensor is aligned.

    The order of the names, and so of the header, stays that of the model.
    """
    entries: dict[str, header.Entry] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = header.Entry(tensor.dtype, tuple(tensor.shape), start, end)
    return {name: entries[name] for name in tensors}, end


def _check_unchanged(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
    if layout.seen != tensors.keys():
        name = sorted(layout.seen ^ tensors.keys())[0]
        what = "is new" if name in tensors else "is gone"
        raise RecorderError(f"tensor {name!r} {what} since recording began; start a new run")
    for name, key in layout.keys.items():
        tensor, entry = tensors[key], layout.entries[name]
        if tensor.dtype != entry.dtype or tensor.shape != entry.shape:
            raise RecorderError(
                f"tensor {name!r} was {entry.dtype} {list(entry.shape)} when recording began and "
                f"is {tensor.dtype} {list(tensor.shape)}; start a new run"
            )
    for alias, key in layout.tied.items():
        if tensors[alias] is not tensors[key]:
            raise RecorderError(
                f"tensors {alias!r} and {key!r} were tied when recording began and are not any "
                "more; start a new run"
            )
