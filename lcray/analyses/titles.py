"""The findings' names, titles and explanations, in the registry's order; imports nothing."""

from __future__ import annotations

#: By name, one line for readers.
TITLES: dict[str, str] = {
    "shares": "Shares of parameters that help and that hurt, run",
    "habits": "How often each parameter helps: distribution over parameters",
    "fits": "Distribution of |LC|, run",
    "first_order": "First-order LC compared with the rule that was used, run",
    "memorising": "Learning or memorising: LC on two splits, run",
    "overfitting": "When each layer starts to overfit",
    "oscillation": "Sign flips, half-periods and net progress",
    "run_lengths": "Lengths of runs of equal sign",
    "extremes": "The parameters that help and hurt most",
    "layer_totals": "Layers that help, and layers that hurt",
    "trajectories": "Cumulative LC of layers",
    "lags": "Lag of the motion behind the gradient, in intervals",
    "lag_profiles": "Cross-correlation of motion and gradient by lag",
    "synchrony": "Whether layers, and groups, learn at the same iterations",
    "coincidences": "Coincident peaks of pairs of layers, and of groups",
    "peaks": "Peaks of learning",
    "fisher": "Fisher information and LC by layer",
}

#: A limit of LC; shown once, in the report's head and in a summary of findings.
WHAT_HAPPENED = (
    "LC says what happened in this run, not what would have happened without a layer: other layers "
    "might then have done its part."
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
    "oscillation": {"half_period": "no flip was seen", "net": "not available from this source"},
    "layer_totals": {"lc_bound": _NO_BOUND},
    "synchrony": {
        "group": "LC of the whole split",
        "p_value": "no coincidence is expected by chance",
    },
    "fisher": {"trace_true": "the analysis has only the empirical kind"},
}
