"""Checkpoints on disk: recording them, finding and reading them, and auditing a run."""

from lcray.checkpoints.audit import Audit, Finding, inspect
from lcray.checkpoints.recorder import Recorder
from lcray.checkpoints.series import Checkpoint, CheckpointSeries, State, open_series

__all__ = [
    "Audit",
    "Checkpoint",
    "CheckpointSeries",
    "Finding",
    "Recorder",
    "State",
    "inspect",
    "open_series",
]
