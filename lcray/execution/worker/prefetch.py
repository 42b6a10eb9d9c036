"""A walk along the checkpoints of a span: read ahead in a thread, straight into flat vectors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor

from lcray.allocation.path import Point, Segment
from lcray.checkpoints import CheckpointSeries, State
from lcray.errors import CheckpointError
from lcray.planning.plan import Span
from lcray.tasks.model.flat import FlatModel

_SMALL = 1 << 24  # bytes of a vector: up to this size two are read ahead, else one
_KEEP = 1 << 26  # bytes of all vectors of a span: up to this size none is read twice
Following = Callable[[], Segment | None]


class Walk:
    """Reads the checkpoints of a span in order; a context manager.

    Besides the two ends of the current interval, only the next checkpoint is in memory; for
    small models one more, or the whole span.

    Attributes:
        hashes: the sha256 of every checkpoint that was read, by step.

    Args:
        series: the run.
        flat: the model.
        dtypes: the dtype in which every checkpoint must store each tensor.
        hashes: hashes of checkpoints read before, which must not have changed; new ones are added.
        stamps: a value that changes when a checkpoint does, by step; new ones are added.
    """

    def __init__(
        self,
        series: CheckpointSeries,
        flat: FlatModel,
        dtypes: Mapping[str, torch.dtype],
        hashes: dict[int, str] | None = None,
        stamps: dict[int, str] | None = None,
    ) -> None:
        self._stamps = {} if stamps is None else stamps
        self.hashes = {} if hashes is None else hashes
        self._series, self._flat, self._dtypes = series, flat, dtypes
        self._depth = 2 if flat.theta.nbytes <= _SMALL else 1
        self._reader = ThreadPoolExecutor(1, "lcray-reader")
        self._kept: dict[int, Tensor] = {}

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def segments(self, span: Span) -> Iterator[tuple[Segment, Following]]:
        """Each segment, and a function that waits for the next one.

        Raises:
            CheckpointError: for a checkpoint that cannot be read, or does not fit the model.
        """
        waiting, ahead = iter(span.steps), deque[Future[Point]]()
        keeps = self._flat.theta.nbytes * len(span.steps) <= _KEEP

        def fill() -> None:
            while len(ahead) < self._depth and (step := next(waiting, None)) is not None:
                ahead.append(self._reader.submit(self.read, step))

        def take() -> Point | None:
            if not ahead:
                fill()
            if not ahead:
                return None
            point = ahead.popleft().result()
            if keeps:
                self._kept[point.step] = point.vector
            vector = point.vector.to(self._flat.theta.device, non_blocking=True)
            return Point(point.step, vector, point.constants)

        def after(start: Point) -> Segment | None:
            end = take()
            return None if end is None else Segment(start, end)

        first, second = take(), take()
        assert first is not None and second is not None, "an interval has two ends"
        segment: Segment | None = Segment(first, second)
        del first, second
        while segment is not None:
            fill()  # only now: the checkpoint that is no longer needed makes room
            following = cache(partial(after, segment.end))
            yield segment, following
            segment = following()

    def again(self, step: int) -> Tensor:
        """The vector [P] of a checkpoint of the span, on the CPU; the caller must not change it.

        Raises:
            CheckpointError: as `read`.
        """
        kept = self._kept.get(step)
        return self.read(step).vector if kept is None else kept

    def read(self, step: int) -> Point:
        """A checkpoint, on the CPU.

        Raises:
            CheckpointError: if it cannot be read, does not fit the model, or has changed.
        """
        vector, parts = self._flat.new_point()
        state = self._series.read(step, into=parts)
        if self.hashes.setdefault(step, state.sha256) != state.sha256:
            raise CheckpointError(
                f"checkpoint at step {step}: has changed since it was read first; keep the run as "
                "it is until the analysis is done"
            )
        self._stamps[step] = state.stamp
        self._check_dtypes(state)
        vector, constants = self._flat.flatten(state.tensors, step, vector, state.dtypes)
        return Point(step, vector, constants)

    def _check_dtypes(self, state: State) -> None:
        for name, dtype in state.dtypes.items():
            expected = self._dtypes.get(name, dtype)
            if dtype != expected:
                raise CheckpointError(
                    f"checkpoint at step {state.step}: tensor {name!r} is {dtype}, but {expected} "
                    "at the run's first step; narrow the run with --steps"
                )
