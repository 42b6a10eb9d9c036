"""A real headless Chromium for tests of pages, and what they look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*FLAGS])
        yield browser
        browser.close()


@dataclass
class Sight:
    """A page that is open.

    Attributes:
        page: Playwright's.
        said: errors of the page and lines of its console.
        asked: addresses that it asked for, other than its own file.
    """

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Until what was begun is drawn."""
        self.page.evaluate("() => new Promise((r) => requestAnimationFrame(() => setTimeout(r)))")

    def show(self, section: str) -> None:
        """Scrolls to a section until its chart is drawn."""
        self.page.evaluate(
            f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})"
        )
        self.page.wait_for_selector(f"#{section} .chart .main-svg", state="attached")
        self.settle()

    def choose(self, section: str, option: str, number: int = 0) -> None:
        """Takes an option of a section's drop-down."""
        self.page.locator(f"#{section} .controls select").nth(number).select_option(label=option)
        self.settle()

    def rows(self, section: str) -> list[list[Any]]:
        """Every row of a section's table, numbers as they are."""
        found: list[list[Any]] = self.page.evaluate(_ROWS, section)
        return found

    def move(self, at: int) -> None:
        """Moves the slider, as a key would."""
        self.page.evaluate(
            "(at) => { const s = document.getElementById('slider'); s.value = at; "
            "s.dispatchEvent(new Event('input')); }",
            at,
        )
        self.settle()


_ROWS = """(id) => {
  const section = document.getElementById(id), details = section.querySelector("details.table");
  if (!details.open) { details.open = true; details.dispatchEvent(new Event("toggle")); }
  const rows = [], value = (td) => ("value" in td.dataset ? +td.dataset.value : td.textContent);
  for (;;) {
    for (const tr of details.querySelectorAll("tbody tr")) rows.push([...tr.children].map(value));
    const buttons = [...details.querySelectorAll(".pager button")];
    const later = buttons.find((button) => button.textContent === "later");
    if (!later || later.disabled) return rows;
    later.click();
  }
}"""


def look(browser: Any, path: Path, *, width: int = 1280, theme: str = "light") -> Sight:
    """Opens a file as a page and waits until its first chart is there."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page = context.new_page()
    sight = Sight(page)
    page.on("console", lambda message: sight.said.append(message.text))
    page.on("pageerror", lambda error: sight.said.append(str(error)))
    own = path.resolve().as_uri()
    page.on("request", lambda request: note(sight, request.url, own))
    page.goto(own)
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    return sight


def note(sight: Sight, address: str, own: str) -> None:
    """Keeps an address that is neither the page's own nor in memory."""
    if address != own and not address.startswith(("blob:", "data:")):
        sight.asked.append(address)
