"""The head of the page: the run's results, how exactly they are known, and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lcray.errors import one_line
from lcray.figures.html.sections import MATERIAL, count, listed, percent, plain, signed
from lcray.figures.html.source import Source
from lcray.planning.plan import Plan


@dataclass(frozen=True)
class Total:
    """The sums of one split over the run; None where there is no value.

    Attributes:
        split: its name.
        first: the loss at the first checkpoint.
        last: the loss at the last checkpoint.
        change: the measured change of the loss, over the intervals that have LC.
        lc: the sum of all LC.
        gap: LC minus the change.
        abs_gap: Σ|gap| over intervals.
        abs_change: Σ|change| over intervals.
        first_order: LC by the gradients at the starts of the intervals.
        helping: share of (parameter, interval) pairs with LC < 0.
        gradients: number of full-batch gradients.
        bad: number of intervals without LC.
    """

    split: str
    first: float
    last: float
    change: float
    lc: float
    gap: float
    abs_gap: float
    abs_change: float
    first_order: float
    helping: float
    gradients: int
    bad: int


def totals(source: Source) -> list[Total]:
    """The totals of each split."""
    return [_total(source, s) for s in range(len(source.splits))]


def _total(source: Source, s: int) -> Total:
    values = source.intervals
    known = {name: values[name][s] for name in values}
    sums = {name: _sum(array) for name, array in known.items()}
    elements = sums["n_helping"] + sums["n_hurting"] + sums["n_zero"]
    first, last = known["loss_start"][0], known["loss_end"][-1]
    return Total(
        split=source.splits[s],
        first=float(first),
        last=float(last),
        change=sums["loss_change"],
        lc=sums["lc"],
        gap=sums["gap"],
        abs_gap=sums["abs_gap"],
        abs_change=sums["abs_change"],
        first_order=sums["first_order_lc"],
        helping=sums["n_helping"] / elements if elements else float("nan"),
        gradients=int(np.nansum(known["n_gradients"])),
        bad=int(np.nansum(known["n_bad"])),
    )


def _sum(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    some = np.isfinite(values)
    return float(values[some].sum()) if some.any() else float("nan")


def lede(source: Source, found: Total) -> str:
    """The run in a few sentences, from the first split."""
    known = found.first == found.first and found.last == found.last
    change = found.last - found.first if known else found.change
    direction = "fell" if change < 0 else "rose"
    if found.lc != found.lc:
        return f"No interval has LC on {one_line(found.split)}."
    if known:
        how = f"{direction} from {plain(found.first)} to {plain(found.last)}"
    else:
        how = f"{direction} by {plain(abs(found.change))}"
    run = source.n_intervals
    parts = [f"Over {count(run, 'interval')} the {one_line(found.split)} loss {how}."]
    lc = source.totals[0]
    best = int(np.argmin(lc))
    if lc[best] < 0 and found.lc < 0:
        share = percent(lc[best], found.lc, 2)
        parts.append(
            f"{one_line(source.layers[best])} did most: {signed(lc[best])}, {share} of Σ LC."
        )
    least = MATERIAL * abs(found.change)
    hurting = [source.layers[i] for i in np.argsort(-lc) if lc[i] > least]
    verb = "ends" if len(hurting) == 1 else "end"
    nobody = f"No layer hurts by more than {percent(MATERIAL, 1)} of it in total."
    parts.append(f"{listed(hurting)} {verb} above 0: hurting." if hurting else nobody)
    if found.helping == found.helping:
        parts.append(
            f"A parameter helps at {percent(found.helping, 1)} of the iterations on average."
        )
    return " ".join(parts)


def cards(found: Total) -> list[tuple[str, str, str]]:
    """The headline numbers: name, value, and a line of explanation."""
    ends = f"from {plain(found.first, 4)} to {plain(found.last, 4)}"
    whole = found.first == found.first and not found.bad
    change = ends if whole else "measured over the intervals that have LC"
    cards = [
        ("Loss change", signed(found.change, 4), f"{change}, split {one_line(found.split)}"),
        ("Σ LC", signed(found.lc, 4), "loss change allocated to all parameters"),
        (
            "Closure",
            percent(abs(found.gap), abs(found.change), 2),
            "|gap| / |change| over the run; interval by interval, Σ|gap| / Σ|change| is "
            + percent(found.abs_gap, found.abs_change, 2),
        ),
        (
            "Helping",
            percent(found.helping, 1),
            "of (parameter, iteration) pairs lowered the loss",
        ),
        (
            "Gradients",
            f"{found.gradients:,}",
            f"full-batch gradients of {one_line(found.split)}, endpoints shared; one more per span",
        ),
    ]
    return cards


def settings(plan: Plan, n_intervals: int) -> list[tuple[str, str]]:
    """The settings that decide the answer."""
    asked = plan.settings
    refined = f", refined to rtol {asked.rtol:g}" if asked.refine else ""
    drawn = [split for split in plan.splits if split.drawn_from is not None]
    samples = ", ".join(f"{one_line(s.name)} {s.n_samples:,}" for s in plan.splits)
    if drawn:
        samples += f" (drawn with seed {asked.sample_seed}: estimates)"
    return [
        ("Rule", asked.rule + refined),
        ("Precision", f"{asked.dtype}, sums in float64"),
        ("BatchNorm", f"{asked.batch_norm} statistics"),
        ("Samples", samples),
        ("Batch", f"up to {plan.batch_size:,} samples, {plan.memory_format}"),
        ("Windows", f"{plan.window:,} steps"),
        ("Steps", f"{plan.steps[0]:,} to {plan.steps[-1]:,}, {n_intervals:,} intervals"),
        ("Parameters", f"{sum(la.numel for la in plan.layers if la.kind == 'parameter'):,}"),
    ]
