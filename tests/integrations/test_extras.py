"""Integrations cost nothing until they are imported, and say what they lack."""

from __future__ import annotations

import importlib
import sys

import pytest

from lcray.errors import LcrayError

LIBRARIES = {
    "transformers": ("transformers", "transformers"),
    "language": ("transformers", "transformers"),
    "lightning": ("lightning", "lightning"),
    "pytorch_lightning": ("pytorch_lightning", "lightning"),
    "accelerate": ("accelerate", "accelerate"),
}


@pytest.mark.parametrize("module", LIBRARIES)
def test_a_missing_library_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, extra = LIBRARIES[module]
    for name in [each for each in sys.modules if each.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    for name in [each for each in sys.modules if each.startswith("lcray.integrations.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf'pip install "lcray\[{extra}\]"') as caught:
        importlib.import_module(f"lcray.integrations.{module}")
    assert isinstance(caught.value, LcrayError)
