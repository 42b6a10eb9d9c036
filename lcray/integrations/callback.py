"""The common part of both Lightning callbacks: recording one training of a LightningModule."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from lcray.checkpoints import Recorder, ranks
from lcray.errors import RecorderError, UsageError


class Recording:
    """One training's recorder, and its hooks on the optimizers.

    Lightning counts a step each time that an optimizer steps. So does this class, by torch's own
    hooks: under automatic and manual optimization, with one optimizer or several.
    """

    def __init__(self, trainer: Any, pl_module: nn.Module, module: str | None, **options: Any):
        if ranks.is_sharded(trainer.strategy.model or pl_module):
            raise RecorderError(
                "Lightning shards this model, which its callback does not gather; train with "
                "DDP, or convert the checkpoints afterwards with `lcray convert`"
            )
        self._recorder = Recorder(
            _submodule(pl_module, module), start=trainer.global_step, **options
        )
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self._recorder.step())
            for optimizer in trainer.optimizers
        ]

    def catch_up(self, step: int) -> None:
        """Count updates that a gradient scaler has skipped, as steps without movement."""
        while self._recorder.last_step < step:
            self._recorder.step()

    def close(self, *, complete: bool) -> None:
        """Remove the hooks, write what is queued, and end the run."""
        for hook in self._hooks:
            hook.remove()
        self._recorder.close(complete=complete)


def _submodule(pl_module: nn.Module, name: str | None) -> nn.Module:
    try:
        return pl_module if name is None else pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(sorted(dict(pl_module.named_children()))[:12])
        raise UsageError(f"module {name!r}: the LightningModule has none; it has {known}") from None


def options_of(
    directory: Any, every: int, overwrite: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of the recorder."""
    return {"directory": directory, "every": every, "overwrite": overwrite, **options}


class RecordingCallback:
    """Record a run: the state before the first step, then one checkpoint per optimizer step.

    Example::

        Trainer(callbacks=[RecorderCallback("runs/mine", module="model")])

    A step has the number `trainer.global_step`, which counts the steps of every optimizer, not
    batches. Resuming from a checkpoint appends. If the run already goes on beyond it, pass
    ``overwrite=True``, which first removes the later checkpoints. On several processes (DDP),
    rank 0 writes.

    Args:
        directory: where the run goes.
        module: the submodule to record, such as ``"model"``. The names in the run are then the
            names of its state dict; without `module`, the names in the LightningModule, such as
            ``model.0.weight``.
        every: write every k-th step. The last step is always recorded.
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
        """Count the updates of this batch that no optimizer made."""
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
