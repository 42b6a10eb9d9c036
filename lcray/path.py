"""The straight path between two neighbouring checkpoints.

θ(s) = θ_a + s·Δ,  s in [0, 1],  Δ = θ_b − θ_a;   θ(1) is θ_b as it was stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcray.flat import FlatModel


@dataclass(frozen=True)
class Point:
    """A checkpoint on the device.

    Attributes:
        step: its step.
        vector: the float tensors, [P] in the compute dtype.
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

    @cached_property
    def delta(self) -> Tensor:
        """Δ, [P] float64; exactly 0 where the two are equal, infinities included."""
        a, b = self.start.vector, self.end.vector
        return (b.double() - a.double()).masked_fill_(a == b, 0.0)

    @cached_property
    def is_finite(self) -> bool:
        """Whether the path is; a NaN in either checkpoint breaks it."""
        return bool(torch.isfinite(self.delta).all())

    def moving_buffers(self, flat: FlatModel) -> frozenset[int]:
        """Indices of the float buffers that move."""
        return frozenset(
            number
            for number, (layer, where) in enumerate(zip(flat.layers, flat.slices, strict=True))
            if layer.kind == "buffer" and bool(torch.any(self.delta[where] != 0))
        )

    def set_point(self, flat: FlatModel, s: float) -> None:
        """Move the model to θ(s); interior points are rounded once, from float64."""
        point = self.end if s == 1.0 else self.start
        flat.theta.copy_(point.vector)
        if 0.0 < s < 1.0:
            flat.theta.add_(self.delta, alpha=s)
        flat.set_constants(point.constants)
