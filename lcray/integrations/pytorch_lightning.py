"""A callback that records while `pytorch_lightning` trains."""

from __future__ import annotations

from lcray.integrations.callback import RecordingCallback
from lcray.integrations.extras import missing

try:
    from pytorch_lightning.callbacks import Callback
except ImportError as error:
    raise missing(__name__, "lightning") from error


class RecorderCallback(RecordingCallback, Callback):
    """Record a run, one checkpoint per optimizer step: see `RecordingCallback`."""
