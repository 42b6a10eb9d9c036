"""The layers of a model: its named tensors, each described once, in the model's order.

A *layer* is one named tensor (``conv1.weight``), its *module* the owner, a *unit* one slice along
the output axis. Tied parameters are one layer, under the first name that the model gives them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One named tensor of a model.

    Attributes:
        name: its canonical name, without the prefixes that wrappers add.
        module: the name of the module that owns it (empty for the root).
        kind: ``parameter`` or ``buffer``.
        shape: its shape.
        unit_axis: the axis whose slices are the units, None for a scalar.
        trainable: whether it requires gradients; buffers count as not trainable.
        aliases: further names of the same tensor (tied parameters).
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    unit_axis: int | None
    trainable: bool
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def n_units(self) -> int:
        """The number of units; 1 for a scalar."""
        return 1 if self.unit_axis is None else self.shape[self.unit_axis]

    def to_dict(self) -> dict[str, Any]:
        """The layer as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layer:
        """The layer that `to_dict` described."""
        return cls(**{**data, "shape": tuple(data["shape"]), "aliases": tuple(data["aliases"])})
