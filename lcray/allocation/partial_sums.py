"""Sums over the batches of a split in parts, which several workers may compute.

Legend: P elements, L layers, G groups, R replicates of a sample, D directions, k parts.

The plan says how many parts the batches of a split are cut into. Each part is summed by itself, in
the order of its batches, and the parts are added in order, whichever worker computed them. So a
result depends only on the number of parts. Losses do not even depend on it: they are summed
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from lcray.allocation.path import Segment
from lcray.tasks.model.flat import FlatModel


@dataclass(frozen=True)
class Seat:
    """A worker's place in a team.

    Attributes:
        index: from 0, which is the leader.
        team: number of workers in the team.
    """

    index: int = 0
    team: int = 1


def cut_parts(n_batches: int, partial_sums: int) -> tuple[range, ...]:
    """The batches of each part: contiguous, none empty, with sizes that differ by at most one."""
    return _cut(n_batches, min(partial_sums, n_batches))


def deal(n_parts: int, team: int) -> tuple[range, ...]:
    """The parts that each worker of a team computes; the last workers may have none."""
    return _cut(n_parts, team)


def batches_of(seat: Seat, partial_sums: int, n_batches: int) -> range:
    """The batches that the worker at `seat` needs."""
    parts = cut_parts(n_batches, partial_sums)
    own = [parts[number] for number in deal(len(parts), seat.team)[seat.index]]
    return range(own[0].start, own[-1].stop) if own else range(0)


def _cut(n: int, parts: int) -> tuple[range, ...]:
    """Contiguous ranges of 0 to `n`; the larger ones come first."""
    sizes = [n // parts + (number < n % parts) for number in range(parts)]
    return tuple(range(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))


@dataclass(frozen=True)
class PartSums:
    """The sums over the batches of a part, without the gradient.

    Attributes:
        losses: Σ wℓ of each batch.
        weights: Σ w of each batch.
        lowest: the lowest weight of each batch that has weights.
        n_items: number of items.
        masses: Σ w of each group and, last, of items without group, [G + 1]; None without groups.
        dots: directional derivatives of Σ wℓ of each group, then of each replicate, by layer,
            [D, G + R, L].
        marks: a hash of the weights of each batch that has weights, item by item.
    """

    losses: tuple[float, ...]
    weights: tuple[float, ...]
    lowest: tuple[float, ...]
    n_items: int
    masses: Tensor | None
    dots: Tensor
    marks: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> PartSums:
        """The same on `device`."""
        masses = None if self.masses is None else self.masses.to(device)
        return replace(self, masses=masses, dots=self.dots.to(device))


@dataclass(frozen=True)
class Site:
    """Where an evaluation takes place: θ(s) of a path, and the path after it if there is one."""

    segment: Segment
    s: float
    following: Segment | None = None

    def enter(self, flat: FlatModel) -> list[Segment]:
        """Move the model there, and let gradients reach the buffers that move.

        Returns:
            the directions for the derivatives of groups and replicates.
        """
        directions = [self.segment] + ([] if self.following is None else [self.following])
        moving = frozenset[int]().union(*(path.moving_buffers(flat) for path in directions))
        flat.differentiate_buffers(moving)
        self.segment.set_point(flat, self.s)
        return directions


@dataclass(frozen=True)
class Request:
    """A request to the colleagues.

    Attributes:
        split: the name of the split.
        site: the point at which to evaluate it.
        share: the factor of Σ w ∂ℓ/∂θ.
        gradient: whether the gradient is wanted in addition to the loss.
    """

    split: str
    site: Site
    share: float
    gradient: bool


@dataclass(frozen=True)
class Answer:
    """A part that a colleague has computed.

    Attributes:
        sums: its sums.
        gradient: gives the elements of a slice of the part's gradient, float64 on the device; None
            if it was not asked for.
    """

    sums: PartSums
    gradient: Callable[[slice], Tensor] | None


class Colleagues(Protocol):
    """The other workers of a team, as seen by the engine of its leader."""

    def share_out(self, request: Request, n_parts: int) -> tuple[range, Iterator[Answer]]:
        """Let the colleagues begin with their parts.

        Returns:
            the parts that the leader computes, which are the first ones; and the other parts in
            order, each waited for when it is requested.
        """
