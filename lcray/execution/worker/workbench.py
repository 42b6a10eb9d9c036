"""A task on a device: its model on flat storage, its data in batches, its gradient engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
from torch import Tensor

from lcray.allocation.gradient import GradientEngine
from lcray.allocation.partial_sums import Seat, batches_of
from lcray.allocation.path import Point
from lcray.allocation.quadrature import get_rule
from lcray.errors import TaskError, UsageError
from lcray.planning.costs import vector_bytes
from lcray.planning.plan import DEFAULT_BATCH_SIZE, DEFAULT_MEMORY_FORMAT, memory_format_of
from lcray.settings import Settings
from lcray.tasks.data.samples import Index
from lcray.tasks.data.split import SplitData, SplitSource, open_split
from lcray.tasks.model.flat import FlatModel
from lcray.tasks.model.memory import available_bytes
from lcray.tasks.model.precision import check_float32, exact_float32
from lcray.tasks.task import Task, call_model, split_data

DTYPES = {"float32": torch.float32, "float64": torch.float64}
FISHER_BATCH = 64  # samples per batch for Fisher information
_ELEMENTS, _FEWEST = 1 << 23, 2  # in checks: most elements × samples; fewest samples
CHECK_SEED = 0  # seed of the samples in checks
LARGEST_BATCH = 8192  # samples
# Where midpoints take samples of batches: the fewest batches of a split, and sizes of a batch.
_SAMPLED_BATCHES, _SMALLEST_SAMPLED, _LARGEST_SAMPLED = 48, 16, 256
_SHARE = 0.8  # of the free memory; the rest is a reserve


@dataclass(frozen=True)
class Share:
    """The share of a machine that a process may use.

    Attributes:
        device: where to compute.
        threads: intra-op threads; None leaves torch as it is.
        memory: bytes that the process may take, of the GPU's memory if it is on one; None for a
            share of the free memory.
        sharers: number of processes sharing the free memory.
    """

    device: str = "cpu"
    threads: int | None = None
    memory: int | None = None
    sharers: int = 1


class Workbench:
    """A task's model and data, ready for gradients.

    Attributes:
        device: where it computes.
        settings: settings of the analysis.
        flat: the model.
        engine: evaluates losses and gradients.
        hashes: SHA-256 of each split's data, or of its drawn samples, in the task's order.
        drawn: samples taken and samples in the data set, for each split that is not taken whole.
        seat: which worker of a team this is.
        fisher_splits: the samples of each split for Fisher information, if asked for.
        fixed_batches: whether batches are part of the loss, so that their size must not be tuned.
        batch_size: the most samples per batch.
        memory_format: memory format of the model and its data, ``contiguous`` or ``channels_last``.
        base_bytes: memory of the process with model and task, before batches are made.
        room: bytes for batches and activations, half for each.

    Args:
        task: the task.
        settings: settings of the analysis.
        share: the share of the machine to use.
        partial_sums: number of parts in which gradients are summed.
        seat: which worker of a team this is.

    Raises:
        TaskError: if model or data break the contract.
        UsageError: for a split that does not exist, or samples that cannot be drawn.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        *,
        share: Share = Share(),
        partial_sums: int | None = None,
        seat: Seat | None = None,
    ) -> None:
        _configure_torch(share, settings.deterministic)
        self.device = _open_device(share.device)
        self.settings, self._task = settings, task
        self._dtype = DTYPES[settings.dtype]
        model = call_model(task)
        self.flat = FlatModel(model, self.device, self._dtype, partial=settings.partial)
        self.engine = GradientEngine(self.flat, task, settings.batch_norm)
        self.engine.partial_sums = settings.partial_sums or partial_sums or 1
        self.seat = seat or Seat()
        self._kept: int | None = None  # number of parts behind the seat's share; None: all
        self.fixed_batches = self.engine.fixed_batches
        self._samples_batches = get_rule(settings.rule).block > 0
        if self._samples_batches and self.fixed_batches:
            raise UsageError(
                f"rule {settings.rule!r}: takes samples of the batches, but here batches are part "
                "of the loss; use simpson"
            )
        self._sources: tuple[SplitSource, ...] | None = self._open()
        exact_float32()  # again: building the model, or opening the data, may have undone it
        check_float32(self.device)
        self.hashes = {source.name: source.sha256 for source in self._sources}
        self.drawn = {
            source.name: (source.n_samples, source.draw.population)
            for source in self._sources
            if source.draw is not None
        }
        self.memory_format = DEFAULT_MEMORY_FORMAT
        self.fisher_splits = self._pick()
        self._adopted = False
        self._splits: tuple[SplitData, ...] | None = None
        self.base_bytes = _taken_bytes(self.device)
        self.room = self._measure_room(share)
        self.batch_size = settings.batch_size or min(DEFAULT_BATCH_SIZE, self.largest_batch)
        self.set_memory_format(memory_format_of(settings) or DEFAULT_MEMORY_FORMAT)

    @property
    def sources(self) -> tuple[SplitSource, ...]:
        """The data as they were opened, in the task's order."""
        if self._sources is None:
            self._sources = self._open()
        return self._sources

    @property
    def splits(self) -> tuple[SplitData, ...]:
        """The data in batches, in the task's order: resident if they fit, else streamed."""
        if self._splits is None:
            self._splits = self._cut()
            exact_float32()  # the task's last action before gradients
            check_float32(self.device)
            if self._adopted and all(split.batches.resident for split in self._splits):
                self._sources = None  # batches now hold copies of them
        return self._splits

    def adopt(
        self, batch_size: int, memory_format: str, partial_sums: int = 1, *, whole: bool = True
    ) -> None:
        """Adopt the choices of a plan; data and model are laid out anew only if they change.

        Args:
            batch_size: the most samples per batch.
            memory_format: ``contiguous`` or ``channels_last``.
            partial_sums: number of parts in which gradients are summed.
            whole: whether all batches are needed, or only those of this seat.

        Raises:
            TaskError: if samples cannot be made into batches of this size.
        """
        kept = None if whole or self.seat.team == 1 else partial_sums
        if batch_size != self.batch_size or not self._serves(kept):
            self.batch_size, self._splits, self._kept = batch_size, None, kept
        self.engine.partial_sums = partial_sums
        self._adopted = True
        self.set_memory_format(memory_format)

    def _serves(self, kept: int | None) -> bool:
        """Whether the splits are available: only these batches, or all of them, resident."""
        all_there = self._kept is None and self._splits is not None
        return self._kept == kept or (
            all_there and all(split.batches.resident for split in self.splits)
        )

    def set_memory_format(self, memory_format: str) -> None:
        """Lay out model and data in `memory_format`."""
        if memory_format != self.memory_format:
            self._splits = None
            self.flat.set_memory_format(memory_format)
            self.memory_format = memory_format

    @property
    def largest_batch(self) -> int:
        """The most samples per batch that a probe may choose: samples of batches need many."""
        if not self._samples_batches:
            return LARGEST_BATCH
        n_samples = max(source.n_samples for source in self.sources)
        return max(_SMALLEST_SAMPLED, min(_LARGEST_SAMPLED, n_samples // _SAMPLED_BATCHES))

    def base_hash(self) -> str:
        """SHA-256 of the model's own values if checkpoints are partial, else empty."""
        base = self.flat.base
        return "" if base is None else hashlib.sha256(base.numpy().data).hexdigest()

    def few(self, most: int) -> int:
        """Number of samples per split in checks: at most `most`, fewer for large models."""
        return max(_FEWEST, min(most, _ELEMENTS // max(1, self.flat.layout.size)))

    def sample(self, number: int, batch_size: int, count: int = 1) -> SplitData:
        """Samples spread over a split, the same every time, in `count` batches without groups."""
        source = self.sources[number]
        return source.pick(batch_size * count, CHECK_SEED, batch_size, place=self._place)

    def excerpt(self, number: int, batch_size: int, count: int = 1) -> SplitData:
        """The largest `count` batches of a split cut to `batch_size`, without groups."""
        return self.sources[number].excerpt(batch_size, count, place=self._place)

    def placed(self, point: Point) -> Point:
        """`point` with its vector on the device."""
        return replace(point, vector=point.vector.to(self.device))

    def gather(
        self, source: SplitSource, cuts: Sequence[Index], dtype: torch.dtype | None = None
    ) -> SplitData:
        """Samples by their numbers, one batch for each of `cuts`, without groups.

        Args:
            source: the split.
            cuts: the numbers of each batch.
            dtype: dtype of floats, after rounding to the compute dtype; None for the compute dtype.
        """

        def place(tensor: Tensor) -> Tensor:
            tensor = self._place(tensor)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return source.gather(cuts, place=self._place if dtype is None else place)

    def _open(self) -> tuple[SplitSource, ...]:
        seed = self.settings.batch_seed if self.fixed_batches else None
        data = split_data(self._task, self.settings.splits)
        return tuple(
            open_split(
                name,
                part,
                self._task,
                fixed_seed=seed,
                samples=self.settings.samples,
                sample_seed=self.settings.sample_seed,
            )
            for name, part in data.items()
        )

    def _pick(self) -> tuple[SplitData, ...]:
        settings = self.settings
        if settings.fisher is None:
            return ()
        if self._task.batch_loss:
            raise TaskError(
                "task: declares that batches are part of the loss (batch_loss=True), so no sample "
                "has a loss of its own: there is no Fisher information; leave --fisher out"
            )
        if self.fixed_batches:
            raise TaskError(
                "model: has BatchNorm layers without running statistics, so that no sample has a "
                "loss of its own: there is no Fisher information; leave --fisher out"
            )
        count, seed = settings.fisher_samples, settings.fisher_seed
        assert self._sources is not None
        return tuple(s.pick(count, seed, FISHER_BATCH, place=self._place) for s in self._sources)

    def _cut(self) -> tuple[SplitData, ...]:
        splits, left = [], self.room // 2  # the other half is for activations
        keep = None if self._kept is None else partial(batches_of, self.seat, self._kept)
        for source in self.sources:
            split = source.cut(self.batch_size, place=self._place, resident_bytes=left, keep=keep)
            left -= split.batches.nbytes if split.batches.resident else 0
            splits.append(split)
        return tuple(splits)

    def _place(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device=self.device)
        tensor = tensor.to(device=self.device, dtype=self._dtype)
        if self.memory_format == "channels_last" and tensor.dim() in _CHANNELS_LAST:
            tensor = tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
        return tensor

    def _measure_room(self, share: Share) -> int:
        if share.memory is None:
            room = int(_SHARE * available_bytes(self.device) / share.sharers)
        else:
            room = share.memory - self.base_bytes
        sizes = self.flat.layout.size, len(self.hashes)
        vectors = vector_bytes(
            *sizes, self.settings.dtype, self.engine.partial_sums, sampled=self._samples_batches
        )
        return max(0, room - vectors)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _taken_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _open_device(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # torch raises whatever the device's library does
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"device {device!r}: cannot be used: {reason}; try cpu") from error


def _configure_torch(share: Share, deterministic: bool) -> None:
    if share.threads is not None:
        torch.set_num_threads(share.threads)
    exact_float32()
    if share.device != "cpu":
        torch.backends.cudnn.benchmark = False
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
