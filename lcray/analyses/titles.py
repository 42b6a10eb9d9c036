"""The findings' names, titles and explanations, in the registry's order; imports nothing."""

from __future__ import annotations

#: By name, one line for readers.
TITLES: dict[str, str] = {
    "shares": "Helping and hurting: share of the parameters, run",
    "habits": "How often each parameter helps: distribution over parameters",
    "fits": "Distribution of |LC|, run",
    "first_order": "First order against the rule that was used, run",
    "memorising": "Learning against memorising: LC on two splits, run",
    "overfitting": "When each layer starts to overfit",
    "oscillation": "How often signs flip, and how much of the traffic is progress",
    "run_lengths": "How long signs last",
    "extremes": "The parameters that help and hurt most",
    "layer_totals": "Layers that help, and layers that hurt",
    "trajectories": "Cumulative LC of layers",
    "lags": "By how many intervals motion follows the gradient",
    "lag_profiles": "Cross-correlation of motion and gradient, lag by lag",
    "synchrony": "Whether layers, and groups, learn at the same iterations",
    "coincidences": "Coincident peaks of pairs of layers, and of groups",
    "peaks": "Peaks of learning",
    "fisher": "Fisher information beside LC, layer by layer",
}

#: What LC does not say; shown once, in the report's head and in a summary of findings.
WHAT_HAPPENED = (
    "LC says what happened in this run, not what would have happened without a layer: the others "
    "may then do its part."
)

#: By name, an explanation of a summary, if its columns do not explain themselves.
READING: dict[str, str] = {
    "layer_totals": "hurts: +1 or -1 where |lc| exceeds lc_bound, the bound of its error",
    "overfitting": "onset: the step from which, for three windows in a row, LC on train falls and "
    "LC on the other split rises",
    "synchrony": "coincidences: pairs of layers, or groups, that peak at the same interval; "
    "expected: their number by chance",
}

_FEW = "too few intervals, or windows, for errors"
_NO_BOUND = "the rule has no embedded rule"
#: By name and column, the meaning of a missing value in a summary.
EMPTY: dict[str, dict[str, str]] = {
    "shares": {"helping_low": _FEW},
    "fits": {"shape_se_blocks": _FEW},
    "memorising": {"difference_bound": _NO_BOUND},
    "overfitting": {"onset": "none was found"},
    "oscillation": {"half_period": "no flip was seen", "net": "this source does not have it"},
    "layer_totals": {"lc_bound": _NO_BOUND},
    "synchrony": {
        "group": "LC of the whole split",
        "p_value": "by chance there would be no coincidence at all",
    },
    "fisher": {"trace_true": "the analysis has the empirical kind alone"},
}
