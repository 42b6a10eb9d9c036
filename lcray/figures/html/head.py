"""The HTML before the charts: name, summary, headline numbers and settings."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePosixPath

from lcray.analyses.closure import Closure
from lcray.analyses.titles import WHAT_HAPPENED
from lcray.errors import one_line
from lcray.figures.html.page import table
from lcray.figures.html.sections import percent, signed
from lcray.figures.html.source import Source
from lcray.figures.html.totals import cards, lede, settings
from lcray.tables.reading.results import Results

_PLAIN_FOLDERS = ("run", "checkpoints", "ckpt", "out")


def run_name(results: Results) -> str:
    """The name of the output's run: the last folder of its address that is specific."""
    run = results.record.run or results.path
    parts = [part for part in PurePosixPath(str(run)).parts if part != "/"]
    while len(parts) > 1 and parts[-1] in _PLAIN_FOLDERS:
        parts.pop()
    return one_line("/".join(parts[-2:])) or "run"


def head(source: Source, found: Sequence[Closure], name: str) -> str:
    """The HTML before the sections: name, sentence, cards, totals and settings."""
    tiles = "".join(
        f"<div class=card><div class=label>{escape(label)}</div><div class=value>{escape(value)}"
        f"</div><div class=more>{escape(more)}</div></div>"
        for label, value, more in cards(found[0])
    )
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(one_line(value))}</dd></div>"
        for label, value in settings(source.results.plan, source.n_intervals)
    )
    notes = [*source.results.notes]
    bad = max(total.n_bad for total in found)
    if bad:
        notes.append(f"{bad} intervals have no LC: a checkpoint, loss or gradient is not finite.")
    warned = "".join(f"<p class=warning>{escape(one_line(note))}</p>" for note in notes)
    return (
        f"<header><p class=kicker>Loss change allocation</p><h1>{escape(name)}</h1>"
        f"<p class=lede>{escape(lede(source, found[0]))}</p>"
        f"<p class=reading>{escape(WHAT_HAPPENED)}</p></header>{warned}"
        f"<div class=cards>{tiles}</div>"
        f"<section id=settings><h2>Closure, and the settings that decide the answer</h2>"
        f"{totals_table(found)}<dl class=facts>{facts}</dl></section>"
    )


def totals_table(found: Sequence[Closure], names: Sequence[str] | None = None) -> str:
    """The headline numbers of every split, or of every run, as a table."""
    header = ["split" if names is None else "run", "loss change", "Σ LC", "gap", "|gap| / |change|"]
    header += ["Σ|gap| / Σ|change|", "first order", "helping", "gradients"]
    rows = [
        [
            names[i] if names else total.split,
            signed(total.loss_change, 5),
            signed(total.lc, 5),
            signed(total.gap, 3),
            percent(abs(total.gap), abs(total.loss_change)),
            percent(total.abs_gap, total.abs_change),
            signed(total.first_order_lc, 4)
            if total.first_order_lc == total.first_order_lc
            else "–",
            percent(total.helping, 1),
            f"{total.gradient_cost:,.0f}",
        ]
        for i, total in enumerate(found)
    ]
    return table(header, rows)
