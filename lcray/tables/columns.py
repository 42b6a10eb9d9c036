"""The columns of the tables: names, types, units, descriptions."""

from __future__ import annotations

import pyarrow as pa

#: Values of an interval's `status`; its numbers are null unless it is ``ok``.
STATUSES = ("ok", "nonfinite_checkpoint", "nonfinite_loss", "nonfinite_gradient")

#: Description of the column `unit`.
UNIT = "output: position along the output axis; group * (outputs of a group) + j where grouped"

#: The type of dictionary columns.
STRING = pa.dictionary(pa.int32(), pa.string())
COUNT, SIGN, FLOAT, _SINGLE = pa.int64(), pa.int8(), pa.float64(), pa.float32()
_LOSS = "loss"  # nats for cross-entropy; else the unit of the task's loss


def column(
    name: str,
    kind: pa.DataType,
    unit: str,
    description: str,
    nullable: bool = False,
    since: str | None = None,
) -> pa.Field:
    """A field with its unit and description as metadata.

    Args:
        name: the name of the column.
        kind: its type.
        unit: the unit of its values.
        description: one line.
        nullable: whether values may be missing.
        since: the first version of lcray that writes it, unless 0.1.0 does; the column is null in
            files of earlier versions.
    """
    about = {"unit": unit, "description": description}
    return pa.field(
        name, kind, nullable or since is not None, about | ({"since": since} if since else {})
    )


def _float(name: str, unit: str, description: str) -> pa.Field:
    return column(name, FLOAT, unit, description, nullable=True)


def _count(name: str, description: str) -> pa.Field:
    return column(name, COUNT, "1", description)


_SPLIT = column("split", STRING, "", "named data set that the loss is taken over")
_LAYER = column("layer", STRING, "", "named tensor of the model; tied tensors are one layer")
_START = column("start_step", COUNT, "step", "step of the checkpoint that the interval starts at")
_END = column("end_step", COUNT, "step", "step of the checkpoint that the interval ends at")
_INDEX = column("index", COUNT, "1", "position in the layer's tensor, flattened row by row")
_WINDOW = column(
    "window", COUNT, "step", "first step of the base window: start_step // width * width"
)
_SIGN_COLUMN = column(
    "sign", SIGN, "1", "-1 helps, +1 hurts, 0 exact zeros (which are in the underflow bin)"
)


def _lc_se(of: str) -> pa.Field:
    return column(
        "lc_se",
        FLOAT,
        _LOSS,
        f"standard error, from sampling batches, of {of}; null where few batches make it up, and "
        "with rules that take all batches",
        since="0.2.0",
    )


def _counts(scope: str) -> tuple[pa.Field, ...]:
    rest = f" {scope}; buffers and intervals that are not ok count 0"
    return (
        _count("n_helping", "parameter elements with LC < 0" + rest),
        _count("n_hurting", "parameter elements with LC > 0" + rest),
        _count("n_zero", "parameter elements with LC = 0" + rest),
    )


INTERVALS = (
    _SPLIT,
    _START,
    _END,
    _float("loss_start", _LOSS, "mean loss at the start"),
    _float("loss_end", _LOSS, "mean loss at the end"),
    _float("loss_change", _LOSS, "loss_end - loss_start"),
    _float("lc", _LOSS, "loss change allocated to all layers"),
    _lc_se("lc; variances add up over time"),
    _float("gap", _LOSS, "completeness gap: lc - loss_change"),
    _float("first_order_lc", _LOSS, "LC by the gradient at the start; null without a node at 0"),
    column("rule", STRING, "", "quadrature rule, before refinement"),
    _count("panels", "equal panels that the interval was cut into, at most 4096"),
    _count("n_gradients", "full-batch gradients; a shared left endpoint is not counted"),
    column(
        "gradient_cost",
        FLOAT,
        "1",
        "n_gradients and the gradients of samples of batches, in full-batch gradients",
        since="0.2.0",
    ),
    column(
        "converged",
        pa.bool_(),
        "",
        "whether the gap is within its bound; null if not ok, or if the rule samples batches",
        True,
    ),
    column("status", STRING, "", "one of " + ", ".join(STATUSES)),
    *_counts("of the interval"),
)

LAYERS = (
    _SPLIT,
    _START,
    _LAYER,
    _END,
    column("module", STRING, "", "module that owns the layer; empty for the root"),
    column("kind", STRING, "", "parameter or buffer"),
    _count("numel", "elements of the layer"),
    _float("lc", _LOSS, "loss change allocated to the layer"),
    _float("lc_error", _LOSS, "|sum of rule - embedded rule|: an upper indication of lc's error"),
    _lc_se("lc; variances add up over time, not over layers, which share the batches"),
    _float("lc_helping", _LOSS, "sum of the negative LC"),
    _float("lc_hurting", _LOSS, "sum of the positive LC"),
    *_counts("of the layer"),
    _float("first_order_lc", _LOSS, "LC by the gradient at the start; null without a node at 0"),
    _float("update_norm", "parameter", "Euclidean norm of the movement"),
    _float("gradient_norm", "loss/parameter", "norm of the gradient at the start"),
    _count(
        "n_flips",
        "parameter elements whose LC sign here times that in the adjacent interval before is -1; "
        "0 without one",
    ),
)

