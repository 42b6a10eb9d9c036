"""The training side: one safetensors file a step, written beside the training loop."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from lcray.checkpoints import runfile
from lcray.checkpoints.bits import same_bits
from lcray.checkpoints.layout import Layout, Slot, layout_of, on_accelerator, snapshot
from lcray.checkpoints.series import Checkpoint, list_checkpoints, read_checkpoint
from lcray.checkpoints.storage import LockedDirectory
from lcray.checkpoints.writer import BackgroundWriter
from lcray.errors import CheckpointError, RecorderError, UsageError
from lcray.storage import Remote, place


def file_name(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"step-{step:08d}.safetensors"


class Recorder:
    """Record a model while it trains, without changing how it trains.

    Two lines in a plain loop::

        recorder = lcray.Recorder(model, "runs/mnist")
        ...
            optimizer.step(); recorder.step()

    The state before the first update is written at construction; each `step` copies the state of
    that moment and a background thread writes it. Files appear whole or not at all (temporary
    name, fsync, rename). Queued files are written when the interpreter exits, even without
    `close`; a process that is killed loses at most what is queued.

    Stored are the parameters (a tied one once) and persistent buffers, in their own dtypes and
    under names without the prefixes of wrappers; `run.json` describes them.

    **What a step is.** One call of `step`, or with `optimizer=` one `optimizer.step()`: with
    gradient accumulation that counts updates, not batches. Under a `torch.amp.GradScaler`, call
    `step` once an iteration: a skipped update is then a step without movement. The hook alone does
    not see an update that the scaler skipped (the scaler does not call the optimizer, unless it is
    a fused one). Calling `step` after ``scaler.step(optimizer)`` as well settles this: it counts
    the iteration where the hook has not, and does nothing where it has.

    **Resuming** appends. Without `start`, the model must hold the last checkpoint's values, bit
    for bit, and the next step follows it. With ``start=N``: where a checkpoint of N exists the
    model must hold its values; where none does, its state is written as step N. Checkpoints later
    than N are an error, unless ``overwrite=True``, which removes them first.

    Args:
        model: the model in training; wrappers (data parallel, compiled) are welcome.
        directory: where the run goes; made if missing. One recorder at a time.
        optimizer: record after each of its steps, by hook.
        every: write every k-th step.
        queue_mib: bound on the memory for queued snapshots in MiB (at least one is held); `step`
            waits where the disk is slower than training.
        trainable_only: leave out parameters that do not require gradients now (adapters on a
            fixed base).
        task: the reference of the task, ``package.module:attribute``, kept in `run.json`.
        metadata: anything JSON can hold, kept in `run.json`.
        start: the step that training begins or resumes from.
        overwrite: remove the checkpoints later than `start`.

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
    ):
        settings = _settings(every, queue_mib, trainable_only, task, metadata, start, overwrite)
        self._model, self._every = model, every
        self._layout = layout_of(model, trainable_only=trainable_only)
        self._directory = LockedDirectory(_local(directory))
        pinned = on_accelerator(model)
        try:
            first = Slot(self._layout, pinned=pinned)
            snapshot(self._layout, model, first)
            self._step, self._content = _begin(
                self._directory, self._layout, first, settings, start, overwrite
            )
        except BaseException:
            self._directory.close()
            raise
        write, layout = _file_writer(self._directory, self._layout), self._layout
        limit = max(1, int(queue_mib * 2**20) // max(1, layout.nbytes))
        self._writer = BackgroundWriter(write, lambda: Slot(layout, pinned=pinned), limit)
        # Runs at interpreter exit too; it must not refer to the recorder itself.
        self._finalizer = weakref.finalize(self, _finish, self._writer, self._directory)
        self._counted_by_hook = False
        self._hook = optimizer.register_step_post_hook(self._after_step) if optimizer else None

    @property
    def last_step(self) -> int:
        """The step that was counted last (its file may still be queued)."""
        return self._step

    def step(self) -> None:
        """Count one step and, every k-th, queue the model's state of this moment.

        With `optimizer=` it does nothing for an iteration that the hook has counted.

        Raises:
            RecorderError: an earlier checkpoint could not be written (then every call raises), the
                model's tensors have changed, or the recorder is closed.
        """
        if not self._counted_by_hook:
            return self._advance()
        self._counted_by_hook = False
        self._check()

    def close(self) -> None:
        """Record the last step if `every` left it out, write what is queued, and end the run.

        Further calls do nothing, and neither does the copy in a forked process.

        Raises:
            RecorderError: a checkpoint could not be written.
        """
        self._close(complete=True)

    def _close(self, *, complete: bool) -> None:
        if not self._finalizer.alive or self._directory.is_forked:
            return
        if self._hook is not None:
            self._hook.remove()
        self._finalizer.detach()
        try:
            if complete and self._step % self._every:
                self._record()
            self._writer.close()
            ended = {**self._content, "ended": True, "last_step": self._step}
            _write(self._directory, runfile.NAME, runfile.encode(ended))
        finally:
            self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._close(complete=error is None)  # an error may have come in the middle of a step
        except RecorderError as failure:
            if error is None:
                raise
            error.add_note(f"and the recorder: {failure}")

    def _after_step(self, *_: object) -> None:
        self._advance()
        self._counted_by_hook = True

    def _check(self) -> None:
        if not self._finalizer.alive:
            raise RecorderError(f"{self._directory.path}: the recorder is closed; make a new one")
        self._writer.check()

    def _advance(self) -> None:
        self._check()
        self._step += 1
        if self._step % self._every == 0:
            self._record()

    def _record(self) -> None:
        slot = self._writer.acquire()
        try:
            snapshot(self._layout, self._model, slot)
        except BaseException:
            self._writer.release(slot)
            raise
        self._writer.submit(self._step, slot)


def _finish(writer: BackgroundWriter, directory: LockedDirectory) -> None:
    if directory.is_forked:
        return
    try:
        writer.close()
    finally:
        directory.close()


def _file_writer(directory: LockedDirectory, layout: Layout) -> Callable[[int, Slot], None]:
    def write(step: int, slot: Slot) -> None:
        directory.write(file_name(step), [layout.head, slot.memory])

    return write


def _write(directory: LockedDirectory, name: str, *chunks: bytes | memoryview) -> None:
    try:
        directory.write(name, chunks)
    except OSError as error:
        raise RecorderError(
            f"{directory.path / name}: cannot be written: {error.strerror}"
        ) from error


def _settings(
    every: int,
    queue_mib: float,
    trainable_only: bool,
    task: str | None,
    metadata: Mapping[str, Any] | None,
    start: int | None,
    overwrite: bool,
) -> dict[str, Any]:
    if every < 1:
        raise UsageError(f"every={every}: record every k-th step with k at least 1")
    if not queue_mib > 0:
        raise UsageError(f"queue_mib={queue_mib}: must be above 0")
    if start is not None and start < 0:
        raise UsageError(f"start={start}: steps begin at 0")
    if overwrite and start is None:
        raise UsageError("overwrite=True removes the checkpoints after start=N: give start as well")
    if task is not None and not isinstance(task, str):
        raise UsageError("task: give its reference, 'package.module:attribute'")
    kept = dict(metadata or {})
    try:
        runfile.encode(kept)
    except (TypeError, ValueError) as error:
        raise UsageError(f"metadata: JSON cannot hold it ({error})") from error
    return {"every": every, "trainable_only": trainable_only, "task": task, "metadata": kept}


@dataclass(frozen=True)
class _Start:
    """Where a session begins: at `step`, which exists as `same` or is to be written."""

    step: int
    same: Checkpoint | None
    discard: tuple[Checkpoint, ...]


def _choose_start(root: Path, start: int | None, overwrite: bool) -> _Start:
    existing = list_checkpoints(root)
    if not existing:
        return _Start(start or 0, None, ())
    step = existing[-1].step if start is None else start
    later = tuple(checkpoint for checkpoint in existing if checkpoint.step > step)
    if later and not overwrite:
        raise RecorderError(
            f"{root}: holds checkpoints later than start={step}, up to step {later[-1].step}; pass "
            "overwrite=True to remove them, or use a new directory"
        )
    for checkpoint in later:
        if checkpoint.files != (root / file_name(checkpoint.step),):
            raise RecorderError(
                f"{checkpoint.files[0]}: was not written by a recorder; remove it yourself"
            )
    same = next((checkpoint for checkpoint in existing if checkpoint.step == step), None)
    return _Start(step, same, later)


def _local(directory: str | os.PathLike[str]) -> Path:
    where = place(directory)
    if isinstance(where, Remote):
        raise RecorderError(
            f"{where}: a run is recorded on a local path; record there, and copy it afterwards"
        )
    return where


def _begin(
    directory: LockedDirectory,
    layout: Layout,
    first: Slot,
    settings: Mapping[str, Any],
    start: int | None,
    overwrite: bool,
) -> tuple[int, dict[str, Any]]:
    """Check what is there, then write `run.json` and the first checkpoint: its step and content."""
    root = directory.path
    try:
        previous = runfile.load(root)
        if previous is not None:
            runfile.check_same_layers(root, previous, layout)
        chosen = _choose_start(root, start, overwrite)
        if chosen.same is not None:
            _check_resumes(chosen.same, first)
    except CheckpointError as error:
        raise RecorderError(str(error)) from error
    if chosen.discard:
        directory.remove([Path(str(file)) for gone in chosen.discard for file in gone.files])
    content = runfile.describe(layout, settings, chosen.step, previous)
    _write(directory, runfile.NAME, runfile.encode(content))
    if chosen.same is None:
        _write(directory, file_name(chosen.step), layout.head, first.memory)
    return chosen.step, content


def _check_resumes(checkpoint: Checkpoint, first: Slot) -> None:
    stored = read_checkpoint(checkpoint).tensors
    names = sorted(stored.keys() ^ first.views.keys())
    names += [n for n in first.views if n in stored and not same_bits(first.views[n], stored[n])]
    if names:
        raise RecorderError(
            f"{checkpoint.files[0]}: the model differs from this checkpoint, in {names[0]!r} and "
            f"{len(names) - 1} more: load it first, or pass the step that training resumes from "
            "as start=N, or use a new directory"
        )
