"""The tidy data behind the figures that no finding has already.

Each function takes results and returns a table with units and descriptions, as findings do
(`lcray.analyses.tidy`). The other figures are drawn from findings: `layer_totals`,
`trajectories`, `shares`, `memorising`, `fisher`, `coincidences`.
"""

from lcray.figures.classes import class_layers
from lcray.figures.densities import densities
from lcray.figures.matrices import layer_matrix, unit_matrix
from lcray.figures.reconstruction import reconstruction
from lcray.figures.tracks import tracks

__all__ = [
    "class_layers",
    "densities",
    "layer_matrix",
    "reconstruction",
    "tracks",
    "unit_matrix",
]


def __dir__() -> list[str]:
    return __all__
