"""A callback that records while `lightning.pytorch` trains."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from lcray.integrations.callback import Recording, options_of
from lcray.integrations.extras import missing

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise missing(__name__, "lightning") from error


class RecorderCallback(Callback):
    """Record a run: the state before the first step, then one checkpoint an optimizer step.

    Example::

        Trainer(callbacks=[RecorderCallback("runs/mine", module="model")])

    A step bears the number of `trainer.global_step`, which counts the steps of every optimizer,
    not batches. Resuming from a checkpoint appends; where the run goes on beyond it already, pass
    ``overwrite=True``, which removes what comes after it first. On several processes (DDP)
    rank 0 writes.

    Args:
        directory: where the run goes.
        module: the submodule to record, such as ``"model"``. The names in the run are those of its
            state dict; without it those of the LightningModule's, such as ``model.0.weight``.
        every: write every k-th step. The last one is recorded in any case.
        overwrite: remove checkpoints later than the step that training begins from.
        options: of `lcray.Recorder`: `queue_mib`, `trainable_only`, `task`, `metadata`.

    Raises:
        RecorderError: (in training) as `lcray.Recorder` does; or the model is sharded.
        UsageError: (in training) there is no such submodule.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        module: str | None = None,
        every: int = 1,
        overwrite: bool = False,
        **options: Any,
    ):
        self._module = module
        self._options = options_of(directory, every, overwrite, options)
        self._recording: Recording | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Record the state that training begins from."""
        self._end(complete=False)  # of a training that failed
        self._recording = Recording(trainer, pl_module, self._module, **self._options)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Count the updates of this batch that no optimizer has made."""
        if self._recording is not None:
            self._recording.catch_up(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Write what is queued, and end the run."""
        self._end(complete=True)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Write what is queued."""
        self._end(complete=False)

    def _end(self, *, complete: bool) -> None:
        if self._recording is not None:
            self._recording.close(complete=complete)
            self._recording = None
