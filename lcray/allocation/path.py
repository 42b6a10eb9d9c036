"""The straight path between two neighbouring checkpoints.

θ(s) = θ_a + s·Δ,  s in [0, 1],  Δ = θ_b − θ_a;   θ(1) is θ_b as it was stored.

Δ is float64, twice the size of a float32 checkpoint, and is needed a few times per interval. It is
computed block by block, in the cache, and kept only if it is small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcray.tasks.model.flat import FlatModel

_KEEP = 1 << 20  # elements: up to here, Δ is kept as a whole (8 MiB)
_BLOCK, _LARGE = 1 << 16, 1 << 22  # elements of a block on a CPU, and elsewhere
_ALL = slice(None)


@dataclass(frozen=True)
class Point:
    """A checkpoint on the device.

    Attributes:
        step: of the checkpoint.
        vector: the float tensors, [P] in the compute dtype, in memory order.
        constants: the tensors that do not move.
    """

    step: int
    vector: Tensor
    constants: Mapping[str, Tensor]


@dataclass(frozen=True)
class Segment:
    """The path from `start` to `end`."""

    start: Point
    end: Point

    def difference(self, where: slice = _ALL) -> Tensor:
        """Δ of the elements `where`, float64; exactly 0 where both ends are equal.

        The caller must not change it.
        """
        if len(self.start.vector) <= _KEEP:
            return self._kept[where]
        return self._between(where)

    @cached_property
    def _kept(self) -> Tensor:
        return self._between(_ALL)

    def _between(self, where: slice) -> Tensor:
        a, b = self.start.vector[where], self.end.vector[where]
        delta = b.to(torch.float64, copy=True).sub_(a.double())
        if delta.device.type == "cpu" and math.isfinite(delta.sum()):
            return delta  # as almost always; asking would make another device wait
        return delta.masked_fill_(a == b, 0.0)  # equal infinities do not move

    @cached_property
    def is_finite(self) -> bool:
        """Whether the whole path is finite; a NaN in either checkpoint makes it not finite."""
        size = _BLOCK if self.start.vector.device.type == "cpu" else _LARGE
        blocks = [slice(a, a + size) for a in range(0, len(self.start.vector), size)]
        sums = [self.difference(where).sum() for where in blocks]
        if not sums or bool(torch.stack(sums).isfinite().all()):
            return True
        # Sums of finite float64 may overflow.
        return all(bool(self.difference(where).isfinite().all()) for where in blocks)

    def moving_buffers(self, flat: FlatModel) -> frozenset[int]:
        """Indices of the float buffers that move."""
        if "_moving" not in self.__dict__:
            buffers = [n for n, layer in enumerate(flat.layers) if layer.kind == "buffer"]
            moves = [torch.any(self.difference(flat.slices[n]) != 0) for n in buffers]
            # Asked once: each answer makes a GPU wait.
            answers = torch.stack(moves).tolist() if moves else []
            found = frozenset(n for n, moved in zip(buffers, answers, strict=True) if moved)
            self.__dict__["_moving"] = found
        moving: frozenset[int] = self.__dict__["_moving"]
        return moving

    def set_point(self, flat: FlatModel, s: float) -> None:
        """Move the model to θ(s); interior points are rounded once, from float64."""
        if 0.0 < s < 1.0:
            for where in flat.blocks():
                start = self.start.vector[where].double()
                flat.theta[where] = torch.add(start, self.difference(where), alpha=s)
        else:
            flat.theta.copy_((self.end if s == 1.0 else self.start).vector)
        flat.set_constants((self.end if s == 1.0 else self.start).constants)
