"""The list of all findings, in the order in which summaries show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from lcray.analyses.extremes import extremes
from lcray.analyses.first_order import first_order
from lcray.analyses.fits import fits
from lcray.analyses.habits import habits
from lcray.analyses.information import fisher
from lcray.analyses.lags import lag_profiles, lags
from lcray.analyses.layer_totals import layer_totals
from lcray.analyses.memorising import memorising, overfitting
from lcray.analyses.oscillation import oscillation
from lcray.analyses.run_length import run_lengths
from lcray.analyses.shares import shares
from lcray.analyses.synchrony import coincidences, peaks_of_learning, synchrony
from lcray.analyses.titles import TITLES
from lcray.analyses.trajectories import trajectories
from lcray.analyses.windows import RUN, Ranges
from lcray.tables.reading.results import Results


class Compute(Protocol):
    """The arguments of every finding; most take further keywords.

    `window` and `windows` are as in `Windows.of`; a finding about the whole run ignores them.
    """

    def __call__(
        self,
        results: Results,
        *,
        window: int | None = None,
        windows: Ranges | None = None,
        seed: int = 0,
    ) -> pa.Table:
        """The finding's table, with its parameters in the metadata (`lcray.analyses.tidy`).

        Raises:
            InapplicableError: if the output's tables cannot give it.
            UsageError: for parameters that cannot be used.
        """
        ...


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        name: of its file, ``OUT/findings/<name>.parquet``.
        compute: makes its table from results.
        needs: the tables that it cannot do without.
        shown: the columns that a summary shows; all if empty.
        rows: column and value of the rows that a summary shows; a finding without windows has no
            `window`.
        brief: whether a summary shows it at all; long tables are for plots.
    """

    name: str
    compute: Compute
    needs: tuple[str, ...]
    shown: tuple[str, ...] = ()
    rows: tuple[tuple[str, str], ...] = (("window", RUN),)
    brief: bool = True

    @property
    def title(self) -> str:
        """One line for readers."""
        return TITLES[self.name]


FINDINGS: tuple[Finding, ...] = (
    Finding(
        "shares",
        shares,
        ("layers",),
        ("split", "layer", "helping", "helping_low", "helping_high", "zero", "helping_of_nonzero"),
    ),
    Finding(
        "habits",
        habits,
        ("parameters",),
        (
            "split",
            "layer",
            "denominator",
            "mean",
            "sd",
            "sd_if_independent",
            "near_half",
            "q05",
            "q95",
        ),
        (("denominator", "nonzero"),),
    ),
    Finding(
        "fits",
        fits,
        ("histograms",),
        ("split", "layer", "sign", "distribution", "shape", "shape_se_blocks", "ks", "rank"),
        (("window", RUN), ("distribution", "weibull")),
    ),
    Finding(
        "first_order",
        first_order,
        ("intervals",),
        ("split", "rule", "gradients", "loss_change", "gap_percent", "abs_gap_percent", "bias"),
    ),
    Finding(
        "memorising",
        memorising,
        ("layers",),
        ("train", "other", "layer", "lc_train", "lc_other", "difference", "difference_bound"),
    ),
    Finding(
        "overfitting",
        overfitting,
        ("layers",),
        ("train", "other", "layer", "onset", "lc_train_after", "lc_other_after"),
        (),
    ),
    Finding(
        "oscillation",
        oscillation,
        ("layers",),
        ("split", "layer", "quantity", "source", "flip_rate", "half_period", "net"),
    ),
    Finding("run_lengths", run_lengths, ("traces",), brief=False),
    Finding(
        "extremes",
        extremes,
        ("parameters",),
        ("split", "direction", "rank", "layer", "index", "lc", "abs_lc", "n_flips"),
        (),
    ),
    Finding(
        "layer_totals",
        layer_totals,
        ("layers",),
        ("split", "layer", "numel", "lc", "lc_bound", "hurts", "share"),
    ),
    Finding("trajectories", trajectories, ("layers",), brief=False),
    Finding(
        "lags",
        lags,
        ("traces",),
        ("split", "layer", "lag", "lag_low", "lag_high", "correlation", "p_value"),
    ),
    Finding("lag_profiles", lag_profiles, ("traces",), brief=False),
    Finding(
        "synchrony",
        synchrony,
        ("layers",),
        ("split", "kind", "group", "n_peaks", "coincidences", "expected", "p_value"),
    ),
    Finding("coincidences", coincidences, ("layers",), brief=False),
    Finding("peaks", peaks_of_learning, ("layers",), brief=False),
    Finding(
        "fisher",
        fisher,
        ("layers", "fisher"),
        (
            "split",
            "layer",
            "numel",
            "lc",
            "lc_share",
            "trace_true",
            "trace_true_se",
            "true_share",
            "trace_empirical",
        ),
    ),
)
