"""The output that figures and exports are made of."""

from __future__ import annotations

import planting
import pytest

import lcray
from lcray.tables.reading.results import Results


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """That of `planting.picture`. Read only."""
    return lcray.open(planting.picture(tmp_path_factory.mktemp("figures") / "out"))
