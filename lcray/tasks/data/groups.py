"""Group labels of a split: the labels of a batch, and a survey of all of them.

Legend: n items per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcray.errors import TaskError
from lcray.tasks.data.samples import FEW, Samples
from lcray.tasks.task import Task

MAX_GROUPS = 10_000


class Survey:
    """Results over the labels of all chunks: the labels that occur, and the label of each sample.

    Attributes:
        known: the labels that occur, ascending.
        one_item: whether every sample has one item.
    """

    def __init__(self, *, sort: bool) -> None:
        self.known = np.empty(0, np.int64)
        self.one_item = True
        self._found: list[np.ndarray[Any, Any]] | None = [] if sort else None

    def add(self, labels: np.ndarray[Any, Any], size: int) -> None:
        """Add the labels of a chunk of `size` samples, item by item."""
        self.known = np.union1d(self.known, labels)
        self.one_item &= len(labels) == size
        if self._found is None:
            return
        rows = labels.reshape(size, -1) if len(labels) % size == 0 else labels[:0, None]
        if rows.size and (rows == rows[:, :1]).all():
            self._found.append(rows[:, 0].copy())
        else:
            self._found = None

    def labels(self) -> np.ndarray[Any, Any] | None:
        """The group of each sample, if all items of a sample share one, else None."""
        return np.concatenate(self._found) if self._found else None


def confirmed(name: str, task: Task, samples: Samples, labels: np.ndarray[Any, Any]) -> bool:
    """Whether batches of one sample confirm that the items of a sample follow each other."""
    n = len(labels)
    for i in {*range(min(n, FEW)), n - 1}:
        own = labels_of(name, task, samples.batch(range(i, i + 1), f"task split {name!r}"))
        if not len(own) or (own.numpy() != labels[i]).any():
            return False
    return True


def labels_of(name: str, task: Task, batch: Any) -> Tensor:
    """The label of each item of a batch of the split `name`, [n] int64, on the host.

    Raises:
        TaskError: if the task's groups fail or break the contract.
    """
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


def distinct(labels: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """The labels that occur, ascending."""
    return torch.cat(list(labels)).unique().numpy() if labels else np.empty(0, np.int64)


def numbers_of(labels: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Positions of `labels` in `groups`; the number of groups for negative labels."""
    places = torch.searchsorted(torch.tensor(groups, dtype=torch.int64), labels)
    return torch.where(labels >= 0, places, len(groups))


def groups_of(name: str, known: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """The groups among the labels that occur; negative labels are not groups.

    Raises:
        TaskError: if there are too many.
    """
    if len(known) > MAX_GROUPS:
        raise TaskError(f"task groups: {len(known)} groups in split {name!r}; at most {MAX_GROUPS}")
    return tuple(label for label in known.tolist() if label >= 0)
