"""The figures of an output as Matplotlib axes, for papers and notebooks.

Every function takes results (`lcray.open(OUT)`) and draws on `ax`, or on a new figure where that
is None, and returns the axes; what has several panels takes and returns an array of them. Nothing
is shown, and no setting of Matplotlib is changed: sizes and fonts are those in force, for which
`style` is a context. An output without the tables that a figure needs raises InapplicableError,
a split or layer that there is not UsageError.

Blue helps (LC < 0), vermilion hurts (LC > 0), and hurting is hatched, dashed or marked besides.
"""

from lcray.figures.matplotlib import (
    class_layers,
    coincidences,
    distribution,
    first_order,
    fisher,
    layer_map,
    layer_totals,
    loss,
    memorising,
    shares,
    style,
    tracks,
    trajectories,
    unit_map,
)

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
