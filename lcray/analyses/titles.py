"""The findings' names and titles, in the order they are told; imports nothing."""

from __future__ import annotations

#: By name, a line for people.
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
