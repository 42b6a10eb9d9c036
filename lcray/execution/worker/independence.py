"""Whether items have losses of their own, and weights that come from the data.

The loss of a split is Σ w ℓ / Σ w over its items. It is a function of the model's parameters alone
only if ℓ and w of an item do not depend on the other items of its batch, and w does not depend on
the model.
Otherwise the size of batches, and how they are sorted, would decide the answer.

So items are compared between a batch and smaller batches of the same samples. At the first point,
the batch is a planned batch, in the order of its samples' losses: a loss that selects hard items
then selects others. At both points, the batch is also a mixture of samples of several groups, and
each smaller batch has one group, in the order of the data; at the first point, only if planned
batches have one group each. The smaller batches grow from two samples on, since statistics of small
batches differ most. Items are compared as sets, because a batch may order its items in any way, and
items of weight 0 are left out, because padding depends on the longest sample of a batch. If a split
was evaluated before, so was the planned batch: the rest takes one forward pass of a batch of each
split, and two of a mixture.

Legend: B samples per batch, n items.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcray.allocation.gradient import GradientEngine
from lcray.allocation.path import Point, Segment
from lcray.allocation.sums import Evaluation
from lcray.errors import CheckpointError, TaskError
from lcray.execution.worker.workbench import Workbench
from lcray.tasks.data.samples import Index, cut_block
from lcray.tasks.data.split import SplitData, SplitSource
from lcray.tasks.model.flat import FlatModel
from lcray.tasks.model.precision import exact_float32
from lcray.tasks.task import Task, call_model

#: How far the loss of an item may differ between batches, relative to its own size and the mean
#: |loss|. Kernels that round differently for other sizes of a batch are some 1e-6 apart in float32,
#: which a float64 model may hold parts of. Larger differences are compared again in float64, where
#: rounding nearly vanishes, even if losses are small differences of large numbers.
TOLERANCE = 1e-5
_LOOSE = 10 * TOLERANCE  # if the model does not compute in float64
_FEWEST, _MOST = 8, 64  # samples of a mixture; an eighth of a batch in between
_GROUPS = 6  # number of groups in a mixture

CURE = "if batches are meant to be part of the loss, declare it: Task(batch_loss=True)"

Numbers = NDArray[np.int64]
Found = list[tuple[Tensor, Tensor | None]]


class Independence:
    """Compares items between batches, and their weights between points.

    Args:
        bench: the task on a device; it has the batch size and memory format of the plan.
        task: the task.
    """

    def __init__(self, bench: Workbench, task: Task) -> None:
        self._bench, self._task = bench, task
        self._sources = bench.sources  # the bench drops them once it has made its batches
        self._scales: dict[str, float] = {}
        self._weights: dict[str, tuple[int, Tensor | None]] = {}
        self._known: dict[str, Found] = {}  # items of planned batches at the first point

    def evaluate(self, split: SplitData) -> Evaluation:
        """The loss of a split at the first point; `check` takes the items of a batch from it.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        sizes = split.batch_sizes
        planned = sizes.index(max(sizes))

        def keep(index: int, losses: Tensor, weights: Tensor | None) -> None:
            if index == planned:
                self._known[split.name] = [(losses, weights)]

        engine = self._bench.engine
        engine.on_items = keep
        try:
            return engine.evaluate(split, None)
        finally:
            engine.on_items = None

    def check(self, points: Iterable[Point]) -> None:
        """Compare at some points of the run; the model stays at the last one.

        If batches are part of the loss, only weights are compared.

        Raises:
            TaskError: if items or weights differ; it names the split, the difference and the cure.
        """
        for number, point in enumerate(points):
            Segment(point, point).set_point(self._bench.flat, 0.0)
            for source in self._sources:
                if self._bench.fixed_batches:
                    batch = self._planned_batch(source)
                    self._check_weights(source.name, point, self._items(source, [batch]))
                    continue
                if number == 0:
                    self._check_first(source, point)
                else:
                    self._check_mixture(source, point)

    def _planned_batch(self, source: SplitSource) -> Numbers:
        """The samples of the first of the split's largest batches."""
        size = self._bench.batch_size
        cuts = (cut for block in source.blocks for cut in cut_block(block, size))
        return np.asarray(max(cuts, key=len))

    def _check_first(self, source: SplitSource, point: Point) -> None:
        """Compare a planned batch; and a mixture, if batches have one group or items have weights.

        Otherwise a planned batch already is a mixture of more samples.
        """
        batch = self._planned_batch(source)
        found = self._known.get(source.name) or self._items(source, [batch])
        if len(batch) > 1:
            pieces = list(growing(batch[_by_loss(found, len(batch))]))
            self._compare(source, point, batch, pieces, found)
        mixed = len(batch) > 1 and len(source.blocks) == 1
        if not mixed or found[0][1] is not None:
            self._check_mixture(source, point, compare=not mixed)

    def _check_mixture(self, source: SplitSource, point: Point, *, compare: bool = True) -> None:
        settings = self._bench.settings
        rng = np.random.default_rng([settings.batch_seed, zlib.crc32(source.name.encode())])
        eighth = max(_FEWEST, len(self._planned_batch(source)) // 8)
        most = min(_MOST, eighth, self._bench.batch_size)  # more might not fit into memory
        pieces = mixture(source.blocks, most, rng)
        whole = rng.permutation(np.concatenate(pieces))
        found = self._items(source, [whole])
        self._check_weights(source.name, point, found)
        if compare and len(whole) > 1:
            self._compare(source, point, whole, pieces, found)

    def _check_weights(self, name: str, point: Point, found: Found) -> None:
        """Refuse weights of a batch that differ from an earlier point in any bit."""
        where, weights = f"task loss on split {name!r}", found[0][1]
        step, known = self._weights.setdefault(name, (point.step, weights))
        if weights is None or known is None or weights is known:
            return
        if len(weights) != len(known):
            raise TaskError(
                f"{where}: {len(known)} items at step {step}, {len(weights)} at step {point.step} "
                "of the same samples; their number must not change"
            )
        if not torch.equal(weights, known):
            item = int((weights != known).nonzero()[0])
            raise TaskError(
                f"{where}: an item has weight {float(known[item]):g} at step {step} and "
                f"{float(weights[item]):g} at step {point.step}; weights must come from the data "
                "alone, not from the model; multiply the losses by factors that depend on it"
            )

    def _compare(
        self,
        source: SplitSource,
        point: Point,
        whole: Numbers,
        pieces: Sequence[Numbers],
        found: Found,
    ) -> None:
        """Refuse items of `pieces` that differ from `found`, the items of the batch `whole`."""
        where = f"task loss on split {source.name!r}"
        try:
            parts = self._items(source, pieces)
        except TaskError as error:
            raise TaskError(
                f"{error}; it takes a batch of {len(whole)} samples, but not of "
                f"{min(map(len, pieces))} to {max(map(len, pieces))}; a loss must take batches of "
                f"any size; {CURE}"
            ) from error
        problem = self._difference(source, found, parts)
        if problem is None:
            return
        if self._difference(source, found, self._items(source, [whole])) is not None:
            raise TaskError(
                f"{where}: losses differ the second time at the same weights; switch sampling, "
                "dropout by hand and augmentation off"
            )
        if self._bench.settings.dtype == "float32":
            again = self._in_float64(source, point, whole, pieces)
            tolerance = _LOOSE if again is None else TOLERANCE
            problem = self._difference(source, *(again or (found, parts)), tolerance)
        if problem is not None:
            raise TaskError(
                f"{where}: items depend on the others of their batch, so the size of batches would "
                f"decide the answer: between {len(whole)} samples in one batch and in smaller "
                f"ones, {problem}; {CURE}"
            )

    def _difference(
        self, source: SplitSource, whole: Found, parts: Found, tolerance: float = TOLERANCE
    ) -> str | None:
        """The difference beyond rounding, in words; None if there is none."""
        one, other = _Items.of(whole), _Items.of(parts)
        if one.n != other.n:
            return f"{one.n} and {other.n} items have weight (padding must have weight 0)"
        if len(one.losses) != len(other.losses):
            return f"{len(one.losses)} and {len(other.losses)} losses are finite"
        scale = max(_mean(one.losses), _mean(other.losses), self._scales.get(source.name, 0.0))
        self._scales[source.name] = scale
        heavy = _mean(one.weights)
        columns = {
            "losses": (one.losses, other.losses, scale),
            "weights": (one.weights, other.weights, heavy),
            "losses times weights": (one.products, other.products, scale * heavy),
        }
        for what, (left, right, size) in columns.items():
            apart = (left - right).abs()
            if bool((apart > tolerance * (left.abs() + size)).any()):
                return f"{what} differ by up to {float(apart.max()):.3g}, at a mean of {size:.3g}"
        return None

    def _items(self, source: SplitSource, cuts: Sequence[Numbers]) -> Found:
        """The items of batches, which are read anew because a loss may write into its batch."""
        return self._bench.engine.items(self._bench.gather(source, cuts))

    def _in_float64(
        self, source: SplitSource, point: Point, whole: Numbers, pieces: Sequence[Numbers]
    ) -> tuple[Found, Found] | None:
        """Both, by a model in double precision; None if that fails."""
        bench, settings = self._bench, self._bench.settings
        try:
            model = call_model(self._task)
            exact_float32()  # building it may have undone that
            flat = FlatModel(model, bench.device, torch.float64, partial=settings.partial)
            flat.set_memory_format(bench.memory_format)
            Segment(point, point).set_point(flat, 0.0)
            engine = GradientEngine(flat, self._task, settings.batch_norm)
            batches = (bench.gather(source, cuts, torch.float64) for cuts in ([whole], pieces))
            one, other = (engine.items(split) for split in batches)
        except (TaskError, RuntimeError, MemoryError):  # made for float32, or too large
            return None
        return one, other


@dataclass(frozen=True)
class _Items:
    """The items with weight in some batches, each column sorted.

    Attributes:
        n: number of items.
        losses: finite losses, float64.
        weights: all weights, float64; 1 if the loss gives none.
        products: weights times losses, for finite losses, float64.
    """

    n: int
    losses: Tensor
    weights: Tensor
    products: Tensor

    @classmethod
    def of(cls, found: Found) -> _Items:
        """The items of all batches together."""
        losses = torch.cat([losses for losses, _ in found]).double().cpu()
        given = [torch.ones_like(losses) if w is None else w for losses, w in found]
        weights = torch.cat(given).double().cpu()
        losses, weights = losses[weights > 0], weights[weights > 0]
        finite = losses.isfinite()
        columns = losses[finite], weights, (losses * weights)[finite]
        return cls(len(losses), *(column.sort().values for column in columns))


def two_points(steps: Sequence[int], read: Callable[[int], Point]) -> Iterator[Point]:
    """The first checkpoint of a run and, if one can be read and is finite, a later one."""
    yield read(steps[0])
    later = steps[1:]
    # The last one may still be in the making.
    for step in dict.fromkeys((*later[-2:-1], later[len(later) // 2], later[0])):
        try:
            point = read(step)
        except CheckpointError:  # the span that needs it says more
            continue
        if Segment(point, point).is_finite:
            yield point
            return


def growing(order: Numbers) -> Iterator[Numbers]:
    """`order` in pieces of 2, 3, 5, 8, … numbers; the last piece also takes a single remainder.

    Up to three numbers make two pieces, one of them with a single number.
    """
    sizes, edges, n = (2, 3), [0], len(order)
    if 1 < n < 4:
        edges.append(1)
    while edges[-1] < n:
        left = n - edges[-1]
        edges.append(edges[-1] + (sizes[0] if left - sizes[0] > 1 else left))
        sizes = sizes[1], sum(sizes)
    return (order[a:b] for a, b in pairwise(edges))


def mixture(blocks: Sequence[Index], most: int, rng: np.random.Generator) -> list[Numbers]:
    """At most `most` samples of a few blocks, in pieces of one block each and in its order.

    Args:
        blocks: the numbers of samples, by block.
        most: number of samples, at most.
        rng: chooses blocks and samples.
    """
    sizes = np.array([len(block) for block in blocks])
    chosen = sorted(rng.permutation(len(blocks)), key=lambda b: sizes[b] < 2)
    chosen = chosen[: min(_GROUPS, most if most < 4 else most // 2)]
    share = most // len(chosen)
    parts = [np.asarray(blocks[b])[np.sort(rng.permutation(sizes[b])[:share])] for b in chosen]
    if len(parts) == 1:
        return list(growing(parts[0]))
    return [piece for part in parts for piece in (growing(part) if len(part) > 3 else [part])]


def _by_loss(found: Found, n_samples: int) -> NDArray[np.int64]:
    """The samples of a batch sorted by loss; unchanged if items do not tell samples."""
    losses, weights = found[0]
    if not len(losses) or len(losses) % n_samples:
        return np.arange(n_samples)
    products = losses if weights is None else torch.where(weights > 0, losses, 0) * weights
    by_sample = products.double().view(n_samples, -1).sum(1).nan_to_num()
    return np.asarray(by_sample.argsort(stable=True).cpu())


def _mean(values: Tensor) -> float:
    return float(values.abs().mean()) if len(values) else 0.0
