"""Buffers of rows for the shards: rows wait for a full row group, or a thread writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.tables.arrow import make_table
from lcray.tables.schema import TABLES
from lcray.tables.shards.writer import ShardWriter

Columns = Mapping[str, Any]


class IntervalRows:
    """Rows of one table and split, with the same number of rows in every interval, [n].

    Args:
        table: name of the table.
        fixed: the columns that are the same in every interval, [n] each; a string column as
            (codes [n], names).
        write: takes the table's name and the columns of a row group.
    """

    def __init__(self, table: str, fixed: Columns, write: Callable[[str, Columns], None]) -> None:
        self._table, self._fixed, self._write = table, fixed, write
        first = next(iter(fixed.values()))
        self._n = len(first[0] if isinstance(first, tuple) else first)
        self._most = TABLES[table].row_group_size // max(1, self._n)
        self._held: list[tuple[Mapping[str, int], Mapping[str, NDArray[Any]]]] = []

    def add(self, numbers: Mapping[str, int], columns: Mapping[str, NDArray[Any]]) -> None:
        """Add the rows of an interval.

        Args:
            numbers: columns that have one value in the interval.
            columns: the others, [n] each.
        """
        if self._n and len(self._held) >= self._most:
            self.flush()
        if self._n:
            self._held.append((numbers, columns))

    def flush(self) -> None:
        """Write the waiting rows."""
        if not self._held:
            return
        times = len(self._held)
        joined: dict[str, Any] = {name: _tiled(part, times) for name, part in self._fixed.items()}
        for name in self._held[0][0]:
            joined[name] = np.repeat([numbers[name] for numbers, _ in self._held], self._n)
        for name in self._held[0][1]:
            joined[name] = np.concatenate([columns[name] for _, columns in self._held])
        self._held.clear()
        self._write(self._table, joined)


def _tiled(part: Any, times: int) -> Any:
    if isinstance(part, tuple):
        return np.tile(part[0], times), part[1]
    return np.tile(part, times)


class Piece(NamedTuple):
    """Rows of a table by element: the elements `start` to `stop` of a layer."""

    number: int
    start: int
    stop: int


#: Blocks of rows handed over but not begun; so at most one more block is in memory.
_WAITING = 2


class ElementsWriter:
    """Writes `elements` for all splits of a span in one thread, which alone writes that table.

    This is a context manager; leave it before the writer of the shards.

    Args:
        writer: writer of the span's shards.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, "lcray-elements")  # started by the first rows
        self._pending: deque[Future[None]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> ElementsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, split: str, start_step: int, parts: Sequence[tuple[str, int, Tensor]]) -> None:
        """Hand over rows of one interval; blocks while too many rows wait.

        Args:
            split: the split.
            start_step: start step of the interval.
            parts: layer, index of its first element, and LC [n] float32, on any device; the thread
                owns them afterwards.

        Raises:
            OutputError: if writing earlier rows to disk failed.
        """
        while self._pending and (len(self._pending) > _WAITING or self._pending[0].done()):
            self._pending.popleft().result()
        ready = _computed(parts[0][2].device)
        self._pending.append(self._thread.submit(self._write, split, start_step, parts, ready))

    def drain(self) -> None:
        """Wait until all rows are written.

        Raises:
            OutputError: if writing rows to disk failed.
        """
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Stop, and drop waiting rows."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _write(
        self,
        split: str,
        start_step: int,
        parts: Sequence[tuple[str, int, Tensor]],
        ready: torch.cuda.Event | None,
    ) -> None:
        for layer, first, values in parts:
            lc = self._on_host(values, ready)
            index = np.arange(first, first + len(lc))
            columns = {"split": split, "start_step": start_step, "layer": layer}
            table = make_table("elements", {**columns, "index": index, "lc": lc})
            self._writer.write("elements", table)

    def _on_host(self, values: Tensor, ready: torch.cuda.Event | None) -> NDArray[np.float32]:
        """Copy from the device, in a stream of its own: the worker's does not wait."""
        if ready is None:
            return values.numpy()
        self._stream = self._stream or torch.cuda.Stream(values.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return values.cpu().numpy()


def _computed(device: torch.device) -> torch.cuda.Event | None:
    """What says that all work given to a GPU so far is done; None for a CPU, where it is."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
