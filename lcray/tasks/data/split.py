"""The data of a split, cut into batches that the plan fixes.

Every sample is in exactly one batch, and the sizes of the batches of a block differ by at most
one. A block is the whole split in its natural order; or, if groups need no extra passes, the
samples of one group; or, if batches are part of the loss, a seeded permutation of the split. If
samples were drawn from the split, a block holds the samples of one replicate only.

A split is read and hashed once, when it is opened; it can then be cut to any batch size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcray.errors import UsageError
from lcray.tasks.data.batches import Batches
from lcray.tasks.data.groups import Survey, confirmed, distinct, groups_of, labels_of, numbers_of
from lcray.tasks.data.pytree import Digest, count_bytes, map_tensors
from lcray.tasks.data.samples import Index, Samples, as_range, cut_block, open_samples
from lcray.tasks.data.sampling import Draw, draw
from lcray.tasks.task import Data, Task

CHUNK = 256  # samples that are read at a time when a split is opened

Place = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SplitData:
    """The batches of one split.

    Attributes:
        name: of the split.
        n_samples: samples that are evaluated.
        batches: on the device, or streamed to it; floats in the compute dtype. They are copies, so
            a loss that writes into its batch does not change the user's data.
        batch_sizes: number of samples per batch.
        labels: the group label per item of each batch, [n], on the host; empty without groups.
        numbers: the same as positions in `groups`, [n], on the device; ``len(groups)`` stands for
            items of no group, whose label is negative.
        present: the group numbers that occur in each batch, ascending.
        groups: the labels that occur, ascending.
        sorted_by_group: whether each batch holds one group.
        sha256: of the samples in their natural order, independent of the batches.
        drawn_from: samples in the data set, if some were drawn from it.
        replicates: the replicate of each batch; empty unless samples were drawn.
        n_replicates: the number of replicates; 0 unless samples were drawn.
    """

    name: str
    n_samples: int
    batches: Batches
    batch_sizes: tuple[int, ...]
    labels: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...]
    present: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    sorted_by_group: bool
    sha256: str
    drawn_from: int | None = None
    replicates: tuple[int, ...] = ()
    n_replicates: int = 0


@dataclass(frozen=True)
class SplitSource:
    """The data of one split, read once and ready to be cut; `open_split` makes it.

    Attributes:
        name: of the split.
        n_samples: samples to evaluate.
        groups: the group labels that occur, ascending.
        sorted_by_group: whether batches will hold one group each.
        sha256: of the samples in their natural order.
        draw: the samples that were drawn from the data set; None if all are evaluated.
        blocks: the numbers of the samples in the order of cutting; no batch spans two blocks.
    """

    name: str
    n_samples: int
    groups: tuple[int, ...]
    sorted_by_group: bool
    sha256: str
    draw: Draw | None
    blocks: tuple[Index, ...] = field(repr=False)
    _task: Task = field(repr=False)
    _samples: Samples = field(repr=False)
    _constants: tuple[int, ...] | None = field(repr=False)  # the label of each block's items
    _replicates: tuple[int, ...] = field(repr=False)  # of each block, if samples were drawn

    def cut(
        self,
        batch_size: int,
        *,
        place: Place,
        resident_bytes: int | None = None,
        keep: Callable[[int], range] | None = None,
    ) -> SplitData:
        """Cut the split into batches, without hashing it again.

        Labels per item are always kept. This reads every batch, unless the samples are sorted by
        group and have one item each.

        Args:
            batch_size: the largest number of samples per batch.
            place: moves a tensor to the device and dtype of the computation.
            resident_bytes: the most bytes that the placed batches may take together. If they
                would take more, they are streamed. None keeps them, whatever their size.
            keep: gives the numbers of the wanted batches, from the number of all batches; the
                others then have no labels and are not kept. None keeps all.

        Raises:
            TaskError: if samples cannot be made into batches, or their labels cannot be used.
        """
        cuts = self._cuts(batch_size)
        kept = range(len(cuts)) if keep is None else keep(len(cuts))
        read = partial(self._read, cuts)
        device = place(torch.zeros(0)).device
        labels: list[Tensor] | None = [] if self._needs_labels else None
        placed, nbytes = self._place(cuts, kept, read, place, resident_bytes, labels)
        groups, is_sorted = self.groups, True
        if labels is None:
            labels = self._constant_labels(batch_size)
        else:
            is_sorted = self.sorted_by_group and all(len(t.unique()) == 1 for t in labels)
            groups = groups_of(self.name, distinct(labels)) if keep is None else groups
            missing = torch.empty(0, dtype=torch.int64)
            after = len(cuts) - kept.start - len(labels)
            labels = [missing] * kept.start + labels + [missing] * after
        numbers = [numbers_of(label, groups) for label in labels]
        return SplitData(
            name=self.name,
            n_samples=self.n_samples,
            batches=Batches(
                len(cuts), read, place, device, placed=placed, nbytes=nbytes, first=kept.start
            ),
            batch_sizes=tuple(len(cut) for cut in cuts),
            labels=tuple(labels),
            numbers=tuple(number.to(device) for number in numbers),
            present=tuple(tuple(number.unique().tolist()) for number in numbers),
            groups=groups,
            sorted_by_group=bool(labels) and is_sorted,
            sha256=self.sha256,
            drawn_from=None if self.draw is None else self.draw.population,
            replicates=self._by_batch(self._replicates, batch_size),
            n_replicates=0 if self.draw is None else self.draw.n_replicates,
        )

    def excerpt(self, batch_size: int, count: int, *, place: Place) -> SplitData:
        """The `count` largest batches of a cut, resident and without groups, to try a batch size.

        Only their samples are read.

        Raises:
            TaskError: if samples cannot be made into batches.
        """
        cuts = sorted(self._cuts(batch_size), key=len, reverse=True)[:count]
        return self.gather(cuts, place=place)

    def pick(self, count: int, seed: int, batch_size: int, *, place: Place) -> SplitData:
        """`count` samples drawn without replacement, all if there are fewer; like `excerpt`."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        chosen = np.sort(rng.permutation(self.n_samples)[:count])
        return self.gather([*cut_block(chosen, batch_size)], place=place)

    def gather(self, cuts: Sequence[Index], *, place: Place) -> SplitData:
        """Samples by their numbers, one batch per entry of `cuts`, resident and without groups.

        Raises:
            TaskError: if samples cannot be made into batches.
        """
        read = partial(self._read, cuts)
        placed = [map_tensors(place, read(number)) for number in range(len(cuts))]
        device, nbytes = place(torch.zeros(0)).device, count_bytes(placed)
        return SplitData(
            name=self.name,
            n_samples=sum(len(cut) for cut in cuts),
            batches=Batches(len(cuts), read, place, device, placed=placed, nbytes=nbytes),
            batch_sizes=tuple(len(cut) for cut in cuts),
            labels=(),
            numbers=(),
            present=(),
            groups=(),
            sorted_by_group=False,
            sha256=self.sha256,
        )

    def _cuts(self, batch_size: int) -> list[Index]:
        return [cut for block in self.blocks for cut in cut_block(block, batch_size)]

    def _read(self, cuts: Sequence[Index], number: int) -> Any:
        where = f"task split {self.name!r}, batch {number}"
        return self._samples.batch(cuts[number], where)

    @property
    def _needs_labels(self) -> bool:
        return self._task.groups is not None and self._constants is None

    def _constant_labels(self, batch_size: int) -> list[Tensor]:
        if self._constants is None:
            return []
        return [
            torch.full((len(cut),), label)
            for block, label in zip(self.blocks, self._constants, strict=True)
            for cut in cut_block(block, batch_size)
        ]

    def _by_batch(self, by_block: tuple[int, ...], batch_size: int) -> tuple[int, ...]:
        if not by_block:
            return ()
        pairs = zip(self.blocks, by_block, strict=True)
        return tuple(number for block, number in pairs for _ in cut_block(block, batch_size))

    def _place(
        self,
        cuts: Sequence[Index],
        kept: range,
        read: Callable[[int], Any],
        place: Place,
        most: int | None,
        labels: list[Tensor] | None,
    ) -> tuple[list[Any] | None, int]:
        """The `kept` batches, placed, or None if they do not fit, and the bytes of all batches.

        Adds the labels of each to `labels`, if wanted.
        """
        placed: list[Any] | None = []
        taken = done = nbytes = 0
        n_samples = sum(len(cuts[number]) for number in kept)
        for number in kept:
            if placed is None and labels is None:
                break
            batch = read(number)
            if labels is not None:
                labels.append(labels_of(self.name, self._task, batch))
            if placed is None:
                continue
            placed.append(map_tensors(place, batch))
            taken, done = taken + count_bytes(placed[-1]), done + len(cuts[number])
            nbytes = -(-taken * n_samples // done)
            if most is not None and nbytes > most:
                placed = None
        return placed, nbytes


def open_split(
    name: str,
    data: Data,
    task: Task,
    *,
    fixed_seed: int | None,
    chunk: int = CHUNK,
    samples: int | None = None,
    sample_seed: int = 0,
) -> SplitSource:
    """Read a split once: hash it, and find its groups and the order of its samples.

    Args:
        name: of the split.
        data: its samples.
        task: for its collate function and its groups.
        fixed_seed: the seed of the permutation if batches are part of the loss, else None.
        chunk: samples that are read at a time.
        samples: the number to draw at random; the others are never read. None takes all.
        sample_seed: seed of the draw.

    Raises:
        TaskError: if samples cannot be read or made into batches, differ when read twice, or have
            group labels that cannot be used.
        UsageError: if samples are to be drawn although batches are part of the loss.
    """
    population = len(data[0] if isinstance(data, tuple) else data)  # type: ignore[arg-type]
    drawn = draw(name, population, samples, sample_seed)
    if drawn is not None and task.batch_loss:
        raise UsageError(
            f"samples {samples}: the task declares that batches are part of the loss "
            f"(batch_loss=True), so a single sample has no loss; take all of split {name!r}"
        )
    if drawn is not None and fixed_seed is not None:
        raise UsageError(
            f"samples {samples}: BatchNorm uses the statistics of a batch, so the loss depends on "
            f"batches, not samples; use --batch-norm running, or all of split {name!r}"
        )
    taken = open_samples(name, data, task, None if drawn is None else drawn.numbers)
    n = len(taken)
    digest = Digest()
    survey = Survey(sort=fixed_seed is None)
    for size, make in taken.scan(digest, chunk):
        if task.groups is not None:
            survey.add(labels_of(name, task, make()).numpy(), size)
    groups = groups_of(name, survey.known)
    blocks: tuple[Index, ...] = (range(n),)
    constants = None
    if fixed_seed is not None:
        rng = np.random.default_rng([fixed_seed, zlib.crc32(name.encode())])
        blocks = (rng.permutation(n),)
    by_sample = survey.labels()
    if by_sample is not None and not confirmed(name, task, taken, by_sample):
        by_sample = None
    if by_sample is not None:
        found = np.unique(by_sample).tolist()
        blocks = tuple(as_range(np.flatnonzero(by_sample == label)) for label in found)
        constants = tuple(found) if survey.one_item else None
    replicates: tuple[int, ...] = ()
    if drawn is not None:
        blocks, replicates, constants = _divided(drawn, blocks, constants)
    return SplitSource(
        name=name,
        n_samples=n,
        groups=groups,
        sorted_by_group=by_sample is not None,
        sha256=digest.hexdigest(),
        draw=drawn,
        blocks=blocks,
        _task=task,
        _samples=taken,
        _constants=constants,
        _replicates=replicates,
    )


def _divided(
    drawn: Draw, blocks: tuple[Index, ...], constants: tuple[int, ...] | None
) -> tuple[tuple[Index, ...], tuple[int, ...], tuple[int, ...] | None]:
    """Blocks of one replicate each, with the replicate and the constant label of each block."""
    parts = [(b, *part) for b, block in enumerate(blocks) for part in drawn.parts(block)]
    return (
        tuple(as_range(part) for _, _, part in parts),
        tuple(replicate for _, replicate, _ in parts),
        None if constants is None else tuple(constants[b] for b, _, _ in parts),
    )
