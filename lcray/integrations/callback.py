"""What both names of Lightning share: recording one training of a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lcray.checkpoints import Recorder, ranks
from lcray.errors import RecorderError, UsageError


class Recording:
    """One training's recorder, and its hooks on the optimizers.

    Lightning counts a step each time that an optimizer steps; so does this, by torch's own hooks:
    under automatic and manual optimization, with one optimizer or several.
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
        """Count updates that a gradient scaler has skipped: steps without movement."""
        while self._recorder.last_step < step:
            self._recorder.step()

    def close(self, *, complete: bool) -> None:
        """Take the hooks off, write what is queued, and end the run."""
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