UNITS = (
    _SPLIT,
    _START,
    _LAYER,
    _count("unit", UNIT),
    _float("lc", _LOSS, "loss change allocated to the unit"),
)

GROUPS = (
    _SPLIT,
    _START,
    _LAYER,
    _count("group", "label of the items"),
    _float("lc", _LOSS, "LC of the mean loss over the group's own items"),
    _float(
        "weight", "1", "the group's share of the total weight: lc * weight adds up to the layer"
    ),
)

REPLICATES = (
    _SPLIT,
    _START,
    _count("replicate", "number of the replicate: a random part of the samples that were drawn"),
    _END,
    _float("loss_start", _LOSS, "the replicate's own mean loss at the start"),
    _float("loss_end", _LOSS, "its mean loss at the end"),
    _float("loss_change", _LOSS, "loss_end - loss_start"),
    _float("lc", _LOSS, "LC of its mean loss, over all layers"),
    _float("weight", "1", "its share of the total weight: lc * weight adds up to the interval"),
)

REPLICATE_LAYERS = (
    _SPLIT,
    _START,
    _LAYER,
    _count("replicate", "number of the replicate, as in replicates"),
    _float("lc", _LOSS, "LC of the replicate's own mean loss"),
    _float("weight", "1", "its share of the total weight: lc * weight adds up to the layer"),
)

HISTOGRAMS = (
    _SPLIT,
    _WINDOW,
    _LAYER,
    _SIGN_COLUMN,
    _count("bin", "number of the bin; edges are (1 + m/8) * 2**e"),
    column("lower", FLOAT, _LOSS, "lower edge, inclusive"),
    _float("upper", _LOSS, "upper edge, exclusive; null if infinite"),
    _count("count", "parameter elements x intervals with this sign and |LC| in the bin"),
    _float("sum", _LOSS, "sum of their |LC|"),
)

PARAMETERS = (
    _SPLIT,
    _LAYER,
    _INDEX,
    _float("lc", _LOSS, "LC over the run"),
    _float("abs_lc", _LOSS, "sum of |LC| over the intervals"),
    _count("n_helping", "intervals with LC < 0"),
    _count("n_hurting", "intervals with LC > 0"),
    _count("n_zero", "intervals with LC = 0"),
    _count("n_flips", "neighbouring intervals with LC of opposite sign"),
    _float("displacement", "parameter", "sum of the movements"),
    _float("path_length", "parameter", "sum of the absolute movements"),
    _count("displacement_flips", "neighbouring intervals with movements of opposite sign"),
    column(
        "gradient_flips",
        COUNT,
        "1",
        "neighbouring intervals with gradients (at their starts) of opposite sign; null without a "
        "node at 0",
        True,
    ),
)

TRACES = (
    _SPLIT,
    _LAYER,
    _INDEX,
    column("step", COUNT, "step", "step of the checkpoint"),
    _float("weight", "parameter", "value at the checkpoint"),
    _float("gradient", "loss/parameter", "gradient at the checkpoint"),
    _float("lc", _LOSS, "LC of the interval that starts here; null if there is none"),
)

ELEMENTS = (
    _SPLIT,
    _LAYER,
    _START,
    _INDEX,
    column("lc", _SINGLE, _LOSS, "loss change allocated to the element", True),
)

FITS = (
    _SPLIT,
    column("window", COUNT, "step", "first step of the base window; -1 stands for the whole run"),
    _LAYER,
    column("sign", SIGN, "1", "-1 helps, +1 hurts"),
    column("distribution", STRING, "", "fitted to |LC| of this sign"),
    column(
        "parameter",
        STRING,
        "",
        "a parameter of the distribution (Weibull: shape k, scale lambda), or n, "
        "log_likelihood, aic, ks",
    ),
    _float("value", "", "its value; lambda in units of the loss, the rest without unit"),
    _float("se", "", "standard error of a parameter, else null"),
)

FISHER = (
    _SPLIT,
    column("step", COUNT, "step", "step of the checkpoint"),
    _LAYER,
    *(
        _float(f"trace_{kind}{end}", "loss**2/parameter**2", what + words)
        for kind, words in (("true", "targets that the model draws"), ("empirical", "the data's"))
        for end, what in (
            ("", "mean squared norm of scores by "),
            ("_se", "standard error over samples, by "),
        )
    ),
    _count("n_items", "items with weight among the samples that were taken"),
    _count("seed", "of the samples and of the targets that the model draws"),
)

BORDERS = (
    _SPLIT,
    _LAYER,
    _INDEX,
    *(
        column(f"{what}_{end}", SIGN, "1", f"sign of the {words} in the span's {end} interval", n)
        for what, words, n in (
            ("lc", "LC", False),
            ("displacement", "movement", False),
            ("gradient", "gradient at the start (null without a node at 0)", True),
        )
        for end in ("first", "last")
    ),
)
