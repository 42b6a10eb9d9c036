"""Tensors inside batches and samples: in mappings, sequences, named tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 24  # bytes that are copied at a time if a tensor is not contiguous


def map_tensors(
    function: Callable[[Tensor], Tensor],
    value: Any,
    other: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """`value` with `function` applied to its tensors, and `other` to leaves without tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        mapped = {key: map_tensors(function, part, other) for key, part in value.items()}
        return mapped if type(value) is dict else _like(value, mapped)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = copy.copy(value)
        for field in dataclasses.fields(value):
            part = map_tensors(function, getattr(value, field.name), other)
            object.__setattr__(found, field.name, part)  # works for frozen dataclasses, too
        return found
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part, other) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, part, other) for part in value)
    return other(value)


def _like(value: Mapping[Any, Any], mapped: dict[Any, Any]) -> Mapping[Any, Any]:
    """`mapped` as a mapping of the kind of `value`, if that kind can hold it (e.g. `UserDict`)."""
    if not isinstance(value, MutableMapping):
        return mapped
    found = copy.copy(value)
    for key, part in mapped.items():  # some kinds have no update()
        found[key] = part
    return found


def count_bytes(value: Any) -> int:
    """Bytes of the elements of the tensors and arrays in `value`."""
    sizes = [0]

    def measure(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    def measure_array(leaf: Any) -> None:
        if isinstance(leaf, np.ndarray):
            sizes.append(leaf.nbytes)

    map_tensors(measure, value, measure_array)
    return sum(sizes)


class Digest:
    """SHA-256 of nested values, unambiguous: parts carry their kind, dtype, shape and length.

    Attributes:
        opaque: number of parts whose content cannot be read; only their kind counts.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.opaque = 0

    def hexdigest(self) -> str:
        """The digest of everything added so far."""
        return self._sha256.hexdigest()

    def add(self, value: Any) -> None:
        """Add the content of `value`; strides, devices and identities do not count."""
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            self._add_array(value)
        elif isinstance(value, Mapping):
            self._add_parts("mapping", [part for item in value.items() for part in item])
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            self._add_parts("fields", [part for n in names for part in (n, getattr(value, n))])
        elif isinstance(value, list | tuple):
            self._add_parts("sequence", list(value))
        elif value is None or isinstance(value, str | bytes | bool | int | float | complex):
            text = repr(value).encode()
            self._header("plain", len(text))
            self._sha256.update(text)
        elif hasattr(value, "__array_interface__"):  # images
            self._add_array(np.asarray(value))
        else:
            self.opaque += 1
            self._header("opaque", type(value).__qualname__)

    def _header(self, *parts: Any) -> None:
        self._sha256.update(("|".join(map(str, parts)) + "\n").encode())

    def _add_parts(self, kind: str, parts: list[Any]) -> None:
        self._header(kind, len(parts))
        for part in parts:
            self.add(part)

    def _add_array(self, array: np.ndarray[Any, Any] | np.generic) -> None:
        if array.dtype.hasobject:  # its bytes are addresses
            self._header("objects", array.shape)
            self._add_parts("sequence", np.asarray(array).ravel().tolist())
        else:
            self._header("array", array.dtype, array.shape)
            self._sha256.update(array.tobytes())

    def _add_tensor(self, tensor: Tensor) -> None:
        self._header("tensor", tensor.dtype, list(tensor.shape))
        tensor = tensor.detach()
        rows = tensor if tensor.dim() else tensor[None]
        size = rows.shape[0]
        if not (tensor.is_contiguous() and tensor.device.type == "cpu"):
            size = max(1, _BLOCK * len(rows) // max(1, count_bytes(rows)))
        for start in range(0, len(rows), max(1, size)):
            flat = rows[start : start + size].cpu().contiguous().reshape(-1)
            self._sha256.update(flat.view(torch.uint8).numpy().data)
