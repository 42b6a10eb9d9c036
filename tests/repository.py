"""Where things are in the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lcray

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
CLUSTER = EXAMPLES / "cluster"
PACKAGE = Path(lcray.__file__).parent

needs_data = pytest.mark.skipif(
    not os.environ.get("LCRAY_DATA"), reason="LCRAY_DATA is unset: no data for the examples"
)
