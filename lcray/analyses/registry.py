"""The findings, in the order they are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from lcray.analyses.first_order import first_order
from lcray.analyses.windows import Ranges
from lcray.results import Results


class Compute(Protocol):
    """What every finding takes; most take further keywords.

    `window` and `windows` are those of `Windows.of`; a finding about the run alone ignores them.
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
        title: a line for people.
        compute: from results to its table.
        needs: the tables without which there is none.
        shown: the columns that a summary shows; all where empty.
    """

    name: str
    title: str
    compute: Compute
    needs: tuple[str, ...]
    shown: tuple[str, ...] = ()


FINDINGS: tuple[Finding, ...] = (
    Finding(
        "first_order",
        "First order against the rule that was used",
        first_order,
        ("intervals",),
        (
            "split",
            "rule",
            "gradients",
            "loss_change",
            "lc",
            "gap_percent",
            "abs_gap_percent",
            "bias",
        ),
    ),
)
