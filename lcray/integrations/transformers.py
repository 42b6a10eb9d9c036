"""Hugging Face Transformers: a callback that records, and tasks from a Trainer's output directory.

Legend: B samples per batch, S positions, V entries of the vocabulary, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lcray.checkpoints import Recorder
from lcray.errors import RecorderError
from lcray.integrations.extras import missing
from lcray.integrations.language import classification_task as classification_task
from lcray.integrations.language import language_model_task as language_model_task

try:
    from transformers import (
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise missing(__name__, "transformers") from error


class RecorderCallback(TrainerCallback):
    """Record a run while a `transformers.Trainer` trains.

    It records the state before the first step, then one checkpoint per optimizer step (not per
    batch, under gradient accumulation).

    Example::

        Trainer(model=model, args=args, train_dataset=data,
                callbacks=[RecorderCallback("runs/mine")])

    A step has the number `TrainerState.global_step`, so it agrees with the Trainer's
    ``checkpoint-N``. Resuming from a checkpoint appends. If the run already goes on beyond N, pass
    ``overwrite=True``, which first removes the checkpoints after N. On several processes, rank 0
    writes; for a model under FSDP, it writes the whole model.

    Args:
        directory: where the run goes; not the Trainer's own output directory.
        every: write every k-th step. The last step is always recorded.
        overwrite: remove checkpoints later than the step that training begins from.
        options: of `lcray.Recorder`: `queue_mib`, `trainable_only`, `task`, `metadata`.

    Raises:
        RecorderError: (in training) as `lcray.Recorder` does; or DeepSpeed trains, which hides the
            weights.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int = 1,
        overwrite: bool = False,
        **options: Any,
    ):
        self._directory = directory
        self._options: Mapping[str, Any] = {"every": every, "overwrite": overwrite, **options}
        self._recorder: Recorder | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Record the state that training begins from."""
        if args.deepspeed:
            raise RecorderError(
                "DeepSpeed keeps the weights to itself; train with DDP or FSDP to record"
            )
        self._end(complete=False)  # of a training that failed
        self._recorder = Recorder(model, self._directory, start=state.global_step, **self._options)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record one optimizer step."""
        if self._recorder is not None:
            self._recorder.step()
        self._record_if_last(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the last step, if an evaluation or a callback has decided that it is the last."""
        self._record_if_last(control)

    on_epoch_end = on_save

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write what is queued, and end the run."""
        # With load_best_model_at_end, the model now has the state of another step.
        self._end(complete=not args.load_best_model_at_end)

    def _record_if_last(self, control: TrainerControl) -> None:
        if self._recorder is not None and control.should_training_stop:
            self._recorder.record_last()

    def _end(self, *, complete: bool) -> None:
        if self._recorder is not None:
            self._recorder.close(complete=complete)
            self._recorder = None
