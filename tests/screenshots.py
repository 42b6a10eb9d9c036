"""Makes the pictures of docs/img/ from reports: ``python tests/screenshots.py PAGE NAME ...``.

Each NAME is one of `VIEWS`; the page is a report, such as that of the demo, and the picture goes
to ``docs/img/report-NAME.png``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import browsing

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "img"


@dataclass(frozen=True)
class View:
    """What is looked at, and how.

    Attributes:
        section: to scroll to; empty for the head of the page.
        width: of the window in pixels.
        height: likewise.
        theme: light or dark.
    """

    section: str = ""
    width: int = 1280
    height: int = 900
    theme: str = "light"


VIEWS = {
    "demo": View(height=1160),
    "lenet": View("heat-map", height=1000),
    "narrow": View("layers", 390, 844),
    "resnet20": View("heat-map", height=1000, theme="dark"),
    "compare": View("loss"),
}


def picture(page: Path, name: str) -> Path:
    """The picture called `name` of the report at `page`."""
    view, target = VIEWS[name], IMAGES / f"report-{name}.png"
    IMAGES.mkdir(exist_ok=True)
    with browsing.chromium() as browser:
        sight = browsing.look(browser, page, width=view.width, theme=view.theme)
        sight.page.set_viewport_size({"width": view.width, "height": view.height})
        if view.section:
            sight.show(view.section)
        sight.page.wait_for_timeout(500)
        sight.page.screenshot(path=target)
    smaller(target)
    return target


def smaller(path: Path) -> None:
    """Writes a picture anew with 256 colours."""
    from PIL import Image

    with Image.open(path) as image:
        few = image.convert("RGB").quantize(
            256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
    few.save(path, optimize=True)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(picture(Path(sys.argv[1]), name))
