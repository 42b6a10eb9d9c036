"""Checkpoints on disk: recording them, finding and reading them, and auditing a run."""

from lcray.checkpoints.audit import Audit, Finding, audit
from lcray.checkpoints.recorder import Recorder
from lcray.checkpoints.series import Checkpoint, CheckpointSeries, State, open_series

__all__ = [
    "Audit",
    "Checkpoint",
    "CheckpointSeries",
    "Finding",
    "Recorder",
    "State",
    "audit",
    "open_series",
]
