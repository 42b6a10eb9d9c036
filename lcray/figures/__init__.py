"""The tidy data of figures, for figures that no finding covers.

Each function takes results and returns a table with units and descriptions, as findings do
(`lcray.analyses.tidy`). The other figures are drawn from findings: `layer_totals`,
`trajectories`, `shares`, `memorising`, `fisher`, `coincidences`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_MODULES = {
    "class_layers": "classes",
    "densities": "densities",
    "layer_matrix": "matrices",
    "reconstruction": "reconstruction",
    "tracks": "tracks",
    "unit_matrix": "matrices",
}
__all__ = [*_MODULES]

if TYPE_CHECKING:
    from lcray.figures.data.classes import class_layers as class_layers
    from lcray.figures.data.densities import densities as densities
    from lcray.figures.data.matrices import layer_matrix as layer_matrix
    from lcray.figures.data.matrices import unit_matrix as unit_matrix
    from lcray.figures.data.reconstruction import reconstruction as reconstruction
    from lcray.figures.data.tracks import tracks as tracks


def __getattr__(name: str) -> Any:
    """Import on first use, since exports and the report need none of these functions."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lcray.figures' has no attribute {name!r}")
    return getattr(import_module(f"lcray.figures.data.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
