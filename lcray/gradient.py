"""The full-batch loss and gradient at a point: the hot loop.

Legend: P elements, L layers, G groups, R replicates of a sample, D directions, n items a batch.

    L(θ) = Σ w ℓ(θ) / Σ w,        g(θ) = ∂L/∂θ

over every item of a split exactly once. The passes run in the compute dtype; sums over batches are
in float64, in the order of the batches, so that a result is a function of the point alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcray.convolution import PaddedConvolutions
from lcray.data import SplitData
from lcray.errors import TaskError, brief
from lcray.flat import FlatModel
from lcray.normalization import Normalization, depends_on_batches
from lcray.path import Segment
from lcray.task import Task
from lcray.vectors import zeros


@dataclass(frozen=True)
class Evaluation:
    """The loss of a split at a point.

    Attributes:
        loss: the mean loss; NaN or infinite where the model's is.
        total_weight: Σ w.
        n_items: items.
        group_weights: Σ w of each group, [G].
        group_dots: the directional derivatives of each group's own mean loss along each direction,
            then of each replicate's, by layer, [D, G + R, L] float64; None without groups and
            replicates, or without directions.
        replicate_weights: Σ w of each replicate, [R]; empty unless samples were drawn.
        replicate_losses: the mean loss of each, [R]; 0 where it has no weight.
    """

    loss: float
    total_weight: float
    n_items: int
    group_weights: tuple[float, ...]
    group_dots: Tensor | None
    replicate_weights: tuple[float, ...] = ()
    replicate_losses: tuple[float, ...] = ()


class GradientEngine:
    """Evaluates loss and gradient of any split at the model's current point.

    Args:
        flat: the model.
        task: its loss.
        batch_norm: ``running`` or ``batch``.
    """

    def __init__(self, flat: FlatModel, task: Task, batch_norm: str) -> None:
        self.flat = flat
        self._loss = task.loss
        fixed = depends_on_batches(flat.model, batch_norm)
        self._normalization = Normalization(batch_norm, fixed_batches=fixed)
        self._always = fixed
        self._untried = True

    def new_vector(self) -> Tensor:
        """A float64 vector [P] of zeros on the device, for gradients and their sums."""
        return zeros(len(self.flat.theta), torch.float64, self.flat.theta.device)

    def evaluate(
        self,
        split: SplitData,
        out: Tensor | None,
        directions: Sequence[Segment] = (),
        *,
        share: float | None = None,
    ) -> Evaluation:
        """Loss, and gradient where asked for, of `split` at the current point.

        Args:
            split: the batches.
            out: where the gradient goes, [P] float64; None evaluates the loss alone.
            directions: paths along which to take the directional derivatives of groups and
                replicates.
            share: add this times Σ w ∂ℓ/∂θ to `out`, instead of replacing what is there by the
                gradient of the mean.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        replaces, share = share is None, 1.0 if share is None else share
        divided = split.labels or split.replicates
        sums = _Sums(self.flat, split, directions if divided else (), out, share)
        if out is not None:
            if replaces:
                out.zero_()
            self.flat.forget_gradients()
        with self._functions(), torch.enable_grad():
            for index, batch in enumerate(split.batches):
                losses, weights = self.item_losses(split, index, batch)
                sums.add_losses(index, losses, weights)
                if out is not None:
                    self._add_gradients(split, index, losses, weights, sums)
        self.flat.check_tied()
        found = sums.result()
        if replaces and out is not None:
            out.div_(found.total_weight)
        return found

    @contextmanager
    def _functions(self) -> Iterator[None]:
        """Our own versions of some functions.

        An evaluation that succeeds tells whether the model normalizes at all.
        """
        with ExitStack() as stack:
            if self._always or self._untried or self._normalization.used:
                stack.enter_context(self._normalization)
            # By a rule that knows no history: workers must compute alike.
            if self.flat.layout.memory_format == "channels_last":
                stack.enter_context(PaddedConvolutions())
            yield
        self._untried = False

    def _add_gradients(
        self, split: SplitData, index: int, losses: Tensor, weights: Tensor | None, sums: _Sums
    ) -> None:
        weighted = losses if weights is None else torch.where(weights > 0, losses, 0) * weights
        parts = sums.parts(index, weighted)
        for number, (rows, part) in enumerate(parts):
            self.flat.receiver = partial(sums.add_gradient, rows)
            try:
                part.sum().backward(retain_graph=number + 1 < len(parts))
            except Exception as error:
                raise _failed(_where(split, index), "its backward pass failed", error) from error
            finally:
                self.flat.receiver = None

    def item_losses(self, split: SplitData, index: int, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The losses [n] of a batch and their weights, checked.

        Raises:
            TaskError: if the task's loss fails or breaks the contract.
        """
        where = _where(split, index)
        try:
            result = self._loss(self.flat.model, batch)
        except TaskError:
            raise
        except Exception as error:
            raise _failed(where, "failed", error) from error
        if isinstance(result, tuple) and len(result) != 2:
            raise TaskError(
                f"{where}: gave {len(result)} values, not losses, or losses and weights"
            )
        losses, weights = result if isinstance(result, tuple) else (result, None)
        _check_losses(where, losses, split.batch_sizes[index])
        if weights is not None:
            _check_weights(where, losses, weights)
            # At least float32: 16 bits would round the weights themselves.
            weights = weights.detach().to(torch.promote_types(losses.dtype, torch.float32))
        if split.labels and len(split.labels[index]) != len(losses):
            raise TaskError(
                f"{where}: {len(losses)} losses but {len(split.labels[index])} group labels; "
                "groups must give one label per item"
            )
        return losses, weights


class _Sums:
    """Sums over the batches of one evaluation, all float64.

    What a batch gives stays on the device until the end: fetching it would make the device wait.
    """

    def __init__(
        self,
        flat: FlatModel,
        split: SplitData,
        directions: Sequence[Segment],
        out: Tensor | None,
        share: float,
    ) -> None:
        self._flat, self._split, self._share = flat, split, share
        self._targets = [] if out is None else [out[where] for where in flat.slices]
        self._directions = () if out is None else directions
        n_rows = len(split.groups) + split.n_replicates
        shape = (len(self._directions), n_rows, len(flat.layers))
        self._dots = torch.zeros(shape, dtype=torch.float64, device=flat.theta.device)
        self._indices: list[int] = []  # of the batches that the lists below are of
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._lowest: list[Tensor] = []  # weights, where there are any
        self._group_weights: list[Tensor] = []
        self._n_items = 0

    def add_losses(self, index: int, losses: Tensor, weights: Tensor | None) -> None:
        exact = losses.detach().double()
        if weights is None:
            mass = torch.ones_like(exact)
        else:
            mass = weights.double()
            exact = torch.where(mass > 0, exact, 0.0) * mass
            if mass.numel():
                self._lowest.append(mass.min())
        self._indices.append(index)
        self._losses.append(exact.sum())
        self._weights.append(mass.sum())
        self._n_items += len(losses)
        if self._split.labels:
            self._add_group_weights(self._split.numbers[index], mass)

    def _add_group_weights(self, numbers: Tensor, mass: Tensor) -> None:
        # One place more, at the end, for items of no group: label < 0.
        found = torch.zeros(len(self._split.groups) + 1, dtype=torch.float64, device=mass.device)
        self._group_weights.append(found.index_add_(0, numbers, mass))

    def parts(self, index: int, weighted: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        """What to differentiate in turn: everything at once, or one group after another.

        With the rows of the dots that each counts in: its group's, and its replicate's.
        """
        if not self._directions:
            return [((), weighted)]
        split, none = self._split, len(self._split.groups)
        sample = (none + split.replicates[index],) if split.replicates else ()
        if not split.labels:
            return [(sample, weighted)]
        present = split.present[index]
        if len(present) == 1:
            return [((*(k for k in present if k < none), *sample), weighted)]
        numbers = split.numbers[index]
        return [((k, *sample), weighted[numbers == k]) for k in present if k < none]

    def add_gradient(self, rows: tuple[int, ...], number: int, gradient: Tensor) -> None:
        """Take a layer's gradient [n] of the part of a batch that counts in `rows`."""
        if len(gradient) <= self._flat.block:
            self._targets[number].add_(gradient, alpha=self._share)
            if rows:
                self._add_dots(rows, number, 0, gradient)
            return
        # In blocks: whole, the float64 copy of a large layer would be one more vector.
        for start in range(0, len(gradient), self._flat.block):
            piece = gradient[start : start + self._flat.block]
            self._targets[number][start : start + len(piece)].add_(piece, alpha=self._share)
            if rows:
                self._add_dots(rows, number, start, piece)

    def _add_dots(self, rows: tuple[int, ...], number: int, start: int, piece: Tensor) -> None:
        first = self._flat.slices[number].start + start
        where = slice(first, first + len(piece))
        for dots, direction in zip(self._dots, self._directions, strict=True):
            found = (direction.difference(where) * piece).sum()
            for row in rows:
                dots[row, number] += found

    def result(self) -> Evaluation:
        losses, weights, lowest = (
            torch.stack(found).tolist() if found else []
            for found in (self._losses, self._weights, self._lowest)
        )
        weight = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
        if not math.isfinite(weight) or any(not low >= 0 for low in lowest):
            raise TaskError(
                f"task loss on split {self._split.name!r}: weights must be finite and not negative"
            )
        if not weight > 0:
            raise TaskError(
                f"task loss: the weights of split {self._split.name!r} add up to {weight}"
            )
        # A plain sum first: fsum refuses sums that overflow or mix infinities.
        total = sum(losses)
        total = math.fsum(losses) if math.isfinite(total) else total
        masses, of_replicates = self._masses(), self._by_replicate(weights)
        dots = None
        if self._directions:
            scale = torch.tensor([m or 1.0 for m in masses + of_replicates], dtype=torch.float64)
            dots = self._dots / scale.to(self._dots.device)[None, :, None]
        return Evaluation(
            loss=total / weight,
            total_weight=weight,
            n_items=self._n_items,
            group_weights=masses,
            group_dots=dots,
            replicate_weights=of_replicates,
            replicate_losses=tuple(
                part / (mass or 1.0)
                for part, mass in zip(self._by_replicate(losses), of_replicates, strict=True)
            ),
        )

    def _by_replicate(self, batches: Sequence[float]) -> tuple[float, ...]:
        """Sums of what the batches gave, [R]."""
        parts: list[list[float]] = [[] for _ in range(self._split.n_replicates)]
        if parts:
            for index, part in zip(self._indices, batches, strict=True):
                parts[self._split.replicates[index]].append(part)
        return tuple(math.fsum(p) if math.isfinite(sum(p)) else sum(p) for p in parts)

    def _masses(self) -> tuple[float, ...]:
        if not self._group_weights:
            return (0.0,) * len(self._split.groups)
        *masses, stray = torch.stack(self._group_weights).sum(0).tolist()
        if stray > 0:
            raise TaskError(
                f"task groups: negative label in split {self._split.name!r} for an item with "
                "weight; labels must be >= 0 where the weight is positive"
            )
        return tuple(masses)


def layer_dots(flat: FlatModel, gradient: Tensor, segment: Segment) -> Tensor:
    """Σ g·Δ over each layer, [L] float64, a block at a time; `gradient` is [P]."""
    # Into one tensor: small ones that stay would keep the heap from using the blocks' room again.
    sums = torch.zeros(len(flat.layers), dtype=torch.float64, device=gradient.device)
    size = next(flat.blocks()).stop
    for block, pieces in flat.layout.pieces(size):
        product = segment.difference(block) * gradient[block]
        for number, where in pieces:
            sums[number] += product[where].sum()
    return sums


def _where(split: SplitData, index: int) -> str:
    return f"task loss on split {split.name!r}, batch {index}"


def _failed(where: str, what: str, error: Exception) -> TaskError:
    return TaskError(f"{where}: {what}: {brief(error)}")


def _check_losses(where: str, losses: Any, batch_size: int) -> None:
    if not isinstance(losses, Tensor):
        raise TaskError(f"{where}: must give a tensor [n], gave a {type(losses).__name__}")
    reduced = losses.dim() == 0 or (losses.shape == (1,) and batch_size > 1)
    if reduced:
        raise TaskError(
            f"{where}: gave a single number for {batch_size} samples; give one loss per item "
            "(reduction='none'; weight 0 for items that do not count)"
        )
    if losses.dim() != 1:
        raise TaskError(f"{where}: gave shape {list(losses.shape)}, must be [n]; flatten it")
    if not losses.is_floating_point():
        raise TaskError(f"{where}: gave {losses.dtype}, must be a float tensor")
    if not losses.requires_grad:
        raise TaskError(
            f"{where}: has no gradient; remove no_grad, detach or inference_mode from the loss"
        )


def _check_weights(where: str, losses: Tensor, weights: Any) -> None:
    if not isinstance(weights, Tensor) or weights.shape != losses.shape:
        shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise TaskError(f"{where}: weights {shape} do not match the losses {list(losses.shape)}")
