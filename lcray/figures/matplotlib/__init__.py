"""The figures of an output as Matplotlib axes; `lcray.plots` is their public face."""

from lcray.figures.matplotlib.bars import fisher, layer_totals, memorising
from lcray.figures.matplotlib.curves import first_order, loss, shares, trajectories
from lcray.figures.matplotlib.distributions import distribution
from lcray.figures.matplotlib.elements import tracks
from lcray.figures.matplotlib.maps import class_layers, coincidences, layer_map, unit_map
from lcray.figures.matplotlib.styling import style

__all__ = [
    "class_layers",
    "coincidences",
    "distribution",
    "first_order",
    "fisher",
    "layer_map",
    "layer_totals",
    "loss",
    "memorising",
    "shares",
    "style",
    "tracks",
    "trajectories",
    "unit_map",
]


def __dir__() -> list[str]:
    return __all__
