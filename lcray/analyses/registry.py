"""The list of all findings, in the order in which summaries show them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from lcray.analyses.windows import RUN
from lcray.tables.reading.results import Results


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        name: of its file, ``OUT/findings/<name>.parquet``.
        compute: makes its table from results, with its parameters in the metadata
            (`lcray.analyses.tidy`), or raises InapplicableError if the output's tables cannot give
            it; takes keywords, all with defaults.
        needs: the tables that it cannot do without.
        shown: the columns that a summary shows; none of a long table, which is for plots.
        rows: column and value of the rows that a summary shows; a finding without windows has no
            `window`.
    """

    name: str
    compute: Callable[..., pa.Table]
    needs: tuple[str, ...]
    shown: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        """One line for readers."""
        return TITLES[self.name]

    @property
    def brief(self) -> bool:
        """Whether a summary shows it at all."""
        return bool(self.shown)

    def of(self, results: Results, **options: Any) -> pa.Table:
        """Its table, by those of the `options` that it has; raises as `compute`."""
        known = inspect.signature(self.compute).parameters
        return self.compute(results, **{k: v for k, v in options.items() if k in known})


def _finding(
    name: str,
    compute: Callable[..., pa.Table],
    needs: str,
    shown: str = "",
    rows: tuple[tuple[str, str], ...] = (("window", RUN),),
) -> Finding:
    return Finding(name, compute, tuple(needs.split()), tuple(shown.split()), rows)


FINDINGS: tuple[Finding, ...] = (
    _finding(
        "shares",
        shares,
        "layers",
        "split layer helping helping_low helping_high zero helping_of_nonzero",
    ),
    _finding(
        "habits",
        habits,
        "parameters",
        "split layer denominator mean sd sd_if_independent near_half q05 q95",
        (("denominator", "nonzero"),),
    ),
    _finding(
        "fits",
        fits,
        "histograms",
        "split layer sign distribution shape shape_se_blocks ks rank",
        (("window", RUN), ("distribution", "weibull")),
    ),
    _finding(
        "first_order",
        first_order,
        "intervals",
        "split rule gradients loss_change gap_percent abs_gap_percent bias",
    ),
    _finding(
        "memorising",
        memorising,
        "layers",
        "train other layer lc_train lc_other difference difference_bound",
    ),
    _finding(
        "overfitting",
        overfitting,
        "layers",
        "train other layer onset lc_train_after lc_other_after",
        (),
    ),
    _finding(
        "oscillation",
        oscillation,
        "layers",
        "split layer quantity source flip_rate half_period net",
    ),
    _finding("run_lengths", run_lengths, "traces"),
    _finding(
        "extremes", extremes, "parameters", "split direction rank layer index lc abs_lc n_flips", ()
    ),
    _finding("layer_totals", layer_totals, "layers", "split layer numel lc lc_bound hurts share"),
    _finding("trajectories", trajectories, "layers"),
    _finding("lags", lags, "traces", "split layer lag lag_low lag_high correlation p_value"),
    _finding("lag_profiles", lag_profiles, "traces"),
    _finding(
        "synchrony", synchrony, "layers", "split kind group n_peaks coincidences expected p_value"
    ),
    _finding("coincidences", coincidences, "layers"),
    _finding("peaks", peaks_of_learning, "layers"),
    _finding(
        "fisher",
        fisher,
        "layers fisher",
        "split layer numel lc lc_share trace_true trace_true_se true_share trace_empirical",
    ),
)
