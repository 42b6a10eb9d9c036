"""Sums over batches of losses, weights and gradients: in total, by group and by replicate.

Legend: P elements, L layers, G groups, R replicates of a sample, D directions, n items per batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lcray.allocation.partial_sums import PartSums
from lcray.allocation.path import Segment
from lcray.errors import TaskError
from lcray.tasks.data.split import SplitData
from lcray.tasks.model.flat import FlatModel

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio: its multiples spread evenly


@dataclass(frozen=True)
class Evaluation:
    """The loss of a split at a point.

    Attributes:
        loss: the mean loss; NaN or infinite if the model's loss is.
        total_weight: Σ w.
        n_items: items.
        group_weights: Σ w of each group, [G].
        group_dots: the directional derivatives of each group's own mean loss along each direction,
            then of each replicate's, by layer, [D, G + R, L] float64; None without groups and
            replicates, or without directions.
        replicate_weights: Σ w of each replicate, [R]; empty unless samples were drawn.
        replicate_losses: the mean loss of each replicate, [R]; 0 if it has no weight.
        first_weighted: number of the first batch with weight.
        weight_marks: a hash of the weights of each batch that has weights, item by item.
    """

    loss: float
    total_weight: float
    n_items: int
    group_weights: tuple[float, ...]
    group_dots: Tensor | None
    replicate_weights: tuple[float, ...] = ()
    replicate_losses: tuple[float, ...] = ()
    first_weighted: int = 0
    weight_marks: tuple[int, ...] = ()


class Tap:
    """Takes in the gradient of one batch on its way, for a sample of the batches.

    Args:
        flat: the model.
        path: an interval.
        factor: of the gradient.
        products: gets factor · Σ g·Δ over each layer, [L] float64.
        expansion: one more factor, of `vector` and `groups`.
        vector: gets the gradient, [P] float64; None for nobody.
        groups: gets the products by group, [G, L] float64; None for nobody.
    """

    def __init__(
        self,
        flat: FlatModel,
        path: Segment,
        factor: float,
        products: Tensor,
        *,
        expansion: float,
        vector: Tensor | None,
        groups: Tensor | None,
    ) -> None:
        self._flat, self._path, self._factor, self._products = flat, path, factor, products
        self._expansion, self._vector, self._groups = expansion, vector, groups

    def add(self, rows: tuple[int, ...], number: int, gradient: Tensor) -> None:
        """Add a layer's gradient [n] of the part of the batch that counts in the groups `rows`."""
        first = self._flat.slices[number].start
        for start in range(0, len(gradient), self._flat.block):
            piece = gradient[start : start + self._flat.block]
            where = slice(first + start, first + start + len(piece))
            found = self._factor * (self._path.difference(where) * piece).sum()
            self._products[number] += found
            if self._groups is not None:
                for row in rows:
                    self._groups[row, number] += self._expansion * found
            if self._vector is not None:
                self._vector[where].add_(piece, alpha=self._expansion * self._factor)


class Sums:
    """Sums over the batches of one part, all float64.

    A batch's results stay on the device until the end: fetching them would make the device wait.
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
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._lowest: list[Tensor] = []  # of weights, if there are any
        self._marks: list[Tensor] = []
        self._group_weights: list[Tensor] = []
        self._n_items = 0

    def add_losses(self, index: int, losses: Tensor, weights: Tensor | None) -> None:
        """Add the losses and weights of the items of a batch, [n]."""
        exact = losses.detach().double()
        if weights is None:
            mass = torch.ones_like(exact)
        else:
            mass = weights.double()
            exact = torch.where(mass > 0, exact, 0.0) * mass
            if mass.numel():
                self._lowest.append(mass.min())
            self._marks.append(_mark(mass))
        self._losses.append(exact.sum())
        self._weights.append(mass.sum())
        self._n_items += len(losses)
        if self._split.labels:
            self._add_group_weights(self._split.numbers[index], mass)

    def _add_group_weights(self, numbers: Tensor, mass: Tensor) -> None:
        # One more place, at the end, for items without group: label < 0.
        found = torch.zeros(len(self._split.groups) + 1, dtype=torch.float64, device=mass.device)
        self._group_weights.append(found.index_add_(0, numbers, mass))

    def parts(
        self, index: int, weighted: Tensor, *, tapped: bool
    ) -> list[tuple[tuple[int, ...], Tensor]]:
        """The sums to differentiate in turn: the whole batch, or one group after another.

        Each comes with the rows of dot products that it counts in: its group's and replicate's.
        """
        if not self._directions and not tapped:
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

    def add_gradient(
        self, rows: tuple[int, ...], taps: Sequence[Tap], number: int, gradient: Tensor
    ) -> None:
        """Add a layer's gradient [n] of the part of a batch that counts in `rows`."""
        for tap in taps:
            tap.add(rows, number, gradient)
        if not self._targets:
            return
        if len(gradient) <= self._flat.block:
            self._targets[number].add_(gradient, alpha=self._share)
            if rows:
                self._add_dots(rows, number, 0, gradient)
            return
        # In blocks: a float64 copy of a whole large layer would be one more vector.
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

    def result(self) -> PartSums:
        """The sums over all batches."""
        losses, weights, lowest, marks = (
            tuple(torch.stack(found).tolist()) if found else ()
            for found in (self._losses, self._weights, self._lowest, self._marks)
        )
        masses = torch.stack(self._group_weights).sum(0) if self._group_weights else None
        return PartSums(losses, weights, lowest, self._n_items, masses, self._dots, marks)


