"""The head of the page: the run's results, how exactly they are known, and the settings."""

from __future__ import annotations

import numpy as np

from lcray.analyses.closure import Closure
from lcray.errors import one_line
from lcray.figures.html.sections import MATERIAL, count, listed, percent, plain, signed
from lcray.figures.html.source import Source
from lcray.planning.plan import Plan


def lede(source: Source, found: Closure) -> str:
    """The run in a few sentences, from the first split."""
    known = found.loss_start == found.loss_start and found.loss_end == found.loss_end
    change = found.loss_end - found.loss_start if known else found.loss_change
    direction = "fell" if change < 0 else "rose"
    if found.lc != found.lc:
        return f"No interval has LC on {one_line(found.split)}."
    if known:
        how = f"{direction} from {plain(found.loss_start)} to {plain(found.loss_end)}"
    else:
        how = f"{direction} by {plain(abs(found.loss_change))}"
    run = source.n_intervals
    parts = [f"Over {count(run, 'interval')} the {one_line(found.split)} loss {how}."]
    lc = source.totals[0]
    best = int(np.argmin(lc))
    if lc[best] < 0 and found.lc < 0:
        share = percent(lc[best], found.lc, 2)
        parts.append(
            f"{one_line(source.layers[best])} did most: {signed(lc[best])}, {share} of Σ LC."
        )
    least = MATERIAL * abs(found.loss_change)
    hurting = [source.layers[i] for i in np.argsort(-lc) if lc[i] > least]
    verb = "ends" if len(hurting) == 1 else "end"
    nobody = f"No layer hurts by more than {percent(MATERIAL, 1)} of it in total."
    parts.append(f"{listed(hurting)} {verb} above 0: hurting." if hurting else nobody)
    if found.helping == found.helping:
        parts.append(
            f"A parameter helps at {percent(found.helping, 1)} of the iterations on average."
        )
    return " ".join(parts)


def cards(found: Closure) -> list[tuple[str, str, str]]:
    """The headline numbers: name, value, and a line of explanation."""
    ends = f"from {plain(found.loss_start, 4)} to {plain(found.loss_end, 4)}"
    whole = found.loss_start == found.loss_start and not found.n_bad
    change = ends if whole else "measured over the intervals that have LC"
    half = f"; ± {plain(found.lc_half, 2)} (95 %) from sampling batches"
    sampled = half if found.lc_half > 0 else ""
    return [
        ("Loss change", signed(found.loss_change, 4), f"{change}, split {one_line(found.split)}"),
        ("Σ LC", signed(found.lc, 4), f"loss change allocated to all parameters{sampled}"),
        (
            "Closure",
            percent(abs(found.gap), abs(found.loss_change), 2),
            "|gap| / |change| over the run; interval by interval, Σ|gap| / Σ|change| is "
            + percent(found.abs_gap, found.abs_change, 2),
        ),
        ("Helping", percent(found.helping, 1), "of (parameter, iteration) pairs lowered the loss"),
        (
            "Gradients",
            f"{found.gradient_cost:,.0f}",
            f"full-batch gradients of {one_line(found.split)}, endpoints shared; one more per span",
        ),
    ]


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
