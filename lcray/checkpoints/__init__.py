"""Checkpoints on disk: recording them, finding and reading them, and auditing a run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Name -> module, imported on first use: reading tables needs no torch.
_PUBLIC = {
    "Audit": "audit",
    "CheckpointSeries": "series",
    "Recorder": "recorder",
    "State": "reading",
    "inspect": "audit",
    "open_series": "series",
}

__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from lcray.checkpoints.audit import Audit as Audit
    from lcray.checkpoints.audit import inspect as inspect
    from lcray.checkpoints.reading import State as State
    from lcray.checkpoints.recorder import Recorder as Recorder
    from lcray.checkpoints.series import CheckpointSeries as CheckpointSeries
    from lcray.checkpoints.series import open_series as open_series


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lcray.checkpoints' has no attribute {name!r}")
    return getattr(import_module(f"lcray.checkpoints.{_PUBLIC[name]}"), name)
