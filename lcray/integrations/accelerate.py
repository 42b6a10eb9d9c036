"""A recorder for training loops with Accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from lcray.checkpoints import Recorder, ranks
from lcray.integrations.extras import missing

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise missing(__name__, "accelerate") from error


def recorder(
    accelerator: Accelerator,
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: torch.optim.Optimizer,
    **options: Any,
) -> Recorder:
    """A recorder of a prepared model that records each step of its prepared optimizer, by a hook.

    Call it on all processes, after `accelerator.prepare`. It counts updates, not batches: if
    `accelerator.accumulate` skips an update, there is no step.

    Args:
        accelerator: the accelerator that prepared both.
        model: as `accelerator.prepare` returned it; recorded names are those of the model inside.
        directory: where the run goes.
        optimizer: as `accelerator.prepare` returned it.
        options: of `lcray.Recorder`.

    Raises:
        RecorderError: as `lcray.Recorder` does.
    """
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    # An unwrapped sharded model would have parts only; the recorder gathers the wrapped one.
    plain = model if ranks.is_sharded(model) else accelerator.unwrap_model(model)
    return Recorder(plain, directory, optimizer=inner, **options)
