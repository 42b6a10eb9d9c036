"""The command `lcray compare`."""

from __future__ import annotations

from typing import Any

import click

import lcray
from lcray.cli.findings import ranges
from lcray.cli.options import Answer, Command, answers, command

_TESTS = ("p_t", "p_t_adjusted", "p_permutation_adjusted")
_SHOWN = ("split", "condition", "layer", "n", "lc", "lc_se", *_TESTS)


class _Conditions(Command):
    """Reads ``--against B1 B2`` as ``--against B1 --against B2``; B2 never joins the first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        against = False
        for word in args:
            if against and not word.startswith("-") and words[-1] != "--against":
                words.append("--against")
            if word.startswith("-"):
                against = word.split("=")[0] == "--against"
            words.append(word)
        return super().parse_args(ctx, words)


@command(
    "lcray compare out/seed-0 out/seed-1 out/seed-2",
    "lcray compare out/a-0 out/a-1 --against out/b-0 out/b-1 --paired",
    cls=_Conditions,
)
@click.argument("outs", nargs=-1, required=True, metavar="OUT...")
@click.option("--against", multiple=True, help="Outputs of the other condition.", metavar="OUT...")
@click.option(
    "--paired", is_flag=True, help="Outputs of both conditions share a seed, in their order."
)
@click.option("--window", type=int, help="Also windows of this width in steps.")
@click.option(
    "--windows",
    metavar="NAME=A:B,…",
    callback=ranges,
    help="Also windows by name: the intervals with A <= start step < B.",
)
@click.option("--level", default=0.95, show_default=True, help="Level of the confidence intervals.")
@click.option(
    "--adjust",
    type=click.Choice(["bh", "by"]),
    default="bh",
    show_default=True,
    help="False discovery rate: Benjamini-Hochberg, or -Yekutieli for any dependence.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed of the permutations that are drawn."
)
@answers
def compare(outs: tuple[str, ...], **options: Any) -> Answer:
    """LC of every layer over repeated runs, and the difference between two conditions.

    Every OUT is a separate run, with another seed; p-values need at least six. Adjusted ones
    are for all layers.
    """
    from rich.console import Group

    from lcray.analyses.tidy import notes_of
    from lcray.cli.display.frames import frame_table, records

    found = lcray.compare(*outs, **options)
    frame = found.to_pandas()
    data = records(frame)
    frame = frame.assign(layer=frame["layer"].astype(object).replace("", "all"))
    shown = ("window", *_SHOWN) if frame["window"].nunique() > 1 else _SHOWN
    table = frame_table(frame[[*shown]], rows=len(frame))
    return Answer(data, lambda: Group(table, *notes_of(found)))
