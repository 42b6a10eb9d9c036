"""The common part of both Lightning callbacks: recording one training of a LightningModule."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from lcray.checkpoints import Recorder, ranks
from lcray.errors import RecorderError, UsageError


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
        self._options = {"directory": directory, "every": every, "overwrite": overwrite, **options}
        self._recorder: Recorder | None = None
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Record the state that training begins from."""
        self._end(complete=False)  # of a training that failed
        if ranks.is_sharded(trainer.strategy.model or pl_module):
            raise RecorderError(
                "Lightning shards this model, which its callback does not gather; train with "
                "DDP, or convert the checkpoints afterwards with `lcray convert`"
            )
        module = _submodule(pl_module, self._module)
        self._recorder = recorder = Recorder(module, start=trainer.global_step, **self._options)
        # Lightning counts a step each time that an optimizer steps. So do torch's own hooks: under
        # automatic and manual optimization, with one optimizer or several.
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: recorder.step())
            for optimizer in trainer.optimizers
        ]

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Count updates that a gradient scaler has skipped, as steps without movement."""
        while self._recorder is not None and self._recorder.last_step < trainer.global_step:
            self._recorder.step()

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Write what is queued, and end the run."""
        self._end(complete=True)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Write what is queued."""
        self._end(complete=False)

    def _end(self, *, complete: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._recorder is not None:
            self._recorder.close(complete=complete)
            self._recorder = None


def _submodule(pl_module: nn.Module, name: str | None) -> nn.Module:
    try:
        return pl_module if name is None else pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(sorted(dict(pl_module.named_children()))[:12])
        raise UsageError(f"module {name!r}: the LightningModule has none; it has {known}") from None
