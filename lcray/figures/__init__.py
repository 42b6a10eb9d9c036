"""The tidy data of figures, for figures that no finding covers.

Each function takes results and returns a table with units and descriptions, as findings do
(`lcray.analyses.tidy`). The other figures are drawn from findings: `layer_totals`,
`trajectories`, `shares`, `memorising`, `fisher`, `coincidences`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "class_layers",
    "densities",
    "layer_matrix",
    "reconstruction",
    "tracks",
    "unit_matrix",
]

if TYPE_CHECKING:
    from lcray.figures.data import class_layers as class_layers
    from lcray.figures.data import densities as densities
    from lcray.figures.data import layer_matrix as layer_matrix
    from lcray.figures.data import reconstruction as reconstruction
    from lcray.figures.data import tracks as tracks
    from lcray.figures.data import unit_matrix as unit_matrix


def __getattr__(name: str) -> Any:
    """Import on first use, since exports and the report need none of these functions."""
    if name not in __all__:
        raise AttributeError(f"module 'lcray.figures' has no attribute {name!r}")
    return getattr(import_module("lcray.figures.data"), name)


def __dir__() -> list[str]:
    return __all__
