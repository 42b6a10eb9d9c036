"""The figures of an output as Matplotlib axes, for papers and notebooks.

Every function takes results (`lcray.open(OUT)`), draws on the axes `ax`, and returns them. Where
`ax` is None, it draws on a new figure. A figure with several panels takes and returns an array of
axes. Nothing is shown, and no setting of Matplotlib is changed: the current sizes and fonts apply,
and `style` is a context that changes them for a while. An output without the tables that a figure
needs raises InapplicableError; an unknown split or layer raises UsageError.

Blue helps (LC < 0), vermilion hurts (LC > 0), and hurting is hatched, dashed or marked besides.
"""

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
