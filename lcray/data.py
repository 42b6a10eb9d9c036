"""Batches of a split: fixed by the plan, made once, kept on the device.

Every sample is in exactly one batch, and the sizes of the batches of a block differ by at most
one. A block is the whole split in its natural order; or, where groups cost nothing, the samples
of one group; or, where batches are part of the loss, a seeded permutation of the split.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lcray.errors import TaskError
from lcray.task import Data, Task

MAX_GROUPS = 10_000


@dataclass(frozen=True)
class SplitData:
    """The batches of one split.

    Attributes:
        name: of the split.
        n_samples: samples in all.
        batches: on the device, floats in the compute dtype.
        batch_sizes: samples a batch.
        labels: the group label per item of each batch, [n]; empty without groups.
        groups: the labels that occur, ascending.
        sorted_by_group: whether each batch holds one group.
        sha256: of the data in the order of the batches.
    """

    name: str
    n_samples: int
    batches: tuple[Any, ...]
    batch_sizes: tuple[int, ...]
    labels: tuple[Tensor, ...]
    groups: tuple[int, ...]
    sorted_by_group: bool
    sha256: str


def prepare_split(
    name: str,
    data: Data,
    task: Task,
    *,
    batch_size: int,
    fixed_seed: int | None,
    place: Callable[[Tensor], Tensor],
) -> SplitData:
    """Cut a split into batches.

    Args:
        name: of the split.
        data: its samples.
        task: for its collate function and its groups.
        batch_size: the most samples a batch holds.
        fixed_seed: the seed of the permutation where batches are part of the loss, else None.
        place: moves a tensor to the device and dtype of the computation.

    Raises:
        TaskError: if samples cannot be made into batches, differ when read twice, or have group
            labels that cannot be used.
    """
    n = len(data[0]) if isinstance(data, tuple) else len(data)  # type: ignore[arg-type]
    fetch = _fetcher(name, data, task)
    order = np.arange(n)
    sample_labels = None
    if fixed_seed is not None:
        order = np.random.default_rng([fixed_seed, zlib.crc32(name.encode())]).permutation(n)
    elif task.groups is not None:
        sample_labels = _sample_labels(name, fetch, task, n, batch_size)
    if sample_labels is None:
        blocks = [order]
    else:
        blocks = [np.flatnonzero(sample_labels == label) for label in np.unique(sample_labels)]
    cuts = [cut for block in blocks for cut in _cut(block, batch_size)]
    raw = [fetch(cut) for cut in cuts]
    if _digest([raw[0]]) != _digest([fetch(cuts[0])]):
        raise TaskError(
            f"task split {name!r}: its samples differ when read twice; switch augmentation off"
        )
    labels = [] if task.groups is None else [_labels(name, task, batch) for batch in raw]
    known = torch.cat(labels).unique().tolist() if labels else []
    if len(known) > MAX_GROUPS:
        raise TaskError(f"task groups: {len(known)} groups in split {name!r}; at most {MAX_GROUPS}")
    return SplitData(
        name=name,
        n_samples=n,
        batches=tuple(_map(place, batch) for batch in raw),
        batch_sizes=tuple(len(cut) for cut in cuts),
        labels=tuple(label.to(place(torch.zeros(0)).device) for label in labels),
        groups=tuple(label for label in known if label >= 0),
        sorted_by_group=sample_labels is not None and all(len(t.unique()) == 1 for t in labels),
        sha256=_digest(raw),
    )


def _cut(block: np.ndarray[Any, Any], size: int) -> Iterable[np.ndarray[Any, Any]]:
    return np.array_split(block, -(-len(block) // size))


def _fetcher(name: str, data: Data, task: Task) -> Callable[[np.ndarray[Any, Any]], Any]:
    if isinstance(data, tuple):
        try:
            tensors = [torch.as_tensor(part) for part in data]
        except Exception as error:
            raise TaskError(
                f"task split {name!r}: must hold tensors or arrays of numbers: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        make = getattr(data, "_make", tuple)  # a named tuple stays one
        return lambda index: make(tensor[torch.from_numpy(index)] for tensor in tensors)
    collate = task.collate or default_collate

    def fetch(index: np.ndarray[Any, Any]) -> Any:
        try:
            return collate([data[int(i)] for i in index])
        except Exception as error:
            raise TaskError(
                f"task split {name!r}: samples {index[0]}…{index[-1]} cannot be made into a batch: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error

    return fetch


def _sample_labels(
    name: str, fetch: Callable[..., Any], task: Task, n: int, batch_size: int
) -> np.ndarray[Any, Any] | None:
    """The group of each sample where all items of a sample share theirs, else None."""
    found = []
    for cut in _cut(np.arange(n), batch_size):
        labels = _labels(name, task, fetch(cut)).numpy()
        if len(labels) % len(cut):
            return None
        rows = labels.reshape(len(cut), -1)
        if not rows.size or (rows != rows[:, :1]).any():
            return None
        found.append(rows[:, 0])
    sample = np.concatenate(found)
    # A batch of one sample confirms that items come sample by sample.
    for i in {0, n - 1}:
        if (_labels(name, task, fetch(np.array([i]))).numpy() != sample[i]).any():
            return None
    return sample


def _labels(name: str, task: Task, batch: Any) -> Tensor:
    assert task.groups is not None
    try:
        labels = task.groups(batch)
    except Exception as error:
        raise TaskError(
            f"task groups: failed on split {name!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.dim() != 1:
        given = type(labels).__name__
        if isinstance(labels, Tensor):
            given = f"{labels.dtype} {list(labels.shape)}"
        raise TaskError(
            f"task groups: must give one integer per item, [n], gave {given} on split {name!r}"
        )
    return labels.detach().cpu().long()


def _map(
    place: Callable[[Tensor], Tensor], batch: Any, other: Callable[[Any], Any] = lambda leaf: leaf
) -> Any:
    """`batch` with `place` applied to its tensors, in mappings, sequences and dataclasses."""
    if isinstance(batch, Tensor):
        return place(batch)
    if isinstance(batch, Mapping):
        mapped = {key: _map(place, value, other) for key, value in batch.items()}
        return mapped if type(batch) is dict else _like(batch, mapped)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        found = copy.copy(batch)
        for field in dataclasses.fields(batch):
            value = _map(place, getattr(batch, field.name), other)
            object.__setattr__(found, field.name, value)  # frozen ones as well
        return found
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(place, value, other) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_map(place, value, other) for value in batch)
    return other(batch)


def _like(batch: Mapping[Any, Any], mapped: dict[Any, Any]) -> Mapping[Any, Any]:
    """`mapped` as a mapping of the kind of `batch`, where that can hold it (a `UserDict`, say)."""
    if not isinstance(batch, MutableMapping):
        return mapped
    found = copy.copy(batch)
    for key, value in mapped.items():  # some know no update()
        found[key] = value
    return found


def _digest(batches: Iterable[Any]) -> str:
    """SHA-256 of the tensors in `batches`, with their shapes and dtypes, and of their text."""
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
        return tensor

    def add_plain(leaf: Any) -> None:
        if isinstance(leaf, str | bytes | int | float):
            digest.update(repr(leaf).encode())
        elif isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.hasobject:
            _map(add, leaf.tolist(), add_plain)  # its bytes are addresses
        elif isinstance(leaf, np.ndarray | np.generic):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())

    for batch in batches:
        _map(add, batch, add_plain)
    return digest.hexdigest()
