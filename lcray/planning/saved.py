"""A plan with its costs, and plans in files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from lcray.errors import UsageError
from lcray.planning.check import check_plan, read_plan
from lcray.planning.costs import Estimate
from lcray.planning.plan import Plan
from lcray.storage.files import FORMAT_VERSION, read_json, write_json_atomic

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, repr=False)
class PlanReport:
    """A plan, and its costs.

    Attributes:
        plan: the plan.
        estimate: time, memory and disk, from a short probe.
        workers: the number of workers that it was made for.
        team: workers that share a gradient.
        interval_seconds: duration of an interval on such a team.
        fixed_batches: whether batches are part of the loss, so that their size was not tuned.
        resident: whether a worker keeps the data of a split in memory, by split; else it streams
            them, to the same results.
        notes: remarks on the numbers, one line each.
        local: whether it is to be done in one process, without starting workers.
    """

    plan: Plan
    estimate: Estimate
    workers: int
    resident: dict[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    team: int = 1
    interval_seconds: float | None = None
    fixed_batches: bool = False
    local: bool = False

    def __repr__(self) -> str:
        cost = self.estimate
        return f"PlanReport({cost.n_intervals} intervals, {cost.n_gradients} gradients)"

    def save(self, path: PathLike) -> None:
        """Write the plan to a file, for ``analyze(plan=…)`` and ``analyze --plan``.

        Raises:
            OutputError: if the disk refuses.
        """
        data = {"format_version": FORMAT_VERSION, "plan": self.plan.to_dict()}
        write_json_atomic(Path(path), data)


def load_plan(path: PathLike) -> Plan:
    """The plan in a file that ``plan --save`` wrote.

    Raises:
        UsageError: if it is no plan of this version.
        OutputError: if it cannot be read.
    """
    data = read_json(Path(path))
    try:
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {data['format_version']!r}")
        loaded = read_plan(data["plan"])
        check_plan(loaded)
        return loaded
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: not a plan ({error}); make one with lcray plan --save"
        ) from error
