"""The training side: one safetensors file per step, written while training goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from lcray.checkpoints import ranks
from lcray.checkpoints.recording import Session, Settings, expected_start
from lcray.checkpoints.recording import file_name as file_name
from lcray.checkpoints.snapshot import contents_of, tensors_of
from lcray.errors import RecorderError


class Recorder:
    """Record a model while it trains, without changing how it trains.

    Two lines in a plain loop::

        recorder = lcray.Recorder(model, "runs/mnist")
        ...
            optimizer.step(); recorder.step()

    The state before the first update is written at construction. Each `step` copies the current
    state, and a background thread writes it. Files appear whole or not at all (temporary name,
    fsync, rename). Queued files are written when the interpreter exits, even without `close`; a
    process that is killed loses at most the queued files.

    A checkpoint holds the parameters (a tied one once) and persistent buffers, in their own dtypes
    and under names without the prefixes of wrappers; `run.json` describes them.

    **What a step is.** One call of `step`, or with `optimizer=` one `optimizer.step()`. With
    gradient accumulation, this counts updates, not batches. Under a `torch.amp.GradScaler`, call
    `step` once per iteration: a skipped update is then a step without movement. The hook alone does
    not see an update that the scaler skipped (the scaler does not call the optimizer, unless it is
    a fused one). To count skipped updates, also call `step` after ``scaler.step(optimizer)``: it
    counts the iteration if the hook has not, and does nothing if the hook has. So never call `step`
    once per micro-batch: the micro-batches between two updates would count as skipped updates. If
    no scaler skips, leave counting to the hook alone.

    **Resuming** appends. Without `start`, the model must hold the last checkpoint's values, bit
    for bit, and the next step follows it. With ``start=N``: if a checkpoint of step N exists, the
    model must hold its values; if none does, the model's state is written as step N. Checkpoints
    later than N are an error, unless ``overwrite=True``, which removes them first.

    **On several processes** (a torch.distributed process group), make the recorder on each of
    them: rank 0 writes, and the others only count, without `start` from the last step that they
    see in the directory. For a sharded model (FSDP), all processes gather it and rank 0 writes the
    whole: all processes must make the recorder, and call `step` and `close`.

    Args:
        model: the model in training; wrappers (data parallel, sharded, compiled) are allowed.
        directory: where the run goes; created if missing. One recorder at a time.
        optimizer: record after each of its steps, by a hook.
        every: write every k-th step.
        queue_mib: bound on the memory for queued snapshots in MiB (at least one is held); `step`
            waits if the disk is slower than training.
        trainable_only: leave out parameters that do not require gradients now (adapters on a
            fixed base).
        task: the reference of the task, ``package.module:attribute``, stored in `run.json`.
        metadata: any JSON value, stored in `run.json`.
        start: the step that training begins or resumes from.
        overwrite: remove the checkpoints later than `start`.
        every_rank: write on every rank, each into a directory of its own; for ranks that each train
            a model of their own.

    Raises:
        RecorderError: the directory cannot be written, is in use, or holds another model or other
            values; the first checkpoint cannot be written.
        UsageError: an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | os.PathLike[str],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        every: int = 1,
        queue_mib: float = 256,
        trainable_only: bool = False,
        task: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        start: int | None = None,
        overwrite: bool = False,
        every_rank: bool = False,
    ):
        settings = Settings(
            every, queue_mib, trainable_only, task, dict(metadata or {}), start, overwrite
        )
        self._model, self._every = model, every
        self._gathered = ranks.Gathered(model) if ranks.is_sharded(model) else None
        self._session: Session | None = None  # on the ranks that write
        self._step = self._begin(directory, settings, every_rank or ranks.rank() == 0)
        self._recorded = self._step
        self._closed = self._counted_by_hook = False
        self._hook = optimizer.register_step_post_hook(self._after_step) if optimizer else None

    def _begin(self, directory: str | os.PathLike[str], settings: Settings, writes: bool) -> int:
        """Open the session, if this rank writes; returns the step that training begins from."""
        if self._gathered is None:
            if not writes:
                return expected_start(directory, settings.start)
            self._session = Session(directory, contents_of(self._model), settings)
            return self._session.start
        contents, step = self._gathered.contents(), None
        try:
            if ranks.rank() == 0:
                self._session = Session(directory, contents, settings)
                step = self._session.start
        finally:
            agreed = ranks.agree_on_step(self._model, step)
        return agreed

    @property
    def last_step(self) -> int:
        """The last step that was counted (its file may still be queued)."""
        return self._step

    def step(self) -> None:
        """Count one step and, every k-th time, queue the model's current state.

        With `optimizer=`, it does nothing for an update that the hook has counted, and counts a
        step without movement if there was no update. Call it only if a gradient scaler may skip
        updates, once after each ``scaler.step(optimizer)``.

        Raises:
            RecorderError: an earlier checkpoint could not be written (then every call raises), the
                model's tensors have changed, or the recorder is closed.
        """
        if not self._counted_by_hook:
            return self._advance()
        self._counted_by_hook = False
        self._check()

    def record_last(self) -> None:
        """Record the last counted step now, if `every` left it out.

        For loops that change the model before `close`, such as restoring the best weights.

        Raises:
            RecorderError: as for `step`.
        """
        self._check()
        if self._is_left_out:
            self._record()

    def close(self, *, complete: bool = True) -> None:
        """Record the last step if `every` left it out, write the queue, and end the run.

        Further calls do nothing, and neither does the copy in a forked process.

        Args:
            complete: False leaves the last step out if `every` did: use it when the model is not
                in the state of that step.

        Raises:
            RecorderError: a checkpoint could not be written.
        """
        if self._closed or not (self._session is None or self._session.is_open):
            return
        self._closed = True
        if self._hook is not None:
            self._hook.remove()
        try:
            if complete and self._is_left_out:
                self._record()
        except BaseException:
            if self._session is not None:
                self._session.abandon()
            raise
        if self._session is not None:
            self._session.close(self._step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close(complete=error is None)  # an error may have come in the middle of a step
        except RecorderError as failure:
            if error is None:
                raise
            error.add_note(f"and the recorder: {failure}")

    def _after_step(self, *_: object) -> None:
        self._advance()
        self._counted_by_hook = True

    @property
    def _is_left_out(self) -> bool:
        return self._step % self._every != 0 and self._step != self._recorded

    def _check(self) -> None:
        if self._session is not None:
            self._session.check()
        elif self._closed:
            raise RecorderError("the recorder is closed; make a new one")

    def _advance(self) -> None:
        self._check()
        self._step += 1
        if self._step % self._every == 0:
            self._record()

    def _record(self) -> None:
        if self._gathered is not None:
            tensors = self._gathered.tensors()  # on every rank, even on ranks that write nothing
        elif self._session is not None:
            tensors = tensors_of(self._model)
        if self._session is not None:
            self._session.record(self._step, tensors)
        self._recorded = self._step
