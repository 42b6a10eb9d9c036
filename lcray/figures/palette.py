"""The colours of all figures, in `lcray.plots` and in the report: one palette, light and dark.

Blue helps and vermilion hurts. The colours work for colour-blind readers and have enough contrast
with their page (WCAG's 3 to 1): `tests/figures/test_palette.py` measures both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Palette:
    """Colours for one background, in CSS notation.

    Attributes:
        page: the background.
        raised: of boxes on the page.
        warn: of warnings.
        ink: text, and lines whose colour has no meaning.
        muted: less important text.
        line: rules between parts.
        grid: grid lines of a chart.
        zero: axes.
        rest: lines that are not highlighted.
        measured: a measured loss, next to its reconstruction from LC.
        faint: the area below the third category.
        missing: cells of a map without LC.
        helps: LC < 0.
        hurts: LC > 0.
        hurts_text: the same, for text.
        marker: the band of the chosen interval.
        marker_line: its edge.
        diverging: LC from the most helping to the most hurting; the middle is 0.
        categories: things without an order: splits, runs, quantities. None of them is `hurts`.
        depth: layers from the input to the output, for `by_depth`.
    """

    page: str
    raised: str
    warn: str
    ink: str
    muted: str
    line: str
    grid: str
    zero: str
    rest: str
    measured: str
    faint: str
    missing: str
    helps: str
    hurts: str
    hurts_text: str
    marker: str
    marker_line: str
    diverging: tuple[str, ...]
    categories: tuple[str, ...]
    depth: tuple[str, ...]


#: Blue, green and vermilion are from Okabe and Ito; layers use viridis without its ends.
LIGHT = Palette(
    page="#ffffff",
    raised="#f6f7f9",
    warn="#fff4e5",
    ink="#16191d",
    muted="#5b6470",
    line="#dde1e6",
    grid="#e6e9ed",
    zero="#8a939e",
    rest="#c9ced5",
    measured="#8a939e",
    faint="rgba(153,0,102,0.12)",
    missing="#dddddd",
    helps="#0072b2",
    hurts="#d55e00",
    hurts_text="#a8460a",
    marker="rgba(22,25,29,0.16)",
    marker_line="rgba(22,25,29,0.55)",
    diverging=(
        "#00395c",
        "#0072b2",
        "#61a8d4",
        "#b9d8ec",
        "#f7f7f7",
        "#f9cdae",
        "#ec9450",
        "#d55e00",
        "#7f3406",
    ),
    categories=("#0072b2", "#009e73", "#990066", "#2000a0", "#a060ff", "#5a2d00"),
    depth=("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21908d", "#22a884", "#44bf70"),
)
DARK = Palette(
    page="#14171b",
    raised="#1d2127",
    warn="#3a2c17",
    ink="#e9ecef",
    muted="#a3acb8",
    line="#343a42",
    grid="#2a3037",
    zero="#6d7680",
    rest="#474f59",
    measured="#6d7680",
    faint="rgba(184,82,154,0.25)",
    missing="#3b424b",
    helps="#6aaef2",
    hurts="#f5924d",
    hurts_text="#f7a66c",
    marker="rgba(233,236,239,0.2)",
    marker_line="rgba(233,236,239,0.6)",
    diverging=(
        "#a9d3ff",
        "#6aaef2",
        "#3578b8",
        "#234a70",
        "#1a1e23",
        "#6b3d17",
        "#b5621f",
        "#f5924d",
        "#ffd0a8",
    ),
    categories=("#6aaef2", "#1fa374", "#b8529a", "#ffe27a", "#e3dcff", "#8b5cf6"),
    depth=("#2f6c8e", "#27808e", "#20938c", "#22a785", "#38b977", "#60ca60", "#93d741", "#cae11f"),
)
THEMES = {"light": LIGHT, "dark": DARK}


def by_depth(n: int, palette: Palette = LIGHT) -> list[str]:
    """Colours of n things in the model's order, as far apart as `palette.depth` allows."""
    last = len(palette.depth) - 1
    return [_between(palette.depth, last * i / max(n - 1, 1)) for i in range(n)]


def _between(colours: Sequence[str], at: float) -> str:
    """The interpolated colour at a position in a list of colours."""
    i = min(int(at), len(colours) - 2)
    pair = ([int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in colours[i : i + 2])
    mixed = (round(a + (at - i) * (b - a)) for a, b in zip(*pair, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def themes() -> dict[str, dict[str, str | tuple[str, ...]]]:
    """The palettes by theme, for scripts."""
    return {name: asdict(palette) for name, palette in THEMES.items()}


def css() -> str:
    """The single colours as CSS custom properties (``--hurts-text``), with the dark theme's."""
    rules = []
    for name, selector in (("light", ":root"), ("dark", ':root[data-theme="dark"]')):
        single = {k: v for k, v in asdict(THEMES[name]).items() if isinstance(v, str)}
        body = " ".join(f"--{key.replace('_', '-')}: {value};" for key, value in single.items())
        rules.append(f"{selector} {{ {body} }}")
    return "\n".join(rules)
