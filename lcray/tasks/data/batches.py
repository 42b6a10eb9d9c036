"""The batches of a split: resident on the device, or streamed to it for each evaluation.

Both give the same batches, bit for bit. A stream reads ahead in a thread of its own, so reading,
collating and pinning run while gradients are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lcray.tasks.data.pytree import map_tensors

AHEAD = 2  # batches that a stream may read in advance

THREAD = "lcray-batches"


class Batches:
    """The batches of a split, in order; they can be iterated any number of times.

    Attributes:
        resident: whether they are on the device already, all of them or the kept ones from `first`.
        nbytes: bytes of these batches once placed; estimated from sizes seen if not resident.

    Args:
        n: the number of batches.
        read: gives a batch by its number, as the task makes it; it may be called in a thread.
        place: moves a tensor to the device and dtype of the computation.
        device: the device that `place` moves tensors to.
        placed: the batches, placed; None to stream them.
        nbytes: bytes of these batches once placed.
        first: the number of the first batch in `placed`, if only some of the batches are kept.
    """

    def __init__(
        self,
        n: int,
        read: Callable[[int], Any],
        place: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        placed: Sequence[Any] | None,
        nbytes: int,
        first: int = 0,
    ) -> None:
        self._n, self._device, self._place = n, device, place
        self._read: Callable[[int], Any] | None = read if placed is None else None  # may own data
        self._placed = None if placed is None else dict(enumerate(placed, first))
        self.resident = placed is not None
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:
        """One batch, placed; read again if batches are streamed.

        Raises:
            IndexError: if there is no such batch.
            KeyError: if it is not kept.
            TaskError: if it cannot be read.
        """
        number = range(self._n)[index]
        if self._placed is not None:
            return self._placed[number]
        return self._put(self._fetch(number))

    def __iter__(self) -> Iterator[Any]:
        """All batches in order.

        Raises:
            TaskError: if one cannot be read.
        """
        return self.only(range(self._n))

    def only(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Some batches in order.

        Raises:
            KeyError: if one is not kept.
            TaskError: if one cannot be read.
        """
        if self._placed is None:
            return self._stream(numbers)
        return map(self._placed.__getitem__, numbers)

    def _stream(self, numbers: Sequence[int]) -> Iterator[Any]:
        pool = ThreadPoolExecutor(1, THREAD, initializer=self._enter_thread)
        try:
            ahead = deque(pool.submit(self._fetch, number) for number in numbers[:AHEAD])
            later = iter(numbers[AHEAD:])
            while ahead:
                batch = self._put(ahead.popleft().result())
                if (number := next(later, None)) is not None:
                    ahead.append(pool.submit(self._fetch, number))
                yield batch
        finally:  # also if the loop ends early
            pool.shutdown(cancel_futures=True)

    def _enter_thread(self) -> None:
        if self._device.type == "cuda":  # otherwise pinning would start a context on device 0
            torch.cuda.set_device(self._device)

    def _fetch(self, number: int) -> Any:
        assert self._read is not None
        batch = self._read(number)
        return map_tensors(_pin, batch) if self._device.type == "cuda" else batch

    def _put(self, batch: Any) -> Any:
        return map_tensors(self._place_soon, batch)

    def _place_soon(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":  # from pinned memory, without waiting
            tensor = tensor.to(self._device, non_blocking=True)
        return self._place(tensor)


def _pin(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
