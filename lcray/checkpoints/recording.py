"""Writing a run: the step where a session begins, and the checkpoints that it adds."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lcray.checkpoints import runfile
from lcray.checkpoints.bits import same_bits
from lcray.checkpoints.directory import LockedDirectory
from lcray.checkpoints.reading import Checkpoint, read_checkpoint
from lcray.checkpoints.series import list_checkpoints
from lcray.checkpoints.snapshot import Contents, Layout, Slot, layout_of, snapshot
from lcray.checkpoints.writer import BackgroundWriter
from lcray.errors import CheckpointError, RecorderError, UsageError
from lcray.storage import Remote, place


def file_name(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"step-{step:08d}.safetensors"


@dataclass(frozen=True)
class Settings:
    """The settings of a recorder; a `UsageError` if one is out of range."""

    every: int
    queue_mib: float
    trainable_only: bool
    task: str | None
    metadata: Mapping[str, Any]
    start: int | None
    overwrite: bool

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"every={self.every}: record every k-th step with k at least 1")
        if not self.queue_mib > 0:
            raise UsageError(f"queue_mib={self.queue_mib}: must be above 0")
        if self.start is not None and self.start < 0:
            raise UsageError(f"start={self.start}: steps begin at 0")
        if self.overwrite and self.start is None:
            raise UsageError(
                "overwrite=True removes the checkpoints after start=N: give start as well"
            )
        if self.task is not None and not isinstance(self.task, str):
            raise UsageError("task: give its reference, 'package.module:attribute'")
        try:
            runfile.encode(self.metadata)
        except (TypeError, ValueError) as error:
            raise UsageError(f"metadata: JSON cannot hold it ({error})") from error

    @property
    def kept(self) -> dict[str, Any]:
        """The settings that `run.json` records."""
        return {
            "every": self.every,
            "trainable_only": self.trainable_only,
            "task": self.task,
            "metadata": self.metadata,
        }


class Session:
    """Writes the checkpoints of one recorder into a run, from its first state to its end.

    The state at the start is written at construction, unless it exists. If the session is dropped
    or the interpreter exits, queued checkpoints are still written.

    Args:
        directory: of the run.
        contents: what the model holds now.
        settings: the recorder's.

    Raises:
        RecorderError: see `lcray.Recorder`.
    """

    def __init__(
        self, directory: str | os.PathLike[str], contents: Contents, settings: Settings
    ) -> None:
        self._layout = layout = layout_of(contents, trainable_only=settings.trainable_only)
        self._directory = locked = LockedDirectory(_local(directory))
        pinned = any(tensor.is_cuda for tensor in contents.tensors.values())
        try:
            first = Slot(layout, pinned=pinned)
            snapshot(layout, contents.tensors, first)
            self.start, self._content = _begin(locked, layout, first, settings)
        except BaseException:
            locked.close()
            raise

        # Neither this nor the finalizer, which runs at interpreter exit too, refers to the session.
        def write(step: int, slot: Slot) -> None:
            locked.write(file_name(step), [layout.head, slot.memory])

        limit = max(1, int(settings.queue_mib * 2**20) // max(1, layout.nbytes))
        self.writer = BackgroundWriter(write, lambda: Slot(layout, pinned=pinned), limit)
        self._finalizer = weakref.finalize(self, _finish, self.writer, locked)

    @property
    def is_open(self) -> bool:
        """Whether it can be closed here: only once, and not by the copy in a forked process."""
        return self._finalizer.alive and not self._directory.is_forked

    def check(self) -> None:
        """Raise the error of the background thread, if there is one.

        Raises:
            RecorderError: a checkpoint could not be written, or the session is closed.
        """
        if not self._finalizer.alive:
            raise RecorderError(f"{self._directory.path}: the recorder is closed; make a new one")
        self.writer.check()

    def record(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` and queue them as the checkpoint of `step`."""
        slot = self.writer.acquire()
        try:
            snapshot(self._layout, tensors, slot)
        except BaseException:
            self.writer.release(slot)
            raise
        self.writer.submit(step, slot)

    def close(self, step: int) -> None:
        """Write what is queued, and note that the run ended at `step`.

        Raises:
            RecorderError: a checkpoint could not be written.
        """
        self._finalizer.detach()
        try:
            self.writer.close()
            ended = {**self._content, "ended": True, "last_step": step}
            _write(self._directory, runfile.NAME, runfile.encode(ended))
        finally:
            self._directory.close()

    def abandon(self) -> None:
        """Write what is queued and release the directory, without an end."""
        self._finalizer()


def _finish(writer: BackgroundWriter, directory: LockedDirectory) -> None:
    if directory.is_forked:
        return
    try:
        writer.close()
    finally:
        directory.close()


def _write(directory: LockedDirectory, name: str, *chunks: bytes | memoryview) -> None:
    try:
        directory.write(name, chunks)
    except OSError as error:
        raise RecorderError(
            f"{directory.path / name}: cannot be written: {error.strerror}"
        ) from error


@dataclass(frozen=True)
class _Start:
    """Where a session begins: at `step`, whose checkpoint is `same` or is still to be written."""

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
            f"{root}: has checkpoints later than start={step}, up to step {later[-1].step}; pass "
            "overwrite=True to remove them, or use a new directory"
        )
    for checkpoint in later:
        if checkpoint.files != (root / file_name(checkpoint.step),):
            raise RecorderError(
                f"{checkpoint.files[0]}: was not written by a recorder; remove it yourself"
            )
    same = next((checkpoint for checkpoint in existing if checkpoint.step == step), None)
    return _Start(step, same, later)


def expected_start(directory: str | os.PathLike[str], start: int | None) -> int:
    """The step that a session begins from, for a process that only counts and writes nothing.

    Faults there are reported by the process that writes.
    """
    where = place(directory)
    if start is None and not isinstance(where, Remote) and where.is_dir():
        with suppress(CheckpointError):
            existing = list_checkpoints(where)
            return existing[-1].step if existing else 0
    return start or 0


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
    settings: Settings,
) -> tuple[int, dict[str, Any]]:
    """Check the directory, then write `run.json` and the first checkpoint: its step and content."""
    root = directory.path
    try:
        previous = runfile.load(root)
        if previous is not None:
            runfile.check_same_layers(root, previous, layout)
        chosen = _choose_start(root, settings.start, settings.overwrite)
        if chosen.same is not None:
            _check_resumes(chosen.same, first)
    except CheckpointError as error:
        raise RecorderError(str(error)) from error
    if chosen.discard:
        directory.remove([Path(str(file)) for gone in chosen.discard for file in gone.files])
    content = runfile.describe(layout, settings.kept, chosen.step, previous)
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
