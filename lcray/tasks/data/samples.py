"""The samples of a split, read by their numbers, from tensors or from a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from lcray.errors import TaskError, brief
from lcray.tasks.data.pytree import Digest, count_bytes
from lcray.tasks.task import Data, Task

#: Numbers of samples; a range if they are consecutive.
Index = range | np.ndarray[Any, Any]

_HELD = 1 << 26  # bytes of samples that a scan holds at a time, apart from the first few

FEW = 16  # samples that are read again in a batch of another size


def cut_block(block: Index, size: int) -> Iterator[Index]:
    """`block` in as few parts as possible that hold at most `size` and differ by at most one."""
    parts = -(-len(block) // size)
    small, larger = divmod(len(block), parts)
    for start, stop in pairwise(i * small + min(i, larger) for i in range(parts + 1)):
        yield as_range(block[start:stop])


def as_range(index: Index) -> Index:
    """`index` as a range if its numbers are consecutive."""
    if isinstance(index, range) or (np.diff(index) != 1).any():
        return index
    return range(int(index[0]), int(index[-1]) + 1)


class Samples(Protocol):
    """The samples of a split."""

    def __len__(self) -> int: ...

    def batch(self, index: Index, where: str) -> Any:
        """The batch of the samples `index`; errors name `where`."""

    def scan(self, digest: Digest, chunk: int) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Read every sample once, in order, and add it to `digest`.

        Yields the number of samples that were read, at most `chunk` at a time, and a function that
        makes a batch of them.
        """


def open_samples(name: str, data: Data, task: Task, numbers: NDArray[Any] | None = None) -> Samples:
    """The samples of `data`, the split called `name`.

    Args:
        name: of the split.
        data: its samples.
        task: for its collate function.
        numbers: the samples to take, ascending, [n]; no others are read. None takes all.

    Raises:
        TaskError: if a tuple contains anything but tensors.
    """
    if isinstance(data, tuple):
        make = getattr(data, "_make", tuple)  # a named tuple stays one
        return TensorSamples(_rows(_as_tensors(name, data), numbers), make)
    if type(data) is TensorDataset and task.collate is None:
        # The type of its samples when they are collated.
        return TensorSamples(_rows(data.tensors, numbers), list)
    return CollatedSamples(name, data, task.collate or default_collate, numbers)


def _rows(tensors: Sequence[Tensor], numbers: NDArray[Any] | None) -> Sequence[Tensor]:
    if numbers is None:
        return tensors
    return [tensor[torch.from_numpy(numbers)] for tensor in tensors]


class TensorSamples:
    """Tensors that share their first axis; batches are copies, so a loss may write into them."""

    def __init__(
        self, tensors: Sequence[Tensor], make: Callable[[Iterator[Tensor]], Sequence[Tensor]]
    ) -> None:
        self._tensors, self._make = tuple(tensors), make

    def __len__(self) -> int:
        return len(self._tensors[0])

    def batch(self, index: Index, where: str) -> Sequence[Tensor]:
        """Rows of the tensors."""
        if isinstance(index, range):
            rows = slice(index.start, index.stop)
            return self._make(tensor[rows].clone() for tensor in self._tensors)
        return self._make(tensor[torch.from_numpy(index)] for tensor in self._tensors)

    def scan(self, digest: Digest, chunk: int) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Add the whole tensors."""
        digest.add(self._tensors)
        for index in _chunks(len(self), chunk):
            yield len(index), partial(self.batch, index, "")


class CollatedSamples:
    """A map-style data set and the function that makes a batch of its samples."""

    def __init__(
        self,
        name: str,
        data: Any,
        collate: Callable[[list[Any]], Any],
        numbers: NDArray[Any] | None = None,
    ) -> None:
        self._name, self._data, self._collate, self._numbers = name, data, collate, numbers

    def __len__(self) -> int:
        return len(self._data if self._numbers is None else self._numbers)

    def batch(self, index: Index, where: str) -> Any:
        """The samples, collated.

        Raises:
            TaskError: if they cannot be read or made into a batch.
        """
        return self._make([self._read(int(i), where) for i in index], index, where)

    def scan(self, digest: Digest, chunk: int) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Add the samples one by one, before they are collated.

        The first few are also added as collated, since a collate function may read files by their
        names, or turn words into numbers.

        Raises:
            TaskError: if samples cannot be read or made into a batch, or differ when read twice.
        """
        where, n = f"task split {self._name!r}", len(self)
        chunk = max(1, min(chunk, _HELD // max(1, count_bytes(self._read(0, where)))))
        self._check_repeatable(range(min(n, chunk)), where)
        digest.add(n)
        for index in _chunks(n, chunk):
            rows = [self._read(i, where) for i in index]
            for i, row in zip(index, rows, strict=True):
                self._add(digest, i, row, where)
            yield len(index), partial(self._make, rows, index, where)
        digest.add(self.batch(range(min(n, FEW)), where))

    def _add(self, digest: Digest, number: int, row: Any, where: str) -> None:
        known = digest.opaque
        digest.add(row)
        if digest.opaque > known:  # the user's own type: only its batch can be read
            # The sample is read again, since collating may change it.
            digest.add(self.batch(range(number, number + 1), where))

    def _check_repeatable(self, index: range, where: str) -> None:
        first, second = Digest(), Digest()
        first.add(self.batch(index, where))
        second.add(self.batch(index, where))
        if first.hexdigest() != second.hexdigest():
            raise TaskError(f"{where}: its samples differ when read twice; switch augmentation off")

    def _read(self, number: int, where: str) -> Any:
        number = number if self._numbers is None else int(self._numbers[number])
        try:
            return self._data[number]
        except Exception as error:
            raise TaskError(f"{where}: sample {number} cannot be read: {brief(error)}") from error

    def _make(self, rows: list[Any], index: Index, where: str) -> Any:
        try:
            return self._collate(rows)
        except Exception as error:
            raise TaskError(
                f"{where}: samples {index[0]}…{index[-1]} cannot be made into a batch: "
                f"{brief(error)}"
            ) from error


def _as_tensors(name: str, data: tuple[Any, ...]) -> list[Tensor]:
    try:
        with warnings.catch_warnings():
            # Memory-mapped files may be read-only, and so may batches.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return [torch.as_tensor(part) for part in data]
    except Exception as error:
        raise TaskError(
            f"task split {name!r}: must hold tensors or arrays of numbers: {brief(error)}"
        ) from error


def _chunks(n: int, chunk: int) -> Iterator[range]:
    return (range(start, min(n, start + chunk)) for start in range(0, n, chunk))
