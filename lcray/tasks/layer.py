"""A layer: one named tensor of a model, as plans and tables describe it.

A *layer* is one named tensor (``conv1.weight``), its *module* is its owner, and a *unit* is the
elements of one output: a slice along the output axis. If a transposed convolution has groups, its
weight [in, out/groups, …] has outputs of every group along one axis: unit group·(out/groups) + j is
slice j of the rows of that group's inputs. Tied parameters are one layer, under the first name that
the model gives them.
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
        unit_groups: number of blocks of the first axis; each block's slices are separate units.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    unit_axis: int | None
    trainable: bool
    aliases: tuple[str, ...] = ()
    unit_groups: int = 1

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def n_units(self) -> int:
        """The number of units; 1 for a scalar."""
        return 1 if self.unit_axis is None else self.shape[self.unit_axis] * self.unit_groups

    def to_dict(self) -> dict[str, Any]:
        """The layer as JSON-ready values; `unit_groups` is left out if 1, as in older files."""
        data = asdict(self)
        if self.unit_groups == 1:
            del data["unit_groups"]
        return data