def _mark(weights: Tensor) -> Tensor:
    """A hash of weights [n] float64, each with its place; exact in any order of summation."""
    bits = (weights + 0.0).view(torch.int64) * _ODD  # + 0: the zeros are equal
    return ((bits ^ (bits >> 32)) * _factors(len(bits), bits.device)).sum()


@lru_cache(maxsize=4)
def _factors(n: int, device: torch.device) -> Tensor:
    """An odd number for each place, [n] int64, so that every change of a single weight shows."""
    places = torch.arange(1, n + 1, device=device) * _ODD
    return ((places ^ (places >> 29)) * _ODD) | 1


def evaluation_of(split: SplitData, parts: Sequence[PartSums], n_directions: int) -> Evaluation:
    """The sums over the parts of a split, added in their order.

    Raises:
        TaskError: for weights or labels that break the contract.
    """
    losses, weights, lowest = (
        [value for part in parts for value in getattr(part, name)]
        for name in ("losses", "weights", "lowest")
    )
    weight = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
    if not math.isfinite(weight) or any(not low >= 0 for low in lowest):
        raise TaskError(
            f"task loss on split {split.name!r}: weights must be finite and not negative"
        )
    if not weight > 0:
        raise TaskError(f"task loss: the weights of split {split.name!r} add up to {weight}")
    # A plain sum first: fsum refuses sums that overflow or mix infinities.
    total = sum(losses)
    total = math.fsum(losses) if math.isfinite(total) else total
    masses, of_replicates = _masses(split, parts), _by_replicate(split, weights)
    dots = None
    if n_directions:
        scale = torch.tensor([m or 1.0 for m in masses + of_replicates], dtype=torch.float64)
        first, *others = (part.dots for part in parts)
        dots = sum(others, first) / scale.to(first.device)[None, :, None]
    return Evaluation(
        loss=total / weight,
        total_weight=weight,
        n_items=sum(part.n_items for part in parts),
        group_weights=masses,
        group_dots=dots,
        replicate_weights=of_replicates,
        replicate_losses=tuple(
            part / (mass or 1.0)
            for part, mass in zip(_by_replicate(split, losses), of_replicates, strict=True)
        ),
        first_weighted=next(number for number, mass in enumerate(weights) if mass > 0),
        weight_marks=tuple(mark for part in parts for mark in part.marks),
    )


def check_same(split: str, first: float, second: float, *, exact: bool) -> None:
    """Check that a loss is a function of the weights: two evaluations at a point are equal.

    Args:
        split: the name of the split, for messages.
        first: its loss; a loss that is not finite is not compared.
        second: its loss, evaluated a second time.
        exact: whether to compare every bit; otherwise to 1e-5.

    Raises:
        TaskError: if they differ.
    """
    same = first == second if exact else abs(first - second) <= 1e-5 * abs(first)
    if first == first and not same:
        raise TaskError(
            f"task loss on split {split!r}: {first!r} at first, then {second!r} at the same "
            "weights; switch sampling, dropout by hand and augmentation off, and count nothing"
        )


def _by_replicate(split: SplitData, batches: Sequence[float]) -> tuple[float, ...]:
    """Sums by replicate of the batches' values, in their order, [R]."""
    parts: list[list[float]] = [[] for _ in range(split.n_replicates)]
    if parts:
        for replicate, part in zip(split.replicates, batches, strict=True):
            parts[replicate].append(part)
    return tuple(math.fsum(p) if math.isfinite(sum(p)) else sum(p) for p in parts)


def _masses(split: SplitData, parts: Sequence[PartSums]) -> tuple[float, ...]:
    found = [part.masses for part in parts if part.masses is not None]
    if not found:
        return (0.0,) * len(split.groups)
    *masses, stray = sum(found[1:], found[0]).tolist()
    if stray > 0:
        raise TaskError(
            f"task groups: negative label in split {split.name!r} for an item with weight; labels "
            "must be >= 0 where the weight is positive"
        )
    return tuple(masses)
