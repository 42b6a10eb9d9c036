"""The colours, for eyes of four kinds, and in the pictures of both makers."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from repository import PACKAGE

from lcray.figures.palette import DARK, LIGHT, Palette, by_depth, css

#: Machado, Oliveira and Fernandes (2009), severity 1, of linear RGB: no red, green or blue cones.
SIGHTS = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
THEMES = pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])


def linear(colour: str) -> np.ndarray:
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB under D65."""
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    t = to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(a: str, b: str) -> float:
    """The least difference (CIE 1976 ΔE) of two colours, over all eyes."""
    return min(
        float(np.linalg.norm(lab(m @ linear(a)) - lab(m @ linear(b)))) for m in SIGHTS.values()
    )


def contrast(a: str, b: str) -> float:
    """WCAG 2's."""
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@THEMES
def test_what_differs_can_be_told_apart_by_all_eyes(palette: Palette) -> None:
    assert apart(palette.helps, palette.hurts) > 80
    for a, b in combinations([*palette.categories, palette.hurts], 2):
        assert apart(a, b) > 15, (a, b)
    lowest, middle, highest = palette.diverging[0], palette.diverging[4], palette.diverging[-1]
    assert min(apart(lowest, highest), apart(lowest, middle), apart(middle, highest)) > 30
    for low, high in zip(palette.diverging[:4], palette.diverging[:4:-1], strict=True):
        assert apart(low, high) > 30, "equal sizes of either sign"
    assert apart(palette.missing, palette.diverging[4]) > 8


@THEMES
def test_marks_and_text_stand_out_from_the_page(palette: Palette) -> None:
    for colour in (palette.helps, palette.hurts, palette.measured, *palette.categories):
        assert contrast(colour, palette.page) >= 3, colour
    for colour in (palette.ink, palette.muted, palette.helps, palette.hurts_text):
        assert contrast(colour, palette.page) >= 4.5, colour


@THEMES
def test_depth_goes_from_dark_to_light(palette: Palette) -> None:
    for kind, m in SIGHTS.items():
        light = [lab(m @ linear(c))[0] for c in by_depth(6, palette)]
        assert (np.diff(light) > 4).all(), kind
    assert by_depth(1, palette) == [palette.depth[0]]
    assert by_depth(8, palette) == [*palette.depth]
    middle = [(a + b) / 2 for a, b in zip(*map(to_rgb, palette.depth[:2]), strict=True)]
    assert to_rgb(by_depth(15, palette)[1]) == pytest.approx(middle, abs=1 / 255)


def test_depth_is_viridis() -> None:
    for palette, ends in ((LIGHT, (0, 0.7)), (DARK, (0.35, 0.35 + 0.65 * 7 / 8))):
        viridis = [to_hex(c) for c in colormaps["viridis"](np.linspace(*ends, 8))]
        assert [*palette.depth] == viridis


def test_custom_properties_of_either_theme() -> None:
    light, dark = css().splitlines()
    assert light.startswith(":root {") and f"--hurts-text: {LIGHT.hurts_text};" in light
    assert dark.startswith(':root[data-theme="dark"] {') and f"--helps: {DARK.helps};" in dark


def test_no_other_module_has_colours_of_its_own() -> None:
    files = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".js", ".css")]
    found = [p.name for p in files if re.search(r"#[0-9a-fA-F]{6}\b", p.read_text())]
    assert found == ["palette.py"]
