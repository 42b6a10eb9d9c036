"""Sums over batches: losses, weights and gradients, of everything and of each group.

Legend: P elements, L layers, G groups, D directions, n items a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcray.data import SplitData
from lcray.errors import TaskError
from lcray.flat import FlatModel
from lcray.parts import PartSums
from lcray.path import Segment


@dataclass(frozen=True)
class Evaluation:
    """The loss of a split at a point.

    Attributes:
        loss: the mean loss; NaN or infinite where the model's is.
        total_weight: Σ w.
        n_items: items.
        group_weights: Σ w of each group, [G].
        group_dots: the directional derivatives of each group's own mean loss along each direction,
            by layer, [D, G, L] float64; None without groups or directions.
    """

    loss: float
    total_weight: float
    n_items: int
    group_weights: tuple[float, ...]
    group_dots: Tensor | None


class Sums:
    """Sums over the batches of one part, all float64.

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
        shape = (len(self._directions), len(split.groups), len(flat.layers))
        self._dots = torch.zeros(shape, dtype=torch.float64, device=flat.theta.device)
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._lowest: list[Tensor] = []  # weights, where there are any
        self._group_weights: list[Tensor] = []
        self._n_items = 0

    def add_losses(self, index: int, losses: Tensor, weights: Tensor | None) -> None:
        """Take the losses and weights of the items of a batch, [n]."""
        exact = losses.detach().double()
        if weights is None:
            mass = torch.ones_like(exact)
        else:
            mass = weights.double()
            exact = torch.where(mass > 0, exact, 0.0) * mass
            if mass.numel():
                self._lowest.append(mass.min())
        self._losses.append(exact.sum())
        self._weights.append(mass.sum())
        self._n_items += len(losses)
        if self._split.labels:
            self._add_group_weights(self._split.numbers[index], mass)

    def _add_group_weights(self, numbers: Tensor, mass: Tensor) -> None:
        # One place more, at the end, for items of no group: label < 0.
        found = torch.zeros(len(self._split.groups) + 1, dtype=torch.float64, device=mass.device)
        self._group_weights.append(found.index_add_(0, numbers, mass))

    def parts(self, index: int, weighted: Tensor) -> list[tuple[int | None, Tensor]]:
        """What to differentiate in turn: everything at once, or one group after another."""
        if not self._directions:
            return [(None, weighted)]
        present = self._split.present[index]
        none = len(self._split.groups)
        if len(present) == 1:
            return [(present[0] if present[0] < none else None, weighted)]
        numbers = self._split.numbers[index]
        return [(k, weighted[numbers == k]) for k in present if k < none]

    def add_gradient(self, group: int | None, number: int, gradient: Tensor) -> None:
        """Take a layer's gradient [n] of the part of a batch that is of `group`."""
        if len(gradient) <= self._flat.block:
            self._targets[number].add_(gradient, alpha=self._share)
            if group is not None:
                self._add_dots(group, number, 0, gradient)
            return
        # In blocks: whole, the float64 copy of a large layer would be one more vector.
        for start in range(0, len(gradient), self._flat.block):
            piece = gradient[start : start + self._flat.block]
            self._targets[number][start : start + len(piece)].add_(piece, alpha=self._share)
            if group is not None:
                self._add_dots(group, number, start, piece)

    def _add_dots(self, group: int, number: int, start: int, piece: Tensor) -> None:
        first = self._flat.slices[number].start + start
        where = slice(first, first + len(piece))
        for dots, direction in zip(self._dots, self._directions, strict=True):
            dots[group, number] += (direction.difference(where) * piece).sum()

    def result(self) -> PartSums:
        """What all batches have come to."""
        losses, weights, lowest = (
            tuple(torch.stack(found).tolist()) if found else ()
            for found in (self._losses, self._weights, self._lowest)
        )
        masses = torch.stack(self._group_weights).sum(0) if self._group_weights else None
        return PartSums(losses, weights, lowest, self._n_items, masses, self._dots)


def evaluation_of(split: SplitData, parts: Sequence[PartSums], n_directions: int) -> Evaluation:
    """What the parts of a split come to, added in their order.

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
    masses = _masses(split, parts)
    dots = None
    if n_directions:
        scale = torch.tensor([m if m > 0 else 1.0 for m in masses], dtype=torch.float64)
        first, *others = (part.dots for part in parts)
        dots = sum(others, first) / scale.to(first.device)[None, :, None]
    return Evaluation(
        loss=total / weight,
        total_weight=weight,
        n_items=sum(part.n_items for part in parts),
        group_weights=masses,
        group_dots=dots,
    )


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
