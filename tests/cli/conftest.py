"""The command line in this process."""

from __future__ import annotations

import pytest
from console import Lcray, Ran, exit_code


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lcray:
    """Runs ``lcray ARGUMENTS``."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        return Ran(exit_code(*arguments), *capfd.readouterr())

    return run
