"""The tidy data of figures that no finding covers; `lcray.figures` is its public face."""

from lcray.figures.data.classes import class_layers
from lcray.figures.data.densities import densities
from lcray.figures.data.matrices import layer_matrix, unit_matrix
from lcray.figures.data.reconstruction import reconstruction
from lcray.figures.data.tracks import tracks

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
